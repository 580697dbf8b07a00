"""Checkpoints of this program's own making, read without running any code that a file may carry."""

from pathlib import Path
from typing import Any

import torch

from ldm_sg.errors import InputError


def read_checkpoint(path: Path, device: torch.device | str = "cpu", mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's content; InputError for a broken file or one with anything but tensors and plain containers in it."""
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as err:
        raise InputError(
            f"{path}: damaged, or not a checkpoint of this program (code in it is never run); remove it to start again"
        ) from err
