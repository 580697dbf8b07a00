"""The streaming pass of annotate: shards are read and decoded ahead, in other processes, while g and the autoencoder compute;
what they make goes to disk batch by batch."""

import itertools
import multiprocessing
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ldm_sg.annotate.annotator import Annotator, Study
from ldm_sg.annotate.stage import StageWriter
from ldm_sg.annotate.views import Views
from ldm_sg.autoencoder import Autoencoder, load_autoencoder, measure_normalisation, measure_round_trip
from ldm_sg.autoencoder.manifest import blurred
from ldm_sg.config import AnnotateConfig
from ldm_sg.data.images import BadImage, crop_resize, decode, to_float, to_tensor
from ldm_sg.data.pool import cores, decoder_pool
from ldm_sg.data.shards import Damage, ImageBatch, count_images, image_batches, is_remote, read_shard
from ldm_sg.errors import InputError
from ldm_sg.hardware import use_bf16

PIXELS = 2**18  # encoded at once on a CPU: with TAESD at 256 px twice as fast as whole batches
CALIBRATION_SHARDS = 32
CALIBRATION_IMAGES = 256  # that an autoencoder without mean and std is measured on: 262,144 places of a 32x32 latent
ROUND_TRIP_IMAGES = 64
Item = TypeVar("Item")


def first_shape(url: str) -> tuple[int, int] | None:
    """Width and height of a shard's first image, if it has one."""
    for sample in read_shard(url, lambda *_: None):
        with suppress(BadImage):  # the pass will report it
            return decode(sample.image, sample.key).size
    return None


def first_size(shards: list[str], buckets: bool = False) -> int:
    """Short side of the first image of the first shard that has one, with buckets of the largest: the most frequent shape's."""
    by_bytes = sorted(shards, key=lambda url: 0 if is_remote(url) else -Path(url).stat().st_size) if buckets else shards
    if shape := next(filter(None, map(first_shape, by_bytes)), None):
        return min(shape)
    raise InputError(f"no image in {shards[0]!r}" + f" or the {len(shards) - 1} others" * (len(shards) > 1))


def prepare_autoencoder(cfg: AnnotateConfig, shards: list[str], size: int, device: torch.device) -> Autoencoder:
    """The first stage with its normalisation, kept in OUT/autoencoder from the first run on."""
    folder = Path(cfg.out) / "autoencoder"
    if (folder / "manifest.yaml").is_file():
        return load_autoencoder(str(folder)).to(device, memory_format=torch.channels_last)
    autoencoder = load_autoencoder(cfg.autoencoder).to(device, memory_format=torch.channels_last)
    few = max(1, PIXELS // size**2) if device.type == "cpu" else cfg.features.batch_size

    def batches(images: int, label: str) -> Iterator[Tensor]:
        bar = tqdm(calibration_images(shards, size, images), label, unit=" images", mininterval=1)
        parts = iter(lambda: list(itertools.islice(bar, few)), [])
        return (to_float(torch.stack(part)) for part in parts)

    with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(cfg.precision, device)):
        if not autoencoder.normalised:
            measure_normalisation(autoencoder, batches(CALIBRATION_IMAGES, "measuring latents"))
        if autoencoder.kind != "patch":  # which loses nothing
            measure_round_trip(autoencoder, batches(ROUND_TRIP_IMAGES, "measuring the round trip"))
    if warning := blurred(autoencoder.manifest):
        print(f"note: {warning}", file=sys.stderr)
    autoencoder.save(folder)
    return autoencoder


