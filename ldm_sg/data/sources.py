"""What can be packed: image folders, lists, LSUN's LMDB folders, other shards; folders with boxes and masks are in
datasets.py. A source names its items shard by shard; items are light (a path, an LMDB key, or the encoded sample) and
are read where they are decoded."""

import functools
import hashlib
import os
import random
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ldm_sg.data.boxes import Boxes
from ldm_sg.data.images import BadImage, read_bytes
from ldm_sg.data.shards import Damage, Sample, expand, is_remote, read_shard
from ldm_sg.errors import InputError, need_package
from ldm_sg.folder import read_mapping

SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif"),
    *(".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".avif"),
}
_SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Item:
    """One image to pack. `source` names it for people; what reads it is `path`, `path` + `record` (LMDB), or `sample`."""

    key: str
    source: str
    path: str = ""
    record: bytes | None = None
    sample: Sample | None = None
    cls: int | None = None
    problem: str = ""  # found before reading: why there is no image
    boxes: Boxes | None = None
    mask: str = ""  # path of its index PNG
    table: tuple[int, ...] = ()  # [256] what each index of the mask becomes, -1 = not allowed; () = itself

    def read(self) -> Sample:
        """The encoded image and what lies beside it. Raises BadImage when it is not there."""
        if self.problem:
            raise BadImage(self.problem)
        if self.sample is not None:
            return self.sample
        if self.record is None:
            image, mask = read_bytes(self.path), read_bytes(self.mask, "its mask ") if self.mask else None
            return Sample(self.key, image, self.cls, self.boxes.meta() if self.boxes else None, mask)
        with open_lmdb(self.path).begin(buffers=False) as transaction:
            data = transaction.get(self.record)
        if data is None:
            raise BadImage("not in the LMDB any more")
        return Sample(self.key, data, self.cls)


@dataclass
class Source(ABC):
    """Where images come from. `identity` is what makes it this source and no other (kept in pack.yaml)."""

    identity: dict[str, Any]
    total: int | None = None  # images, where it is known beforehand
    classes: list[str] = field(default_factory=list)  # names of the class folders, or of the boxes' labels
    ignored: int = 0  # files that are not called like images
    mask_classes: list[str] = field(default_factory=list)  # names of the masks' indices
    notes: list[str] = field(default_factory=list)  # what else to tell about it, in a few words each

    @abstractmethod
    def shards(self, size: int, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Iterator[Item]]]:
        """(file name, items) of every output shard of `size` images that is `wanted`, by its name; items are to be
        drawn before the next shard is."""


@dataclass
class Listed(Source):
    """A source that knows its images one by one."""

    @abstractmethod
    def records(self) -> Iterator[Any]:
        """What `item` is told of each image, in order: a name, a key."""

    @abstractmethod
    def item(self, record: Any) -> Item: ...

    def shards(self, size: int, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Iterator[Item]]]:
        records = self.records()
        for number in range(-(-(self.total or 0) // size)):
            chosen = islice(records, size)
            if wanted(shard_name(number)):
                yield shard_name(number), map(self.item, chosen)
            else:
                deque(chosen, maxlen=0)  # moves on


def make_key(name: str) -> str:
    """A file's relative path -> a key for tars and webdataset: no dots, slashes or spaces, at most 80 characters, and
    unique through eight digits of the path's hash (`a/b.jpg`, `a_b.jpg` and `a_b.png` stay three)."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(name)[0]).strip("_")  # noqa: PTH122
    return f"{stem[-71:] or 'image'}-{hashlib.sha1(name.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"


@dataclass
class FileSource(Listed):
    """Files that are all known beforehand; about 100 bytes of memory each."""

    root: Path = Path()
    names: list[str] = field(default_factory=list)  # relative to root
    labels: dict[str, int | None] = field(default_factory=dict)

    def records(self) -> Iterator[str]:
        return iter(self.names)

    def item(self, record: str) -> Item:
        return Item(make_key(record), record, path=str(self.root / record), cls=self.labels.get(record))


def open_folder(root: Path) -> Source:
    """Every image below a folder, in an order shuffled with a fixed seed, so that each shard is a mixture of classes; or the
    shards in it, where there are no images.

    When all images lie directly in sub-folders, two or more, those are classes."""
    others: list[str] = []
    names = list(walk(root, others))
    if not names and any(name.endswith(".tar") and "/" not in name for name in others):
        return ShardSource.open(str(root))
    if not names:
        found = f" among {len(others)} files" if others else ""
        raise InputError(f"no images in {root}{found} (looked for {' '.join(sorted(SUFFIXES))})")
    folders = {name.rpartition("/")[0] for name in names}
    classes = sorted(folders) if len(folders) > 1 and all(f and "/" not in f for f in folders) else []
    random.Random(_SHUFFLE_SEED).shuffle(names)
    index = {name: i for i, name in enumerate(classes)}
    labels = {name: index[name.partition("/")[0]] for name in names} if classes else {}
    identity = {"kind": "folder", "images": len(names), "digest": files_digest(root, names)}
    return FileSource(identity, len(names), classes, len(others), root=root, names=names, labels=labels)


def walk(folder: Path, others: list[str], prefix: str = "", above: tuple[tuple[int, int], ...] = ()) -> Iterator[str]:
    """Relative paths of images below `folder`, sorted within each folder; links are followed, loops of links are not."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        visible = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    for entry in visible:
        if entry.is_dir():
            yield from walk(Path(entry.path), others, f"{prefix}{entry.name}/", (*above, here))
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:  # noqa: PTH122
            yield prefix + entry.name
        else:
            others.append(prefix + entry.name)


def open_list(path: Path) -> Source:
    """A text file with one path a line (relative to the list's folder), and after a tab an integer label if wanted."""
    labels: dict[str, int | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="surrogateescape").splitlines(), 1):
        name, tab, label = line.strip().partition("\t")
        if not name:
            continue
        if name in labels:
            raise InputError(f"{path} line {number}: {name} is listed twice")
        try:
            labels[name] = int(label) if tab else None
        except ValueError:
            raise InputError(f"{path} line {number}: label {label!r} is not an integer") from None
    if not labels:
        raise InputError(f"{path}: an empty list")
    identity = {
        "kind": "list",
        "images": len(labels),
        "digest": files_digest(path.parent, list(labels), list(labels.values())),
    }
    return FileSource(identity, len(labels), root=path.parent, names=list(labels), labels=labels)


@dataclass
class LmdbSource(Listed):
    """LSUN's form: an LMDB folder whose values are encoded images. Keys are read as they are needed."""

    root: Path = Path()

    @classmethod
    def open(cls, root: Path) -> "Source":
        environment = open_lmdb(str(root))
        with environment.begin() as transaction, transaction.cursor() as cursor:
            count = environment.stat()["entries"]
            if not count:
                raise InputError(f"{root}: an empty LMDB")
            ends = [cursor.key().hex() for move in (cursor.first, cursor.last) if move()]
        return cls({"kind": "lmdb", "images": count, "digest": digest([*ends, str(count)])}, count, root=root)

    def records(self) -> Iterator[bytes]:
        with open_lmdb(str(self.root)).begin() as transaction, transaction.cursor() as cursor:
            yield from cursor.iternext(keys=True, values=False)

    def item(self, record: bytes) -> Item:
        name = record.decode("utf-8", "backslashreplace")
        safe = re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name)  # LSUN's keys are: they stay as they are
        return Item(name if safe else make_key(name), name, path=str(self.root), record=record)


