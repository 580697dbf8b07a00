"""The photos that an annotation set was made of, out of their source shards."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ldm_sg.data.images import BadImage, crop_resize, decode, to_tensor
from ldm_sg.data.shards import Sample, read_shard
from ldm_sg.data.tars import read_members
from ldm_sg.errors import InputError

if TYPE_CHECKING:
    from ldm_sg.data.latents import LatentSet


def photos_at(latents: "LatentSet", places: Sequence[int], size: int) -> Iterator[tuple[int, Tensor, Sample]]:
    """(index in the set, uint8 [3, size, size], what lies beside it) of those of `places` that are still there, read again from
    the source shards, in the order of these."""
    for shard in np.unique(latents.shards[list(places)]):
        first, keys = np.searchsorted(latents.shards, shard), annotated_keys(latents.paths[shard])
        index = {keys[i - first]: i for i in places if latents.shards[i] == shard}
        for sample in read_shard(latents.manifest["shards"][shard]["url"], lambda *_: None):
            if sample.key in index:
                with suppress(BadImage):  # a key that came twice: its annotated copy is the good one
                    yield index[sample.key], to_tensor(crop_resize(decode(sample.image, sample.key), size)), sample


def images_at(latents: "LatentSet", places: Sequence[int], size: int) -> dict[int, Tensor]:
    """Index in the set -> uint8 [3, size, size], in the order of `places`. InputError where one is not in its shard any more."""
    found = {i: image for i, image, _ in photos_at(latents, places, size)}
    lost = next((i for i in places if i not in found), None)
    if lost is not None:
        raise InputError(f"{latents.folder}: the photo of image {lost} is not where the set's manifest says")
    return {i: found[i] for i in places}


def annotated_keys(shard: Path) -> list[str]:
    """The keys of an annotated shard, in order."""
    return [member.key for member in read_members(str(shard), {}) if member.ext == "latent.npy"]
