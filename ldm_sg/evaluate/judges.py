"""Who judges samples: feature networks, and the run's own g and f. Each sees every image once and gives figures of its space."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_sg.annotate.features import FeatureExtractor, load_extractor
from ldm_sg.annotate.kinds import LoadedAnnotator, load_annotator, load_f
from ldm_sg.config import FeaturesConfig
from ldm_sg.configfile import load
from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError
from ldm_sg.evaluate import figures, layout, memory
from ldm_sg.evaluate.collect import Key, Network
from ldm_sg.evaluate.consistency import check_ids, consistency
from ldm_sg.evaluate.inception import Inception, load_inception
from ldm_sg.evaluate.options import Options
from ldm_sg.evaluate.reference import Reference
from ldm_sg.evaluate.subjects import Subject
from ldm_sg.pipeline import SelfGuidedPipeline

OWN = "own"  # the run's g, in a list of judges
OTHERWISE = "name a feature network (--features inception, for example) and leave out what g and f judge"
WEIGHTS, SETTINGS = (".safetensors", ".pth", ".pt"), (".yaml", ".yml")


@dataclass(frozen=True)
class Judge:
    """Each image passes `network` once; `measure(what it gave of the samples [N, X], their positions [N] in the subject,
    real images)` is then this judge's figures."""

    key: Key  # the name of the network, and what of it: judges of one key share a pass
    manifest: dict[str, Any]  # of the network
    network: Network
    measure: Callable[[Tensor, Tensor, Reference], dict[str, float]]


def networks_of(judges: list[Judge]) -> dict[Key, Network]:
    return {judge.key: judge.network for judge in judges}


Seer = Inception | FeatureExtractor | memory.Pixels
Own = tuple[str, LoadedAnnotator]  # the run's g and f, and what the g is called


def distances(space: str, network: Seer, wanted: list[str], seed: int, own: Own | None) -> Judge:
    """Samples against real images by their features."""
    key, manifest, dim = (space, "features"), network.manifest, network.manifest["dim"]

    def measure(samples: Tensor, places: Tensor, reference: Reference) -> dict[str, float]:
        figures.check_enough(wanted, len(samples), reference.subject.where)
        if reference.statistics:
            return figures.compute(wanted, samples, None, reference.statistics, network, seed)
        real_places, real = reference.features(key, manifest)
        figures.check_enough(wanted, len(real), reference.images.where)
        kept = ["fd", *wanted] if "sfid" in wanted else wanted  # a file of sfid's statistics holds fd's too
        moments = figures.moments(kept, real, dim)
        reference.moments = moments or reference.moments  # pixels have none
        found = figures.compute(wanted, samples, real, moments, network, seed)
        details = reference.details.setdefault(space, {})
        samples, real = samples[:, :dim], real[:, :dim]
        if "fd_clusters" in wanted and own:
            asked, ids = reference.subject.ids()[places], reference.clusters(*own)[1]
            values, details["clusters"] = figures.by_cluster(asked, samples, ids, real)
            found |= values
        if "memory" in wanted and reference.held_out:
            unseen = reference.held_out.features(key, manifest)[1][:, :dim]
            values, *nearest = memory.copies(samples, real, unseen, unit=space != memory.Pixels.name)
            details["nearest"] = memory.closest(places, real_places, *nearest)
            found |= values
        return found

    return Judge(key, manifest, network, measure)


def by_cluster(space: str, own: LoadedAnnotator, wanted: list[str]) -> Judge:
    """Whether each sample lands in the cluster that it was asked for, and whether clusters are classes."""

    def measure(samples: Tensor, places: Tensor, reference: Reference) -> dict[str, float]:
        found: dict[str, float] = {}
        if "consistency" in wanted:
            subject, ceiling = reference.subject, reference.ceiling(own, own.features, "features")
            assert subject.pipe is not None and subject.pipe.signals.k is not None
            found |= consistency(subject.ids()[places], samples, subject.pipe.signals.k.cpu(), *ceiling, own.f)
        if "nmi" in wanted:
            real_places, real_ids = reference.clusters(space, own)
            assert reference.labels is not None
            found |= figures.agreement(real_ids, reference.labels[real_places])
        return found

    return Judge((space, "features"), own.extractor.manifest, own.features, measure)


def by_layout(space: str, own: LoadedAnnotator, pipe: SelfGuidedPipeline, asked: Signals) -> Judge:
    """Whether each sample shows, on the latent grid, the box or mask that it was asked for."""
    grid = pipe.latent_shape[1:]

    def network(images: Tensor) -> Tensor:
        return layout.layout(own(images), grid)

    def measure(samples: Tensor, places: Tensor, reference: Reference) -> dict[str, float]:
        ceiling = reference.ceiling(own, network, "layout on {}x{}".format(*grid))
        return layout.faithfulness(layout.layout(asked[places], grid), samples, *ceiling, pipe.spec.spatial)

    return Judge((space, "layout"), own.extractor.manifest, network, measure)


def parse_features(text: str | None) -> dict[str, str]:
    """'inception:FILE,demo-g' -> each judge's name and what was asked for; None: the run's own g. InputError for an empty
    place, and for two of one name."""
    asked = [part.strip() for part in (OWN if text is None else text).split(",")]
    if not all(asked):
        raise InputError(f"features={text!r}: a name is missing; write for example inception,demo-g")
    names = [_name(part) for part in asked]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"features={text!r}: two judges are called {twice}: name each network once")
    return dict(zip(names, asked))


