"""diffusers' UNet2DConditionModel with the paper's two injections of guidance."""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ldm_sg.config import ModelConfig
from ldm_sg.errors import InputError, choices
from ldm_sg.guidance.signal import Guidance, GuidanceSpec
from ldm_sg.models.conditioner import Conditioner

TOKENS = ("vector", "concepts", "none")


class GuidedUNet(nn.Module):
    """The Denoiser: (x_t [B, C, h, w], t [B], guidance) -> prediction [B, C, h, w]."""

    def __init__(self, unet: UNet2DConditionModel, conditioner: Conditioner) -> None:
        super().__init__()
        self.unet, self.conditioner = unet, conditioner

    def forward(self, x: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
        condition = self.conditioner(guidance)
        if condition.spatial is not None:
            x = torch.cat([x, condition.spatial.to(x.dtype)], dim=1)  # Eq. 8: x_t := concat[x_t, k_s]
        out = self.unet(
            x,
            t,
            encoder_hidden_states=condition.tokens,
            encoder_attention_mask=condition.mask,
            class_labels=condition.vector,
            return_dict=False,
        )
        return out[0]


def make_unet(config: ModelConfig, spec: GuidanceSpec, latent_shape: tuple[int, int, int]) -> GuidedUNet:
    """The network of `config` for latents [C, h, w] and the signals of `spec`. InputError names a size that cannot be."""
    _check(config, latent_shape)
    channels, size = latent_shape[0], latent_shape[1]
    widths = [config.channels * m for m in config.multipliers]
    factors = [2**level for level in range(len(widths))]
    cross = config.tokens != "none"
    attention = "CrossAttn" if cross else "Attn"
    down = [f"{attention if f in config.attention else ''}DownBlock2D" for f in factors]
    up = [f"{attention if f in config.attention else ''}UpBlock2D" for f in reversed(factors)]
    embed_dim = 4 * config.channels
    unet = UNet2DConditionModel(
        sample_size=size,
        in_channels=channels + spec.spatial_channels,
        out_channels=channels,
        down_block_types=tuple(down),
        mid_block_type="UNetMidBlock2DCrossAttn" if cross and config.attention else "UNetMidBlock2D",
        up_block_types=tuple(up),
        block_out_channels=tuple(widths),
        layers_per_block=config.blocks,
        dropout=config.dropout,
        norm_num_groups=_groups(widths),
        cross_attention_dim=config.token_width,
        # diffusers reads attention_head_dim as the number of heads in cross-attention blocks, as itself elsewhere
        attention_head_dim=config.heads if cross else tuple(w // config.heads for w in widths),
        class_embed_type="identity",
        class_embeddings_concat=config.inject == "concat",
    )
    conditioner = Conditioner(
        num_labels=spec.num_labels,
        embed_dim=embed_dim,
        hidden=config.hidden,
        tokens=config.tokens,
        num_tokens=config.num_tokens,
        token_width=config.token_width,
        spatial_channels=spec.spatial_channels,
        feature_dim=spec.feature_dim,
    )
    return GuidedUNet(unet, conditioner)


def _check(config: ModelConfig, latent_shape: tuple[int, int, int]) -> None:
    if config.inject not in ("concat", "add"):
        raise InputError(f"model.inject={config.inject!r}; {choices(config.inject, ['concat', 'add'])}")
    if config.tokens not in TOKENS:
        raise InputError(f"model.tokens={config.tokens!r}; {choices(config.tokens, TOKENS)}")
    deepest = 2 ** (len(config.multipliers) - 1)
    if latent_shape[1] % deepest or latent_shape[2] % deepest:
        raise InputError(
            f"model.multipliers={list(config.multipliers)} halves {len(config.multipliers) - 1} times, but latents are "
            f"{latent_shape[1]}x{latent_shape[2]}: give fewer multipliers or an autoencoder with a smaller factor"
        )
    wrong = [f for f in config.attention if f not in [2**i for i in range(len(config.multipliers))]]
    if wrong:
        raise InputError(f"model.attention={list(config.attention)}: no level has a downsampling factor of {wrong[0]}")
    for m in config.multipliers:
        if (config.channels * m) % config.heads:
            raise InputError(f"model.heads={config.heads} does not divide {config.channels * m} channels")


def _groups(widths: list[int]) -> int:
    return next(g for g in (32, 16, 8, 4, 2, 1) if all(w % g == 0 for w in widths))
