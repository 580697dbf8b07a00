"""Which images a training step sees: a function of (seed, step) that needs no table of all images, whatever their number."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_GAMMA, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64 (Steele et al., 2014)
_ALL = 2**64 - 1  # bits
_ROUNDS = 6  # of the Feistel network, each on both halves


def mix_seed(*parts: int) -> int:
    """One 63-bit seed of several numbers (splitmix64), so that neighbouring steps are unrelated streams."""
    state = 0
    for part in parts:
        state = _hashed((state ^ (part & _ALL)) + _GAMMA & _ALL)
    return state >> 1


def _hashed(x: Any) -> Any:
    """Where splitmix64 sends a number of 64 bits, or each of an array of them."""
    x = (x ^ (x >> 30)) * _MIX1 & _ALL
    x = (x ^ (x >> 27)) * _MIX2 & _ALL
    return x ^ (x >> 31)


def permuted(positions: Tensor, n: int, *seeds: int) -> Tensor:
    """Where `positions` (any shape, long, 0..n-1) go under the permutation of 0..n-1 that `seeds` name.

    A Feistel network on pairs (Black and Rogaway, 2002): i = left * b + right with a * b just above n; what falls beyond n
    is sent through again, until it does not."""
    a = max(1, math.isqrt(n - 1) + 1)
    b = -(-n // a)
    keys = [np.uint64(mix_seed(*seeds, i)) for i in range(2 * _ROUNDS)]
    out = positions.numpy().astype(np.uint64).reshape(-1)
    todo = np.arange(len(out))
    while len(todo):
        left, right = np.divmod(out[todo], np.uint64(b))
        for one, other in zip(keys[::2], keys[1::2]):
            left = (left + _hashed(right ^ one) % np.uint64(a)) % np.uint64(a)
            right = (right + _hashed(left ^ other) % np.uint64(b)) % np.uint64(b)
        out[todo] = left * np.uint64(b) + right
        todo = todo[out[todo] >= n]
    return torch.from_numpy(out.astype(np.int64)).reshape(positions.shape)


def drawn(pool: "Tensor | Kept | Blocks", seed: int, step: int, batch_size: int) -> Tensor:
    """Which images of `pool` training step `step` sees, [batch_size]."""
    if not isinstance(pool, Blocks):
        return pool[step_indices(seed, step, batch_size, len(pool))]
    spans = _spans(step * batch_size, (step + 1) * batch_size, len(pool))
    return torch.cat([pool.order(positions, seed, epoch) for epoch, positions in spans])


def step_indices(seed: int, step: int, batch_size: int, n: int) -> Tensor:
    """Indices [batch_size] in 0..n-1 of global training step `step` (from 0): a pure function.

    An endless stream of permutations of 0..n-1, one an epoch, made of (seed, epoch) alone, is cut in batches; a batch
    may span epochs. Within an epoch every index comes once."""
    assert n > 0 and batch_size > 0 and step >= 0
    spans = _spans(step * batch_size, (step + 1) * batch_size, n)
    return torch.cat([permuted(positions, n, seed, epoch) for epoch, positions in spans])


def _spans(start: int, end: int, n: int) -> Iterator[tuple[int, Tensor]]:
    """Places start to end - 1 of an endless stream of epochs of n: each epoch, and the places in it."""
    while start < end:
        epoch, offset = divmod(start, n)
        yield epoch, torch.arange(offset, min(n, offset + end - start))
        start += min(n - offset, end - start)


class Blocks:
    """The images of some shards of a set, in an order that needs few shards at a time: those of an epoch are permuted, `per` of
    them make a block, and the images of a block are permuted among themselves. Two numbers a shard are kept, none an image."""

    def __init__(self, starts: np.ndarray, counts: np.ndarray, per: int, shards: np.ndarray | None = None) -> None:
        """starts, counts [S]: the first image of each shard in the set, and how many it has; shards [S]: its number."""
        some = counts > 0
        self.numbers = (np.arange(len(counts)) if shards is None else shards)[some]
        self.starts, self.counts, self.per = starts[some], counts[some], per
        self._known: tuple[tuple[int, int], tuple[np.ndarray, np.ndarray]] | None = None

    def __len__(self) -> int:
        return int(self.counts.sum())

    def _epoch(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch [S], and the places at which their blocks begin, and the end [blocks + 1]."""
        if self._known is None or self._known[0] != (seed, epoch):
            n = len(self.counts)
            shards = permuted(torch.arange(n), n, seed, epoch, n).numpy()
            ends = np.cumsum(self.counts[shards])
            self._known = (seed, epoch), (shards, np.concatenate([[0], ends[self.per - 1 : -1 : self.per], ends[-1:]]))
        return self._known[1]

    def order(self, positions: Tensor, seed: int, epoch: int) -> Tensor:
        """Which images of the set stand at `positions` [B] of an epoch, [B]."""
        shards, borders = self._epoch(seed, epoch)
        at, out = positions.numpy(), np.empty(len(positions), np.int64)
        blocks = np.searchsorted(borders, at, "right") - 1
        for block in np.unique(blocks):
            own, here = shards[block * self.per : (block + 1) * self.per], blocks == block
            first, size = int(borders[block]), int(borders[block + 1] - borders[block])
            places = permuted(torch.from_numpy(at[here] - first), size, seed, epoch, int(block)).numpy()
            out[here] = self._images(self.starts[own], self.counts[own], places)
        return torch.from_numpy(out)

    def __getitem__(self, at: Tensor) -> Tensor:
        """The images in their order on disk."""
        return torch.from_numpy(self._images(self.starts, self.counts, at.numpy()))

    @staticmethod
    def _images(starts: np.ndarray, counts: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Which images stand at `places` where these shards follow each other."""
        ends = np.cumsum(counts)
        which = np.searchsorted(ends, places, "right")
        return starts[which] + places - (ends - counts)[which]

    def of(self, some: np.ndarray) -> "Blocks":
        """Of those shards alone for which `some` [S] is true."""
        return Blocks(self.starts[some], self.counts[some], self.per, self.numbers[some])

    def needed(self, position: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the shards of the block that `position` of the endless stream falls into, and of the block after it."""
        epoch, place = divmod(position, len(self))
        shards, borders = self._epoch(seed, epoch)
        block = int(np.searchsorted(borders, place, "right")) - 1
        now = shards[block * self.per : (block + 1) * self.per]
        if block + 2 < len(borders):
            return self.numbers[now], self.numbers[shards[(block + 1) * self.per : (block + 2) * self.per]]
        n = len(self.counts)
        return self.numbers[now], self.numbers[permuted(torch.arange(min(self.per, n)), n, seed, epoch + 1, n).numpy()]


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


class Kept:
    """The images 0..n-1 of a set but those held out: the i-th of them, in no order, is `kept[i]`."""

    def __init__(self, n: int, held_out: int, seed: int) -> None:
        self.n, self.held_out, self.seed = n, held_out, seed

    def __len__(self) -> int:
        return self.n - self.held_out

    def __getitem__(self, at: Tensor) -> Tensor:
        return permuted(at + self.held_out, self.n, self.seed, self.n)


def split_shards(counts: np.ndarray, val_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the images' shards, by how many each has [S], those to learn from, and the first few of a permutation, held out, which
    have about `val_share` of the images; at least one of each, where there are two."""
    order = permuted(torch.arange(len(counts)), len(counts), seed, len(counts)).numpy()
    enough = int(np.searchsorted(np.cumsum(counts[order]), val_share * counts.sum())) + 1
    held_out = min(enough, len(counts) - 1) if val_share else 0
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def split(n: int, val_share: float, seed: int) -> tuple[Kept, Tensor]:
    """Training images, and the indices of held-out ones; at least one of each."""
    held_out = min(max(1, round(n * val_share)), n - 1) if val_share else 0
    return Kept(n, held_out, seed), permuted(torch.arange(held_out), n, seed, n).sort().values
