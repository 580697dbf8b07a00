"""One training step of a self-guided diffusion model."""

import math
from contextlib import nullcontext

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ldm_sg.config import TrainConfig
from ldm_sg.data.order import mix_seed
from ldm_sg.guidance.compose import Denoiser
from ldm_sg.guidance.signal import Guidance
from ldm_sg.models.attention import attention_loss, reading
from ldm_sg.objective import Objective

TRAIN, VAL = 1, 2  # streams of randomness


class DiffusionModule(pl.LightningModule):
    """Noise, times and dropped guidance are drawn for the whole global batch from (seed, step) and each rank takes its
    slice, each part of an accumulated batch its own: a run is the same on one device or many, interrupted or not."""

    def __init__(self, network: nn.Module, objective: Objective, config: TrainConfig) -> None:
        super().__init__()
        self.network, self.objective, self.config = network, objective, config

    def on_fit_start(self) -> None:
        self.objective = self.objective.to(self.device)

    def _draw(self, x0: Tensor, stream: int, index: int, mine: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Noise like x0 [b, C, h, w], times [b], keep [b]: the slice `mine` of what the global batch gets."""
        generator = torch.Generator(self.device).manual_seed(mix_seed(self.config.seed, stream, index))
        total = self.config.batch_size
        noise = torch.randn((total, *x0.shape[1:]), generator=generator, device=self.device)
        t = self.objective.sample_t(total, generator)
        keep = torch.rand(total, generator=generator, device=self.device) >= self.config.guidance.drop
        return noise[mine][: len(x0)], t[mine][: len(x0)], keep[mine][: len(x0)]

    def training_step(self, batch: tuple[int, int, Tensor, Guidance], batch_idx: int) -> Tensor:
        step, share, x0, guidance = batch  # x0 [b, C, h, w]
        torch.manual_seed(mix_seed(self.config.seed, TRAIN, step, share))  # the network's dropout
        mine = slice(share, None, self.trainer.world_size * self.config.accumulate)
        noise, t, keep = self._draw(x0, TRAIN, step, mine)
        guidance = guidance.with_keep(keep)
        weight = self.config.guidance.attention
        with reading(self.network.unet) if weight else nullcontext() as seen:
            loss = self._loss(self.network, x0, noise, t, guidance).mean()
        self.log("train_loss", loss, prog_bar=True)
        if seen is None:
            return loss
        tied = (self.objective.alpha_sigma(t)[0].flatten() * attention_loss(seen, guidance)).mean()
        self.log("attention_loss", tied, prog_bar=True)
        return loss + weight * tied

    def _loss(self, denoiser: Denoiser, x0: Tensor, noise: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
        prediction = denoiser(self.objective.add_noise(x0, noise, t), t, guidance)
        return self.objective.loss(prediction, x0, noise, t)  # [b]

    def validation_step(self, batch: tuple[int, int, Tensor, Guidance], batch_idx: int) -> None:
        """The same noise and times at every validation, with guidance and with the null."""
        index, rank, x0, guidance = batch
        noise, t, _ = self._draw(x0, VAL, index, slice(rank, None, self.trainer.world_size))
        for name, signal in (("guided", guidance), ("null", guidance.null())):
            loss = self._loss(self.network, x0, noise, t, signal).mean()
            self.log(f"val_loss_{name}", loss, batch_size=len(x0), sync_dist=True)

    def configure_optimizers(self) -> dict:
        config = self.config
        weights, rest = decayed(self.network)
        groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, config.lr, fused=self.device.type == "cuda")
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, **_: object) -> None:
        """By norm. A step whose gradient is not finite is no step: weights, moments and counts stay as they are. (In bf16
        Lightning's own clipping refuses fused optimizers, for the sake of a loss scale, which bf16 has not.)"""
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf)
        self.gradient_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        odd = ~self.gradient_norm.isfinite()
        if optimizer.defaults.get("fused"):  # is told without waiting for the device
            optimizer.found_inf = odd.float()  # type: ignore[attr-defined]
        elif odd:
            for p in parameters:
                p.grad = None


def decayed(network: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with weight decay, the weights of linear and convolutional layers, and without: biases, norms, embeddings."""
    layers = [m.weight for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    weights, ids = [w for w in layers if w.requires_grad], {id(w) for w in layers}
    return weights, [p for p in network.parameters() if id(p) not in ids and p.requires_grad]


def lr_factor(step: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, and over the last `decay` share of the steps linearly to zero."""
    up = min(1.0, (step + 1) / max(1, config.warmup))
    tail = config.decay * config.steps
    down = min(1.0, (config.steps - step) / tail) if tail else 1.0
    return up * max(down, 0.0)
