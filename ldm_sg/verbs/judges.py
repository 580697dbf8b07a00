"""Who judges samples: a feature network, and the run's own g and f."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm_sg.annotate.features import FeatureExtractor, load_extractor
from ldm_sg.annotate.kinds import LoadedAnnotator, load_annotator
from ldm_sg.config import FeaturesConfig
from ldm_sg.configfile import load
from ldm_sg.data.signals import Signals
from ldm_sg.errors import InputError
from ldm_sg.evaluate import figures, layout
from ldm_sg.evaluate.collect import Network
from ldm_sg.evaluate.consistency import check_ids
from ldm_sg.evaluate.inception import Inception, load_inception
from ldm_sg.pipeline import SelfGuidedPipeline
from ldm_sg.verbs.judged import Samples


@dataclass(frozen=True)
class Judges:
    """The network whose features are compared; for consistency the ids asked for, for layout the whole signals, and for
    both the run's own g and f."""

    network: Inception | FeatureExtractor
    ids: Tensor | None
    asked: Signals | None
    annotator: LoadedAnnotator | None

    def networks(self, pipe: SelfGuidedPipeline | None) -> dict[str, Network]:
        """What each sample passes through: `main`, `own` where consistency needs another one, `layout`."""
        networks: dict[str, Network] = {"main": self.network}
        if self.annotator is None or pipe is None:
            return networks
        if self.ids is not None and self.annotator.extractor is not self.network:
            networks["own"] = self.annotator.extractor
        if self.asked is not None:
            networks["layout"] = layouts(self.annotator, pipe)
        return networks

    def describe(self, run: Path | None) -> dict[str, Any] | None:
        if self.annotator is None:
            return None
        seen = "samples and reconstructions as they are; real photos at g's own size from their own pixels, as annotate"
        return {"run": str(run), "k": self.annotator.f.k, "g": self.annotator.extractor.manifest, "view": seen}


def layouts(annotator: LoadedAnnotator, pipe: SelfGuidedPipeline) -> Network:
    """Images -> their layout on the latent grid, by the run's own f."""
    return lambda images: layout.layout(annotator(images), pipe.latent_shape[1:])


def open_judges(
    wanted: list[str], features: str | None, samples: Samples, pipe: SelfGuidedPipeline | None, on: torch.device
) -> Judges:
    """Everything that judges, checked before the first sample is drawn."""
    ids = samples.ids() if "consistency" in wanted else None
    if "layout" in wanted:
        if samples.asked is None:
            raise InputError(f"{samples.where}: the metric layout draws its samples itself: give a run")
        layout.check(samples.asked, samples.where)
    asked = samples.asked if "layout" in wanted else None
    needed = features is None or ids is not None or asked is not None
    annotator = _annotator(pipe, samples.where, on) if needed else None
    if features is not None:
        network = load_network(features, on)
    else:
        assert annotator is not None
        network = annotator.extractor
    figures.check_network(wanted, network)
    if ids is not None and annotator is not None:
        if not annotator.f.spec.one_id:
            raise InputError(
                f"{pipe.annotator_folder if pipe else samples.where}: its annotator gives no cluster ids, so "
                "consistency cannot be judged by it"
            )
        check_ids(ids, annotator.f.k, samples.where)
    return Judges(network, ids, asked, annotator)


def load_network(features: str, device: torch.device) -> Inception | FeatureExtractor:
    """`inception`, `inception:FILE`, a file of Inception weights, a YAML of FeaturesConfig, or any g by its name."""
    name, _, file = features.partition(":")
    if name == "inception":
        return load_inception(file or None).to(device)
    if Path(features).suffix in (".safetensors", ".pth", ".pt"):
        return load_inception(features).to(device)
    if Path(features).suffix in (".yaml", ".yml"):
        return load_extractor(load(FeaturesConfig, features), device)
    return load_extractor(FeaturesConfig(model=features), device)


def _annotator(pipe: SelfGuidedPipeline | None, where: str, device: torch.device) -> LoadedAnnotator:
    if pipe is None:
        raise InputError(
            f"{where} belongs to no run, so there is no g of its own: name a feature network (--features inception, for "
            "example) and leave consistency out, or judge the images from inside their run's folder"
        )
    try:
        return load_annotator(pipe.annotator_folder, device)
    except InputError as err:
        raise InputError(f"{err}; name a feature network (--features) and leave consistency out") from err
