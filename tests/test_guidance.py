"""Guidance against a mixture whose optimal denoiser is known in closed form: no training, no network."""

import pytest
import torch
from diffusers import DDPMScheduler

from ldm_sg.config import ObjectiveConfig
from ldm_sg.guidance.compose import cfg
from ldm_sg.guidance.signal import Guidance
from ldm_sg.objective import Objective
from ldm_sg.pipeline import (
    FLOW_SOLVERS,
    SOLVERS,
    image_generator,
    make_solver,
    noise_scheduler,
    objective_of,
    slerp,
    solve,
)

MEANS = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # three clusters, equally likely
STD = 0.3


def exact_eps(objective: Objective):
    """E[eps | x_t, k] of the mixture; with the null, of all of it."""

    def denoise(x, t, guidance):
        alpha, sigma = (part.view(-1, 1, 1) for part in objective.alpha_sigma(t.round().long()))
        flat = x.flatten(1)[:, None]  # [B, 1, 2]
        var = alpha**2 * STD**2 + sigma**2  # [B, 1, 1]
        log_p = -((flat - alpha * MEANS) ** 2).sum(-1) / (2 * var[..., 0])  # [B, 3]
        one_hot = torch.nn.functional.one_hot(guidance.k, 3).bool()
        log_p = log_p.masked_fill(guidance.keep[:, None] & ~one_hot, -torch.inf)
        score = (log_p.softmax(-1)[..., None] * (alpha * MEANS - flat) / var).sum(1)  # [B, 2]
        return (-sigma[:, :, 0] * score).view_as(x)

    return denoise


def draw(w: float, k: int, scheduler: str, steps: int, n: int = 200) -> torch.Tensor:
    base = noise_scheduler(ObjectiveConfig())
    objective = objective_of(base)
    solver = make_solver(scheduler, base, steps, torch.device("cpu"))
    noise = torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    extra = {"generator": torch.Generator().manual_seed(1)} if scheduler == "ddpm" else {}
    guidance = Guidance.from_k(torch.full((n,), k))
    return solve(cfg(exact_eps(objective), w), noise, guidance, solver, objective, extra).flatten(1)


def nearest(x: torch.Tensor) -> torch.Tensor:
    return torch.cdist(x, MEANS).argmin(1)


@pytest.mark.parametrize("scheduler", sorted(SOLVERS))
def test_w1_lands_in_its_cluster(scheduler: str) -> None:
    x = draw(1.0, 2, scheduler, 250 if scheduler == "ddpm" else 40)
    assert (nearest(x) == 2).all()
    assert torch.allclose(x.mean(0), MEANS[2], atol=0.15)
    assert abs(x.std(0).mean() - STD) < 0.12


def test_w0_ignores_the_signal_and_covers_the_mixture() -> None:
    x = draw(0.0, 2, "ddim", 50, n=600)
    shares = torch.bincount(nearest(x), minlength=3) / 600
    assert (shares - 1 / 3).abs().max() < 0.08
    assert torch.equal(x, draw(0.0, 0, "ddim", 50, n=600))


def test_stronger_guidance_pushes_away_from_the_other_clusters() -> None:
    heights = [draw(w, 2, "ddim", 50)[:, 1].mean().item() for w in (1.0, 2.0, 3.0)]
    assert heights[0] < heights[1] < heights[2]


def test_cfg_costs_one_pass_at_0_and_1_and_is_affine() -> None:
    calls = []

    def denoiser(x, t, guidance):
        calls.append(len(x))
        return torch.where(guidance.keep[:, None, None, None], 3.0, 1.0).expand_as(x)

    x, t, guidance = torch.zeros(4, 1, 2, 2), torch.zeros(4), Guidance.from_k(torch.arange(4))
    values = [cfg(denoiser, w)(x, t, guidance)[0, 0, 0, 0].item() for w in (0.0, 1.0, 2.0)]
    assert values == [1.0, 3.0, 5.0]
    assert calls == [4, 4, 8]


