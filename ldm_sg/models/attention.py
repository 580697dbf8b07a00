"""What a UNet sees where: its cross-attention probabilities and decoder activations, of any diffusers UNet2DConditionModel."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F

from ldm_sg.errors import InputError
from ldm_sg.guidance.signal import Guidance


@dataclass
class Seen:
    """Of one pass over a batch: `maps` [B, T, h, w], of each layer that was read, averaged over heads; `activations` [B, C, h, w], of the
    decoder's blocks that these layers are in."""

    maps: list[Tensor] = field(default_factory=list)
    activations: list[Tensor] = field(default_factory=list)
    ratio: float = 1.0  # of height to width


def decoder_attention(unet: nn.Module) -> dict[nn.Module, list[Attention]]:
    """The decoder's blocks that have cross-attention, with it. InputError where there is none."""
    found = {
        block: [m for name, m in block.named_modules() if name.endswith("attn2") and isinstance(m, Attention)]
        for block in unet.up_blocks
    }
    found = {block: layers for block, layers in found.items() if layers}
    if not found:
        raise InputError("this network has no cross-attention, which editing reads: train with model.tokens=concepts")
    return found


def attention_loss(seen: Seen, guidance: Guidance) -> Tensor:
    """[B]: cross-entropy of the attention with what is where, `guidance.spatial` [B, K, h, w]: of each place with its concept's token,
    or the background's where no concept is. Of the null, which reads one token, 0."""
    assert guidance.concepts is not None and guidance.spatial is not None
    there = (guidance.concepts >= 0)[..., None, None]
    place = guidance.spatial.gather(
        1, guidance.concepts.clamp(min=0)[..., None, None].expand(-1, -1, *guidance.spatial.shape[2:])
    )
    place = place * there  # [B, T, h, w]
    target = torch.cat([(1 - place.sum(1, keepdim=True)).clamp(min=0), place], 1)
    losses = []
    for probabilities in seen.maps:
        wanted = F.adaptive_avg_pool2d(target, probabilities.shape[2:])
        losses.append(-(wanted * probabilities.float().clamp(min=1e-4).log()).sum(1).mean((1, 2)))
    return torch.stack(losses).mean(0) * guidance.keep


@contextmanager
def reading(unet: nn.Module) -> Iterator[Seen]:
    """Within it a pass of `unet` leaves behind what it saw, with its gradients. Attention that is read is computed by an explicit
    softmax; outside the network is what it was."""
    seen, before = Seen(), []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.ratio = args[0].shape[2] / args[0].shape[3]

    handles = [unet.register_forward_pre_hook(look)]
    for block, layers in decoder_attention(unet).items():
        handles.append(block.register_forward_hook(lambda module, args, out: seen.activations.append(out)))
        for layer in layers:
            before.append((layer, layer.processor))
            layer.set_processor(AttnProcessor())
            layer.get_attention_scores = _recorder(layer, seen)  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for layer, processor in before:
            del layer.get_attention_scores
            layer.set_processor(processor)


def _recorder(layer: Attention, seen: Seen) -> Any:
    def scores(query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        probabilities = Attention.get_attention_scores(layer, query, key, mask)  # [B * heads, h * w, T]
        mean = probabilities.unflatten(0, (-1, layer.heads)).mean(1)
        side = round((mean.shape[1] * seen.ratio) ** 0.5)
        seen.maps.append(mean.transpose(1, 2).unflatten(2, (side, -1)))
        return probabilities

    return scores
