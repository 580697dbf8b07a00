"""Batches as a pure function of (seed, step): every rank takes the same number of steps and resuming is exact."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm_sg.config import TrainConfig
from ldm_sg.data.latents import LatentSet, step_indices
from ldm_sg.errors import InputError, one_line
from ldm_sg.guidance.signal import Guidance
from ldm_sg.guidance.spatial import Crops


def mix_seed(*parts: int) -> int:
    """One 63-bit seed of several numbers (splitmix64), so that neighbouring steps are unrelated streams."""
    state = 0
    for part in parts:
        state = (state ^ (part & (2**64 - 1))) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def split(n: int, val_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of training and held-out samples; at least one of each."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(mix_seed(seed, n)))
    held_out = min(max(1, round(n * val_share)), n - 1) if val_share else 0
    return order[held_out:].sort().values, order[:held_out].sort().values


def read_left_out(path: Path, latents: LatentSet) -> Tensor:
    """Indices [M] out of a list of lines {"set": start of the set's hash, "index": i}; InputError where it is none of this set."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        odd = next((line["index"] for line in lines if type(line["index"]) is not int), None)
        if odd is not None:
            raise ValueError(f"index {odd!r}")
        indices = torch.tensor([line["index"] for line in lines], dtype=torch.long)
        sets = {str(line["set"]) or "none" for line in lines}
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError, RuntimeError) as err:
        raise InputError(
            f"leave_out={str(path)!r}: not a list that `ldm-sg dedup` wrote: {one_line(err)[:100]}"
        ) from err
    if any(not latents.hash.startswith(name) for name in sets) or (
        len(indices) and not 0 <= indices.min() <= indices.max() < len(latents)
    ):
        raise InputError(
            f"leave_out={str(path)!r}: the list of another set than {latents.folder}: `ldm-sg dedup {latents.folder}`"
        )
    return indices


def turns(sizes: Sequence[int], seed: int, total: int) -> tuple[Tensor, Tensor]:
    """Which of several buckets each step draws its batch from [total], and how many steps drew from it before [total]: in
    proportion to their `sizes`, up to a few steps at any time, and alike whatever `total` is.

    Multiples of the golden ratio, modulo 1, are spread evenly over [0, 1), where each bucket has its share."""
    ends = torch.tensor(sizes, dtype=torch.float64).cumsum(0)
    places = (torch.arange(total, dtype=torch.float64) * ((5**0.5 - 1) / 2) + mix_seed(seed, len(sizes)) / 2**63) % 1
    chosen = torch.searchsorted(ends / ends[-1], places, right=True)
    before = torch.empty_like(chosen)
    for bucket in range(len(sizes)):
        own = chosen == bucket
        before[own] = torch.arange(int(own.sum()))
    return chosen, before


class Steps(Sampler[list[int]]):
    """Yields (step, share, *dataset indices), from step `first` up to `total`: of `world * parts` shares of the global batch
    those of this rank, `parts` a step, one after the other. pools: (dataset indices, how many of them a step) each; where
    `one_a_step`, buckets of which a batch has images of one alone (`turns`)."""

    def __init__(
        self,
        pools: list[tuple[Tensor, int]],
        seed: int,
        total: int,
        first: int,
        rank: int,
        world: int,
        parts: int = 1,
        one_a_step: bool = False,
    ) -> None:
        self.pools, self.seed, self.total, self.first = pools, seed, total, first
        self.rank, self.world, self.parts, self.one_a_step = rank, world, parts, one_a_step

    def __len__(self) -> int:
        return self.total * self.parts  # not what is left: Lightning counts resumed steps too

    def __iter__(self) -> Iterator[list[int]]:
        if self.one_a_step:
            buckets, before = turns([len(pool) for pool, _ in self.pools], self.seed, self.total)
        for step in range(self.first, self.total):
            at, pools = (int(before[step]), [self.pools[buckets[step]]]) if self.one_a_step else (step, self.pools)
            chosen = torch.cat([pool[step_indices(self.seed, at, n, len(pool))] for pool, n in pools if n])
            for share in range(self.rank, self.world * self.parts, self.world):
                yield [step, share, *chosen[share :: self.world * self.parts].tolist()]


