"""Source shards: webdataset tars (or parquet tables) of images, read one after the other, written whole or not at all."""

import functools
import glob
import io
import itertools
import json
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ldm_sg.data.boxes import crop_meta
from ldm_sg.data.images import BadImage, Shown, Size, crop_resize_index, decode, decode_index, fitted, show, sides
from ldm_sg.data.parquet import count_rows, read_rows
from ldm_sg.data.pool import DecoderPool, decoder_pool
from ldm_sg.data.tars import MOST_IMAGE, MOST_TEXT, Command, Damaged, Member, is_remote, open_shard, read_members
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import whole

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EMPTY = f"no image in this shard: expected KEY.{'|'.join(IMAGE_EXTENSIONS)}"
OnSkip = Callable[[str, str, str], None]  # (shard, key or "" for the whole shard, reason)
PAUSES = (1, 5, 20)  # seconds before a remote shard that is cut off is fetched again
PARQUET = ".parquet"
INDEX = "shards.jsonl"  # what pack writes beside its shards: how many images each has
WANTED = {**dict.fromkeys((*IMAGE_EXTENSIONS, "mask.png"), MOST_IMAGE), "cls": MOST_TEXT, "json": MOST_TEXT}


@dataclass(frozen=True)
class Sample:
    """One image of a shard, still encoded, with what lies beside it."""

    key: str
    image: bytes
    cls: int | None = None
    meta: dict[str, Any] | None = None  # KEY.json
    mask: bytes | None = None  # KEY.mask.png


def expand(urls: str | Sequence[str]) -> list[str]:
    """A glob, brace list, folder, file or URL (or several, in a list or joined by `::`) -> shards, in order. Only for what a
    person named: its `pipe:COMMAND`s are run.

    Raises InputError when something named does not exist or matches nothing."""
    parts = urls.split("::") if isinstance(urls, str) else urls
    shards = [shard for part in parts for url in _braces(part) for shard in _expand_one(url)]
    if not shards:
        raise InputError("no shards given: name a glob, a brace list or a folder of .tar files")
    [(shard, times)] = Counter(shards).most_common(1)
    if times > 1:
        raise InputError(f"shard {shard!r} is named twice")
    return shards


def _braces(pattern: str) -> list[str]:
    import braceexpand  # comes with webdataset

    try:
        return list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError as err:
        raise InputError(f"shards {pattern!r}: unbalanced braces; write for example {{000000..000009}}.tar") from err


def _expand_one(url: str) -> list[str]:
    path = Path(url).expanduser()
    if url.startswith("pipe:"):
        return [Command(url)]
    if is_remote(url):
        found = _there(url)
    elif path.is_dir():
        # a folder that img2dataset filled has tables without images beside its tars
        found = sorted(map(str, path.glob("*.tar"))) or sorted(map(str, path.glob(f"*{PARQUET}")))
    elif path.is_file():
        found = [str(path)]
    else:
        found = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(url) else []  # noqa: PTH207 (absolute)
    if not found:
        raise InputError(f"no .tar or .parquet shards found at {url!r}; `ldm-sg pack` makes them from images")
    return found


def holds_shards(where: str) -> bool:
    """Whether this names shards, or a folder of them."""
    folder, ends = Path(where).expanduser(), (".tar", PARQUET)
    if folder.is_dir():
        return any(path.suffix in ends for path in folder.iterdir())
    return any(end in where for end in ends)


def _there(url: str) -> list[str]:
    """Of a remote glob, where the file system can list, what matches it."""
    if not glob.has_magic(url) or url.startswith(("http://", "https://")):
        return [url]
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url)
        return sorted(fs.unstrip_protocol(name) for name in fs.glob(path))
    except (OSError, ValueError, ImportError) as err:
        raise InputError(f"shards {url!r} cannot be listed: {one_line(err)}") from err


class Damage(str):
    """The reason of a skip that is a whole shard's: it is damaged or cut off, and images of it are lost."""


def read_shard(url: str, on_skip: OnSkip) -> Iterator[Sample]:
    """The samples of one webdataset shard, in order; a remote one that is damaged or cut off is fetched again.

    One that stays so yields its whole members, then on_skip(shard, "", Damage) is called for each image that is lost, or
    once where nothing tells how many there were; once too for a shard without any image. Samples with no image, an
    unreadable cls or json, a file that is too large, a key seen before or one that leads elsewhere are reported by key."""
    seen: set[str] = set()
    whole = 0
    try:
        for key, files, duplicates in _groups(url):
            for ext in duplicates:
                on_skip(url, key, f"duplicate file {key}.{ext}: the first one is used")
            whole += any(ext in files for ext in IMAGE_EXTENSIONS)
            if key in seen:
                on_skip(url, key, "duplicate key: the first one is used")
            elif sample := _to_sample(url, key, files, on_skip):
                seen.add(key)
                yield sample
    except Damaged as err:
        known = _images_in(url)
        lost = "how many are lost is not known" if known is None else f"{known - whole} of its {known} are lost"
        kind = "table" if url.endswith(PARQUET) else "tar"
        reason = Damage(f"damaged {kind}, {len(seen)} images before the damage are used, {lost}: {err}")
        for _ in range(1 if known is None else known - whole):  # none where only the end mark is gone
            on_skip(url, "", reason)
    else:
        if not seen:
            on_skip(url, "", EMPTY)


