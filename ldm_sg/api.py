"""The verbs from Python: the command line's names, configs and checks; what they give back holds the folder and what is in it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_sg.config import AnnotateConfig, TrainConfig
from ldm_sg.configfile import load
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.pack import Summary
from ldm_sg.pipeline import SelfGuidedPipeline, open_pipeline
from ldm_sg.report.run import read_curves
from ldm_sg.sampling.options import SampleOptions
from ldm_sg.verbs.annotate import annotate as run_annotate
from ldm_sg.verbs.evaluate import evaluate as run_evaluate
from ldm_sg.verbs.finetune import finetune as run_finetune
from ldm_sg.verbs.pack import pack as run_pack
from ldm_sg.verbs.sample import sample as run_sample
from ldm_sg.verbs.train import train as run_train

load_config = load  # load_config(TrainConfig, "configs/train/demo.yaml", ["steps=500"])


@dataclass(frozen=True)
class Shards:
    """What `pack` made."""

    folder: Path
    figures: Summary

    @property
    def glob(self) -> str:
        """What `AnnotateConfig.shards` takes."""
        return str(self.folder / "*.tar")


@dataclass(frozen=True)
class Run:
    """What `train` made."""

    folder: Path

    @property
    def figures(self) -> dict[str, list[tuple[float, float]]]:
        """The columns of metrics.csv: name -> [(step, value)]."""
        return read_curves(self.folder / "metrics.csv")

    def pipeline(self, device: str = "auto", checkpoint: str | None = None) -> SelfGuidedPipeline:
        """Its EMA network, to sample from."""
        return open_pipeline(self.folder, device, checkpoint)


@dataclass(frozen=True)
class Samples:
    """What `sample` drew."""

    folder: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        """One an image: its file, seed, signal, w, solver."""
        return [json.loads(line) for line in (self.folder / "samples.jsonl").read_text().splitlines()]

    @property
    def images(self) -> Tensor:
        """uint8 [N, 3, H, W]."""
        pixels = [np.array(Image.open(self.folder / record["file"])) for record in self.records]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)

    @property
    def grid(self) -> Image.Image:
        return Image.open(self.folder / "grid.png")


def pack(src: str | Path, dst: str | Path, **options: Any) -> Shards:
    """Images -> source shards; options as in `ldm_sg.commands.PackOptions`."""
    return Shards(Path(dst), run_pack(src, dst, **options))


def annotate(config: AnnotateConfig) -> LatentSet:
    """Source shards -> latents and guidance signals."""
    return LatentSet(run_annotate(config))


def train(config: TrainConfig) -> Run:
    """Annotation set -> run; goes on with one that stopped."""
    return Run(run_train(config))


def finetune(run: Run | str | Path, images: Shards | LatentSet | str | Path, **options: Any) -> Run:
    """A run moved to other images; options as in `ldm_sg.commands.FinetuneOptions`."""
    return Run(run_finetune(_folder(run), _folder(images), **options))


def sample(
    run: Run | str | Path, options: SampleOptions | None = None, out: str | Path | None = None, overwrite: bool = False
) -> Samples:
    """Run -> images, and their records beside them."""
    folder = None if out is None else str(out)
    return Samples(run_sample(_folder(run), options or SampleOptions(), folder, overwrite))


def evaluate(source: Run | Samples | str | Path, reference: Shards | str | Path, **options: Any) -> dict[str, Any]:
    """Samples against real images: figures under ["metrics"][judge], beside all that is needed to make them again. Options as in
    `ldm_sg.evaluate.options`."""
    return run_evaluate(_folder(source), reference.glob if isinstance(reference, Shards) else reference, **options)


def _folder(of: Any) -> str:
    return str(getattr(of, "folder", of))
