"""Which device and which precision: `auto` takes the best there is, a name is obeyed or refused."""

import sys
import time
from pathlib import Path

import torch

from ldm_sg.errors import InputError, choices, need_choice

PRECISIONS = ("auto", "fp32", "bf16")


def pick_device(name: str) -> torch.device:
    """auto (CUDA, then Apple's MPS, then CPU), cpu, mps, cuda or cuda:N."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (":" in name and not number.isdecimal()):
        raise InputError(f"device={name!r}; {choices(name, ['auto', 'cpu', 'cuda', 'cuda:0', 'mps'])}")
    if kind != "cpu" and not (torch.cuda if kind == "cuda" else torch.backends.mps).is_available():
        raise InputError(
            f"device={name!r}, but torch sees no {kind.upper()} device here: use device=cpu or device=auto"
        )
    return torch.device(name)


def use_bf16(precision: str, device: torch.device) -> bool:
    """fp32 -> False, bf16 -> True, auto -> whether the device multiplies bf16 matrices faster than fp32."""
    need_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def use_compile(mode: str | bool, device: torch.device) -> bool:
    """auto -> on CUDA only; true is obeyed anywhere, with a word where it costs more than it gives."""
    if mode is True and device.type != "cuda":
        print(
            f"note: compile=true on {device.type}: minutes before the first step; auto compiles on CUDA",
            file=sys.stderr,
        )
    return device.type == "cuda" if mode == "auto" else bool(mode)


def note_busy_cores(device: torch.device, seconds: float = 0.3) -> None:
    """Says so where other programs hold the cores that this one's threads are about to share: at the end of every layer the threads
    wait for the one that has no core, which costs up to fifty times the work itself (benchmarks/RESULTS.md)."""
    stat = Path("/proc/stat")
    if device.type != "cpu" or torch.get_num_threads() == 1 or not stat.is_file():
        return
    before = stat.read_text()
    time.sleep(seconds)
    busy = busy_share(before, stat.read_text())
    if busy > 0.4:
        print(
            f"note: other programs hold {busy:.0%} of the cores, and {torch.get_num_threads()} threads would wait for them at every "
            "layer: with OMP_NUM_THREADS=1 this is several times faster",
            file=sys.stderr,
        )


def busy_share(before: str, after: str) -> float:
    """The share of all cores' time that was not idle between two readings of /proc/stat."""
    first, last = ([int(n) for n in text.split("\n", 1)[0].split()[1:9]] for text in (before, after))
    spent = [b - a for a, b in zip(first, last)]  # user nice system idle iowait irq softirq steal
    return 1 - (spent[3] + spent[4]) / max(1, sum(spent))