def _groups(url: str) -> Iterator[tuple[str, dict[str, Member], list[str]]]:
    """Neighbours of one key together: extension -> file, and the extensions that came twice. Of a shard that is fetched again,
    those that were not given yet."""
    given = 0
    for pause in (*PAUSES, None) if is_remote(url) else (None,):
        try:
            read = read_rows if url.endswith(PARQUET) else read_members
            for group in itertools.islice(_grouped(read(url, WANTED), pause is None), given, None):
                given += 1
                yield group
            return
        except Damaged as err:
            if pause is None:
                raise
            print(f"note: shard {url!r} is damaged or cut off ({err}): fetched again in {pause} s", file=sys.stderr)
            time.sleep(pause)


def _grouped(members: Iterator[Member], last: bool) -> Iterator[tuple[str, dict[str, Member], list[str]]]:
    """At damage the group that it fell into, which may lack a file, comes only where this is the `last` try."""
    for key, group in itertools.groupby(members, lambda member: member.key):
        files: dict[str, Member] = {}
        duplicates = []
        try:
            for member in group:
                if member.ext in files:
                    duplicates.append(member.ext)
                files.setdefault(member.ext, member)
        except Damaged:
            if last:
                yield key, files, duplicates
            raise
        yield key, files, duplicates


def _images_in(url: str) -> int | None:
    """How many images pack's shards.jsonl beside the shard says it has; None where there is none."""
    folder, _, name = url.rpartition("/")
    try:
        with open_shard(f"{folder}/{INDEX}" if folder else INDEX) as file:
            entries = [json.loads(line) for line in file.read(MOST_IMAGE).splitlines()]
        found = next(entry["images"] for entry in entries if entry["file"] == name)
        return found if type(found) is int and 0 <= found <= 10**6 else None
    except Exception:  # it only helps: whatever is wrong with it, there is none
        return None


def count_images(path: str) -> int:
    """Images in a local shard by its headers: seconds for a large one. Of a damaged one those before the damage, which
    `read_shard` reports."""
    if path.endswith(PARQUET):
        return count_rows(path)
    keys = set()
    with suppress(tarfile.TarError, OSError, EOFError), tarfile.open(path) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            key, _, extension = name.partition(".")
            if key and extension.lower() in IMAGE_EXTENSIONS:
                keys.add((folder, key))
    return len(keys)


def leads_elsewhere(key: str) -> bool:
    """Whether a file of that key would lie outside the folder that a tar is unpacked into."""
    return key.startswith("/") or ".." in key.split("/")


def _to_sample(url: str, key: str, files: dict[str, Member], on_skip: OnSkip) -> Sample | None:
    image = next((files[ext] for ext in IMAGE_EXTENSIONS if ext in files), None)
    read = [part for part in (image, *map(files.get, ("cls", "json", "mask.png"))) if part]
    reason = next((part.problem for part in read if part.problem), "")
    if leads_elsewhere(key):
        reason = "its key leads out of the folder that it is unpacked into"
    if image is None:
        reason = f"no image beside {', '.join(sorted(files)[:9])}"
    cls = meta = None
    try:
        if not reason:
            cls = int(files["cls"].data) if "cls" in files else None
            meta = json.loads(files["json"].data) if "json" in files else None
    except (ValueError, RecursionError) as err:
        reason = f"unreadable cls or json: {one_line(err)[:200]}"
    if cls is not None and not -(2**31) <= cls < 2**31:
        reason = f"unreadable cls or json: class {cls} is beyond {2**31 - 1}"
    if reason:
        on_skip(url, key, reason)
        return None
    assert image is not None
    return Sample(key, image.data, cls, meta, files["mask.png"].data if "mask.png" in files else None)


