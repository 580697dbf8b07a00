"""The raw signals of many images, compact in memory and on disk; a batch of them becomes a Guidance on the latent grid."""

import dataclasses
import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file, save
from torch import Tensor

from ldm_sg.errors import InputError
from ldm_sg.folder import WEIGHTS
from ldm_sg.guidance.signal import Guidance, GuidanceSpec
from ldm_sg.guidance.spatial import Crops, box_coverage, concept_ids, mask_coverage, present

Sample = dict[str, np.ndarray]  # one image's signals: those of `columns(spec)`
Columns = dict[str, Any]  # those of N images: arrays [N, ...], and PackedMasks for `mask`


def columns(spec: GuidanceSpec) -> tuple[str, ...]:
    """The parts of an image's signal: `k` (id, or multi-hot [K]), `box` float32 [M, 4] as shares of the sides, `mask` uint8
    [H, W] (k is then what occurs in it), `feature` float16 [D] of unit length."""
    parts = {"k": spec.num_labels and spec.spatial != "mask", "box": spec.spatial == "box"}
    parts |= {"mask": spec.spatial == "mask", "feature": spec.feature_dim}
    return tuple(name for name, there in parts.items() if there)


def files_of(sample: Sample) -> dict[str, bytes]:
    """A sample's signals as files of an annotated shard: KEY.k.npy, KEY.box.npy, KEY.feature.npy, KEY.mask.png."""
    return {extension(name): (png if name == "mask" else npy)(value) for name, value in sample.items()}


def extension(column: str) -> str:
    return "mask.png" if column == "mask" else f"{column}.npy"


