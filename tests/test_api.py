"""From Python: docs/python.md runs as it stands; what the functions give back; rooms with the name of a verb."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldm_sg
from ldm_sg.configfile import ROOT
from ldm_sg.data.latents import LatentSet
from ldm_sg.errors import InputError


def noisy_photos(folder: Path, n: int) -> None:
    generator = np.random.default_rng(0)
    folder.mkdir()
    for i in range(n):
        base = np.array([(255, 40, 40), (40, 255, 40), (40, 40, 255), (240, 240, 40)][i % 4])
        pixels = np.clip(base + generator.normal(0, 20, (64, 64, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


def test_the_page_on_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noisy_photos(tmp_path / "photos", 64)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    assert names["shards"].figures.images == 64 and names["latent"].shape == (16, 8, 8)
    assert repr(names["latents"]) == "LatentSet('annotations/photos': 64 latents of 16x8x8, clusters, 4 labels)"
    originals = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "photos").iterdir())]
    stored = names["photos"].permute(0, 2, 3, 1).numpy().astype(int)
    for photo in stored:  # up to JPEG, each is one of the photos
        assert min(np.abs(photo - original).mean() for original in originals) < 12
    assert names["step"] == 10 and names["samples"].images.shape == (8, 3, 64, 64)
    assert [record["k"] for record in names["samples"].records] == [0] * 4 + [3] * 4
    assert names["found"]["metrics"]["demo-g"]["fd"] > 0 and (tmp_path / "grid.png").is_file()
    drawn = np.stack([np.asarray(image) for image in names["images"]])
    assert np.array_equal(drawn, names["same"].permute(0, 2, 3, 1).numpy()) and names["other"].shape == (2, 3, 64, 64)
    (tmp_path / "data" / "photos" / "000000.tar").rename(tmp_path / "gone.tar")
    with pytest.raises(InputError):
        LatentSet("annotations/photos").images(torch.tensor([3]))


def test_verbs_are_functions_whatever_was_imported_before() -> None:
    """`ldm_sg.annotate` and `ldm_sg.evaluate` are rooms too."""
    for verb in ("pack", "annotate", "train", "finetune", "sample", "evaluate"):
        assert callable(getattr(ldm_sg, verb)) and verb in ldm_sg.__all__
    importlib.import_module("ldm_sg.annotate.clusters")
    from ldm_sg import annotate, evaluate
    from ldm_sg.annotate import clusters

    assert callable(annotate) and annotate.clusters is clusters
    with pytest.raises(InputError, match="nowhere"):
        annotate(ldm_sg.AnnotateConfig(shards="nowhere/*.tar", out="x", autoencoder="patch2"))
    with pytest.raises(InputError, match="nowhere"):
        evaluate("nowhere", "nowhere")
    with pytest.raises(AttributeError, match="no attribute 'train_'"):
        ldm_sg.train_  # noqa: B018


def test_importing_the_package_stays_light() -> None:
    code = "import sys, ldm_sg; assert not {'torch', 'numpy', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
