"""Guidance strategies: functions from Denoiser to Denoiser, so they compose and no network has a guidance method."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ldm_sg.errors import InputError, need_choice, need_within
from ldm_sg.guidance.signal import Guidance
from ldm_sg.objective import Objective

Denoiser = Callable[[Tensor, Tensor, Guidance], Tensor]
"""(x_t [B, C, h, w], t [B], guidance of B samples) -> prediction [B, C, h, w] (eps, v, x0 or flow velocity)."""

Strategy = Callable[[Denoiser, float, Objective], Denoiser]
"""(denoiser, w, what it predicts) -> the guided denoiser of one trajectory. w = 1 (conditional) and w = 0 (unconditional) cost
one evaluation under every strategy, and every other w costs two."""


def _guided(denoiser: Denoiser, w: float, combine: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Denoiser:
    """combine(null, cond, x, t) of the two predictions, which come from one batched pass."""
    if w == 1:
        return denoiser
    if w == 0:
        return lambda x, t, guidance: denoiser(x, t, guidance.null())

    def guided(x: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
        both = Guidance.cat([guidance.null(), guidance])
        null, cond = (
            denoiser(torch.cat([x, x]), torch.cat([t, t]), both).float().chunk(2)
        )  # bf16 would round what is combined
        return combine(null, cond, x, t)

    return guided


def cfg(denoiser: Denoiser, w: float, objective: Objective | None = None, rescale: float = 0.0) -> Denoiser:
    """Classifier-free guidance, Eq. 4 of the paper: (1 - w) eps_null + w eps_cond. It is affine in the prediction with weights
    that sum to one, so it holds for eps, v, x0 and flow alike. `rescale` phi brings each image's std back towards the
    conditional prediction's (Lin et al., 2023, Eqs. 15 and 16)."""

    def combine(null: Tensor, cond: Tensor, x: Tensor, t: Tensor) -> Tensor:
        guided = (1 - w) * null + w * cond
        if not rescale:
            return guided
        return guided * (1 - rescale + rescale * _std(cond) / _std(guided))

    return _guided(denoiser, w, combine)


def _std(prediction: Tensor) -> Tensor:
    return prediction.std(dim=(1, 2, 3), keepdim=True)


def cfg_zero(denoiser: Denoiser, w: float, objective: Objective) -> Denoiser:
    """CFG-Zero* (Fan et al., 2025): the null prediction is first scaled by its projection s* on the conditional one; a flow
    stands still at its first time, where a velocity is least to be trusted."""

    def combine(null: Tensor, cond: Tensor, x: Tensor, t: Tensor) -> Tensor:
        if objective.kind == "flow" and t[0] >= objective.last:
            return torch.zeros_like(cond)
        return (1 - w) * _along(cond, null) + w * cond

    return _guided(denoiser, w, combine)


def apg(denoiser: Denoiser, w: float, objective: Objective, eta: float = 0.0, momentum: float = -0.5) -> Denoiser:
    """Adaptive projected guidance (Sadat et al., 2024, Algorithm 1, without its limit on the norm): of the difference of the two
    clean latents, with a negative running mean, only `eta` of what is parallel to the conditional one is kept: less
    saturation."""
    running: list[Tensor] = []

    def combine(null: Tensor, cond: Tensor, x: Tensor, t: Tensor) -> Tensor:
        null, cond = (objective.x0(prediction, x, t) for prediction in (null, cond))
        change = cond - null + (momentum * running.pop() if running else 0)
        running.append(change)
        parallel = _along(change, cond)
        return objective.prediction(cond + (w - 1) * (change - (1 - eta) * parallel), x, t)

    return _guided(denoiser, w, combine)


def _along(a: Tensor, b: Tensor) -> Tensor:
    """The part of each a [B, ...] that is parallel to b."""
    share = (a * b).flatten(1).sum(1) / b.square().flatten(1).sum(1).clamp(min=1e-12)
    return share.view(-1, 1, 1, 1) * b


def interval(strategy: Strategy, low: float, high: float) -> Strategy:
    """`strategy` where the noise level sigma_t (of x_t = alpha_t x_0 + sigma_t eps) is in [low, high], w = 1 elsewhere
    (Kynkaanniemi et al., 2024)."""

    def limited(denoiser: Denoiser, w: float, objective: Objective) -> Denoiser:
        inside = strategy(denoiser, w, objective)

        def guided(x: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
            level = objective.alpha_sigma(t[:1])[1].item()
            return (inside if low <= level <= high else denoiser)(x, t, guidance)

        return guided

    return limited


STRATEGIES: dict[str, Strategy] = {"cfg": cfg, "cfg_zero": cfg_zero, "apg": apg}


def make_strategy(name: str = "cfg", rescale: float = 0.0, within: tuple[float, float] | None = None) -> Strategy:
    """What flags ask for; InputError for what there is not."""
    need_choice("strategy", name, STRATEGIES)
    need_within("rescale", rescale, 0, 1)
    if rescale and name != "cfg":
        raise InputError(f"rescale={rescale} belongs to strategy cfg, not {name}")
    strategy = partial(cfg, rescale=rescale) if rescale else STRATEGIES[name]
    if within is None:
        return strategy
    if len(within) != 2 or not 0 <= within[0] < within[1] <= 1:
        raise InputError(f"interval={','.join(map(str, within))}: two rising noise levels between 0 and 1")
    return interval(strategy, *within)
