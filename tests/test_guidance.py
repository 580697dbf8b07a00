"""Guidance against a mixture whose optimal denoiser is known in closed form: no training, no network."""

import pytest
import torch
from diffusers import DDPMScheduler

from ldm_sg.config import ObjectiveConfig
from ldm_sg.errors import InputError
from ldm_sg.guidance.compose import STRATEGIES, apg, cfg, cfg_zero, interval, make_strategy
from ldm_sg.guidance.signal import Guidance
from ldm_sg.objective import Objective
from ldm_sg.sampling.draw import image_generator, slerp
from ldm_sg.sampling.schedules import noise_scheduler, objective_of
from ldm_sg.sampling.solvers import SOLVERS, make_grid, make_step, solve

MEANS = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # three clusters, equally likely
STD = 0.3


def exact(objective: Objective):
    """The optimal prediction of the mixture's cluster k; with the null, of all of it."""

    def denoise(x, t, guidance):
        alpha, sigma = (part.view(-1, 1, 1) for part in objective.alpha_sigma(t))
        flat = x.flatten(1)[:, None]  # [B, 1, 2]
        var = alpha**2 * STD**2 + sigma**2  # [B, 1, 1]
        log_p = -((flat - alpha * MEANS) ** 2).sum(-1) / (2 * var[..., 0])  # [B, 3]
        one_hot = torch.nn.functional.one_hot(guidance.k, 3).bool()
        log_p = log_p.masked_fill(guidance.keep[:, None] & ~one_hot, -torch.inf)
        x0 = MEANS + STD**2 * alpha / var * (flat - alpha * MEANS)  # [B, 3, 2], of each cluster
        return objective.prediction((log_p.softmax(-1)[..., None] * x0).sum(1).view_as(x), x, t)

    return denoise


def draw(w: float, k: int, scheduler: str, steps: int, n: int = 200, strategy=cfg, kind: str = "eps") -> torch.Tensor:
    objective = objective_of(noise_scheduler(ObjectiveConfig(kind=kind)))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n, 2, 1, 1, generator=generator)
    step = make_step(scheduler, 0.0, lambda: torch.randn(n, 2, 1, 1, generator=generator))
    guidance = Guidance.from_k(torch.full((n,), k))
    denoiser = strategy(exact(objective), w, objective)
    return solve(denoiser, noise, guidance, objective, make_grid(objective, steps), step).flatten(1)


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
    assert (objective.angles.diff() > 0).all()
    weights = objective.weight(torch.arange(1000))
    assert (weights <= 1 + 1e-6).all() and weights[0] < 0.01 and weights[-1] == pytest.approx(1)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_every_strategy_is_the_denoiser_at_1_and_pushes_away_from_the_other_clusters(name: str, kind: str) -> None:
    strategy = STRATEGIES[name]
    plain, pushed = (draw(w, 2, "dpmpp_2m", 25, strategy=strategy, kind=kind) for w in (1.0, 2.0))
    assert torch.equal(plain, draw(1.0, 2, "dpmpp_2m", 25, kind=kind)) and (nearest(plain) == 2).all()
    assert (nearest(pushed) == 2).all()
    push = (pushed - plain)[:, 1].mean()  # along the mean itself, of which apg keeps nothing
    assert abs(push) < 0.003 if name == "apg" else push > 0.005


def test_strategies_by_their_equations() -> None:
    """On predictions that are known: null is one vector, cond another."""
    objective = objective_of(noise_scheduler(ObjectiveConfig(kind="x0")))  # the prediction is x0 itself
    null, cond = torch.tensor([2.0, 0, 0, 0]).view(1, 1, 2, 2), torch.tensor([1.0, 1, 0, 0]).view(1, 1, 2, 2)
    denoiser = lambda x, t, g: torch.where(g.keep[:, None, None, None], cond, null)  # noqa: E731
    x, t, guidance = torch.zeros(1, 1, 2, 2), torch.tensor([500.0]), Guidance.from_k(torch.zeros(1, dtype=torch.long))
    at = lambda strategy, w: strategy(denoiser, w, objective)(x, t, guidance).flatten().tolist()  # noqa: E731
    assert at(cfg, 3.0) == [-1.0, 3.0, 0, 0]
    assert at(cfg_zero, 3.0) == pytest.approx([1.0, 3.0, 0, 0])  # s* = <cond, null> / |null|^2 = 1/2
    assert at(apg, 3.0) == pytest.approx([-1.0, 3.0, 0, 0])  # cond - null is orthogonal to cond: nothing is taken off
    rescaled = make_strategy("cfg", rescale=1.0)(denoiser, 3.0, objective)(x, t, guidance)
    assert rescaled.std() == pytest.approx(cond.std().item())
    parallel = lambda x, t, g: torch.where(g.keep[:, None, None, None], 2 * null, null)  # noqa: E731
    assert torch.allclose(apg(parallel, 3.0, objective)(x, t, guidance), 2 * null)
    running = apg(denoiser, 2.0, objective, momentum=-0.5)
    first, second = (running(x, t, guidance) for _ in range(2))
    assert torch.allclose(second - cond, 0.5 * (first - cond))


def test_flow_stands_still_at_its_first_time_under_cfg_zero() -> None:
    objective = objective_of(noise_scheduler(ObjectiveConfig(kind="flow")))
    guided = cfg_zero(exact(objective), 2.0, objective)
    x, guidance = torch.randn(2, 2, 1, 1), Guidance.from_k(torch.tensor([0, 1]))
    assert (guided(x, torch.full((2,), 1000.0), guidance) == 0).all()
    assert (guided(x, torch.full((2,), 900.0), guidance) != 0).all()


def test_interval_is_w_1_outside_its_noise_levels() -> None:
    objective = objective_of(noise_scheduler(ObjectiveConfig()))
    limited, full, plain = (
        s(exact(objective), 2.0, objective) for s in (interval(cfg, 0.2, 0.8), cfg, lambda d, w, o: d)
    )
    x, guidance = torch.randn(2, 2, 1, 1), Guidance.from_k(torch.tensor([0, 1]))
    for t in (0.0, 100.0, 300.0, 600.0, 999.0):
        times = torch.full((2,), t)
        inside = 0.2 <= objective.alpha_sigma(times)[1][0].item() <= 0.8
        assert torch.equal(limited(x, times, guidance), (full if inside else plain)(x, times, guidance))


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"name": "apg", "rescale": 0.5}, "belongs to strategy cfg"), ({"rescale": 2.0}, "rescale=2.0: from 0 to 1"),
     ({"name": "apgg"}, "did you mean 'apg'"), ({"within": (0.8, 0.2)}, "rising"), ({"within": (0.2, 3.0)}, "rising")],
)  # fmt: skip
def test_wrong_strategies_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_strategy(**flags)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"kind": "flow", "min_snr": 5.0}, "no min-SNR"), ({"zero_snr": True}, "kind v or x0"), ({"shift": 0.0}, "above 0"),
     ({"kind": "epsilon"}, "objective.kind"), ({"schedule": "cosine"}, "squaredcos_cap_v2")],
)  # fmt: skip
def test_objectives_that_mean_nothing_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ObjectiveConfig(**wrong).check("objective.")


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
