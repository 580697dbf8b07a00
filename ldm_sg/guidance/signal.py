"""The raw guidance signal of a batch, and what a data set's signals look like."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm_sg.errors import InputError


@dataclass(frozen=True)
class Guidance:
    """What guides B samples. Parts that a data set does not have are None.

    `keep` False means the null: every part of that sample's signal is dropped together."""

    keep: Tensor  # [B] bool
    k: Tensor | None = None  # [B] long cluster id, or [B, K] float multi-hot
    concepts: Tensor | None = None  # [B, T] long ids of the concepts present, -1 = none
    feature: Tensor | None = None  # [B, D] float, g's own vector
    spatial: Tensor | None = None  # [B, S, h, w] float coverage in [0, 1] on the latent grid

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "Guidance":
        parts: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        mapped: dict[str, Any] = {name: None if part is None else fn(part) for name, part in parts.items()}
        return Guidance(**mapped)

    def __len__(self) -> int:
        return len(self.keep)

    def __getitem__(self, index: Any) -> "Guidance":
        return self._map(lambda part: part[index])

    def to(self, device: torch.device | str) -> "Guidance":
        return self._map(lambda part: part.to(device, non_blocking=True))

    def null(self) -> "Guidance":
        """The same batch with everything dropped: the unconditional pass."""
        return dataclasses.replace(self, keep=torch.zeros_like(self.keep))

    def with_keep(self, keep: Tensor) -> "Guidance":
        """Sample i's signal is dropped, all parts together, where keep[i] is False (and where it already was)."""
        return dataclasses.replace(self, keep=self.keep & keep)

    @staticmethod
    def cat(parts: Sequence["Guidance"]) -> "Guidance":
        """Batches of the same kind of signal, one after the other."""
        merged: dict[str, Any] = {}
        for f in dataclasses.fields(Guidance):
            values = [getattr(part, f.name) for part in parts]
            merged[f.name] = None if values[0] is None else torch.cat(values)
        return Guidance(**merged)

    @staticmethod
    def from_k(k: Tensor) -> "Guidance":
        """Ids [B] or multi-hots [B, K], all kept."""
        return Guidance(keep=torch.ones(len(k), dtype=torch.bool, device=k.device), k=k)


@dataclass(frozen=True)
class GuidanceSpec:
    """What the signals of an annotation set look like: written by annotate, read by train and sample."""

    kind: str = "clusters"  # which annotator made them
    num_labels: int = 0  # K: how many ids k can take; 0 = no k
    multi_hot: bool = False  # k is [B, K] multi-hot instead of [B] ids
    spatial: str | None = None  # k_s: box (one channel) or mask (one channel a label)
    feature_dim: int = 0  # D of `feature`; 0 = none
    concepts_only: bool = False  # a network reads nothing but the ids of what is present, one token each

    @property
    def one_id(self) -> bool:
        """k is one id an image."""
        return self.num_labels > 0 and not self.multi_hot

    @property
    def spatial_channels(self) -> int:
        """S of k_s."""
        return 0 if self.concepts_only else {None: 0, "box": 1, "mask": self.num_labels}[self.spatial]

    @property
    def num_concepts(self) -> int:
        """How many ids `concepts` can hold: of boxes one, the object."""
        return 1 if self.spatial == "box" else self.num_labels if self.multi_hot or self.spatial == "mask" else 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any], where: str) -> "GuidanceSpec":
        """What `to_dict` gave; InputError naming `where` it was found when another version wrote it."""
        try:
            rest = dict(fields)
            spec = cls(rest.pop("kind"), **rest)
            counts, flags = (spec.num_labels, spec.feature_dim), (spec.multi_hot, spec.concepts_only)
            kinds = {*map(type, counts)}, {*map(type, flags)}
            if kinds != ({int}, {bool}) or min(counts) < 0 or spec.spatial not in (None, "box", "mask"):
                raise ValueError(f"{fields}")
            return spec
        except (KeyError, TypeError, ValueError) as err:
            raise InputError(f"{where}: its guidance spec is of another version of ldm_sg: make it again") from err
