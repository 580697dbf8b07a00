"""The pipeline as diffusers' users know it: called, saved, loaded where ldm_sg is not installed, with schedulers of theirs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import COLOURS
from huggingface_hub import constants
from PIL import Image
from test_train import config

from ldm_sg import hub as hubs
from ldm_sg.config import ObjectiveConfig
from ldm_sg.errors import InputError
from ldm_sg.pipeline import SelfGuidedPipeline, open_pipeline
from ldm_sg.sampling.request import SampleOptions
from ldm_sg.standalone import standalone
from ldm_sg.verbs.sample import sample
from ldm_sg.verbs.train import train


def trained(colours: Path, folder: Path, kind: str) -> Path:
    objective = ObjectiveConfig(kind=kind)
    return train(config(colours, folder, steps=200, batch_size=16, warmup=20, decay=0.3, ema=0.95, checkpoint_every=200, val_every=0,
                        objective=objective))  # fmt: skip


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(colours, tmp_path_factory.mktemp("runs") / "v", "v")


@pytest.fixture(scope="module")
def flow(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(colours, tmp_path_factory.mktemp("runs") / "flow", "flow")


@pytest.fixture
def pipe(run: Path) -> SelfGuidedPipeline:
    return open_pipeline(run, "cpu")


def nearest(images: list[Image.Image]) -> list[int]:
    """Which colour each image is."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).float() / 127.5 - 1
    return torch.cdist(pixels.mean((1, 2)), COLOURS).argmin(1).tolist()


ALONE = """
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        away = name.partition(".")[0] in ("ldm_sg", "timm", "faiss", "webdataset", "pytorch_lightning", "omegaconf", "open_clip",
                                          "torchmetrics", "torchvision", "scipy", "matplotlib", "typer", "taming")
        return None if away else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
import torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
folder, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
assert set(pipe.components) == {"unet", "conditioner", "scheduler", "autoencoder", "signals"}
for i, image in enumerate(pipe(cluster=[2, 2, 0], generator=pipe.generators(3, seed=5)).images):
    image.save(f"{out}/{i}.png")
assert not [name for name in sys.modules if name.startswith("ldm_sg")]
"""


def test_loads_by_diffusers_alone_and_draws_the_runs_own_samples(run: Path, tmp_path: Path) -> None:
    folder = sample(str(run), SampleOptions(cluster=[2], n=2, seed=5, device="cpu"), str(tmp_path / "own"))
    pipe = open_pipeline(run, "cpu")
    third = pipe.generate(pipe.clusters([2, 2, 0], seed=5), seed=5)[2]
    env = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", ALONE, str(run / "pipeline"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "Expected types" not in done.stderr and "ignored" not in done.stderr, done.stderr
    for i in (0, 1):
        assert (tmp_path / f"{i}.png").read_bytes() == (folder / f"{i:06d}.png").read_bytes()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "2.png")), third.permute(1, 2, 0).numpy())
