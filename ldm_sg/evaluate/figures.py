"""Features -> the figures asked for; how a result reads and is written."""

import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_sg.annotate.clusters import ami, ari, contingency, nmi
from ldm_sg.errors import InputError, choices
from ldm_sg.evaluate import metrics
from ldm_sg.evaluate.inception import Inception
from ldm_sg.evaluate.metrics import NEEDS, Moments
from ldm_sg.folder import write_json

GUIDANCE = ("consistency", "layout", "edit", "nmi")  # judged by the run's own g and f
BY_CLUSTER = ("consistency", "fd_clusters", "nmi")  # which ask f for cluster ids
OF_STATISTICS = ("fd", "sfid", "is")  # that need no real images, only their mean and covariance
RESIZED = {"tf": ", resized as torch-fidelity does", "clean": ", resized as clean-fid does"}
LEAST = 20  # samples, and real images, of a cluster of which there is an fd


def parse_metrics(text: str) -> list[str]:
    """'fd,prdc' -> ['fd', 'prdc']; InputError for one that does not exist."""
    wanted = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in wanted:
        if name not in NEEDS:
            raise InputError(f"metric {name!r}; {choices(name, NEEDS)}")
    if not wanted:
        raise InputError(f"metrics={text!r}: name at least one; {choices('', NEEDS)}")
    return wanted


def check_enough(wanted: list[str], images: int | None, where: str) -> None:
    """Refused before anything is computed: fewer images than a metric needs. None = not known yet."""
    for name in wanted:
        if images is not None and images < NEEDS[name]:
            raise InputError(f"{where}: {images} images are too few for {name}, which needs at least {NEEDS[name]}")


def classifies(network: Any) -> bool:
    return isinstance(network, Inception) and network.classifies


# Which networks a metric is for, and what it says where there is none.
ABLE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "is": (
        classifies,
        "reads a classifier's scores (no network here has such a last layer, or it is empty): --features inception",
    ),
    "sfid": (lambda network: isinstance(network, Inception), "reads maps inside Inception: --features inception"),
    "cmmd": (
        lambda network: str(network.manifest.get("model")).startswith("open_clip:"),
        "compares embeddings of an open_clip tower: --features open_clip:MODEL/TAG",
    ),
}


