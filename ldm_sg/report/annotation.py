"""What an annotation set looks like: a wall with real members of each cluster, the sizes, and report.html around them."""

import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import load_file
from torch import Tensor

from ldm_sg.autoencoder.manifest import blurred
from ldm_sg.data.images import BadImage, crop_resize, decode, to_tensor
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.shards import read_shard
from ldm_sg.data.tars import MOST_TEXT, read_members
from ldm_sg.report import charts, grids, html
from ldm_sg.report.signals import over, with_boxes

ROWS, OPEN = 400, 40  # clusters of the wall, and how many of them are not folded away
NEAR, FAR = 7, 3  # members shown: nearest to their centroid, and farthest from it
SEEN = 20_000  # images, those of the first shards, among which they are looked for
THUMB = 80  # pixels
EXAMPLES = 32  # images with their boxes or masks
WALL, BOXES, MASKS = "clusters", "boxes.png", "masks.png"
WORDS = (
    "g is the frozen network that looked at the images, f the annotator that made signals of what it saw. A label is one of the "
    "ids that f gives; nobody named them. Entropy says how evenly images fall to labels: at its maximum all have as many."
)


def write_report(folder: str | Path, shards: Sequence[str] | None = None) -> Path:
    """FOLDER/report.html of a finished annotation set, and the pictures in it: clusters/ID.webp where images have one id each,
    boxes.png or masks.png where signals are spatial. The source shards are read again for the images: those of the manifest,
    or `shards` as the user named them, which may be commands. Raises InputError when the set is not finished or a source
    shard is gone."""
    folder = Path(folder)
    latents = LatentSet(folder)
    if shards is not None:
        latents.manifest["source"] = [{"url": url} for url in shards]
    manifest, signals = latents.manifest, latents.signals
    sizes = signals.counts()
    sections = []
    if signals.k is not None and signals.k.ndim == 1:
        sections.append(_wall(folder, manifest, sizes))
    if signals.spec.spatial:
        sections.append(_spatial(folder, latents))
    if len(sizes):
        sections.append(html.section("Sizes", "Images with each label.", html.chart(charts.sizes(sizes.tolist()))))
    return html.write(folder / "report.html", document(folder, manifest, sections))


def _wall(folder: Path, manifest: Mapping[str, Any], sizes: np.ndarray) -> str:
    """Saves one strip of real members a cluster."""
    for k, groups in extremes(folder, manifest, chosen_clusters(sizes, ROWS)).items():
        grids.save(grids.strip(groups), folder / WALL / f"{k:06d}.webp")
    return wall(folder, manifest, "RUN")


def wall(folder: Path, manifest: Mapping[str, Any], run: str) -> str:
    """A row a cluster: id, images, the command that samples it from `run`, members; '' where the set has no strips."""
    annotator, rows = manifest.get("annotator") or {}, []
    counts = annotator.get("counts") or []
    for k, count in enumerate(counts):
        if (strip := folder / WALL / f"{k:06d}.webp").is_file():
            size = f"{count:,} image{'s' * (count != 1)}"
            rows.append(html.row(f"Cluster {k}", size, f"ldm-sg sample {run} --cluster {k}", strip))
    filled = sum(count > 0 for count in counts)
    some = "" if len(rows) == filled else f" {len(rows)} of {filled:,} are shown, from the largest to the smallest."
    text = f"Left the {NEAR} members nearest to the centroid, right the {FAR} farthest from it.{some}"
    if annotator.get("kind") == "oracle":
        text = f"Its first members.{some}"
    more = html.folded(f"{len(rows) - OPEN} more clusters", "".join(rows[OPEN:])) if len(rows) > OPEN else ""
    return html.section("What each cluster holds", text, "".join(rows[:OPEN]), more)


def extremes(folder: Path, manifest: Mapping[str, Any], clusters: list[int]) -> dict[int, list[Tensor]]:
    """Cluster -> its members nearest to its centroid, and those farthest from it (nearer ones first), two stacks uint8
    [N, 3, THUMB, THUMB]. Where f has no centroids, the first ones."""
    path = folder / "annotator" / "centroids.safetensors"
    centroids = load_file(path)["centroids"] if path.is_file() else None
    found: dict[int, list[tuple[float, int, str]]] = {k: [] for k in clusters}  # (distance, shard, key)
    seen = 0
    for index, shard in enumerate(manifest["shards"]):
        pairs = list(signals(folder / "shards" / shard["file"]))
        features = folder / "features" / f"{Path(shard['file']).stem}.npy"
        distances: Iterator[Any] | np.ndarray = itertools.repeat(0.0)
        if centroids is not None and features.is_file():
            points = np.load(features, allow_pickle=False).astype(np.float32)
            points /= np.linalg.norm(points, axis=1, keepdims=True).clip(1e-12)
            distances = np.linalg.norm(points - centroids[[k for _, k in pairs]], axis=1)
        for (key, k), distance in zip(pairs, distances):
            if k in found:
                found[k].append((float(distance), index, key))
        seen += len(pairs)
        if seen >= SEEN:
            break
    kept = {k: [m[:NEAR], m[max(NEAR, len(m) - FAR) :]] for k, m in ((k, sorted(m)) for k, m in found.items()) if m}
    images: dict[tuple[int, str], Tensor] = {}
    for index, source in enumerate(manifest["source"]):
        keys = {key for groups in kept.values() for group in groups for _, at, key in group if at == index}
        if keys:
            size = min(THUMB, manifest["size"])
            images |= {(index, key): image for key, image in pictures(source["url"], keys, size)}
    shown = {k: [[images[m[1:]] for m in group if m[1:] in images] for group in groups] for k, groups in kept.items()}
    return {k: [torch.stack(group) for group in groups if group] for k, groups in shown.items()}


