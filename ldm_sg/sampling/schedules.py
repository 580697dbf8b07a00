"""The training noise schedule: a config's words -> the diffusers scheduler that pipeline/scheduler holds -> the Objective."""

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin

from ldm_sg.config import ObjectiveConfig
from ldm_sg.objective import Objective

PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def noise_scheduler(config: ObjectiveConfig) -> SchedulerMixin:
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
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return Objective("flow", torch.zeros(scheduler.config.num_train_timesteps), shift=scheduler.config.shift)
    kind = {v: k for k, v in PREDICTION.items()}[scheduler.config.prediction_type]
    signal = scheduler.alphas_cumprod.double()
    return Objective(kind, torch.atan2((1 - signal).sqrt(), signal.sqrt()).float(), min_snr)
