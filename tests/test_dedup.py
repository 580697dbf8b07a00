"""Near-duplicates and outliers: found where they were planted, and left out of training."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_finetune import base  # noqa: F401
from typer.testing import CliRunner

from ldm_sg.annotate import dedup as module
from ldm_sg.annotate.dedup import left_out
from ldm_sg.annotate.stage import Stage, sample_features
from ldm_sg.cli import app
from ldm_sg.config import TrainConfig
from ldm_sg.configfile import from_mapping
from ldm_sg.data.latents import LatentSet
from ldm_sg.errors import InputError
from ldm_sg.folder import read_mapping
from ldm_sg.training.data import LatentData, Steps
from ldm_sg.verbs.train import train


@pytest.mark.parametrize("exact", [10**6, 100])
def test_planted_twins_and_an_outlier_are_found(exact: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 directions 1, 2 and 300 are that of 0 with a little noise, and 399 is the opposite of all."""
    monkeypatch.setattr(module, "EXACT", exact)
    generator = np.random.default_rng(0)
    points = generator.normal(0, 1, (400, 32)).astype(np.float32) + 2
    for i in (1, 2, 300):
        points[i] = points[0] * (i + 1) + generator.normal(0, 0.01, 32)
    points[399] = -points[399] * 3
    found = left_out(points, 0.99, 1 / 397)
    assert [(left.index, left.kept) for left in found] == [(1, 0), (2, 0), (300, 0), (399, None)]
    assert all(left.cosine > 0.99 for left in found[:3]) and found[3].cosine < 0
    assert left_out(points[3:300], 0.99, 0.0) == []  # nothing is a twin of itself


def test_twins_at_the_end_of_a_chain_go_too() -> None:
    """At 0, 14, 28, 28 and 28 degrees, with those within 16 degrees alike."""
    angles = np.radians([0, 14, 28, 28, 28])
    points = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    found = left_out(points, 0.96, 0.0)
    assert [(left.index, left.kept) for left in found] == [(1, 0), (3, 2), (4, 2)]
    many = np.random.default_rng(0).normal(0, 1, (3, 32)).repeat(100, 0).astype(np.float32)  # more than are looked at
    assert sorted({left.kept for left in left_out(many, 0.99, 0.0)}) == [0, 100, 200]
    assert len(left_out(many, 0.99, 0.0)) == 297


@pytest.mark.parametrize("damage", ["objects", "cut off", "fewer", "flat", "whole numbers", "nan", "empty"])
def test_damaged_features_are_one_line(damage: str, base: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = Path(
        shutil.copytree(from_mapping(TrainConfig, read_mapping(base / "config.yaml"), "").annotation, tmp_path / "set")
    )
    path = folder / "features" / "000000.npy"
    whole, data = np.load(path), path.read_bytes()
    bad = {"objects": whole.astype(object), "fewer": whole[:-1], "flat": whole[:, 0], "whole numbers": whole.astype(np.int64),
           "nan": whole * np.float16("nan")}  # fmt: skip
    if damage in bad:
        np.save(path, bad[damage], allow_pickle=True)
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut off" else b"")
    result = CliRunner().invoke(app, ["dedup", str(folder), "--out", str(tmp_path / "l.jsonl")])
    assert result.exit_code == 2 and result.output.count("\n") == 1 and "features" in result.output, result.output
    assert "annotate again" in result.output and not (tmp_path / "l.jsonl").exists()
    if damage != "nan":
        with pytest.raises(InputError, match="annotate again"):
            sample_features([Stage(folder, 0)], [len(whole)], 10, 0)


def test_what_the_list_names_is_not_learnt_from(base: Path, tmp_path: Path) -> None:  # noqa: F811
    run = from_mapping(TrainConfig, read_mapping(base / "config.yaml"), "")
    latents = LatentSet(run.annotation)
    result = CliRunner().invoke(
        app, ["dedup", run.annotation, "--threshold", "0.9", "--outliers", "0.1", "--out", str(tmp_path / "l.jsonl")]
    )
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "l.jsonl").read_text().splitlines()]
    gone = {line["index"] for line in lines}
    assert 0 < len(gone) < len(latents) and {"cosine", "why"} <= lines[0].keys() and (tmp_path / "l.png").is_file()
    wanted = dataclasses.replace(run, leave_out=str(tmp_path / "l.jsonl"), out=str(tmp_path / "run"), steps=4)
    data = LatentData(latents, wanted, 8)
    drawn = {i for step in Steps([(data.train_pool, 8)], 0, 20, 0, 0, 1) for i in step[2:]}
    assert not gone & (drawn | set(data.val_pool.tolist())) and len(drawn) == len(data.train_pool)
    train(wanted)
    (tmp_path / "l.jsonl").write_text("")
    with pytest.raises(InputError, match="changed under"):
        train(dataclasses.replace(wanted, steps=8))
    for text, word in (('{"set": "beef", "index": 1}', "another set"), ("what", "dedup")):
        (tmp_path / "l.jsonl").write_text(text)
        with pytest.raises(InputError, match=word):
            LatentData(latents, wanted, 8)