class ShardWriter:
    """`with ShardWriter(path) as shard: shard.write(key, {ext: bytes})`: the tar appears under `path` when it is whole.

    Headers carry no time and no owner: the same content gives the same bytes. Any error removes the temporary file; a
    disk that is full or not writable raises InputError with the path and the space left."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.written = 0  # samples

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            file = stack.enter_context(stack.enter_context(whole(self.path)).open("wb"))
            self._tar = stack.enter_context(tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT))
            self._stack = stack.pop_all()
        return self

    def write(self, key: str, files: dict[str, bytes]) -> None:
        """One sample: KEY.ext for each of `files`."""
        if leads_elsewhere(key):
            raise InputError(f"{self.path}: key {key!r} leads out of the folder that the shard is unpacked into")
        for ext, data in files.items():
            info = tarfile.TarInfo(f"{key}.{ext}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self.written += 1

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


@dataclass(frozen=True)
class Truth:
    """What people said of one image, in the frame of its centre square; parts that the shard does not have are None."""

    labels: list[int] | None = None
    boxes: np.ndarray | None = None  # float32 [M, 4] as shares of the sides
    mask: np.ndarray | None = None  # uint8 [size, size], 255 = ignore
    whole_boxes: np.ndarray | None = None  # float32 [M', 4] as shares of the uncropped image's sides


@dataclass
class ImageBatch:
    """Decoded images of one or more shards."""

    keys: list[str] = field(default_factory=list)
    cls: list[int] = field(default_factory=list)  # -1 = unknown
    truth: list[Truth] = field(default_factory=list)  # empty unless asked for
    shown: list[Shown] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)  # shard, key, reason

    @functools.cached_property
    def images(self) -> "Tensor":
        """uint8 [B, 3, size, size], or of a bucket [B, 3, height, width]."""
        import torch  # not in the processes that decode

        return torch.from_numpy(np.stack([shown.square for shown in self.shown]))


def image_batches(
    shards: Iterable[str],
    size: Size,
    batch_size: int,
    workers: int | DecoderPool,
    on_skip: OnSkip,
    truth: bool = False,
    **looks: Any,
) -> Iterator[ImageBatch]:
    """All good images in the order of the shards; with `truth`, labels, boxes and masks too, where the shards have them;
    `looks`: `view` and `whole` of `images.show`.

    `workers`: processes that decode (0 = this one, -1 = one a core, less one), or a pool from `decoder_pool`. A batch
    is short only where images were skipped and at the end. Memory: about two encoded and decoded batches a worker."""
    if isinstance(workers, int) and workers != 0:
        with decoder_pool(workers) as pool:
            yield from image_batches(shards, size, batch_size, pool, on_skip, truth, **looks)
        return
    samples = ((shard, sample) for shard in shards for sample in read_shard(shard, on_skip))
    decode_one = functools.partial(_decode_batch, size, truth, looks)
    batches = _batched(samples, batch_size, truth)
    for batch in map(decode_one, batches) if isinstance(workers, int) else workers.in_order(decode_one, batches):
        for entry in batch.skipped:
            on_skip(*entry)
        if batch.keys:
            yield batch


def _batched(samples: Iterator[tuple[str, Sample]], batch_size: int, truth: bool) -> Iterator[list[tuple[str, Sample]]]:
    """What the decoding processes need, and no more."""
    lean = samples if truth else ((shard, Sample(s.key, s.image, s.cls)) for shard, s in samples)
    while batch := list(itertools.islice(lean, batch_size)):
        yield batch


def _decode_batch(size: Size, truth: bool, looks: dict[str, Any], batch: list[tuple[str, Sample]]) -> ImageBatch:
    out = ImageBatch()
    for shard, sample in batch:
        try:
            image = decode(sample.image)
            shown = show(image, size, **looks)
            if truth:
                out.truth.append(read_truth(sample, image.size, size))
        except BadImage as err:
            out.skipped.append((shard, sample.key, err.reason))
            continue
        out.shown.append(shown)
        out.keys.append(sample.key)
        out.cls.append(-1 if sample.cls is None else max(-1, sample.cls))
    return out


def read_truth(sample: Sample, original: tuple[int, int], size: Size) -> Truth:
    """Labels, boxes and mask of a sample whose image has `original` pixels, after `crop_resize` to `size`. BadImage where
    they have another form than `pack` gives them."""
    own = sample.meta if isinstance(sample.meta, dict) else {}
    meta = crop_meta(own, original, size)
    labels = None
    if "labels" in meta or "boxes" in meta:
        found = [*meta.get("labels", []), *(box[4] for box in meta.get("boxes", []))]
        if not all(isinstance(label, int) and label >= 0 for label in found):
            raise BadImage(f"its json has labels that are not integers from 0: {found[:5]}")
        labels = sorted(set(found))
    mask = None
    if sample.mask is not None:
        mask = np.array(crop_resize_index(decode_index(sample.mask, original), size))
    short = min(sides(size))
    whole_boxes = _shares(crop_meta(own, original, short, crop=False), fitted(*original, short))
    return Truth(labels, _shares(meta, sides(size)), mask, whole_boxes)


def _shares(meta: dict[str, Any], sides: tuple[int, int]) -> np.ndarray | None:
    if "boxes" not in meta:
        return None
    return np.array([box[:4] for box in meta["boxes"]], np.float32).reshape(-1, 4) / np.array(sides * 2, np.float32)
