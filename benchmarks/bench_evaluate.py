"""Memory and speed of `evaluate` by numbers of samples and of processes, on an untrained little network at 64 px.

python benchmarks/bench_evaluate.py [-n 2000 10000] [--processes 1 2]"""

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, nargs="+", default=[2000, 10_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
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
