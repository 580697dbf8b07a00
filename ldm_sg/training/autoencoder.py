"""Fitting a small autoencoder, from scratch (KL) or from another one (KL or tiny): L1 + LPIPS + PatchGAN + KL, with noise
on the latents so that the decoder forgives a diffusion net's small errors.

Everything random in step t is a function of (seed, t), so that a resumed fit is the fit that never stopped."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights

from ldm_sg.autoencoder import load_autoencoder
from ldm_sg.autoencoder.kinds import KL, Tiny
from ldm_sg.config import FitAutoencoderConfig
from ldm_sg.errors import InputError, need_package, one_line
from ldm_sg.hub import downloadable
from ldm_sg.weights import check_finite, read_weights


@dataclass(frozen=True)
class Source:
    """Images of one origin, held in memory."""

    name: str
    images: Tensor  # uint8 [N, 3, S, S], S >= the fitted size; larger ones are shrunk and cropped at random


def draw(sources: list[Source], size: int, batch: int, generator: torch.Generator) -> Tensor:
    """A training batch, float [batch, 3, size, size] in [-1, 1]: every image equally likely, mirrored half of the time."""
    counts = torch.tensor([len(s.images) for s in sources])
    origin = torch.multinomial(counts.float(), batch, replacement=True, generator=generator)
    parts = []
    for i, source in enumerate(sources):
        n = int((origin == i).sum())
        if n:
            index = torch.randint(len(source.images), (n,), generator=generator)
            parts.append(_crop(source.images[index].float() / 127.5 - 1, size, generator))
    images = torch.cat(parts)
    mirrored = torch.rand(batch, generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def _crop(images: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """[N, 3, S, S] shrunk to one random side in [size, S], then one random crop of size x size."""
    full = images.shape[-1]
    if full == size:
        return images
    side = int(torch.randint(size, full + 1, (), generator=generator))
    images = shrink(images, side)
    top, left = torch.randint(side - size + 1, (2,), generator=generator).tolist()
    return images[:, :, top : top + size, left : left + size]


def shrink(images: Tensor, side: int) -> Tensor:
    """[N, 3, S, S] in [-1, 1] -> [N, 3, side, side]."""
    return F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def perceptual_distance(weights: str | None) -> nn.Module:
    """LPIPS (AlexNet) from the package `lpips`; `weights` is a safetensors file of torchvision's `AlexNet.features`
    (None = torchvision downloads them). Takes images in [-1, 1], returns [B, 1, 1, 1]."""
    lpips = need_package("lpips", "lpips > 0", "'ldm-sg[lpips]', or set lpips=0")
    url = AlexNet_Weights.IMAGENET1K_V1.url
    if weights is None and not downloadable(url):
        raise InputError(
            f"LPIPS: no network for AlexNet's weights ({url}): fetch them elsewhere and name a safetensors file"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")  # lpips uses an older spelling
        net = lpips.LPIPS(net="alex", pnet_rand=weights is not None, verbose=False)
    if weights is not None:
        if not Path(weights).is_file():
            raise InputError(f"lpips_weights={weights!r}: no such file")
        _load_alexnet(net.net, read_weights(Path(weights)), weights)
    return net.eval().requires_grad_(False)


def _load_alexnet(alexnet: nn.Module, state: dict[str, Tensor], source: str) -> None:
    state = {key.removeprefix("features."): value.float() for key, value in state.items()}
    try:  # lpips cuts `features` into slices whose children keep torchvision's indices as names: slice2.3.weight
        alexnet.load_state_dict({key: state[key.partition(".")[2]] for key in alexnet.state_dict()})
    except (KeyError, RuntimeError) as err:
        raise InputError(f"lpips_weights={source}: not those of AlexNet's features: {one_line(err)[:100]}") from err
    check_finite(alexnet.state_dict(), source)


def add_noise(z: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """z [B, C, h, w] plus noise of std u * strength in units of each channel's own spread, u ~ U(0, 1) a sample.

    Being relative, it cannot be evaded by blowing the latents up."""
    spread = z.detach().std(dim=(0, 2, 3), keepdim=True)
    level = strength * torch.rand(len(z), 1, 1, 1, generator=generator).to(z.device)
    return z + level * spread * torch.randn(z.shape, generator=generator).to(z.device)


def learning_rate(step: int, config: FitAutoencoderConfig) -> float:
    """Learning rate: a warm-up of 200 steps (at most a tenth of all), then a half cosine down to 1% at `config.steps`."""
    warm = min(1.0, (step + 1) / min(200, 1 + config.steps // 10))
    return config.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps))))


def make_net(config: FitAutoencoderConfig) -> AutoencoderKL:
    """The network, initialised from `config.seed`; no attention, so that it works at any image size.

    Convolutions start with unit gain, residual blocks as identities, and the posterior's std at 0.05. With PyTorch's own
    start (gain 1/3, a posterior of std 1 that drowns the fresh means) 300 steps at 32 px reach L1 0.24 instead of 0.20."""
    torch.manual_seed(config.seed)
    levels = len(config.widths)
    net = AutoencoderKL(
        in_channels=3 * config.patch**2,
        out_channels=3 * config.patch**2,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(config.widths),
        layers_per_block=config.blocks,
        latent_channels=config.channels,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=config.size // config.patch,
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    nn.init.zeros_(net.quant_conv.weight[config.channels :])
    nn.init.constant_(net.quant_conv.bias[config.channels :], 2 * math.log(0.05))
    return net


def starting_point(config: FitAutoencoderConfig) -> tuple[nn.Module, str, int]:
    """The network to fit, its kind and its patch: a fresh one, or `config.init`'s. InputError where that cannot be fitted."""
    if config.init is None:
        return make_net(config), "kl", config.patch
    codec = load_autoencoder(config.init).codec
    if not isinstance(codec, KL | Tiny):
        raise InputError(f"init={config.init!r}: only autoencoders of kind kl and tiny are fitted")
    if config.size % codec.factor:
        raise InputError(f"size={config.size}: init={config.init!r} needs a multiple of {codec.factor}")
    return codec.net.requires_grad_(True), "kl" if isinstance(codec, KL) else "tiny", getattr(codec, "patch", 1)


