"""Training: exact resume, Ctrl-C and kill -9, learning something, refusing what does not belong."""

import csv
import dataclasses
import errno
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY, write_annotation_set
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file

from ldm_sg import build
from ldm_sg.config import GuidanceConfig, ObjectiveConfig, TrainConfig
from ldm_sg.configfile import load, to_yaml
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.order import mix_seed, split
from ldm_sg.errors import InputError
from ldm_sg.guidance.signal import Guidance
from ldm_sg.hardware import busy_share, note_busy_cores, use_compile
from ldm_sg.pipeline import open_pipeline
from ldm_sg.sampling.request import SampleOptions, signals
from ldm_sg.training.callbacks import ema_update
from ldm_sg.training.data import Steps
from ldm_sg.training.diffusion import DiffusionModule, lr_factor
from ldm_sg.training.sharded import CPU_SHARES
from ldm_sg.verbs.sample import sample
from ldm_sg.verbs.train import train


def config(annotation: Path, out: Path, **changes) -> TrainConfig:
    base = TrainConfig(
        annotation=str(annotation), out=str(out), model=TINY, steps=12, batch_size=8, lr=2e-3, warmup=4, ema=0.9,
        precision="fp32", device="cpu", workers=0, val_share=0.1, log_every=2, val_every=6, sample_every=0,
        checkpoint_every=4,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def weights(run: Path) -> dict[str, torch.Tensor]:
    pipeline = run / "pipeline"
    return {
        **load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors"),
        **load_file(pipeline / "conditioner" / "diffusion_pytorch_model.safetensors"),
    }


def rows(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(config(colours, tmp_path_factory.mktemp("runs") / "whole"))


def test_resumed_run_equals_an_uninterrupted_one(whole: Path, colours: Path, tmp_path: Path) -> None:
    run = train(config(colours, tmp_path / "run", steps=5, checkpoint_every=5))
    (run / "pipeline.tmp-4194303").mkdir()  # what a killed start leaves
    (run / "checkpoints" / "last.ckpt.tmp-4194303").touch()
    assert run == train(config(colours, run, checkpoint_every=4))
    assert not list(run.rglob("*.tmp*"))
    assert weights(run).keys() == weights(whole).keys()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(run)[name]), name
    for ours, theirs in zip(rows(run)[3:], rows(whole)[3:], strict=True):
        assert ours["step"] == theirs["step"] and ours["val_loss_guided"] == theirs["val_loss_guided"]
    assert [r["train_loss"] for r in rows(run)][-1] == [r["train_loss"] for r in rows(whole)][-1]


@pytest.mark.parametrize("tokens", ["vector", "none"])
def test_checkpointed_activations_give_the_same_gradients(tokens: str, colours: Path, tmp_path: Path) -> None:
    """And are computed again: the blocks' forward runs twice as often."""
    found, model = [], TINY | {"tokens": tokens, "dropout": 0.1}
    for again in (False, True):
        wanted = config(colours, tmp_path / f"{again}", model=model, gradient_checkpointing=again)
        network, calls = build.network(wanted, LatentSet(colours)).train(), []
        network.unet.down_blocks[1].resnets[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.nn.init.normal_(network.unet.conv_out.weight, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        network(
            torch.ones(2, 12, 8, 8), torch.tensor([3, 700]), Guidance.from_k(torch.tensor([0, 3]))
        ).square().mean().backward()
        found.append(([p.grad for p in network.parameters() if p.grad is not None], len(calls)))
    assert [calls for _, calls in found] == [1, 2]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[0][0], found[1][0], strict=True))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_run_resumes_exactly(number: int, colours: Path, tmp_path: Path) -> None:
    """A real process, killed or interrupted in the middle, then the same command again."""
    wanted = config(colours, tmp_path / "run", steps=60, checkpoint_every=7, val_every=20)
    (tmp_path / "c.yaml").write_text(to_yaml(wanted))
    command = [sys.executable, "-c", "from ldm_sg.cli import main; main()", "train", str(tmp_path / "c.yaml")]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    code = process.wait(60)
    step = torch.load(last, weights_only=True)["global_step"]
    assert code == (130 if number == signal.SIGINT else -9) and 7 <= step < 60
    train(wanted)
    reference = train(dataclasses.replace(wanted, out=str(tmp_path / "reference")))
    for name, value in weights(reference).items():
        assert torch.equal(value, weights(tmp_path / "run")[name]), name
    steps = [int(row["step"]) for row in rows(tmp_path / "run") if row["train_loss"]]
    assert steps == sorted(set(steps)) and steps[-1] == 60


@pytest.mark.parametrize(
    "launcher",
    [[], pytest.param(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], marks=pytest.mark.slow)],
)
def test_two_processes_train_what_one_does(launcher: list[str], whole: Path, colours: Path, tmp_path: Path) -> None:
    """DDP over gloo: the same stream of batches and noise, so the same weights up to the order of sums."""
    wanted = config(colours, tmp_path / "run", devices=1 if launcher else 2)
    (tmp_path / "c.yaml").write_text(to_yaml(wanted))
    script = tmp_path / "go.py"
    script.write_text("import sys\nfrom ldm_sg.cli import main\nif __name__ == '__main__':\n    main()\n")
    command = [sys.executable, *launcher, str(script), "train", str(tmp_path / "c.yaml")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for column in (
        "val_loss_guided",
        "val_loss_null",
    ):  # weights themselves drift: Adam takes the sign of tiny gradients
        one, two = ([float(row[column]) for row in rows(run) if row[column]] for run in (whole, tmp_path / "run"))
        assert len(one) == len(two) == 2 and two == pytest.approx(one, rel=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not CPU_SHARES, reason="before torch 2.8 on GPUs alone")
def test_shares_of_the_weights_train_what_whole_ones_do(whole: Path, colours: Path, tmp_path: Path) -> None:
    """FSDP on two processes, on one without it, on two again: one checkpoint file of whole tensors whoever writes it, a whole
    pipeline, and the weights of one process up to the order of sums (Adam takes the sign of tiny gradients)."""
    (tmp_path / "go.py").write_text("from ldm_sg.cli import main\nif __name__ == '__main__':\n    main()\n")
    shares = {"devices": 2, "strategy": "fsdp", "sample_every": 4, "keep_every": 4}
    for steps, how in ((4, shares), (8, {}), (12, shares)):
        wanted = config(colours, tmp_path / "run", steps=steps, gradient_checkpointing=True, **how)
        (tmp_path / "c.yaml").write_text(to_yaml(wanted))
        command = [sys.executable, str(tmp_path / "go.py"), "train", str(tmp_path / "c.yaml")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        ours, theirs = (
            torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (tmp_path / "run", whole)
        )
        assert ours["global_step"] == steps and ours.keys() == theirs.keys()
        for part in ("state_dict", "current_model_state"):
            assert {n: t.shape for n, t in ours[part].items()} == {n: t.shape for n, t in theirs[part].items()}
    for column in ("val_loss_guided", "val_loss_null"):
        one, two = ([float(row[column]) for row in rows(run) if row[column]] for run in (whole, tmp_path / "run"))
        assert len(one) == len(two) == 2 and two == pytest.approx(one, rel=1e-4)
    ours, theirs = weights(tmp_path / "run"), weights(whole)
    assert ours.keys() == theirs.keys()
    gaps = torch.cat([(ours[name] - theirs[name]).abs().flatten() for name in ours])
    assert gaps.max() < 1e-3 and gaps.mean() < 1e-6
    moments = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
               for run in (tmp_path / "run", whole)]  # fmt: skip
    assert all(torch.allclose(mine["exp_avg"], moments[1][i]["exp_avg"], atol=1e-5) for i, mine in moments[0].items())
    assert (tmp_path / "run" / "checkpoints" / "ema_0000012.safetensors").is_file()
    pipe = open_pipeline(tmp_path / "run", "cpu")
    assert pipe.generate(pipe.clusters([0, 3]), steps=2, seed=0).float().std() > 0


@pytest.mark.parametrize("change", [{"strategy": "zero"}, {"strategy": "fsdp", "compile": True}])
def test_strategies_that_cannot_be(change: dict, colours: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"auto, ddp, fsdp|not with strategy=fsdp"):
        train(config(colours, tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_overfits_eight_images_to_a_visible_copy(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    images = torch.nn.functional.interpolate(
        torch.rand(8, 3, 4, 4, generator=generator) * 2 - 1, size=16, mode="nearest"
    )
    annotation = write_annotation_set(tmp_path / "set", images, list(range(8)), 8)
    wide = {**TINY, "channels": 32, "hidden": 64}
    run = train(
        config(annotation, tmp_path / "run", model=wide, steps=650, batch_size=32, warmup=50, decay=0.5, ema=0.99,
               val_share=0.0, checkpoint_every=500, objective=ObjectiveConfig(kind="v"))
    )  # fmt: skip
    pipe = open_pipeline(run, "cpu")
    copies = pipe.generate(pipe.clusters(range(8)), w=1.0, seed=5).float() / 127.5 - 1
    psnr = 10 * torch.log10(4 / (copies - images).square().flatten(1).mean(1))
    others = (copies - images.roll(1, 0)).square().mean()
    assert psnr.median() > 20, psnr
    assert others > 10 * (copies - images).square().mean()


def test_busy_cores_are_noticed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = "cpu 100 0 50 1000 10 0 0 0 0 0\ncpu0 1", "cpu 190 0 60 1090 20 0 0 0 0 0\ncpu0 2"
    assert busy_share(first, last) == pytest.approx(0.5)
    readings = iter([first, last] * 2)
    monkeypatch.setattr(Path, "read_text", lambda _: next(readings))
    for threads, said in ((2, True), (1, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        note_busy_cores(torch.device("cpu"), 0)
        assert ("OMP_NUM_THREADS=1" in capsys.readouterr().err) == said


def test_crops_of_larger_images(colours: Path, tmp_path: Path) -> None:
    """12 of 16 pixels; what samples are compared with is cut out alike."""
    run = train(config(colours, tmp_path / "run", crop=12, steps=4))
    pipe = open_pipeline(run, "cpu")
    assert (pipe.image_size, pipe.source_size, pipe.latent_shape[1:]) == (12, 16, (6, 6))
    assert pipe.generate(pipe.clusters([1]), w=1.0, steps=2).shape == (1, 3, 12, 12)
    for crop in (0, 13, 18):
        with pytest.raises(InputError, match=rf"crop={crop}: a multiple of 2 up to 16"):
            train(config(colours, tmp_path / "no", crop=crop))
    assert not (tmp_path / "no").exists()


def test_guided_validation_loss_is_logged_beside_null(whole: Path) -> None:
    logged = [row for row in rows(whole) if row["val_loss_guided"]]
    assert [int(row["step"]) for row in logged] == [6, 12]
    assert all(float(row["val_loss_null"]) > 0 for row in logged)
    assert list((whole / "tensorboard").glob("events*"))


def test_no_guidance_baseline_never_trains_the_labels(colours: Path, tmp_path: Path) -> None:
    run = train(config(colours, tmp_path / "run", guidance=GuidanceConfig(drop=1.0), weight_decay=0.0, steps=6))
    before = load_file(run / "pipeline_untrained" / "conditioner" / "diffusion_pytorch_model.safetensors")
    after = load_file(run / "pipeline" / "conditioner" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(before["labels"], after["labels"]) and not torch.equal(before["null"], after["null"])


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_every_objective_trains_and_samples(kind: str, colours: Path, tmp_path: Path) -> None:
    run = train(config(colours, tmp_path / "run", steps=3, objective=ObjectiveConfig(kind=kind), val_share=0.0))
    pipe = open_pipeline(run, "cpu")
    assert pipe.generate(signals(pipe, SampleOptions(n=2)), steps=4).shape == (2, 3, 16, 16)


def test_init_starts_from_another_run(whole: Path, colours: Path, tmp_path: Path) -> None:
    run = train(config(colours, tmp_path / "run", steps=1, init=str(whole)))
    started = load_file(run / "pipeline_untrained" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, weights(whole)[name]) for name, value in started.items())
    with pytest.raises(InputError, match="no pipeline/"):
        train(config(colours, tmp_path / "x", init=str(tmp_path)))
    with pytest.raises(InputError, match=r"unet\.conv_in"):
        train(config(colours, tmp_path / "y", init=str(whole), model={**TINY, "channels": 32}))


def test_refuses_a_folder_of_another_config(whole: Path, colours: Path) -> None:
    with pytest.raises(InputError, match=r"belongs to another config.*lr.*0\.002"):
        train(config(colours, whole, lr=1e-4))


def test_finished_run_returns_at_once(whole: Path, colours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(config(colours, whole)) == whole
    assert "already trained" in capsys.readouterr().out


def test_refuses_an_annotation_set_that_changed(colours: Path, tmp_path: Path) -> None:
    images = torch.zeros(16, 3, 16, 16)
    images[::2] = 0.5
    annotation = write_annotation_set(tmp_path / "set", images, [0, 1] * 8, 2)
    run = train(config(annotation, tmp_path / "run", steps=1))
    annotation.rename(tmp_path / "old")
    write_annotation_set(tmp_path / "set", -images, [0, 1] * 8, 2)
    with pytest.raises(InputError, match="changed under"):
        train(config(annotation, run, steps=2))


def test_full_disk_is_one_message_and_the_same_command_resumes(
    whole: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    wanted = config(colours, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(InputError, match="no space left on its disk"):
        patch.setattr("ldm_sg.build.PipelineWriter.export", full)
        train(wanted)
    train(wanted)
    assert all(torch.equal(value, weights(tmp_path / "run")[name]) for name, value in weights(whole).items())


def test_pickled_checkpoint_with_code_is_never_run(colours: Path, tmp_path: Path) -> None:
    run = train(config(colours, tmp_path / "run", steps=1))
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    (run / "checkpoints" / "last.ckpt").write_bytes(pickle.dumps({"global_step": Evil()}))
    with pytest.raises(InputError, match="not a checkpoint"):
        train(config(colours, run, steps=2))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"ema": 5.0}, "ema=5"),
        ({"lr": -1.0}, "lr=-1"),
        ({"guidance": GuidanceConfig(drop=1.5)}, "guidance.drop=1.5"),
        ({"model": "bb"}, "did you mean 'b'"),
        ({"model": {**TINY, "multipliers": [1, 2, 2, 2, 2]}}, "halves 4 times"),
        ({"model": {**TINY, "attention": [8]}}, "no level has"),
        ({"model": {**TINY, "heads": 5}}, "does not divide"),
        ({"objective": ObjectiveConfig(kind="epss")}, "did you mean 'eps'"),
        ({"objective": ObjectiveConfig(timesteps=10**9)}, "from 2 to 100,000"),
        ({"init": ".", "lora": 100_000}, "lora=100000: at most 32"),
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"device": "tpu"}, "device='tpu'"),
        ({"annotation": "nowhere"}, "not an annotation set"),
    ],
)
def test_wrong_values_are_named_and_leave_nothing(change: dict, message: str, colours: Path, tmp_path: Path) -> None:
    wanted = dataclasses.replace(config(colours, tmp_path / "run"), **change)
    with pytest.raises(InputError, match=message):
        train(wanted)
    assert not (tmp_path / "run").exists()


def test_batches_are_a_function_of_the_step() -> None:
    pool, _ = split(50, 0.1, 0)
    whole = list(Steps([(pool, 8)], 7, 20, 0, 0, 1))
    assert list(Steps([(pool, 8)], 7, 20, 13, 0, 1)) == whole[13:]
    for rank in (0, 1):
        mine = list(Steps([(pool, 8)], 7, 20, 0, rank, 2))
        assert len(mine) == 20 and all(m[2:] == w[2:][rank::2] for m, w in zip(mine, whole, strict=True))
    assert mix_seed(0, 1) != mix_seed(1, 0)


def test_ema_warms_up_and_then_decays() -> None:
    averaged, current = [torch.zeros(1)], [torch.ones(1)]
    ema_update(0.9)(averaged, current, 0)
    assert averaged[0].item() == pytest.approx(0.9)
    ema_update(0.9)(averaged, [torch.zeros(1)], 10_000)
    assert averaged[0].item() == pytest.approx(0.81)


def test_learning_rate_warms_up_and_decays() -> None:
    c = TrainConfig(annotation="", out="", steps=100, warmup=10, decay=0.2)
    assert lr_factor(0, c) == pytest.approx(0.1) and lr_factor(50, c) == 1 and lr_factor(90, c) == pytest.approx(0.5)


def test_loader_reads_what_was_written(colours: Path) -> None:
    latents = LatentSet(colours)
    assert len(latents) == 64 and latents.signals.k.tolist() == [i % 4 for i in range(64)]
    batch = latents.latents(torch.arange(64))
    assert batch.mean().abs() < 0.01 and abs(batch.std() - 1) < 0.01


def test_resolved_config_loads_again(whole: Path, colours: Path) -> None:
    again = load(TrainConfig, whole / "config.yaml")
    assert again == config(colours, whole)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_batches_train_what_whole_ones_do(
    accumulate: int, whole: Path, colours: Path, tmp_path: Path
) -> None:
    """Interrupted in between, too; every callback counts steps of the optimizer, not parts."""
    for steps in (5, 12):
        run = train(config(colours, tmp_path / "run", accumulate=accumulate, steps=steps, checkpoint_every=5))
    for column in ("val_loss_guided", "val_loss_null"):
        one, parts = ([float(row[column]) for row in rows(r) if row[column]] for r in (whole, run))
        assert len(one) == len(parts) == 2 and parts == pytest.approx(one, rel=1e-3)
    one, parts = ([row for row in rows(r) if row["train_loss"]][-1] for r in (whole, run))
    assert parts["step"] == one["step"] and float(parts["train_loss"]) == pytest.approx(
        float(one["train_loss"]), rel=1e-3
    )


def test_parts_draw_what_the_whole_batch_draws() -> None:
    pool = torch.arange(100)
    for (step, _, *batch), parts in zip(
        Steps([(pool, 8)], 7, 3, 0, 0, 1),
        zip(*[iter(Steps([(pool, 8)], 7, 3, 0, 0, 1, 4))] * 4, strict=True),
        strict=True,
    ):
        assert [part[:2] for part in parts] == [[step, share] for share in range(4)]
        assert [part[2:] for part in parts] == [batch[share::4] for share in range(4)]


@pytest.mark.parametrize("change", [{"accumulate": 3}, {"devices": 3}, {"devices": 2, "accumulate": 8}])
def test_batch_that_does_not_divide_is_refused(change: dict, colours: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_size=8: give a multiple of"):
        train(config(colours, tmp_path / "run", **change))
    assert not (tmp_path / "run").exists()


def test_snapshots_are_opened_by_step_and_by_fd(whole: Path, colours: Path, tmp_path: Path) -> None:
    run = train(config(colours, tmp_path / "run", keep_every=4))
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "ema_0000004.safetensors", "ema_0000008.safetensors", "ema_0000012.safetensors", "last.ckpt",
    ]  # fmt: skip
    shorter = train(config(colours, tmp_path / "shorter", steps=8))
    then, now, eighth = (open_pipeline(r, "cpu", c) for r, c in ((shorter, None), (run, None), (run, "8")))
    for name, value in eighth.unet.state_dict().items():
        assert torch.equal(value, then.unet.state_dict()[name]), name
    assert torch.equal(eighth.conditioner.null, then.conditioner.null) and eighth.checkpoint == 8
    assert not torch.equal(eighth.conditioner.null, now.conditioner.null) and now.checkpoint is None

    made = sample(str(run), SampleOptions(n=2, steps=3, device="cpu", checkpoint="8"))
    assert "step-8" in made.name
    for wrong, message in (("7", "choose one of"), ("best", "at least two checkpoints")):
        with pytest.raises(InputError, match=message):
            open_pipeline(run, "cpu", wrong)
    with pytest.raises(InputError, match="keep_every"):
        open_pipeline(shorter, "cpu", "8")

    def judged(step: int, fd: float, judge: str = "a", w: float = 2.0) -> None:
        result = {"metrics": {judge: {"fd": fd}}, "judges": {judge: {"name": judge}}}
        result |= {"sampling": {"w": w, "checkpoint": step}}
        (run / "evaluations").mkdir(exist_ok=True)
        text = json.dumps(result | {"reference": "r", "samples": 10})
        (run / "evaluations" / f"{step}-{judge}-{w}.json").write_text(text)

    judged(4, 0.3)
    judged(12, 0.1, judge="b")  # lower, but by another judge: nothing to compare it with
    with pytest.raises(InputError, match="there are none to compare"):
        open_pipeline(run, "cpu", "best")
    judged(8, 0.2)
    judged(12, 0.25)
    assert open_pipeline(run, "cpu", "best").checkpoint == 8
    judged(4, 0.01, judge="b")
    with pytest.raises(InputError, match="2 sets of them differ"):
        open_pipeline(run, "cpu", "best")


def test_set_in_the_making_says_how_far_it_is_and_bad_places_are_told_at_once(whole: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    (half / "work").mkdir(parents=True)
    (half / "config.yaml").write_text("shards: [a.tar, b.tar, c.tar]\n")
    (half / "work" / "000000.json").write_text("{}")
    with pytest.raises(InputError, match=r"1 of 3 shards are through"):
        train(config(half, tmp_path / "run"))
    code = (
        "import sys\nfrom ldm_sg.config import TrainConfig\nfrom ldm_sg.verbs.train import train\n"
        "for values in ({'annotation': sys.argv[1]}, {'annotation': sys.argv[2], 'init': 'nowhere'}):\n"
        "    try: train(TrainConfig(out='x', **values))\n    except ValueError as err: print(err)\n"
        "assert 'torch' not in sys.modules"
    )
    annotation = OmegaConf.load(whole / "config.yaml").annotation
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(half), annotation], capture_output=True, text=True, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 3" in done.stdout and "init='nowhere'" in done.stdout


def test_leaves_a_report_and_a_training_loss_however_short(colours: Path, tmp_path: Path) -> None:
    run = train(config(colours, tmp_path / "run", steps=1, log_every=50, val_every=0))
    assert "Training" in (run / "report.html").read_text() or (run / "report.html").stat().st_size > 1000
    assert [row["step"] for row in rows(run) if float(row["train_loss"]) > 0] == ["1"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '"x"'])
def test_damaged_annotation_json_is_told(content: str, whole: Path, colours: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("pipeline*"))
    (tmp_path / "run" / "annotation.json").write_text(content)
    with pytest.raises(InputError, match=r"annotation\.json"):
        train(config(colours, tmp_path / "run"))


def test_weights_in_pickle_format_are_not_an_init(whole: Path, colours: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "pipeline", tmp_path / "old" / "pipeline")
    unet = tmp_path / "old" / "pipeline" / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.bin")
    with pytest.raises(InputError, match="damaged or not complete"):
        train(config(colours, tmp_path / "run", init=str(tmp_path / "old")))


def test_disk_that_fills_while_a_pipeline_is_written(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("diffusers.models.modeling_utils.safetensors.torch.save_file", full)
    run = tmp_path / "run"
    with pytest.raises(InputError, match=rf"{run}/pipeline_untrained: cannot be written: I/O error"):
        train(config(colours, run))
    assert not list(run.glob("pipeline*")) and not list(run.rglob("*tmp*"))


def test_compile_is_for_cuda_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not use_compile("auto", cpu) and use_compile("auto", cuda) and not use_compile(False, cuda)
    assert use_compile(True, cuda) and not capsys.readouterr().err
    assert use_compile(True, cpu) and "minutes before the first step" in capsys.readouterr().err


def test_interrupt_before_the_first_step_is_said(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(to_yaml(config(colours, tmp_path / "run", steps=10_000)))
    command = [sys.executable, "-c", "from ldm_sg.cli import main; main()", "train", str(tmp_path / "c.yaml")]
    heard = partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # where a shell started the tests in the background it is not
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while not (tmp_path / "run" / "config.yaml").is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in err.splitlines()[-1] and "Traceback" not in err


@pytest.mark.skipif(sys.platform != "linux", reason="finds the other rank in /proc")
def test_a_killed_rank_is_one_line(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(to_yaml(config(colours, tmp_path / "run", devices=2, steps=100_000)))
    (tmp_path / "go.py").write_text("from ldm_sg.cli import main\nif __name__ == '__main__':\n    main()\n")
    command = [sys.executable, str(tmp_path / "go.py"), "train", str(tmp_path / "c.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file() and process.poll() is None:
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    rank = next(c for c in children if b"go.py" in Path(f"/proc/{c}/cmdline").read_bytes())
    os.kill(int(rank), signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "Traceback" not in err
    assert "another of its 2 processes has ended" in err.splitlines()[-1], err


def test_a_step_without_a_finite_gradient_is_no_step(colours: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Weights, moments and their count stay; the same on the way that GPUs take (a fused optimizer that is told)."""
    real, made = DiffusionModule._loss, DiffusionModule.configure_optimizers

    def spoilt(self, denoiser, x0, *rest):
        loss = real(self, denoiser, x0, *rest)
        return loss * torch.nan if torch.is_grad_enabled() and self.trainer.global_step in bad else loss

    def fused(self):
        found = made(self)
        for group in found["optimizer"].param_groups:
            group["fused"] = True
        found["optimizer"].defaults["fused"] = found["optimizer"]._step_supports_amp_scaling = True
        return found

    monkeypatch.setattr(DiffusionModule, "_loss", spoilt)
    bad = range(3, 6)
    one = train(config(colours, tmp_path / "one", ema=0.0))
    lines = [json.loads(line) for line in (one / "skipped_steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 4, 5] and lines[0]["gradient_norm"] == "nan"
    pool = split(64, 0.1, 0)[0]
    assert lines[2]["images"] == next(iter(Steps([(pool, 8)], 0, 12, 5, 0, 1)))[2:]
    assert "3 steps up to 5 skipped" in capsys.readouterr().err
    monkeypatch.setattr(DiffusionModule, "configure_optimizers", fused)
    other = train(config(colours, tmp_path / "other", ema=0.0))
    for run in (one, other):
        state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
        assert {int(own["step"]) for own in state.values()} == {12 - 3}
    for (name, mine), its in zip(weights(one).items(), weights(other).values(), strict=True):
        assert mine.isfinite().all() and torch.allclose(mine, its, atol=2e-3), name


def test_twenty_bad_steps_in_a_row_end_the_run(colours: Path, tmp_path: Path, monkeypatch) -> None:
    real = DiffusionModule._loss
    monkeypatch.setattr(DiffusionModule, "_loss", lambda self, *a: real(self, *a) * (math.inf if spoilt else 1))
    spoilt = False
    train(config(colours, tmp_path / "run", steps=4))
    before = weights(tmp_path / "run")
    spoilt = True
    with pytest.raises(InputError, match=r"20 steps in a row up to step 23 gave a gradient that is not finite"):
        train(config(colours, tmp_path / "run", steps=40))
    after = weights(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) or after[name].isfinite().all() for name in before)
    spoilt = False
    train(config(colours, tmp_path / "run", steps=40))
    assert (tmp_path / "run" / "pipeline").is_dir()


def test_the_pipeline_is_never_older_than_the_checkpoint(
    whole: Path, colours: Path, tmp_path: Path, monkeypatch
) -> None:
    """Who is killed while the last pipeline is written has not finished."""
    real, calls = build.PipelineWriter.export, []

    def killed(self, network, folder, lora=None):
        calls.append(folder.name)
        if len(calls) == 4:  # the untrained one, those of steps 4 and 8, the last
            raise ZeroDivisionError
        real(self, network, folder, lora)

    monkeypatch.setattr(build.PipelineWriter, "export", killed)
    wanted = config(colours, tmp_path / "run")
    with pytest.raises(ZeroDivisionError):
        train(wanted)
    monkeypatch.undo()
    train(wanted)
    assert all(torch.equal(value, weights(tmp_path / "run")[name]) for name, value in weights(whole).items())
