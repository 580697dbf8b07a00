"""The signals that the options of `sample` mean."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_sg.annotate.kinds import load_annotator
from ldm_sg.data.images import BadImage, crop_resize_index, decode, decode_index, read_bytes
from ldm_sg.data.signals import PackedMasks, Signals
from ldm_sg.errors import InputError
from ldm_sg.guidance.spatial import VOID
from ldm_sg.sampling.options import SampleOptions

if TYPE_CHECKING:
    from ldm_sg.pipeline import SelfGuidedPipeline


def signals(pipe: "SelfGuidedPipeline", options: SampleOptions) -> Signals:
    """What is asked for: n samples of each cluster, of a box or mask, of an image's own signal, or n signals drawn from the
    training distribution. Parts that are not asked for are drawn."""
    if options.like:
        return _like(pipe, options.like)[torch.zeros(options.n, dtype=torch.long)]
    ids = [k for k in options.cluster for _ in range(options.n)] or None
    drawn = pipe.draw(len(ids) if ids else options.n, options.seed, clusters=ids)
    if options.vary == "layout" and pipe.spec.spatial is None:
        raise InputError(f"--vary layout: this run was trained without boxes or masks; it accepts {pipe.accepts()}")
    if options.vary == "content":
        drawn = drawn[torch.zeros(len(drawn), dtype=torch.long)]
    if options.box:
        _need_spatial(pipe, "box")
        drawn = drawn.replace(box=_box(options.box, pipe).expand(len(drawn), 1, 4))
    if options.mask:
        _need_spatial(pipe, "mask")
        mask = _read_mask(Path(options.mask), pipe)
        drawn = drawn.replace(mask=PackedMasks.of([mask] * len(drawn)))
    return drawn


def _need_spatial(pipe: "SelfGuidedPipeline", part: str) -> None:
    if pipe.spec.spatial != part:
        without = {None: "boxes or masks", "box": "masks", "mask": "boxes"}[pipe.spec.spatial]
        raise InputError(f"--{part}: this run was trained without {without}; it accepts {pipe.accepts()}")


def _box(corners: list[float], pipe: "SelfGuidedPipeline") -> Tensor:
    """x0, y0, x1, y1 in pixels -> [1, 1, 4] as shares of the sides."""
    x0, y0, x1, y1 = corners
    height, width = (cells * pipe.autoencoder.factor for cells in pipe.latent_shape[1:])
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(
            f"--box {x0:g},{y0:g},{x1:g},{y1:g}: needs 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}, in pixels"
        )
    return torch.tensor(corners).view(1, 1, 4) / torch.tensor([width, height, width, height])


def _read_mask(path: Path, pipe: "SelfGuidedPipeline") -> np.ndarray:
    """An index image of any size -> uint8 [S, S] of the run's mask size; InputError for ids that the run does not have."""
    try:
        mask = np.array(crop_resize_index(decode_index(read_bytes(path)), pipe.image_size))
    except BadImage as err:
        raise InputError(f"--mask {path}: {err.reason}") from err
    ids = np.unique(mask[mask != VOID])
    if not len(ids):
        raise InputError(f"--mask {path}: all of it is {VOID}, which means no class")
    if ids[-1] >= pipe.spec.num_labels:
        raise InputError(
            f"--mask {path}: class {ids[-1]} in it; this run has 0 to {pipe.spec.num_labels - 1} ({VOID} = none)"
        )
    return mask


def _like(pipe: "SelfGuidedPipeline", file: str) -> Signals:
    """The signal of an image file, by the run's own g and f."""
    annotator = load_annotator(pipe.annotator_folder, pipe.device)
    return annotator.of_image(read_photo("--like", file), pipe.image_size, pipe.source_size)


def read_photo(flag: str, file: str) -> Image.Image:
    """The image file that `flag` names."""
    try:
        return decode(read_bytes(file))
    except BadImage as err:
        raise InputError(f"{flag} {file}: {err.reason}") from err
