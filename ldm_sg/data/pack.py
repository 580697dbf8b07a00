"""Images of any source -> square, or whole, images in webdataset shards, over all cores, resumable, with flat memory.

Processes decode, crop and encode small chunks, and this process writes, shard after shard; on Ray a shard is a task. A shard that is whole and
has its line in shards.jsonl is never made again."""

import functools
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from ldm_sg.data.boxes import count_empty, crop_meta
from ldm_sg.data.images import (
    BadImage,
    Size,
    crop_or_fit,
    crop_resize_index,
    decode,
    decode_index,
    enlarges,
    nearest_shape,
)
from ldm_sg.data.pool import DecoderPool, cores
from ldm_sg.data.shards import INDEX, ShardWriter
from ldm_sg.data.sources import Item, Source
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import claim, disk_errors, read_mapping, write_text

FORMATS = ("jpg", "png", "webp")
_CHUNK = 16  # images a process works on at a time
_LOGS = (INDEX, "skipped.jsonl")
Made = tuple[dict[str, Any], list[dict[str, str]]]  # of a shard what `Log.add` is told
Make = Callable[[str], Callable[[str], Made]]  # a worker for shards, by their names


@dataclass(frozen=True)
class Form:
    """What every packed image looks like."""

    size: int
    format: str
    quality: int
    crop: bool = True  # to the centre square; without it `size` is the short side
    buckets: tuple[tuple[int, int], ...] = ()  # widths and heights; each image goes to the nearest, in place of `size`

    @property
    def least(self) -> int:
        """Twice the pixels that are kept: more are not decoded."""
        return 2 * max((side for shape in self.buckets for side in shape), default=self.size)

    def shape(self, image: Image.Image) -> Size:
        """What an image is cropped to."""
        return nearest_shape(*image.size, self.buckets) if self.buckets else self.size

    def settings(self) -> dict[str, Any]:
        """What decides the pixels."""
        own = asdict(self) | {"buckets": list(map(name_of, self.buckets))}
        return {key: value for key, value in own.items() if key != ("size" if self.buckets else "buckets")}

    def encode(self, image: Image.Image) -> bytes:
        """RGB image -> file content; JPEG keeps full colour resolution (4:4:4)."""
        buffer, kind = io.BytesIO(), {"jpg": "JPEG"}.get(self.format, self.format)
        image.save(buffer, kind, quality=self.quality, subsampling=0, compress_level=3)  # each format takes its own
        return buffer.getvalue()


def name_of(shape: tuple[int, int]) -> str:
    """80x48 of (80, 48)."""
    return "{}x{}".format(*shape)


@dataclass(frozen=True)
class Packed:
    """One item's files for the shard, or why there are none."""

    key: str
    source: str
    files: dict[str, bytes] | None
    reason: str = ""
    empty_boxes: int = 0  # those with no area inside their image
    enlarged: bool = False  # it was smaller than it is now
    bucket: str = ""


@dataclass
class Summary:
    """Totals of a pack, those of earlier runs included."""

    images: int = 0
    skipped: int = 0
    shards: int = 0
    empty_boxes: int = 0
    enlarged: int = 0
    buckets: dict[str, int] = field(default_factory=dict)  # images of each


def pack_source(
    source: Source, dst: Path, form: Form, shard_size: int, workers: int, max_skipped: float,
    beside: Callable[[Make, list[str]], Iterator[Made]] | None = None,
) -> Summary:  # fmt: skip
    """Makes what is missing of DST/*.tar, shard for shard, each by all `workers`, or many at once by `beside`; InputError when DST
    belongs to another pack, or too much is unreadable."""
    settings = {"source": source.identity, **form.settings(), "shard_size": shard_size}
    claim(dst, "pack.yaml", {"version": 1, "settings": settings}, free=("done",))
    named = {"classes": source.classes, "mask_classes": source.mask_classes}
    if names := {kind: known for kind, known in named.items() if known}:
        write_text(dst / "classes.json", json.dumps(names, indent=1, ensure_ascii=False))
    log = Log(dst)
    allowed = None if source.total is None else max_skipped * source.total
    with tqdm(total=source.total, initial=log.total["images"] + log.total["skipped"], desc="pack", unit="image") as bar:
        if beside:
            todo = [name for name, _ in source.shards(shard_size, log.lacks)]
            shards = beside(functools.partial(_packer, source, dst.absolute(), form, shard_size), todo)
        else:
            shards = _here(source.shards(shard_size, log.lacks), dst, form, workers, bar.update)
        for made in shards:
            log.add(*made)
            bar.update(log.total["images"] + log.total["skipped"] - bar.n)
            if allowed is not None and log.total["skipped"] > allowed:
                break  # it can only get worse
    total = Summary(**log.total, buckets=dict(log.buckets.most_common()))
    _check(total, dst, max_skipped)
    finish(dst, total)
    return total


