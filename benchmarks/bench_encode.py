"""Images a second of a first stage's encoder by precision, memory format and batch, on random images, one JSON line each:
`python benchmarks/bench_encode.py FOLDER_OR_NAME [--size 256] [--threads 1]`."""

import argparse
import itertools
import json
import time

import torch

from ldm_sg.autoencoder import load_autoencoder

ROUNDS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("autoencoder")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images = torch.rand(32, 3, args.size, args.size) * 2 - 1
    variants = list(itertools.product((False, True), (torch.contiguous_format, torch.channels_last), (4, 32)))
    best = dict.fromkeys(variants, float("inf"))
    for _, (bf16, layout, batch) in itertools.product(range(ROUNDS), variants):
        autoencoder = load_autoencoder(args.autoencoder).to(memory_format=layout)
        part = images[:batch].contiguous(memory_format=layout)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            autoencoder.encode_raw(part)
            start = time.perf_counter()
            autoencoder.encode_raw(part)
        key = (bf16, layout, batch)
        best[key] = min(best[key], (time.perf_counter() - start) / batch)
    for (bf16, layout, batch), seconds in best.items():
        found = {"precision": "bf16" if bf16 else "fp32", "layout": str(layout).removeprefix("torch."), "batch": batch}
        print(json.dumps(found | {"images_per_s": round(1 / seconds, 2)}))


if __name__ == "__main__":
    main()
