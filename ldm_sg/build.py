"""Config -> objects: the only place that knows which class a word in a config stands for."""

import dataclasses
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldm_sg.annotate.kinds import load_f
from ldm_sg.autoencoder import Autoencoder, load_autoencoder, load_preview
from ldm_sg.autoencoder.manifest import find as find_stage
from ldm_sg.config import TrainConfig, model_config
from ldm_sg.data.latents import LatentSet
from ldm_sg.errors import InputError
from ldm_sg.folder import WEIGHTS, file_sha256, pipeline_of, whole
from ldm_sg.models.lora import add_lora, merged, train_only
from ldm_sg.models.transfer import likeness, transfer
from ldm_sg.models.unet import GuidedUNet, make_unet
from ldm_sg.objective import Objective
from ldm_sg.pipeline import SelfGuidedPipeline, open_pipeline
from ldm_sg.sampling.schedules import noise_scheduler, objective_of


def annotation(config: TrainConfig) -> LatentSet:
    """The set to learn from, with the parts of its signals that `guidance.parts` names. InputError where it has none of them."""
    return _parts_of(config, LatentSet(config.annotation, int(config.cache_gb * 1e9)))


def _parts_of(config: TrainConfig, latents: LatentSet) -> LatentSet:
    if config.guidance.parts:
        latents.spec = dataclasses.replace(latents.spec, concepts_only=True)
        latents.signals = latents.signals.replace(spec=latents.spec)
        if not latents.spec.num_concepts:
            said = f"the signals of {latents.folder} ({latents.spec.kind}) name one thing an image"
            raise InputError(f"guidance.parts={config.guidance.parts}: {said}; annotate with annotator.kind=segments")
    return latents


def view_side(config: TrainConfig, latents: LatentSet) -> int | None:
    """Side in latent cells of what the network sees: `config.crop` pixels of an image, or None: the whole image."""
    full = latents.latent_shape[1]
    if config.crop is None:
        return None
    if len(latents.shapes) > 1 or full != latents.latent_shape[2]:
        raise InputError(f"crop={config.crop}: {latents.folder} has images that are no squares, which are learnt whole")
    pixels = latents.manifest["size"]
    factor = pixels // full
    if not factor <= config.crop <= pixels or config.crop % factor:
        said = f"a multiple of {factor} up to {pixels}, the size of the images of {latents.folder}"
        raise InputError(f"crop={config.crop}: {said}")
    return config.crop // factor


def network(config: TrainConfig, latents: LatentSet) -> GuidedUNet:
    """The UNet for this annotation set, initialised from `config.seed`, or from the run `config.init`."""
    torch.manual_seed(config.seed)
    side = view_side(config, latents)
    shapes = latents.shapes if side is None else [(latents.latent_shape[0], side, side)]
    shape, spec = model_config(config.model), latents.spec
    if shape.inject == "none" and shape.tokens == "concepts" and not spec.num_concepts:
        said = f"the {spec.kind} of {latents.folder} name one thing an image"
        raise InputError(f"model.tokens=concepts: {said}: give tokens=vector")
    model = make_unet(shape, spec, *shapes)
    if config.init:
        _start_from(model, config, latents)
    if config.lora:
        add_lora(model.unet, config.lora)
    elif config.only:
        train_only(model.unet, config.only)
    if config.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    if config.channels_last:
        model.unet.to(memory_format=torch.channels_last)
    return model


def _other_stage(mine: dict[str, Any], its: dict[str, Any]) -> str:
    """What makes latents of one first stage differ from another's, by their manifests."""
    keys = ("kind", "channels", "factor", "sha256", "latent_mean", "latent_std")
    return ", ".join(key for key in keys if mine.get(key) != its.get(key))


def _start_from(model: GuidedUNet, config: TrainConfig, latents: LatentSet) -> None:
    """The weights of the run `config.init`. InputError where it has another network, or latents of another first stage."""
    old, where = open_pipeline(str(config.init), "cpu"), f"init={config.init!r}"
    stage = find_stage(str(latents.folder / "autoencoder"))[0]
    if differs := _other_stage(stage, old.autoencoder.manifest):
        said = f"its first stage {old.autoencoder.name!r} is not {stage['name']!r} of {latents.folder}: other {differs}"
        raise InputError(f"{where}: {said}; annotate with autoencoder={config.init}/pipeline/autoencoder")
    mine, its = objective(config), objective_of(old.scheduler)
    if (mine.kind, mine.shift) != (its.kind, its.shift) or not torch.equal(mine.angles, its.angles):
        raise InputError(f"{where}: trained with another objective or schedule: give objective.* of its config.yaml")
    weights, labels = None, (latents.spec.num_labels, old.spec.num_labels)
    if all(labels):
        folders = latents.folder / "annotator", old.annotator_folder
        weights = likeness(*(load_f(folder)[0].prototypes() for folder in folders), labels)
    network = GuidedUNet(old.unet, old.conditioner)
    left, here, there = transfer(model, network, latents.spec, weights), model.state_dict(), network.state_dict()
    for name in left:
        if name.startswith("unet."):
            shape = tuple(there[name].shape) if name in there else "not there"
            said = f"{name} is {shape} there and {tuple(here[name].shape)} here"
            raise InputError(f"{where}: its network is another one: {said}")
    if config.lora and not torch.equal(*(net.unet.conv_in.weight.flatten() for net in (model, network))):
        said = "its first convolution reads masks of other labels, which adapters do not hold"
        raise InputError(f"lora={config.lora}: {where}: {said}: give clusters that it has, or lora=0")
    if left:
        print(f"note: {where} does not know {', '.join(left)}: they start at random", file=sys.stderr)


