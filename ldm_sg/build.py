"""Config -> objects: the only place that knows which class a word in a config stands for."""

from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ldm_sg.autoencoder import Autoencoder, load_autoencoder, load_preview
from ldm_sg.config import TrainConfig, model_config
from ldm_sg.data.latents import LatentSet
from ldm_sg.errors import InputError
from ldm_sg.folder import whole
from ldm_sg.models.unet import GuidedUNet, make_unet
from ldm_sg.objective import Objective
from ldm_sg.pipeline import SelfGuidedPipeline, open_pipeline
from ldm_sg.sampling.schedules import noise_scheduler, objective_of


def view_side(config: TrainConfig, latents: LatentSet) -> int:
    """Side in latent cells of what the network sees: the whole image, or `config.crop` pixels of it."""
    full = latents.latent_shape[1]
    if config.crop is None:
        return full
    pixels = latents.manifest["size"]
    factor = pixels // full
    if not factor <= config.crop <= pixels or config.crop % factor:
        raise InputError(
            f"crop={config.crop}: a multiple of {factor} up to {pixels}, the size of the images of {latents.folder}"
        )
    return config.crop // factor


def network(config: TrainConfig, latents: LatentSet) -> GuidedUNet:
    """The UNet for this annotation set, initialised from `config.seed`, or from the run `config.init`."""
    torch.manual_seed(config.seed)
    side = view_side(config, latents)
    model = make_unet(model_config(config.model), latents.spec, (latents.latent_shape[0], side, side))
    if config.init:
        _copy_weights(model, Path(config.init))
    if config.channels_last:
        model.unet.to(memory_format=torch.channels_last)
    return model


def _copy_weights(model: GuidedUNet, run: Path) -> None:
    old = open_pipeline(run, "cpu")
    for name, new, source in (("unet", model.unet, old.unet), ("conditioner", model.conditioner, old.conditioner)):
        state = source.state_dict()
        for key, value in new.state_dict().items():
            if key not in state or state[key].shape != value.shape:
                there = tuple(state[key].shape) if key in state else "nothing"
                raise InputError(f"init={str(run)!r}: {name}.{key} is {there} there and {tuple(value.shape)} here")
        new.load_state_dict(state)


def objective(config: TrainConfig) -> Objective:
    return objective_of(noise_scheduler(config.objective), config.objective.min_snr)


class PipelineWriter:
    """Makes pipelines around a network, sharing everything that training does not change."""

    def __init__(self, config: TrainConfig, latents: LatentSet, device: torch.device) -> None:
        self.scheduler, self.drop = noise_scheduler(config.objective), config.guidance.drop
        self.source_size = latents.manifest["size"] if config.crop else None
        side, full = view_side(config, latents), latents.latent_shape[1]
        self.signals = latents.signals if side == full else latents.signals.centre(side / full)
        self.autoencoder = load_autoencoder(str(Path(config.annotation) / "autoencoder")).to(device)
        self.autoencoder.check_channels(latents.latent_shape[0], str(latents.folder))
        self.annotator = Path(config.annotation) / "annotator"

    @cached_property
    def preview(self) -> Autoencoder:
        """What decodes the grids drawn while training."""
        return load_preview(self.autoencoder)

    def pipeline(self, network: nn.Module, preview: bool = False) -> SelfGuidedPipeline:
        assert isinstance(network, GuidedUNet)
        pipe = SelfGuidedPipeline(network.unet, network.conditioner, self.scheduler, self.source_size, self.drop)
        pipe.attach(self.preview if preview else self.autoencoder, self.signals, self.annotator)
        return pipe

    def export(self, network: nn.Module, folder: Path) -> None:
        """Replaces `folder` by the pipeline of `network`; there is a whole pipeline under that name at any time but one."""
        with whole(folder) as new:
            self.pipeline(network).save_pretrained(new)
