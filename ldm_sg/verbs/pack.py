"""pack: an image folder, a list, an LMDB, other shards, or a data set with boxes and masks -> source shards of square,
or whole, images."""

import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ldm_sg.commands import PackOptions
from ldm_sg.config import check_workers
from ldm_sg.data.datasets import Beside, open_source
from ldm_sg.data.images import MAX_SIDE
from ldm_sg.data.pack import FORMATS, Form, Summary, pack_source
from ldm_sg.errors import InputError, need_choice, need_within
from ldm_sg.executor import in_order
from ldm_sg.folder import locked


def pack(src: str | Path, dst: str | Path, **options: Any) -> Summary:
    """Packs `src` into DST/000000.tar, ...; what is finished already is kept. `options`: the other fields of PackOptions.

    An image is cropped to the one of the `buckets`, (width, height), that is nearest to its own shape, and each shard holds one.
    In a Pascal VOC folder objects marked difficult are kept, of COCO's boxes crowds left out. With executor=ray `workers` actors
    make a shard each, on a disk that all see; workers=0: this process."""
    asked = PackOptions(str(src), Path(dst), **options)
    check(asked)
    size, workers, whole = asked.size, asked.workers, asked.crop == "none"
    from torch import device

    started = time.monotonic()
    annotations, masks = (Path(path) if path is not None else None for path in (asked.annotations, asked.masks))
    beside = Beside(annotations, masks, asked.merge, asked.ignore_index, asked.split)
    source = open_source(asked.src, beside, asked.allow_damaged)
    with locked(dst):
        summary = pack_source(
            source,
            Path(dst).expanduser(),
            Form(size, asked.format, asked.quality, not whole, tuple(dict.fromkeys((w, h) for w, h in asked.buckets))),
            asked.shard_size,
            workers,
            asked.max_skipped,
            partial(in_order, settings=_settings(asked), device=device("cpu")) if asked.executor == "ray" else None,
        )
    seconds = time.monotonic() - started
    shape = f"with a short side of {size}" if whole else f"of {size} x {size}"
    if asked.buckets:
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


def check(asked: PackOptions) -> None:
    """InputError where values mean nothing."""
    need_choice("format", asked.format, FORMATS)
    need_choice("crop", asked.crop, ("square", "none"))
    need_within("size", asked.size, 8, MAX_SIDE)
    need_within("shard_size", asked.shard_size, 1, 1_000_000)
    need_within("quality", asked.quality, 1, 100)
    need_within("workers", asked.workers, -1, 1024)
    need_within("max_skipped", asked.max_skipped, 0, 1)
    need_within("ignore_index", asked.ignore_index or 0, 0, 255)
    for shape in asked.buckets:
        if len(shape) != 2 or not 8 <= min(shape) <= max(shape) <= MAX_SIDE:
            raise InputError(f"bucket {'x'.join(map(str, shape))}: WIDTHxHEIGHT, each from 8 to {MAX_SIDE} pixels")
    if asked.buckets and (asked.size != PackOptions.size or asked.crop == "none"):
        raise InputError(
            f"size={asked.size}, crop={asked.crop}: buckets say what images are cropped to; leave them out"
        )
    check_workers(_settings(asked))


def _settings(asked: PackOptions) -> SimpleNamespace:
    return SimpleNamespace(executor=asked.executor, processes=max(0, asked.workers), address=asked.address)
