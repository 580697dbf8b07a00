"""What `annotate` keeps on disk between its passes, shard by shard, so that memory does not grow with their number and a
second run does only what is missing. In the folder of the annotation set, of shard 0:

    features/000000.npy      float16 [n, D], stays
    work/000000.latent.f16   raw float16 [n, C, h, w], deleted when the set is finished; .flip.f16 likewise
    work/000000.npz          what f observed of each image, and totals over the shard
    work/000000.json         keys, classes, skipped, shapes; written last: the shard is done"""

import io
import json
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from ldm_sg.data.latents import read_features
from ldm_sg.data.signals import Columns, concatenated, npy, to_arrays, to_columns
from ldm_sg.data.tars import is_remote
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import disk_errors, file_sha256, read_mapping, temporary, write_bytes, write_text

Sums = dict[str, np.ndarray]  # what is added up over images or shards


@dataclass
class ShardMeta:
    """One source shard after the streaming pass."""

    url: str
    keys: list[str]
    cls: list[int]  # -1 = unknown
    skipped: list[tuple[str, str, str]]  # (shard, key, reason)
    latent_shape: list[int] | None  # [C, h, w]; None when the shard had no image
    source: dict[str, Any]  # bytes, modified and sha256 of a local one


@dataclass
class Observed:
    """What f sees in n images while they pass, before it is fitted: g's image-level `features` [n, D], where it needs them;
    `columns`: name -> [n, ...], kept for each image; `totals`: name -> array, added up over all images."""

    columns: Columns = field(default_factory=dict)
    totals: Sums = field(default_factory=dict)
    features: Tensor | np.ndarray | None = None


class Stage:
    """The files of shard number `index` under OUT."""

    def __init__(self, out: Path, index: int):
        name = f"{index:06d}"
        self.index, self.tar = index, out / "shards" / f"{name}.tar"
        self.features = out / "features" / f"{name}.npy"
        self.latents = {"latent": out / "work" / f"{name}.latent.f16", "flip": out / "work" / f"{name}.flip.f16"}
        self.observed = out / "work" / f"{name}.npz"
        self.meta = out / "work" / f"{name}.json"

    @property
    def done(self) -> bool:
        return self.meta.is_file()

    def read_meta(self) -> ShardMeta:
        kinds = {"url": str, "keys": [str], "cls": [int], "skipped": [[str]], "latent_shape": (list, type(None))}
        return ShardMeta(**read_mapping(self.meta, kinds | {"source": dict}))

    def read_observed(self) -> Observed:
        """What f observed of the shard's images."""
        with np.load(self.observed, allow_pickle=False) as arrays:
            columns = to_columns({n: arrays[n] for n in arrays.files if "/" not in n})
            totals = {n.removeprefix("total/"): arrays[n] for n in arrays.files if n.startswith("total/")}
        rows = len(self.read_meta().keys) if self.features.is_file() else 0
        return Observed(columns, totals, read_features(self.features, rows) if rows else None)

    def read_latents(self, which: str, meta: ShardMeta) -> np.ndarray:
        """float16 [n, C, h, w], memory-mapped."""
        assert meta.latent_shape is not None
        return np.memmap(self.latents[which], np.float16, "r", shape=(len(meta.keys), *meta.latent_shape))


class StageWriter:
    """Takes a shard's batches as they come; `finish` gives the files their names, and without it none of them stays."""

    def __init__(self, stage: Stage, url: str):
        self.stage, self.meta = stage, ShardMeta(url, [], [], [], None, {})
        self.features: list[np.ndarray] = []
        self.columns: list[Columns] = []
        self.totals: Sums = {}
        self.files: dict[Path, IO[bytes]] = {}

    def __enter__(self) -> "StageWriter":
        return self

    def add(self, keys: list[str], cls: list[int], latents: dict[str, Tensor], observed: Observed) -> None:
        """A batch of B images: latents [B, C, h, w] normalised."""
        self.meta.keys += keys
        self.meta.cls += cls
        if isinstance(observed.features, Tensor):
            self.features.append(observed.features.half().cpu().numpy())
        self.meta.latent_shape = list(latents["latent"].shape[1:])
        self.columns.append(observed.columns)
        self.totals = added([self.totals, observed.totals])
        for which, values in latents.items():
            path = self.stage.latents[which]
            with disk_errors(path):
                if path not in self.files:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    self.files[path] = temporary(path).open("wb")
                self.files[path].write(values.half().cpu().contiguous().numpy().data)
                self.files[path].flush()

    def finish(self, skipped: list[tuple[str, str, str]]) -> None:
        self.meta.skipped = skipped
        for path, file in self.files.items():
            file.close()
            temporary(path).replace(path)
        if self.features:
            write_bytes(self.stage.features, npy(np.concatenate(self.features)))
        totals = {f"total/{name}": total for name, total in self.totals.items()}
        np.savez(observed := io.BytesIO(), **totals, **to_arrays(concatenated(self.columns)))
        write_bytes(self.stage.observed, observed.getvalue())
        self.meta.source = fingerprint(self.meta.url)
        write_text(self.stage.meta, json.dumps(asdict(self.meta)))

    def __exit__(self, *error: object) -> None:
        for path, file in self.files.items():
            file.close()
            temporary(path).unlink(missing_ok=True)


