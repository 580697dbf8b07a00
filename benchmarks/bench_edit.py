"""What editing costs: seconds an image of plain sampling, of recording its steps, and of sampling drawn towards an edit, side by side,
and the peak memory of each in its own process. One JSON line: `python benchmarks/bench_edit.py RUN [-n 4] [--steps 25]`."""

import argparse
import json
import multiprocessing
import resource
import time

import torch

from ldm_sg.pipeline import open_pipeline
from ldm_sg.sampling.edit import Edit
from ldm_sg.sampling.editor import Editor


def measure(run: str, what: str, n: int, steps: int, send) -> None:
    torch.set_num_threads(1)
    editor = Editor(open_pipeline(run, "auto"), steps=steps)
    device = editor.pipe.device.type
    signals = editor.pipe.draw(n, 0)
    source = editor.drawn(n, 0) if what == "edit" else None
    kept = [int(k) for k in source.observed[-1].there.all(0).nonzero()] if source else []
    start = time.perf_counter()
    if source:
        editor.edit(source, [Edit(kept[len(kept) // 2], dx=0.01)])
    elif what == "record":
        editor.drawn(n, 0)
    else:
        editor.pipe.generate(signals, steps=steps)
    seconds = time.perf_counter() - start
    cuda = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    send.send((seconds / n, (cuda / 2**20) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("-n", type=int, default=4)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()
    found: dict[str, object] = {"n": args.n, "steps": args.steps}
    for what in ("plain", "record", "edit"):
        receive, send = multiprocessing.get_context("spawn").Pipe(False)
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(args.run, what, args.n, args.steps, send)
        )
        process.start()
        seconds, megabytes = receive.recv()
        process.join()
        found[what] = {"s": round(seconds, 2), "MB": round(megabytes)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
