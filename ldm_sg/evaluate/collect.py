"""Images -> features, in this process or by workers."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ldm_sg import executor
from ldm_sg.data.images import to_float
from ldm_sg.errors import InputError
from ldm_sg.evaluate import sources
from ldm_sg.evaluate.options import Options
from ldm_sg.evaluate.subjects import Subject

Network = Callable[[Tensor], Tensor]  # images [B, 3, H, W] in [-1, 1] -> features [B, D]
Key = tuple[str, str]  # of a network: the space of a judge, and what it sees
Seen = tuple[
    list[np.ndarray], dict[str, str]
]  # positions [N], features [N, D] of each network; what was left out, and why


@dataclass(frozen=True)
class Task:
    """The samples (None), or real images, of which a part goes through these networks."""

    images: sources.ImageSet | None
    keys: list[Key]
    part: slice

    def __str__(self) -> str:
        return f"{'real images' if self.images else 'samples'} {self.part.start} to {self.part.stop - 1}"


@dataclass(frozen=True)
class Look:
    """What a worker holds. Each pass goes through all networks and is dropped: memory grows with the features only."""

    subject: Subject
    networks: Mapping[Key, Network]
    device: torch.device
    told: Callable[[int], object] = int  # how many images more it has seen

    @torch.no_grad()
    def __call__(self, task: Task) -> Seen:
        skipped, rows = dict[str, str](), [(np.empty(0, int), *[np.empty((0, 0), "f")] * len(task.keys))]
        for positions, images in self._batches(task, skipped.__setitem__):
            pixels, row = to_float(images.to(self.device)), [positions.numpy()]
            for key in task.keys:
                seen = self.networks[key](pixels).float().cpu()
                broken = positions[~seen.isfinite().all(1)]
                if len(broken):
                    name = self._name(task, int(broken[0]))
                    raise InputError(f"{name}: its features in {key[0]} are not finite: a broken image, or weights")
                row.append(seen.numpy())
            rows.append(tuple(row))
            self.told(len(positions))
        return _columns(rows), skipped

    def _name(self, task: Task, position: int) -> str:
        images = task.images or self.subject.images
        return images.name(position) if images else f"sample {position} of {self.subject.where}"

    def _batches(self, task: Task, on_skip: sources.OnSkip) -> Iterator[tuple[Tensor, Tensor]]:
        """Real images are seen as the subject's are."""
        its = self.subject
        if task.images is None:
            return its.batches(task.part, on_skip)
        return sources.batches(task.images, its.size, its.at_once, sources.MOST, on_skip, its.within, task.part)


def _columns(rows: Iterable[Any]) -> list[np.ndarray]:
    """Rows of arrays, one under the other; an empty one has not always the width of the others."""
    return [np.concatenate([part for part in column if len(part)] or column[:1]) for column in zip(*rows)]


@dataclass(frozen=True)
class Passes:
    """Images through networks, in this process or by workers that `make` what this one has opened, with the same result."""

    look: Look
    make: Callable[[str], Look]
    options: Options
    skipped: dict[str, str]

    def __call__(self, images: sources.ImageSet | None, keys: list[Key]) -> tuple[Tensor, dict[Key, Tensor]]:
        """Positions [N] and, of each network, features [N, D] (float32, CPU)."""
        device, total = self.look.device, self.look.subject.total
        if images:
            total = min(images.total or sources.MOST, sources.MOST)
        label, here = "real" if images else "samples", executor.alone(self.options, device)
        with tqdm(total=total, desc=label, unit="image", dynamic_ncols=True) as bar:
            make = (lambda _: replace(self.look, told=bar.update)) if here else self.make
            tasks = [Task(images, keys, part) for part in self._parts(images, total, here)]
            rows = []
            for row, skipped in executor.in_order(make, tasks, self.options, device):
                self.skipped.update(skipped)
                rows.append(row)
                bar.update(0 if here else len(row[0]))
        places, *features = map(torch.from_numpy, _columns(rows))
        return places, dict(zip(keys, features))

    def _parts(self, images: sources.ImageSet | None, total: int, here: bool) -> list[slice]:
        """Whole passes each. Of images on disk as few parts as keep all workers busy, for a shard is read once a part; of those
        of remote shards, which are counted as they are read, one."""
        subject, each = self.look.subject, self.options.batch_size
        images = images or subject.images
        if images:
            each = max(each, total // (4 * len(executor.devices(self.options, self.look.device))))
        each += -each % subject.at_once
        if here or (images and images.total is None):
            each = total
        return [slice(start, min(start + each, total)) for start in range(0, total, each)]
