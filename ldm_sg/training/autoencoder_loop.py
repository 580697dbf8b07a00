"""Fit's steps from where they stand to the end, or to Ctrl-C: metrics.csv, reports and checkpoints on the way."""

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from ldm_sg.folder import whole
from ldm_sg.training.autoencoder import Fit, Source, draw
from ldm_sg.training.metrics import MetricsCsv


def loop(fit: Fit, sources: list[Source], checkpoint: Path, metrics: Path, report: Callable[[], None]) -> bool:
    """True at the end, False after Ctrl-C; either way `checkpoint` holds the last step. `report` is called every
    `val_every` steps and at the end."""
    c = fit.config
    log = _Log(metrics, fit.steps)
    bar = tqdm(total=c.steps, initial=fit.steps, unit="step", desc="fit", dynamic_ncols=True)
    with _interruptible() as interrupted, bar:
        while fit.steps < c.steps and not interrupted:
            generator = torch.Generator().manual_seed(c.seed * 2**32 + fit.steps)
            log.add(fit.step(draw(sources, c.size, c.batch_size, generator), generator))
            bar.update()
            if fit.steps % c.log_every == 0:
                bar.set_postfix({k: f"{v:.3g}" for k, v in log.write(fit.steps, c.batch_size).items()})
            if fit.steps % c.val_every == 0 or fit.steps == c.steps:
                report()
            if fit.steps % c.checkpoint_every == 0:
                _save(fit, checkpoint)
    _save(fit, checkpoint)
    return fit.steps >= c.steps


def _save(fit: Fit, path: Path) -> None:
    with whole(path) as new, new.open("wb") as file:
        torch.save(fit.state_dict(), file)


class _Log:
    """Means of the losses since the last row of metrics.csv."""

    FIELDS = ("step", "images_per_s", "l1", "kl", "half", "lpips", "gan", "critic")

    def __init__(self, path: Path, step: int) -> None:
        self.file = MetricsCsv(path, self.FIELDS, step)
        self._reset()

    def _reset(self) -> None:
        self.sums, self.steps, self.start = Counter[str](), 0, time.monotonic()

    def add(self, losses: dict[str, float]) -> None:
        self.sums.update(losses)  # adds
        self.steps += 1

    def write(self, step: int, batch_size: int) -> dict[str, float]:
        row = {"images_per_s": self.steps * batch_size / (time.monotonic() - self.start)}
        row.update({name: value / self.steps for name, value in self.sums.items()})
        self.file.append(step=step, **{name: f"{value:.5g}" for name, value in row.items()})
        self._reset()
        return row


@contextmanager
def _interruptible() -> Iterator[list[int]]:
    """Ctrl-C fills the list instead of breaking a step in the middle; a second one breaks."""
    got: list[int] = []

    def note(number: int, frame: object) -> None:
        got.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield got
    finally:
        signal.signal(signal.SIGINT, before)
