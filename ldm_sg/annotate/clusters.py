"""f = k-means: features -> a cluster id (the paper's image-level signal k).

Features are L2-normalised, and both the fit and the assignment read the same normalised features; the paper's public
code assigns un-normalised ones, which moves about 5% of the ids."""

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from scipy.stats import entropy, hypergeom
from torch import Tensor

from ldm_sg import executor
from ldm_sg.annotate.annotator import Annotator, Study
from ldm_sg.annotate.kmeans import lloyd, normalise
from ldm_sg.annotate.stage import Observed, Sums, sample_features
from ldm_sg.config import AnnotatorConfig
from ldm_sg.data.signals import Columns
from ldm_sg.errors import InputError
from ldm_sg.guidance.signal import GuidanceSpec
from ldm_sg.hardware import pick_device

WORTH_WORKERS = 2_000_000  # images: a pass over fewer takes less than starting processes for it


class Clusters(Annotator):
    """K centroids [K, D] of L2-normalised features; a feature's id is its nearest centroid's in Euclidean distance."""

    kind = "clusters"

    def __init__(self, cfg: AnnotatorConfig):
        super().__init__(cfg)
        self.centroids = torch.empty(0, 1)  # [K, D], once fitted

    def fit(self, study: Study) -> None:
        """In memory where annotator.sample allows it; else in passes over all files, from the centroids that a sample in memory
        gives."""
        cfg, images = self.cfg, sum(study.counts)
        stream = cfg.fit == "stream" or (cfg.fit == "auto" and images > cfg.sample and self.known is None)
        part = "" if images <= cfg.sample else f"a sample of {cfg.sample:,} of "
        how = "passes over the files of all" if stream else f"in memory, {part}all"
        why = f"annotator.fit={cfg.fit}, annotator.sample={cfg.sample:,}" + ", annotator.extend" * bool(cfg.extend)
        print(f"note: k-means {how} {images:,} images ({why})", file=sys.stderr)

        def sample() -> np.ndarray:
            return sample_features(study.stages, study.counts, cfg.sample, cfg.seed)

        if not stream:
            self.fit_features(sample())
            return
        settings, device = study.config, pick_device(study.config.device)
        if images < WORTH_WORKERS:
            settings = replace(settings, executor="local", processes=1)

        def run(step: Callable[..., Sums], files: Sequence[Path]) -> Iterable[Sums]:
            return executor.in_order(partial(_on, step), files, settings, device)

        self.centroids, inertia = lloyd(
            [stage.features for stage, count in zip(study.stages, study.counts) if count],
            lambda: kmeans(normalise(sample()), self.k, "images of annotator.sample", **self._settings),
            cfg.niter,
            Path(study.config.out) / "work" / "kmeans.pt",
            json.dumps({"k": self.k, "sample": cfg.sample, "images": images, **self._settings}),
            device,
            run,
        )
        self._fitted("stream", images, len(inertia), inertia[-1])

    def fit_features(self, features: np.ndarray | Tensor) -> "Clusters":
        """Lloyd's algorithm on normalised `features` [N, D], all of them held in memory (the caller bounds N); of several
        restarts the one with the smallest sum of squared distances."""
        points = normalise(features)
        if self.known is not None:
            added = kmeans_beside(self.known.numpy(), points, self.k, self.cfg.niter, self.cfg.seed)
            self.centroids = torch.cat([self.known, torch.from_numpy(added)])
            self.k = len(self.centroids)
        else:
            self.centroids = kmeans(points, self.k, "images", **self._settings)
        self._fitted(
            "memory", len(points), self.cfg.niter, float(faiss.knn(points, self.centroids.numpy(), 1)[0].mean())
        )
        return self

    @property
    def _settings(self) -> dict[str, int]:
        return {"niter": self.cfg.niter, "nredo": self.cfg.restarts, "seed": self.cfg.seed}

    def _fitted(self, fit: str, images: int, passes: int, inertia: float) -> None:
        self.fitted = {"fit": fit, "images": images, "passes": passes, "inertia": round(inertia, 6)}

    def say(self, seen: Observed, count: int, generator: np.random.Generator) -> Columns:
        return {"k": self.assign(seen.features).numpy()}

    def assign(self, features: np.ndarray | Tensor) -> Tensor:
        """Features [B, D] -> ids [B] long, of the nearest centroid."""
        return self.nearest(features, 1)[:, 0]

    def nearest(self, features: np.ndarray | Tensor, n: int) -> Tensor:
        """Features [B, D] -> ids [B, n] long of the n nearest centroids, nearest first."""
        return torch.from_numpy(faiss.knn(normalise(features), self.centroids.numpy(), min(n, len(self.centroids)))[1])

    @property
    def spec(self) -> GuidanceSpec:
        return GuidanceSpec(self.kind, num_labels=self.k)

    def prototypes(self) -> Tensor:
        return self.centroids

    def kept(self) -> dict[str, tuple[str, str, tuple[int, ...]]]:
        return {"centroids": ("centroids.safetensors", "centroids", (self.k, self.dim))}


