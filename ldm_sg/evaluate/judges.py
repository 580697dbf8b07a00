"""Who judges samples: feature networks, and the run's own g and f. Each sees every image once and gives figures of its space."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm_sg.annotate.features import FeatureExtractor, load_extractor
from ldm_sg.annotate.kinds import LoadedAnnotator, load_annotator, load_f
from ldm_sg.config import FeaturesConfig
from ldm_sg.configfile import load
from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError
from ldm_sg.evaluate import figures, layout
from ldm_sg.evaluate.collect import Network
from ldm_sg.evaluate.consistency import check_ids, consistency
from ldm_sg.evaluate.inception import Inception, load_inception
from ldm_sg.evaluate.options import DRAWING, Options
from ldm_sg.evaluate.reference import Reference
from ldm_sg.evaluate.subjects import Subject
from ldm_sg.pipeline import SelfGuidedPipeline

OWN = "own"  # the run's g, in a list of judges
WEIGHTS, SETTINGS = (".safetensors", ".pth", ".pt"), (".yaml", ".yml")


class Judge(Protocol):
    """`space`: the network that its figures are judged in; `sees`: what of it, the same for judges that share a pass."""

    space: str
    sees: str
    network: Network
    manifest: dict[str, Any]  # the network's

    def measure(self, samples: Tensor, places: Tensor, reference: Reference) -> dict[str, float]:
        """What `network` gives of the samples [N, X], and their positions [N] in the subject -> figures by key."""


@dataclass(frozen=True)
class Distances:
    """Samples against real images by their features: fd, kid, prdc, is."""

    space: str
    network: Inception | FeatureExtractor
    wanted: list[str]
    seed: int
    sees: str = "features"

    @property
    def manifest(self) -> dict[str, Any]:
        return self.network.manifest

    def measure(self, samples: Tensor, places: Tensor, reference: Reference) -> dict[str, float]:
        return figures.compute(self.wanted, samples, reference.features(self.network), self.network, self.seed)


@dataclass(frozen=True)
class Own:
    """The run's own g and f, before what samples were asked for, and what its autoencoder leaves of real images."""

    space: str
    annotator: LoadedAnnotator
    asked: Signals | Tensor  # [n]
    pipe: SelfGuidedPipeline
    precision: str

    @property
    def manifest(self) -> dict[str, Any]:
        return self.annotator.extractor.manifest

    def ceiling(self, reference: Reference) -> tuple[Tensor, Tensor]:
        return reference.ceiling(self.network, self.precision, what=self.sees, annotator=self.annotator.digest)


class Consistency(Own):
    """The cluster that each sample was asked for, and the one where it lands."""

    sees = "features"

    def network(self, images: Tensor) -> Tensor:
        return self.annotator.features(images)

    def measure(self, samples: Tensor, places: Tensor, reference: Reference) -> dict[str, float]:
        signals = self.pipe.signals.k.cpu()
        return consistency(self.asked[places], samples, signals, *self.ceiling(reference), self.annotator.f)


class Layouts(Own):
    """The box or mask that each sample was asked for, and the one that it shows on the latent grid."""

    sees = "layout"

    def network(self, images: Tensor) -> Tensor:
        return layout.layout(self.annotator(images), self.pipe.latent_shape[1:])

    def measure(self, samples: Tensor, places: Tensor, reference: Reference) -> dict[str, float]:
        asked = layout.layout(self.asked[places], self.pipe.latent_shape[1:])
        return layout.faithfulness(asked, samples, *self.ceiling(reference), self.pipe.spec.spatial)


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


def load_network(features: str, resize: str, device: torch.device) -> Inception | FeatureExtractor:
    """`inception`, `inception:FILE`, a file of Inception weights, a YAML of FeaturesConfig, or any g by its name."""
    name, _, file = features.partition(":")
    if name == "inception":
        return load_inception(file or None, resize).to(device)
    if Path(features).suffix in WEIGHTS:
        return load_inception(features, resize).to(device)
    if Path(features).suffix in SETTINGS:
        return load_extractor(load(FeaturesConfig, features), device)
    return load_extractor(FeaturesConfig(model=features), device)


