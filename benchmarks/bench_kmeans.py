"""Passes of the streaming k-means beside the bare matrix product of the same blocks (rows that lie in memory, no argmax and no
sums), seconds, and the process's peak memory, one JSON line: `python benchmarks/bench_kmeans.py [--n 10000000] [--threads 1]`.

Random float16 features are written block by block to a temporary folder first (1.3 GB by default) and read from there. The two
sides take turns, file by file."""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from ldm_sg.annotate.kmeans import lloyd, normalise, tile
from ldm_sg.annotate.stage import Sums


def write_features(folder: Path, n: int, dim: int, each: int) -> list[Path]:
    """n features around 64 directions, `each` a file."""
    generator, files = np.random.default_rng(0), []
    directions = generator.standard_normal((64, dim), np.float32)
    for start in range(0, n, each):
        rows = min(each, n - start)
        points = directions[generator.integers(64, size=rows)] + generator.standard_normal((rows, dim), np.float32)
        np.save(file := folder / f"{len(files):06d}.npy", points.astype(np.float16))
        files.append(file)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, default=1000)
    parser.add_argument("--each", type=int, default=100_000, help="rows a file")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    block, sides = tile(args.k), np.zeros((2, 2))  # pass, product: seconds on the clock, and of the processor
    scores, last = torch.empty(block, args.k), np.zeros(2)

    def lap(side: int) -> None:
        now = np.array([time.perf_counter(), time.process_time()])
        sides[side] += now - last
        last[:] = now

    def beside(step: Callable[[Path], Sums], files: Sequence[Path]) -> Iterator[Sums]:
        for file in files:
            yield step(file)
            lap(0)
            for rows in range(0, (n := len(np.load(file, mmap_mode="r"))), block):
                few = min(block, n - rows)
                torch.mm(points[:few], points[: args.k].T, out=scores[:few])
            lap(1)

    with tempfile.TemporaryDirectory() as folder:
        files = write_features(Path(folder), args.n, args.dim, args.each)
        points = torch.from_numpy(normalise(np.load(files[0], mmap_mode="r")[: max(block, args.k)]))
        start, checkpoint = points[: args.k], Path(folder) / "checkpoint"
        lap(0)
        sides[:] = 0
        _, inertia = lloyd(files, lambda: start, args.passes, checkpoint, "bench", run=beside, tolerance=0)
        lap(0)
    found = {"n": args.n, "dim": args.dim, "k": args.k, "threads": args.threads, "passes": len(inertia)}
    for what, seconds in zip(("clock", "processor"), sides.T / len(inertia)):
        found[what] = {"pass_s": round(seconds[0], 2), "product_s": round(seconds[1], 2)}
        found[what]["ratio"] = round(seconds[0] / seconds[1], 3)
    found["inertia"] = [round(value, 5) for value in inertia]
    print(json.dumps(found | {"peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}))


if __name__ == "__main__":
    main()
