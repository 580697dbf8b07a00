"""sample: run -> images."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from ldm_sg.errors import InputError, choices
from ldm_sg.guidance.signal import Guidance
from ldm_sg.hardware import pick_device
from ldm_sg.pipeline import SelfGuidedPipeline, image_generator, make_solver, slerp, step_arguments
from ldm_sg.report.grids import best_scale, grid, labelled_rows

PRESETS = {"paper": {"scheduler": "ddim", "steps": 250, "eta": 0.0, "w": 2.0}}


@dataclass
class SampleOptions:
    """What a person asks for; `settings()` is what decides the pixels."""

    cluster: list[int] = field(default_factory=list)
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
    """Images [B, 3, H, W] uint8 and one record an image."""

    images: Tensor
    records: list[dict[str, Any]]


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


def signals(pipe: SelfGuidedPipeline, options: SampleOptions) -> Guidance:
    """n samples of each cluster asked for, or n signals drawn from the training distribution."""
    if options.cluster:
        return pipe.clusters([k for k in options.cluster for _ in range(options.n)])
    return pipe.draw(options.n, options.seed)


def generate(
    pipe: SelfGuidedPipeline, guidance: Guidance, options: SampleOptions, w: float, progress: bool = True
) -> Iterator[Batch]:
    """Image i of the whole request has noise (seed, i), whatever the batch size."""
    bar = tqdm(total=len(guidance), unit="image", desc=f"sampling w={w:g}", disable=not progress)
    for start in range(0, len(guidance), options.batch_size):
        part = guidance[start : start + options.batch_size]
        images = pipe(part, w, options.steps, options.scheduler, options.seed, start, options.eta,
                      precision=options.precision)  # fmt: skip
        bar.update(len(part))
        yield Batch(images, [_record(options, k=_id(part, i), w=w, index=start + i) for i in range(len(part))])
    bar.close()


def _sweep(pipe: SelfGuidedPipeline, options: SampleOptions) -> Iterator[Batch]:
    """Rows: w. Columns: the same signals and noise."""
    chosen = signals(pipe, options)
    for w in options.sweep_w:
        yield from generate(pipe, chosen[: options.n], options, w)


def _interpolate(pipe: SelfGuidedPipeline, options: SampleOptions) -> Iterator[Batch]:
    """n images on the arc between two clusters' embeddings: first row fixed noise, second row noise on its own arc too."""
    first, last = options.interpolate
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
            chosen[i : i + 1], options.w, options.steps, options.scheduler, options.seed, i, options.eta,
            watch=lambda step, x0, seen=seen: seen.update({step: x0}) if step in shown else None,
            precision=options.precision,
        )  # fmt: skip
        frames = [pipe.decode(seen[step]) for step in shown[:-1]] + [final]
        yield Batch(
            torch.cat(frames), [_record(options, k=_id(chosen, i), index=i, step=s, w=options.w) for s in shown]
        )


def _record(options: SampleOptions, **what: Any) -> dict[str, Any]:
    return {"seed": options.seed, **what, "steps": options.steps, "scheduler": options.scheduler}


def _id(guidance: Guidance, i: int) -> int:
    assert guidance.k is not None
    return int(guidance.k[i])


def _write(folder: Path, batches: Iterator[Batch], columns: int, captions: list[str], options: SampleOptions) -> None:
    shown: list[Tensor] = []
    count = 0
    with (folder / "samples.jsonl").open("w") as lines:
        for batch in batches:
            for image, record in zip(batch.images, batch.records, strict=True):
                name = f"{count:06d}.png"
                to_pil_image(image).save(folder / name)
                lines.write(json.dumps({"file": name, **record}) + "\n")
                count += 1
            shown.extend(batch.images[: max(0, 400 - len(shown))])
    pictures = torch.stack(shown)
    rows = list(pictures.split(columns))
    scale = best_scale(pictures)
    picture = labelled_rows(captions, rows, scale=scale) if captions else grid(pictures, columns, scale=scale)
    picture.save(folder / "grid.png")
    (folder / "settings.json").write_text(json.dumps(options.settings(), indent=2) + "\n")


def _name(options: SampleOptions) -> str:
    what = "_".join(
        [f"c{'-'.join(map(str, options.cluster))}"] * bool(options.cluster)
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
