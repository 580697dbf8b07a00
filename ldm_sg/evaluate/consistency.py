"""Cluster consistency: do samples land, under the run's own g and f, in the cluster they were asked for?"""

import torch
from torch import Tensor

from ldm_sg.annotate.clusters import Clusters
from ldm_sg.errors import InputError

NEAREST = 3


def consistency(
    asked: Tensor, samples: Tensor, signals: Tensor, real: Tensor, rebuilt: Tensor, f: Clusters
) -> dict[str, float]:
    """Ids asked for [N] and features of the samples [N, D]; ids of the training set [T]; features of real images [M, D]
    before and after the autoencoder.

    -> the share in the asked cluster and in its 3 nearest; the same of real images after the autoencoder, asked for
    their own cluster (no sample can be expected to do better); and chance."""
    nearest_real, nearest_rebuilt = f.nearest(real, NEAREST), f.nearest(rebuilt, NEAREST)
    found = {
        "": landing(asked, f.nearest(samples, NEAREST)),
        "_real": landing(nearest_real[:, 0], nearest_rebuilt),
        "_chance": chance(asked, signals, nearest_real, f.k),
    }
    names = ("consistency", "consistency_top3")
    return {f"{name}{of}": both[i] for i, name in enumerate(names) for of, both in found.items()}


def landing(asked: Tensor, nearest: Tensor) -> tuple[float, float]:
    """Ids asked for [N] and the ids of each sample's nearest centroids [N, 3], nearest first -> the share of samples in
    the asked cluster, and the share with it among the three nearest."""
    hits = nearest == asked[:, None]  # [N, 3]
    return float(hits[:, 0].float().mean()), float(hits.any(1).float().mean())


def chance(asked: Tensor, signals: Tensor, nearest: Tensor, k: int) -> tuple[float, float]:
    """What images that ignore the id `asked` for [N], but are like the training set's, whose ids are `signals` [T], would reach:
    sum_k q_k p_k, with q of what is asked and p of training; for the three nearest, the mean share that was asked for the ids in
    `nearest` [M, 3] of real images."""
    q, p = (torch.bincount(ids, minlength=k).double() / len(ids) for ids in (asked, signals))  # [K]
    return float((q * p).sum()), float(q[nearest].sum(1).mean())


def check_ids(ids: Tensor, k: int, where: str) -> None:
    """InputError for `ids` [N] that the annotator does not have."""
    beyond = ids[(ids >= k) | (ids < 0)]
    if len(beyond):
        raise InputError(f"{where}: cluster {int(beyond[0])} was asked for; the annotator has clusters 0 to {k - 1}")
