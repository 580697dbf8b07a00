"""Annotation sets by index: latents and signals straight out of the tars, in any order, with flat memory.

Shards are read with `pread` at remembered offsets rather than through a memory map: what has been read does not count
as this process's memory, a thousand shards need no address space, and a file that someone shortens meanwhile gives an
error instead of a bus error."""

import functools
import hashlib
import io
import json
import math
import os
import resource
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm_sg.data.photos import images_at
from ldm_sg.data.progress import finished_manifest
from ldm_sg.data.remote import FILE, RemoteSet, listing
from ldm_sg.data.signals import Columns, PackedMasks, Signals, columns, extension, npy, stacked, to_arrays, to_columns
from ldm_sg.data.tars import is_remote
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import check, file_sha256, read_mapping, whole, write_bytes, write_json, write_text
from ldm_sg.guidance.signal import Guidance, GuidanceSpec
from ldm_sg.guidance.spatial import Crops

LATENT, FLIP = "latent.npy", "flip.npy"
_WHERE = np.dtype([("shard", np.int32), ("latent", np.int64), ("flip", np.int64)])
MANIFEST = {"hash": str, "guidance": dict, "latent_shape": [int], "flips": bool, "num_images": int}
SHARDS, CHECKED = "shards.jsonl", "index/checked.json"
_NPY_HEADER = 256  # more than the header of a plain array of few dimensions


def set_hash(shard_hashes: Iterable[str]) -> str:
    """The hash of an annotation set: sha256 over its shards' hex digests, in order."""
    return hashlib.sha256("".join(shard_hashes).encode()).hexdigest()


