"""Batches as a pure function of (seed, step): every rank takes the same number of steps and resuming is exact."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ldm_sg.config import TrainConfig
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.order import Blocks, Kept, drawn, mix_seed, split, split_shards, turns
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import check
from ldm_sg.guidance.signal import Guidance
from ldm_sg.guidance.spatial import Crops

Pool = Tensor | Kept | Blocks  # of indices of images
BLOCK = 32  # shards of a remote set


def read_left_out(path: Path, latents: LatentSet) -> Tensor:
    """Indices [M] out of a list of lines {"set": start of the set's hash, "index": i}; InputError where it is none of this set."""
    where = f"leave_out={str(path)!r}"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        check(lines, [{"set": str, "index": int}], "its lines")
    except (OSError, ValueError, RecursionError) as err:
        raise InputError(f"{where}: not a list that `ldm-sg dedup` wrote: {one_line(err)[:100]}") from err
    for line in lines:
        if not line["set"] or not latents.hash.startswith(line["set"]) or not 0 <= line["index"] < len(latents):
            raise InputError(f"{where}: the list of another set than {latents.folder}: `ldm-sg dedup {latents.folder}`")
    return torch.tensor([line["index"] for line in lines], dtype=torch.long)


@dataclass(eq=False)
class Steps(Sampler[list[int]]):
    """Yields (step, share, *dataset indices), from step `first` up to `total`: of `world * parts` shares of the global batch
    those of this rank, `parts` a step, one after the other. pools: (dataset indices, how many of them a step) each; where
    `one_a_step`, buckets of which a batch has images of one alone (`turns`)."""

    pools: list[tuple[Pool, int]]
    seed: int
    total: int
    first: int
    rank: int
    world: int
    parts: int = 1
    one_a_step: bool = False
    ahead: Callable[[list[int]], None] | None = (
        None  # is told which shards come next, of images drawn in blocks of them
    )

    def __len__(self) -> int:
        return self.total * self.parts  # not what is left: Lightning counts resumed steps too

    @cached_property
    def _turns(self) -> tuple[Tensor, Tensor]:
        return turns([len(pool) for pool, _ in self.pools], self.seed, self.total)

    def images(self, step: int) -> Tensor:
        """Dataset indices of the whole batch of a step."""
        at, pools = self._drawn_from(step)
        return torch.cat([drawn(pool, self.seed, at, n) for pool, n in pools if n])

    def _drawn_from(self, step: int) -> tuple[int, list[tuple[Pool, int]]]:
        """The pools of a step, and which one of those that drew from them it is."""
        if not self.one_a_step:
            return step, self.pools
        buckets, before = self._turns
        return int(before[step]), [self.pools[buckets[step]]]

    def _needed(self, step: int) -> list[int]:
        at, pools = self._drawn_from(step)
        blocks = [pool.needed(at * n, self.seed) for pool, n in pools if isinstance(pool, Blocks)]
        return [int(shard) for order in zip(*blocks) for shards in order for shard in shards]  # those of now first

    def __iter__(self) -> Iterator[list[int]]:
        known: list[int] = []
        for step in range(self.first, self.total):
            if self.ahead and (needed := self._needed(step)) != known:
                self.ahead(needed)
                known = needed
            chosen = self.images(step)
            for share in range(self.rank, self.world * self.parts, self.world):
                yield [step, share, *chosen[share :: self.world * self.parts].tolist()]


class Mixed:
    """Two annotation sets of one kind of signal as one: indices from len(first) on are the second's."""

    def __init__(self, first: LatentSet, second: LatentSet) -> None:
        self.first, self.second, self.flips = first, second, first.flips and second.flips

    def latents(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        parts = [part.latents(own, _of(flip, mine)) for part, own, mine in self._parts(indices)]
        return torch.cat(parts)[self._places(indices)]

    def guidance(self, indices: Tensor, flip: Tensor | None = None, crops: Crops | None = None) -> Guidance:
        parts = [
            part.guidance(own, _of(flip, mine), crops and Crops(crops.corners[mine], crops.side))
            for part, own, mine in self._parts(indices)
        ]
        return Guidance.cat(parts)[self._places(indices)]

    def _parts(self, indices: Tensor) -> list[tuple[LatentSet, Tensor, Tensor]]:
        """Each set, its own indices, and which of `indices` they are."""
        second = indices >= len(self.first)
        return [(self.first, indices[~second], ~second), (self.second, indices[second] - len(self.first), second)]

    def _places(self, indices: Tensor) -> Tensor:
        """Where each of `indices` stands once those of the first set come first."""
        return (indices >= len(self.first)).int().argsort(stable=True).argsort()


def _of(flip: Tensor | None, mine: Tensor) -> Tensor | None:
    return None if flip is None else flip[mine]


@dataclass(eq=False)
class LatentBatches(Dataset):
    """(step, share, *indices) -> step, share, latents [b, C, h, w], guidance of b samples: random ones of each image's views (mirrored
    where that is stored, cropped where `side` is less than the latents') or, for validation, the centre. side: None = whole."""

    latents: LatentSet | Mixed
    seed: int
    side: int | None
    random: bool

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


def _by_shards(latents: LatentSet, config: TrainConfig, per: int) -> tuple[Blocks, Tensor]:
    """Images to learn from in blocks of `per` shards, and held-out ones, which are those of whole shards. InputError where two
    blocks have no room in the cache of a remote set."""
    if latents.remote:
        largest = max(entry["bytes"] for entry in latents.manifest["shards"])
        least = 2 * min(per, len(latents.paths)) * largest
        if latents.remote.room < least:
            raise InputError(
                f"cache_gb={config.cache_gb:g}: two blocks of block_shards={per} shards of up to {largest:,} bytes need {least / 1e9:.3g}"
            )
    starts = np.cumsum(latents.counts) - latents.counts
    mine, held_out = split_shards(latents.counts, config.val_share, config.seed)
    aside = [torch.arange(int(n)) + int(start) for start, n in zip(starts[held_out], latents.counts[held_out])]
    return Blocks(starts[mine], latents.counts[mine], per, mine), torch.cat([torch.empty(0, dtype=torch.long), *aside])


class LatentData(pl.LightningDataModule):
    """The training stream and the held-out images of one annotation set, with images of another among them where `replay`
    is one; `side`: of the views, in latent cells, None = whole images. Every batch has images of one shape."""

    def __init__(
        self, latents: LatentSet, config: TrainConfig, side: int | None, replay: LatentSet | None = None
    ) -> None:
        super().__init__()
        self.latents, self.config, self.side, self.replay = latents, config, side, replay
        self.train_pool: Pool
        per = config.block_shards if config.block_shards is not None else BLOCK if latents.remote else 0
        if per:
            self.train_pool, self.val_pool = _by_shards(latents, config, per)
        else:
            self.train_pool, self.val_pool = split(len(latents), config.val_share, config.seed)
        if config.leave_out:
            if per:
                raise InputError(f"leave_out={config.leave_out!r}: needs block_shards=0, of a set on this machine")
            gone, every = read_left_out(Path(config.leave_out), latents), torch.arange(len(self.train_pool))
            pools = self.train_pool[every], self.val_pool
            self.train_pool, self.val_pool = (pool[~torch.isin(pool, gone)] for pool in pools)
        if not len(self.train_pool):
            raise InputError(f"leave_out={config.leave_out!r}: leaves no image to learn from")
        self.first_step = 0  # set before fit when resuming

    def by_shape(self, pool: Pool) -> list[Tensor] | list[Pool]:
        """Indices of images that have one shape each; all together where the set has one."""
        if len(self.latents.shapes) == 1:
            return [pool] if len(pool) else []
        if isinstance(pool, Blocks):
            of = self.latents.buckets(torch.from_numpy(pool.starts)).numpy()
            return [pool.of(of == bucket) for bucket in sorted(set(of.tolist()))]
        pool = pool[torch.arange(len(pool))]
        buckets = self.latents.buckets(pool)
        return [pool[buckets == bucket] for bucket in buckets.unique().tolist()]

    def shapes(self) -> str:
        """What the network sees, and how many of each shape there are, in words; with a note where there are very few."""
        pools = self.by_shape(self.train_pool)
        shapes = [self.latents.shapes[self.latents.buckets(pool[torch.arange(1)])[0]] for pool in pools]
        if self.side is not None:
            shapes = [(shapes[0][0], self.side, self.side)]
        named = [("x".join(map(str, shape)), len(pool)) for shape, pool in zip(shapes, pools)]
        if len(named) == 1:
            return named[0][0]
        if few := [f"{n} of {shape}" for shape, n in named if n < self.config.batch_size]:
            print(
                f"note: {', '.join(few)}: fewer images than a batch, which repeats them; leave that shape out of `pack --buckets`",
                file=sys.stderr,
            )
        return ", ".join(f"{shape} ({n:,})" for shape, n in named)

    def _loader(self, sampler: Sampler, random: bool, workers: int) -> DataLoader:
        latents = Mixed(self.latents, self.replay) if self.replay else self.latents
        return DataLoader(
            LatentBatches(latents, self.config.seed, self.side, random),
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
        pools: list[tuple[Pool, int]] = [(p, cfg.batch_size - again) for p in self.by_shape(self.train_pool)]
        several = len(pools) > 1
        if self.replay:
            pools.append((len(self.latents) + torch.arange(len(self.replay)), again))
        ahead = self.latents.remote and self.latents.remote.ahead
        steps = Steps(pools, cfg.seed, cfg.steps, self.first_step, rank, world, cfg.accumulate, several, ahead)
        return self._loader(steps, True, cfg.workers)

    def val_dataloader(self) -> DataLoader | list:
        if not len(self.val_pool):
            return []
        assert self.trainer is not None
        rank, world = self.trainer.global_rank, self.trainer.world_size
        parts = [chunk for pool in self.by_shape(self.val_pool) for chunk in pool.split(self.config.batch_size)]
        chunks = [chunk[rank::world].tolist() for chunk in parts if len(chunk) >= world]
        return self._loader([[i, rank, *chunk] for i, chunk in enumerate(chunks)], False, 0)  # type: ignore[arg-type]
