"""Near-duplicates and outliers of an annotation set, by the features of g that lie beside it."""

from dataclasses import dataclass

import faiss
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

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
    """Features [N, D] -> what to leave out. Of images joined by cosines of at least `threshold` those go that are so like the
    first; then of the rest the share `outliers` that is farthest from its neighbours."""
    points = normalise(features)
    cosines, near = neighbours(points, min(NEIGHBOURS, len(points)))
    rows, columns = np.nonzero((cosines >= threshold) & (near >= 0))
    pairs = coo_array((np.ones(len(rows)), (rows, near[rows, columns])), shape=(len(points),) * 2)
    groups = connected_components(pairs, directed=False)[1]
    first = np.unique(groups, return_index=True)[1][groups]
    like = (points * points[first]).sum(1)  # a chain of likenesses may lead far: who is not like the first one stays
    alone = (first == np.arange(len(first))) | (like < threshold)
    gone = [Left(int(i), int(first[i]), float(like[i])) for i in np.flatnonzero(~alone)]
    kept = np.flatnonzero(alone)
    near_by = np.where(near >= 0, cosines, -1)[kept, 1:].mean(1) if near.shape[1] > 1 else np.ones(len(kept))
    far = np.argsort(near_by, kind="stable")[: round(outliers * len(kept))]
    return gone + [Left(int(kept[i]), None, float(near_by[i])) for i in far]


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
