"""What the network is trained to predict: eps, v, x0 under a discrete noise schedule, or flow-matching velocity.

Every kind writes x_t = alpha_t x_0 + sigma_t eps; only alpha, sigma, the target and the loss weight differ. A time is an index
of the schedule, from 0 to T - 1, and may lie between two of them; for flow it is T sigma_t, from 0 to T."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """kind and schedule of one run; pure functions of tensors."""

    kind: str
    angles: Tensor  # [T] arctan(sigma_t / alpha_t) of the discrete schedule, rising; its length alone matters for flow
    min_snr: float | None = None
    shift: float = 1.0  # flow: training times have their sigma / alpha multiplied by this (Esser et al., 2024, Eq. 23)

    def to(self, device: torch.device) -> "Objective":
        return replace(self, angles=self.angles.to(device))

    @property
    def last(self) -> float:
        """The noisiest time."""
        return float(len(self.angles)) if self.kind == "flow" else float(len(self.angles) - 1)

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """Times [n]: integers below T, or for flow T * sigmoid(N(log shift, 1)) (Esser et al., 2024, logit-normal)."""
        steps, device = len(self.angles), generator.device
        if self.kind == "flow":
            u = torch.sigmoid(torch.randn(n, generator=generator, device=device))
            return self.shift * u / (1 + (self.shift - 1) * u) * steps
        return torch.randint(steps, (n,), generator=generator, device=device)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each [B, 1, 1, 1]; between two indices the angle is interpolated."""
        if self.kind == "flow":
            sigma = t / len(self.angles)
            alpha = 1 - sigma
        else:
            low = t.long()
            angle = torch.lerp(
                self.angles[low], self.angles[(low + 1).clamp(max=len(self.angles) - 1)], (t - low).float()
            )
            alpha, sigma = angle.cos(), angle.sin()
        return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)

    def time_of(self, ratio: Tensor) -> Tensor:
        """The times [N] at which sigma / alpha is `ratio` [N], the nearest ones there are."""
        if self.kind == "flow":
            return len(self.angles) * ratio / (1 + ratio)
        angle, known = ratio.double().atan(), self.angles.double()
        above = torch.searchsorted(known, angle).clamp(1, len(known) - 1)
        share = (angle - known[above - 1]) / (known[above] - known[above - 1])
        return (above - 1 + share.clamp(0, 1)).to(ratio)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps (Eq. 1)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        if self.kind == "eps":
            return noise
        if self.kind == "x0":
            return x0
        if self.kind == "v":  # Salimans & Ho, 2022
            return alpha * noise - sigma * x0
        assert self.kind == "flow"  # Lipman et al., 2023, on the straight path
        return noise - x0

    def weight(self, t: Tensor) -> Tensor:
        """Loss weight [B]: 1, or min-SNR-gamma (Hang et al., 2023) in terms of this kind's target."""
        if self.min_snr is None:
            return torch.ones(len(t), device=t.device)
        alpha, sigma = (part.flatten() for part in self.alpha_sigma(t))
        snr = (alpha / sigma) ** 2
        clipped = snr.clamp(max=self.min_snr)
        return {"eps": clipped / snr, "x0": clipped, "v": clipped / (snr + 1)}[self.kind]

    def loss(self, prediction: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Weighted squared error of each sample, [B] (Eq. 2)."""
        error = (prediction.float() - self.target(x0, noise, t)).square().flatten(1).mean(1)
        return self.weight(t) * error

    def x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latent that `prediction` implies at x_t."""
        alpha, sigma = self.alpha_sigma(t)
        if self.kind == "eps":
            return (x_t - sigma * prediction) / alpha
        if self.kind == "x0":
            return prediction
        return alpha * x_t - sigma * prediction if self.kind == "v" else x_t - sigma * prediction

    def prediction(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction that implies `x0` at x_t: the inverse of `x0`."""
        alpha, sigma = self.alpha_sigma(t)
        if self.kind == "eps":
            return (x_t - alpha * x0) / sigma
        if self.kind == "x0":
            return x0
        return (alpha * x_t - x0) / sigma if self.kind == "v" else (x_t - x0) / sigma
