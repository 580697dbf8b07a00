"""Fit's steps from where they stand to the end, or to Ctrl-C: metrics.csv, reports and checkpoints on the way."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from ldm_sg.folder import whole
from ldm_sg.training.autoencoder import Fit, Source, draw
from ldm_sg.training.interruption import Interruption
from ldm_sg.training.metrics import MetricsCsv

FIELDS = ("step", "images_per_s", "l1", "kl", "half", "lpips", "gan", "critic")


def loop(fit: Fit, sources: list[Source], checkpoint: Path, metrics: Path, report: Callable[[], None]) -> bool:
    """True at the end, False after Ctrl-C; either way `checkpoint` holds the last step. `report` is called every
    `val_every` steps and at the end."""
    c = fit.config
    file, sums, logged, start = MetricsCsv(metrics, FIELDS, fit.steps), Counter[str](), fit.steps, time.monotonic()
    bar = tqdm(total=c.steps, initial=fit.steps, unit="step", desc="fit", dynamic_ncols=True)
    with Interruption() as interruption, bar:
        while fit.steps < c.steps and not interruption.heard:
            generator = torch.Generator().manual_seed(c.seed * 2**32 + fit.steps)
            sums.update(fit.step(draw(sources, c.size, c.batch_size, generator), generator))  # adds
            bar.update()
            if fit.steps % c.log_every == 0:
                since, now = fit.steps - logged, time.monotonic()
                row = {"images_per_s": since * c.batch_size / (now - start), **{k: v / since for k, v in sums.items()}}
                file.append(step=fit.steps, **{k: f"{v:.5g}" for k, v in row.items()})
                bar.set_postfix({k: f"{v:.3g}" for k, v in row.items()})
                sums, logged, start = Counter(), fit.steps, now
            if fit.steps % c.val_every == 0 or fit.steps == c.steps:
                report()
            if fit.steps % c.checkpoint_every == 0:
                _save(fit, checkpoint)
    _save(fit, checkpoint)
    return fit.steps >= c.steps


def _save(fit: Fit, path: Path) -> None:
    with whole(path) as new, new.open("wb") as file:
        torch.save(fit.state_dict(), file)
