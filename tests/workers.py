"""Workers for tests/test_executor.py, in a file of their own so that processes start fast."""

import os
import signal
from pathlib import Path

from ldm_sg.errors import InputError


def make(folder: Path, device: str):
    """A worker whose result says which process it is, and which device."""
    if (folder / "refuses").exists():
        raise InputError("no weights there")

    broken = []

    def work(task: str) -> tuple[str, int, str]:
        if broken or task == "breaks":
            broken.append(task)
            raise RuntimeError("device-side assert")
        if task == "bug":
            raise ZeroDivisionError("of 1 by 0")
        if task == "bad":
            raise InputError("bad input")
        if task == "dies" and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task, os.getpid(), device

    return work