def calibration_images(shards: list[str], size: int, images: int) -> Iterator[Tensor]:
    """About so many, uint8 [3, size, size], from all over the set: from as many shards as CALIBRATION_SHARDS, evenly
    spread, and where there are fewer, so that reading them to the end is cheap, evenly spread inside each."""
    chosen = [shards[i * len(shards) // CALIBRATION_SHARDS] for i in range(CALIBRATION_SHARDS)]
    chosen = list(dict.fromkeys(chosen))
    each = images // len(chosen)
    for url in chosen:
        count = expected_images([url]) if len(chosen) < CALIBRATION_SHARDS else None
        step = max(1, -(-(count or 0) // each))
        for sample in itertools.islice(read_shard(url, lambda *_: None), step // 2, each * step, step):
            with suppress(BadImage):  # the pass will report it
                yield to_tensor(crop_resize(decode(sample.image, sample.key), size))


@dataclass
class End:
    """Of a shard."""

    skipped: list[tuple[str, str, str]]
    damage: str  # why it is not to be used, if that is so


class _Refused(Exception):
    """Damage that is not allowed, on its way out of the reading."""


def batches_of(study: Study, annotator: Annotator, todo: list[int]) -> Iterator[ImageBatch | End]:
    """The batches (`image_batches`) of each of the shards `todo`, one after the other, and its end."""
    cfg, g, skipped = study.config, study.extractor, list[tuple[str, str, str]]()
    workers = cfg.workers  # of the cores that are ours: other processes on this machine do the same
    if workers < 0:
        workers = max(int(cfg.processes <= 1), cores() // max(1, cfg.processes) - 1)
    looks = {"view": g.size, "whole": annotator.whole and g.any_shape} if g else {}

    def on_skip(*entry: str) -> None:
        if isinstance(entry[2], Damage) and not cfg.allow_damaged:
            raise _Refused(entry[2])
        skipped.append(entry)  # type: ignore[arg-type]

    with nullcontext(0) if workers == 0 else decoder_pool(workers) as pool:
        reading = (cfg.features.batch_size, pool, on_skip, annotator.reads_truth)
        for index in todo:
            damage = ""
            size = (first_shape(study.shards[index]) if cfg.buckets else None) or study.size
            try:
                yield from image_batches([study.shards[index]], size, *reading, **looks)
            except _Refused as err:
                damage = str(err)
            yield End(skipped.copy(), damage)
            skipped.clear()


def ahead(source: Iterator[Item], depth: int = 4) -> Iterator[Item]:
    """`source` run in a thread of its own, at most `depth` batches ahead: reading goes on while the networks compute."""
    items: queue.SimpleQueue[Item | BaseException | None] = queue.SimpleQueue()
    room, stop = threading.Semaphore(depth), threading.Event()

    def run() -> None:
        try:
            with closing(source):
                for item in source:
                    items.put(item)
                    room.acquire()
                    if stop.is_set():
                        return
            items.put(None)
        except BaseException as err:  # handed to the thread that asked
            items.put(err)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (item := items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            room.release()
            yield item
    finally:
        stop.set()
        room.release()
        thread.join(timeout=2)  # it may wait for a server; it ends with the process


def extract(study: Study, autoencoder: Autoencoder, annotator: Annotator, todo: list[int]) -> list[tuple[int, str]]:
    """The pass over the shards `todo`: features, latents and what f observes to disk. Returns those that are damaged, and how."""
    cfg, shards, extractor = study.config, study.shards, study.extractor
    bf16 = use_bf16(cfg.precision, autoencoder.mean.device)
    source, damaged = ahead(batches_of(study, annotator, todo)), []
    total = expected_images([shards[index] for index in todo])
    alone = multiprocessing.parent_process() is None  # of several workers the parent has a bar
    with closing(source), tqdm(desc="annotate", total=total, unit=" images", mininterval=1, disable=not alone) as bar:
        for done, index in enumerate(todo):
            with StageWriter(study.stages[index], shards[index]) as writer:
                while not isinstance(batch := next(source), End):
                    images = to_float(batch.images.to(autoencoder.mean.device))
                    observed = annotator.observe(extractor, Views.of(images, batch.shown), batch)
                    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
                        latents = encode(autoencoder, images, cfg.flips)
                    writer.add(batch.keys, batch.cls, latents, observed)
                    bar.update(len(batch.keys))
                if batch.damage:
                    damaged.append((index, batch.damage))
                else:
                    writer.finish(batch.skipped)
            bar.total = round(bar.n / (done + 1) * len(todo))  # a better guess than the first, and right at the end
    return damaged


def expected_images(shards: list[str]) -> int | None:
    """About how many images there are: those of the first shard, times how much larger all of them are; None where that is
    not to be had at once."""
    if any(is_remote(url) for url in shards):
        return None
    first, sizes = count_images(shards[0]), [Path(url).stat().st_size for url in shards]
    return round(first * sum(sizes) / max(sizes[0], 1)) or None


@torch.no_grad()
def encode(autoencoder: Autoencoder, images: Tensor, flips: bool) -> dict[str, Tensor]:
    """Normalised latents [B, C, h, w] of the images and, with flips, of their mirror images."""
    height, width = images.shape[-2:]
    chunk = max(1, PIXELS // (height * width)) if images.device.type == "cpu" else len(images)

    def latents(batch: Tensor) -> Tensor:
        parts = batch.contiguous(memory_format=torch.channels_last).split(chunk)
        return torch.cat([autoencoder.encode(part) for part in parts])

    return {"latent": latents(images)} | ({"flip": latents(images.flip(-1))} if flips else {})
