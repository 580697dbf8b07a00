"""How well the order of training mixes, and what it costs: `python benchmarks/bench_order.py`."""

import time

import numpy as np
import torch
from scipy.stats import spearmanr

from ldm_sg.data.order import Blocks, drawn, permuted, step_indices

N, SHARD, BATCH, STEPS = 1_000_000, 1_000, 256, 300


def main() -> None:
    first, second = (permuted(torch.arange(N), N, 0, epoch).numpy() for epoch in (0, 1))
    pairs = {"two epochs": (first, second), "disk": (first, np.arange(N)), "neighbours": (first[1:], first[:-1])}
    for name, pair in pairs.items():
        print(f"rank correlation, {name}: {spearmanr(*pair).statistic:.4f}")
    fair = np.random.default_rng(0)
    ours = np.mean([np.bincount(step_indices(0, s, BATCH, N).numpy() // SHARD).max() for s in range(STEPS)])
    chance = np.mean([np.bincount(fair.choice(N, BATCH, replace=False) // SHARD).max() for _ in range(STEPS)])
    print(f"most images of one of {N // SHARD} shards in a batch of {BATCH}: {ours:.2f}, by chance {chance:.2f}")
    starts = np.arange(0, N, SHARD)
    for per in (8, 32, 128):
        pool = Blocks(starts, np.full(len(starts), SHARD), per)
        worst = np.mean([np.bincount(drawn(pool, 0, s, BATCH).numpy() // SHARD).max() for s in range(STEPS)])
        first, second = (pool.order(torch.arange(N), 0, epoch).argsort().numpy() for epoch in (0, 1))
        both = f"rank correlation of two epochs {spearmanr(first, second).statistic:.4f}"
        print(f"blocks of {per} shards: {worst:.2f} of one shard in a batch; {both}")
    for n in (10_000, 1_000_000_000):
        start = time.perf_counter()
        for step in range(STEPS):
            step_indices(0, step, BATCH, n)
        print(f"{n:,} images: {(time.perf_counter() - start) / STEPS * 1e6:.0f} us a batch")


if __name__ == "__main__":
    main()
