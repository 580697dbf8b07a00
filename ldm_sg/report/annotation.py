"""What an annotation set looks like: a wall with real members of each cluster, the sizes, and report.html around them."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure
from torch import Tensor

from ldm_sg.data.images import BadImage, crop_resize, decode, to_tensor
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.shards import read_members, read_shard
from ldm_sg.report import grids, html

ROWS, COLUMNS = 40, 10  # of the wall
WALL, SIZES = "clusters.png", "sizes.png"


def write_report(folder: str | Path) -> Path:
    """FOLDER/clusters.png, sizes.png and report.html of a finished annotation set; the source shards are read again for
    the members' pictures. Raises InputError when the set is not finished or a source shard is gone."""
    folder = Path(folder)
    latents = LatentSet(folder)
    manifest, sizes = latents.manifest, np.bincount(latents.k.numpy(), minlength=latents.spec.num_labels)
    shown = chosen_clusters(sizes, ROWS)
    rows = members(folder, manifest, shown, COLUMNS)
    wall = grids.labelled_rows(
        [f"{k}  ({sizes[k]:,})" for k in rows],
        list(rows.values()),
        scale=grids.best_scale(next(iter(rows.values())), 80),
    )
    grids.save(wall, folder / WALL)
    size_chart(sizes, folder / SIZES)
    return html.write(folder / "report.html", document(folder, manifest, sizes, len(rows)))


def chosen_clusters(sizes: np.ndarray, limit: int) -> list[int]:
    """All clusters that are not empty, by id; where there are more than `limit`, that many from the largest to the
    smallest in even steps."""
    filled = np.flatnonzero(sizes)
    if len(filled) <= limit:
        return filled.tolist()
    by_size = filled[np.argsort(-sizes[filled], kind="stable")]
    return by_size[np.linspace(0, len(by_size) - 1, limit).round().astype(int)].tolist()


def members(folder: Path, manifest: Mapping[str, Any], clusters: list[int], each: int) -> dict[int, Tensor]:
    """Cluster -> its first members in the order of the shards, uint8 [at most `each`, 3, size, size]. Shards are read only
    as far as needed."""
    found: dict[int, list[Tensor]] = {k: [] for k in clusters}
    for shard, source in zip(manifest["shards"], manifest["source"]):
        if all(len(images) >= each for images in found.values()):
            break
        wanted = {
            key: k for key, k in signals(folder / "shards" / shard["file"]) if k in found and len(found[k]) < each
        }
        for key, image in pictures(source["url"], set(wanted), manifest["size"]):
            if len(found[wanted[key]]) < each:
                found[wanted[key]].append(image)
    return {k: torch.stack(images) for k, images in found.items() if images}


def signals(shard: Path) -> Iterator[tuple[str, int]]:
    """(key, k) of an annotated shard."""
    for key, ext, data in read_members(str(shard)):
        if ext == "k.npy":
            yield key, int(np.load(io.BytesIO(data), allow_pickle=False))


def pictures(url: str, keys: set[str], size: int) -> Iterator[tuple[str, Tensor]]:
    """(key, uint8 [3, size, size]) of the wanted keys of a source shard."""
    for sample in read_shard(url, lambda *_: None):
        if sample.key in keys:
            try:
                yield sample.key, to_tensor(crop_resize(decode(sample.image, sample.key), size))
            except BadImage:  # a key that came twice: its annotated copy is the good one
                continue


def size_chart(sizes: np.ndarray, path: Path) -> None:
    """Bars of the cluster sizes, largest first, with the even split as a line."""
    fig = Figure(figsize=(8, 2.8), dpi=120)
    ax = fig.subplots()
    ax.bar(np.arange(len(sizes)), np.sort(sizes)[::-1], width=1.0 if len(sizes) > 100 else 0.8, color="#0969da")
    ax.axhline(sizes.mean(), color="#6e7781", linewidth=1, linestyle="--", label=f"even split: {sizes.mean():,.1f}")
    ax.set(xlabel="clusters, largest first", ylabel="images")
    ax.set_xlim(-0.5, len(sizes) - 0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    temporary = path.with_suffix(".tmp.png")
    fig.savefig(temporary, bbox_inches="tight")
    temporary.replace(path)


def document(folder: Path, manifest: Mapping[str, Any], sizes: np.ndarray, rows: int) -> str:
    """report.html, self-contained."""
    f, g = manifest["annotator"], manifest["features"]
    oracle = f["kind"] == "oracle"
    what = "class" if oracle else "cluster"
    cards = {
        "images": f"{manifest['num_images']:,}",
        "left out": f"{manifest['num_skipped']:,}",
        "classes" if oracle else "clusters": f"{f['k']:,}",
        "empty": f"{f['empty']:,}",
        "entropy": f"{f['entropy']:.2f} of {f['max_entropy']:.2f} nats",
        "latents": " x ".join(map(str, manifest["latent_shape"])) + (", mirrored too" if manifest["flips"] else ""),
        "autoencoder": manifest["autoencoder"]["name"],
    }
    if g:
        cards["g"] = f"{g['name']}, {g['dim']} features"
    if "nmi" in f and not oracle:
        cards |= {"NMI with classes": f"{f['nmi']:.3f}", "ARI with classes": f"{f['ari']:.3f}"}
    some = (
        f"{rows} of {(sizes > 0).sum():,}, from the largest to the smallest"
        if rows < (sizes > 0).sum()
        else "all of them"
    )
    brief = {key: value for key, value in manifest.items() if key not in ("shards", "source")}
    brief["annotator"] = {key: value for key, value in f.items() if key != "counts"}
    return html.page(
        f"Annotation set {folder.name}",
        f"Guidance signals of {manifest['num_images']:,} images, made by {'ground truth' if oracle else 'k-means, without labels'}.",
        [
            html.facts(cards),
            html.section(
                f"What each {what} holds",
                f"One row a {what} ({some}): id, number of images, and its first members.",
                html.picture(folder / WALL, alt="wall of cluster members"),
            ),
            html.section("Sizes", f"Images in each {what}.", html.picture(folder / SIZES, alt="cluster sizes")),
            html.section(
                "How it was made",
                "",
                html.folded("manifest", html.code(yaml.safe_dump(brief, sort_keys=False, width=110))),
            ),
        ],
    )