def test_guidance_is_indexable_and_drops_all_parts_together() -> None:
    full = Guidance(keep=torch.ones(3, dtype=torch.bool), k=torch.arange(3), spatial=torch.ones(3, 2, 4, 4))
    part = full[1:].with_keep(torch.tensor([False, True]))
    assert part.k.tolist() == [1, 2] and part.spatial.shape == (2, 2, 4, 4) and part.feature is None
    assert part.keep.tolist() == [False, True]
    assert not full.null().keep.any() and full.keep.all()
    assert Guidance.cat([full, part]).k.tolist() == [0, 1, 2, 1, 2]


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_objective_recovers_x0_from_its_own_target(kind: str) -> None:
    objective = objective_of(noise_scheduler(ObjectiveConfig(kind=kind)))
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 6, 3, 4, 4, generator=generator)
    t = objective.sample_t(6, generator)
    x_t, target = objective.add_noise(x0, noise, t), objective.target(x0, noise, t)
    assert torch.allclose(objective.x0(target, x_t, t), x0, atol=1e-3)
    assert objective.loss(target, x0, noise, t).abs().max() == 0
    assert objective.loss(target + 1, x0, noise, t).shape == (6,)


def test_noise_and_velocity_equal_diffusers() -> None:
    base = noise_scheduler(ObjectiveConfig(kind="v", schedule="scaled_linear", beta_start=0.0015, beta_end=0.0155))
    assert isinstance(base, DDPMScheduler)
    objective = objective_of(base)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=generator)
    t = torch.tensor([0, 1, 400, 998, 999])
    assert torch.allclose(objective.add_noise(x0, noise, t), base.add_noise(x0, noise, t), atol=1e-6)
    assert torch.allclose(objective.target(x0, noise, t), base.get_velocity(x0, noise, t), atol=1e-6)


def test_schedule_is_monotone_and_min_snr_only_lowers_weights() -> None:
    objective = objective_of(noise_scheduler(ObjectiveConfig()), min_snr=5.0)
    assert (objective.alphas_cumprod.diff() < 0).all()
    weights = objective.weight(torch.arange(1000))
    assert (weights <= 1 + 1e-6).all() and weights[0] < 0.01 and weights[-1] == pytest.approx(1)


@pytest.mark.parametrize("scheduler", sorted(FLOW_SOLVERS))
def test_flow_solvers_follow_the_exact_velocity_of_a_point(scheduler: str) -> None:
    base = noise_scheduler(ObjectiveConfig(kind="flow"))
    objective, target = objective_of(base), torch.tensor([1.5, -2.0]).view(1, 2, 1, 1)
    solver = make_solver(scheduler, base, 30, torch.device("cpu"))
    denoiser = lambda x, t, guidance: (x - target) / (t / 1000).view(-1, 1, 1, 1)  # noqa: E731
    noise = torch.randn(8, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    x = solve(denoiser, noise, Guidance.from_k(torch.zeros(8, dtype=torch.long)), solver, objective, {})
    assert torch.allclose(x, target.expand_as(x), atol=0.05)


def test_image_randomness_depends_on_seed_and_index_only() -> None:
    first = torch.randn(3, generator=image_generator(0, 5))
    assert torch.equal(first, torch.randn(3, generator=image_generator(0, 5)))
    for other in (image_generator(0, 6), image_generator(1, 5), image_generator(0, 5, "signal")):
        assert not torch.equal(first, torch.randn(3, generator=other))


def test_slerp_keeps_the_norm() -> None:
    a, b = torch.eye(2)
    for share in (0.0, 0.3, 1.0):
        x, y = slerp(a, b, share)
        assert x**2 + y**2 == pytest.approx(1)
    assert slerp(a, b, 0.0) == pytest.approx((1, 0)) and slerp(a, a, 0.25) == (0.75, 0.25)
