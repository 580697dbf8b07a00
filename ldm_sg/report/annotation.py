"""What an annotation set looks like: a wall with real members of each cluster, the sizes, and report.html around them."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm_sg.annotate.names import read_names
from ldm_sg.annotate.tally import TALLY
from ldm_sg.autoencoder.manifest import blurred
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.photos import images_at
from ldm_sg.errors import InputError, one_line
from ldm_sg.folder import flat, write_text
from ldm_sg.report import charts, grids, html
from ldm_sg.report.signals import over, with_boxes
from ldm_sg.weights import read_finite

ROWS, OPEN = 400, 40  # clusters of the wall, and how many of them are not folded away
NEAR, FAR = 7, 3  # members shown: nearest to their centroid, and farthest from it
SEEN = 20_000  # images, the first ones, among which they are looked for
LIKE = 4  # nearest clusters
THUMB = 80  # pixels
EXAMPLES = 32  # images with their boxes or masks
WALL, BOXES, MASKS = "clusters", "boxes.png", "masks.png"
SPATIAL = {
    BOXES: "The box of each image.",
    MASKS: "Images, and their segments laid over them; a colour is the same class everywhere.",
}
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
        for entry, url in zip(latents.manifest["shards"], shards):
            entry["url"] = url
    if latents.spec.one_id:
        kept = extremes(latents, chosen_clusters(latents.signals.counts(), ROWS))
        places = [i for groups in kept.values() for group in groups for i in group]
        images = images_at(latents, places, min(THUMB, latents.manifest["size"]))
        for k, groups in kept.items():
            stacks = [torch.stack([images[i] for i in group]) for group in groups]
            grids.save(grids.strip(stacks), folder / WALL / f"{k:06d}.webp")
    if latents.spec.spatial:
        _draw_spatial(folder, latents)
    write_text(folder / "report.html", document(folder, latents.manifest, sections(latents)))
    return folder / "report.html"


def sections(latents: LatentSet) -> list[str]:
    """What the set's signals are, of the pictures that `write_report` drew."""
    folder, sizes = latents.folder, charts.sizes(latents.signals.counts().tolist())
    drawn = {name: html.picture(folder / name, alt=name) for name in SPATIAL}
    return [
        wall(folder, latents.manifest, "RUN") if latents.spec.one_id else "",
        *(html.section("What the signals look like", SPATIAL[name], picture) for name, picture in drawn.items()),
        html.section("Sizes", "Images with each label.", html.chart(sizes)),
    ]


def wall(folder: Path, manifest: Mapping[str, Any], run: str) -> str:
    """A row a cluster: id, what is known of it, the command that samples it from `run`, members; '' where the set has no
    strips."""
    annotator, clusters = manifest.get("annotator") or {}, about(folder, manifest)
    shown = {k: path for k in range(len(clusters)) if (path := folder / WALL / f"{k:06d}.webp").is_file()}
    rows = [_row(k, clusters, shown, f"ldm-sg sample {run} --cluster {k}") for k in shown]
    filled = sum(cluster["size"] > 0 for cluster in clusters)
    some = "" if len(rows) == filled else f" {len(rows)} of {filled:,} are shown, from the largest to the smallest."
    text = f"Left the {NEAR} members nearest to the centroid, right the {FAR} farthest from it.{some}"
    if annotator.get("kind") == "oracle":
        text = f"Its first members.{some}"
    more = html.folded(f"{len(rows) - OPEN} more clusters", "".join(rows[OPEN:])) if len(rows) > OPEN else ""
    return html.section("What each cluster holds", text, "".join(rows[:OPEN]), more)


def _row(k: int, clusters: list[dict[str, Any]], shown: Mapping[int, Path], command: str) -> str:
    own, names = clusters[k], clusters[k]["names"]
    note = f"{own['size']:,} image{'s' * (own['size'] != 1)}"
    note += "" if own["purity"] is None else f", {own['purity']:.0%} of class {own['label']}"
    note += "".join(f", or {name}" for name in names[1:])
    like = [(f"cluster-{i}" if i in shown else "", " ".join([str(i), *clusters[i]["names"][:1]])) for i in own["like"]]
    return html.row(": ".join([f"Cluster {k}", *names[:1]]), note, command, shown[k], f"cluster-{k}", like)


