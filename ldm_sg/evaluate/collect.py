"""Batches of uint8 images -> features, and a cache for those of reference images."""

import sys
from collections.abc import Callable, Iterable, Mapping

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ldm_sg.data.images import to_float
from ldm_sg.errors import InputError
from ldm_sg.folder import cache_home, whole

Network = Callable[[Tensor], Tensor]  # images [B, 3, H, W] in [-1, 1] -> features [B, D]


@torch.no_grad()
def collect(
    batches: Iterable[tuple[Tensor, Tensor]],
    networks: Mapping[str, Network],
    device: torch.device,
    total: int | None,
    label: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(positions [B], uint8 [B, 3, H, W]) -> positions [N] and, of each network, features [N, D] (float32, CPU).

    Each batch passes through all networks and is dropped: memory grows with the features only."""
    positions: list[Tensor] = []
    features: dict[str, list[Tensor]] = {name: [] for name in networks}
    with tqdm(total=total, desc=label, unit="image", dynamic_ncols=True) as bar:
        for places, images in batches:
            pixels = to_float(images.to(device))
            positions.append(places)
            for name, network in networks.items():
                features[name].append(network(pixels).float().cpu())
            bar.update(len(places))
    if not positions:
        return torch.empty(0, dtype=torch.long), {name: torch.empty(0, 0) for name in networks}
    return torch.cat(positions), {name: torch.cat(parts) for name, parts in features.items()}


def cached(name: str | None, compute: Callable[[], Tensor]) -> Tensor:
    """`compute()`, or what it gave before under `name` (None: not cached)."""
    if name is None:
        return compute()
    path = cache_home() / "features" / f"{name}.safetensors"
    if path.is_file():
        return load_file(path)["features"]
    features = compute()
    try:
        with whole(path) as new:
            save_file({"features": features.contiguous()}, new)
    except InputError as err:
        print(f"note: features are not remembered: {err}", file=sys.stderr)
    return features
