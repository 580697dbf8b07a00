"""A pytest plugin, `pytest -p simulated_gpu`: a device with values of its own, computed on the CPU, which stands in for a GPU where
there is none. What mixes its tensors with others, or takes them for NumPy's, fails as it does on a GPU; training stays on the CPU."""

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from ldm_sg import hardware

DEVICE = torch.device("meta")  # the only one that torch has on every machine beside the CPU
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "index_fill_")  # indices may lie on the CPU
ANYWHERE = ("copy_", "_has_compatible_shallow_copy_type")
PLAIN = ("_local_scalar_dense", "equal", "is_same_size")  # their result is none of the device's
AT_HOME = ("ldm_sg.verbs.train", "ldm_sg.verbs.finetune", "ldm_sg.verbs.fit_autoencoder", "ldm_sg.annotate.distill")

of_cpu, as_cpu, autocast_of, pick = torch.tensor, torch.as_tensor, torch.autocast, hardware.pick_device


class OnGpu(torch.Tensor):
    """A tensor that says it lies on DEVICE; `inner` has its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnGpu":
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=DEVICE, **like)
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> "OnGpu":
        return OnGpu(self.inner.clone()).requires_grad_(self.requires_grad)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(on_device(key))

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(on_device(key), value)

    def tolist(self) -> Any:
        return self.inner.tolist()

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
        return tensor(data, dtype=dtype or self.dtype, device=device or DEVICE)

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError("can't convert a tensor of the simulated GPU to numpy: use Tensor.cpu()")
        return self.detach().cpu().numpy()

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()


def on_device(key: Any) -> Any:
    """An index with its lists as tensors, which torch would make without values."""
    if isinstance(key, tuple):
        return tuple(map(on_device, key))
    return OnGpu(of_cpu(key)) if isinstance(key, list) else key


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator on the values, wrapped again; RuntimeError where devices mix."""
    name, leaves = func.overloadpacket.__name__, tree_leaves((args, kwargs))
    ours = {id(each.inner): each for each in leaves if isinstance(each, OnGpu)}
    others = [each for each in leaves if isinstance(each, torch.Tensor) and not isinstance(each, OnGpu) and each.ndim]
    if ours and others and not (name in ANYWHERE or (name in INDEXED and isinstance(args[0], OnGpu))):
        raise RuntimeError(f"Expected all tensors to be on the same device: {name}")
    here, told = bool(ours), kwargs
    if kwargs.get("device") is not None:
        here, told = torch.device(kwargs["device"]) == DEVICE, kwargs | {"device": torch.device("cpu")}
    if name == "copy_":
        here = isinstance(args[0], OnGpu)
    args, told = tree_map(lambda each: each.inner if isinstance(each, OnGpu) else each, (args, told))
    with _disable_current_modes():
        found = func(*args, **told)
    if not here or name in PLAIN:
        return found
    changed = ours if func._schema.is_mutable else {}  # what was changed in place is itself

    def wrapped(each: Any) -> Any:
        if not isinstance(each, torch.Tensor):
            return each
        return changed[id(each)] if id(each) in changed else OnGpu(each)

    return tree_map(wrapped, found)


class Simulation(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        made_here = device is not None and torch.device(device) == DEVICE
        if made_here or any(isinstance(each, OnGpu) for each in tree_leaves((args, kwargs))):
            return run(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def tensor(data: Any, *, device: Any = None, **how: Any) -> torch.Tensor:
    return of_cpu(data, **how).to(device or "cpu")


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
    found = data if isinstance(data, OnGpu) else as_cpu(data, dtype=dtype)
    return found if device is None else found.to(device)


class Autocast(autocast_of):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        simulated = device_type == DEVICE.type
        super().__init__(
            "cpu" if simulated else device_type, *args, **kwargs | ({"enabled": False} if simulated else {})
        )


def pick_device(name: str) -> torch.device:
    asks = sys._getframe(1).f_globals["__name__"]
    return pick("cpu") if asks in AT_HOME or name == "tpu" else DEVICE


torch.tensor, torch.as_tensor, torch.autocast, hardware.pick_device = tensor, as_tensor, Autocast, pick_device
Simulation().__enter__()
