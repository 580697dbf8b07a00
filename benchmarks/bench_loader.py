"""Samples a second of the training data path in one process, from disk and from an HTTP server of this machine through the
cache, beside plain sequential webdataset: `python benchmarks/bench_loader.py`. Synthetic set of 10,000 float16 latents of 4x32x32 (the paper's 256 px images at factor 8)."""

import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
import webdataset

from ldm_sg.data.latents import LatentSet, file_sha256, finish, set_hash
from ldm_sg.data.order import Blocks, Kept, drawn
from ldm_sg.data.shards import ShardWriter
from ldm_sg.guidance.signal import GuidanceSpec

N, SHAPE, SHARD, BATCH = 10_000, (4, 32, 32), 1000, 128


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_set(folder: Path) -> None:
    rng, entries = np.random.default_rng(0), []
    for start in range(0, N, SHARD):
        path = folder / "shards" / f"{start // SHARD:06d}.tar"
        with ShardWriter(path) as writer:
            for i in range(start, start + SHARD):
                latent = rng.standard_normal(SHAPE).astype(np.float16)
                writer.write(f"{i:08d}", {"latent.npy": npy(latent), "k.npy": npy(rng.integers(300))})
        entries.append({"file": path.name, "images": SHARD, "bytes": path.stat().st_size, "sha256": file_sha256(path)})
    manifest = {
        "shards": entries,
        "hash": set_hash(entry["sha256"] for entry in entries),
        "guidance": GuidanceSpec(num_labels=300).to_dict(),
        "latent_shape": list(SHAPE),
        "flips": False,
        "num_images": N,
    }
    finish(folder, manifest)


def rate(work: Callable[[], int]) -> float:
    """Samples a second, best of 3: the machine may be shared."""
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        best = max(best, work() / (time.perf_counter() - start))
    return round(best)


def batches(data: LatentSet, pool: Kept | Blocks) -> int:
    """An epoch; of a remote set with the shards of the next block fetched ahead, as training does."""
    needed: list[int] = []
    for step in range(N // BATCH):
        if data.remote and isinstance(pool, Blocks):
            now = np.concatenate(pool.needed(step * BATCH, 0)).tolist()
            if now != needed:
                data.remote.ahead(needed := now)
        indices = drawn(pool, 0, step, BATCH)
        latents, k = data.latents(indices), data.guidance(indices).k
        assert latents.shape == (BATCH, *SHAPE) and k is not None and k.shape == (BATCH,)
    return BATCH * (N // BATCH)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def sequential_webdataset(folder: Path) -> int:
    shards = sorted(str(path) for path in (folder / "shards").iterdir())
    source = webdataset.WebDataset(shards, shardshuffle=False).decode().to_tuple("latent.npy", "k.npy")
    return sum(len(latent) for latent, _ in source.map_tuple(lambda x: torch.from_numpy(x).float()).batched(BATCH))


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_set(folder)
        start = time.perf_counter()
        data = LatentSet(folder)
        opened = time.perf_counter() - start
        pool = Blocks(np.arange(0, N, SHARD), data.counts, 2)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=name))
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        there = LatentSet(f"http://127.0.0.1:{httpd.server_port}")
        start = time.perf_counter()
        cold = round(batches(there, pool) / (time.perf_counter() - start))
        results = {
            "samples": N,
            "latent_shape": SHAPE,
            "LatentSet, shuffled, batches of 128 [samples/s]": rate(lambda: batches(data, Kept(N, 0, 0))),
            "in blocks of 2 shards [samples/s]": rate(lambda: batches(data, pool)),
            "in blocks of 2 shards by HTTP, every shard fetched [samples/s]": cold,
            "in blocks of 2 shards by HTTP, shards in the cache [samples/s]": rate(lambda: batches(there, pool)),
            "LatentSet, one by one [samples/s]": rate(lambda: sum(data[i] is not None for i in range(N))),
            "webdataset, sequential [samples/s]": rate(lambda: sequential_webdataset(folder)),
            "opening [s]": round(opened, 4),
        }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
