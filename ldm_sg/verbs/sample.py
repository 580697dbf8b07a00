"""sample: run -> images."""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ldm_sg.commands import SampleCommand
from ldm_sg.data.signals import png
from ldm_sg.errors import InputError
from ldm_sg.folder import LOCK, locked, whole
from ldm_sg.hardware import use_bf16
from ldm_sg.pipeline import open_pipeline
from ldm_sg.report.grids import best_scale, grid, labelled_rows
from ldm_sg.report.signals import pictures
from ldm_sg.sampling import solvers
from ldm_sg.sampling.options import SampleOptions, with_preset
from ldm_sg.sampling.schedules import objective_of
from ldm_sg.sampling.sheets import Batch, plan

MOST_SHOWN = 400  # images in a grid


def command(**typed: Any) -> None:
    """What the command line runs: `sample`, of the clusters that a text describes and with a preset's settings."""
    asked = SampleCommand(**typed)
    if asked.called is not None:
        from ldm_sg.verbs.inspect import clusters_named

        if asked.cluster or asked.interpolate or asked.like or asked.mask:
            others = "--cluster, --interpolate, --like and --mask"
            raise InputError(f"--name {asked.called!r} picks the clusters: leave {others} out")
        asked.cluster = clusters_named(asked.run, asked.called, asked.device)
    print(sample(asked.run, with_preset(asked, asked.preset, typed), asked.out, asked.overwrite) / "grid.png")


def sample(run: str, options: SampleOptions, out: str | None = None, overwrite: bool = False) -> Path:
    """Writes NNNNNN.png, grid.png, samples.jsonl and settings.json into `out`; returns it."""
    options.check()
    folder = Path(out) if out is not None else Path(run) / "samples" / options.name()
    if out is None and not Path(run).is_dir():
        raise InputError(f"run {run!r} not found")
    with locked(folder):
        _refuse_foreign(folder, asked := options.settings(), overwrite)
        pipe = open_pipeline(run, options.device, options.checkpoint, options.lora)
        if options.size:
            pipe.resize(*options.size)
        use_bf16(options.precision, pipe.device)  # refused before anything is drawn
        solvers.make_grid(objective_of(pipe.scheduler), options.steps, options.spacing)
        if options.sweep_w:
            strengths = [pipe.strength(w) for w in options.sweep_w]
            if strengths != options.sweep_w:
                raise InputError(
                    "--sweep-w: this run was trained without guidance (guidance.drop=1), so w changes nothing"
                )
        else:
            options = replace(options, w=pipe.strength(options.w))
        batches, columns, captions = plan(pipe, options)
        with whole(folder) as building:
            building.mkdir()
            _write(building, batches, columns, captions)
            (building / "settings.json").write_text(json.dumps(asked, indent=2) + "\n")
            _keep_foreign(folder, building)
    return folder


def _write(folder: Path, batches: Iterator[Batch], columns: int, captions: list[str]) -> None:
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
            if not (room := max(0, MOST_SHOWN - sum(map(len, shown)))):
                continue
            shown.append(batch.images[:room])
            layout = None if batch.asked is None else pictures(batch.asked, batch.images.shape[-1])
            if layout is not None:
                layouts.append(layout[:room])
    if count > MOST_SHOWN:
        print(f"note: grid.png shows the first {MOST_SHOWN} of {count:,} images", file=sys.stderr)
    _grid(torch.cat(shown), torch.cat(layouts) if layouts else None, columns, captions).save(folder / "grid.png")


def _grid(images: Tensor, layouts: Tensor | None, columns: int, captions: list[str]) -> Image.Image:
    """Rows of samples; above each row, where the signals are spatial, what was asked for."""
    scale = best_scale(images)
    if layouts is None:
        rows = images.split(columns)
        return labelled_rows(captions, rows, scale=scale) if captions else grid(images, columns, scale=scale)
    rows = [row for pair in zip(layouts.split(columns), images.split(columns), strict=True) for row in pair]
    names = [name for caption in captions or [""] * (len(rows) // 2) for name in ("asked", caption or "sample")]
    return labelled_rows(names, rows, scale=scale)


def _refuse_foreign(folder: Path, asked: dict[str, Any], overwrite: bool) -> None:
    if folder.is_dir() and all(file.name == LOCK for file in folder.iterdir()):
        return
    try:
        there = json.loads((folder / "settings.json").read_text())
    except (OSError, ValueError) as err:
        raise InputError(f"--out {str(folder)!r} is a file, or holds no samples: choose another folder") from err
    if there != asked and not overwrite:
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
