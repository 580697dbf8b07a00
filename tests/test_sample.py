"""Sampling through the command that a user types."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS
from PIL import Image
from test_train import config
from typer.testing import CliRunner

from ldm_sg.cli import app
from ldm_sg.config import ObjectiveConfig
from ldm_sg.errors import InputError
from ldm_sg.guidance.compose import cfg, interval
from ldm_sg.pipeline import SelfGuidedPipeline, open_pipeline
from ldm_sg.sampling.request import SampleOptions
from ldm_sg.sampling.solvers import SOLVERS
from ldm_sg.verbs.sample import sample
from ldm_sg.verbs.train import train


@pytest.fixture(scope="module")
def run(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough to tell the four colours apart."""
    return train(
        config(colours, tmp_path_factory.mktemp("runs") / "run", steps=300, batch_size=16, warmup=20, decay=0.3, ema=0.98,
               checkpoint_every=300, val_every=0, objective=ObjectiveConfig(kind="v"))
    )  # fmt: skip


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


def pictures(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted(folder.glob("0*.png"))])


def test_cluster_samples_have_the_colour_of_their_cluster(run: Path, tmp_path: Path) -> None:
    code, output = invoke("sample", run, "--cluster", "2", "--cluster", "0", "-n", "4", "--out", tmp_path / "s")
    assert code == 0, output
    images = torch.from_numpy(pictures(tmp_path / "s")).float() / 127.5 - 1  # [8, H, W, 3]
    nearest = torch.cdist(images.mean((1, 2)), COLOURS).argmin(1)
    assert nearest.tolist() == [2] * 4 + [0] * 4
    records = [json.loads(line) for line in (tmp_path / "s" / "samples.jsonl").read_text().splitlines()]
    assert [r["k"] for r in records] == [2] * 4 + [0] * 4 and records[5]["index"] == 5
    assert {"file", "seed", "w", "steps", "scheduler"} <= records[0].keys()
    assert (tmp_path / "s" / "grid.png").is_file()


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "ddpm"])
def test_images_do_not_depend_on_the_batch_size(scheduler: str, run: Path, tmp_path: Path) -> None:
    """Also for a solver that adds noise: every image has its own stream."""
    made = []
    for size in (1, 5, 8):
        options = SampleOptions(n=8, batch_size=size, scheduler=scheduler, steps=10, device="cpu")
        made.append(pictures(sample(str(run), options, str(tmp_path / str(size)))).astype(int))
    assert np.abs(made[0] - made[1]).max() <= 1 and np.abs(made[0] - made[2]).max() <= 1
    assert np.abs(made[0][0] - made[0][1]).max() > 1


@pytest.mark.parametrize("scheduler", sorted(SOLVERS))
def test_every_solver_makes_the_asked_colour(scheduler: str, run: Path) -> None:
    pipe = open_pipeline(run, "cpu")
    images = pipe.generate(pipe.clusters([1, 3]), w=1.5, steps=30, scheduler=scheduler).float() / 127.5 - 1
    assert torch.cdist(images.mean((2, 3)), COLOURS).argmin(1).tolist() == [1, 3]


def test_signals_are_drawn_from_the_training_distribution(run: Path) -> None:
    pipe = open_pipeline(run, "cpu")
    assert (
        pipe.draw(6, seed=3).k.tolist() == pipe.draw(4, seed=3).k.tolist() + pipe.draw(2, 3, first_index=4).k.tolist()
    )
    shares = torch.bincount(pipe.draw(2000).k, minlength=4) / 2000
    assert (shares - 0.25).abs().max() < 0.05


def test_sweep_interpolation_and_trajectory(run: Path, tmp_path: Path) -> None:
    for flags, count in (
        (["--sweep-w", "0,1,2", "-n", "3"], 9),
        (["--sweep-w", "0,2", "-n", "2", "--cluster", "1", "--cluster", "3", "--seed", "1"], 8),
        (["--interpolate", "0,3", "-n", "5"], 10),
        (["--trajectory", "-n", "2", "--steps", "12"], 20),
    ):
        out = tmp_path / " ".join(flags)
        code, output = invoke("sample", run, *flags, "--out", out)
        assert code == 0, output
        assert len(pictures(out)) == count == len((out / "samples.jsonl").read_text().splitlines())
    ends = torch.from_numpy(pictures(tmp_path / "--interpolate 0,3 -n 5")[[0, 4]]).float() / 127.5 - 1
    assert torch.cdist(ends.mean((1, 2)), COLOURS).argmin(1).tolist() == [0, 3]


