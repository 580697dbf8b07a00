"""Weights out of files that may be anybody's."""

import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldm_sg.errors import InputError, one_line

MOST_PICKLED = 64 * 2**20  # bytes of what a torch file holds beside its tensors


class _Inert:
    """Stands for a class or function that a file names: takes anything, does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


def read_weights(path: Path, inert: bool = False) -> dict[str, Tensor]:
    """Names and tensors of a safetensors file or of a torch file: a state dict, or a checkpoint's. Never runs code from it:
    InputError for a file that holds anything but tensors and plain containers. With `inert` what else it holds, Lightning's
    callbacks for example, comes to nothing: each class and function it names is replaced by one that does nothing."""
    if not path.is_file():
        raise InputError(f"weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with safe_globals(_stand_ins(path) if inert else []):
                state = torch.load(path, "cpu", weights_only=True)
    except Exception as err:  # zip, pickle and header errors; an unpickler that reads something else raises anything
        why = one_line(err.__context__ or err)[:100]  # torch wraps it in a page of advice
        said = f"{path}: not a safetensors file or a torch file of plain tensors ({why}); files with code are refused"
        raise InputError(f"{said}: save the tensors with safetensors.torch.save_file") from err
    for wrapper in ("state_dict", "model", "teacher"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if inert and isinstance(state, Mapping):
        state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path}: expected names and tensors and nothing else")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def check_finite(state: Mapping[str, Tensor], where: str | Path) -> None:
    """InputError naming the first of the tensors that holds NaN or infinity; `where`: the file or folder they are of."""
    broken = next((name for name, value in state.items() if not value.isfinite().all()), None)
    if broken:
        raise InputError(f"{where}: {broken} holds NaN or infinity: it is damaged, or its training diverged")


def read_finite(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A safetensors file's tensors, all finite and float32, those of `shapes` among them; 0 there stands for any size above it.
    InputError for any other file."""
    try:
        state = load_file(path)
    except Exception as err:  # of the disk or of its header
        raise InputError(f"{path} is damaged or not complete: {one_line(err)[:200]}") from err
    for name, shape in shapes.items():
        if name not in state:
            raise InputError(f"{path}: no {name} in it: the file is damaged")
        there = state[name].shape
        fits = len(there) == len(shape) and all(n and want in (0, n) for n, want in zip(there, shape, strict=True))
        if not fits or not state[name].is_floating_point():
            said = " x ".join(str(want or "any") for want in shape)
            raise InputError(f"{path}: {name} is {state[name].dtype} {list(there)}; floating point {said} is expected")
    check_finite(state, path)
    return {name: value.float() for name, value in state.items()}


def _stand_ins(path: Path) -> list[type]:
    """One _Inert under each name in a torch file that torch's own unpickler of weights would refuse; it knows no other way to
    call anything, and still refuses whatever is of `os` or `sys`."""
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        largest = max((entry.file_size for entry in archive.infolist() if entry.filename.endswith(".pkl")), default=0)
        if largest > MOST_PICKLED:  # a few MB packed may be gigabytes of opcodes, each read in Python
            raise ValueError(f"its pickle has {largest / 2**20:,.0f} MiB, which no checkpoint needs")
    names = (name.rpartition(".") for name in get_unsafe_globals_in_checkpoint(path))
    return [type(name, (_Inert,), {"__module__": module}) for module, _, name in names]
