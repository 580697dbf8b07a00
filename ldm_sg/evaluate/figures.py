"""Features -> the figures asked for; how a result reads and is written."""

import itertools
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_sg.annotate.clusters import ami, ari, contingency, nmi
from ldm_sg.errors import InputError, choices
from ldm_sg.evaluate import memory, metrics
from ldm_sg.evaluate.inception import Inception
from ldm_sg.evaluate.metrics import NEEDS, Moments
from ldm_sg.folder import disk_errors, read_mapping

GUIDANCE = ("consistency", "layout", "edit", "nmi")  # judged by the run's own g and f
FOLLOWED = ("consistency", "fd_clusters", "layout", "edit")  # of samples that were asked for something
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


NEEDED = {  # what a metric reads that not every network has
    "is": "reads a classifier's scores: --features inception with weights whose last layer is not empty",
    "sfid": "reads maps inside Inception: --features inception",
    "cmmd": "compares embeddings of an open_clip tower: --features open_clip:MODEL/TAG",
}


def _has(network: Any) -> set[str]:
    if isinstance(network, Inception):
        return {"sfid", "is"} if network.classifies else {"sfid"}
    return {"cmmd"} if str(network.manifest.get("model")).startswith("open_clip:") else set()


def of_networks(wanted: list[str], networks: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each network can judge of the metrics wanted. InputError for one that none of them can."""
    has = {space: _has(network) for space, network in networks.items()}
    for name in NEEDED.keys() & {*wanted}.difference(*has.values()):
        raise InputError(f"metric `{name}` {NEEDED[name]}; or leave `{name}` out")
    return {space: [name for name in wanted if name not in NEEDED or name in own] for space, own in has.items()}


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


def remarks(result: dict[str, Any], smallest: int, skipped: dict[str, str]) -> Iterator[str]:
    """What a reader of the figures must know: counts that fell short or differ, images left out or enlarged, estimates that
    are biased, judges that are not impartial. smallest: pixels of the first reference image; skipped: image -> reason."""
    asked, samples, real = result["asked"], result["samples"], result["reference_images"]
    fewer, size = min(samples, real or samples), result["preprocessing"]["size"]
    if samples < asked["n"]:
        yield f"{samples:,} samples, not the {asked['n']:,} asked for"
    if smallest < size:
        yield f"reference images of {smallest} px are enlarged to {size} px: give --size {smallest}, or larger ones"
    if "prdc" in asked["metrics"] and samples != real:
        kind = "reference images" if real > samples else "samples"
        yield f"prdc compares equal numbers: {fewer:,} of the {max(samples, real):,} {kind}, chosen at random"
    for space, found in result["metrics"].items():
        judge, left_out = result["judges"][space], found.get("fd_clusters_left_out")
        if "fd" in found and fewer <= judge["dim"]:
            yield (
                f"fd of {fewer:,} images in {judge['dim']:,} dimensions ({space}) is far above its limit: their covariance is known in "
                f"{fewer - 1:,} directions only. It takes more than {judge['dim']:,} images, better ten times as many; compare it only "
                "at equal counts"
            )
        if left_out:
            yield f"fd_clusters ({space}) leaves out {left_out} clusters of fewer than {LEAST} samples or real images"
        if space == memory.Pixels.name and found["memory_threshold"] < memory.SAME:
            yield (
                f"at least {memory.CHANCE:.0%} of the held-out images are copies of reference images "
                f"({found['memory_threshold']:.2g} grey levels apart), so memory_copies counts few copies: deduplicate "
                "(ldm-sg dedup), then hold out"
            )
        if judge["guide"] and found.keys() & {"fd", "kid", "precision", "fd_clusters"}:
            yield f"{space} made this run's signals, which favours the run: compare in another space (--features)"
    yield from unread(skipped)


def unread(skipped: Mapping[str, str]) -> Iterator[str]:
    for name, reason in itertools.islice(skipped.items(), 1):
        yield f"{len(skipped):,} images or files are left out; the first: {name}: {reason}"


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
    if file.is_dir():
        raise InputError(f"{file}: a folder, which cannot be written: give --out FILE.json")
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    return file


def free(file: Path, made: dict[str, Any]) -> Path:
    """`file`, or the first of NAME_2, NAME_3 ... that does not hold the figures of something else: `made` is what was asked, and
    how samples were drawn."""
    names = itertools.chain([file], (file.with_stem(f"{file.stem}_{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists() or _is_of(name, made))


def _is_of(file: Path, made: dict[str, Any]) -> bool:
    with suppress(InputError):
        found = read_mapping(file, dict.fromkeys(made, dict))
        return all(found[key] == value for key, value in made.items())
    return False
