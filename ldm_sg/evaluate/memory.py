"""Memorisation: which training images are nearest to each sample, and how many samples are nearer than unseen images ever are."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ldm_sg.evaluate import sources
from ldm_sg.evaluate.subjects import Subject

SIDE = 16  # pixels of the images that are compared as they are: 50,000 of them are 150 MB
CHANCE = 0.01  # share of unseen images that count as near-copies
LEAST = 100  # unseen images
SAME = 2.0  # grey levels between 16-pixel images that are one image, packed at another size or quality: 0.3 to 0.5 of photos
NEAREST, SHOWN = 3, 8  # training images a sample, samples a space
Rows = list[tuple[str, Tensor]]  # captions, and images uint8 [N, 3, H, W]


class Pixels:
    """Images [B, 3, H, W] in [-1, 1] -> [B, 768], between which the distance is that of 16-pixel images, RMS in grey levels."""

    name, dim = "pixels", 3 * SIDE**2
    manifest = {"name": name, "dim": dim, "size": SIDE, "sha256": None}

    def __call__(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(images, SIDE).flatten(1) * (127.5 / self.dim**0.5)


def copies(
    samples: Tensor, real: Tensor, unseen: Tensor, unit: bool
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """Features [N, D], [M, D] of training images and [U, D] of images that training did not see; unit: compare directions.

    -> figures; distances [N, 3] and rows of `real` [N, 3] of each sample's nearest. A sample is a near-copy where its nearest is
    nearer than that of all but CHANCE of the unseen images: as many near-copies as that are no memory, but chance."""
    import faiss

    x, y, z = ((F.normalize(part, dim=1) if unit else part).contiguous().numpy() for part in (samples, real, unseen))
    squared, rows = faiss.knn(x, y, min(NEAREST, len(y)))
    distances, apart = (np.sqrt(found.clip(min=0)) for found in (squared, faiss.knn(z, y, 1)[0][:, 0]))
    threshold = float(np.quantile(apart, CHANCE, method="lower"))
    return {
        "memory_copies": float((distances[:, 0] <= threshold).mean()),
        "memory_copies_real": float((apart <= threshold).mean()),
        "memory_threshold": threshold,
        "memory_distance": float(np.median(distances[:, 0])),
        "memory_distance_real": float(np.median(apart)),
    }, distances, rows  # fmt: skip


def closest(places: Tensor, real: Tensor, distances: np.ndarray, rows: np.ndarray) -> list[dict[str, Any]]:
    """The samples nearest to training images: positions of both, and distances."""
    first = distances[:, 0].argsort(kind="stable")[:SHOWN]
    return [
        {"sample": int(places[i]), "images": real[rows[i]].tolist(), "distances": distances[i].tolist()} for i in first
    ]


def gallery(subject: Subject, images: sources.ImageSet, details: dict[str, dict[str, Any]]) -> Rows:
    """Of each of the closest, uint8 [1 + NEAREST, 3, H, W]: the sample, then its nearest training images."""
    pairs = [(space, pair) for space, found in details.items() for pair in found.get("nearest", ())]
    samples = subject.at({pair["sample"] for _, pair in pairs})
    real = sources.at(images, {i for _, pair in pairs for i in pair["images"]}, subject.size, subject.within)
    rows = [torch.stack([samples[pair["sample"]], *(real[i] for i in pair["images"])]) for _, pair in pairs]
    return [(f"{space} {pair['distances'][0]:.3g}", row) for (space, pair), row in zip(pairs, rows)]
