"""sample: run -> images."""

import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from ldm_sg.annotate.kinds import load_annotator
from ldm_sg.data.images import BadImage, crop_resize, crop_resize_index, decode, to_float, to_tensor
from ldm_sg.data.signals import PackedMasks, Signals, png
from ldm_sg.errors import InputError, choices
from ldm_sg.guidance.signal import Guidance
from ldm_sg.guidance.spatial import VOID
from ldm_sg.hardware import pick_device
from ldm_sg.pipeline import SelfGuidedPipeline, image_generator, make_solver, slerp, step_arguments
from ldm_sg.report.grids import best_scale, grid, labelled_rows
from ldm_sg.report.signals import pictures

VARY = ("layout", "content")
PRESETS = {"paper": {"scheduler": "ddim", "steps": 250, "eta": 0.0, "w": 2.0}}


@dataclass
class SampleOptions:
    """What a person asks for; `settings()` is what decides the pixels."""

    cluster: list[int] = field(default_factory=list)
    box: list[float] = field(default_factory=list)  # x0, y0, x1, y1 in pixels of the image that is made
    mask: str | None = None  # file of an index mask
    like: str | None = None  # file of an image to imitate
    vary: str | None = None  # layout (other signals, the same noise) or content (one signal, other noise)
    n: int = 16
    w: float = 2.0
    steps: int = 25
    scheduler: str = "dpmpp_2m"
    eta: float = 0.0
    seed: int = 0
    batch_size: int = 64
    sweep_w: list[float] = field(default_factory=list)
    interpolate: list[int] = field(default_factory=list)
    trajectory: bool = False
    precision: str = "fp32"
    device: str = "auto"

    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k not in ("batch_size", "device")}


@dataclass(frozen=True)
class Batch:
    """Images [B, 3, H, W] uint8, one record an image, and the signals that they were asked to follow, where one has its own."""

    images: Tensor
    records: list[dict[str, Any]]
    asked: Signals | None = None


def open_pipeline(source: str | Path, device: str = "auto") -> SelfGuidedPipeline:
    """A run folder or a pipeline folder; InputError when it is neither."""
    folder = Path(source)
    for candidate in (folder / "pipeline", folder):
        if (candidate / "model_index.json").is_file():
            on = pick_device(device)
            pipe = SelfGuidedPipeline.from_pretrained(candidate).to(on)
            pipe.unet.eval()
            return pipe
    if not folder.is_dir():
        raise InputError(f"run {str(source)!r} not found")
    raise InputError(f"{str(source)!r} has no pipeline/: give the folder of a run that has saved a checkpoint")


def sample(run: str, options: SampleOptions, out: str | None = None, overwrite: bool = False) -> Path:
    """Writes NNNNNN.png, grid.png, samples.jsonl and settings.json into `out`; returns it."""
    _check(options)
    folder = Path(out) if out else Path(run) / "samples" / _name(options)
    _refuse_foreign(folder, options, overwrite)
    pipe = open_pipeline(run, options.device)
    make_solver(options.scheduler, pipe.scheduler, options.steps, pipe.device)  # refused before anything is drawn
    step_arguments(options.scheduler, [], options.eta)
    batches, columns, captions = plan(pipe, options)
    building = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    building.mkdir(parents=True)
    try:
        _write(building, batches, columns, captions, options)
        shutil.rmtree(folder, ignore_errors=True)
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def plan(pipe: SelfGuidedPipeline, options: SampleOptions) -> tuple[Iterator[Batch], int, list[str]]:
    """What to draw, lazily, how many columns its grid has, and captions of its rows if they have any."""
    if options.sweep_w:
        return _sweep(pipe, options), options.n, [f"w = {w:g}" for w in options.sweep_w]
    if options.interpolate:
        return _interpolate(pipe, options), options.n, ["fixed noise", "moving noise"]
    if options.trajectory:
        return _trajectory(pipe, options), min(10, options.steps), []
    columns = options.n if options.cluster and options.n <= 16 else 8
    return generate(pipe, signals(pipe, options), options, options.w), columns, []


