"""Distances between two sets of features [N, D]. Pure functions: what the features are of is the caller's business."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from ldm_sg.errors import InputError

NEIGHBOURS = 5  # k of the k-NN manifolds
SPLITS = 10  # of the Inception score
TWO = ("fd", "sfid", "kid", "cmmd", "edit")
ONE = ("memory", "fd_clusters", "consistency", "layout", "nmi")
NEEDS = dict.fromkeys(TWO, 2) | {"prdc": NEIGHBOURS + 1, "is": SPLITS} | dict.fromkeys(ONE, 1)  # least images
ROWS = 8192  # of features that are taken into a covariance at once
BLOCK = 2**25  # distances held at once (float32: 128 MiB), whatever the number of images


@dataclass(frozen=True)
class Moments:
    """In float64: the mean [D] and a root R [., D] of the unbiased covariance R^T R [D, D]."""

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of features [N, D], by QR: no root is taken of a rounding error where there are fewer images than dimensions. Some
        rows at a time, for in float64 all of them would be twice what is held already."""
        mean = features.mean(0, dtype=torch.float64)
        root = mean.new_empty(0, len(mean))
        for rows in features.split(ROWS):
            root = torch.linalg.qr(torch.cat([root, rows.double() - mean]), mode="r").R
        return cls(mean, root / (len(features) - 1) ** 0.5)


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features [N, D] and [M, D] (Heusel et al., 2017, Eq. 6).

    Raises InputError for sets that do not match, have fewer than 2 rows, or are not finite."""
    _check(a, b, at_least=2)
    return frechet_of(Moments.of(a), Moments.of(b))


def frechet_of(a: Moments, b: Moments) -> float:
    """With S = R^T R the trace of (S_a S_b)^(1/2) is the sum of the singular values of R_a R_b^T."""
    cross = torch.linalg.svdvals(a.root @ b.root.T).sum()
    distance = (a.mean - b.mean).square().sum() + a.root.square().sum() + b.root.square().sum() - 2 * cross
    return max(float(distance), 0.0)  # a distance: rounding may leave -1e-12 between equal sets


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> dict[str, float]:
    """KID (Binkowski et al., 2018): unbiased MMD^2 under (x.y / D + 1)^3, mean and spread over random subsets.

    Slightly negative values are right for sets of one distribution. `subset_size` shrinks to the smaller set."""
    _check(a, b, at_least=2)
    size = min(subset_size, len(a), len(b))
    if size == len(a) == len(b):
        subsets = 1  # each would be the whole of both
    rng, found = np.random.RandomState(seed), []  # torch-fidelity's subsets, of which only one is held in float64
    for _ in range(subsets):
        x, y = (part[rng.choice(len(part), size, replace=False)].double().cpu() for part in (a, b))
        out = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=size, verbose=False)
        found.append(out[KEY_METRIC_KID_MEAN])
    return {"kid": float(np.mean(found)), "kid_std": float(np.std(found))}


def cmmd(samples: Tensor, reference: Tensor, sigma: float = 10, scale: float = 1000) -> float:
    """CMMD (Jayasumana et al., 2024): `scale` times the MMD^2, as they estimate it, of embeddings of unit length under the
    kernel exp(-d^2 / 2 sigma^2). Only a block of distances is held at a time."""
    _check(samples, reference, at_least=2)
    x, y = F.normalize(samples.float(), dim=1), F.normalize(reference.float(), dim=1)

    def mean(a: Tensor, b: Tensor) -> float:  # of the kernel less 1, which is small: the ones cancel
        kernel = (torch.expm1(d / (-2 * sigma**2)).sum(dtype=torch.float64) for _, d in _squared(a, b))
        return float(sum(kernel)) / (len(a) * len(b))

    return scale * (mean(x, x) + mean(y, y) - 2 * mean(x, y))


def manifold(samples: Tensor, reference: Tensor, k: int = NEIGHBOURS, seed: int = 0) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al., 2019), density and coverage (Naeem et al., 2020, Eqs. 3-6), of as many
    samples as references: of the larger set a random part, since balls shrink and fill as their set grows.

    A ball around each image reaches its k-th nearest neighbour of the same set. precision: share of samples inside some
    real ball; recall: share of real images inside some sample's ball; density: real balls a sample is in, over k;
    coverage: share of real balls with a sample inside. Only a block of distances is held at a time."""
    _check(samples, reference, at_least=k + 1, what=f"precision, recall, density and coverage with k = {k}")
    generator, n = torch.Generator().manual_seed(seed), min(len(samples), len(reference))
    samples, reference = (
        x if len(x) == n else x[torch.randperm(len(x), generator=generator)[:n]] for x in (samples, reference)
    )
    centre = reference.mean(0, dtype=torch.float64)  # distances from products lose fewer digits around the origin
    fake, real = (torch.cat([(rows - centre).float() for rows in x.split(ROWS)]) for x in (samples, reference))
    real_radius, fake_radius = _radii(real, k), _radii(fake, k)  # [M], [N], squared
    precise, density = 0.0, 0.0
    recalled, covered = torch.zeros(len(real), dtype=torch.bool), torch.zeros(len(real), dtype=torch.bool)
    for rows, distance in _squared(fake, real):
        distance = distance.cpu()
        inside = distance <= real_radius
        precise += float(inside.any(1).sum())
        density += float(inside.sum())
        covered |= inside.any(0)
        recalled |= (distance <= fake_radius[rows, None]).any(0)
    return {
        "precision": precise / len(fake),
        "recall": float(recalled.float().mean()),
        "density": density / (k * len(fake)),
        "coverage": float(covered.float().mean()),
    }


def inception_score(logits: Tensor, splits: int = SPLITS, seed: int = 0) -> dict[str, float]:
    """exp E KL(p(y|x) || p(y)) of classifier logits [N, classes] (Salimans et al., 2016), mean and spread over splits.

    Raises InputError where N < splits."""
    if len(logits) < splits:
        raise InputError(f"inception score: {len(logits)} images are too few for {splits} splits")
    out = isc_features_to_metric(logits.cpu(), splits=splits, rng_seed=seed)
    return {"is": out[KEY_METRIC_ISC_MEAN], "is_std": out[KEY_METRIC_ISC_STD]}


def _radii(features: Tensor, k: int) -> Tensor:
    """Squared distance [N] of each row to its k-th nearest other row."""
    radii = []
    for rows, distance in _squared(features, features):
        distance[torch.arange(len(rows)), rows] = torch.inf  # to itself
        radii.append(distance.kthvalue(k, dim=1).values.cpu())
    return torch.cat(radii)


def _squared(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Squared distances [rows, M] of rows of [N, D], some at once, to those of [M, D], and which rows these are."""
    for rows in torch.arange(len(a)).split(max(1, BLOCK // len(b))):
        part = a[rows[0] : rows[-1] + 1]
        products = torch.addmm(b.square().sum(1)[None], part, b.T, alpha=-2)
        yield rows, products.add_(part.square().sum(1)[:, None]).clamp_(min=0)


def _check(a: Tensor, b: Tensor, at_least: int, what: str = "this metric") -> None:
    for name, features in (("samples", a), ("reference", b)):
        if len(features) < at_least:
            raise InputError(f"{name}: {len(features)} images are too few: {what} needs at least {at_least}")
        if not features.isfinite().all():
            raise InputError(f"{name}: the features are not finite (broken weights, or images that are not finite)")
