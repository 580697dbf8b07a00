"""The terms of self-guidance on shapes whose answers are known."""

import pytest
import torch

from ldm_sg.guidance import selfguide as sg


def disc(x: float, y: float, r: float, n: int = 64, soft: float = 0.02) -> torch.Tensor:
    at = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    far = ((at[None] - x) ** 2 + (at[:, None] - y) ** 2).sqrt()
    return torch.sigmoid((r - far) / soft)


def test_centroid_and_size_of_discs() -> None:
    maps = torch.stack([disc(0.3, 0.6, 0.1), disc(0.5, 0.5, 0.2), disc(0.7, 0.25, 0.15)])
    assert torch.allclose(
        sg.centroid(maps), torch.tensor([[0.3, 0.6], [0.5, 0.5], [0.7, 0.25]], dtype=torch.float64), atol=2e-3
    )
    assert torch.allclose(sg.size(maps), torch.pi * torch.tensor([0.1, 0.2, 0.15]).double() ** 2, rtol=0.08)


def test_energies_are_zero_at_their_own_target_and_positive_elsewhere() -> None:
    a, b = disc(0.3, 0.6, 0.1), disc(0.6, 0.6, 0.2)
    for energy, measure in (
        (sg.centroid_energy, sg.centroid), (sg.size_energy, sg.size), (sg.shape_energy, sg.soft),
    ):  # fmt: skip
        assert energy(a, measure(a)).abs() < 1e-12
        assert energy(a, measure(b)) > 1e-3


@pytest.mark.parametrize("scale", [1e-4, 7.0, 1e6])
def test_the_scale_of_a_map_does_not_matter(scale: float) -> None:
    a = disc(0.3, 0.6, 0.1)
    for measure in (sg.centroid, sg.size, sg.soft, sg.hard):
        assert torch.allclose(measure(a * scale), measure(a), atol=1e-9)


def test_mirrored_targets_give_mirrored_losses() -> None:
    a, target = disc(0.35, 0.6, 0.1), torch.tensor([0.5, 0.4], dtype=torch.float64)
    mirrored = torch.tensor([0.5, 0.4], dtype=torch.float64)
    mirrored[0] = 1 - target[0]
    assert torch.allclose(sg.centroid_energy(a, target), sg.centroid_energy(a.flip(-1), mirrored))
    assert torch.allclose(
        sg.shape_energy(a, disc(0.5, 0.4, 0.2)), sg.shape_energy(a.flip(-1), disc(0.5, 0.4, 0.2).flip(-1))
    )


@pytest.mark.parametrize("name", ["centroid", "size", "shape", "look"])
def test_gradients_by_gradcheck(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    a = torch.rand(2, 6, 5, dtype=torch.float64, generator=generator)
    psi = torch.randn(2, 3, 6, 5, dtype=torch.float64, generator=generator)
    one = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    if name == "look":
        assert torch.autograd.gradcheck(lambda p: sg.look(a, p), psi.requires_grad_())
        grad = torch.autograd.grad(sg.look(a.requires_grad_(), psi).sum(), a, allow_unused=True)
        assert grad[0] is None  # attention is detached
        return
    energy, target = {
        "centroid": (sg.centroid_energy, one(2, 2)), "size": (sg.size_energy, one(2)), "shape": (sg.shape_energy, one(2, 6, 5)),
    }[name]  # fmt: skip
    assert torch.autograd.gradcheck(lambda m: energy(m, target), a.requires_grad_())


def test_transformed_maps_are_where_they_should_be() -> None:
    a = torch.stack([disc(0.4, 0.5, 0.1), disc(0.3, 0.35, 0.1)])
    moved = sg.transformed(a, (0.2, -0.1))
    assert torch.allclose(sg.centroid(moved), sg.centroid(a) + torch.tensor([0.2, -0.1]).double(), atol=5e-3)
    grown = sg.transformed(a, scale=1.5)
    assert torch.allclose(sg.centroid(grown), sg.centroid(a), atol=5e-3)
    assert torch.allclose(sg.size(grown) / sg.size(a), torch.tensor(2.25).double(), rtol=0.05)
    assert torch.allclose(sg.transformed(a), a, atol=1e-6)


def test_a_map_without_anything_has_no_nan() -> None:
    flat = torch.zeros(2, 8, 8, requires_grad=True)
    psi = torch.ones(2, 3, 8, 8)
    for value in (sg.centroid(flat), sg.size(flat), sg.look(flat, psi)):
        assert value.isfinite().all()
