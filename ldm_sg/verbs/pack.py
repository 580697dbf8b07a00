"""pack: an image folder, a list, an LMDB, other shards, or a data set with boxes and masks -> source shards of square,
or whole, images."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from ldm_sg.config import check_workers
from ldm_sg.data.datasets import Beside, open_source
from ldm_sg.data.images import MAX_SIDE
from ldm_sg.data.pack import FORMATS, Form, Summary, pack_source
from ldm_sg.errors import InputError, choices
from ldm_sg.executor import in_order
from ldm_sg.folder import locked

CROPS = ("square", "none")


def pack(
    src: str | Path,
    dst: str | Path,
    size: int = 256,
    shard_size: int = 1000,
    workers: int = -1,
    max_skipped: float = 0.01,
    quality: int = 95,
    format: str = "jpg",
    annotations: str | Path | None = None,
    masks: str | Path | None = None,
    merge: str | None = None,
    ignore_index: int | None = None,
    split: str | None = None,
    allow_damaged: bool = False,
    crop: str = "square",
    buckets: Sequence[Sequence[int]] = (),
    executor: str = "local",
    address: str | None = None,
) -> Summary:
    """Packs `src` into DST/000000.tar, ...; what is finished already is kept.

    src: image folder, .txt list (path, optionally a tab and an integer label), LMDB folder, shards, or a Pascal VOC
    folder (objects marked difficult are kept). size: pixels. crop: square (centre), or none: the whole image, its short
    side `size`. buckets: in place of `size`, (width, height) of shapes: each image is cropped to the one that is nearest
    to its own, and each shard holds one. workers: processes, -1 = one a core, 0 = this one.
    executor: local, or ray: `workers` actors (-1 = as the cluster has room for) make a shard each, on a disk that all see;
    address: of its cluster.
    max_skipped: share of unusable images above which it fails. allow_damaged: of shards that are cut off, what is whole.

    Beside an image folder: annotations, a JSON of boxes (COCO's instances, crowds left out, or {"FILE NAME": [[x0, y0,
    x1, y1, label], ...]}); masks, a folder of index PNGs called like the images; merge, "cocostuff27" for COCO-Stuff's
    pixel maps; ignore_index, the masks' index that becomes 255; split, a text file that names the images to take, one a
    line. Of a VOC folder, split is a list in ImageSets/."""
    if format not in FORMATS:
        raise InputError(f"format {format!r}; {choices(format, FORMATS)}")
    if crop not in CROPS:
        raise InputError(f"crop {crop!r}; {choices(crop, CROPS)}")
    for name, value, low, high in (
        ("size", size, 8, MAX_SIDE),
        ("shard_size", shard_size, 1, 1_000_000),
        ("quality", quality, 1, 100),
        ("workers", workers, -1, 1024),
        ("max_skipped", max_skipped, 0, 1),
        ("ignore_index", 0 if ignore_index is None else ignore_index, 0, 255),
    ):
        if not low <= value <= high:
            raise InputError(f"{name}={value}: choose from {low} to {high}")
    for shape in buckets:
        if len(shape) != 2 or not 8 <= min(shape) <= max(shape) <= MAX_SIDE:
            raise InputError(f"bucket {'x'.join(map(str, shape))}: WIDTHxHEIGHT, each from 8 to {MAX_SIDE} pixels")
    if buckets and (size != 256 or crop != "square"):
        odd = f"size={size}" if size != 256 else f"crop={crop!r}"
        raise InputError(f"{odd}: buckets say what images are cropped to; leave it out")
    from torch import device

    settings = SimpleNamespace(executor=executor, processes=max(0, workers), address=address)
    check_workers(settings)
    started = time.monotonic()
    annotations, masks = (Path(path) if path is not None else None for path in (annotations, masks))
    source = open_source(str(src), Beside(annotations, masks, merge, ignore_index, split), allow_damaged)
    with locked(dst):
        summary = pack_source(
            source,
            Path(dst).expanduser(),
            Form(size, format, quality, crop == "square", tuple((w, h) for w, h in dict.fromkeys(map(tuple, buckets)))),
            shard_size,
            workers,
            max_skipped,
            partial(in_order, settings=settings, device=device("cpu")) if executor == "ray" else None,
        )
    seconds = time.monotonic() - started
    shape = f"of {size} x {size}" if crop == "square" else f"with a short side of {size}"
    if buckets:
        shape = "(" + ", ".join(f"{n} of {bucket}" for bucket, n in summary.buckets.items()) + ")"
    extra = f", {len(source.classes)} classes" if source.classes else ""
    extra += "".join(f", {note}" for note in source.notes)
    extra += f", {summary.empty_boxes} boxes without area in their image left out" if summary.empty_boxes else ""
    extra += f", {summary.enlarged} enlarged: they were smaller" if summary.enlarged else ""
    extra += f", {source.ignored} files that are not images left alone" if source.ignored else ""
    print(
        f"{dst}: {summary.images} images {shape} in {summary.shards} shards{extra}, "
        f"{summary.skipped} skipped, {seconds:.1f} s"
    )
    return summary
