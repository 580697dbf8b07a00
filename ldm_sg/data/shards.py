"""Source shards: webdataset tars of images, read one after the other, written whole or not at all."""

import functools
import glob
import io
import itertools
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np

from ldm_sg.data.boxes import crop_meta
from ldm_sg.data.images import BadImage, Shown, crop_resize_index, decode, decode_index, fitted, show
from ldm_sg.data.pool import DecoderPool, decoder_pool
from ldm_sg.errors import InputError, choices

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
OnSkip = Callable[[str, str, str], None]  # (shard, key or "" for the whole shard, reason)
_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")  # webdataset's rule: the key ends at the base name's first dot


@dataclass(frozen=True)
class Sample:
    """One image of a shard, still encoded, with what lies beside it."""

    key: str
    image: bytes
    cls: int | None = None
    meta: dict[str, Any] | None = None  # KEY.json
    mask: bytes | None = None  # KEY.mask.png


def expand(urls: str | Sequence[str]) -> list[str]:
    """A glob, brace list, folder, file or URL (or several, in a list or joined by `::`) -> shards, in order.

    Raises InputError when something named does not exist or matches nothing."""
    parts = urls.split("::") if isinstance(urls, str) else urls
    shards = [shard for part in parts for url in _braces(part) for shard in _expand_one(url)]
    if not shards:
        raise InputError("no shards given: name a glob, a brace list or a folder of .tar files")
    repeated = sorted({shard for shard in shards if shards.count(shard) > 1}) if len(set(shards)) < len(shards) else []
    if repeated:
        raise InputError(f"shard {repeated[0]!r} is named twice")
    return shards


def _braces(pattern: str) -> list[str]:
    import braceexpand  # comes with webdataset

    try:
        return list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError as err:
        raise InputError(f"shards {pattern!r}: unbalanced braces; write for example {{000000..000009}}.tar") from err


def _expand_one(url: str) -> list[str]:
    if is_remote(url):
        return [url]
    path = Path(url).expanduser()
    if path.is_dir():
        found = sorted(str(p) for p in path.glob("*.tar"))
        if not found:
            raise InputError(f"folder {url!r} has no .tar shards in it; `ldm-sg pack` makes them from images")
        return found
    if glob.has_magic(url) and not path.exists():
        found = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 (an absolute pattern)
        if not found:
            raise InputError(f"no file matches {url!r}")
        return found
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.tar")] if path.parent.is_dir() else []
        raise InputError(f"shard {url!r} not found" + (f"; {choices(str(path), near)}" if near else ""))
    return [str(path)]


def is_remote(url: str) -> bool:
    """True for what is not a local path: `scheme://...` and webdataset's `pipe:COMMAND`."""
    return "://" in url or url.startswith("pipe:")


def open_shard(url: str) -> IO[bytes]:
    """A readable stream of a local file or of any URL that webdataset or fsspec can open; InputError otherwise."""
    try:
        if not is_remote(url):
            return Path(url).open("rb")
        from webdataset.gopen import gopen, gopen_schemes

        if url.split(":", 1)[0] in gopen_schemes:
            return gopen(url, "rb")
        import fsspec

        return fsspec.open(url, "rb").open()
    except (OSError, ValueError, ImportError) as err:
        raise InputError(f"shard {url!r} cannot be opened: {err}") from err


