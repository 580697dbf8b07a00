"""Solvers of the probability-flow ODE, and ddpm of the SDE: each a step from one time of a grid to the next, in terms of the clean
latent that the network implies, so that one set serves eps, v, x0 and flow under every schedule, for any number of steps.

diffusers' schedulers tie a solver to its own grids: DDIM's step is right only for divisors of 1000, DPM-Solver++ and UniPC end in
one jump under many schedules, and the flow variants use other grids. Tests hold ours to theirs where those are right."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm_sg.errors import InputError, need_choice, need_within
from ldm_sg.guidance.compose import Denoiser
from ldm_sg.guidance.signal import Guidance
from ldm_sg.objective import Objective

# sigma / alpha between which log_snr lies (EDM's are 80 and 0.002), as far as the schedule goes
NOISIEST, CLEANEST = 80.0, 0.005
TINY = 1e-30  # instead of alpha = 0 at pure noise


@dataclass(frozen=True)
class Grid:
    """The times at which the network is asked [N], and alpha and sigma [N + 1] there and at the end."""

    times: Tensor
    alpha: list[float]
    sigma: list[float]

    def log_snr(self, i: int) -> float:
        """log(alpha / sigma), half the logarithm of the signal-to-noise ratio."""
        return math.log(max(self.alpha[i], TINY) / self.sigma[i])


def _log_snr(objective: Objective, steps: int) -> Tensor:
    """Evenly in log(alpha / sigma) (Lu et al., 2022)."""
    ends = objective.time_of(torch.tensor([NOISIEST, CLEANEST], dtype=torch.float64))
    alpha, sigma = (part.flatten() for part in objective.alpha_sigma(ends))
    first, last = (sigma / alpha).double().log().tolist()
    times = objective.time_of(torch.linspace(first, last, steps, dtype=torch.float64).exp())
    if objective.kind != "eps":  # whose error sigma / alpha multiplies
        times[0] = objective.last
    return times


def _trailing(objective: Objective, steps: int) -> Tensor:
    """Evenly in time from the noisiest on (Lin et al., 2023)."""
    return objective.last - torch.arange(steps, dtype=torch.float64) * len(objective.angles) / steps


def _uniform(objective: Objective, steps: int) -> Tensor:
    """The paper's public code: 0, c, 2c ... + 1 for c = T // steps, so that 256 steps of 1000 are 334."""
    times = torch.arange(0, len(objective.angles), len(objective.angles) // steps, dtype=torch.float64) + 1
    return times.clamp(max=objective.last).unique().flip(0)  # 1000 there, an index too far, where c divides 999


SPACINGS = {"log_snr": _log_snr, "trailing": _trailing, "uniform": _uniform}


def make_grid(objective: Objective, steps: int, spacing: str = "log_snr") -> Grid:
    """`steps` evaluations (more with `uniform`) that end without noise, but with `uniform` at index 0, as the paper's code does."""
    need_within("steps", steps, 1)
    if steps > len(objective.angles):
        raise InputError(f"steps={steps}: the run has {len(objective.angles)} noise levels")
    need_choice("spacing", spacing, SPACINGS)
    objective = objective.to(torch.device("cpu"))
    times = SPACINGS[spacing](objective, steps)
    alpha, sigma = (part.flatten().tolist() for part in objective.alpha_sigma(times))
    end = [part.item() for part in objective.alpha_sigma(torch.zeros(1))] if spacing == "uniform" else [1.0, 0.0]
    return Grid(times.float(), [*alpha, end[0]], [*sigma, end[1]])


Past = list[tuple[Tensor, Tensor]]  # x (as the solver left it) and x0 of the steps before, newest last
Step = Callable[[Grid, int, Tensor, Tensor, Past], tuple[Tensor, Tensor]]  # ..., i, x, x0 -> x corrected, x at i + 1


def ddim(grid: Grid, i: int, x: Tensor, x0: Tensor, past: Past) -> tuple[Tensor, Tensor]:
    """Song et al., 2021, Eq. 12 without noise; Euler's step in sigma / alpha, and flow's."""
    return x, x0 * grid.alpha[i + 1] + (x - x0 * grid.alpha[i]) * (grid.sigma[i + 1] / grid.sigma[i])


def noisy_ddim(eta: float, draw: Callable[[], Tensor]) -> Step:
    """The same with fresh noise from `draw`: eta = 1 is the ancestral sampler of DDPM."""

    def step(grid: Grid, i: int, x: Tensor, x0: Tensor, past: Past) -> tuple[Tensor, Tensor]:
        (alpha, sigma), following = (grid.alpha[i], grid.sigma[i]), (grid.alpha[i + 1], grid.sigma[i + 1])
        shrunk = following[1] * alpha / (following[0] * sigma)  # sigma / alpha there, over that here
        fresh = eta * following[1] * math.sqrt(1 - shrunk**2)
        kept = math.sqrt(following[1] ** 2 - fresh**2)
        return x, x0 * following[0] + (x - x0 * alpha) * (kept / sigma) + fresh * draw()

    return step


def dpmpp_2m(grid: Grid, i: int, x: Tensor, x0: Tensor, past: Past) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M) (Lu et al., 2022, Algorithm 2)."""
    if not past or grid.sigma[i + 1] == 0:
        return ddim(grid, i, x, x0, past)
    h = grid.log_snr(i + 1) - grid.log_snr(i)
    r = (grid.log_snr(i) - grid.log_snr(i - 1)) / h
    towards = x0 + (x0 - past[-1][1]) / (2 * r)
    return x, x * (grid.sigma[i + 1] / grid.sigma[i]) - towards * (grid.alpha[i + 1] * math.expm1(-h))


def unipc(grid: Grid, i: int, x: Tensor, x0: Tensor, past: Past) -> tuple[Tensor, Tensor]:
    """UniPC-2, B_2 (Zhao et al., 2023, Algorithms 5 and 7): x is first corrected with what the network says of it; the predictor
    of second order is DPM-Solver++(2M)'s."""
    if past:
        (before, then), h = past[-1], grid.log_snr(i) - grid.log_snr(i - 1)
        change = 0.5 * (x0 - then)
        if len(past) > 1:
            r, scale = (grid.log_snr(i - 2) - grid.log_snr(i - 1)) / h, math.expm1(-h)
            b1 = (scale / -h - 1) / scale  # what the weights of the two differences and their first moments add up to
            b2 = 2 * ((scale / -h - 1) / -h - 0.5) / scale
            weight = (b2 - b1) / (r - 1)  # of the older difference
            change = weight / r * (past[-2][1] - then) + (b1 - weight) * (x0 - then)
        x = before * (grid.sigma[i] / grid.sigma[i - 1]) - (then + change) * (grid.alpha[i] * math.expm1(-h))
    return x, dpmpp_2m(grid, i, x, x0, past)[1]


