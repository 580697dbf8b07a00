"""The demo's job with a handful of training steps: everything else as the user gets it."""

import json
import re
from pathlib import Path

import pytest

from ldm_sg.pipeline import open_pipeline
from ldm_sg.verbs.demo import demo

KEYS = {"fd_untrained", "fd_w0", "fd_w1", "fd_w2", "seconds"}
CONTROL = {
    "demo": ("clusters.png", {"consistency_w1", "consistency_w2", "consistency_real", "consistency_chance"}),
    "demo_masks": (
        "layouts.png",
        {"layout_agreement_w1", "layout_agreement_w2", "layout_agreement_real", "layout_agreement_shuffled"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONTROL)
def test_demo_runs_and_its_second_start_is_quick(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_sg.verbs.demo.EVALUATED", 128)
    picture, control = CONTROL[config]
    report = demo(tmp_path / "demo", config, steps=30)
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics.keys() >= KEYS | control
    name = min(control).rpartition("_")[0]
    assert metrics[f"{name}_real"] > 1.5 * metrics.get(f"{name}_chance", metrics.get(f"{name}_shuffled"))
    page = report.read_text()
    assert page.count("data:image/") >= 4 and not re.search(r"""(src|href)=["']?https?:""", page)  # it asks for nothing
    assert (tmp_path / "demo" / picture).is_file()
    if config == "demo":
        assert open_pipeline(tmp_path / "demo", "cpu").clusters([42]).k.tolist() == [42]  # what the README types
    made = [
        *tmp_path.rglob("*.json"),
        *tmp_path.rglob("*.safetensors"),
        *tmp_path.rglob("*.tar"),
        tmp_path / "demo" / picture,
    ]
    kept = {file: file.stat().st_mtime_ns for file in made if file.name not in ("metrics.json", "timings.json")}
    demo(tmp_path / "demo", config, steps=30)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept  # nothing was made again
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text()) == metrics
