"""Which images a training step sees: a function of (seed, step) that needs no table of all images, whatever their number."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_GAMMA, _MIX1, _MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # splitmix64 (Steele et al., 2014)
_ROUNDS = 6  # of the Feistel network, each on both halves


def mix_seed(*parts: int) -> int:
    """One 63-bit seed of several numbers (splitmix64), so that neighbouring steps are unrelated streams."""
    state = 0
    for part in parts:
        state = (state ^ (part & (2**64 - 1))) + _GAMMA & (2**64 - 1)
        state = (state ^ (state >> 30)) * _MIX1 & (2**64 - 1)
        state = (state ^ (state >> 27)) * _MIX2 & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


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


def _hashed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX1)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX2)
    return x ^ (x >> np.uint64(31))


def step_indices(seed: int, step: int, batch_size: int, n: int) -> Tensor:
    """Indices [batch_size] in 0..n-1 of global training step `step` (from 0): a pure function.

    An endless stream of permutations of 0..n-1, one an epoch, made of (seed, epoch) alone, is cut in batches; a batch
    may span epochs. Within an epoch every index comes once."""
    assert n > 0 and batch_size > 0 and step >= 0
    parts: list[Tensor] = []
    start, end = step * batch_size, (step + 1) * batch_size
    while start < end:
        epoch, offset = divmod(start, n)
        parts.append(permuted(torch.arange(offset, min(n, offset + end - start)), n, seed, epoch))
        start += len(parts[-1])
    return torch.cat(parts)


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


def split(n: int, val_share: float, seed: int) -> tuple[Kept, Tensor]:
    """Training images, and the indices of held-out ones; at least one of each."""
    held_out = min(max(1, round(n * val_share)), n - 1) if val_share else 0
    return Kept(n, held_out, seed), permuted(torch.arange(held_out), n, seed, n).sort().values
