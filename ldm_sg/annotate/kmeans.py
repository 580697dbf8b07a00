"""Streaming k-means: exact Lloyd passes over files of features, however many there are. A pass maps each file to its sums over
the clusters (`sums_of`, a plain function that may run anywhere) and adds them up in the files' order, so that neither who
computes them nor a kill between two passes changes a bit of the result."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ldm_sg.annotate.stage import Sums, added, not_finite, read_checkpoint, write_checkpoint
from ldm_sg.data.latents import read_features

BLOCK = 8192  # rows that are read at once
SCORES = 2**19  # of rows with centroids that are computed at once on a CPU: what a core's own cache holds
TOLERANCE = 1e-4  # a pass that changes the inertia by a smaller share of it is the last one
SPLIT = 1 / 1024  # share by which the halves of a cluster that is split move apart, as in faiss

Map = Callable[[Callable[[Path], Sums], Sequence[Path]], Iterable[Sums]]  # like builtin map, in order


def normalise(features: np.ndarray | Tensor) -> np.ndarray:
    """[N, D] -> float32 rows of unit length (a zero row stays zero), contiguous as faiss wants them."""
    tensor = features if isinstance(features, Tensor) else torch.from_numpy(np.asarray(features, dtype=np.float32))
    return np.ascontiguousarray(F.normalize(tensor.detach().float().cpu(), dim=1).numpy())


def sums_of(file: Path, centroids: Tensor, device: torch.device | str = "cpu") -> Sums:
    """The map step: one .npy file of features [n, D], normalised here, and all centroids [K, D] -> of the rows nearest to each
    centroid their sum, `points` float64 [K, D], and number, `counts` int64 [K]; `inertia`, the sum of all rows' squared distances
    to theirs. Holds one block of rows, their scores and K x D sums, whatever n; the product runs on `device`. InputError naming
    file and row for one that is not finite."""
    k, there, rows = len(centroids), centroids.to(device), read_features(file)
    bias, (n, dim) = -there.square().sum(1) / 2, rows.shape
    sums, counts, inertia = np.zeros((k, dim)), np.zeros(k, np.int64), 0.0
    scores = torch.empty(tile(k) if there.device.type == "cpu" else BLOCK, k, device=device)
    for start in range(0, n, BLOCK):  # read, not mapped: pages of a long file would stay in memory
        part = np.fromfile(file, rows.dtype, BLOCK * dim, offset=rows.offset + start * rows.strides[0])
        points = normalise(torch.from_numpy(part.reshape(-1, dim)))
        square = float(np.vdot(points, points))
        if math.isnan(square):
            raise not_finite(file, start + int(np.isnan(points).any(1).argmax()))
        tiles = torch.from_numpy(points).to(device).split(len(scores))
        ids = np.concatenate([_nearest(x, there, bias, scores[: len(x)]) for x in tiles])
        one_hot = csr_array((np.ones(len(ids)), ids, np.arange(len(ids) + 1)), shape=(len(ids), k))
        sums += one_hot.T @ points
        counts += np.bincount(ids, minlength=k)
        inertia += square
    c = centroids.double().cpu().numpy()  # sum |x - c|^2 = sum |x|^2 + sum (c - 2x).c
    inertia = max(0.0, inertia + float(np.vdot(counts[:, None] * c - 2 * sums, c)))
    return {"points": sums, "counts": counts, "inertia": np.float64(inertia)}


def tile(k: int) -> int:
    """Rows whose scores with k centroids are computed at once on a CPU."""
    return min(BLOCK, max(64, SCORES // k))


def _nearest(x: Tensor, centroids: Tensor, bias: Tensor, scores: Tensor) -> np.ndarray:
    """Rows [n, D] -> ids [n] of the nearest centroids, whose score x.c - |c|^2 / 2 is the largest; `scores` [n, K] is room."""
    torch.addmm(bias, x, centroids.T, out=scores)
    on_cpu = scores.device.type == "cpu"  # there numpy's argmax is ten times as fast as torch's
    return scores.numpy().argmax(1) if on_cpu else scores.argmax(1).cpu().numpy()


def means(total: Sums) -> Tensor:
    """The centroids [K, D] after a pass. A cluster without a row takes half of the largest one: both are its mean, a little
    apart."""
    counts = total["counts"].copy()
    centroids = (total["points"] / counts.clip(1)[:, None]).astype(np.float32)
    apart = np.where(np.arange(centroids.shape[1]) % 2, -SPLIT, SPLIT).astype(np.float32)
    for empty in np.flatnonzero(counts == 0):
        largest = counts.argmax()
        centroids[empty] = centroids[largest] * (1 + apart)
        centroids[largest] *= 1 - apart
        counts[empty] = counts[largest] // 2
        counts[largest] -= counts[empty]
    return torch.from_numpy(centroids)


def lloyd(
    files: Sequence[Path], start: Callable[[], Tensor], passes: int, checkpoint: Path, of: str,
    device: torch.device | str = "cpu", run: Map = map, tolerance: float = TOLERANCE,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """At most `passes` over the files, from the K centroids of `start` -> centroids float32 [K, D] and the mean squared distance
    that each pass found before it moved them. After each of them CHECKPOINT is written; one that is there and is of the same
    fit, as `of` says, is gone on from."""
    if there := read_checkpoint(checkpoint, of):
        centroids, inertia = there["centroids"], there["inertia"]
    else:
        centroids, inertia = start(), list[float]()
        write_checkpoint(checkpoint, of, {"centroids": centroids, "inertia": inertia})
    while len(inertia) < passes and not _settled(inertia, tolerance):
        step = functools.partial(sums_of, centroids=centroids, device=device)
        bar: dict[str, Any] = {"desc": f"k-means, pass {len(inertia) + 1}", "unit": " files", "mininterval": 1}
        total = added(tqdm(run(step, files), total=len(files), **bar))
        centroids = means(total)
        inertia.append(float(total["inertia"] / total["counts"].sum()))
        write_checkpoint(checkpoint, of, {"centroids": centroids, "inertia": inertia})
    return centroids, inertia


def _settled(inertia: list[float], tolerance: float) -> bool:
    return len(inertia) > 1 and abs(inertia[-2] - inertia[-1]) <= tolerance * inertia[-1]