def npy(array: Any) -> bytes:
    """A .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png(mask: np.ndarray) -> bytes:
    """An index mask uint8 [H, W] as a greyscale PNG."""
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass(frozen=True)
class PackedMasks:
    """Index masks uint8 [N, size, size], deflated: a few hundred bytes each."""

    size: int
    blob: np.ndarray  # uint8 [bytes], may be memory-mapped
    ends: np.ndarray  # int64 [N]

    @classmethod
    def of(cls, masks: Iterable[np.ndarray]) -> "PackedMasks":
        size, packed = 0, []
        for mask in masks:
            assert mask.dtype == np.uint8 and mask.shape[0] == mask.shape[1] and size in (0, len(mask)), mask.shape
            size = len(mask)
            packed.append(zlib.compress(np.ascontiguousarray(mask), 6))
        ends = np.cumsum([len(p) for p in packed], dtype=np.int64)
        return cls(size, np.frombuffer(b"".join(packed), np.uint8), ends)

    @classmethod
    def concatenate(cls, parts: Sequence["PackedMasks"]) -> "PackedMasks":
        """One after the other."""
        starts = np.cumsum([0, *(len(p.blob) for p in parts[:-1])])
        ends = np.concatenate([p.ends + start for p, start in zip(parts, starts, strict=True)])
        return cls(parts[0].size, np.concatenate([p.blob for p in parts]), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> np.ndarray:
        data = zlib.decompress(self.blob[self.ends[i - 1] if i else 0 : self.ends[i]])
        return np.frombuffer(data, np.uint8).reshape(self.size, self.size)


def stacked(name: str, rows: Iterable[Any]) -> Any:
    """The column `name` of images whose own values are `rows`."""
    return PackedMasks.of(rows) if name == "mask" else np.stack(list(rows))


def concatenated(parts: Sequence[Columns]) -> Columns:
    """One after the other."""
    joins = {name: PackedMasks.concatenate if name == "mask" else np.concatenate for name in (parts or [{}])[0]}
    return {name: join([part[name] for part in parts]) for name, join in joins.items()}


def to_arrays(columns: Columns) -> dict[str, np.ndarray]:
    """Columns as plain arrays, for a file."""
    if "mask" not in columns:
        return columns
    mask = columns["mask"]
    return {**columns, "mask_size": np.array([mask.size]), "mask": mask.blob, "mask_ends": mask.ends}


def to_columns(arrays: Mapping[str, np.ndarray]) -> Columns:
    """What `to_arrays` was given."""
    columns: Columns = {name: array for name, array in arrays.items() if name not in ("mask_size", "mask_ends")}
    if "mask" in arrays:
        columns["mask"] = PackedMasks(int(arrays["mask_size"][0]), arrays["mask"], arrays["mask_ends"])
    return columns


@dataclass(frozen=True)
class Signals:
    """The signals of N images under one `spec`; parts that it does not have are None."""

    spec: GuidanceSpec
    k: Tensor | None = None  # [N] long, or [N, K] float multi-hot
    box: Tensor | None = None  # [N, M, 4] float; boxes without area fill up
    mask: PackedMasks | None = None
    feature: Tensor | None = None  # [N, D] float16
    count: int = 0  # N where there is no part at all

    @classmethod
    def from_columns(cls, spec: GuidanceSpec, columns: Columns, count: int) -> "Signals":
        parts = {n: c if isinstance(c, PackedMasks) else torch.from_numpy(np.asarray(c)) for n, c in columns.items()}
        if "k" in parts:
            parts["k"] = parts["k"].float() if spec.multi_hot else parts["k"].long()
        return cls(spec, count=count, **parts)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Tensor) -> "Signals":
        """Those at `indices` [B]."""
        at = indices.tolist()
        mask = None if self.mask is None else PackedMasks.of(self.mask[i] for i in at)
        pick = lambda part: None if part is None else part[indices]  # noqa: E731
        return Signals(self.spec, pick(self.k), pick(self.box), mask, pick(self.feature), len(at))

    def replace(self, **parts: Any) -> "Signals":
        """The same images with another box, mask, ..."""
        return dataclasses.replace(self, **parts)

    def masks(self, indices: Sequence[int] | None = None) -> Tensor:
        """Index masks uint8 [B, H, W]."""
        assert self.mask is not None
        return torch.from_numpy(np.stack([self.mask[i] for i in (range(len(self)) if indices is None else indices)]))

    def guidance(
        self,
        grid: tuple[int, int],
        indices: Tensor | None = None,
        flip: Tensor | None = None,
        crops: Crops | None = None,
    ) -> Guidance:
        """The Guidance of the images at `indices` [B] on a latent grid (h, w), mirrored where `flip` [B] is set; then of
        `crops`, with k of a mask made anew from what is in there."""
        indices = torch.arange(len(self)) if indices is None else indices
        keep = torch.ones(len(indices), dtype=torch.bool)
        k = None if self.k is None else self.k[indices]
        feature = None if self.feature is None else self.feature[indices].float()
        spatial = None
        if self.box is not None:
            spatial = box_coverage(self.box[indices], grid)
        if self.mask is not None:
            spatial = mask_coverage(self.masks(indices.tolist()), self.spec.num_labels, grid)
        if spatial is not None and flip is not None:
            spatial = torch.where(flip[:, None, None, None], spatial.flip(3), spatial)
        if spatial is not None and crops is not None:
            spatial = crops(spatial)
        if spatial is not None and self.mask is not None:
            k = present(spatial)
        concepts = concept_ids(k) if k is not None and k.ndim == 2 else None
        if not self.spec.concepts_only:
            return Guidance(keep, k, concepts, feature, spatial)
        concepts = concept_ids(present(spatial)) if self.box is not None else concepts
        return Guidance(keep, concepts=concepts, spatial=spatial)  # where they are: for a loss alone

    def centre(self, share: float) -> "Signals":
        """The same images' signals in the centre square of `share` of their sides; a box without a part of it there has
        no area any more."""
        margin, parts = (1 - share) / 2, {}
        if self.box is not None:
            parts["box"] = ((self.box - margin) / share).clamp(0, 1)
        if self.mask is not None:
            first = round(self.mask.size * margin)
            inner = slice(first, first + round(self.mask.size * share))
            parts["mask"] = PackedMasks.of(self.mask[i][inner, inner] for i in range(len(self)))
        return self.replace(**parts)

    def describe(self, i: int) -> dict[str, Any]:
        """Image i's signal in few words: `k` (id, or the ids that are present), `box` as shares of the sides."""
        said: dict[str, Any] = {}
        if self.mask is not None:
            said["k"] = self._present(i)
        elif self.k is not None:
            said["k"] = int(self.k[i]) if self.k.ndim == 1 else self.k[i].nonzero()[:, 0].tolist()
        if self.box is not None:
            said["box"] = [[round(c, 4) for c in box] for box in self.box[i].tolist() if box[2] > box[0]]
        return said

    def _present(self, i: int) -> list[int]:
        """The labels in the mask of image i."""
        assert self.mask is not None
        return [label for label in np.unique(self.mask[i]).tolist() if label < self.spec.num_labels]

    def having(self, label: int) -> Tensor:
        """Indices of the images with `label`."""
        if self.mask is not None:
            return torch.tensor([i for i in range(len(self)) if (self.mask[i] == label).any()], dtype=torch.long)
        assert self.k is not None
        return ((self.k == label) if self.k.ndim == 1 else self.k[:, label] > 0).nonzero()[:, 0]

    def counts(self) -> np.ndarray:
        """In how many images each label occurs, [K]."""
        if self.mask is not None:
            occur = [label for i in range(len(self)) for label in self._present(i)]
            return np.bincount(np.array(occur, np.int64), minlength=self.spec.num_labels)
        if self.k is None:
            return np.zeros(0, np.int64)
        if self.k.ndim == 2:
            return (self.k > 0).sum(0).numpy()
        return np.bincount(self.k.numpy(), minlength=self.spec.num_labels)

    def save_pretrained(self, folder: Path) -> None:
        """config.json and one safetensors file, as diffusers' pipelines hold their parts."""
        parts = {name: getattr(self, name) for name in ("k", "box", "mask", "feature")}
        tensors = {name: np.ascontiguousarray(p.numpy()) for name, p in parts.items() if isinstance(p, Tensor)}
        found: Columns = tensors if self.mask is None else {**tensors, "mask": self.mask}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(save({"count": np.array([self.count]), **to_arrays(found)}))
        config = {"_class_name": "Signals", **self.spec.to_dict()}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> "Signals":
        """What `save_pretrained` wrote; InputError when the file does not hold what its config says."""
        config, path = json.loads((Path(folder) / "config.json").read_text()), Path(folder) / WEIGHTS
        config.pop("_class_name", None)
        spec, found = GuidanceSpec.from_dict(config, str(folder)), to_columns(load_file(path))
        missing = {"count", *columns(spec)} - set(found)
        if missing:
            raise InputError(f"{path}: no {', '.join(sorted(missing))} in it: not the signals of this run")
        count = int(found.pop("count")[0])
        signals = cls.from_columns(spec, found, count)
        k, box = signals.k, signals.box
        shape = (count, spec.num_labels) if spec.multi_hot else (count,)
        good = count > 0 and (k is None or k.shape == shape)
        good = good and (k is None or spec.multi_hot or 0 <= k.min() <= k.max() < spec.num_labels)
        if not good or (box is not None and (len(box) != count or not box.isfinite().all())):
            raise InputError(f"{path}: not the signals of {count} images with {spec.num_labels} labels: damaged")
        return signals