def _on(step: Callable[..., Sums], device: str) -> Callable[[Path], Sums]:
    return partial(step, device=device)


def check_enough(points: np.ndarray, k: int, what: str) -> None:
    if k > len(points):
        raise InputError(f"annotator.k={k}: only {len(points):,} {what} to cluster; choose at most {len(points):,}")


def kmeans(points: np.ndarray, k: int, what: str, **settings: Any) -> Tensor:
    """Points [N, D], which are `what`, -> faiss's centroids [K, D]. InputError where there are fewer points."""
    check_enough(points, k, what)
    most = len(points)  # the caller bounds the sample
    fit = faiss.Kmeans(points.shape[1], k, gpu=on_gpu(), max_points_per_centroid=most, **settings)
    fit.train(points)
    return torch.from_numpy(np.array(fit.centroids, np.float32).reshape(k, -1))


def kmeans_beside(fixed: np.ndarray, points: np.ndarray, k: int, niter: int, seed: int) -> np.ndarray:
    """Lloyd's algorithm for `k` more centroids [k, D] of `points` [N, D] beside the `fixed` [F, D], which do not move; k-means++
    places the first ones where points are far from all that there are."""
    check_enough(points, k, "images")
    generator, added = np.random.default_rng(seed), np.empty((0, points.shape[1]), np.float32)
    far = faiss.knn(points, fixed, 1)[0][:, 0].clip(1e-12)  # squared distance to the nearest
    for _ in range(k):
        pick = points[generator.choice(len(points), p=far / far.sum())][None]
        added, far = np.concatenate([added, pick]), np.minimum(far, ((points - pick) ** 2).sum(1)).clip(1e-12)
    for _ in range(niter):
        ids = faiss.knn(points, np.concatenate([fixed, added]), 1)[1][:, 0] - len(fixed)
        for j in np.unique(ids[ids >= 0]):
            added[j] = points[ids == j].mean(0)
    return added


def on_gpu() -> bool:
    """True where faiss was built for GPUs and sees one."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def contingency(a: np.ndarray, b: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Ids a [N] in 0 .. A-1 and b [N] in 0 .. B-1 -> how often they meet, int64 `shape` = [A, B]."""
    return np.bincount(np.ravel_multi_index((a, b), shape), minlength=math.prod(shape)).reshape(shape)


def nmi(table: np.ndarray) -> float:
    """Normalised mutual information of the two labellings of a contingency table, with the arithmetic mean of their
    entropies below (scikit-learn's default)."""
    h = [float(entropy(sizes)) for sizes in (table.sum(1), table.sum(0), table.ravel())]
    return max(0.0, (h[0] + h[1] - h[2]) / (h[0] + h[1]) * 2) if h[0] + h[1] > 0 else 1.0


def ami(table: np.ndarray) -> float:
    """Adjusted mutual information (Vinh et al., 2010): NMI less what chance gives, with the arithmetic mean. torchmetrics' own
    loops over all images of all pairs of labels; equal counts have equal terms."""
    n, h = table.sum(), [entropy(table.sum(axis)) for axis in (0, 1)]
    mean, mutual, expected = sum(h) / 2, sum(h) - entropy(table.ravel()), 0.0
    (rows, many), (columns, often) = (np.unique(s[s > 0], return_counts=True) for s in (table.sum(1), table.sum(0)))
    for a, times in zip(rows, many):
        both = np.arange(1, min(a, columns.max()) + 1)[:, None]  # images that a row and a column may share, [a, 1]
        chance = hypergeom.pmf(both, n, a, columns[None])  # [a, columns]
        expected += float(times * (both / n * np.log(n * both / (a * columns)) * chance * often).sum())
    return 1.0 if np.isclose(mean, expected) else float((mutual - expected) / (mean - expected))


def ari(table: np.ndarray) -> float:
    """Adjusted Rand index (Hubert and Arabie, 1985): 1 = the same partition, about 0 = as by chance. torchmetrics' figure of a
    table in float64: its public function wants the labels of every image, and overflows int64 from about 70,000 on. Imported
    late: it takes seconds, in each worker."""
    from torchmetrics.functional.clustering.adjusted_rand_score import _adjusted_rand_score_compute

    return float(_adjusted_rand_score_compute(torch.from_numpy(table).double()))
