"""The photos that an annotation set was made of, out of their source shards."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ldm_sg.data.images import BadImage, crop_resize, decode, to_tensor
from ldm_sg.data.shards import read_shard
from ldm_sg.data.tars import read_members

if TYPE_CHECKING:
    from ldm_sg.data.latents import LatentSet


def images_at(latents: "LatentSet", places: Sequence[int], size: int) -> dict[int, Tensor]:
    """Index in the set -> uint8 [3, size, size], read again from the source shards, in the order of `places`."""
    found: dict[int, Tensor] = {}
    for shard in np.unique(latents.shards[list(places)]):
        first, keys = np.searchsorted(latents.shards, shard), annotated_keys(latents.paths[shard])
        index = {keys[i - first]: i for i in places if latents.shards[i] == shard}
        url = latents.manifest["shards"][shard]["url"]
        found |= {index[key]: image for key, image in pictures(url, set(index), size)}
    return {i: found[i] for i in places if i in found}


def annotated_keys(shard: Path) -> list[str]:
    """The keys of an annotated shard, in order."""
    return [member.key for member in read_members(str(shard), {}) if member.ext == "latent.npy"]


def pictures(url: str, keys: set[str], size: int) -> Iterator[tuple[str, Tensor]]:
    """(key, uint8 [3, size, size]) of the wanted keys of a source shard."""
    for sample in read_shard(url, lambda *_: None):
        if sample.key in keys:
            with suppress(BadImage):  # a key that came twice: its annotated copy is the good one
                yield sample.key, to_tensor(crop_resize(decode(sample.image, sample.key), size))
