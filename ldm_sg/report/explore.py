"""Images of an annotation set with all that is known of each: a map of them on a page, and a table for embedding-atlas."""

import base64
import io
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ldm_sg.annotate.dedup import neighbours
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.parquet import write_table
from ldm_sg.data.photos import photos_at
from ldm_sg.errors import InputError, choices
from ldm_sg.report import html
from ldm_sg.report.annotation import about, distances, one_id

MAPPED, SIDE = 4_000, 48  # images on a page's map, and their pixels
ROWS, LARGE = 100_000, 128  # of a table
SHARDS = 100  # that are read for them at most
NEAR = 16  # images, in a table
FEW = 16  # images that are too few for umap, which looks at as many neighbours
Layout = Callable[[Tensor], np.ndarray]  # points [N, D] -> their places [N, 2]


def find_layout(name: str) -> Layout:
    """pca or umap. InputError for another, and where umap-learn is not installed."""
    if name not in ("pca", "umap"):
        raise InputError(f"--map {name!r}; {choices(name, ('pca', 'umap'))}")
    if name == "pca":
        return pca
    try:
        from umap import UMAP
    except ImportError as err:
        raise InputError("--map umap needs umap-learn: pip install 'ldm-sg[umap]'; or --map pca") from err
    return lambda points: UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(points.numpy())


def pca(points: Tensor) -> np.ndarray:
    """The two directions in which the points differ most; of each one's two signs, always the same."""
    centred = (points - points.mean(0)).double()
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (centred @ (directions * largest.sign())).numpy()


def spread(shards: np.ndarray, most: int) -> np.ndarray:
    """Of images whose shards are `shards` [N], at most `most` indices, evenly, of at most SHARDS shards."""

    def evenly(of: np.ndarray, n: int) -> np.ndarray:
        return of[np.linspace(0, len(of) - 1, min(n, len(of))).round().astype(int)]

    return evenly(np.flatnonzero(np.isin(shards, evenly(np.unique(shards), SHARDS))), most)


def gather(latents: LatentSet, most: int, side: int, layout: Layout) -> tuple[dict[str, list[Any]], Tensor]:
    """At most `most` images, spread evenly over the set: columns by name, of which x and y are in [0, 1] and `image` is a WebP
    file of `side` pixels, and g's features [N, D], of length 1. A column of which nothing is known is left out. InputError where
    the set has no features or its source shards are gone."""
    places = torch.from_numpy(spread(latents.shards, most))
    points = F.normalize(latents.features(places), dim=1)
    if layout is not pca and len(points) < FEW:
        raise InputError(f"--map umap: {len(points)} images, it needs {FEW}: --map pca")
    xy = layout(points)
    xy = (xy - xy.min(0)) / max(float(np.ptp(xy, axis=0).max()), 1e-12)
    photos = {
        photo.index: (photo.key, _webp(photo.image), photo.cls) for photo in photos_at(latents, places.tolist(), side)
    }
    there = torch.tensor([place in photos for place in places.tolist()])
    at = places[there]
    keys, images, classes = (list(column) for column in zip(*(photos[i] for i in at.tolist())))
    x, y = xy[there.numpy()].round(5).T.tolist()
    columns: dict[str, list[Any]] = {"key": keys, "image": images, "x": x, "y": y, "class": classes}
    if one_id(latents) and (clusters := about(latents.folder, latents.manifest)):
        own = [clusters[k] for k in latents.signals.k[at].tolist()]
        columns |= {
            "k": latents.signals.k[at].tolist(),
            "name": [" ".join(cluster.names[:1]) or None for cluster in own],
        }
        columns |= {"cluster_size": [cluster.size for cluster in own], "purity": [cluster.purity for cluster in own]}
        columns["distance"] = [None] if (apart := distances(latents, at)) is None else apart.round(4).tolist()
    return {name: column for name, column in columns.items() if set(column) != {None}}, points[there]


def _webp(image: Tensor) -> bytes:
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file := io.BytesIO(), "WEBP", quality=75)
    return file.getvalue()


def section(latents: LatentSet, name: str, layout: Layout) -> str:
    """The map on a page, and the script that draws it; why there is none, where g's features are missing."""
    if not (latents.folder / "features").is_dir():
        return html.section(
            "Map", "", html.paragraph("None: this set has no features of g by which images could be placed.")
        )
    columns, _ = gather(latents, MAPPED, SIDE, layout)
    shown = len(columns["key"])
    some = (
        "" if shown == len(latents) else f" {shown:,} of {len(latents):,} images are shown, spread evenly over the set."
    )
    text = (
        f"Each point is an image, placed by {name.upper()} of g's features.{some} Point at one to see it, click for its "
        "cluster; scroll to zoom in until points are pictures, drag to move."
    )
    columns["image"] = [base64.b64encode(image).decode() for image in columns["image"]]
    clusters = [asdict(cluster) for cluster in about(latents.folder, latents.manifest)]
    script = html.script("explore.js", {"columns": columns, "clusters": clusters})
    return html.section("Map", text, '<div id="explore"></div>', script)


def write_atlas(latents: LatentSet, path: Path, layout: Layout) -> int:
    """The table that embedding-atlas opens, one row an image: the columns of `gather`, and neighbors (row numbers and 1 - cosine,
    nearest first, itself among them). Returns how many rows it has."""
    columns, points = gather(latents, ROWS, LARGE, layout)
    cosines, near = neighbours(points.numpy(), min(NEAR, len(points)))
    columns["image"] = [{"bytes": image, "path": None} for image in columns["image"]]
    pairs = zip(near.tolist(), (1 - cosines).clip(0).tolist())
    write_table(path, columns | {"neighbors": [{"ids": ids, "distances": apart} for ids, apart in pairs]})
    return len(points)
