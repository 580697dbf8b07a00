"""Images to evaluate or to compare with: a folder, webdataset shards, or what `ldm-sg sample` wrote."""

import contextlib
import functools
import itertools
import json
import os
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm_sg.data.images import BadImage, crop_resize, decode, read_bytes, to_tensor
from ldm_sg.data.pool import in_order
from ldm_sg.data.shards import count_images, expand, holds_shards, is_remote, leads_elsewhere, read_shard
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import cache_home, check, settings_sha256, whole

PREPROCESSING = {"crop": "centre square", "filter": "bicubic, antialiased", "version": 1}  # images.crop_resize
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
RECORDS = "samples.jsonl"
RUN_MARKS = ("checkpoints", "pipeline", "model_index.json")  # a run's own sample grids are no samples
MOST = 50_000  # real images, spread over the whole set
OnSkip = Callable[[str, str], None]  # (image, reason)


@dataclass(frozen=True)
class ImageSet:
    """Images in a fixed order. `records`: the lines of samples.jsonl, one an image, where the folder has them."""

    where: str  # as the user named it
    paths: tuple[str, ...]  # image files, or shards
    in_shards: bool
    records: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    strays: tuple[str, ...] = ()  # files of the folder that are none of `paths`

    def name(self, position: int) -> str:
        return f"image {position} of {self.where}" if self.in_shards else self.paths[position]

    @functools.cached_property
    def counts(self) -> list[int] | None:
        """Images of each of `paths` at most (damaged ones count), or None where only downloading would tell."""
        if not self.in_shards:
            return [1] * len(self.paths)
        return None if any(map(is_remote, self.paths)) else list(map(count_images, self.paths))

    @property
    def total(self) -> int | None:
        return None if self.counts is None else sum(self.counts)

    def ids(self) -> Tensor:
        """The cluster id each image was asked for [N]. Raises InputError where the set does not say."""
        if not self.records:
            said = f"no {RECORDS}, which says the cluster that each image was asked for"
            raise InputError(f"{self.where}: {said}: give a run, or what `ldm-sg sample` made")
        asked = [record.get("k") for record in self.records]
        for line, k in enumerate(asked, 1):
            if type(k) is not int or k < 0:
                raise InputError(f"{self.where}/{RECORDS}, line {line}: k = {k!r} is not one cluster id")
        return torch.tensor(asked)

    def sampling(self) -> dict[str, Any]:
        """w, steps, scheduler and seed, as far as the records tell; a list where they differ."""
        found: dict[str, Any] = {}
        for key in ("w", "steps", "scheduler", "seed"):
            values = list({json.dumps(r[key]): r[key] for r in self.records if key in r}.values())
            if values:
                found[key] = values[0] if len(values) == 1 else values
        return found


def open_images(where: str) -> ImageSet:
    """A folder (searched recursively; samples.jsonl's list where it has one), a folder of shards, shards by glob or URL.

    Raises InputError when there is nothing of the kind."""
    folder = Path(where).expanduser()
    if not folder.is_dir():
        return ImageSet(where, tuple(expand(where)), in_shards=True)
    if any((folder / name).exists() for name in RUN_MARKS):
        raise InputError(f"{where}: a run or pipeline, not images (and no complete pipeline to sample from)")
    if (folder / "manifest.yaml").is_file() and (folder / "shards").is_dir():
        raise InputError(f"{where}: an annotation set holds latents, not images: name the source shards it was made of")
    records = _records(folder / RECORDS) if (folder / RECORDS).is_file() else ()
    files = sorted(str(path) for path in folder.rglob("*") if path.is_file() and not _own(path.name))
    paths = [str(folder / record["file"]) for record in records]
    paths = paths or [file for file in files if Path(file).suffix.lower() in SUFFIXES]
    if paths:
        return ImageSet(where, tuple(paths), False, records, tuple(sorted({*files} - {*paths})))
    if holds_shards(where):
        return ImageSet(where, tuple(expand(where)), in_shards=True)
    raise InputError(f"{where}: no images in this folder ({', '.join(SUFFIXES)}), or shards of them (.tar, .parquet)")


def _own(name: str) -> bool:
    """What `sample` and `evaluate` leave beside images."""
    return name in (RECORDS, "grid.png") or name.startswith("evaluation")


def _records(path: Path) -> tuple[dict[str, Any], ...]:
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                records.append(json.loads(line))
            except ValueError as err:
                raise InputError(f"{where}: not JSON in UTF-8: {err}") from err
            check(records[-1], {"file": str}, where)
            if leads_elsewhere(records[-1]["file"]):
                raise InputError(f"{where}: {records[-1]['file']!r} is not in this folder")
    if not records:
        raise InputError(f"{path} is empty: no samples here")
    [(file, times)] = Counter(each["file"] for each in records).most_common(1)
    if times > 1:
        raise InputError(f"{path}: {file!r} is listed twice")
    return tuple(records)


def labels(images: ImageSet) -> Tensor:
    """The class of each image [N] by its position, -1 = not known: of a shard KEY.cls, of files the folder that each lies in.
    InputError where there are none."""
    numbers: dict[Path, int] = {}
    found = [] if images.in_shards else [numbers.setdefault(Path(path).parent, len(numbers)) for path in images.paths]
    for shard, count in zip(images.paths, images.counts or itertools.repeat(0)) if images.in_shards else ():
        own = [-1 if sample.cls is None else sample.cls for sample in read_shard(shard, lambda *_: None)]
        found += own + [-1] * (count - len(own))
    if len({*found} - {-1}) < 2:
        raise InputError(f"{images.where}: nmi needs at least two classes: KEY.cls in shards, or a folder a class")
    return torch.tensor(found)


