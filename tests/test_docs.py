"""docs/your-own-images.md, docs/scale.md and docs/explore.md, typed as they stand, on few photos and few steps."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from test_annotate import config, make_shards
from test_finetune import base, few_samples, photos  # noqa: F401
from test_inspect import tiny_clip
from typer.testing import CliRunner

from ldm_sg.annotate.names import read_vocabulary
from ldm_sg.cli import app
from ldm_sg.config import FeaturesConfig, TrainConfig
from ldm_sg.configfile import ASSETS, to_yaml
from ldm_sg.data.latents import LatentSet
from ldm_sg.evaluate import edits
from ldm_sg.pipeline import open_pipeline
from ldm_sg.report import annotation, explore
from ldm_sg.verbs.annotate import annotate
from ldm_sg.verbs.train import train

ROOT = Path(__file__).parents[1]
SRUN = """#!/bin/bash
export SLURM_JOB_ID=29500 SLURM_JOB_NAME=train SLURM_NODELIST=127.0.0.1 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=1 SLURM_NODEID=0
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do wait $task || exit 1; done
"""
FEWER = {"--steps": "5", "-n": "12", "--k": "4", "--threshold": "0.9999"}  # flat photos are much alike


@pytest.mark.slow
def test_every_command_of_your_own_images(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    pytest.importorskip("peft")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(base)
    photos(tmp_path / "photos", [(220, 200, 40), (30, 40, 190), (120, 120, 120)], 20)
    photos(tmp_path / "held-out-photos", [(220, 200, 40), (30, 40, 190)], 10, seed=1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    text = (ROOT / "docs" / "your-own-images.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert len(lines) > 10
    for line in lines:
        words = shlex.split(line.split(" #")[0])
        assert words[0] == "ldm-sg"
        for flag, value in FEWER.items():
            if flag in words:
                words[words.index(flag) + 1] = value
        extra = ["workers=0"] if words[1] == "finetune" else []
        result = CliRunner().invoke(app, [*words[1:], *extra])
        assert result.exit_code == 0, (line, result.output[-500:], result.exception)
    for made in (
        "runs/mine/pipeline",
        "runs/mine-lora/lora",
        "runs/mine-both/finetune.json",
        "exported/model_index.json",
    ):
        assert (tmp_path / made).exists(), made


@pytest.mark.slow
def test_every_command_of_scale(tmp_path: Path) -> None:
    """docs/scale.md on six small shards; its Slurm array as two tasks whose numbers are in the environment, and its job by an
    `srun` that starts two tasks here, as Slurm's own does on its nodes."""
    pytest.importorskip("ray", reason="pip install 'ldm-sg[distributed]'")
    make_shards(tmp_path / "data" / "photos", 6, 4)
    small = config(tmp_path, "???", out="???", features=FeaturesConfig(model="demo-g"))
    (tmp_path / "annotate.yaml").write_text(to_yaml(small))
    (tmp_path / "train.yaml").write_text(
        to_yaml(TrainConfig(model=TINY, steps=4, batch_size=4, device="cpu", workers=0))
    )
    binaries = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(command: str, **more: str) -> None:
        for name, path in (("annotate", "annotate.yaml"), ("train", "train.yaml")):
            command = command.replace(f"configs/{name}/churches256.yaml", path)
        command = command.replace("https://host/sets", f"file://{tmp_path}/annotations")
        done = subprocess.run(
            ["bash", "-c", command.replace("annotator.k=300", "annotator.k=2").replace("-n 50000", "-n 24 --steps 2")],
            cwd=tmp_path, env=env | more, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stderr[-2000:])

    text = (ROOT / "docs" / "scale.md").read_text()
    array, job = re.findall(r"```bash\n(.*?)```", text, re.S)
    for line in (line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()):
        run(line)
    numbers = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"}
    for index in "01":
        run(array, SLURM_ARRAY_TASK_ID=index, **numbers)
    run(array.strip() + " --finish", SLURM_ARRAY_TASK_ID="0", **numbers)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    run(job.replace("batch_size=2048", ""), PATH=f"{tmp_path / 'bin'}:{env['PATH']}")
    both = [open_pipeline(tmp_path / "runs" / name, "cpu").unet.state_dict() for name in ("two", "photos")]
    assert all(torch.allclose(both[0][name], both[1][name], atol=1e-6) for name in both[0])  # what torchrun trains
    sets = [LatentSet(tmp_path / "annotations" / name).hash for name in ("photos", "parts", "array", "ray")]
    assert len(set(sets)) == 1 and (tmp_path / "runs" / "two" / "pipeline").is_dir()