def _here(
    shards: Iterable[tuple[str, Iterator[Item]]], dst: Path, form: Form, workers: int, told: Callable[[int], object]
) -> Iterator[Made]:
    """By processes that share each shard, or by this one."""
    work = functools.partial(_pack_chunk, form)
    with DecoderPool(workers if workers > 0 else cores()) if workers else nullcontext() as pool:
        results = pool.in_order(work, _chunks(shards)) if pool else map(work, _chunks(shards))
        for name, group in itertools.groupby(results, key=lambda result: result[0]):
            yield _write_shard(dst / name, (packed for _, chunk in group for packed in chunk), told)


def _packer(source: Source, dst: Path, form: Form, size: int, _: str) -> Callable[[str], Made]:
    """A worker that makes whole shards, each asked for by its name."""

    def work(wanted: str) -> Made:
        name, items = next(source.shards(size, wanted.__eq__))
        return _write_shard(dst / name, (pack_item(form, item) for item in items))

    return work


def _check(total: Summary, dst: Path, max_skipped: float) -> None:
    seen = total.images + total.skipped
    if total.skipped > max_skipped * seen or not total.images:
        first = next(iter(_read_lines(dst / _LOGS[1])), {})
        raise InputError(
            f"{total.skipped} of {seen} images could not be used ({total.skipped / max(1, seen):.1%}), more than "
            f"max_skipped={max_skipped:g} allows; the first: {first.get('source')}: {first.get('reason')}; all are in "
            f"{dst / _LOGS[1]}; mend them and pack into another folder, or allow more"
        )


def _chunks(shards: Iterable[tuple[str, Iterator[Item]]]) -> Iterator[tuple[str, list[Item]]]:
    for name, items in shards:
        while chunk := list(itertools.islice(items, _CHUNK)):
            yield name, chunk


def _pack_chunk(form: Form, chunk: tuple[str, list[Item]]) -> tuple[str, list[Packed]]:
    name, items = chunk
    return name, [pack_item(form, item) for item in items]


def pack_item(form: Form, item: Item) -> Packed:
    """Reads, decodes, crops and encodes one item with what lies beside it."""
    empty_boxes = 0
    try:
        sample = item.read()
        marked = item.boxes or sample.meta or sample.mask  # places in pixels of the whole image
        image = decode(sample.image, least=0 if marked else form.least)
        drawn = item.boxes.size if item.boxes else None
        if drawn not in (None, image.size):
            raise BadImage("its boxes are of {} x {} pixels, the image has {} x {}".format(*drawn, *image.size))
        shape = form.shape(image)
        small = crop_or_fit(image, shape, form.crop)
        files = {form.format: form.encode(small)}
        if sample.cls is not None:
            files["cls"] = str(sample.cls).encode()
        if sample.meta is not None:
            files["json"] = json.dumps(crop_meta(sample.meta, image.size, shape, form.crop)).encode()
            empty_boxes = count_empty(sample.meta, image.size)
        if sample.mask is not None:
            mask = renumber(decode_index(sample.mask, image.size), item.table)
            buffer = io.BytesIO()
            crop_resize_index(mask, shape, form.crop).save(buffer, format="PNG")
            files["mask.png"] = buffer.getvalue()
    except BadImage as err:
        return Packed(item.key, item.source, None, err.reason)
    bucket = name_of(small.size) if form.buckets else ""
    return Packed(item.key, item.source, files, "", empty_boxes, enlarges(*image.size, shape), bucket)


