"""Guidance strategies: functions from Denoiser to Denoiser, so they compose and no network has a guidance method."""

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_sg.guidance.signal import Guidance

Denoiser = Callable[[Tensor, Tensor, Guidance], Tensor]
"""(x_t [B, C, h, w], t [B], guidance of B samples) -> prediction [B, C, h, w] (eps, v, x0 or flow velocity)."""


def cfg(denoiser: Denoiser, w: float) -> Denoiser:
    """Classifier-free guidance, Eq. 4 of the paper: (1 - w) eps_null + w eps_cond, in one batched pass.

    It is affine in the prediction with weights that sum to one, so it holds for eps, v, x0 and flow alike.
    w = 1 (conditional) and w = 0 (unconditional) cost one evaluation, every other w costs two."""
    if w == 1:
        return denoiser
    if w == 0:
        return lambda x, t, guidance: denoiser(x, t, guidance.null())

    def guided(x: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
        both = Guidance.cat([guidance.null(), guidance])
        null, cond = denoiser(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return (1 - w) * null + w * cond

    return guided
