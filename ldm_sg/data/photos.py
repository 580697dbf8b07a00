"""The photos that an annotation set was made of, out of their source shards."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_sg.data.images import BadImage, crop_resize, decode, to_tensor
from ldm_sg.data.shards import read_shard
from ldm_sg.data.tars import read_members
from ldm_sg.errors import InputError


def annotated_keys(shard: Path) -> list[str]:
    """The keys of an annotated shard, in order."""
    return [member.key for member in read_members(str(shard), {}) if member.ext == "latent.npy"]


def pictures(url: str, keys: set[str], size: int) -> Iterator[tuple[str, Tensor]]:
    """(key, uint8 [3, size, size]) of the wanted keys of a source shard."""
    for sample in read_shard(url, lambda *_: None):
        if sample.key in keys:
            try:
                yield sample.key, to_tensor(crop_resize(decode(sample.image, sample.key), size))
            except BadImage:  # a key that came twice: its annotated copy is the good one
                continue


def photos(folder: Path, manifest: Mapping[str, Any], indices: Tensor) -> Tensor:
    """uint8 [B, 3, size, size] of the images at `indices` [B] of the set: the squares that its first stage saw. Reads the shards
    that hold them. InputError where a source is gone."""
    wanted, found, start = set(indices.tolist()), {}, 0
    for shard, source in zip(manifest["shards"], manifest.get("source") or []):
        if not wanted - found.keys():
            break
        order = {key: start + i for i, key in enumerate(annotated_keys(folder / "shards" / shard["file"]))}
        keys = {key for key, index in order.items() if index in wanted}
        found |= {order[key]: image for key, image in pictures(source["url"], keys, manifest["size"])} if keys else {}
        start += len(order)
    if lost := wanted - found.keys():
        raise InputError(f"{folder}: the photo of image {min(lost)} is not where the set's manifest says")
    return torch.stack([found[index] for index in indices.tolist()])
