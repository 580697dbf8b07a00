"""docs/your-own-images.md, typed as it stands, on 60 photos and few steps."""

import re
import shlex
from pathlib import Path

import pytest
from test_finetune import base, few_samples, photos  # noqa: F401
from typer.testing import CliRunner

from ldm_sg.cli import app

ROOT = Path(__file__).parents[1]
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