@functools.lru_cache(maxsize=1)  # an LMDB may be open once in a process
def open_lmdb(folder: str) -> Any:
    """The environment, for reading; InputError without the package or when it is not an LMDB."""
    lmdb = need_package("lmdb", f"{folder}, an LMDB,", "lmdb")
    try:
        return lmdb.open(folder, readonly=True, lock=False, readahead=False)
    except lmdb.Error as err:
        raise InputError(f"{folder}: not a readable LMDB: {err}") from err


@dataclass
class ShardSource(Source):
    """Webdataset shards: each becomes one shard with the same keys, so the number of images a shard stays the same."""

    urls: list[str] = field(default_factory=list)
    allow_damaged: bool = False

    @classmethod
    def open(cls, urls: str) -> "Source":
        shards = expand(urls)
        sizes = ["" if is_remote(url) else str(Path(url).stat().st_size) for url in shards]
        names = [url if is_remote(url) else Path(url).name for url in shards]
        named = Path(shards[0]).with_name("classes.json")  # where pack itself wrote the shards
        known = read_mapping(named) if named.is_file() else {}
        identity = {"kind": "shards", "shards": len(shards), "digest": digest(names, sizes)}
        return cls(identity, None, known.get("classes", []), 0, known.get("mask_classes", []), urls=shards)

    def shards(self, size: int, wanted: Callable[[str], bool]) -> Iterator[tuple[str, Iterator[Item]]]:
        for number, url in enumerate(self.urls):
            if wanted(shard_name(number)):
                yield shard_name(number), _shard_items(url, self.allow_damaged)


def _shard_items(url: str, allow_damaged: bool) -> Iterator[Item]:
    problems: list[Item] = []

    def on_skip(shard: str, key: str, reason: str) -> None:
        if isinstance(reason, Damage) and not allow_damaged:
            raise InputError(f"{shard}: {reason}; mend it, or go on without what is lost by --allow-damaged")
        problems.append(Item(key, f"{shard}: {key}" if key else shard, problem=reason))

    for sample in read_shard(url, on_skip):
        yield from problems
        problems.clear()
        yield Item(sample.key, f"{url}: {sample.key}", sample=sample)
    yield from problems


def shard_name(number: int) -> str:
    """000000.tar and so on."""
    return f"{number:06d}.tar"


def files_digest(root: Path, names: list[str], *columns: list[Any]) -> str:
    """A hash over the names and sizes of files below `root`, and what else is in `columns`."""
    return digest(names, [_size(root / name) for name in names], *columns)


def _size(path: Path) -> int | None:
    """In bytes; None where there is no such file, which is told when it is read."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None


def digest(*columns: list[Any]) -> str:
    """A hash over the rows of equally long columns."""
    content = hashlib.sha256()
    for row in zip(*columns):
        content.update("\t".join(map(str, row)).encode("utf-8", "surrogateescape") + b"\n")
    return content.hexdigest()