class _StrictTarInfo(tarfile.TarInfo):
    """tarfile takes a damaged or missing header after the first member for the end of the archive; a cut-off shard
    must be told from a whole one, so here only the proper end mark ends it."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_StrictTarInfo":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as err:
            raise tarfile.ReadError(f"{err} at byte {tar.offset}") from err


def read_members(url: str) -> Iterator[tuple[str, str, bytes]]:
    """(key, extension in lower case, content) of a shard's files in order. Raises tarfile.TarError where it is damaged,
    after everything before the damage; InputError when it cannot be opened or the connection breaks."""
    try:
        with (
            open_shard(url) as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictTarInfo) as tar,
        ):
            for member in tar:
                match = _NAME.match(member.name)
                content = tar.extractfile(member) if match and member.isfile() else None
                if match and content is not None:
                    data = content.read()
                    if len(data) < member.size:
                        raise tarfile.ReadError(f"{member.name} is cut off after {len(data)} of {member.size} bytes")
                    yield match[1], match[2].lower(), data
    except (OSError, EOFError) as err:
        if is_remote(url):
            raise InputError(f"shard {url!r} broke off while reading: {err}") from err
        raise tarfile.ReadError(str(err)) from err


def read_shard(url: str, on_skip: OnSkip) -> Iterator[Sample]:
    """The samples of one webdataset shard, in order.

    A damaged or cut-off tar yields its whole members, then is reported by on_skip(shard, "", reason), as is a shard
    without any image; samples with no image, an unreadable cls or json, or a key seen before are reported by key."""
    seen: set[str] = set()
    try:
        for key, group in _grouped(read_members(url)):
            files: dict[str, bytes] = {}
            for ext, data in group:
                if ext in files:
                    on_skip(url, key, f"duplicate file {key}.{ext}: the first one is used")
                files.setdefault(ext, data)
            if key in seen:
                on_skip(url, key, "duplicate key: the first one is used")
                continue
            sample = _to_sample(url, key, files, on_skip)
            if sample is not None:
                seen.add(key)
                yield sample
    except tarfile.TarError as err:
        on_skip(url, "", f"damaged tar, {len(seen)} images before the damage are used: {err}")
    else:
        if not seen:
            on_skip(url, "", f"no image in this shard: expected KEY.{'|'.join(IMAGE_EXTENSIONS)}")


def _grouped(members: Iterator[tuple[str, str, bytes]]) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Neighbours of one key together; what came whole before an error is given before the error is raised."""
    key, group, damage = "", [], None
    try:
        for member_key, ext, data in members:
            if member_key != key and group:
                yield key, group
                group = []
            key = member_key
            group.append((ext, data))
    except tarfile.TarError as err:
        damage = err
    if group:
        yield key, group
    if damage is not None:
        raise damage


def _to_sample(url: str, key: str, files: dict[str, bytes], on_skip: OnSkip) -> Sample | None:
    image = next((files[ext] for ext in IMAGE_EXTENSIONS if ext in files), None)
    if image is None:
        on_skip(url, key, f"no image beside {', '.join(sorted(files))}")
        return None
    try:
        cls = int(files["cls"]) if "cls" in files else None
        meta = json.loads(files["json"]) if "json" in files else None
    except ValueError as err:
        on_skip(url, key, f"unreadable cls or json: {err}")
        return None
    return Sample(key, image, cls, meta, files.get("mask.png"))


class ShardWriter:
    """`with ShardWriter(path) as shard: shard.write(key, {ext: bytes})`: the tar appears under `path` when it is whole.

    Headers carry no time and no owner: the same content gives the same bytes. Any error removes the temporary file; a
    disk that is full or not writable raises InputError with the path and the space left."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f"{self.path.name}.tmp-{os.getpid()}")
        self.written = 0  # samples

    def __enter__(self) -> Self:
        with self._disk_errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.temporary.open("wb")
            self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)
        return self

    def write(self, key: str, files: dict[str, bytes]) -> None:
        """One sample: KEY.ext for each of `files`."""
        with self._disk_errors():
            for ext, data in files.items():
                info = tarfile.TarInfo(f"{key}.{ext}")
                info.size = len(data)
                self._tar.addfile(info, io.BytesIO(data))
        self.written += 1

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None) -> None:
        if kind is not None:
            self._discard()
            return
        with self._disk_errors():
            self._tar.close()
            self._file.close()
            self.temporary.replace(self.path)

    def _discard(self) -> None:
        try:
            self._file.close()
        except OSError:  # the disk is full: what was still in the buffer is not wanted any more
            pass
        finally:
            self.temporary.unlink(missing_ok=True)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            with disk_errors(self.path):
                yield
        except InputError:
            if hasattr(self, "_file"):
                self._discard()
            raise


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A disk that is full, read-only or gone while `path` is written: InputError with the path and the space left."""
    try:
        yield
    except OSError as err:
        raise InputError(f"{path}: cannot be written: {err.strerror or err}; {space_left(path)}") from err


