"""Memory and speed of `evaluate` by numbers of samples and of processes, on an untrained little network at 64 px; and what it takes
of images on disk beside a bare pass of decoded images through the same network.

python benchmarks/bench_evaluate.py [-n 2000 10000] [--processes 1 2]
python benchmarks/bench_evaluate.py --images 10000 [--judge inception:FILE] [--rounds 1]"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LDM_SG = [sys.executable, "-c", "from ldm_sg.cli import main; main()"]
SMALL = ["model.channels=16", "model.blocks=1", "model.attention=[]", "steps=1", "batch_size=8"]


def against_bare(n: int, judge: str, rounds: int) -> None:
    """Reference features are remembered, as they are from the second evaluation on. Seconds of all cores, which other programs that
    run meanwhile change less than the clock's."""
    import torch

    from ldm_sg.data.images import to_float
    from ldm_sg.data.shards import read_shard
    from ldm_sg.evaluate import sources
    from ldm_sg.evaluate.judges import load_network
    from ldm_sg.evaluate.subjects import fitting
    from ldm_sg.verbs.evaluate import evaluate

    shards = sorted(map(str, Path("ldm_sg/assets/fruit64").glob("*.tar")))
    photos = [sample.image for shard in shards for sample in read_shard(shard, print)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        images = Path(folder) / "images"
        images.mkdir()
        for i in range(n):
            (images / f"{i:06d}.png").write_bytes(
                photos[i % len(photos)]
            )  # of whatever format: it is read by its content
        device = torch.device("cpu")
        network, at_once = load_network(judge, None, device), fitting(64, device)
        found = sources.batches(sources.open_images(str(images)), 64, at_once, n, print)
        decoded = [batch for _, batch in found]
        args = {"metrics": "fd,kid,prdc", "features": judge, "device": "cpu", "out": f"{folder}/found.json", "n": n}
        evaluate(images, images, **args | {"n": 6})
        for _ in range(rounds):
            started = time.process_time()
            with torch.no_grad():
                for batch in decoded:
                    network(to_float(batch))
            bare, started = time.process_time() - started, time.process_time()
            evaluate(images, images, **args)
            whole = time.process_time() - started
            print(
                f"{n:,} images by {judge}: bare pass {bare:.1f} s, evaluate {whole:.1f} s, {whole / bare:.3f} times",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, help="only compare with a bare pass, of so many images")
    parser.add_argument("--judge", default="demo-g", help="as evaluate --features takes it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-n", type=int, nargs="+", default=[2000, 10_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    if args.images:
        return against_bare(args.images, args.judge, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # reference features are made anew by the first
        run, shards = Path(folder) / "run", Path(folder) / "shards"
        subprocess.run([*LDM_SG, "pack", "ldm_sg/assets/fruit64", shards, "--size", "64"], check=True)
        annotation = f"{folder}/set"
        subprocess.run([*LDM_SG, "annotate", "configs/annotate/demo.yaml", f"shards={shards}/*.tar", f"out={annotation}"],
                       check=True)  # fmt: skip
        subprocess.run([*LDM_SG, "train", "configs/train/demo.yaml", f"annotation={annotation}", f"out={run}", *SMALL],
                       check=True)  # fmt: skip
        print(
            "| samples | processes | samples/s | peak RSS of the largest process, MB | fd |\n| --- | --- | --- | --- | --- |"
        )
        for n in args.n:
            for processes in args.processes:
                command = [*LDM_SG, "evaluate", run, "--reference", f"{shards}/*.tar", "--metrics", "fd,prdc", "-n", str(n),
                           "--steps", "1", "--processes", str(processes), "--out", f"{folder}/found.json"]  # fmt: skip
                started = time.perf_counter()
                child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                _, status, used = os.wait4(child.pid, 0)
                assert status == 0, command
                seconds = time.perf_counter() - started
                (space,) = json.loads(Path(f"{folder}/found.json").read_text())["metrics"].values()
                print(
                    f"| {n:,} | {processes} | {n / seconds:.1f} | {used.ru_maxrss / 1000:.0f} | {space['fd']!r} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