def at(images: ImageSet, places: Collection[int], size: int, within: int | None = None) -> dict[int, Tensor]:
    """The images at these positions, seen as in `batches`."""
    chosen = _chosen(images, sys.maxsize, lambda *_: None)
    found = ((place, crop_resize(_open(data), size, within)) for place, (_, data) in chosen if place in places)
    return {place: to_tensor(image) for place, image in itertools.islice(found, len(places))}


def spread(total: int, limit: int) -> Sequence[int]:
    """`limit` positions spread evenly over range(total): sorted shards are not cut off at their first classes."""
    return range(total) if limit >= total else [i * total // limit for i in range(limit)]


def batches(
    images: ImageSet, size: int, batch_size: int, limit: int, on_skip: OnSkip, within: int | None = None,
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """(positions [B] long, uint8 [B, 3, size, size]) of at most `limit` images, spread over the whole set, and of these the
    `part`; `within` as in crop_resize.

    Remote shards, whose number of images is not known, give their first `limit`. Images that cannot be read are left
    out (a batch is short there) and reported. Threads read and decode two batches ahead: Pillow frees the interpreter."""

    def load(entry: tuple[int, tuple[str, Path | bytes]]) -> tuple[int, str, Tensor | str]:
        position, (name, data) = entry
        try:
            return position, name, to_tensor(crop_resize(_open(data), size, within))
        except BadImage as err:
            return position, name, err.reason

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        loaded = in_order(pool, load, _chosen(images, limit, on_skip, part), 2 * batch_size)
        while group := list(itertools.islice(loaded, batch_size)):
            good = {position: found for position, _, found in group if isinstance(found, Tensor)}
            for position, name, found in group:
                if position not in good:
                    on_skip(name, found)
            if good:
                yield torch.tensor(list(good)), torch.stack(list(good.values()))


def pictures(images: ImageSet, limit: int) -> Iterator[Image.Image]:
    """At most `limit` images as they are, spread as in `batches`; those that cannot be read are left out."""
    for _, (_, data) in _chosen(images, limit, lambda *_: None):
        with contextlib.suppress(BadImage):
            yield _open(data)


def _chosen(
    images: ImageSet, limit: int, on_skip: OnSkip, part: slice = slice(None)
) -> Iterator[tuple[int, tuple[str, Path | bytes]]]:
    """(position, (name, file or encoded image)) of at most `limit` images. Shards with none of them are not read, but those that
    seem empty are; the last one up to the first image beyond, so that what is damaged at its end is reported."""
    if images.total is None:
        every = (entry for shard in images.paths for entry in _encoded(shard, on_skip))
        yield from itertools.islice(enumerate(every), limit)
        return
    wanted, first = spread(images.total, limit)[part], 0
    if not images.in_shards:
        yield from ((i, (images.paths[i], Path(images.paths[i]))) for i in wanted)
        return
    keep, last = wanted if isinstance(wanted, range) else {*wanted}, max(wanted, default=-1)
    for path, count in zip(images.paths, images.counts or ()):
        holds = bisect_left(wanted, first) < bisect_left(wanted, first + count)
        for position, entry in enumerate(_encoded(path, on_skip), first) if holds or not count else ():
            if position > last:
                break
            if position in keep:
                yield position, entry
        first += count


def _open(source: Path | bytes) -> Image.Image:
    return decode(source if isinstance(source, bytes) else read_bytes(source))


def _encoded(shard: str, on_skip: OnSkip) -> Iterator[tuple[str, bytes]]:
    """(name, encoded image) of every image, in order."""
    for sample in read_shard(shard, lambda shard, key, reason: on_skip(f"{shard}: {key}".removesuffix(": "), reason)):
        yield f"{shard}: {sample.key}", sample.image


def first_size(images: ImageSet) -> int:
    """Side in pixels of the first readable image's centre square."""
    for image in pictures(images, sys.maxsize):
        return min(image.size)
    raise InputError(f"{images.where}: no readable image")


def fingerprint(images: ImageSet, **settings: Any) -> str | None:
    """A name for these images under these settings, for caching; None where files cannot be told to be unchanged."""
    if any(is_remote(path) for path in images.paths):
        return None
    files = [Path(path).resolve() for path in images.paths]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return settings_sha256([stats, PREPROCESSING, settings])


def remembered(images: ImageSet, compute: Callable[[], Mapping[str, Tensor]], **settings: Any) -> Mapping[str, Tensor]:
    """`compute()`, or what it gave before of these images under these settings."""
    if (name := fingerprint(images, **settings)) is None:
        return compute()
    path = cache_home() / "features" / f"{name}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except (OSError, SafetensorError) as err:
            print(f"note: {path} is damaged ({one_line(err)[:100]}) and made anew", file=sys.stderr)
    found = compute()
    try:
        with whole(path) as new:
            save_file({key: value.contiguous() for key, value in found.items()}, new)
    except InputError as err:
        print(f"note: features are not remembered: {err}", file=sys.stderr)
    return found