def space_left(path: Path) -> str:
    """'1.2 GB left on its disk', for messages."""
    folder = next(p for p in path.absolute().parents if p.exists())
    return f"{shutil.disk_usage(folder).free / 1e9:.1f} GB left on its disk"


@dataclass(frozen=True)
class Truth:
    """What people said of one image, in the frame of its centre square; parts that the shard does not have are None."""

    labels: list[int] | None = None
    boxes: np.ndarray | None = None  # float32 [M, 4] as shares of the sides
    mask: np.ndarray | None = None  # uint8 [size, size], 255 = ignore
    whole_boxes: np.ndarray | None = None  # float32 [M', 4] as shares of the uncropped image's sides


@dataclass(frozen=True)
class ImageBatch:
    """Decoded images of one or more shards."""

    keys: list[str]
    images: "Tensor"  # uint8 [B, 3, size, size]
    cls: "Tensor"  # [B] long, -1 = unknown
    truth: list[Truth]  # empty unless asked for
    shown: list[Shown]


def image_batches(
    shards: Iterable[str],
    size: int,
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
    decoded = map(decode_one, batches) if isinstance(workers, int) else workers.in_order(decode_one, batches)
    yield from _tensors(decoded, on_skip)


@dataclass
class _Decoded:
    keys: list[str]
    shown: list[Shown]
    cls: list[int]
    truth: list[Truth]
    skipped: list[tuple[str, str, str]]


def _batched(samples: Iterator[tuple[str, Sample]], batch_size: int, truth: bool) -> Iterator[list[tuple[str, Sample]]]:
    """What the decoding processes need, and no more."""
    lean = samples if truth else ((shard, Sample(s.key, s.image, s.cls)) for shard, s in samples)
    while batch := list(itertools.islice(lean, batch_size)):
        yield batch


def _decode_batch(size: int, truth: bool, looks: dict[str, Any], batch: list[tuple[str, Sample]]) -> _Decoded:
    out = _Decoded([], [], [], [], [])
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
        out.cls.append(-1 if sample.cls is None else sample.cls)
    return out


def read_truth(sample: Sample, original: tuple[int, int], size: int) -> Truth:
    """Labels, boxes and mask of a sample whose image has `original` pixels, after `crop_resize` to `size`. BadImage where
    they have another form than `pack` gives them."""
    meta = crop_meta(sample.meta or {}, original, size)
    boxes = np.array([box[:4] for box in meta["boxes"]], np.float32).reshape(-1, 4) / size if "boxes" in meta else None
    labels = None
    if "labels" in meta or "boxes" in meta:
        found = [*meta.get("labels", []), *(box[4] for box in meta.get("boxes", []))]
        if not all(isinstance(label, int) and label >= 0 for label in found):
            raise BadImage(f"its json has labels that are not integers from 0: {found[:5]}")
        labels = sorted(set(found))
    mask = None
    if sample.mask is not None:
        mask = np.array(crop_resize_index(decode_index(sample.mask, original), size))
    whole = None
    if boxes is not None and sample.meta:
        sides = fitted(*original, size)
        all_boxes = [box[:4] for box in crop_meta(sample.meta, original, size, crop=False)["boxes"]]
        whole = np.array(all_boxes, np.float32).reshape(-1, 4) / np.array(sides * 2, np.float32)
    return Truth(labels, boxes, mask, whole)


def _tensors(decoded: Iterable[_Decoded], on_skip: OnSkip) -> Iterator[ImageBatch]:
    import torch

    for batch in decoded:
        for entry in batch.skipped:
            on_skip(*entry)
        if batch.keys:
            images = torch.from_numpy(np.stack([shown.square for shown in batch.shown]))
            yield ImageBatch(batch.keys, images, torch.tensor(batch.cls), batch.truth, batch.shown)