def test_paper_preset_and_the_script(run: Path, tmp_path: Path) -> None:
    code, output = invoke("sample", run, "--preset", "paper", "-n", "2", "--out", tmp_path / "p")
    assert code == 0, output
    record = json.loads((tmp_path / "p" / "samples.jsonl").read_text().splitlines()[0])
    assert (record["scheduler"], record["steps"], record["w"]) == ("ddim", 250, 2.0)
    given = ("--interval", "0.2,0.8", "--w", "5")
    for folder, flags in (("best", ("--preset", "best")), ("same", given)):
        assert invoke("sample", run, *flags, "-n", "2", "--out", tmp_path / folder)[0] == 0
    assert np.array_equal(pictures(tmp_path / "best"), pictures(tmp_path / "same"))


def test_strategies_and_spacing_are_flags_and_stand_in_the_records(run: Path, tmp_path: Path) -> None:
    flags = ("--strategy", "cfg", "--rescale", "0.5", "--interval", "0.2,0.8", "--spacing", "trailing", "--w", "3")
    for folder, extra in (("limited", flags), ("apg", ("--strategy", "apg", "--w", "3")), ("plain", ("--w", "3"))):
        code, output = invoke(
            "sample", run, "--cluster", "1", "-n", "2", "--steps", "8", *extra, "--out", tmp_path / folder
        )
        assert code == 0, output
    record = json.loads((tmp_path / "limited" / "samples.jsonl").read_text().splitlines()[0])
    wanted = {"strategy": "cfg", "rescale": 0.5, "interval": [0.2, 0.8], "spacing": "trailing", "w": 3.0}
    assert wanted.items() <= record.items()
    limited, apg, plain = (pictures(tmp_path / name).astype(int) for name in ("limited", "apg", "plain"))
    assert np.abs(limited - plain).max() > 1 and np.abs(apg - plain).max() > 1


def test_images_of_another_size(run: Path, tmp_path: Path) -> None:
    """A wide image of one colour is what a square one is; its own size is the default to the pixel."""
    code, output = invoke("sample", run, "--cluster", "2", "-n", "2", "--size", "24x16", "--out", tmp_path / "wide")
    assert code == 0, output
    images = torch.from_numpy(pictures(tmp_path / "wide")).float() / 127.5 - 1
    assert images.shape == (2, 16, 24, 3) and torch.cdist(images.mean((1, 2)), COLOURS).argmin(1).tolist() == [2, 2]
    for flags, folder in ((("--size", "16x16"), "same"), ((), "plain")):
        assert invoke("sample", run, "-n", "2", *flags, "--out", tmp_path / folder)[0] == 0
    assert np.array_equal(pictures(tmp_path / "same"), pictures(tmp_path / "plain"))
    for size, word in (("20x18", "multiples of 4"), ("16", "320x256"), ("0x0", "size=0: from 1")):
        code, output = invoke("sample", run, "--size", size, "--out", tmp_path / "no")
        assert code == 2 and word in output and not (tmp_path / "no").exists(), output


def test_pixels_are_clipped_and_latents_never_are(run: Path) -> None:
    """`patch2` latents are pixels: x0 stays where black and white are; a network's latents have no bounds."""
    pipe = open_pipeline(run, "cpu")
    low, high = pipe.bounds
    black, white = (pipe.autoencoder.encode(torch.full((1, 3, 2, 2), value))[0] for value in (-1.0, 1.0))
    assert torch.allclose(low, black, atol=1e-5) and torch.allclose(high, white, atol=1e-5)
    seen: list[torch.Tensor] = []
    pipe.generate(pipe.clusters([1]), w=30.0, steps=5, watch=lambda i, x0: seen.append(x0))
    assert all((x0 >= low - 1e-5).all() and (x0 <= high + 1e-5).all() for x0 in seen)
    pipe.autoencoder.kind = "kl"
    assert pipe.bounds is None