class LatentSet:
    """An annotation set. Indices count its samples in the order of the shards.

    `signals`, `spec`, `manifest`, `latent_shape` (C, h, w), `flips`, `hash`; where images have several shapes (`buckets`), all
    `shapes`, the most frequent first, which is `latent_shape`. Raises InputError
    when `annotate` has not finished, or the files are not those that the manifest describes: sizes are always compared,
    contents at the first opening, and both results are kept in FOLDER/index, which annotate makes (about 20 s a million images).

    A folder may be a URL: its shards come as they are read, and `room` bytes of them are kept."""

    def __init__(self, folder: str | Path, room: int = 50 * 10**9, manifest: dict[str, Any] | None = None):
        """manifest: of a set that is just being finished."""
        self.remote = RemoteSet(str(folder), room) if is_remote(str(folder)) else None
        self.folder = self.remote.copy() if self.remote else Path(folder)
        self.manifest = manifest or read_manifest(self.folder)
        self.paths = _checked_shards(self.folder, self.manifest, there=self.remote is None)
        self.hash: str = self.manifest["hash"]
        self.spec = GuidanceSpec.from_dict(self.manifest["guidance"], str(self.folder))
        self.latent_shape: tuple[int, int, int] = tuple(self.manifest["latent_shape"])
        self._shard_shapes = [tuple(e.get("latent_shape") or self.latent_shape) for e in self.manifest["shards"]]
        self.flips = bool(self.manifest["flips"])
        found = self._index()
        self._where = found.pop("where")
        self.signals = Signals.from_columns(self.spec, found, len(self._where))
        self.shapes, self._bucket_of_shard = self._shapes()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_open = max(1, soft // 4)
        if self.remote:  # a file that is open takes its room even when it is gone
            self.remote.entries = self.manifest["shards"]
            self._max_open = max(1, min(self._max_open, room // max(entry["bytes"] for entry in self.remote.entries)))
        self._files: dict[int, int] = {}  # shard -> file descriptor, oldest first
        self._features: dict[Path, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._where)

    def __repr__(self) -> str:
        shape, spec = ", ".join("x".join(map(str, s)) for s in self.shapes), self.spec
        labels = f"{spec.num_labels:,} labels" if spec.num_labels else "no labels"
        return f"LatentSet({str(self.folder)!r}: {len(self):,} latents of {shape}, {spec.kind}, {labels})"

    def images(self, indices: Tensor) -> Tensor:
        """The photos themselves, uint8 [B, 3, size, size] of `indices` [B], out of the source shards; for a few, to look at."""
        found = images_at(self, indices.tolist(), self.manifest["size"])
        return torch.stack([found[i] for i in indices.tolist()])

    @property
    def shards(self) -> np.ndarray:
        """The place in `paths` of each sample's shard [N], rising."""
        return self._where["shard"]

    def __getitem__(self, index: int) -> tuple[Tensor, Guidance]:
        """latent [C, h, w] float32 (normalised) and a Guidance of one sample."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        at = torch.tensor([index % len(self)])
        return self.latents(at)[0], self.guidance(at)

    def guidance(self, indices: Tensor, flip: Tensor | None = None, crops: Crops | None = None) -> Guidance:
        """The signals of `indices` [B] on the latent grid; of the mirrored image where `flip` [B] bool is set; then of
        `crops`."""
        return self.signals.guidance(self.latent_shape[1:], indices, flip, crops)

    def latents(self, indices: Tensor, flip: Tensor | None = None) -> Tensor:
        """Latents [B, C, h, w] float32 of `indices` [B], which have one shape; of the mirrored image where `flip` [B] bool is set."""
        if flip is not None and not self.flips:
            raise InputError(f"{self.folder} has no latents of mirrored images: annotate again with flips=true")
        wanted = self._where[indices.numpy()]
        offsets = wanted["latent"] if flip is None else np.where(flip.numpy(), wanted["flip"], wanted["latent"])
        buckets = self.buckets(indices).unique().tolist()
        assert len(buckets) <= 1, "images of several shapes in one batch"
        out = np.empty((len(indices), *self.shapes[buckets[0] if buckets else 0]), np.float16)
        for row, shard, offset in zip(out, wanted["shard"].tolist(), offsets.tolist()):
            if os.preadv(self._file(shard), [row], offset) != row.nbytes:
                raise InputError(f"{self.paths[shard]} has become shorter since it was opened")
        return torch.from_numpy(out).float()

    def buckets(self, indices: Tensor) -> Tensor:
        """Of which of `shapes` the images at `indices` [B] are, [B]."""
        return torch.from_numpy(self._bucket_of_shard[self._where["shard"][indices.numpy()]])

    def _shapes(self) -> tuple[list[tuple[int, int, int]], np.ndarray]:
        """`shapes`, and the place in it of each shard's."""
        self.counts = np.bincount(self._where["shard"], minlength=len(self.paths))  # images of each shard [S]
        often = Counter({self.latent_shape: 0})
        for shape, images in zip(self._shard_shapes, self.counts.tolist()):
            often[shape] += images
        shapes = [shape for shape, images in often.most_common() if images]
        return shapes, np.array([shapes.index(shape) if shape in shapes else 0 for shape in self._shard_shapes])

    def _index(self) -> Columns:
        """`where` (_WHERE [N]) and the signals, kept in FOLDER/index under the set's hash; made again where they are not of as
        many images as the manifest says."""
        names = ["where", *columns(self.spec), *["mask_size", "mask_ends"] * (self.spec.spatial == "mask")]
        of = hashlib.sha256(f"{self.hash} {self._shard_shapes}".encode()).hexdigest()[:16]  # it is checked against both
        saved = {name: self.folder / "index" / f"{name}-{of}.npy" for name in names}
        with suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
            found = self._mapped(saved)
            if found["where"].dtype == _WHERE and {len(c) for c in found.values()} == {self.manifest["num_images"]}:
                return found
        if self.remote:
            raise InputError(f"{self.remote.url}: its index is not of this set: give the command that annotated it")
        with ExitStack() as stack:
            if not os.access(self.folder, os.W_OK):
                folder = Path(stack.enter_context(TemporaryDirectory()))  # what is mapped stays when its file goes
                saved = {name: folder / path.name for name, path in saved.items()}
            self._write_index(saved)
            return self._mapped(saved)

    def _mapped(self, saved: dict[str, Path]) -> Columns:
        """Columns that are not read before they are used, and then shared by all ranks and workers of a machine."""
        modes: dict[str, Any] = {"where": "r", "mask": "r", "mask_size": None, "mask_ends": None}
        return to_columns({name: np.load(path, mmap_mode=modes.get(name, "c")) for name, path in saved.items()})

    def _write_index(self, saved: dict[str, Path]) -> None:
        """Shard by shard into files of as many rows as the manifest says that there are images; masks are gathered before."""
        rows, at, masks = self.manifest["num_images"], 0, []
        with ExitStack() as files:
            columns: dict[str, np.ndarray] = {}
            for shard, path in enumerate(tqdm(self.paths, "index", disable=len(self.paths) < 17)):
                part = self._index_shard(path, shard)
                n = len(part["where"])
                if at + n > rows:
                    raise InputError(f"{self.folder}: its shards hold more images than its manifest says ({rows})")
                if "mask" in part:
                    masks.append(part.pop("mask"))
                for name, column in part.items():
                    if name not in columns:
                        new, shape = files.enter_context(whole(saved[name])), (rows, *column.shape[1:])
                        columns[name] = np.lib.format.open_memmap(new, "w+", column.dtype, shape)
                        if hasattr(os, "posix_fallocate"):  # not on macOS
                            with new.open("r+b") as file:  # a full disk is told here: within a map it is a bus error
                                os.posix_fallocate(file.fileno(), 0, new.stat().st_size)
                    if column.shape[1:] != columns[name].shape[1:]:
                        raise InputError(f"{self.folder}: signals of different shapes in its shards")
                    columns[name][at : at + n] = column
                at += n
            if at != rows or not rows:
                raise InputError(f"{self.folder}: its shards hold {at} images, its manifest says {rows}")
        for name, array in to_arrays({"mask": PackedMasks.concatenate(masks)}).items() if masks else ():
            write_bytes(saved[name], npy(array))

    def _index_shard(self, path: Path, shard: int) -> Columns:
        """`where`: offsets of the array data of every latent (and flip) in one shard; and the signals themselves."""
        signals: dict[str, list[Any]] = {extension(name): [] for name in columns(self.spec)}
        offsets: dict[str, list[int]] = {LATENT: [], FLIP: []}
        with path.open("rb", buffering=0) as file:
            for ext, offset, size in _members(file.fileno(), path):
                if ext in signals:
                    signals[ext].append(_read_signal(ext, os.pread(file.fileno(), size, offset), path))
                elif ext in offsets:
                    dtype, shape, length = _read_header(os.pread(file.fileno(), _NPY_HEADER, offset), path)
                    wanted = self._shard_shapes[shard]
                    if (dtype, shape) != (np.float16, wanted) or size != length + 2 * math.prod(wanted):
                        raise InputError(f"{path}: a {ext} is {dtype} {shape}, the manifest says float16 {wanted}")
                    offsets[ext].append(offset + length)
        n = len(offsets[LATENT])
        if any(len(column) != n for column in signals.values()) or (self.flips and len(offsets[FLIP]) != n):
            expected = ", ".join([*signals, *([FLIP] if self.flips else [])])
            raise InputError(f"{path}: not every sample has {expected} beside its latent")
        where = np.empty(n, _WHERE)
        where["shard"], where["latent"] = shard, offsets[LATENT]
        where["flip"] = offsets[FLIP] if self.flips else -1
        try:
            found = {name: stacked(name, signals[extension(name)]) for name in columns(self.spec) if n}
        except (ValueError, AssertionError) as err:
            raise InputError(f"{path}: signals of different shapes in it") from err
        return {"where": where, **found}

    def features(self, indices: Tensor | None = None) -> Tensor:
        """g's image-level features [B, D] float32 of `indices` [B], or of all; InputError where the set was made without g."""
        out, starts = [], np.cumsum(self.counts) - self.counts
        for i in range(len(self)) if indices is None else indices.tolist():
            shard = self.shards[i]
            path = self.folder / "features" / f"{self.paths[shard].stem}.npy"
            if path not in self._features:
                if not path.is_file():
                    why = "this set was annotated without g, or its features were removed"
                    why = "of a remote set there are none here: copy it to this machine" if self.remote else why
                    raise InputError(f"{path} not found: {why}")
                dim = (self.manifest.get("features") or {}).get("dim")
                self._features[path] = read_features(path, int(self.counts[shard]), dim)
            out.append(self._features[path][i - starts[shard]])
        found = torch.from_numpy(np.stack(out).astype(np.float32))
        if not found.isfinite().all():
            raise InputError(f"{self.folder}/features: NaN or infinity in them: annotate again")
        return found

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            if len(self._files) >= self._max_open:
                os.close(self._files.pop(next(iter(self._files))))
            self._files[shard] = self.remote.open(shard) if self.remote else os.open(self.paths[shard], os.O_RDONLY)
        return self._files[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}, "_features": {}}  # another process opens its own

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)


def read_features(path: Path, rows: int | None = None, dim: int | None = None) -> np.ndarray:
    """g's features of a shard's images, floating point [rows, dim] (None = any), memory-mapped; InputError for any other file."""
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as err:  # numpy raises what it likes at a header; objects cannot be mapped, nor what is cut off
        raise InputError(f"{path} is damaged: {one_line(err)[:200]}: annotate again") from err
    fits = found.ndim == 2 and all(want in (None, n) for want, n in zip((rows, dim), found.shape))
    if not fits or not np.issubdtype(found.dtype, np.floating):
        raise InputError(f"{path}: {found.dtype} {found.shape}, not features of {rows} images: annotate again")
    return found


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """FOLDER/shards.jsonl, a line a shard out of manifest["shards"], and then manifest.yaml, all else: the set is finished."""
    write_text(folder / SHARDS, "".join(json.dumps(entry) + "\n" for entry in manifest["shards"]))
    header = {key: value for key, value in manifest.items() if key != "shards"}
    text = yaml.safe_dump(header, sort_keys=False, width=118, default_flow_style=None)
    write_text(folder / "manifest.yaml", text)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote: manifest.yaml of an annotation set, and under "shards" its entries. InputError where there is
    none, as `annotate` writes it last."""
    path, lines = finished_manifest(folder), folder / SHARDS
    manifest = read_mapping(path, MANIFEST)
    for key in ("features", "annotator", "autoencoder"):
        check(manifest.get(key), (dict, type(None)), f"{path}: {key}")
    try:
        entries = [json.loads(line) for line in lines.read_text().splitlines()]
    except (OSError, ValueError, RecursionError) as err:
        raise InputError(f"{lines}: missing or damaged ({one_line(err)[:100]}); annotate again") from err
    check(entries, [FILE], str(lines))
    if odd := [entry["file"] for entry in entries if Path(entry["file"]).name != entry["file"]]:
        raise InputError(f"{lines}: shard {odd[0]!r} is no file in shards/")
    shapes = [manifest["latent_shape"], *(e["latent_shape"] for e in entries if "latent_shape" in e)]
    if not all(_is_shape(shape) and shape[0] == shapes[0][0] for shape in shapes):
        raise InputError(f"{path}: latent_shape is not (C, h, w)")
    return manifest | {"shards": entries}


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n >= 1 for n in shape)


def _checked_shards(folder: Path, manifest: dict[str, Any], there: bool) -> list[Path]:
    """The shards' paths, after comparing them, where they are `there`, with what the manifest says of them."""
    changed = "changed since annotate wrote it; annotate again, or give the run the set it was made for"
    entries = manifest["shards"]
    if set_hash(entry["sha256"] for entry in entries) != manifest["hash"]:
        raise InputError(f"{folder / 'manifest.yaml'} has been {changed}")
    paths = [folder / "shards" / entry["file"] for entry in entries]
    if not there:
        return paths
    now: dict[str, Any] = {}
    try:
        known = read_mapping(folder / CHECKED)
    except InputError:  # not there yet, or damaged
        known = {}
    for path, entry in zip(tqdm(paths, "verify", disable=len(paths) < 17, unit="shard"), entries):
        if not path.is_file():
            raise InputError(f"{path} is missing: the annotation set has {changed}")
        now[path.name] = _mark(path, entry["sha256"])
        good = known.get(path.name) == now[path.name] or file_sha256(path) == entry["sha256"]
        if path.stat().st_size != entry["bytes"] or not good:
            raise InputError(f"{path} has {changed}")
    if now != known and os.access(folder, os.W_OK):
        write_json(folder / CHECKED, now)
    return paths


def _mark(path: Path, sha256: str) -> list[Any]:
    stat = path.stat()  # ctime: no copy and no program keeps it
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, sha256]


