"""diffusers' UNet2DConditionModel with the paper's two injections of guidance."""

from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D
from torch import Tensor, nn

from ldm_sg.errors import InputError
from ldm_sg.guidance.signal import Guidance, GuidanceSpec
from ldm_sg.models.conditioner import Conditioner

if TYPE_CHECKING:
    from ldm_sg.config import ModelConfig


class GuidedUNet(nn.Module):
    """The Denoiser: (x_t [B, C, h, w], t [B], guidance) -> prediction [B, C, h, w]."""

    def __init__(self, unet: UNet2DConditionModel, conditioner: nn.Module) -> None:
        super().__init__()
        self.unet, self.conditioner = unet, conditioner

    def forward(self, x: Tensor, t: Tensor, guidance: Guidance) -> Tensor:
        condition = self.conditioner(guidance)
        if condition.spatial is not None:
            x = torch.cat([x, condition.spatial.to(x.dtype)], dim=1)  # Eq. 8: x_t := concat[x_t, k_s]
        out = self.unet(
            x.to(self.unet.dtype),
            t,
            encoder_hidden_states=condition.tokens,
            encoder_attention_mask=condition.mask,
            class_labels=condition.vector,
            return_dict=False,
        )
        return out[0]


class PlainUNet(UNet2DConditionModel):
    """Without cross-attention, what UNet2DConditionModel's blocks cannot be asked for: residual-attention-residual in the middle,
    `heads` in every attention, and with `residual_updown` residual blocks that halve and double: the net of Dhariwal and
    Nichol (2021), block by block. Other arguments are UNet2DConditionModel's."""

    def __init__(self, heads: int = 8, residual_updown: bool = False, **config: Any) -> None:
        super().__init__(**config)
        self.register_to_config(heads=heads, residual_updown=residual_updown)
        width, time = self.config.block_out_channels[-1], self.mid_block.resnets[0].time_emb_proj.in_features
        groups, norm, drop = self.config.norm_num_groups, self.config.resnet_time_scale_shift, self.config.dropout
        self.mid_block = UNetMidBlock2D(
            width, time, drop, resnet_eps=1e-5, resnet_time_scale_shift=norm, resnet_groups=groups, attn_groups=groups,
            attention_head_dim=width // heads,
        )  # fmt: skip
        for way, blocks in (("down", self.down_blocks), ("up", self.up_blocks)):
            for block in blocks:
                if residual_updown and hasattr(block, f"{way}sample_type") and getattr(block, f"{way}samplers"):
                    width = block.resnets[-1].out_channels
                    sampler = ResnetBlock2D(
                        in_channels=width, temb_channels=time, groups=groups, dropout=drop, eps=1e-5, time_embedding_norm=norm,
                        **{way: True},
                    )  # fmt: skip
                    setattr(block, f"{way}samplers", nn.ModuleList([sampler]))
                    setattr(block, f"{way}sample_type", "resnet")
        for module in self.modules():
            if isinstance(module, Attention):  # the weights' shapes do not depend on the number of heads
                module.heads, module.scale = heads, (module.inner_dim // heads) ** -0.5

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:
        """What config.json holds besides: diffusers looks at the signature alone."""
        keys = UNet2DConditionModel._get_init_keys(input_class)
        return keys | UNet2DConditionModel._get_init_keys(UNet2DConditionModel) if input_class is PlainUNet else keys


def make_unet(config: "ModelConfig", spec: GuidanceSpec, *latent_shapes: tuple[int, int, int]) -> GuidedUNet:
    """The network of `config` for latents [C, h, w], of one or several shapes, the most frequent first, and the signals of `spec`.
    InputError names a size that cannot be."""
    halved = len(config.multipliers) - 1
    for _, h, w in latent_shapes:
        if h % 2**halved or w % 2**halved:
            raise InputError(
                f"model.multipliers={list(config.multipliers)} halves {halved} times, but latents are {h}x{w}: give fewer "
                "multipliers or an autoencoder with a smaller factor"
            )
    channels, *cells = latent_shapes[0]
    widths = [config.channels * m for m in config.multipliers]
    cross = config.tokens != "none"
    attention, kind = ("CrossAttn{}Block2D", UNet2DConditionModel) if cross else ("Attn{}Block2D", PlainUNet)
    plain = "Resnet{}sampleBlock2D" if config.residual_updown else "{}Block2D"
    blocks = [attention if 2**level in config.attention else plain for level in range(len(widths))]
    own = {} if cross else {"heads": config.heads, "residual_updown": config.residual_updown}
    unet = kind(
        **own,
        sample_size=min(cells),
        in_channels=channels + spec.spatial_channels,
        out_channels=channels,
        down_block_types=tuple(block.format("Down") for block in blocks),
        mid_block_type="UNetMidBlock2DCrossAttn" if cross and config.attention else "UNetMidBlock2D",
        up_block_types=tuple(block.format("Up") for block in reversed(blocks)),
        block_out_channels=tuple(widths),
        layers_per_block=config.blocks,
        dropout=config.dropout,
        norm_num_groups=_groups(widths),
        cross_attention_dim=config.token_width,
        attention_head_dim=config.heads,  # which cross-attention blocks read as the number of heads; PlainUNet sees to the others
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        class_embed_type=None if config.inject == "none" else "identity",
        class_embeddings_concat=config.inject == "concat",
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    conditioner = Conditioner(
        num_labels=spec.num_concepts if spec.concepts_only else spec.num_labels,
        embed_dim=4 * config.channels,
        hidden=config.hidden,
        tokens=config.tokens,
        num_tokens=config.num_tokens,
        token_width=config.token_width,
        spatial_channels=spec.spatial_channels,
        feature_dim=0 if spec.concepts_only else spec.feature_dim,
        tokens_only=config.inject == "none",
    )
    return GuidedUNet(unet, conditioner)


def _groups(widths: list[int]) -> int:
    return next(g for g in (32, 16, 8, 4, 2, 1) if all(w % g == 0 for w in widths))