def fingerprint(url: str) -> dict[str, Any]:
    """What tells a local source shard from another one of its name; nothing of a remote one."""
    if is_remote(url):
        return {}
    stat = Path(url).stat()
    return {"bytes": stat.st_size, "modified": stat.st_mtime_ns, "sha256": file_sha256(url)}


def check_unchanged(url: str, known: dict[str, Any]) -> None:
    """InputError where a source shard is not the one whose `fingerprint` is known. It is read again only where its time alone
    is another."""
    if not isinstance(known.get("bytes"), int) or is_remote(url):  # an older set, or nothing to tell it by
        return
    stat = Path(url).stat()
    if stat.st_size == known["bytes"] and stat.st_mtime_ns == known.get("modified"):
        return
    if stat.st_size != known["bytes"] or file_sha256(url) != known.get("sha256"):
        raise InputError(
            f"source shard {url!r} has changed since it was annotated (then {known['bytes']:,} bytes, now {stat.st_size:,}): bring "
            "the old one back, or annotate into another out="
        )


def read_checkpoint(path: Path, of: str) -> dict[str, Any] | None:
    """What `write_checkpoint` left of the same fit, as `of` says; None where there is nothing, or what is of another one."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if name := archive.testzip():
                raise ValueError(f"{name} has another checksum")  # torch does not look at them
        there = torch.load(path, "cpu", weights_only=True)
        return there if there["of"] == of else None
    except Exception as err:  # zip and pickle errors, missing keys
        raise InputError(f"{path} is damaged: {one_line(err)[:200]}; remove it to begin this fit again") from err


def write_checkpoint(path: Path, of: str, state: dict[str, Any]) -> None:
    """Tensors and plain values, from which a fit that is killed goes on."""
    torch.save(state | {"of": of}, buffer := io.BytesIO())
    write_bytes(path, buffer.getvalue())


def not_finite(file: Path, row: int) -> InputError:
    return InputError(
        f"{file}: row {row} is NaN or infinite: g fails on that image; annotate into another out= with features.precision=fp32"
    )


def added(parts: Iterable[Sums]) -> Sums:
    """Name by name, and in this order."""
    sums = Counter[str]()
    for part in parts:
        sums.update(part)  # type: ignore[arg-type] # it adds arrays as well
    return dict(sums)  # type: ignore[arg-type]


def subset(count: int, limit: int, seed: int) -> np.ndarray:
    """Which of `count` images are learnt from: all, or `limit` drawn evenly without replacement; in rising order."""
    if count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def sample_features(all_stages: list[Stage], counts: list[int], limit: int, seed: int) -> np.ndarray:
    """At most `limit` features [n, D] float32, drawn evenly without replacement when there are more; one shard's file is
    open at a time."""
    chosen = subset(sum(counts), limit, seed)
    starts = np.concatenate([[0], np.cumsum(counts)])
    out: np.ndarray | None = None
    for stage, start, end in zip(all_stages, starts[:-1], starts[1:]):
        first, last = np.searchsorted(chosen, [start, end])
        if first == last:
            continue
        features = read_features(stage.features, end - start)
        if out is None:
            out = np.empty((len(chosen), features.shape[1]), np.float32)
        out[first:last] = features[chosen[first:last] - start]
        if len(bad := np.flatnonzero(~np.isfinite(out[first:last]).all(1))):
            raise not_finite(stage.features, int(chosen[first + bad[0]] - start))
    assert out is not None
    return out