def _name(features: str) -> str:
    if features.partition(":")[0] == "inception" or Path(features).suffix in WEIGHTS:
        return Inception.name
    if Path(features).suffix in SETTINGS:
        return Path(features).stem
    return Path(features).name if Path(features).is_dir() else features.replace("/", "-").replace(":", "-")


def load_network(features: str, resize: str | None, device: torch.device) -> Inception | FeatureExtractor:
    """`inception`, `inception:FILE`, a file of Inception weights, a YAML of FeaturesConfig, or any g by its name."""
    if _name(features) == Inception.name:
        return load_inception(features.removeprefix("inception").removeprefix(":") or None, resize or "tf").to(device)
    if Path(features).suffix in SETTINGS:
        return load_extractor(load(FeaturesConfig, features), device)
    return load_extractor(FeaturesConfig(model=features), device)


def open_judges(wanted: list[str], options: Options, subject: Subject, device: torch.device) -> list[Judge]:
    """Everything that judges, checked before the first sample is drawn."""
    named, resize, pipe = parse_features(options.features), options.resize, subject.pipe
    compared = [name for name in wanted if name not in figures.GUIDANCE]
    if not compared and "edit" not in wanted and options.features is not None:
        raise InputError(f"features={options.features!r}: {wanted[0]} is judged by the run's own g: leave features out")
    if resize and Inception.name not in named:
        raise InputError(f"resize={resize!r} is for the judge inception: add it to features")
    _check_guidance(wanted, subject)
    clusters, own_compares = {*figures.BY_CLUSTER} & {*wanted}, bool(compared) and OWN in named.values()
    own = _open_own(wanted, subject, device) if clusters or "layout" in wanted or own_compares else None
    networks: dict[str, Seer] = {
        name: load_network(text, resize, device) for name, text in named.items() if compared and text != OWN
    }
    space = _space(own.extractor, networks) if own else ""
    if own and own_compares:
        if space in networks:
            raise InputError(f"features={options.features!r}: {space} is the run's own g: name each network once")
        networks[space] = own.extractor
    able = figures.of_networks(compared, networks)
    for network in networks.values():
        if isinstance(network, Inception) and "sfid" in wanted:
            network.see_maps()
    if "memory" in wanted:
        networks[memory.Pixels.name], able[memory.Pixels.name] = memory.Pixels(), ["memory"]
    mine = (space, own) if own else None
    judges = [distances(name, network, able[name], options.seed, mine) for name, network in networks.items()]
    if own and clusters:
        judges.append(by_cluster(space, own, wanted))
    if own and pipe and subject.asked and "layout" in wanted:
        judges.append(by_layout(space, own, pipe, subject.asked))
    return judges


def _check_guidance(wanted: list[str], subject: Subject) -> None:
    """InputError where samples were asked for nothing, or nothing says what it was."""
    for name in wanted:
        if name in figures.FOLLOWED and not subject.guided:
            raise InputError(
                f"metric {name}: {subject.where} was trained without guidance (guidance.drop=1): leave it out"
            )
        if name in ("layout", "edit") and subject.asked is None:
            raise InputError(f"{subject.where}: the metric {name} draws its samples itself: give a run")
        if name in ("consistency", "fd_clusters"):
            subject.ids()
    if "layout" in wanted and subject.asked and not subject.asked.spec.spatial_channels:
        raise InputError(f"{subject.where}: the metric layout is for runs guided by boxes or masks")


def _open_own(wanted: list[str], subject: Subject, device: torch.device) -> LoadedAnnotator:
    """The run's own g and f."""
    if subject.pipe is None:
        raise InputError(f"{subject.where} belongs to no run (--run RUN) that has a g of its own; {OTHERWISE}")
    folder = subject.pipe.annotator_folder
    try:
        own = load_annotator(folder, device)
    except InputError as err:
        raise InputError(f"{err}; {OTHERWISE}") from err
    clusters = [name for name in figures.BY_CLUSTER if name in wanted]
    if clusters and not own.f.spec.one_id:
        raise InputError(f"{folder}: its annotator gives no cluster ids, so {clusters[0]} cannot be judged by it")
    if {*clusters} - {"nmi"}:
        check_ids(subject.ids(), own.f.k, subject.where)
    return own


def _space(own: FeatureExtractor, networks: dict[str, Seer]) -> str:
    """The name of the run's own g: that of a judge which is the same network, else its own where that is free."""
    same = ("sha256", "layer", "pool", "size")
    for name, network in networks.items():
        if all(network.manifest.get(key) == own.manifest[key] for key in same):
            return name
    return OWN if own.name in networks else own.name


def guide(pipe: SelfGuidedPipeline | None) -> dict[str, Any] | None:
    """The manifest of the g that made the run's signals; None without a run, and for signals that no g made."""
    return load_f(pipe.annotator_folder)[1]["features"] if pipe else None


def is_guide(judge: dict[str, Any], g: dict[str, Any] | None) -> bool:
    """By their manifests: whether they are one network, whose block and input size (which its position embedding is resampled for)
    may differ."""
    named = [(each.get("model"), each.get("weights")) for each in (judge, g or {})]
    return g is not None and (judge["sha256"] == g["sha256"] or (named[0] == named[1] and "model" in judge))
