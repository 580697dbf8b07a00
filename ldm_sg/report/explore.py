"""Images of an annotation set with all that is known of each: a map of them on a page, and a table for embedding-atlas."""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import to_pil_image

from ldm_sg.annotate.dedup import neighbours
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.parquet import pyarrow
from ldm_sg.data.photos import photos_at
from ldm_sg.errors import InputError, need_choice, need_package
from ldm_sg.folder import whole
from ldm_sg.report import html
from ldm_sg.report.annotation import about, distances, evenly

MAPPED, SIDE = 4_000, 48  # images on a page's map, and their pixels
ROWS, LARGE = 100_000, 128  # of a table
SHARDS = 100  # that are read for them at most
NEAR = 16  # nearest images, in a table
Layout = Callable[[Tensor], np.ndarray]  # points [N, D] -> their places [N, 2]


def find_layout(name: str) -> Layout:
    """pca or umap. InputError for another, and where umap-learn is not installed."""
    if name == "pca":
        return pca
    need_choice("map", name, ("pca", "umap"))
    umap = need_package("umap", "--map umap", "'ldm-sg[umap]'; or --map pca")
    return lambda points: umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(points.numpy())


def pca(points: Tensor) -> np.ndarray:
    """Along the two directions in which the points differ most."""
    centred = (points - points.mean(0)).double()
    return (centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -2:].flip(1)).numpy()


def spread(shards: np.ndarray, most: int) -> np.ndarray:
    """Of images whose shards are `shards` [N], at most `most` indices, evenly, of at most SHARDS shards."""
    return evenly(np.flatnonzero(np.isin(shards, evenly(np.unique(shards), SHARDS))), most)


def gather(latents: LatentSet, most: int, side: int, layout: Layout) -> tuple[dict[str, list[Any]], Tensor]:
    """At most `most` images, spread evenly over the set: columns by name, of which x and y are in [0, 1] and `image` is a WebP
    file of `side` pixels, and g's features [N, D], of length 1. A column of which nothing is known is left out. InputError where
    the set has no features or its source shards are gone."""
    places = torch.from_numpy(spread(latents.shards, most))
    points = F.normalize(latents.features(places), dim=1)
    if layout is not pca and len(points) <= NEAR:  # it looks at as many neighbours
        raise InputError(f"--map umap: {len(points)} images, it needs more than {NEAR}: --map pca")
    photos = {i: (_webp(image), own.key, own.cls) for i, image, own in photos_at(latents, places.tolist(), side)}
    if lost := len(places) - len(photos):
        raise InputError(f"{latents.folder}: {lost:,} of its photos are not where its manifest says")
    images, keys, classes = zip(*(photos[i] for i in places.tolist()))
    xy = layout(points)
    x, y = ((xy - xy.min(0)) / max(float(np.ptp(xy, axis=0).max()), 1e-12)).round(5).T.tolist()
    columns: dict[str, list[Any]] = {"key": list(keys), "image": list(images), "x": x, "y": y}
    if latents.spec.one_id and (clusters := about(latents.folder, latents.manifest)):
        columns["k"] = latents.signals.k[places].tolist()
        own = [clusters[k] for k in columns["k"]]
        columns["name"] = [" ".join(cluster["names"][:1]) or None for cluster in own]
        columns |= {f"cluster_{what}": [cluster[what] for cluster in own] for what in ("size", "purity")}
        columns["distance"] = [None] if (apart := distances(latents, places)) is None else apart.round(4).tolist()
    columns["class"] = list(classes)
    return {name: column for name, column in columns.items() if set(column) != {None}}, points


def _webp(image: Tensor) -> bytes:
    to_pil_image(image).save(file := io.BytesIO(), "WEBP", quality=75)
    return file.getvalue()


def section(latents: LatentSet, name: str, layout: Layout) -> str:
    """The map on a page, and the script that draws it; why there is none, where g's features are missing."""
    if not (latents.folder / "features").is_dir():
        return html.section("Map", "", html.paragraph("None: the set has no features of g to place images by."))
    columns, _ = gather(latents, MAPPED, SIDE, layout)
    shown = len(columns["key"])
    some = "" if shown == len(latents) else f" {shown:,} of {len(latents):,} images are shown, evenly spread."
    text = (
        f"Each point is an image, placed by {name.upper()} of g's features.{some} Point at one to see it, click for its "
        "cluster; scroll to zoom in until points are pictures, drag to move."
    )
    columns["image"] = [base64.b64encode(image).decode() for image in columns["image"]]
    script = html.script("explore.js", {"columns": columns, "clusters": about(latents.folder, latents.manifest)})
    return html.section("Map", text, '<div id="explore"></div>', script)


def write_atlas(latents: LatentSet, path: Path, layout: Layout) -> int:
    """The table that embedding-atlas opens, one row an image: the columns of `gather`, and neighbors (row numbers and 1 - cosine,
    nearest first, itself among them). Returns how many rows it has."""
    parquet = pyarrow()
    import pyarrow as pa

    columns, points = gather(latents, ROWS, LARGE, layout)
    cosines, near = neighbours(points.numpy(), min(NEAR, len(points)))
    columns["image"] = [{"bytes": image, "path": None} for image in columns["image"]]
    pairs = zip(near.tolist(), (1 - cosines).clip(0).tolist())
    with whole(path) as new:
        parquet.write_table(pa.table(columns | {"neighbors": [{"ids": ids, "distances": d} for ids, d in pairs]}), new)
    return len(points)
