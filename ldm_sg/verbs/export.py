"""export: run -> a pipeline folder, here or on the hub, that needs nothing but diffusers, with a card that says what it is."""

import re
import sys
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ldm_sg.errors import InputError
from ldm_sg.folder import read_mapping, whole, write_text
from ldm_sg.hub import answers, upload
from ldm_sg.onnx import export_onnx, need
from ldm_sg.parts import PARTS
from ldm_sg.pipeline import SelfGuidedPipeline, open_pipeline
from ldm_sg.report.card import card
from ldm_sg.report.grids import best_scale, grid, save

HUB = "hub://"
SHOWN = 32  # samples in the card's grid


def export(
    run: str | Path, to: str | Path, checkpoint: str | None = None, onnx: bool = False, device: str = "auto"
) -> str:
    """Writes the run's pipeline into the folder `to`, or uploads it to `hub://USER/NAME`, whole: weights of the first stage and
    the code that diffusers loads it with; README.md, grid.png, with `onnx` also ONNX files. Returns where it is."""
    name = str(to).removeprefix(HUB) if str(to).startswith(HUB) else None
    _check(str(to), name)
    if onnx:
        need()
    pipe = open_pipeline(run, device, checkpoint)
    place: AbstractContextManager[Any] = tempfile.TemporaryDirectory() if name else whole(Path(to))
    with place as new:
        folder = Path(new)
        pipe.save_pretrained(folder)
        images = pipe.generate(pipe.draw(SHOWN), w=pipe.usual_w, precision="auto")
        save(grid(images, columns=8, scale=best_scale(images)), folder / "grid.png")
        if onnx:
            for file, difference in export_onnx(pipe, folder / "onnx").items():
                print(f"{file}: at most {difference:.1e} from torch in onnxruntime", file=sys.stderr)
        write_text(folder / "README.md", _card(pipe, name or str(to), Path(run), onnx))
        where = upload(folder, name) if name else str(to)
    print(where)
    return where


def _check(to: str, name: str | None) -> None:
    if name is None:
        folder = Path(to)
        own = {"README.md", "grid.png", "onnx", "annotator", "model_index.json", "pipeline.py", *PARTS}
        there = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        if folder.is_file() or there - own or (there and "README.md" not in there):
            raise InputError(f"{to}: a file, or not empty and no earlier export: choose another folder")
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"{to}: write it as hub://USER/NAME")
    if constants.HF_HUB_OFFLINE or not answers(constants.ENDPOINT):
        raise InputError(
            f"{to}: no network, {constants.ENDPOINT} does not answer; export into a folder: ldm-sg export RUN DIR"
        )


def _card(pipe: SelfGuidedPipeline, source: str, run: Path, onnx: bool) -> str:
    """What the parts are is said by their own manifests."""
    spec, folder = pipe.spec, pipe.annotator_folder
    g = read_mapping(folder / "annotator.yaml").get("features") if folder else None
    if g and (folder / "g" / "manifest.yaml").is_file():
        g |= {"licence": read_mapping(folder / "g" / "manifest.yaml").get("licence")}
    signal = {None: f"{spec.num_labels or 'the'} {spec.kind}", "box": "boxes", "mask": "masks"}[spec.spatial]
    parts = {"first stage": pipe.autoencoder.manifest, "g": g}
    return card(source, run, parts, signal, spec.num_labels, pipe.usual_w, onnx)
