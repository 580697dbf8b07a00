"""The whole of annotate, sample, edit and evaluate with a device beside the CPU's: see simulated_gpu."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = (
    "test_edits.py::test_the_command",
    "test_edit.py::test_the_command_moves_a_concept_of_a_run",
    "test_evaluate.py::test_a_perfect_generator_reaches_the_ceiling",
    "test_evaluate.py::test_other_networks_judge_beside_the_runs_own",
    "test_lost.py",
)

MIXED = """
import torch
import pytest
import simulated_gpu


def test_mixing():
    there = torch.arange(6.0).view(2, 3).to("meta")
    layer = torch.nn.Linear(3, 1).to("meta")
    [grad] = torch.autograd.grad(layer(there).sum(), layer.weight)
    assert grad.tolist() == [[3.0, 5.0, 7.0]] and float(there.sum()) == 15
    there[:, 0] = 1
    assert there.cpu().tolist() == [[1, 1, 2], [1, 4, 5]] and there[[1]].tolist() == [[1, 4, 5]]
    for wrong in (lambda: there + torch.ones(3), lambda: torch.ones(6)[there[0].long()], there.numpy):
        with pytest.raises((RuntimeError, TypeError)):
            wrong()
"""


def with_it(*what: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "simulated_gpu", "-p", "no:cacheprovider", *what]
    done = subprocess.run(
        command, cwd=HERE, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(HERE)}
    )
    assert done.returncode == 0, done.stdout[-4000:]


def test_devices_do_not_mix(tmp_path: Path) -> None:
    (tmp_path / "test_mixed.py").write_text(MIXED)
    with_it(str(tmp_path / "test_mixed.py"))


@pytest.mark.slow
@pytest.mark.parametrize("test", TESTS)
def test_nothing_takes_the_device_for_the_cpu(test: str) -> None:
    with_it(test)