def replay(config: TrainConfig, latents: LatentSet) -> LatentSet | None:
    """The annotation set of `config.replay`, if any. InputError where its latents or labels are not those of `latents`."""
    if not config.replay.share:
        return None
    where = f"replay.annotation={config.replay.annotation!r}"
    old = _parts_of(config, LatentSet(str(config.replay.annotation)))
    if len(latents.shapes) + len(old.shapes) > 2:
        raise InputError(f"{where}: images of several shapes, in it or in {latents.folder}, cannot be mixed in a batch")
    stages = [find_stage(str(s.folder / "autoencoder"))[0] for s in (latents, old)]
    if latents.latent_shape != old.latent_shape or _other_stage(*stages):
        raise InputError(f"{where}: its latents are of another first stage, or size, than those of {latents.folder}")
    new, known = (load_f(s.folder / "annotator")[0].prototypes() for s in (latents, old))
    alike = dataclasses.replace(old.spec, num_labels=latents.spec.num_labels) == latents.spec
    count = old.spec.num_labels
    grown = alike and (old.spec.one_id or count == latents.spec.num_labels)
    if not grown or (count and (new is None or known is None or not torch.equal(new[:count], known))):
        said = f"its labels mean something else in {latents.folder}"
        raise InputError(f"{where}: {said}: annotate that with annotator.reuse= or annotator.extend= of it")
    return old


def objective(config: TrainConfig) -> Objective:
    return objective_of(noise_scheduler(config.objective), config.objective.min_snr)


class PipelineWriter:
    """Makes pipelines around a network, sharing everything that training does not change."""

    def __init__(self, config: TrainConfig, latents: LatentSet, device: torch.device) -> None:
        self.scheduler, self.drop, self.lora = noise_scheduler(config.objective), config.guidance.drop, config.lora
        self.source_size = latents.manifest["size"] if config.crop else None
        side, full = view_side(config, latents), latents.latent_shape[1]
        self.signals = latents.signals if side in (None, full) else latents.signals.centre(side / full)
        self.autoencoder, self.device = load_autoencoder(str(latents.folder / "autoencoder")), device
        self.autoencoder.check_channels(latents.latent_shape[0], str(latents.folder))
        factor = self.autoencoder.factor
        square = all(h == w and len(latents.shapes) == 1 for _, h, w in latents.shapes)
        self.sizes = None if square else " ".join(f"{w * factor}x{h * factor}" for _, h, w in latents.shapes)
        self.annotator = latents.folder / "annotator"
        weights = pipeline_of(config.init) / "unet" / WEIGHTS if config.lora and config.init else None
        self.base = file_sha256(weights) if weights else ""

    def plain(self, network: nn.Module) -> GuidedUNet:
        """The network without adapters: they are in its weights."""
        assert isinstance(network, GuidedUNet)
        return GuidedUNet(merged(network.unet), network.conditioner) if self.lora else network

    @cached_property
    def preview(self) -> Autoencoder:
        """What decodes the grids drawn while training."""
        return load_preview(self.autoencoder)

    def pipeline(self, network: nn.Module, preview: bool = False) -> SelfGuidedPipeline:
        plain = self.plain(network)
        self.autoencoder.to(self.device)  # not before: it is the first rank's, which alone makes pipelines
        stage = self.preview if preview else self.autoencoder
        parts = (plain.unet, plain.conditioner, self.scheduler, stage, self.signals)
        pipe = SelfGuidedPipeline(*parts, source_size=self.source_size, drop=self.drop, sizes=self.sizes)
        pipe.annotator_folder = self.annotator
        return pipe

    def export(self, network: nn.Module, folder: Path, lora: Path | None = None) -> None:
        """Replaces `folder` by the pipeline of `network`; there is a whole pipeline under that name at any time but one. Where
        adapters are trained, they go into the folder `lora` too."""
        pipe = self.pipeline(network)
        with whole(folder) as new:
            pipe.save_pretrained(new, refer=True)
        if self.lora and lora:
            with whole(lora) as new:
                pipe.save_lora(network.unet, new, self.base)
