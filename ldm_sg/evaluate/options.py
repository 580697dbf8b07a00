"""What a person asks of `evaluate`."""

import math
from dataclasses import dataclass
from typing import Any

from ldm_sg.config import check_workers
from ldm_sg.data.images import MAX_SIDE
from ldm_sg.errors import InputError, choices
from ldm_sg.evaluate.inception import RESIZES
from ldm_sg.sampling.request import SampleOptions

_USUAL = SampleOptions(precision="auto")  # sample's, but faster
_OWN = ("steps", "scheduler", "spacing", "precision", "strategy", "rescale")
PRIORS = ("empirical", "uniform", "held-out")
DRAWING: dict[str, Any] = {name: getattr(_USUAL, name) for name in _OWN} | {"interval": None}


@dataclass(frozen=True)
class Options:
    """source: a run or pipeline folder (n samples are drawn, their signals from the training distribution), a folder of
    images or of what `ldm-sg sample` made, or shards. None: the default."""

    source: str
    reference: str
    metrics: str | None = None  # commas between; default fd and prdc, and what the run's signals allow
    features: str | None = None  # judges, commas between: own (the run's g), inception, inception:FILE, any g, a YAML
    resize: str | None = None  # how Inception's input is resized
    n: int = 10_000
    size: int | None = None  # pixels of the comparison
    w: float | None = None
    steps: int | None = None
    scheduler: str | None = None
    spacing: str | None = None
    strategy: str | None = None
    rescale: float | None = None
    interval: list[float] | None = None
    precision: str | None = None
    seed: int = 0
    batch_size: int = 64  # samples of a worker's task, in whole passes; changes no figure
    checkpoint: str | None = None  # a step of the run that keeps its weights, or best
    prior: str | None = None  # of the signals of drawn samples: of PRIORS
    held_out: str | None = None  # images that training did not see, for the metric memory and for prior=held-out
    statistics: str | None = None  # .npz that the reference's are written to
    run: str | None = None  # whose g and f judge images on disk; default the run that holds them
    out: str | None = None
    device: str = "auto"
    executor: str = "local"  # as in AnnotateConfig
    processes: int = 0
    address: str | None = None

    def check(self) -> None:
        """InputError where values mean nothing."""
        check_workers(self)
        if self.size is not None and not 1 <= self.size <= MAX_SIDE:
            raise InputError(f"size={self.size}: from 1 to {MAX_SIDE:,} pixels")
        if self.n < 1 or self.batch_size < 1 or not math.isfinite(self.w or 0):
            raise InputError(
                f"n={self.n}, batch_size={self.batch_size}, w={self.w}: counts of at least 1 and a finite strength"
            )
        for name, given, known in (("resize", self.resize, RESIZES), ("prior", self.prior, PRIORS)):
            if given not in (None, *known):
                raise InputError(f"{name}={given!r}; {choices(given, known)}")