def signals(pipe: SelfGuidedPipeline, options: SampleOptions) -> Signals:
    """What is asked for: n samples of each cluster, of a box or mask, of an image's own signal, or n signals drawn from the
    training distribution. Parts that are not asked for are drawn."""
    if options.like:
        return _like(pipe, options.like)[torch.zeros(options.n, dtype=torch.long)]
    ids = [k for k in options.cluster for _ in range(options.n)] or None
    drawn = pipe.draw(len(ids) if ids else options.n, options.seed, clusters=ids)
    if options.vary == "content":
        drawn = drawn[torch.zeros(len(drawn), dtype=torch.long)]
    if options.box:
        _need_spatial(pipe, "box")
        drawn = drawn.replace(box=_box(options.box, pipe.image_size).expand(len(drawn), 1, 4))
    if options.mask:
        _need_spatial(pipe, "mask")
        mask = _read_mask(Path(options.mask), pipe)
        drawn = drawn.replace(mask=PackedMasks.of([mask] * len(drawn)))
    return drawn


def _need_spatial(pipe: SelfGuidedPipeline, part: str) -> None:
    if pipe.spec.spatial != part:
        without = {None: "boxes or masks", "box": "masks", "mask": "boxes"}[pipe.spec.spatial]
        raise InputError(f"--{part}: this run was trained without {without}; it accepts {pipe.accepts()}")


def _box(corners: list[float], size: int) -> Tensor:
    """x0, y0, x1, y1 in pixels -> [1, 1, 4] as shares of the sides."""
    x0, y0, x1, y1 = corners
    if not (0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size):
        raise InputError(
            f"--box {x0:g},{y0:g},{x1:g},{y1:g}: needs 0 <= x0 < x1 <= {size} and the same of y, in pixels"
        )
    return torch.tensor(corners).view(1, 1, 4) / size


def _read_mask(path: Path, pipe: SelfGuidedPipeline) -> np.ndarray:
    """An index image of any size -> uint8 [S, S] of the run's mask size; InputError for ids that the run does not have."""
    try:
        with Image.open(io.BytesIO(path.read_bytes()), formats=("PNG",)) as image:
            if image.mode not in ("P", "L"):
                raise InputError(
                    f"--mask {path}: mode {image.mode}; an index image is needed: an 8-bit greyscale or palette PNG"
                )
            mask = np.array(crop_resize_index(image, pipe.image_size))
    except (OSError, SyntaxError) as err:
        raise InputError(f"--mask {path}: {getattr(err, 'strerror', None) or 'cannot be read as PNG'}") from err
    ids = np.unique(mask[mask != VOID])
    if not len(ids):
        raise InputError(f"--mask {path}: all of it is {VOID}, which means no class")
    if ids[-1] >= pipe.spec.num_labels:
        raise InputError(
            f"--mask {path}: class {ids[-1]} in it; this run has 0 to {pipe.spec.num_labels - 1} ({VOID} = none)"
        )
    return mask


def _like(pipe: SelfGuidedPipeline, file: str) -> Signals:
    """The signal of an image file, by the run's own g and f."""
    annotator = load_annotator(pipe.annotator_folder, pipe.device)
    try:
        image = crop_resize(decode(Path(file).read_bytes()), pipe.image_size, pipe.source_size)
    except OSError as err:
        raise InputError(f"--like {file}: cannot be read: {err.strerror or err}") from err
    except BadImage as err:
        raise InputError(f"--like {file}: {err.reason}") from err
    return annotator(to_float(to_tensor(image)[None].to(pipe.device)))


def generate(
    pipe: SelfGuidedPipeline, asked: Signals, options: SampleOptions, w: float, progress: bool = True
) -> Iterator[Batch]:
    """Image i of the whole request has noise (seed, i), whatever the batch size; with vary=layout all have noise (seed, 0)."""
    bar = tqdm(total=len(asked), unit="image", desc=f"sampling w={w:g}", disable=not progress)
    for start in range(0, len(asked), options.batch_size):
        part = asked[torch.arange(start, min(start + options.batch_size, len(asked)))]
        noise = None
        if options.vary == "layout":
            one = torch.randn(pipe.latent_shape, generator=image_generator(options.seed, 0))
            noise = one.expand(len(part), -1, -1, -1)
        images = pipe(part, w, options.steps, options.scheduler, options.seed, start, options.eta, noise,
                      precision=options.precision)  # fmt: skip
        bar.update(len(part))
        records = [_record(options, **part.describe(i), w=w, index=start + i) for i in range(len(part))]
        yield Batch(images, records, part)
    bar.close()


