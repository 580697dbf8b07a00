"""Solvers with the exact denoiser of a Gaussian N(0.5, s^2): the ODE maps unit noise to exactly that, so what comes out is known."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from ldm_sg.config import ObjectiveConfig
from ldm_sg.errors import InputError
from ldm_sg.guidance.signal import Guidance
from ldm_sg.objective import Objective
from ldm_sg.sampling.schedules import noise_scheduler, objective_of
from ldm_sg.sampling.solvers import SOLVERS, SPACINGS, Grid, make_grid, make_step, solve

MEAN = 0.5
SCHEDULES = {  # all that a config under configs/ uses, and the shifted and rescaled ones
    "church": ObjectiveConfig(schedule="scaled_linear", beta_start=0.0015, beta_end=0.0155),
    "linear": ObjectiveConfig(),
    "scaled": ObjectiveConfig(schedule="scaled_linear"),
    "cosine": ObjectiveConfig(kind="v", schedule="squaredcos_cap_v2"),
    "zero_snr": ObjectiveConfig(kind="v", schedule="scaled_linear", zero_snr=True),
    "shifted": ObjectiveConfig(kind="v", schedule="squaredcos_cap_v2", shift=2.0),
    "flow": ObjectiveConfig(kind="flow"),
}
# Largest error of the std, as a share of it, after N evaluations; beyond what the last noise level itself takes away.
TOLERANCE = {
    "ddim": {10: 0.26, 25: 0.11, 50: 0.055, 250: 0.012, 256: 0.012, 400: 0.008},
    "euler": {10: 0.26, 25: 0.11, 50: 0.055, 250: 0.012, 256: 0.012, 400: 0.008},
    "dpmpp_2m": {10: 0.06, 25: 0.015, 50: 0.005, 250: 0.001, 256: 0.001, 400: 0.001},
    "unipc": {10: 0.08, 25: 0.01, 50: 0.003, 250: 0.001, 256: 0.001, 400: 0.001},
}


def gaussian(objective: Objective, s: float):
    def denoise(x, t, guidance):
        alpha, sigma = objective.alpha_sigma(t)
        x0 = MEAN + s**2 * alpha / (s**2 * alpha**2 + sigma**2) * (x - alpha * MEAN)
        return objective.prediction(x0, x, t)

    return denoise


def end(objective: Objective, grid: Grid, solver: str, s: float, n: int = 2) -> torch.Tensor:
    """What n noises become; the ODE's solvers are affine, so two noises, 0 and 1, tell mean and std exactly."""
    generator = torch.Generator().manual_seed(0)
    fresh = lambda: torch.randn(n, 1, 1, 1, generator=generator).double()  # noqa: E731
    noise = torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1, 1) if n == 2 else fresh()
    guidance = Guidance.from_k(torch.zeros(n, dtype=torch.long))
    return solve(gaussian(objective, s), noise, guidance, objective, grid, make_step(solver, 0.0, fresh)).flatten()


def floor(grid: Grid, s: float) -> float:
    """Share of s that is left when the last evaluation, at grid.sigma[-2], jumps to the posterior mean."""
    return 1 / math.sqrt(1 + (grid.sigma[-2] / (grid.alpha[-2] * s)) ** 2)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("solver", sorted(TOLERANCE))
def test_std_and_mean_are_the_gaussians(schedule: str, solver: str) -> None:
    objective = objective_of(noise_scheduler(SCHEDULES[schedule]))
    for steps, allowed in TOLERANCE[solver].items():
        grid = make_grid(objective, steps)
        assert len(grid.times) == steps
        for s in (0.3, 0.1, 0.03):
            low, high = end(objective, grid, solver, s).tolist()
            assert abs((high - low) / s - floor(grid, s)) < allowed, (steps, s, (high - low) / s, floor(grid, s))
            assert abs(low - MEAN) < 0.02 * s + 0.25 * s * grid.alpha[0] * MEAN + s * allowed, (steps, s, low)


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_the_last_noise_level_takes_little_of_fine_texture(schedule: str) -> None:
    """The floor itself: 25 steps keep at least 92% of s = 0.1 (trailing spacing kept 36% under the churches schedule)."""
    objective = objective_of(noise_scheduler(SCHEDULES[schedule]))
    assert floor(make_grid(objective, 25), 0.1) > 0.92
    if schedule == "church":
        assert floor(make_grid(objective, 25, "trailing"), 0.1) < 0.4


@pytest.mark.parametrize("schedule", ["church", "cosine", "flow"])
def test_ddpm_draws_the_gaussian(schedule: str) -> None:
    objective = objective_of(noise_scheduler(SCHEDULES[schedule]))
    for steps, allowed in ((25, 0.2), (250, 0.05)):
        grid = make_grid(objective, steps)
        x = end(objective, grid, "ddpm", 0.3, n=4000)
        assert abs(x.std().item() / 0.3 - floor(grid, 0.3)) < allowed and abs(x.mean().item() - MEAN) < 0.02


