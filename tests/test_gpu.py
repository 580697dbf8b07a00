"""What breaks on a GPU only, as far as a CPU can tell; and the check that a machine with a GPU runs, at tiny sizes."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from conftest import TINY

from ldm_sg.config import TrainConfig
from ldm_sg.configfile import ROOT
from ldm_sg.hardware import use_bf16
from ldm_sg.training.callbacks import EMA
from ldm_sg.verbs.train import train


def test_bf16_clips_with_the_fused_optimizer_of_gpus(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adamw, norms = torch.optim.AdamW, []

    def fused(*args, **kwargs):
        optimizer = adamw(*args, **{**kwargs, "fused": True})
        params = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.register_step_post_hook(
            lambda *_: norms.append(torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None]))
        )
        return optimizer

    monkeypatch.setattr(torch.optim, "AdamW", functools.wraps(adamw)(fused))
    train(
        TrainConfig(
            annotation=str(colours), out=str(tmp_path / "run"), model=TINY, steps=2, batch_size=8, device="cpu",
            precision="bf16", workers=0, val_every=0, sample_every=0, clip=0.01,
        )
    )  # fmt: skip
    assert len(norms) == 2 and all(abs(float(norm) - 0.01) < 1e-4 for norm in norms)


def test_the_average_lives_where_training_goes_before_the_module_is_there() -> None:
    module = pl.LightningModule()
    module.network = torch.nn.Linear(2, 2)
    ema = EMA(0.9)
    strategy = SimpleNamespace(root_device=torch.device("meta"))
    ema.setup(SimpleNamespace(strategy=strategy, is_global_zero=True), module, "fit")
    assert module.network.weight.device.type == "cpu" and ema.give(lambda net: net.weight.device.type) == "meta"


def test_emulated_bf16_is_not_taken_for_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not use_bf16("auto", torch.device("cuda"))


@pytest.mark.slow
def test_the_check_itself_works(tmp_path: Path) -> None:
    """Every section at tiny sizes on the CPU, compiled graphs left out: minutes on two cores."""
    script = [str(ROOT / "benchmarks" / "gpu" / "check.sh"), "--tiny", "--device", "cpu", "--out", str(tmp_path)]
    env = os.environ | {"PYTHON": sys.executable, "TORCH_COMPILE_DISABLE": "1"}
    result = subprocess.run(["bash", *script], env=env, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "check.json").read_text())
    assert all(section["rows"] for section in found.values())
    assert found["tests"]["rows"][0]["passed"] > 10 and "mfu" in (tmp_path / "check.md").read_text()


@pytest.mark.slow
def test_a_section_that_fails_says_so_and_the_next_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "check.py"), "--tiny", "--out", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "--device", "tpu", "--only", "machine,tests"], env=env, capture_output=True, text=True
    )
    assert result.returncode == 1 and "device='tpu'" in result.stdout and "not right: machine" in result.stdout
    assert list(json.loads((tmp_path / "check.json").read_text())) == ["machine", "tests"]
