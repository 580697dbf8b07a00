"""What an annotation set looks like: a wall with real members of each cluster, the sizes, and report.html around them."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm_sg.autoencoder.manifest import blurred
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.photos import images_at
from ldm_sg.errors import InputError
from ldm_sg.folder import write_text
from ldm_sg.report import charts, grids, html
from ldm_sg.report.signals import over, with_boxes

ROWS, OPEN = 400, 40  # clusters of the wall, and how many of them are not folded away
NEAR, FAR = 7, 3  # members shown: nearest to their centroid, and farthest from it
SEEN = 20_000  # images, the first ones, among which they are looked for
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
        for entry, url in zip(latents.manifest["shards"], shards):
            entry["url"] = url
    signals, sections = latents.signals, []
    sizes = signals.counts()
    if signals.k is not None and signals.k.ndim == 1:
        for k, groups in extremes(latents, chosen_clusters(sizes, ROWS)).items():
            grids.save(grids.strip(groups), folder / WALL / f"{k:06d}.webp")
        sections.append(wall(folder, latents.manifest, "RUN"))
    if signals.spec.spatial:
        sections.append(_spatial(folder, latents))
    if len(sizes):
        sections.append(html.section("Sizes", "Images with each label.", html.chart(charts.sizes(sizes.tolist()))))
    write_text(folder / "report.html", document(folder, latents.manifest, sections))
    return folder / "report.html"


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


def extremes(latents: LatentSet, clusters: list[int]) -> dict[int, list[Tensor]]:
    """Cluster -> its members nearest to its centroid, and those farthest from it (nearer ones first), two stacks uint8
    [N, 3, THUMB, THUMB]. Where f has no centroids, the first ones."""
    distances = _distances(latents)
    ids, kept = latents.signals.k[: len(distances)].numpy(), {}
    for k in clusters:
        own = np.flatnonzero(ids == k)
        own = own[np.argsort(distances[own], kind="stable")].tolist()
        kept[k] = [group for group in (own[:NEAR], own[max(NEAR, len(own) - FAR) :]) if group]
    places = [i for groups in kept.values() for group in groups for i in group]
    images = images_at(latents, places, min(THUMB, latents.manifest["size"]))
    return {k: [torch.stack([images[i] for i in group]) for group in groups] for k, groups in kept.items() if groups}


def _distances(latents: LatentSet) -> np.ndarray:
    """From the first SEEN images to their own centroids; zeros where f has none, or where g's features were removed."""
    path, first = latents.folder / "annotator" / "centroids.safetensors", torch.arange(min(SEEN, len(latents)))
    if path.is_file():
        with suppress(InputError):
            points = torch.nn.functional.normalize(latents.features(first), dim=1)
            return (points - load_file(path)["centroids"][latents.signals.k[first]]).norm(dim=1).numpy()
    return np.zeros(len(first))


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
    found = images_at(latents, range(min(n, len(latents) // 8 * 8 or len(latents))), latents.manifest["size"])
    return torch.stack(list(found.values())), torch.tensor(list(found))


def chosen_clusters(sizes: np.ndarray, limit: int) -> list[int]:
    """All clusters that are not empty, by id; where there are more than `limit`, that many from the largest to the
    smallest in even steps."""
    filled = np.flatnonzero(sizes)
    if len(filled) <= limit:
        return filled.tolist()
    by_size = filled[np.argsort(-sizes[filled], kind="stable")]
    return by_size[np.linspace(0, len(by_size) - 1, limit).round().astype(int)].tolist()


def members(folder: Path, manifest: Mapping[str, Any], clusters: list[int], each: int) -> dict[int, Tensor]:
    """Cluster -> its first members in the order of the shards, uint8 [at most `each`, 3, size, size]."""
    latents = LatentSet(folder)
    chosen = {k: latents.signals.having(k)[:each].tolist() for k in clusters}
    images = images_at(latents, [i for places in chosen.values() for i in places], manifest["size"])
    return {k: torch.stack([images[i] for i in places]) for k, places in chosen.items() if places}


FIGURES = {  # of the annotator, in manifest.yaml -> what a reader sees
    "k": ("labels", "{:,}"),
    "empty": ("empty", "{:,}"),
    "entropy": ("entropy", "{:.2f} of {max_entropy:.2f} nats"),
    "nmi": ("NMI with the classes", "{:.3f}"),
    "ami": ("AMI with the classes", "{:.3f}"),
    "ari": ("ARI with the classes", "{:.3f}"),
    "corloc": ("CorLoc", "{:.1%} of {corloc_images:,}"),
    "not_found": ("no box found", "{:,}"),
    "miou": ("mIoU", "{:.1%}"),
    "accuracy": ("pixel accuracy", "{:.1%}"),
}


def figures(annotator: Mapping[str, Any]) -> dict[str, str]:
    """What the manifest's `annotator` says in numbers, as a reader wants it."""
    known = {"max_entropy": math.log(max(1, len(annotator.get("counts") or []))), **annotator}
    there = [key for key in FIGURES if isinstance(known.get(key), int | float)]
    return {FIGURES[key][0]: FIGURES[key][1].format(known[key], **known) for key in there}


def recipe(manifest: Mapping[str, Any]) -> str:
    """The manifest, without its long lists."""
    brief = {key: value for key, value in manifest.items() if key != "shards"}
    if brief.get("annotator"):
        brief["annotator"] = {key: value for key, value in brief["annotator"].items() if key != "counts"}
    return html.folded("manifest.yaml of the annotation set", html.yaml_code(brief))


def document(folder: Path, manifest: Mapping[str, Any], sections: list[str]) -> str:
    """report.html, self-contained."""
    f, g, first = manifest["annotator"], manifest["features"], manifest["autoencoder"]
    shapes = {tuple(shard.get("latent_shape", manifest["latent_shape"])) for shard in manifest["shards"]}
    latents = ", ".join(" x ".join(map(str, shape)) for shape in sorted(shapes))
    cards = {
        "images": f"{manifest['num_images']:,}",
        "left out": f"{manifest['num_skipped']:,}",
        "annotator": f["kind"],
        **figures(f),
        "latents": latents + (", mirrored too" if manifest["flips"] else ""),
        "autoencoder": first["name"] + (f", {first['round_trip']:.1f} dB" if first.get("round_trip") else ""),
    }
    if g:
        cards["g"] = f"{g['name']}, {g['dim']} features"
    by = "from ground truth" if f["kind"] == "oracle" else "without labels"
    return html.page(
        f"Annotation set {folder.name}",
        f"Guidance signals of {manifest['num_images']:,} images, made {by}.",
        [
            html.facts(cards),
            html.paragraph(blurred(first)),
            html.paragraph(WORDS),
            *sections,
            html.section("How it was made", "", recipe(manifest)),
        ],
    )