class Mixed:
    """Two annotation sets of one kind of signal as one: indices from len(first) on are the second's."""

    def __init__(self, first: LatentSet, second: LatentSet) -> None:
        self.first, self.second, self.flips = first, second, first.flips and second.flips

    def latents(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        return torch.cat([part.latents(*own) for part, own in self._parts(indices, flip)])[self._places(indices)]

    def guidance(self, indices: Tensor, flip: Tensor | None = None, crops: Crops | None = None) -> Guidance:
        parts = [
            part.guidance(*own, crops and Crops(crops.corners[mine], crops.side))
            for (part, own), mine in zip(self._parts(indices, flip), self._masks(indices))
        ]
        return Guidance.cat(parts)[self._places(indices)]

    def _masks(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return indices < len(self.first), indices >= len(self.first)

    def _parts(self, indices: Tensor, flip: Tensor | None) -> list[tuple[LatentSet, tuple[Tensor, Tensor | None]]]:
        starts = zip((self.first, self.second), self._masks(indices), (0, len(self.first)))
        return [(part, (indices[mine] - start, None if flip is None else flip[mine])) for part, mine, start in starts]

    def _places(self, indices: Tensor) -> Tensor:
        """Where each of `indices` stands once those of the first set come first."""
        return torch.cat([mine.nonzero()[:, 0] for mine in self._masks(indices)]).argsort()


class LatentBatches(Dataset):
    """(step, share, *indices) -> step, share, latents [b, C, h, w], guidance of b samples: random ones of each image's views (mirrored
    where that is stored, cropped where `side` is less than the latents') or, for validation, the centre. side: None = whole."""

    def __init__(self, latents: LatentSet | Mixed, seed: int, side: int | None, random: bool) -> None:
        self.latents, self.seed, self.side, self.random = latents, seed, side, random

    def __getitem__(self, request: list[int]) -> tuple[int, int, Tensor, Guidance]:
        step, share, indices = request[0], request[1], torch.tensor(request[2:])
        # By (step, image), so that views do not depend on how ranks share the batch.
        drawn = [mix_seed(self.seed, step, i) for i in request[2:]]
        flip = torch.tensor([bool(d & 1) for d in drawn]) if self.random and self.latents.flips else None
        whole = self.latents.latents(indices, flip)
        room = 0 if self.side is None else whole.shape[-1] - self.side
        corners = torch.full((len(indices), 2), room // 2)
        if self.random:
            corners = torch.tensor([[(d >> 1) % (room + 1), (d >> 32) % (room + 1)] for d in drawn])
        crops = Crops(corners, self.side) if room else None
        return step, share, crops(whole) if crops else whole, self.latents.guidance(indices, flip, crops)


class LatentData(pl.LightningDataModule):
    """The training stream and the held-out images of one annotation set, with images of another among them where `replay`
    is one; `side`: of the views, in latent cells, None = whole images. Every batch has images of one shape."""

    def __init__(
        self, latents: LatentSet, config: TrainConfig, side: int | None, replay: LatentSet | None = None
    ) -> None:
        super().__init__()
        self.latents, self.config, self.side, self.replay = latents, config, side, replay
        pools = split(len(latents), config.val_share, config.seed)
        if config.leave_out:
            gone = read_left_out(Path(config.leave_out), latents)
            pools = tuple(pool[~torch.isin(pool, gone)] for pool in pools)
        self.train_pool, self.val_pool = pools
        if not len(self.train_pool):
            raise InputError(f"leave_out={config.leave_out!r}: leaves no image to learn from")
        self.first_step = 0  # set before fit when resuming

    def by_shape(self, pool: Tensor) -> list[Tensor]:
        """Indices of images that have one shape each; all together where the set has one."""
        buckets = self.latents.bucket[pool]
        return [pool[buckets == bucket] for bucket in buckets.unique().tolist()]

    def shapes(self) -> str:
        """What the network sees, and how many of each shape there are, in words; with a note where there are very few."""
        pools = [
            (self.latents.shapes[self.latents.bucket[pool[0]]], len(pool)) for pool in self.by_shape(self.train_pool)
        ]
        if len(pools) == 1:
            channels, *cells = pools[0][0]
            return "x".join(map(str, (channels, *(cells if self.side is None else [self.side] * 2))))
        named = [("x".join(map(str, shape)), n) for shape, n in pools]
        if few := [f"{n} of {shape}" for shape, n in named if n < self.config.batch_size]:
            print(
                f"note: {', '.join(few)}: fewer images than a batch, which repeats them; leave that shape out of `pack --buckets`",
                file=sys.stderr,
            )
        return ", ".join(f"{shape} ({n:,})" for shape, n in named)

    def _loader(self, sampler: Sampler, random: bool, workers: int) -> DataLoader:
        return DataLoader(
            LatentBatches(
                Mixed(self.latents, self.replay) if self.replay else self.latents, self.config.seed, self.side, random
            ),
            sampler=sampler,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        cfg, rank, world = self.config, self.trainer.global_rank, self.trainer.world_size
        again = round(cfg.replay.share * cfg.batch_size) if self.replay else 0
        pools = [(pool, cfg.batch_size - again) for pool in self.by_shape(self.train_pool)]
        several = len(pools) > 1
        if self.replay:
            pools.append((len(self.latents) + torch.arange(len(self.replay)), again))
        steps = Steps(pools, cfg.seed, cfg.steps, self.first_step, rank, world, cfg.accumulate, several)
        return self._loader(steps, True, cfg.workers)

    def val_dataloader(self) -> DataLoader | list:
        if not len(self.val_pool):
            return []
        assert self.trainer is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        parts = [chunk for pool in self.by_shape(self.val_pool) for chunk in pool.split(self.config.batch_size)]
        whole = [chunk for chunk in parts if len(chunk) >= world]
        chunks = [chunk[rank::world].tolist() for chunk in whole]
        return self._loader([[i, rank, *chunk] for i, chunk in enumerate(chunks)], False, 0)  # type: ignore[arg-type]
