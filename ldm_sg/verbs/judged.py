"""What is judged: samples drawn from a run as they are read, or images on disk."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError
from ldm_sg.evaluate import sources
from ldm_sg.pipeline import SelfGuidedPipeline


@dataclass(frozen=True)
class Samples:
    """What is judged: drawn from a run as it is read, or images on disk."""

    where: str
    total: int
    size: int
    batches: Callable[[list[str]], Iterator[tuple[Tensor, Tensor]]]  # (skipped) -> positions [B], uint8 [B, 3, H, W]
    ids: Callable[[], Tensor]  # the cluster each was asked for, by position; InputError where nothing says
    asked: Signals | None  # the whole signals, where they were drawn from a run
    sampling: dict[str, Any]  # w, steps, scheduler, seed, as far as they are known
    out: Path  # where the result goes when nothing else is said


def from_run(
    pipe: SelfGuidedPipeline,
    folder: Path,
    n: int,
    size: int | None,
    batch_size: int,
    settings: dict[str, Any],
    features: str | None,
) -> Samples:
    """n samples drawn as they are read; image i and its signal depend on (seed, i) only."""
    own = pipe.image_size
    if size not in (None, own):
        raise InputError(f"size={size}: the samples of {folder} have {own} pixels, and so the reference")
    drawn = pipe.draw(n, settings["seed"])

    def batches(_: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, n, batch_size):
            places = torch.arange(start, min(start + batch_size, n))
            yield places, pipe(drawn[places], first_index=start, **settings)

    def ids() -> Tensor:
        if drawn.k is None or drawn.k.ndim != 1:
            raise InputError(f"{folder}: cluster consistency is for runs with one cluster id an image; try layout")
        return drawn.k

    name = "w{w:g}_{scheduler}{steps}_seed{seed}".format(**settings)
    network = Path(features.replace(":", "-")).stem if features else "own"
    made = settings | {"signals": "drawn from the training distribution"}
    if pipe.checkpoint is not None:
        name, made = f"step{pipe.checkpoint}_{name}", made | {"checkpoint": pipe.checkpoint}
    inside = (folder / "model_index.json").is_file()  # a pipeline folder, which training replaces, of a run
    home, prefix = (folder.parent, f"{folder.name}_") if inside else (folder, "")
    file = home / "evaluations" / f"{prefix}{name}_n{n}_{network}.json"
    return Samples(str(folder), n, own, batches, ids, drawn, made, file)


def from_disk(images: sources.ImageSet, n: int, size: int | None, batch_size: int) -> Samples:
    """At most n images, spread over the set."""
    total, own = sources.count(images), size or sources.first_size(images)

    def batches(skipped: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        return sources.batches(images, own, batch_size, n, lambda name, reason: skipped.append(f"{name}: {reason}"))

    folder = Path(images.where)
    out = (folder if folder.is_dir() else Path()) / "evaluation.json"
    return Samples(
        images.where, n if total is None else min(n, total), own, batches, images.ids, None, images.sampling(), out
    )