def _sweep(pipe: SelfGuidedPipeline, options: SampleOptions) -> Iterator[Batch]:
    """Rows: w. Columns: the same signals and noise."""
    chosen = signals(pipe, options)
    for w in options.sweep_w:
        yield from generate(pipe, chosen[torch.arange(options.n)], options, w)


def _interpolate(pipe: SelfGuidedPipeline, options: SampleOptions) -> Iterator[Batch]:
    """n images on the arc between two clusters' embeddings: first row fixed noise, second row noise on its own arc too."""
    first, last = options.interpolate
    if pipe.spec.multi_hot or pipe.spec.spatial:
        raise InputError("--interpolate walks between two cluster ids; this run's signals are more than an id")
    pipe.clusters([first, last])  # refuses ids that do not exist
    rows = pipe.conditioner.labels.detach()
    k = torch.zeros(options.n, pipe.spec.num_labels)
    shares = [i / max(1, options.n - 1) for i in range(options.n)]
    for i, share in enumerate(shares):
        a, b = slerp(rows[first], rows[last], share)
        k[i, first] += a
        k[i, last] += b
    ends = [torch.randn(pipe.latent_shape, generator=image_generator(options.seed, i)) for i in (0, 1)]
    arc = []
    for share in shares:
        a, b = slerp(ends[0], ends[1], share)
        arc.append(a * ends[0] + b * ends[1])
    for noise in (ends[0].expand(options.n, -1, -1, -1), torch.stack(arc)):
        images = pipe(Guidance.from_k(k), options.w, options.steps, options.scheduler, options.seed, 0, noise=noise,
                      precision=options.precision)  # fmt: skip
        yield Batch(images, [_record(options, k=[first, last], share=s, w=options.w) for s in shares])


def _trajectory(pipe: SelfGuidedPipeline, options: SampleOptions) -> Iterator[Batch]:
    """Each row one image: the predicted clean image at up to ten steps, the last one finished."""
    chosen = signals(pipe, options)
    columns = min(10, options.steps)
    shown = [round(i * (options.steps - 1) / max(1, columns - 1)) for i in range(columns)]
    for i in range(len(chosen)):
        seen: dict[int, Tensor] = {}
        final = pipe(
            chosen[torch.tensor([i])], options.w, options.steps, options.scheduler, options.seed, i, options.eta,
            watch=lambda step, x0, seen=seen: seen.update({step: x0}) if step in shown else None,
            precision=options.precision,
        )  # fmt: skip
        frames = [pipe.decode(seen[step]) for step in shown[:-1]] + [final]
        said = chosen.describe(i)
        yield Batch(torch.cat(frames), [_record(options, **said, index=i, step=s, w=options.w) for s in shown])


def _record(options: SampleOptions, **what: Any) -> dict[str, Any]:
    return {"seed": options.seed, **what, "steps": options.steps, "scheduler": options.scheduler}


def _write(folder: Path, batches: Iterator[Batch], columns: int, captions: list[str], options: SampleOptions) -> None:
    shown: list[Tensor] = []
    layouts: list[Tensor] = []
    count = 0
    with (folder / "samples.jsonl").open("w") as lines:
        for batch in batches:
            for i, (image, record) in enumerate(zip(batch.images, batch.records, strict=True)):
                name = f"{count:06d}.png"
                to_pil_image(image).save(folder / name)
                if batch.asked is not None and batch.asked.mask is not None:
                    record["mask"] = f"masks/{name}"
                    (folder / "masks").mkdir(exist_ok=True)
                    (folder / record["mask"]).write_bytes(png(batch.asked.mask[i]))
                lines.write(json.dumps({"file": name, **record}) + "\n")
                count += 1
            room = max(0, 400 - sum(map(len, shown)))
            shown.append(batch.images[:room])
            layout = None if batch.asked is None else pictures(batch.asked, batch.images.shape[-1])
            if layout is not None:
                layouts.append(layout[:room])
    _grid(torch.cat(shown), torch.cat(layouts) if layouts else None, columns, captions).save(folder / "grid.png")
    (folder / "settings.json").write_text(json.dumps(options.settings(), indent=2) + "\n")


