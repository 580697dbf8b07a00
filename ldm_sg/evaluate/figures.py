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

GUIDANCE = ("consistency", "layout", "edit")  # judged by the run's own g and f


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


def classifies(network: Any) -> bool:
    return isinstance(network, Inception) and network.classifies


def compute(wanted: list[str], samples: Tensor, reference: Tensor, network: Any, seed: int) -> dict[str, float]:
    """Features [N, D] of samples and [M, D] of real images -> the figures that are distances, by their key."""
    found: dict[str, float] = {}
    if "fd" in wanted:
        found["fd"] = metrics.frechet_distance(samples, reference)
    if "kid" in wanted:
        found |= metrics.kernel_distance(samples, reference, seed=seed)
    if "prdc" in wanted:
        found |= metrics.manifold(samples, reference, seed=seed)
    if "is" in wanted:
        found |= metrics.inception_score(network.logits(samples.to(network.net.fc.weight.device)), seed=seed)
    return found


def remarks(result: dict[str, Any], smallest: int, skipped: dict[str, str]) -> list[str]:
    """What a reader of the figures must know: counts that fell short or differ, images left out or enlarged, estimates that
    are biased, judges that are not impartial. smallest: pixels of the first reference image; skipped: image -> reason."""
    asked, samples, real = result["asked"], result["samples"], result["reference_images"]
    fewer, size = min(samples, real), result["preprocessing"]["size"]
    notes = [f"{samples:,} samples, not the {asked['n']:,} asked for"] * (samples < asked["n"])
    if smallest < size:
        notes.append(
            f"reference images of {smallest} px are enlarged to {size} px: give --size {smallest}, or larger ones"
        )
    if "prdc" in asked["metrics"] and samples != real:
        kind = "reference images" if real > samples else "samples"
        notes.append(f"prdc compares equal numbers: {fewer:,} of the {max(samples, real):,} {kind}, chosen at random")
    for space, found in result["metrics"].items():
        judge = result["judges"][space]
        if "fd" in found and fewer <= judge["dim"]:
            notes.append(
                f"fd of {fewer:,} images in {judge['dim']:,} dimensions ({space}) is far above its limit: compare it only "
                "at equal counts"
            )
        if judge["guide"] and found.keys() & {"fd", "kid", "precision"}:
            notes.append(
                f"{space} made this run's signals, which favours the run: compare in another space (--features)"
            )
    if skipped:
        name, reason = next(iter(skipped.items()))
        notes.append(f"{len(skipped):,} images could not be read and are left out; the first: {name}: {reason}")
    return notes


def table(result: dict[str, Any]) -> str:
    """The figures in lines, each with the space it was judged in, then what they were computed of."""
    lines = [
        f"{name:<26}{value:>12.4g}  in {space}"
        for space, values in result["metrics"].items()
        for name, value in values.items()
    ]
    made = ", ".join(f"{key} {value}" for key, value in result["sampling"].items())
    lines.append(
        f"{result['samples']:,} samples of {result['source']}{f' ({made})' if made else ''} against "
        f"{result['reference_images']:,} images of {result['reference']}, {result['preprocessing']['size']} px, "
        f"{result['seconds']} s"
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


def free(file: Path, asked: dict[str, Any]) -> Path:
    """`file`, or the first of NAME_2, NAME_3 ... that does not hold the figures of something else that was asked."""
    names = itertools.chain([file], (file.with_stem(f"{file.stem}_{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists() or _is_of(name, asked))


def _is_of(file: Path, asked: dict[str, Any]) -> bool:
    try:
        return json.loads(file.read_text())["asked"] == asked
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(file: Path, result: dict[str, Any]) -> None:
    """JSON that appears under its name when whole."""
    try:
        write_json(file, result)
    except InputError as err:  # a disk that filled up meanwhile
        raise InputError(f"--out {err}; the figures stand above") from err