def renumber(mask: Image.Image, table: tuple[int, ...]) -> Image.Image:
    """An index image's indices, or what `table` [256] makes of them, as greyscale (a palette that is shorter than its
    indices would be written wrongly). Raises BadImage at an index that the table has as -1."""
    indices = np.asarray(mask)
    if table:
        unknown = [i for i in np.unique(indices).tolist() if table[i] < 0]
        if unknown:
            raise BadImage(f"its mask has index {unknown[0]}, which --merge does not know")
        indices = np.array(table).astype(np.uint8)[indices]
    return Image.fromarray(indices)


def _write_shard(path: Path, results: Iterable[Packed], told: Callable[[int], object] = int) -> Made:
    """One shard, with buckets one of each shape that occurs; none is written without an image."""
    skipped, noted = [], Counter[str]()
    writers: dict[str, ShardWriter] = {}
    with ExitStack() as stack:
        for packed in results:
            told(1)
            if packed.files is None:
                skipped.append({"shard": path.name, "source": packed.source, "reason": packed.reason})
                continue
            if packed.bucket not in writers:
                writer = ShardWriter(path.with_name(_file(path.name, packed.bucket)))
                writers[packed.bucket] = stack.enter_context(writer)
            writers[packed.bucket].write(packed.key, packed.files)
            noted.update(empty_boxes=packed.empty_boxes, enlarged=packed.enlarged)
    buckets = {bucket: writer.written for bucket, writer in writers.items()}
    line: dict[str, Any] = {"file": path.name, "images": sum(buckets.values()), "skipped": len(skipped)}
    return line | ({"buckets": buckets} if any(buckets) else {}) | {name: n for name, n in noted.items() if n}, skipped


def _file(name: str, bucket: str) -> str:
    """000000-80x48.tar of 000000.tar and 80x48."""
    return f"{name.removesuffix('.tar')}-{bucket}.tar" if bucket else name


class Log:
    """shards.jsonl (file, images, skipped, empty_boxes, enlarged, buckets: the images of each of the files that it is parted
    into) and skipped.jsonl (shard, source, reason): what is finished.

    Both are appended to after a shard is whole; a shard whose line did not get written any more is made again."""

    def __init__(self, dst: Path):
        self.dst, self.done, self.total, self.buckets = dst, set[str](), Counter[str](), Counter[str]()
        shards = [line for line in _read_lines(dst / _LOGS[0]) if not line["images"] or self._there(line)]
        for line in shards:
            self._count(**line)
        skipped = [line for line in _read_lines(dst / _LOGS[1]) if line["shard"] in self.done]
        for path, lines in zip((dst / name for name in _LOGS), (shards, skipped)):
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def _there(self, line: dict[str, Any]) -> bool:
        return all((self.dst / _file(line["file"], bucket)).is_file() for bucket in line.get("buckets", [""]))

    def lacks(self, file: str) -> bool:
        return file not in self.done

    def add(self, line: dict[str, Any], skipped: list[dict[str, str]]) -> None:
        """Records a finished shard."""
        for name, lines in zip(reversed(_LOGS), (skipped, [line])):
            with disk_errors(self.dst / name), (self.dst / name).open("a") as log:
                log.writelines(json.dumps(entry) + "\n" for entry in lines)
        self._count(**line)

    def _count(self, file: str, buckets: dict[str, int] | None = None, **counts: int) -> None:
        self.done.add(file)
        self.buckets.update(buckets or {})
        self.total.update(counts, shards=len(buckets) if buckets else counts["images"] > 0)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; the last one may have been cut off by a kill."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]
    except (ValueError, RecursionError) as err:
        raise InputError(f"{path} is damaged: {one_line(err)[:200]}; pack into another folder") from err


def finish(dst: Path, total: Summary) -> None:
    """Adds the totals to pack.yaml: its `done` says that the pack is complete."""
    content = read_mapping(dst / "pack.yaml")
    done = {name: count for name, count in asdict(total).items() if count or name in ("images", "skipped", "shards")}
    write_text(dst / "pack.yaml", yaml.safe_dump({**content, "done": done}, sort_keys=False))
