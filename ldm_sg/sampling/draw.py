"""Randomness by (seed, index): image i is the same whatever batch it is made in."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def image_generator(seed: int, index: int, purpose: str = "noise") -> torch.Generator:
    """The randomness of image `index` under `seed`."""
    digest = hashlib.sha256(f"{seed}/{index}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def unit_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """One stream an image: [B, *shape]."""
    return torch.stack([torch.randn(tuple(shape), generator=g) for g in generators])


def slerp(a: Tensor, b: Tensor, share: float) -> tuple[float, float]:
    """Weights of a and b at `share` of the arc between them (Shoemake, 1985)."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle < 1e-4:
        return 1 - share, share
    first, last = (torch.sin(part * angle) / torch.sin(angle) for part in (1 - share, share))
    return float(first), float(last)
