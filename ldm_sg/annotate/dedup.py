"""Near-duplicates and outliers of an annotation set, by the features of g that lie beside it."""

from dataclasses import dataclass

import faiss
import numpy as np
from scipy.sparse import coo_array

from ldm_sg.annotate.clusters import normalise

NEIGHBOURS = 16  # of each image that are looked at
EXACT = 200_000  # images up to which all pairs are compared; above, those of the 16 nearest of sqrt(N) cells
BLOCK = 10_000


@dataclass(frozen=True)
class Left:
    """An image to leave out: the one kept in its place, which is like it by `cosine`, or None for an outlier, whose cosine is the
    mean to its nearest neighbours."""

    index: int
    kept: int | None
    cosine: float


def left_out(features: np.ndarray, threshold: float, outliers: float) -> list[Left]:
    """Features [N, D] -> what to leave out. Of images whose cosine is at least `threshold` the first stays, until no two that stay
    are so like each other; then of the rest the share `outliers` that is farthest from its neighbours."""
    points = normalise(features)
    leader = np.arange(len(points))  # who stays in whose place
    while True:
        kept = np.flatnonzero(leader == np.arange(len(points)))
        cosines, near = neighbours(points[kept], min(NEIGHBOURS, len(kept)))
        found = first_come(near, (cosines >= threshold) & (near >= 0))
        if (found == np.arange(len(kept))).all():
            break
        leader[kept] = kept[found]
        leader = leader[leader]
    like = (points * points[leader]).sum(1)
    gone = [Left(int(i), int(leader[i]), float(like[i])) for i in np.setdiff1d(np.arange(len(points)), kept)]
    near_by = np.where(near >= 0, cosines, -1)[:, 1:].mean(1) if near.shape[1] > 1 else np.ones(len(kept))
    far = np.argsort(near_by, kind="stable")[: round(outliers * len(kept))]
    return gone + [Left(int(kept[i]), None, float(near_by[i])) for i in far]


def first_come(near: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """Neighbours [N, k] of each and which of them are like it -> who stands for each [N]: itself, or the first such neighbour that
    stands for itself."""
    rows, columns = np.nonzero(alike)
    pairs = coo_array((np.ones(len(rows)), (rows, near[rows, columns])), shape=(len(near),) * 2).tocsr()
    pairs = (pairs + pairs.T).tocsr()
    leader = np.full(len(near), -1)
    for i in range(len(near)):
        if leader[i] < 0:
            leader[i] = i
            others = pairs.indices[pairs.indptr[i] : pairs.indptr[i + 1]]
            leader[others[leader[others] < 0]] = i
    return leader


def neighbours(points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and indices [N, k] of the nearest points, nearest first (itself, usually); -1 = none found."""
    index: faiss.Index = faiss.IndexFlatIP(points.shape[1])
    if len(points) > EXACT:
        cells = int(len(points) ** 0.5)
        index = faiss.IndexIVFFlat(index, points.shape[1], cells, faiss.METRIC_INNER_PRODUCT)
        index.train(points[:: max(1, len(points) // (64 * cells))])
        index.nprobe = 16
    index.add(points)
    parts = [index.search(points[start : start + BLOCK], k) for start in range(0, len(points), BLOCK)]
    cosines, near = (np.concatenate(column) for column in zip(*parts))
    return cosines, near
