"""dedup: an annotation set -> a list of near-duplicates and outliers for `train leave_out=`; nothing is deleted."""

import json
from pathlib import Path
from typing import Any

import torch

from ldm_sg.annotate.dedup import Left, left_out
from ldm_sg.autoencoder import load_autoencoder
from ldm_sg.data.images import to_uint8
from ldm_sg.data.latents import LatentSet
from ldm_sg.errors import InputError
from ldm_sg.evaluate.nearby import rebuilt
from ldm_sg.folder import write_text
from ldm_sg.report import grids

FILE = "leave_out.jsonl"
SHOWN = 12  # pairs, and outliers, in the picture


def dedup(
    annotation: str | Path, threshold: float = 0.96, outliers: float = 0.0, out: str | Path | None = None
) -> Path:
    """Writes the list, a JSON line an image, and a picture of the most doubtful ones; returns the list's path."""
    if not 0 < threshold <= 1 or not 0 <= outliers < 1:
        raise InputError(f"threshold={threshold}, outliers={outliers}: a cosine above 0, and a share from 0 to below 1")
    path = Path(out) if out is not None else Path(annotation) / FILE
    if path.suffix != ".jsonl" or (path.with_suffix(".png").exists() and not path.is_file()):
        raise InputError(f"--out {str(path)!r}: give a NAME.jsonl beside which no NAME.png of yours lies")
    latents = LatentSet(annotation)
    found = left_out(latents.features().numpy(), threshold, outliers)
    write_text(path, "".join(json.dumps({"set": latents.hash[:16], **_line(left)}) + "\n" for left in found))
    _picture(latents, found, path.with_suffix(".png"))
    twins = sum(left.kept is not None for left in found)
    print(
        f"{twins:,} near-duplicates and {len(found) - twins:,} outliers of {len(latents):,} images: train leave_out={path}"
    )
    return path


def _line(left: Left) -> dict[str, Any]:
    why = "outlier" if left.kept is None else f"like {left.kept}"
    return {"index": left.index, "why": why, "cosine": round(left.cosine, 4)}


def _picture(latents: LatentSet, found: list[Left], path: Path) -> None:
    """The pairs of lowest cosine, above each other, and the farthest outliers, as the first stage gives them back."""
    twins = sorted((left for left in found if left.kept is not None), key=lambda left: left.cosine)[:SHOWN]
    rows = {
        "kept": [left.kept for left in twins],
        "left out": [left.index for left in twins],
        "outliers": [left.index for left in found if left.kept is None][:SHOWN],
    }
    shown = {name: torch.tensor(indices) for name, indices in rows.items() if indices}
    if shown:
        autoencoder = load_autoencoder(str(latents.folder / "autoencoder"))
        with torch.no_grad():
            decode, size = (lambda z: to_uint8(autoencoder.decode(z))), latents.manifest["size"]
            images = [rebuilt(latents, at, decode=decode, size=size) for at in shown.values()]
        grids.save(grids.labelled_rows(list(shown), images), path)
