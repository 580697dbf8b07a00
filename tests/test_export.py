"""export: a folder that says what it is, loads by diffusers, goes to the hub; ONNX."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from test_train import config
from typer.testing import CliRunner

from ldm_sg import hub as hubs
from ldm_sg.cli import app
from ldm_sg.errors import InputError
from ldm_sg.pipeline import open_pipeline
from ldm_sg.verbs import export as exports
from ldm_sg.verbs.export import export
from ldm_sg.verbs.train import train


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = train(
        config(colours, tmp_path_factory.mktemp("runs") / "run", keep_every=8, checkpoint_every=12, val_every=0)
    )
    (folder / "evaluations").mkdir()
    judged = {"metrics": {"inception": {"fd": 12.5}}, "judges": {"inception": {"guide": False}}, "samples": 500,
              "reference_images": 64, "sampling": {"w": 2.0, "steps": 25, "scheduler": "dpmpp_2m"}, "source": str(folder)}  # fmt: skip
    (folder / "evaluations" / "a.json").write_text(json.dumps(judged))
    tuned = {
        "clusters": "extend",
        "fd_held_out_first": 0.5,
        "fd_held_out": 0.25,
        "best_step": 40,
        "nearest_cosine": 0.9,
    }
    (folder / "finetune.json").write_text(json.dumps(tuned))
    return folder


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def test_an_export_is_the_run_with_a_card(run: Path, tmp_path: Path) -> None:
    code, output = invoke("export", run, tmp_path / "out", "--device", "cpu")
    assert code == 0 and output.endswith(f"{tmp_path / 'out'}\n"), output
    card = (tmp_path / "out" / "README.md").read_text()
    for said in ("library_name: diffusers", "trust_remote_code=True", "cluster=[0] * 8", "| w = 2, 25 dpmpp_2m | inception | 500 / 64 | 12.5 |",
                 "| first stage | patch2 (patch) |", "guided by 4 clusters", "| images | 64 |", "| latent | 12 × 8 × 8 |",
                 "| its labels | its base's and new ones (extend) |", "| FD to held-out images | 0.5 at first, 0.25 at best |",
                 "| nearest training image | cosine 0.900 to a sample, on average |"):  # fmt: skip
        assert said in card, said
    assert "ONNX" not in card and Image.open(tmp_path / "out" / "grid.png").width > 100
    own, exported = open_pipeline(run, "cpu"), open_pipeline(tmp_path / "out", "cpu")
    assert torch.equal(own.generate(own.clusters([1]), steps=2), exported.generate(exported.clusters([1]), steps=2))
    code, output = invoke(
        "export", run, tmp_path / "out", "--checkpoint", "8", "--device", "cpu"
    )  # an export is replaced
    assert code == 0, output
    earlier, at_8 = open_pipeline(tmp_path / "out", "cpu"), open_pipeline(run, "cpu", "8")
    assert torch.equal(earlier.unet.conv_out.weight, at_8.unet.conv_out.weight)
    assert not torch.equal(earlier.unet.conv_out.weight, own.unet.conv_out.weight)


def test_to_the_hub(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict = {}

    def upload_folder(repo_id: str, folder_path: Path, commit_message: str) -> None:
        seen.update(name=repo_id, files={p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()},
                    card=(Path(folder_path) / "README.md").read_text())  # fmt: skip

    monkeypatch.setattr("huggingface_hub.create_repo", lambda name, exist_ok, private: seen.update(made=name))
    monkeypatch.setattr("huggingface_hub.upload_folder", upload_folder)
    for module in (hubs, exports):
        monkeypatch.setattr(module, "answers", lambda url: True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert export(run, "hub://user/name", device="cpu") == f"{constants.ENDPOINT}/user/name"
    assert (
        seen["made"] == seen["name"] == "user/name"
        and 'from_pretrained("user/name", trust_remote_code=True)' in seen["card"]
    )
    for part, code in (
        ("conditioner", "ldm_sg.models.conditioner"),
        ("signals", "ldm_sg.data.signals"),
        ("autoencoder", "ldm_sg.autoencoder"),
    ):
        assert {f"{part}/{code}.py", f"{part}/config.json"} <= seen["files"]  # what diffusers downloads
    assert {"pipeline.py", "model_index.json", "README.md", "grid.png"} <= seen["files"]


def test_wrong_places_are_told_before_anything_is_drawn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "open_pipeline", lambda *_: pytest.fail("opened"))
    (tmp_path / "mine.txt").write_text("precious")
    for to, message in ((tmp_path, "no earlier export"), (tmp_path / "mine.txt", "a file, or"),
                        ("hub://name", "hub://USER/NAME"), ("hub://user/name", "no network")):  # fmt: skip
        code, output = invoke("export", run, to)
        assert code == 2 and message in output and output.count("\n") == 1, output
    monkeypatch.undo()
    code, output = invoke("export", tmp_path / "no", tmp_path / "out")
    assert code == 2 and "not found" in output and not (tmp_path / "out").exists()


def test_onnx_without_its_packages_is_one_line(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldm_sg.onnx.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"--onnx needs onnx and onnxscript: pip install 'ldm-sg\[onnx\]'"):
        export(run, tmp_path / "out", onnx=True)


@pytest.mark.slow
def test_onnx_files_compute_what_torch_does(run: Path, tmp_path: Path) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'ldm-sg[onnx]'")
    from ldm_sg.onnx import export_onnx

    differences = export_onnx(open_pipeline(run, "cpu"), tmp_path)
    assert set(differences) == {"unet.onnx", "decoder.onnx"} and max(differences.values()) < 1e-4


def test_curves_go_to_wandb_too(colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = config(colours, tmp_path / "run", logger="wandb", steps=4, val_every=0)
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(
            InputError, match=r"logger=wandb: that package is not installed: pip install 'ldm-sg\[wandb\]'"
        ):
            train(asked)
        assert not (tmp_path / "run").exists()
        pytest.skip("wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert list((train(asked) / "wandb").glob("offline-run-*"))
    with pytest.raises(InputError, match="tensorboard or wandb"):
        train(config(colours, tmp_path / "other", logger="wand"))