def about(folder: Path, manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a set's files tell of each cluster, where images have one id each: `size`; `purity`, the share of its most frequent
    class, `label`, among its images that have one (else None); `like`, the clusters of the nearest centroids; `names`."""
    counts = (manifest.get("annotator") or {}).get("counts") or []
    names = (read_names(folder, manifest.get("hash")) or {"names": []})["names"] + [[]] * len(counts)
    found = [{"size": n, "purity": None, "label": None, "like": [], "names": own} for n, own in zip(counts, names)]
    for own, of, classes in zip(found, *_tally(folder)):
        if of.any():
            own["purity"], own["label"] = float(of.max() / of.sum()), int(classes[of.argmax()])
    filled = [k for k, size in enumerate(counts) if size]
    if (centroids := _centroids(folder)) is not None and len(centroids) == len(found):
        apart = torch.cdist(centroids[filled], centroids[filled]).fill_diagonal_(torch.inf)
        for k, order in zip(filled, apart.argsort(dim=1, stable=True)[:, : min(LIKE, len(filled) - 1)].tolist()):
            found[k]["like"] = [filled[i] for i in order]
    return found


def _tally(folder: Path) -> tuple[Sequence[np.ndarray], Sequence[np.ndarray]]:
    """For each cluster, its images of each class, and the classes; nothing of a set that keeps no tally."""
    if not (path := folder / TALLY).is_file():
        return [], []
    try:
        with np.load(path, allow_pickle=False) as tally:
            table, classes = (tally[name].astype(np.int64, casting="same_kind") for name in ("table", "classes"))
            return table[:, :-1], [classes] * len(table)
    except Exception as err:  # zip and numpy raise what they like
        raise InputError(f"{path} is damaged: {one_line(err)[:100]}: annotate again") from err


def _centroids(folder: Path) -> Tensor | None:
    """[K, D], or None where f has none."""
    path = folder / "annotator" / "centroids.safetensors"
    return read_finite(path, {"centroids": (0, 0)})["centroids"] if path.is_file() else None


def distances(latents: LatentSet, at: Tensor) -> np.ndarray | None:
    """From the images `at` [B] to their own centroids [B]; None where f has none, or where g's features were removed."""
    if (centroids := _centroids(latents.folder)) is not None:
        with suppress(InputError):
            points = torch.nn.functional.normalize(latents.features(at), dim=1)
            return (points - centroids[latents.signals.k[at]]).norm(dim=1).numpy()
    return None


def extremes(latents: LatentSet, clusters: list[int]) -> dict[int, list[list[int]]]:
    """Cluster -> indices of its members nearest to its centroid, and of those farthest from it (nearer ones first). Where f
    has no centroids, the first ones."""
    first = torch.arange(min(SEEN, len(latents)))
    ids, apart, kept = latents.signals.k[first].numpy(), distances(latents, first), {}
    for k in clusters:
        own = np.flatnonzero(ids == k)
        own = (own if apart is None else own[np.argsort(apart[own], kind="stable")]).tolist()
        if own:
            kept[k] = [group for group in (own[:NEAR], own[max(NEAR, len(own) - FAR) :]) if group]
    return kept


def _draw_spatial(folder: Path, latents: LatentSet) -> None:
    """boxes.png or masks.png: the first images with their boxes or masks."""
    images, places = first_images(latents, EXAMPLES)
    signals, columns, name = latents.signals[places], min(8, len(images)), MASKS
    if signals.box is not None:
        drawn, name = with_boxes(images, signals.box), BOXES
    else:  # a row of images, and below it one of their masks
        masked = over(images, signals.masks(), signals.spec.num_labels)
        drawn = torch.cat([row for pair in zip(images.split(columns), masked.split(columns)) for row in pair])
    grids.save(grids.grid(drawn, columns, scale=grids.best_scale(images)), folder / name)


def first_images(latents: LatentSet, n: int) -> tuple[Tensor, Tensor]:
    """The first n images uint8 [n, 3, size, size], of whole rows of eight where there are enough, and their indices."""
    found = images_at(latents, range(min(n, len(latents) // 8 * 8 or len(latents))), latents.manifest["size"])
    return torch.stack(list(found.values())), torch.tensor(list(found))


def chosen_clusters(sizes: np.ndarray, limit: int) -> list[int]:
    """At most `limit` clusters that are not empty, from the largest to the smallest in even steps."""
    order = np.argsort(-sizes, kind="stable")
    return evenly(order[: np.count_nonzero(sizes)], limit).tolist()


def evenly(of: np.ndarray, n: int) -> np.ndarray:
    """At most n of them, in even steps, the first and the last one too."""
    return of[np.linspace(0, len(of) - 1, min(n, len(of))).round().astype(int)]


CARDS = {  # key in manifest.yaml -> what a reader sees
    "num_images": ("images", "{:,}"),
    "num_skipped": ("left out", "{:,}"),
    "size": ("size", "{} px"),
    "view.buckets": ("sizes", "{}"),
    "annotator.kind": ("annotator", "{}"),
    "guidance.num_labels": ("labels", "{:,}"),
    "guidance.spatial": ("guided by", "{}"),
    "annotator.counts": ("smallest / largest", "{}"),
    "annotator.empty": ("empty", "{:,}"),
    "annotator.entropy": ("entropy", "{:.2f} of {max_entropy:.2f} nats"),
    "annotator.nmi": ("NMI with the classes", "{:.3f}"),
    "annotator.ami": ("AMI with the classes", "{:.3f}"),
    "annotator.ari": ("ARI with the classes", "{:.3f}"),
    "annotator.corloc": ("CorLoc", "{:.1%} of {corloc_images:,}"),
    "annotator.not_found": ("no box found", "{:,}"),
    "annotator.miou": ("mIoU", "{:.1%}"),
    "annotator.accuracy": ("pixel accuracy", "{:.1%}"),
    "autoencoder.name": ("autoencoder", "{}"),
    "autoencoder.round_trip": ("round trip", "{:.1f} dB"),
    "latent_shape": ("latent", "{}"),
    "flips": ("mirrored", "too"),
    "features.name": ("g", "{}"),
    "features.dim": ("features", "{:,}"),
}


def cards(manifest: Mapping[str, Any]) -> dict[str, str]:
    """What a set's manifest says, as far as it does, as a reader wants it."""
    said, annotator = flat(manifest), manifest.get("annotator") or {}
    counts, buckets = annotator.get("counts") or [], said.get("view.buckets") or []
    said |= {
        "view.buckets": ", ".join(map(str, buckets)),
        "annotator.counts": f"{min(counts):,} / {max(counts):,}" if counts else "",
        "latent_shape": " × ".join(map(str, said.get("latent_shape") or [])),
    }
    if buckets:
        said |= {"size": None, "latent_shape": None}
    known = {"max_entropy": math.log(max(1, len(counts))), **annotator}
    there = {key: value for key, value in said.items() if value not in (None, "") and value is not False}
    return {title: form.format(there[key], **known) for key, (title, form) in CARDS.items() if key in there}


def recipe(manifest: Mapping[str, Any]) -> str:
    """The manifest, without its long lists."""
    brief = {key: value for key, value in manifest.items() if key != "shards"}
    if brief.get("annotator"):
        brief["annotator"] = {key: value for key, value in brief["annotator"].items() if key != "counts"}
    return html.folded("manifest.yaml of the annotation set", html.yaml_code(brief))


def document(folder: Path, manifest: Mapping[str, Any], sections: list[str]) -> str:
    """The page, self-contained."""
    by = "from ground truth" if manifest["annotator"]["kind"] == "oracle" else "without labels"
    parts = [
        html.facts(cards(manifest)),
        html.paragraph(blurred(manifest["autoencoder"])),
        html.paragraph(WORDS),
        *sections,
        html.section("How it was made", "", recipe(manifest)),
    ]
    lead = f"Guidance signals of {manifest['num_images']:,} images, made {by}."
    return html.page(f"Annotation set {folder.name}", lead, parts)
