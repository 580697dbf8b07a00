"""The demo's job with a handful of training steps: everything else as the user gets it."""

import json
import time
from pathlib import Path

import pytest

from ldm_sg.verbs.demo import demo

KEYS = {
    "fd_untrained", "fd_w0", "fd_w1", "fd_w2", "consistency_w1", "consistency_w2", "consistency_real",
    "consistency_chance", "seconds",
}  # fmt: skip


@pytest.mark.slow
def test_demo_runs_and_its_second_start_is_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_sg.verbs.demo.EVALUATED", 128)
    report = demo(tmp_path / "demo", steps=30)
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics.keys() >= KEYS
    assert metrics["consistency_real"] > 2 * metrics["consistency_chance"]
    page = report.read_text()
    assert page.count("data:image/png;base64") >= 5 and "http" not in page.split("<body")[1].split("<footer")[0]
    assert (tmp_path / "demo" / "clusters.png").is_file()
    start = time.perf_counter()
    demo(tmp_path / "demo", steps=30)
    assert time.perf_counter() - start < 30
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text()) == metrics
