"""Fine-tuning against training from scratch, a JSON line a run (finished ones are not run again):

    python benchmarks/finetune.py SHARED RUN OUT [--data clothing10_256] [--steps 100 300 500 1000] [--seeds 0 1 2]

SHARED: folder with data/NAME and weights/dinov2_small. RUN: what is fine-tuned, for example runs/demo. FD and KD of as many
samples at w = 2 as there are photos, in DINOv2-small's features (block 10, at 112 px), which made no signal here. Fixed numbers
of steps, so no early stopping. `scratch` is the run's own config on the same annotation set as `refit`."""

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

import yaml

from ldm_sg.config import TrainConfig
from ldm_sg.configfile import from_mapping
from ldm_sg.folder import read_mapping
from ldm_sg.verbs.evaluate import evaluate
from ldm_sg.verbs.finetune import finetune
from ldm_sg.verbs.pack import pack
from ldm_sg.verbs.train import train

FIXED = ["patience=0", "workers=0", "val_every=0", "sample_every=0"]
LORA = {"lora16": 16}  # mode -> rank; the other modes are scratch, refit, reuse and extend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shared", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", default="clothing10_256")
    parser.add_argument("--k", type=int, default=12)
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300, 500, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", default=["scratch", "refit"])
    args = parser.parse_args()
    weights = str(args.shared / "weights" / "dinov2_small" / "model.safetensors")
    judge = args.out / "judge.yaml"
    args.out.mkdir(parents=True, exist_ok=True)
    judge.write_text(
        yaml.safe_dump({"model": "vit_small_patch14_dinov2", "weights": weights, "layer": 10, "size": 112})
    )
    base = from_mapping(TrainConfig, read_mapping(args.run / "config.yaml"), str(args.run))
    photos, shards = args.shared / "data" / args.data, args.out / args.data / "shards"
    n = pack(photos, shards, size=64, format="png").images
    for steps, mode, seed in itertools.product(args.steps, args.modes, args.seeds):
        out = args.out / args.data / f"{mode}_{steps}_{seed}"
        if (out / "row.json").is_file():
            continue
        started, clusters = time.perf_counter(), mode if mode in ("reuse", "extend") else "refit"
        images = annotated(args.run, f"{shards}/*.tar", args.out / args.data / clusters, clusters, args.k)
        if mode == "scratch":
            train(dataclasses.replace(base, annotation=images, out=str(out), steps=steps, seed=seed, warmup=steps // 10, workers=0,
                                      ema=min(base.ema, 1 - 5 / steps), val_every=0, sample_every=0, val_share=0.1))  # fmt: skip
        else:
            finetune(args.run, images, steps=steps, lora=LORA.get(mode, 0), out=out, overrides=[*FIXED, f"seed={seed}"])
        minutes = (time.perf_counter() - started) / 60
        found = evaluate(out, f"{shards}/*.tar", metrics="fd,kid", n=n, features=str(judge), seed=seed, batch_size=100)
        figures = next(iter(found["metrics"].values()))
        row = {"data": args.data, "mode": mode, "steps": steps, "seed": seed, "minutes": round(minutes, 2)}
        row |= {"fd": round(figures["fd"], 2), "kid": round(figures["kid"], 4)}
        (out / "row.json").write_text(json.dumps(row))
        print(json.dumps(row), flush=True)


def annotated(run: Path, shards: str, out: Path, clusters: str, k: int) -> str:
    """The annotation set of `shards` that all runs of one mode learn from."""
    folder = out.with_name(out.name + "-data") / "annotation"
    if not (folder / "manifest.yaml").is_file():
        finetune(
            run, shards, k=None if clusters == "reuse" else k, clusters=clusters, steps=1, out=out, overrides=FIXED
        )
    return str(folder)


if __name__ == "__main__":
    main()
