"""Sampling speed and quality per scheduler on a trained run, side by side.

python benchmarks/bench_sample.py runs/demo --reference runs/demo-data/shards [-n 1000]"""

import argparse
import contextlib
import io
import time
from pathlib import Path

from ldm_sg.pipeline import open_pipeline
from ldm_sg.verbs.evaluate import evaluate

SETTINGS = [
    ("ddim", 250),  # the preset `paper`, what the others are compared with
    ("dpmpp_2m", 25),  # the default
    ("dpmpp_2m", 15),
    ("unipc", 25),
    ("euler", 25),
    ("ddim", 25),
    ("ddim", 50),
    ("ddpm", 250),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--reference", required=True)
    parser.add_argument("-n", type=int, default=1000)
    parser.add_argument("--w", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_sample"))
    args = parser.parse_args()
    pipe = open_pipeline(args.run)
    print(f"{args.run}, w = {args.w:g}, n = {args.n}, {pipe.unet.device}")
    print("| scheduler | steps | images/s (batch 64) | Frechet distance | against the paper preset |")
    print("| --- | --- | --- | --- | --- |")
    paper = None
    for scheduler, steps in SETTINGS:
        guidance = pipe.draw(64)
        start = time.perf_counter()
        pipe.generate(guidance, args.w, steps, scheduler, precision="auto")
        rate = 64 / (time.perf_counter() - start)
        with contextlib.redirect_stdout(io.StringIO()):
            result = evaluate(args.run, args.reference, metrics="fd", n=args.n, w=args.w, steps=steps, scheduler=scheduler,
                              out=args.out / f"{scheduler}{steps}.json")  # fmt: skip
        fd = next(iter(result["metrics"].values()))["fd"]
        paper = paper or fd
        print(f"| {scheduler} | {steps} | {rate:.1f} | {fd:.4g} | {100 * (fd / paper - 1):+.1f}% |", flush=True)


if __name__ == "__main__":
    main()
