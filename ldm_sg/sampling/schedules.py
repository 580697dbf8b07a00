"""The training noise schedule: a config's words -> the diffusers scheduler that pipeline/scheduler holds -> the Objective."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from ldm_sg.errors import InputError
from ldm_sg.guidance.compose import Denoiser
from ldm_sg.guidance.signal import Guidance
from ldm_sg.objective import Objective

if TYPE_CHECKING:
    from ldm_sg.config import ObjectiveConfig

PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def noise_scheduler(config: "ObjectiveConfig") -> SchedulerMixin:
    """The training schedule as a diffusers scheduler. `config` is one that `check` has passed."""
    if config.kind == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=config.timesteps, shift=config.shift)
    scheduler = DDPMScheduler(
        num_train_timesteps=config.timesteps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=config.schedule,
        prediction_type=PREDICTION[config.kind],
        rescale_betas_zero_snr=config.zero_snr,  # Lin et al., 2023, Algorithm 1
        clip_sample=False,  # latents are never clipped
    )
    return scheduler if config.shift == 1 else _shifted(scheduler, config.shift)


def _shifted(scheduler: DDPMScheduler, shift: float) -> DDPMScheduler:
    """The same with sigma / alpha `shift` times as large at every time (Hoogeboom et al., 2023, Eq. 4)."""
    signal = scheduler.alphas_cumprod.double().numpy()
    signal = signal / (signal + shift**2 * (1 - signal))
    betas = 1 - signal / np.concatenate([[1.0], signal[:-1]])
    return DDPMScheduler.from_config(scheduler.config, trained_betas=betas.tolist(), rescale_betas_zero_snr=False)


def objective_of(scheduler: SchedulerMixin, min_snr: float | None = None) -> Objective:
    """The Objective that a training schedule stands for."""
    if not hasattr(scheduler, "alphas_cumprod"):
        return Objective("flow", torch.zeros(scheduler.config.num_train_timesteps), shift=scheduler.config.shift)
    kind = {v: k for k, v in PREDICTION.items()}[scheduler.config.prediction_type]
    signal = scheduler.alphas_cumprod.double()
    return Objective(kind, torch.atan2((1 - signal).sqrt(), signal.sqrt()).float(), min_snr)


def check_fits(other: SchedulerMixin, own: SchedulerMixin) -> None:
    """InputError where `other` does not step along the schedule, or by the kind of prediction, that was learnt with `own`."""
    flows = "FlowMatch" in type(other).__name__ or other.config.get("use_flow_sigmas", False)
    if hasattr(own, "alphas_cumprod"):
        same = own.config.prediction_type == other.config.get("prediction_type")
        mine, theirs = (getattr(each, "alphas_cumprod", torch.empty(0)).float().cpu() for each in (own, other))
        fits = not flows and same and mine.shape == theirs.shape and torch.allclose(theirs, mine, atol=1e-3)
    else:
        fits = flows
    if not fits:
        kind = own.config.get("prediction_type")
        way = "FlowMatchHeunDiscreteScheduler, or UniPCMultistepScheduler with use_flow_sigmas=True, prediction_type='flow_prediction'"
        raise InputError(
            f"pipe.scheduler is a {type(other).__name__} of another noise schedule or prediction than the run's {type(own).__name__} "
            f"({kind or 'flow'}): by .from_config(pipe.scheduler.config) make a {'DDIMScheduler or UniPCMultistepScheduler' if kind else way}"
        )


def within(denoiser: Denoiser, objective: Objective, bounds: tuple[Tensor, Tensor] | None) -> Denoiser:
    """`denoiser` with the clean latents that it implies clipped to `bounds`, as `solvers.solve` clips them."""
    if bounds is None:
        return denoiser

    def clipped(x: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
        x0 = objective.x0(denoiser(x, t, guidance).to(x.dtype), x, t)
        return objective.prediction(x0.clamp(*bounds), x, t)

    return clipped


def drive(
    scheduler: SchedulerMixin,
    denoiser: Denoiser,
    noise: Tensor,
    guidance: Guidance,
    steps: int,
    generator: torch.Generator | list[torch.Generator] | None,
    each: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """Unit noise [B, C, h, w] -> clean latents by diffusers' own stepping; `each` as in `solvers.solve`."""
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        prediction = denoiser(seen, t.expand(len(x)), guidance)
        x = each(i, t, scheduler.step(prediction.to(x.dtype), t, x, **random).prev_sample)
    return x
