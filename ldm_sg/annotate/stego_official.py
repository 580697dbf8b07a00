"""STEGO's official checkpoints: which of their tensors are the head and the classes, and how they are read without running
what else is pickled in them."""

import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ldm_sg.annotate.stego_head import Head
from ldm_sg.errors import InputError, one_line

HEAD = {"net.cluster1.0": "linear", "net.cluster2.0": "nonlinear.0", "net.cluster2.2": "nonlinear.2"}
CLASSES = "cluster_probe.clusters"
EMBEDDING = "net.model.patch_embed.proj.weight"  # of the ViT that the head was trained on
TENSORS = {
    ("collections", "OrderedDict"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
}


class _Stub(dict):
    """Stands for whatever class or function a checkpoint names that makes no tensor: it takes all and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        super().__init__()

    def __setstate__(self, state: Any) -> None: ...

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if (module, name) in TENSORS else _Stub


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a Lightning checkpoint's state_dict; its configuration, metrics and whatever else are pickled beside them
    are left inert. InputError where there is none."""
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"annotator.segments.weights={path}: {'not a torch file' if path.is_file() else 'no such file'}"
        )
    try:
        inert: Any = SimpleNamespace(Unpickler=_Unpickler, __name__="inert")
        state = torch.load(path, "cpu", pickle_module=inert, weights_only=False)["state_dict"]
        return {name: value.detach().float() for name, value in state.items() if isinstance(value, Tensor)}
    except Exception as err:  # zip, pickle, missing keys
        raise InputError(f"annotator.segments.weights={path}: not a readable checkpoint: {one_line(err)}") from err


def official(path: Path, tower: nn.Module) -> tuple[Head, Tensor]:
    """A STEGO checkpoint -> its head and the centres of its classes [K, C]. InputError where it is none, or its head was
    trained on another g than `tower`."""
    state = read_checkpoint(path)
    renamed = {f"{new}.{part}": f"{old}.{part}" for old, new in HEAD.items() for part in ("weight", "bias")}
    lacking = [name for name in (*renamed.values(), CLASSES, EMBEDDING) if name not in state]
    if lacking:
        raise InputError(f"annotator.segments.weights={path}: no {lacking[0]} in it, which STEGO's checkpoints have")
    theirs, ours = state[EMBEDDING], dict(tower.named_parameters()).get("patch_embed.proj.weight")
    if ours is None or ours.shape != theirs.shape or not torch.allclose(ours.cpu(), theirs, atol=2e-3):
        raise InputError(
            f"annotator.segments.weights={path}: its head was trained on another g: a ViT of width {theirs.shape[0]} with "
            f"patches of {theirs.shape[-1]} pixels, for example features.model=vit_base_patch8_224.dino"
        )
    head = Head(state["net.cluster1.0.weight"].shape[1], len(state["net.cluster1.0.weight"]))
    head.load_state_dict({new: state[old] for new, old in renamed.items()})
    return head.requires_grad_(False), state[CLASSES]
