"""What the network is trained to predict: eps, v, x0 under a discrete noise schedule, or flow-matching velocity.

Every kind writes x_t = alpha_t x_0 + sigma_t eps; only alpha, sigma, the target and the loss weight differ."""

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("eps", "v", "x0", "flow")


@dataclass(frozen=True)
class Objective:
    """kind and schedule of one run; pure functions of tensors."""

    kind: str
    alphas_cumprod: Tensor  # [T] alpha_bar of the discrete schedule; its length alone matters for flow
    min_snr: float | None = None

    def to(self, device: torch.device) -> "Objective":
        return Objective(self.kind, self.alphas_cumprod.to(device), self.min_snr)

    def sample_t(self, n: int, generator: torch.Generator) -> Tensor:
        """Times [n]: integers below T, or for flow T * sigmoid(N(0, 1)) (Esser et al., 2024, logit-normal)."""
        steps, device = len(self.alphas_cumprod), generator.device
        if self.kind == "flow":
            return torch.sigmoid(torch.randn(n, generator=generator, device=device)) * steps
        return torch.randint(steps, (n,), generator=generator, device=device)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each [B, 1, 1, 1]."""
        if self.kind == "flow":
            sigma = t / len(self.alphas_cumprod)
            alpha = 1 - sigma
        else:
            alpha, sigma = self.alphas_cumprod[t].sqrt(), (1 - self.alphas_cumprod[t]).sqrt()
        return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)

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
        if self.min_snr is None or self.kind == "flow":
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
