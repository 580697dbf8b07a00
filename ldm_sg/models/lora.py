"""Fine-tuning with most weights at rest: low-rank adapters (LoRA, Hu et al., 2021) through peft, or chosen parameters."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import nn

from ldm_sg.errors import InputError, need_package, one_line
from ldm_sg.weights import read_finite


def add_lora(unet: UNet2DConditionModel, rank: int) -> None:
    """Adapters of `rank` beside every linear layer and convolution of `unet`, whose own weights rest from now on. They begin
    without effect."""
    unet.requires_grad_(False)
    unet.add_adapter(_peft().LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_adapted(unet))))


def _adapted(unet: UNet2DConditionModel) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that get adapters, by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}


def train_only(unet: UNet2DConditionModel, names: Sequence[str]) -> None:
    """Of the UNet's parameters only those with one of `names` in their name are trained; InputError where one fits none."""
    known = [name for name, _ in unet.named_parameters()]
    for wanted in names:
        if not any(wanted in name for name in known):
            parts = sorted({part for name in known for part in name.split(".") if not part.isdigit()})
            raise InputError(
                f"only={wanted!r}: no parameter of the UNet has that in its name; its parts: {', '.join(parts)}"
            )
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(any(wanted in name for wanted in names))


def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy with its adapters added to its weights, which needs peft no more."""
    plain = copy.deepcopy(unet)
    plain.fuse_lora()
    plain.unload_lora()
    return plain


def load_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Adds what `save_lora_adapter` of diffusers wrote to the weights of `unet`, the network that they were trained beside. InputError where they do not
    fit it, or are none."""
    _peft()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, layer in _adapted(unet).items():
        wide, *rest = layer.weight.shape
        shapes |= {f"{name}.lora_A.weight": (0, *rest), f"{name}.lora_B.weight": (wide, 0, *[1] * len(rest[1:]))}
    try:
        found = read_finite(folder / LORA_WEIGHT_NAME_SAFE, shapes)  # all is looked at before the network is touched
        ranks = {tensor.shape[".lora_B." in name] for name, tensor in found.items()}
        if len(ranks) != 1 or found.keys() != shapes.keys():
            raise InputError("adapters of one rank, beside each layer and nothing else, are expected")
        unet.load_lora_adapter(str(folder), prefix=None, weight_name=LORA_WEIGHT_NAME_SAFE, use_safetensors=True)
    except Exception as err:  # peft and safetensors raise what they like at files that do not fit
        raise InputError(f"lora {str(folder)!r} does not fit this run's network: {one_line(err)[:400]}") from err
    unet.fuse_lora()
    unet.unload_lora()


def _peft() -> Any:
    return need_package("peft", "lora", "'ldm-sg[lora]'")
