"""Guidance -> what the UNet reads: a vector beside the time embedding, tokens for cross-attention, extra input channels."""

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ldm_sg.guidance.signal import Guidance


@dataclass(frozen=True)
class Condition:
    """What one guided pass of the UNet takes besides x_t and t."""

    vector: Tensor | None  # [B, E]
    tokens: Tensor | None  # [B, T, D]
    mask: Tensor | None  # [B, T] bool, True = read it
    spatial: Tensor | None  # [B, S, h, w]


class Conditioner(ModelMixin, ConfigMixin):
    """Embeds k by a two-layer SiLU MLP (paper, appendix C.1) and makes the cross-attention's tokens; owns the null.

    tokens: `vector` (T tokens of width D that are linear in k, as in the paper), `concepts` (one embedding a present
    id, masked), `none`. `tokens_only`: no vector; concepts are then read beside a learned background. The null is learned,
    for vector, tokens and spatial channels alike."""

    @register_to_config
    def __init__(
        self,
        num_labels: int,
        embed_dim: int,
        hidden: int = 256,
        tokens: str = "vector",
        num_tokens: int = 8,
        token_width: int = 32,
        spatial_channels: int = 0,
        feature_dim: int = 0,
        tokens_only: bool = False,
    ) -> None:
        super().__init__()
        if num_labels and not tokens_only:
            self.labels = nn.Parameter(torch.randn(num_labels, hidden))  # Linear(K, hidden) read by row
        if not tokens_only:
            self.null = nn.Parameter(torch.randn(hidden))
            self.out = nn.Sequential(nn.SiLU(), nn.Linear(hidden, embed_dim))
        self.token_shape = {"vector": (num_tokens, token_width), "concepts": (1, token_width), "none": None}[tokens]
        if self.token_shape:
            if num_labels:
                self.token_labels = nn.Parameter(torch.randn(num_labels, *self.token_shape))
            self.token_null = nn.Parameter(torch.randn(*self.token_shape))
            if tokens_only and tokens == "concepts":
                self.token_background = nn.Parameter(torch.randn(*self.token_shape))
        if feature_dim:
            if not tokens_only:
                self.feature = nn.Linear(feature_dim, hidden)
            if self.token_shape:
                self.token_feature = nn.Linear(feature_dim, math.prod(self.token_shape))
        if spatial_channels:
            self.spatial_null = nn.Parameter(torch.zeros(spatial_channels, 1, 1))

    def forward(self, guidance: Guidance) -> Condition:
        vector = None if self.config.tokens_only else self.out(self._sum(guidance))
        tokens, mask = self._tokens(guidance)
        spatial = None
        if guidance.spatial is not None and self.config.spatial_channels:
            spatial = torch.where(guidance.keep[:, None, None, None], guidance.spatial, self.spatial_null)
        return Condition(vector, tokens, mask, spatial)

    def _sum(self, guidance: Guidance, of: str = "") -> Tensor:
        """What there is of the signal, added up, or the null; of vectors [B, hidden], of "token_" [B, T, D]."""
        null = getattr(self, f"{of}null")
        kept = torch.zeros_like(null)
        if guidance.k is not None:
            kept = kept + self._lookup(getattr(self, f"{of}labels").flatten(1), guidance.k).unflatten(1, null.shape)
        if guidance.feature is not None:
            unit = guidance.feature.to(self.dtype)
            scaled = unit * unit.shape[1] ** 0.5  # entries of size one, which a linear layer's initialisation expects
            kept = kept + getattr(self, f"{of}feature")(scaled).unflatten(1, null.shape)
        return torch.where(guidance.keep.view(-1, *[1] * null.ndim), kept, null)

    def _tokens(self, guidance: Guidance) -> tuple[Tensor | None, Tensor | None]:
        if self.token_shape is None:
            return None, None
        if self.config.tokens == "vector" or guidance.concepts is None:
            return self._sum(guidance, "token_"), None
        there = guidance.concepts >= 0  # [B, T]
        tokens = self.token_labels[guidance.concepts.clamp(min=0), 0] * there[..., None]  # [B, T, D]
        tokens = torch.where(guidance.keep[:, None, None], tokens, self.token_null)
        if self.config.tokens_only:  # the background is always read, in its place the null
            first = torch.where(guidance.keep[:, None, None], self.token_background, self.token_null)
            read = torch.cat([torch.ones_like(there[:, :1]), there & guidance.keep[:, None]], 1)
            return torch.cat([first, tokens], 1), read
        # a null sample reads one null token, one without any concept one zero token: attention over nothing is not defined
        alone = torch.arange(there.shape[1], device=there.device) == 0
        any_read = (guidance.keep & there.any(1))[:, None]
        return tokens, any_read & there | ~any_read & alone  # ONNX Runtime has no `where` of booleans

    @staticmethod
    def _lookup(table: Tensor, k: Tensor) -> Tensor:
        """Rows of ids [B], or the sum of the rows a multi-hot [B, K] names."""
        return k.to(table.dtype) @ table if k.ndim == 2 else table[k]