def _spatial(folder: Path, latents: LatentSet) -> str:
    """The first images with their boxes or masks."""
    images, places = first_images(latents, EXAMPLES)
    signals = latents.signals[places]
    if signals.box is not None:
        name, text = BOXES, "The box of each image."
        picture = grids.grid(with_boxes(images, signals.box), 8, scale=grids.best_scale(images))
    else:
        name, text = MASKS, "Images, and their segments laid over them; a colour is the same class everywhere."
        drawn = over(images, signals.masks(), signals.spec.num_labels)
        rows = [row for pair in zip(images.split(8), drawn.split(8), strict=True) for row in pair]
        picture = grids.grid(torch.cat(rows), len(rows[0]), scale=grids.best_scale(images))
    grids.save(picture, folder / name)
    return html.section("What the signals look like", text, html.picture(folder / name, alt=name))


def first_images(latents: LatentSet, n: int) -> tuple[Tensor, Tensor]:
    """The first n images uint8 [n, 3, size, size], of whole rows of eight where there are enough, and their indices."""
    found: list[Tensor] = []
    places: list[int] = []
    start, n = 0, min(n, len(latents) // 8 * 8 or len(latents))
    for shard, source in zip(latents.manifest["shards"], latents.manifest["source"]):
        order = {key: start + i for i, key in enumerate(annotated_keys(latents.folder / "shards" / shard["file"]))}
        for key, image in pictures(source["url"], set(order), latents.manifest["size"]):
            if len(found) < n:
                found.append(image)
                places.append(order[key])
        start += len(order)
        if len(found) >= n:
            break
    return torch.stack(found), torch.tensor(places)


def annotated_keys(shard: Path) -> list[str]:
    """The keys of an annotated shard, in order."""
    return [member.key for member in read_members(str(shard), {}) if member.ext == "latent.npy"]


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
    for member in read_members(str(shard), {"k.npy": MOST_TEXT}):
        if member.ext == "k.npy":
            yield member.key, int(np.load(io.BytesIO(member.data), allow_pickle=False))


def pictures(url: str, keys: set[str], size: int) -> Iterator[tuple[str, Tensor]]:
    """(key, uint8 [3, size, size]) of the wanted keys of a source shard."""
    for sample in read_shard(url, lambda *_: None):
        if sample.key in keys:
            try:
                yield sample.key, to_tensor(crop_resize(decode(sample.image, sample.key), size))
            except BadImage:  # a key that came twice: its annotated copy is the good one
                continue


def document(folder: Path, manifest: Mapping[str, Any], sections: list[str]) -> str:
    """report.html, self-contained."""
    f, g, first = manifest["annotator"], manifest["features"], manifest["autoencoder"]
    known = {
        "k": ("labels", lambda v: f"{v:,}"),
        "empty": ("empty", lambda v: f"{v:,}"),
        "entropy": ("entropy", lambda v: f"{v:.2f} of {f['max_entropy']:.2f} nats"),
        "nmi": ("NMI with classes", lambda v: f"{v:.3f}"),
        "ari": ("ARI with classes", lambda v: f"{v:.3f}"),
        "corloc": ("CorLoc", lambda v: f"{v:.1%} of {f['corloc_images']:,}"),
        "not_found": ("no box found", lambda v: f"{v:,}"),
        "miou": ("mIoU", lambda v: f"{v:.1%}"),
        "accuracy": ("pixel accuracy", lambda v: f"{v:.1%}"),
    }
    cards = {
        "images": f"{manifest['num_images']:,}",
        "left out": f"{manifest['num_skipped']:,}",
        "annotator": f["kind"],
        **{name: show(f[key]) for key, (name, show) in known.items() if key in f},
        "latents": " x ".join(map(str, manifest["latent_shape"])) + (", mirrored too" if manifest["flips"] else ""),
        "autoencoder": first["name"] + (f", {first['round_trip']:.1f} dB" if first.get("round_trip") else ""),
    }
    if g:
        cards["g"] = f"{g['name']}, {g['dim']} features"
    brief = {key: value for key, value in manifest.items() if key not in ("shards", "source")}
    brief["annotator"] = {key: value for key, value in f.items() if key != "counts"}
    made = html.folded("manifest", html.code(yaml.safe_dump(brief, sort_keys=False, width=110)))
    by = "from ground truth" if f["kind"] == "oracle" else "without labels"
    return html.page(
        f"Annotation set {folder.name}",
        f"Guidance signals of {manifest['num_images']:,} images, made {by}.",
        [
            html.facts(cards),
            html.paragraph(blurred(first)),
            html.paragraph(WORDS),
            *sections,
            html.section("How it was made", "", made),
        ],
    )
