"""sample: run -> images."""

import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

from ldm_sg.data.signals import Signals, png
from ldm_sg.errors import InputError
from ldm_sg.folder import LOCK, locked, whole
from ldm_sg.guidance.signal import Guidance
from ldm_sg.hardware import use_bf16
from ldm_sg.pipeline import SelfGuidedPipeline, image_generator, make_solver, open_pipeline, slerp, step_arguments
from ldm_sg.report.grids import best_scale, grid, labelled_rows
from ldm_sg.report.signals import pictures
from ldm_sg.verbs.request import SampleOptions, signals

MOST_SHOWN = 400  # images in a grid


@dataclass(frozen=True)
class Batch:
    """Images [B, 3, H, W] uint8, one record an image, and the signals that they were asked to follow, where one has its own."""

    images: Tensor
    records: list[dict[str, Any]]
    asked: Signals | None = None


def sample(run: str, options: SampleOptions, out: str | None = None, overwrite: bool = False) -> Path:
    """Writes NNNNNN.png, grid.png, samples.jsonl and settings.json into `out`; returns it."""
    options.check()
    folder = Path(out) if out is not None else Path(run) / "samples" / options.name()
    if out is None and not Path(run).is_dir():
        raise InputError(f"run {run!r} not found")
    with locked(folder):
        return _sample(run, options, folder, overwrite)


def _sample(run: str, options: SampleOptions, folder: Path, overwrite: bool) -> Path:
    _refuse_foreign(folder, options, overwrite)
    pipe = open_pipeline(run, options.device)
    use_bf16(options.precision, pipe.device)  # refused before anything is drawn
    make_solver(options.scheduler, pipe.scheduler, options.steps, pipe.device)
    step_arguments(options.scheduler, [], options.eta)
    batches, columns, captions = plan(pipe, options)
    with whole(folder) as building:
        building.mkdir()
        _write(building, batches, columns, captions, options)
        _keep_foreign(folder, building)
    return folder


def plan(pipe: SelfGuidedPipeline, options: SampleOptions) -> tuple[Iterator[Batch], int, list[str]]:
    """What to draw, lazily, how many columns its grid has, and captions of its rows if they have any."""
    if options.interpolate:
        return _interpolate(pipe, options), options.n, ["fixed noise", "moving noise"]
    if options.trajectory:
        return _trajectory(pipe, options), min(10, options.steps), []
    asked = signals(pipe, options)
    if options.sweep_w:  # the same signals and noise in each row
        rows = itertools.chain.from_iterable(generate(pipe, asked, options, w) for w in options.sweep_w)
        return rows, len(asked), [f"w = {w:g}" for w in options.sweep_w]
    columns = options.n if options.cluster and options.n <= 16 else 8
    return generate(pipe, asked, options, options.w), columns, []


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
        images = pipe(Guidance.from_k(k), options.w, options.steps, options.scheduler, options.seed, 0, options.eta, noise,
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
        records = [_record(options, **said, index=i, step=s, w=options.w) for s in shown]
        yield Batch(torch.cat(frames), records, chosen[torch.full((len(frames),), i)])


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
            room = max(0, MOST_SHOWN - sum(map(len, shown)))
            shown.append(batch.images[:room])
            layout = None if batch.asked is None else pictures(batch.asked, batch.images.shape[-1])
            if layout is not None:
                layouts.append(layout[:room])
    if count > MOST_SHOWN:
        print(f"note: grid.png shows the first {MOST_SHOWN} of {count:,} images", file=sys.stderr)
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


def _refuse_foreign(folder: Path, options: SampleOptions, overwrite: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"--out {str(folder)!r} is a file")
    try:
        there = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError) as err:
        if all(file.name == LOCK for file in folder.iterdir()):
            return
        raise InputError(f"--out {str(folder)!r} is not empty and holds no samples: choose another folder") from err
    if there != options.settings() and not overwrite:
        raise InputError(f"--out {str(folder)!r} holds samples of other settings: choose another, or add --overwrite")


def _keep_foreign(folder: Path, building: Path) -> None:
    """What others put beside the samples goes along; figures of them only while the settings are the same."""
    if not (folder / "settings.json").is_file():
        return
    same = (folder / "settings.json").read_bytes() == (building / "settings.json").read_bytes()
    mine = rf"{re.escape(LOCK)}|\d{{6,}}\.png|grid\.png|samples\.jsonl|settings\.json|masks"
    replaced = re.compile(mine if same else mine + r"|evaluation(_\d+)?\.json")
    for file in folder.iterdir():
        if not replaced.fullmatch(file.name):
            (shutil.copytree if file.is_dir() else shutil.copy2)(file, building / file.name)