@pytest.mark.parametrize(("drop", "w", "used"), [(1.0, 2.0, 0.0), (0.0, 1.0, 1.0), (0.1, 2.0, 2.0), (None, 2.0, 2.0)])
def test_w_is_what_training_allows(drop: float | None, w: float, used: float, run: Path, capsys) -> None:
    """With guidance always dropped the label table is random: it must not enter the picture."""
    pipe = open_pipeline(run, "cpu")
    pipe.register_to_config(drop=drop)
    assert pipe.strength(w) == used and pipe.strength(pipe.usual_w) in (0.0, 1.0, 2.0)
    assert ("trained without guidance" in capsys.readouterr().err) == (drop == 1.0)
    if drop == 1.0:
        for strategy in (cfg, interval(cfg, 0.2, 0.8)):
            before = pipe.generate(pipe.clusters([1, 3]), w=w, steps=3, strategy=strategy)
            pipe.conditioner.labels.data.normal_()
            assert torch.equal(before, pipe.generate(pipe.clusters([1, 3]), w=w, steps=3, strategy=strategy))
    if drop == 0.0:
        with pytest.raises(InputError, match="never learnt the null"):
            pipe.generate(pipe.clusters([1]), w=2.0, steps=3)


def test_a_run_knows_its_drop(run: Path) -> None:
    assert open_pipeline(run, "cpu").config.drop == 0.1


def test_same_command_again_on_a_run_without_guidance(run: Path, tmp_path: Path) -> None:
    index = shutil.copytree(run, tmp_path / "run") / "pipeline" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"drop": 1.0}))
    for _ in range(2):  # w is not what was asked for, the settings are
        out = sample(str(tmp_path / "run"), SampleOptions(n=2, steps=4, w=3.0), str(tmp_path / "s"))
    assert json.loads((out / "samples.jsonl").read_text().splitlines()[0])["w"] == 0.0


def test_same_command_again_gives_the_same_files_and_other_settings_are_refused(run: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "s")
    first = pictures(sample(str(run), SampleOptions(n=2, steps=4), out))
    assert np.array_equal(first, pictures(sample(str(run), SampleOptions(n=2, steps=4), out)))
    with pytest.raises(InputError, match="other settings"):
        sample(str(run), SampleOptions(n=2, steps=5), out)
    assert not np.array_equal(first, pictures(sample(str(run), SampleOptions(n=2, steps=5), out, overwrite=True)))


def test_pipeline_round_trips_and_is_found_by_diffusers(run: Path, tmp_path: Path) -> None:
    pipe = SelfGuidedPipeline.from_pretrained(run / "pipeline")
    pipe.save_pretrained(tmp_path / "copy")
    again = SelfGuidedPipeline.from_pretrained(tmp_path / "copy")
    assert torch.equal(pipe.generate(pipe.clusters([1]), steps=3), again.generate(again.clusters([1]), steps=3))
    assert torch.equal(pipe.signals.k, again.signals.k) and again.annotator_folder.is_dir()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cluster", "4"], "clusters 0 to 3"),
        (["--cluster", "-1"], "clusters 0 to 3"),
        (["--scheduler", "dimm"], "did you mean 'ddim'"),
        (["--steps", "0"], "at least 1"),
        (["--steps", "2000"], "1000 noise levels"),
        (["-n", "0"], "n=0: at least 1"),
        (["--w", "nan"], "w=nan"),
        (["--w", "1e30"], "from -1,000 to 1,000"),
        (["--sweep-w", "0,1", "--w", "3"], "leave --w 3 out"),
        (["--sweep-w", ""], "numbers with commas"),
        (["--box", ""], "numbers with commas"),
        (["--like", ""], "--like '': a file is needed"),
        (["--preset", "paper", "--steps", "3"], "steps=3: preset paper means steps=250"),
        (["--preset", "best", "--w", "2"], "w=2.0: preset best means w=5.0"),
        (["--preset", "best", "--interval", "0.1,0.8"], "interval=[0.1, 0.8]: preset best means interval=[0.2, 0.8]"),
        (["--precision", "fp8"], "precision='fp8'"),
        (["--vary", "layout"], "trained without boxes or masks"),
        (["--vary", "content", "--cluster", "1", "--cluster", "2"], "give one --cluster"),
        (["--sweep-w", "0,inf"], "w=inf"),
        (["--preset", "papr"], "did you mean 'paper'"),
        (["--interpolate", "0,9"], "clusters 0 to 3"),
        (["--interpolate", "0"], "write it as 3,17"),
        (["--interpolate", "0,1", "--like", "photo.png"], "--interpolate and --like do not go together"),
        (["--vary", "content", "--trajectory"], "--trajectory and --vary do not go together"),
        (["--sweep-w", "a,b"], "numbers with commas"),
        (["--eta", "1"], "belongs to scheduler ddim"),
        (["--interval", "0.2"], "write it as 0.2,0.8"),
        (["--interval", "0.8,0.2"], "two rising"),
        (["--strategy", "cgf"], "did you mean 'cfg'"),
        (["--strategy", "apg", "--rescale", "0.5"], "belongs to strategy cfg"),
        (["--spacing", "log"], "spacing='log'"),
        (["--trajectory", "--sweep-w", "1"], "--trajectory and --sweep-w do not go together"),
        (["--device", "tpu"], "device='tpu'"),
    ],
)
def test_wrong_flags_are_one_line_and_leave_nothing(flags: list[str], message: str, run: Path, tmp_path: Path) -> None:
    code, output = invoke("sample", run, *flags, "--out", tmp_path / "s")
    assert code == 2 and message in output and output.count("\n") == 1, output
    assert not any(tmp_path.iterdir())