def finish(folder: Path, manifest: dict[str, Any]) -> None:
    """Makes the set of shards that were just written, and hashed for `manifest`: their index, and the manifest, which comes last."""
    marks = {entry["file"]: _mark(folder / "shards" / entry["file"], entry["sha256"]) for entry in manifest["shards"]}
    write_json(folder / CHECKED, marks)
    LatentSet(folder, manifest=manifest)
    write_manifest(folder, manifest | {"files": listing(folder)})


def _members(file: int, path: Path) -> Iterator[tuple[str, int, int]]:
    """(extension, offset of the content, size) of the files in a tar that `ShardWriter` wrote: POSIX headers, the full
    name of a long key in a pax header before its own. `tarfile` does this too, five times slower."""
    at, long_name, end = 0, b"", os.fstat(file).st_size
    while (header := os.pread(file, 512, at)) and header[0]:
        try:
            size = int(header[124:135], 8)
            if not 0 <= size <= end - at - 512:
                raise ValueError
        except ValueError as err:
            raise InputError(f"{path}: damaged tar header at byte {at}") from err
        if header[156:157] == b"x":
            long_name = os.pread(file, size, at + 512).partition(b" path=")[2].partition(b"\n")[0]
        else:
            name = long_name or header[:100].rstrip(b"\0")
            yield name.rpartition(b"/")[2].partition(b".")[2].decode(errors="replace"), at + 512, size
            long_name = b""
        at += 512 + -(-size // 512) * 512


def _read_signal(ext: str, data: bytes, path: Path) -> np.ndarray:
    if ext == "mask.png":
        try:
            return np.asarray(Image.open(io.BytesIO(data), formats=("PNG",)))
        except Exception as err:  # damaged files make Pillow raise anything
            raise InputError(f"{path}: holds a mask that cannot be decoded") from err
    dtype, shape, length = _read_header(data, path)
    try:
        return np.frombuffer(data, dtype, offset=length).reshape(shape)
    except ValueError as err:
        raise InputError(f"{path}: holds an array that is cut off") from err


def _read_header(data: bytes, path: Path) -> tuple[np.dtype, tuple[int, ...], int]:
    """Start of a .npy file -> dtype, shape, length of the header."""
    length = 10 + int.from_bytes(data[8:10], "little")  # format 1.0, which numpy writes for plain arrays
    return *_parse_header(data[:length], path), length


@functools.lru_cache(maxsize=64)  # all latents of a shard share theirs
def _parse_header(header: bytes, path: Path) -> tuple[np.dtype, tuple[int, ...]]:
    try:
        stream = io.BytesIO(header)
        np.lib.format.read_magic(stream)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as err:  # numpy tokenizes and evaluates it: TokenError, SyntaxError, TypeError ...
        raise InputError(f"{path}: holds something that is not a plain .npy array") from err
    if fortran or dtype.hasobject:
        raise InputError(f"{path}: holds a Fortran-ordered or object array")
    return dtype, shape