def _grid(images: Tensor, layouts: Tensor | None, columns: int, captions: list[str]) -> Image.Image:
    """Rows of samples; above each row, where the signals are spatial, what was asked for."""
    scale = best_scale(images)
    if layouts is None:
        return (
            labelled_rows(captions, images.split(columns), scale=scale)
            if captions
            else grid(images, columns, scale=scale)
        )
    rows = [row for pair in zip(layouts.split(columns), images.split(columns), strict=True) for row in pair]
    names = [name for caption in captions or [""] * (len(rows) // 2) for name in ("asked", caption or "sample")]
    return labelled_rows(names, rows, scale=scale)


def _name(options: SampleOptions) -> str:
    what = "_".join(
        [f"c{'-'.join(map(str, options.cluster))}"] * bool(options.cluster)
        + [f"box{'-'.join(f'{c:g}' for c in options.box)}"] * bool(options.box)
        + [f"{flag}-{Path(file).stem}" for flag, file in (("mask", options.mask), ("like", options.like)) if file]
        + [f"vary-{options.vary}"] * bool(options.vary)
        + ["sweep"] * bool(options.sweep_w)
        + [f"interpolate{'-'.join(map(str, options.interpolate))}"] * bool(options.interpolate)
        + ["trajectory"] * options.trajectory
    )
    strength = "-".join(f"{w:g}" for w in options.sweep_w) or f"{options.w:g}"
    return f"{what or 'drawn'}_n{options.n}_w{strength}_{options.scheduler}{options.steps}_seed{options.seed}"


def _check(options: SampleOptions) -> None:
    for name in ("n", "batch_size", "steps"):
        if getattr(options, name) < 1:
            raise InputError(f"{name}={getattr(options, name)}: at least 1")
    for w in (options.w, *options.sweep_w):
        if not math.isfinite(w):
            raise InputError(f"w={w}: a finite number")
    if not 0 <= options.eta <= 1:
        raise InputError(f"eta={options.eta}: a share between 0 and 1")
    modes = [bool(options.sweep_w), bool(options.interpolate), options.trajectory]
    if sum(modes) > 1:
        raise InputError("--sweep-w, --interpolate and --trajectory draw different pictures: give one")
    if options.interpolate and len(options.interpolate) != 2:
        raise InputError(f"--interpolate takes two cluster ids, for example 3,17; got {options.interpolate}")
    if options.interpolate and options.cluster:
        raise InputError("--interpolate names its own clusters: leave --cluster out")
    if options.box and len(options.box) != 4:
        raise InputError(f"--box takes x0,y0,x1,y1 in pixels, got {options.box}")
    if options.like and (options.cluster or options.box or options.mask):
        raise InputError("--like takes the whole signal from the image: leave --cluster, --box and --mask out")
    if options.vary not in (None, *VARY):
        raise InputError(f"--vary {options.vary!r}; {choices(options.vary, VARY)}")
    if options.vary == "layout" and (options.box or options.mask or options.like):
        raise InputError("--vary layout draws other boxes or masks: leave --box, --mask and --like out")


def _refuse_foreign(folder: Path, options: SampleOptions, overwrite: bool) -> None:
    if not folder.exists() or overwrite:
        return
    if not folder.is_dir():
        raise InputError(f"--out {str(folder)!r} is a file")
    try:
        there = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError) as err:
        if not any(folder.iterdir()):
            return
        raise InputError(f"--out {str(folder)!r} is not empty and holds no samples: choose another folder") from err
    if there != options.settings():
        raise InputError(f"--out {str(folder)!r} holds samples of other settings: choose another, or add --overwrite")


def apply_preset(options: SampleOptions, preset: str | None) -> SampleOptions:
    """The preset's settings over `options`."""
    if preset is None:
        return options
    if preset not in PRESETS:
        raise InputError(f"preset {preset!r}; {choices(preset, PRESETS)}")
    return SampleOptions(**{**asdict(options), **PRESETS[preset]})