SCENES = {
    "annotate": "features.model=demo-g features.layer=-1 features.size=64 annotator.k=2 annotator.segments.method=patch_kmeans autoencoder=patch4 "
    "size=32 device=cpu workers=0",
    "train": "steps=10 batch_size=4 warmup=1 checkpoint_every=10 val_every=10 sample_every=0 device=cpu workers=0 "
    "'model={channels: 16, multipliers: [1, 2], blocks: 1, attention: [1, 2], heads: 2, inject: none, tokens: concepts}'",
    "edit": "--steps 3 --device cpu",
    "evaluate": "--steps 2 --device cpu",
}


@pytest.mark.slow
def test_every_command_of_editing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On dark images with a bright square, whose two segments are always there; edits name segment 1 in place of 5."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, value in (("SMALL", 0.0), ("LARGE", 1.1), ("NEAR", 1.0)):  # the network has learnt next to nothing
        monkeypatch.setattr(edits, name, value)
    (tmp_path / "scenes").mkdir()
    for i in range(16):
        pixels = np.full((32, 32, 3), 40, np.uint8)
        pixels[8:24, (i % 4) * 4 : (i % 4) * 4 + 16] = 220
        Image.fromarray(pixels).save(tmp_path / "scenes" / f"{i}.png")
    for name in ("photo.jpg", "other.jpg"):
        Image.open(tmp_path / "scenes" / "3.png").save(tmp_path / name)
    text = (ROOT / "docs" / "editing.md").read_text()
    [recipe] = re.findall(r"```yaml\n(.*?)```", text, re.S)
    (tmp_path / "recipe.yaml").write_text(recipe.replace("[5]", "[1]").replace("[2, 3]", "[0]"))
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert len(lines) == 9
    for line in lines:
        words = shlex.split(line.split(" #")[0].replace(" 5=", " 1="))
        words = [{"256": "32", "50": "4", "annotator.k=11": "annotator.k=2"}.get(word, word) for word in words]
        if "--features" in words:  # there may be no network
            words = words[: words.index("--features")]
        result = CliRunner().invoke(app, [*words[1:], *shlex.split(SCENES.get(words[1], ""))])
        assert words[0] == "ldm-sg" and result.exit_code == 0, (line, result.output[-500:], result.exception)
    assert len(list((tmp_path / "runs" / "scenes" / "edits").glob("*/report.html"))) == 5
    [python] = re.findall(r"```python\n(.*?)```", text, re.S)
    found: dict = {}
    exec(python.replace("Edit(5", "Edit(1"), found)
    assert found["images"][0].size == (32, 32)


def test_every_command_of_explore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/explore.md on 18 photos, with a tiny CLIP in place of the one that is fetched; and what it says in numbers."""
    small = config(tmp_path, make_shards(tmp_path / "data"), out=str(tmp_path / "annotations" / "churches"))
    annotate(small)
    train(
        TrainConfig(
            annotation=small.out, out=str(tmp_path / "runs" / "churches"), model=TINY, steps=2, device="cpu", workers=0
        )
    )
    monkeypatch.chdir(tmp_path)
    text, clip = (ROOT / "docs" / "explore.md").read_text(), tiny_clip(tmp_path)[0]
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert len(lines) == 5
    for line in lines:
        if "umap" in line and importlib.util.find_spec("umap") is None:
            continue
        words = shlex.split(line.replace("ViT-B-32/laion2b_s34b_b79k", clip))
        result = CliRunner().invoke(app, words[1:] + (["--steps", "2"] if words[1] == "sample" else []))
        assert words[0] == "ldm-sg" and result.exit_code == 0, (line, result.output[-500:], result.exception)
    assert (tmp_path / "annotations" / "churches" / "inspect.html").is_file() and (
        tmp_path / "churches.parquet"
    ).is_file()
    assert len(list(tmp_path.glob("runs/churches/samples/*/0*.png"))) == 24
    assert f"{len(read_vocabulary(ASSETS / 'nouns.txt'))} common nouns" in text
    assert f"At most {explore.MAPPED:,} images" in text and f"{annotation.ROWS} clusters" in text
    assert f"up to {explore.ROWS:,} images" in text and f"`image` ({explore.LARGE} px)" in text
