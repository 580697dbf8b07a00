"""Images -> features, in this process or by workers."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

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
    np.ndarray, list[np.ndarray], dict[str, str]
]  # positions [N], features [N, D] of each, what was left out and why


@dataclass(frozen=True)
class Task:
    """Samples, or real images, of which a part goes through these networks."""

    real: bool
    keys: list[Key]
    part: slice

    def __str__(self) -> str:
        return f"{'real images' if self.real else 'samples'} {self.part.start} to {self.part.stop - 1}"


@dataclass(frozen=True)
class Look:
    """What a worker holds. Each pass goes through all networks and is dropped: memory grows with the features only."""

    subject: Subject
    real: sources.ImageSet
    networks: Mapping[Key, Network]
    device: torch.device
    told: Callable[[int], object] = int  # how many images more it has seen

    @torch.no_grad()
    def __call__(self, task: Task) -> Seen:
        real, keys, part = task.real, task.keys, task.part
        skipped, places, features = dict[str, str](), [np.empty(0, int)], [[np.empty((0, 0), "f")] for _ in keys]
        for positions, images in self._real(part, skipped) if real else self._samples(part, skipped):
            pixels = to_float(images.to(self.device))
            places.append(positions.numpy())
            for found, key in zip(features, keys):
                seen = self.networks[key](pixels).float().cpu()
                broken = positions[~seen.isfinite().all(1)]
                if len(broken):
                    raise InputError(
                        f"{self._name(real, int(broken[0]))}: its features in {key[0]} are not finite: a broken image, or weights"
                    )
                found.append(seen.numpy())
            self.told(len(positions))
        return _join(places), [_join(found) for found in features], skipped

    def _name(self, real: bool, position: int) -> str:
        images = self.real if real else self.subject.images
        return f"sample {position} of {self.subject.where}" if images is None else images.name(position)

    def _samples(self, part: slice, skipped: dict[str, str]) -> Iterator[tuple[Tensor, Tensor]]:
        return self.subject.batches(part, skipped.__setitem__)

    def _real(self, part: slice, skipped: dict[str, str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Seen as the subject's are."""
        size, at_once, within = self.subject.size, self.subject.at_once, self.subject.within
        return sources.batches(self.real, size, at_once, sources.MOST, skipped.__setitem__, within, part)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts[1:] or parts)


@dataclass(frozen=True)
class Passes:
    """Images through networks, in this process or by workers that `make` what this one has opened, with the same result."""

    look: Look
    make: Callable[[str], Look]
    options: Options
    skipped: dict[str, str]

    def __call__(self, real: bool, keys: list[Key]) -> tuple[Tensor, dict[Key, Tensor]]:
        """Positions [N] and, of each network, features [N, D] (float32, CPU)."""
        device, total = self.look.device, self.look.subject.total
        if real:
            total = min(self.look.real.total or sources.MOST, sources.MOST)
        label, here = "real" if real else "samples", executor.alone(self.options, device)
        with tqdm(total=total, desc=label, unit="image", dynamic_ncols=True) as bar:
            make = (lambda _: replace(self.look, told=bar.update)) if here else self.make
            tasks = [Task(real, keys, part) for part in self._parts(real, total, here)]
            parts = []
            for places, features, skipped in executor.in_order(make, tasks, self.options, device):
                self.skipped.update(skipped)
                parts.append((places, *features))
                bar.update(0 if here else len(places))
        places, *features = (torch.from_numpy(_join([column[0], *filter(len, column)])) for column in zip(*parts))
        return places, dict(zip(keys, features))

    def _parts(self, real: bool, total: int, here: bool) -> list[slice]:
        """Whole passes each. Of images on disk as few parts as keep all workers busy, for a shard is read once a part; of those
        of remote shards, which are counted as they are read, one."""
        subject, images = self.look.subject, self.look.real if real else self.look.subject.images
        each = self.options.batch_size
        if images is not None:
            each = max(each, total // (4 * len(executor.devices(self.options, self.look.device))))
        each += -each % subject.at_once
        if here or (images is not None and images.total is None):
            each = total
        return [slice(start, min(start + each, total)) for start in range(0, total, each)]