def test_ddim_steps_to_the_next_time_that_it_evaluates() -> None:
    """With trailing spacing too, for numbers that do not divide 1000: more steps never do worse."""
    objective = objective_of(noise_scheduler(SCHEDULES["linear"]))
    errors = [
        abs(end(objective, make_grid(objective, n, "trailing"), "ddim", 0.3).diff().item() - 0.3)
        for n in (200, 256, 400, 600)
    ]
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.006


def test_two_steps_of_flow_are_better_than_one() -> None:
    objective = objective_of(noise_scheduler(SCHEDULES["flow"]))
    one, two, four = (
        abs(end(objective, make_grid(objective, n, "trailing"), "euler", 0.3).diff().item() - 0.3) for n in (1, 2, 4)
    )
    assert four < two < 0.8 * one


def test_uniform_spacing_is_the_papers() -> None:
    objective = objective_of(noise_scheduler(SCHEDULES["scaled"]))
    assert make_grid(objective, 250, "uniform").times.tolist() == [float(t) for t in range(997, 0, -4)]
    grid = make_grid(objective, 256, "uniform")
    assert len(grid.times) == 334 and grid.times[0] == 999 and grid.times[-1] == 1
    for steps in (600, 1000):  # one a level, no level twice
        times = make_grid(objective, steps, "uniform").times
        assert (times.diff() < 0).all() and times[0] == 999
    alpha_bar = noise_scheduler(SCHEDULES["scaled"]).alphas_cumprod[0].item()
    assert grid.alpha[-1] ** 2 == pytest.approx(alpha_bar, abs=1e-6) and grid.sigma[-1] > 0  # ends at alpha_bar[0]


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [("ddim", DDIMScheduler, {"set_alpha_to_one": True}),
     ("dpmpp_2m", DPMSolverMultistepScheduler, {"euler_at_final": True}),
     ("unipc", UniPCMultistepScheduler, {})],
)  # fmt: skip
def test_steps_equal_diffusers_where_its_grid_is_right(name: str, kind: type, options: dict) -> None:
    """50 trailing steps of 1000, which divide it; a denoiser that is not affine."""
    base = noise_scheduler(SCHEDULES["scaled"])
    objective, theirs = objective_of(base), kind.from_config(base.config, timestep_spacing="trailing", **options)
    theirs.set_timesteps(50)
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    net = lambda x, t, guidance=None: torch.tanh(2 * x) * (0.5 + t.view(-1, 1, 1, 1) / 2000)  # noqa: E731
    x = noise.clone()
    for t in theirs.timesteps:
        x = theirs.step(net(x, t.expand(2).float()), t, x, return_dict=False)[0]
    grid, guidance = make_grid(objective, 50, "trailing"), Guidance.from_k(torch.zeros(2, dtype=torch.long))
    assert grid.times.tolist() == [float(t) for t in theirs.timesteps]
    ours = solve(net, noise, guidance, objective, grid, make_step(name))
    assert torch.allclose(ours, x, atol=2e-3), (ours - x).abs().max()


def test_shift_multiplies_the_noise_and_zero_snr_ends_without_signal() -> None:
    plain, shifted = (objective_of(noise_scheduler(SCHEDULES[name])) for name in ("cosine", "shifted"))
    t = torch.tensor([10.0, 300.5, 900.0])
    (a, s), (b, r) = plain.alpha_sigma(t), shifted.alpha_sigma(t)
    assert torch.allclose(r / b, 2 * s / a, rtol=1e-3)
    assert objective_of(noise_scheduler(SCHEDULES["zero_snr"])).alpha_sigma(torch.tensor([999]))[0].abs() < 1e-6
    flow = objective_of(noise_scheduler(ObjectiveConfig(kind="flow", shift=3.0)))
    assert flow.sample_t(4000, torch.Generator().manual_seed(0)).median() / 1000 == pytest.approx(0.75, abs=0.02)


def test_x0_is_clipped_only_where_bounds_are_given() -> None:
    objective = objective_of(noise_scheduler(SCHEDULES["linear"]))
    seen: list[torch.Tensor] = []
    bounds = (torch.tensor(0.4).view(1, 1, 1), torch.tensor(0.6).view(1, 1, 1))
    noise, guidance = torch.full((1, 1, 1, 1), 3.0), Guidance.from_k(torch.zeros(1, dtype=torch.long))
    for limit, highest in ((None, 1.0), (bounds, 0.6)):
        seen.clear()
        solve(gaussian(objective, 0.3), noise, guidance, objective, make_grid(objective, 10), make_step("ddim"), limit,
              lambda i, x0: seen.append(x0))  # fmt: skip
        assert max(x.max().item() for x in seen) == pytest.approx(highest, abs=0.45 if limit is None else 1e-6)


def test_wrong_requests_are_told() -> None:
    objective = objective_of(noise_scheduler(SCHEDULES["linear"]))
    for arguments, message in (((0,), "at least 1"), ((1001,), "1000 noise levels"), ((10, "log"), "log_snr")):
        with pytest.raises(InputError, match=message):
            make_grid(objective, *arguments)
    assert set(SPACINGS) == {"log_snr", "trailing", "uniform"} and set(SOLVERS) == {*TOLERANCE, "ddpm"}
    with pytest.raises(InputError, match="belongs to scheduler ddim"):
        make_step("unipc", 0.5)