def open_judges(wanted: list[str], options: Options, subject: Subject, device: torch.device) -> list[Judge]:
    """Everything that judges, checked before the first sample is drawn."""
    named, resize = parse_features(options.features), options.resize
    followed = _asked_for(wanted, subject)
    distances = [name for name in wanted if name not in figures.GUIDANCE]
    if not distances and options.features is not None:
        raise InputError(f"features={options.features!r}: {wanted[0]} is judged by the run's own g: leave features out")
    if resize and Inception.name not in named:
        raise InputError(
            f"resize={resize!r} is for the judge inception, which features={options.features!r} does not name"
        )
    own = _open_own(wanted, subject, device) if followed or OWN in named.values() else None
    networks = {
        name: load_network(text, resize or "tf", device) for name, text in named.items() if distances and text != OWN
    }
    space = _space(own.extractor, networks) if own else ""
    if own and OWN in named.values() and space in networks:
        raise InputError(f"features={options.features!r}: {space} is the run's own g: name each network once")
    if own and distances and (OWN in named.values() or space in networks):
        networks[space] = own.extractor
    figures.check_networks(wanted, networks.values())
    judges: list[Judge] = []
    for name, network in networks.items():
        able = [metric for metric in distances if metric != "is" or figures.classifies(network)]
        judges.append(Distances(name, network, able, options.seed))
    precision = options.precision or DRAWING["precision"]
    return judges + [judge(space, own, asked, subject.pipe, precision) for judge, asked in followed.items()]


def _asked_for(wanted: list[str], subject: Subject) -> dict[type["Own"], Any]:
    """Who judges what was asked for, and that; InputError where nothing says it."""
    found: dict[type[Own], Any] = {}
    for name in figures.GUIDANCE:
        if name in wanted and not subject.guided:
            raise InputError(
                f"metric {name}: {subject.where} was trained without guidance (guidance.drop=1), so its samples follow no "
                "signal: leave it out"
            )
    if "consistency" in wanted:
        found[Consistency] = subject.ids()
    if "layout" in wanted:
        if subject.asked is None:
            raise InputError(f"{subject.where}: the metric layout draws its samples itself: give a run")
        layout.check(subject.asked, subject.where)
        found[Layouts] = subject.asked
    return found


def _open_own(wanted: list[str], subject: Subject, device: torch.device) -> LoadedAnnotator:
    """The run's own g and f."""
    if subject.pipe is None:
        raise InputError(
            f"{subject.where} belongs to no run, so there is no g of its own: name a feature network (--features "
            "inception, for example) and leave consistency out, or judge the images from inside their run's folder"
        )
    folder = subject.pipe.annotator_folder
    try:
        own = load_annotator(folder, device)
    except InputError as err:
        raise InputError(f"{err}; name a feature network (--features) and leave consistency out") from err
    if "consistency" in wanted:
        if not own.f.spec.one_id:
            raise InputError(f"{folder}: its annotator gives no cluster ids, so consistency cannot be judged by it")
        check_ids(subject.ids(), own.f.k, subject.where)
    return own


def _space(own: FeatureExtractor, networks: dict[str, Inception | FeatureExtractor]) -> str:
    """The name of the run's own g: that of a judge which is the same network, else its own where that is free."""
    same = ("sha256", "layer", "pool", "size")
    for name, network in networks.items():
        if all(network.manifest.get(key) == own.manifest[key] for key in same):
            return name
    return OWN if own.name in networks else own.name


def guide(pipe: SelfGuidedPipeline | None) -> str | None:
    """sha256 of the g that made the run's signals; None without a run, and for signals that no g made."""
    features = load_f(pipe.annotator_folder)[1]["features"] if pipe else None
    return features["sha256"] if features else None