class Fit:
    """The state of a fit: net, its running average, critic, optimisers. `step()` is one update."""

    def __init__(self, config: FitAutoencoderConfig, device: torch.device, bf16: bool) -> None:
        self.config, self.device, self.bf16, self.steps = config, device, bf16, 0
        net, self.kind, self.patch = starting_point(config)
        self.net = net.to(device).train()
        if config.part == "decoder":
            self.net.encoder.requires_grad_(False)
        self.average = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        fitted = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(fitted, config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.perceptual = perceptual_distance(config.lpips_weights).to(device) if config.lpips > 0 else None
        self.parts: dict[str, Any] = {"net": self.net, "optimizer": self.optimizer}  # of a checkpoint
        self.critic: nn.Module | None = None
        if config.gan > 0:
            self.critic = NLayerDiscriminator(ndf=32, n_layers=2).apply(weights_init).to(device).train()
            self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), config.lr, betas=(0.5, 0.9))
            self.parts |= {"critic": self.critic, "critic_optimizer": self.critic_optimizer}

    def step(self, images: Tensor, generator: torch.Generator) -> dict[str, float]:
        """One update on `images` [B, 3, S, S] in [-1, 1] -> the losses."""
        images = images.to(self.device)
        rate = learning_rate(self.steps, self.config)
        self._set_rate(self.optimizer, rate)
        fake, losses = self._reconstruct(images, generator)
        total = sum(getattr(self.config, name, 1.0) * value for name, value in losses.items())  # l1 has weight 1
        adversarial = self.critic is not None and self.steps >= self.config.gan_start * self.config.steps
        if adversarial:
            losses["gan"] = -self._judge(fake).mean()
            total = total + self._gan_weight(total, losses["gan"]) * losses["gan"]
        total.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if adversarial:
            losses["critic"] = self._train_critic(images, fake.detach(), self.config.gan_lr * rate / self.config.lr)
        self.steps += 1
        self._average()
        return {name: float(value.detach()) for name, value in losses.items()}

    def _reconstruct(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        c = self.config
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            latents, kl = self._encode(images, generator)
            z = add_noise(latents, c.noise, generator)
            fake = self._decode(z)
            losses = {"l1": (fake - images).abs().mean(), **kl}
            if c.half > 0:
                losses["half"] = (self._decode(F.avg_pool2d(z, 2)) - F.avg_pool2d(images, 2)).abs().mean()
            if self.perceptual is not None:
                # AlexNet's stride of 4 would leave a grid
                top, left = torch.randint(4, (2,), generator=generator).tolist()
                pair = (enlarge(x[:, :, top:, left:], c.lpips_size) for x in (fake, images))
                losses["lpips"] = self.perceptual(*pair).float().mean()
        return fake, losses

    def _encode(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Latents, and where they are a posterior's and fitted its KL; a tiny autoencoder's are not random."""
        fitted = self.config.part == "all"
        with torch.set_grad_enabled(fitted):
            encoded = self.net.encode(F.pixel_unshuffle(images, self.patch))
        if self.kind == "tiny":
            return encoded.latents.float(), {}
        mean, logvar = encoded.latent_dist.mean.float(), encoded.latent_dist.logvar.float()
        if not fitted:
            return mean, {}
        noise = torch.randn(mean.shape, generator=generator).to(self.device)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum() / images.numel()
        return mean + noise * (0.5 * logvar).exp(), {"kl": kl}

    def _decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(self.net.decode(z).sample, self.patch).float()

    def _judge(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.critic(images).float()

    def _gan_weight(self, reconstruction: Tensor, adversarial: Tensor) -> Tensor:
        """VQGAN (Esser et al., 2021), Eq. 7: the ratio of the two gradients at the decoder's last layer."""
        last = self.net.decoder.layers[-1].weight if self.kind == "tiny" else self.net.decoder.conv_out.weight
        losses = (reconstruction, adversarial)
        ours, theirs = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in losses)
        return self.config.gan * (ours / (theirs + 1e-4)).clamp(max=1e4).detach()

    def _train_critic(self, real: Tensor, fake: Tensor, rate: float) -> Tensor:
        self._set_rate(self.critic_optimizer, rate)
        loss = 0.5 * (F.relu(1 - self._judge(real)).mean() + F.relu(1 + self._judge(fake)).mean())
        self.critic_optimizer.zero_grad(set_to_none=True)  # the generator's step left gradients there
        loss.backward()
        self.critic_optimizer.step()
        return loss

    @staticmethod
    def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate

    def _average(self) -> None:
        decay = min(self.config.ema, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for name, value in self.net.state_dict().items():
                self.average[name].lerp_(value, 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed fit needs: tensors and plain containers only."""
        return {"steps": self.steps, "average": self.average, **{k: v.state_dict() for k, v in self.parts.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.average = {k: v.to(self.device) for k, v in state["average"].items()}
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def enlarge(images: Tensor, size: int) -> Tensor:
    """At least size x size: LPIPS' network loses small images in its first strides."""
    return images if images.shape[-1] >= size else F.interpolate(images, (size, size), mode="bilinear")
