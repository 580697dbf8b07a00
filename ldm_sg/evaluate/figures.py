"""Features -> the figures asked for; how a result reads and is written."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_sg.errors import InputError, choices
from ldm_sg.evaluate import metrics
from ldm_sg.evaluate.inception import Inception
from ldm_sg.evaluate.metrics import NEEDS
from ldm_sg.folder import write_json


def parse_metrics(text: str) -> list[str]:
    """'fd,prdc' -> ['fd', 'prdc']; InputError for one that does not exist."""
    wanted = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in wanted:
        if name not in NEEDS:
            raise InputError(f"metric {name!r}; {choices(name, NEEDS)}")
    if not wanted:
        raise InputError(f"metrics={text!r}: name at least one; {choices('', NEEDS)}")
    return wanted


def check_enough(wanted: list[str], images: int | None, where: str) -> None:
    """Refused before anything is computed: fewer images than a metric needs. None = not known yet."""
    for name in wanted:
        if images is not None and images < NEEDS[name]:
            raise InputError(f"{where}: {images} images are too few for {name}, which needs at least {NEEDS[name]}")


def check_network(wanted: list[str], network: Any) -> None:
    """The Inception score needs the classifier."""
    if "is" in wanted and not (isinstance(network, Inception) and network.classifies):
        raise InputError(
            "metric `is` reads a classifier's scores, and this feature network has none (its last layer is empty or "
            "missing): give --features inception with full weights, or leave `is` out"
        )


def compute(wanted: list[str], samples: Tensor, reference: Tensor, network: Any, seed: int) -> dict[str, float]:
    """Features [N, D] of samples and [M, D] of real images -> every figure but consistency, by its key."""
    found: dict[str, float] = {}
    if "fd" in wanted:
        found["fd"] = metrics.frechet_distance(samples, reference)
    if "kid" in wanted:
        found |= metrics.kernel_distance(samples, reference, seed=seed)
    if "prdc" in wanted:
        found |= metrics.manifold(samples, reference)
    if "is" in wanted:
        found |= metrics.inception_score(network.logits(samples.to(network.net.fc.weight.device)), seed=seed)
    return found


def remarks(
    wanted: list[str], asked: int, samples: Tensor, reference: Tensor, skipped: list[str], sizes: tuple[int, int]
) -> list[str]:
    """What a reader of the figures must know: counts that fell short, images left out or enlarged, biased estimates.

    `sizes`: pixels of the comparison and of the first reference image."""
    notes = [f"{len(samples):,} samples, not the {asked:,} asked for"] if len(samples) < asked else []
    if sizes[1] < sizes[0]:
        notes.append(
            f"reference images of {sizes[1]} px are enlarged to {sizes[0]} px: give --size {sizes[1]}, or larger ones"
        )
    smaller, dim = min(len(samples), len(reference)), samples.shape[1]
    if "fd" in wanted and smaller <= dim:
        notes.append(
            f"fd of {smaller:,} images in {dim:,} dimensions is far above its limit: compare it only at equal counts"
        )
    if skipped:
        notes.append(f"{len(skipped):,} images could not be read and are left out; the first: {skipped[0]}")
    return notes


def table(result: dict[str, Any]) -> str:
    """The figures in lines, then what they were computed of."""
    lines = [f"{name:<26}{value:>12.4g}" for name, value in result["metrics"].items()]
    made = ", ".join(f"{key} {value}" for key, value in result["sampling"].items())
    lines.append(
        f"{result['samples']:,} samples of {result['source']}{f' ({made})' if made else ''} against "
        f"{result['reference_images']:,} images of {result['reference']}, {result['preprocessing']['size']} px, "
        f"features {result['features']['name']}, {result['seconds']} s"
    )
    return "\n".join(lines + [f"note: {note}" for note in result["notes"]])


def prepare(file: Path) -> Path:
    """The folder of `file` exists and can be written, before hours of work; InputError otherwise."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"--out {str(file)!r}: {err.strerror}: give another --out FILE.json") from err
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise InputError(f"--out {str(file)!r} cannot be written there: give another --out FILE.json")
    return file


def free(file: Path, reference: str, wanted: list[str]) -> Path:
    """`file`, or the first of NAME_2, NAME_3 ... that does not hold the figures of another reference or choice."""
    names = itertools.chain([file], (file.with_stem(f"{file.stem}_{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists() or _is_of(name, reference, wanted))


def _is_of(file: Path, reference: str, wanted: list[str]) -> bool:
    try:
        there = json.loads(file.read_text())
        return (there["reference"], there["chosen"]) == (reference, wanted)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(file: Path, result: dict[str, Any]) -> None:
    """JSON that appears under its name when whole."""
    try:
        write_json(file, result)
    except InputError as err:  # a disk that filled up meanwhile
        raise InputError(f"--out {err}; the figures stand above") from err