SOLVERS: dict[str, Step | None] = {"ddim": ddim, "ddpm": None, "euler": ddim, "dpmpp_2m": dpmpp_2m, "unipc": unipc}


def make_step(name: str, eta: float = 0.0, draw: Callable[[], Tensor] | None = None) -> Step:
    """A solver by its name; eta > 0 (ddim only, ddpm's is 1) takes noise from `draw`."""
    need_choice("scheduler", name, SOLVERS)
    if eta and name != "ddim":
        raise InputError(f"eta={eta} belongs to scheduler ddim, not {name}")
    step = SOLVERS[name] if not eta else None
    if step is not None:
        return step
    return noisy_ddim(eta or 1.0, draw or (lambda: torch.zeros(())))


def solve(
    denoiser: Denoiser,
    noise: Tensor,
    guidance: Guidance,
    objective: Objective,
    grid: Grid,
    step: Step = dpmpp_2m,
    bounds: tuple[Tensor, Tensor] | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
    each: Callable[[int, Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Unit noise [B, C, h, w] -> clean latents [B, C, h, w]. `bounds`: what every x0 is clipped to, for pixel space only;
    `watch(i, x0)` sees each step's; `each(i, time, x)` what it came to, and may exchange it."""
    x, past = noise, []
    for i, t in enumerate(grid.times.to(x.device)):
        times = t.expand(len(x))
        x0 = objective.x0(denoiser(x, times, guidance).to(x.dtype), x, times)
        if bounds is not None:
            x0 = x0.clamp(*bounds)
        if watch is not None:
            watch(i, x0)
        corrected, following = step(grid, i, x, x0, past)
        past, x = [*past[-1:], (corrected, x0)], following if each is None else each(i, t, following)
    return x
