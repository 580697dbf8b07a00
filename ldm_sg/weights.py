"""Weights out of files that may be anybody's."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm_sg.errors import InputError, one_line


def read_weights(path: Path) -> dict[str, Tensor]:
    """Names and tensors of a safetensors file or of a torch file: a state dict, or a checkpoint's. Never runs code from it:
    InputError for a file that holds anything but tensors and plain containers."""
    if not path.is_file():
        raise InputError(f"weights {path}: no such file")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as err:  # zip, pickle and header errors; an unpickler that reads something else raises anything
        raise InputError(
            f"{path}: not a safetensors file or a torch file of plain tensors ({one_line(err)[:100]}). Files with code in them "
            "are refused: save the tensors with safetensors.torch.save_file"
        ) from err
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: expected names and tensors and nothing else")
    return {str(name).removeprefix("module."): value for name, value in state.items()}
