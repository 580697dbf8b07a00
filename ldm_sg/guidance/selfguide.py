"""Self-guidance (Epstein et al., 2023): energies of attention maps and activations, each >= 0, and 0 at its own target.

Maps are [..., h, w], of any scale: an energy of c * A is that of A. Targets are constants; gradients go through the maps alone,
those of `look` through the activations alone. Energies are means, [...] one a map."""

import torch
from torch import Tensor
from torch.nn import functional as F

SHARPNESS = 10.0


def minmax(a: Tensor) -> Tensor:
    """Scaled to [0, 1]; all 0 where it is constant."""
    low, high = a.amin((-2, -1), keepdim=True), a.amax((-2, -1), keepdim=True)
    return (a - low) / (high - low).clamp(min=torch.finfo(a.dtype).tiny)


def soft(a: Tensor) -> Tensor:
    """S(A), the object as a soft mask."""
    return minmax(torch.sigmoid(SHARPNESS * (minmax(a) - 0.5)))


def hard(a: Tensor) -> Tensor:
    """H(A), the object as a mask of 0 and 1, without gradient."""
    return (minmax(a.detach()) > 0.5).to(a.dtype)


def centroid(a: Tensor) -> Tensor:
    """[..., 2]: x and y of the map's mass, as shares of the sides."""
    h, w = a.shape[-2:]
    x, y = ((torch.arange(n, device=a.device, dtype=a.dtype) + 0.5) / n for n in (w, h))
    mass = a.sum((-2, -1)).clamp(min=torch.finfo(a.dtype).tiny)
    return torch.stack([(a.sum(-2) * x).sum(-1) / mass, (a.sum(-1) * y).sum(-1) / mass], -1)


def size(a: Tensor) -> Tensor:
    """[...]: share of the image that the object covers."""
    return soft(a).mean((-2, -1))


def look(a: Tensor, psi: Tensor) -> Tensor:
    """Activations psi [..., C, h', w'] averaged over the object: [..., C]."""
    mask = hard(resized(a, (psi.shape[-2], psi.shape[-1]))).unsqueeze(-3)
    return (mask * psi).sum((-2, -1)) / mask.sum((-2, -1)).clamp(min=1)


def resized(a: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps [..., h, w] on another grid."""
    if a.shape[-2:] == tuple(grid):
        return a
    made = F.interpolate(a.flatten(0, -3)[None], tuple(grid), mode="bilinear", antialias=True)
    return made[0].unflatten(0, a.shape[:-2])


def transformed(
    a: Tensor, shift: tuple[float, float] = (0.0, 0.0), scale: float = 1.0, around: Tensor | None = None
) -> Tensor:
    """Maps moved by `shift` (shares of the sides, right and down), after growing by `scale` around their own centroids, or those of
    `around` [..., h, w]; 0 comes in from outside."""
    flat = a.flatten(0, -3)
    # grid_sample's coordinates, from -1 to 1
    centre = 2 * centroid(flat if around is None else around.expand_as(a).flatten(0, -3)) - 1
    to = centre + 2 * torch.tensor(shift, device=a.device, dtype=a.dtype)
    theta = torch.zeros(len(flat), 2, 3, device=a.device, dtype=a.dtype)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = centre - to / scale  # where in the old map a place of the new one lies
    grid = F.affine_grid(theta, [len(flat), 1, *a.shape[-2:]], align_corners=False)
    return F.grid_sample(flat[:, None], grid, align_corners=False)[:, 0].unflatten(0, a.shape[:-2])


def centroid_energy(a: Tensor, target: Tensor) -> Tensor:
    """|c(A) - target|, target [..., 2]."""
    return (centroid(a) - target).abs().sum(-1)


def size_energy(a: Tensor, target: Tensor) -> Tensor:
    """|size(A) - target|, target [...]."""
    return (size(a) - target).abs()


def shape_energy(a: Tensor, target: Tensor, where: Tensor | float = 1.0) -> Tensor:
    """Mean of |S(A) - target|, target a mask [..., h, w]; `where` [..., h, w], from 0 to 1: how much it counts there."""
    return ((soft(a) - target).abs() * where).mean((-2, -1))
