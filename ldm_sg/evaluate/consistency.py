"""Cluster consistency: do samples land, under the run's own g and f, in the cluster they were asked for?"""

import torch
from torch import Tensor

from ldm_sg.errors import InputError

NEAREST = 3


def landing(asked: Tensor, nearest: Tensor) -> tuple[float, float]:
    """Ids asked for [N] and the ids of each sample's nearest centroids [N, 3], nearest first -> the share of samples in
    the asked cluster, and the share with it among the three nearest."""
    hits = nearest == asked[:, None]  # [N, 3]
    return float(hits[:, 0].float().mean()), float(hits.any(1).float().mean())


def chance(signals: Tensor, nearest: Tensor) -> tuple[float, float]:
    """What an image that ignores the ids asked for would reach, these being drawn from the training set's ids `signals`
    [M]: sum_k p_k^2 for an image drawn from the same distribution, and for the three nearest the mean probability of
    the ids in `nearest` [N, 3] of real images."""
    p = torch.bincount(signals, minlength=int(nearest.max()) + 1).double() / len(signals)  # [K]
    return float(p.square().sum()), float(p[nearest].sum(1).mean())


def check_ids(ids: Tensor, k: int, where: str) -> Tensor:
    """`ids` [N], all of which the annotator has; InputError otherwise, and for multi-hot signals."""
    if ids.dim() != 1:
        raise InputError(f"{where}: cluster consistency is for one cluster id an image; these signals are multi-hot")
    if len(ids) and (int(ids.max()) >= k or int(ids.min()) < 0):
        wrong = int(ids.max()) if int(ids.max()) >= k else int(ids.min())
        raise InputError(f"{where}: cluster {wrong} was asked for, but the annotator has clusters 0 to {k - 1}")
    return ids