def of_networks(wanted: list[str], networks: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each network can judge of the metrics wanted. InputError for one that none of them can."""
    fits = {name: ABLE[name][0] for name in wanted if name in ABLE}
    for name, able in fits.items():
        if not any(map(able, networks.values())):
            raise InputError(f"metric `{name}` {ABLE[name][1]}; or leave `{name}` out")
    return {space: [name for name in wanted if fits.get(name, bool)(network)] for space, network in networks.items()}


def moments(wanted: list[str], features: Tensor, dim: int) -> dict[str, Moments]:
    """Of features [N, dim], or with Inception's maps behind them, for fd and sfid where these are wanted."""
    parts = {"fd": features[:, :dim], "sfid": features[:, dim:]}
    return {name: Moments.of(part) for name, part in parts.items() if name in wanted}


def compute(
    wanted: list[str], samples: Tensor, real: Tensor | None, known: Mapping[str, Moments], network: Any, seed: int
) -> dict[str, float]:
    """Features [N, D] of samples and [M, D] of real images, of which the moments are `known` -> the figures that are distances,
    by their key; real: None where nothing but the moments is known."""
    dim = network.manifest["dim"]
    found = {name: metrics.frechet_of(own, known[name]) for name, own in moments(wanted, samples, dim).items()}
    samples = samples[:, :dim]
    reference = samples if real is None else real[:, :dim]
    if "kid" in wanted:
        found |= metrics.kernel_distance(samples, reference, seed=seed)
    if "cmmd" in wanted:
        found["cmmd"] = metrics.cmmd(samples, reference)
    if "prdc" in wanted:
        found |= metrics.manifold(samples, reference, seed=seed)
    if "is" in wanted:
        found |= metrics.inception_score(network.logits(samples.to(network.net.fc.weight.device)), seed=seed)
    return found


def by_cluster(
    asked: Tensor, samples: Tensor, ids: Tensor, real: Tensor
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Clusters that samples were asked for [N] and that real images are of [M], features of both -> the mean and the largest fd
    of clusters, and each with the images it rests on; those of fewer than LEAST have none."""
    rows: list[dict[str, Any]] = []
    for k in asked.unique().tolist():
        a, b = samples[asked == k], real[ids == k]
        fd = {"fd": metrics.frechet_distance(a, b)} if min(len(a), len(b)) >= LEAST else {}
        rows.append({"cluster": k, "samples": len(a), "real": len(b), **fd})
    fds = [row["fd"] for row in rows if "fd" in row]
    counts = {"fd_clusters_counted": len(fds), "fd_clusters_left_out": len(rows) - len(fds)}
    return counts | ({"fd_clusters": sum(fds) / len(fds), "fd_clusters_worst": max(fds)} if fds else {}), rows


def agreement(ids: Tensor, labels: Tensor) -> dict[str, float]:
    """NMI, AMI and ARI of clusters [N] with classes [N], of images that have a class (-1: none), and how many these are."""
    a, b = (part[labels >= 0].unique(return_inverse=True)[1].numpy() for part in (ids, labels))
    table = contingency(a, b, (a.max() + 1, b.max() + 1))
    return {"nmi": nmi(table), "ami": ami(table), "ari": ari(table), "nmi_images": len(a)}


def remarks(result: dict[str, Any], smallest: int, skipped: dict[str, str]) -> list[str]:
    """What a reader of the figures must know: counts that fell short or differ, images left out or enlarged, estimates that
    are biased, judges that are not impartial. smallest: pixels of the first reference image; skipped: image -> reason."""
    asked, samples, real = result["asked"], result["samples"], result["reference_images"]
    fewer, size = min(samples, real or samples), result["preprocessing"]["size"]
    notes = [f"{samples:,} samples, not the {asked['n']:,} asked for"] * (samples < asked["n"])
    if smallest < size:
        notes.append(
            f"reference images of {smallest} px are enlarged to {size} px: give --size {smallest}, or larger ones"
        )
    if "prdc" in asked["metrics"] and samples != real:
        kind = "reference images" if real > samples else "samples"
        notes.append(f"prdc compares equal numbers: {fewer:,} of the {max(samples, real):,} {kind}, chosen at random")
    for space, found in result["metrics"].items():
        judge = result["judges"][space]
        if "fd" in found and fewer <= judge["dim"]:
            notes.append(
                f"fd of {fewer:,} images in {judge['dim']:,} dimensions ({space}) is far above its limit: their covariance is known in "
                f"{fewer - 1:,} directions only. It takes more than {judge['dim']:,} images, better ten times as many; compare it only "
                "at equal counts"
            )
        if found.get("fd_clusters_left_out"):
            notes.append(
                f"fd_clusters ({space}) leaves out {found['fd_clusters_left_out']} clusters of fewer than {LEAST} samples or real "
                "images; each fd depends on its counts, which stand beside it"
            )
        if judge["guide"] and found.keys() & {"fd", "kid", "precision", "fd_clusters"}:
            notes.append(
                f"{space} made this run's signals, which favours the run: compare in another space (--features)"
            )
    if skipped:
        name, reason = next(iter(skipped.items()))
        notes.append(f"{len(skipped):,} images or files are left out; the first: {name}: {reason}")
    return notes


def table(result: dict[str, Any]) -> str:
    """The figures in lines, each with the space it was judged in, then what they were computed of."""
    real = result["reference_images"]
    lines = [
        f"{name:<26}{value:>12.4g}  in {space}{RESIZED.get(result['judges'][space].get('resize'), '')}"
        for space, values in result["metrics"].items()
        for name, value in values.items()
    ]
    made = ", ".join(f"{key} {value}" for key, value in result["sampling"].items())
    lines.append(
        f"{result['samples']:,} samples of {result['source']}{f' ({made})' if made else ''} against "
        f"{f'{real:,} images' if real else 'the statistics'} of {result['reference']}, {result['preprocessing']['size']} px, "
        f"{result['seconds']} s"
    )
    return "\n".join(lines + [f"note: {note}" for note in result["notes"]])


def prepare(file: Path) -> Path:
    """The folder of `file` exists and can be written, before hours of work; InputError otherwise."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise InputError(f"--out {str(file)!r}: {err.strerror}: give another --out FILE.json") from err
    if file.is_dir() or not os.access(file.parent, os.W_OK):
        raise InputError(f"--out {str(file)!r} cannot be written there: give another --out FILE.json")
    return file


def free(file: Path, asked: dict[str, Any]) -> Path:
    """`file`, or the first of NAME_2, NAME_3 ... that does not hold the figures of something else that was asked."""
    names = itertools.chain([file], (file.with_stem(f"{file.stem}_{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists() or _is_of(name, asked))


def _is_of(file: Path, asked: dict[str, Any]) -> bool:
    try:
        return json.loads(file.read_text())["asked"] == asked
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write(file: Path, result: dict[str, Any]) -> None:
    """JSON that appears under its name when whole."""
    try:
        write_json(file, result)
    except InputError as err:  # a disk that filled up meanwhile
        raise InputError(f"--out {err}; the figures stand above") from err