def test_missing_runs_and_foreign_folders(run: Path, tmp_path: Path) -> None:
    assert invoke("sample", tmp_path / "no")[0] == 2
    assert "no pipeline/" in invoke("sample", tmp_path)[1]
    (tmp_path / "mine.txt").write_text("precious")
    code, output = invoke("sample", run, "-n", "1", "--out", tmp_path)
    assert code == 2 and "holds no samples" in output and (tmp_path / "mine.txt").read_text() == "precious"
    for folder in (tmp_path, run):
        before = sorted(folder.rglob("*"))
        code, output = invoke("sample", run, "-n", "1", "--out", folder, "--overwrite")
        assert code == 2 and "holds no samples" in output and sorted(folder.rglob("*")) == before
    code, output = invoke("sample", run, "-n", "1", "--out", tmp_path / "mine.txt", "--overwrite")
    assert code == 2 and "is a file, or" in output


def test_what_lies_beside_samples_stays(run: Path, tmp_path: Path) -> None:
    command = ("sample", run, "-n", "1", "--steps", "2", "--out", tmp_path)
    assert invoke(*command)[0] == 0
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("precious")
    for name in ("evaluation.json", "evaluation_2.json"):
        (tmp_path / name).write_text("{}")
    assert invoke(*command)[0] == 0 and (tmp_path / "evaluation.json").is_file()
    assert invoke(*command, "--seed", "1", "--overwrite")[0] == 0
    assert (tmp_path / "notes" / "mine.txt").read_text() == "precious"
    assert not (tmp_path / "evaluation.json").exists()  # the figures were of other samples
    assert not (tmp_path / "evaluation_2.json").exists()


def test_eta_moves_interpolated_images_too(run: Path, tmp_path: Path) -> None:
    flags = ("--interpolate", "0,3", "-n", "2", "--scheduler", "ddim", "--steps", "5", "--eta")
    for eta in ("0", "1"):
        assert invoke("sample", run, *flags, eta, "--out", tmp_path / eta)[0] == 0
    assert not np.array_equal(pictures(tmp_path / "0"), pictures(tmp_path / "1"))


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "signals/config.json",
        "signals/diffusion_pytorch_model.safetensors",
        "model_index.json",
    ],
)
@pytest.mark.parametrize("content", [None, b"{"])
def test_damaged_pipelines_are_told(name: str, content: bytes | None, run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "pipeline", tmp_path / "pipeline"))
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    code, output = invoke("sample", tmp_path, "-n", "1", "--out", tmp_path / "s")
    wanted = "has no pipeline/" if (name, content) == ("model_index.json", None) else "damaged or not complete"
    assert code == 2 and wanted in output and output.count("\n") == 1, output
