"""`ldm-sg annotate` by one process, by two, by two Ray actors and as two parts: seconds of the whole command, starting included, and
whether all made the same set; then the peak memory of the largest process over N and over 10 N shards. One JSON line each:
`OMP_NUM_THREADS=1 python benchmarks/bench_workers.py [--images 480] [--shards 12] [--memory 10]` (0 skips a half).

g is a ViT-S/16 of random weights at 224 px; speed does not depend on them. `--autoencoder` is `patch4`, which costs nothing, or a folder."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
from bench_annotate import photos
from safetensors.torch import save_file

from ldm_sg.data.latents import LatentSet
from ldm_sg.data.shards import ShardWriter


def write_shards(folder: Path, size: int, n: int, shards: int) -> str:
    images = list(photos(size))
    folder.mkdir()
    for s in range(shards):
        with ShardWriter(str(folder / f"{s:06d}.tar")) as writer:
            for i in range(s, n, shards):
                writer.write(f"{i:06d}", {"jpg": images[i % len(images)]})
    return str(folder / "*.tar")


def run(commands: list[list[str]]) -> tuple[float, float]:
    """Seconds until all of these are through, side by side, and the peak memory in MB of the largest process among theirs."""
    start, most = time.perf_counter(), 0
    started = [
        subprocess.Popen(
            [str(Path(sys.executable).with_name("ldm-sg")), *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        for command in commands
    ]
    for process in started:
        _, status, used = os.wait4(process.pid, 0)
        if status:
            sys.exit(process.stderr.read().decode()[-3000:])
        most = max(most, used.ru_maxrss)
    return time.perf_counter() - start, most / 1024


def speed(folder: Path, images: int, shards: int, autoencoder: str) -> None:
    weights = str(folder / "random.safetensors")
    save_file(timm.create_model("vit_small_patch16_224", num_classes=0).state_dict(), weights)
    config = folder / "speed.yaml"
    config.write_text(
        f"shards: {write_shards(folder / 'speed', 256, images, shards)}\nautoencoder: {autoencoder}\n"
        f"features: {{model: vit_small_patch16_224, weights: {weights}}}\nannotator: {{k: 10}}\nout: {folder}\nworkers: 0\n"
    )
    base, hashes = ["annotate", str(config)], {}
    for name, ways in {
        "1 process": [["processes=1"]],
        "2 processes": [["processes=2"]],
        "ray, 2 actors": [["executor=ray", "processes=2"]],
        "2 parts": [["--part", "0/2"], ["--part", "1/2"]],
    }.items():
        out = folder / name.replace(" ", "-")
        seconds, _ = run([[*base, f"out={out}", *way] for way in ways])
        if name == "2 parts":
            seconds += run([[*base, f"out={out}", "--finish"]])[0]
        hashes[name] = LatentSet(out).hash
        print(json.dumps({"by": name, "images": images, "s": round(seconds, 1), "hash": hashes[name][:12]}), flush=True)
    assert len(set(hashes.values())) == 1, hashes


def memory(folder: Path, shards: int, each: int) -> None:
    for times in (1, 10):
        source = write_shards(folder / f"memory{times}", 64, shards * each * times, shards * times)
        out = folder / f"out{times}"
        few = [
            f"shards={source}",
            f"out={out}",
            "annotator.fit=stream",
            f"annotator.sample={shards * each // 2}",
            "annotator.niter=5",
        ]
        found = {"shards": shards * times, "images": shards * each * times, "MB": {}}
        found["MB"]["annotate"] = round(run([["annotate", "configs/annotate/demo.yaml", *few]])[1])
        steps = [
            "steps=60",
            "sample_every=60",
            "val_every=60",
            "checkpoint_every=30",
            f"annotation={out}",
            f"out={folder}/run{times}",
        ]
        found["MB"]["train"] = round(run([["train", "configs/train/demo.yaml", *steps]])[1])
        print(json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=480)
    parser.add_argument("--shards", type=int, default=12)
    parser.add_argument("--autoencoder", default="patch4")
    parser.add_argument("--memory", type=int, default=10, help="N")
    parser.add_argument("--each", type=int, default=300, help="images of a shard, for memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if args.images:
            speed(Path(temporary), args.images, args.shards, args.autoencoder)
        if args.memory:
            memory(Path(temporary), args.memory, args.each)


if __name__ == "__main__":
    main()
