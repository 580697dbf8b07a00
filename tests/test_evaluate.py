"""The verb evaluate, on a run whose answers are known."""

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import COLOURS, TINY, folder_of, photo, write_annotation_set
from PIL import Image
from safetensors.torch import save_file
from test_sample import invoke

from ldm_sg import executor
from ldm_sg.annotate.clusters import Clusters
from ldm_sg.annotate.features import file_sha256, load_extractor
from ldm_sg.annotate.kinds import save_annotator
from ldm_sg.build import PipelineWriter, network
from ldm_sg.config import AnnotatorConfig, FeaturesConfig, TrainConfig
from ldm_sg.data.latents import LatentSet
from ldm_sg.data.shards import ShardWriter
from ldm_sg.errors import InputError
from ldm_sg.evaluate import sources
from ldm_sg.evaluate.collect import Look, Passes, Task
from ldm_sg.evaluate.evaluation import _worker
from ldm_sg.evaluate.options import DRAWING, Options
from ldm_sg.evaluate.subjects import open_subject
from ldm_sg.folder import cache_home
from ldm_sg.pipeline import SelfGuidedPipeline
from ldm_sg.sampling.request import SampleOptions
from ldm_sg.verbs.evaluate import evaluate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four flat colours with a real (untrained) network, g and f, and its source shard beside it."""
    root = tmp_path_factory.mktemp("evaluate")
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(64) % 4
    images = (COLOURS[truth][:, :, None, None] + 0.05 * torch.randn(64, 3, 16, 16, generator=generator)).clamp(-1, 1)
    with ShardWriter(root / "real.tar") as writer:
        for i, image in enumerate(images):
            out = io.BytesIO()
            Image.fromarray(((image + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(out, "PNG")
            writer.write(f"{i:03d}", {"png": out.getvalue()})
    g = load_extractor(FeaturesConfig(model=str(tiny_g(root / "g"))))
    f = Clusters(AnnotatorConfig(k=4)).fit_features(g(images))
    folder = write_annotation_set(root / "set", images, f.assign(g(images)).tolist(), 4)
    save_annotator(folder / "annotator", f, g)
    config = TrainConfig(annotation=str(folder), out=str(root / "run"), model=TINY)
    latents = LatentSet(folder)
    writer = PipelineWriter(config, latents, torch.device("cpu"))
    (root / "run").mkdir()
    writer.export(network(config, latents), root / "run" / "pipeline")
    return root / "run"


def tiny_g(folder: Path) -> Path:
    """An untrained network as a g folder: good enough to tell four colours apart."""
    torch.manual_seed(0)
    tower = timm.create_model("test_resnet", num_classes=0)
    folder.mkdir()
    save_file(tower.state_dict(), folder / "model.safetensors")
    manifest = {"name": "tiny-g", "model": "test_resnet", "kwargs": {"num_classes": 0}, "layer": None, "pool": "auto"}
    manifest |= {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    manifest["sha256"] = file_sha256(folder / "model.safetensors")
    (folder / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    return folder


def perfect(self, guidance, w=2.0, steps=25, scheduler="dpmpp_2m", seed=0, first_index=0, precision="fp32", **_):
    """A generator that gives each cluster one of its real latents, and with w = 0 any."""
    k, known = guidance.k, self.signals.k
    if w == 0:
        k = known[torch.arange(first_index, first_index + len(k)) * 7 % len(known)]
    picks = [int((known == wanted).nonzero()[(first_index + i) % 8, 0]) for i, wanted in enumerate(k)]
    return self.decode(LatentSet(self.test_set).latents(torch.tensor(picks), None))


def test_a_perfect_generator_reaches_the_ceiling(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(SelfGuidedPipeline, "generate", perfect)
    monkeypatch.setattr(SelfGuidedPipeline, "test_set", str(run.parent / "set"), raising=False)
    result = evaluate(run, str(run.parent / "real.tar"), "fd,kid,prdc,consistency", n=60, batch_size=16, device="cpu")
    found = result["metrics"]["tiny-g"]
    assert found["consistency"] == 1.0 == found["consistency_real"]
    assert found["consistency_chance"] == pytest.approx(0.25) and found["consistency_top3_chance"] < 0.8
    assert found["precision"] > 0.9 and found["recall"] > 0.5
    assert result["samples"] == 60 and result["reference_images"] == 64
    judge = result["judges"]["tiny-g"]
    assert judge["size"] == 32 and len(judge["sha256"]) == 64 and judge["guide"]
    assert any("tiny-g made this run's signals" in note for note in result["notes"])
    assert result["preprocessing"]["size"] == 16 and result["sampling"]["signals"].startswith("drawn")
    file = run / "evaluations" / "w2_dpmpp_2m25_seed0_n60_own.json"
    assert json.loads(file.read_text()) == result and str(file) in capsys.readouterr().out
    free = evaluate(run, str(run.parent / "real.tar"), "fd,consistency", n=60, w=0, batch_size=16, device="cpu")
    free = free["metrics"]["tiny-g"]
    kept = json.loads(file.read_text())
    other = evaluate(run, str(run.parent / "real.tar"), "fd", n=60, batch_size=16, device="cpu")
    assert kept == json.loads(file.read_text()) and "consistency" not in other["metrics"]["tiny-g"]
    assert json.loads(file.with_stem(f"{file.stem}_2").read_text()) == other
    assert abs(free["consistency"] - 0.25) < 0.2
    assert free["fd"] < 0.1 * untrained(run)["metrics"]["tiny-g"]["fd"]


def untrained(run: Path) -> dict:
    with pytest.MonkeyPatch.context() as patch:
        patch.undo()
        noise = torch.randint(0, 256, (64, 3, 16, 16), generator=torch.Generator().manual_seed(1)).byte()
        patch.setattr(
            SelfGuidedPipeline,
            "generate",
            lambda self, guidance, first_index, **_: noise[first_index:][: len(guidance)],
        )
        return evaluate(run, str(run.parent / "real.tar"), "fd", n=60, batch_size=60, device="cpu")


def look_of(run: Path, n: int, **options: Any) -> Passes:
    options = Options(str(run), str(run.parent / "real.tar"), "fd", n=n, steps=3, device="cpu", **options)
    subject = open_subject(options, [])
    seen = {("pixels", ""): lambda x: x.flatten(1)}
    return Passes(Look(subject, seen, CPU), partial(_worker, options, ["fd"]), options, {})


def test_samples_and_figures_are_the_same_for_any_batch_size_and_processes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: sample i is that of (seed, i), however many are drawn, and the figures are those of one process."""
    pixels = {n: look_of(run, n)(None, [("pixels", "")])[1]["pixels", ""] for n in (5, 16, 40)}
    assert torch.equal(pixels[40][:5], pixels[5]) and torch.equal(pixels[40][:16], pixels[16])
    args = {"metrics": "fd,kid,prdc,consistency", "n": 40, "steps": 2, "device": "cpu", "out": tmp_path / "r.json"}
    found, asked = {}, []

    def beside(make, tasks, *_):  # as two workers do it, in this process
        workers = [make("cpu"), make("cpu")]
        asked.append([str(task) for task in tasks])
        yield from (workers[i % 2](task) for i, task in enumerate(tasks))

    for batch_size, processes in ((1, 1), (7, 1), (16, 2), (64, 1)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"{batch_size}"))  # reference features are made anew
        where = run if batch_size > 1 else run / "pipeline"
        with pytest.MonkeyPatch.context() as patch:
            if processes > 1:
                patch.setattr(executor, "in_order", beside)
            result = evaluate(where, str(run.parent / "real.tar"), batch_size=batch_size, processes=processes, **args)
        found[batch_size] = result["metrics"]["tiny-g"]
    assert found[1] == found[7] == found[16] == found[64]
    assert asked[0] == ["samples 0 to 15", "samples 16 to 31", "samples 32 to 39"] and len(asked[1]) == 4
    assert json.loads((tmp_path / "r.json").read_text())["metrics"] == {"tiny-g": found[1]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "ray"])
def test_two_processes_give_the_figures_of_one(
    kind: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "ray":
        pytest.importorskip("ray", reason="pip install 'ldm-sg[distributed]'")
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    args = {"metrics": "fd,kid,prdc,consistency", "n": 40, "batch_size": 16, "steps": 2, "device": "cpu"}
    found = []
    for processes, how in ((1, "local"), (2, kind)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"{processes}"))
        real, out = str(run.parent / "real.tar"), tmp_path / f"{processes}.json"
        found.append(evaluate(run, real, processes=processes, executor=how, out=out, **args))
    assert found[0]["metrics"] == found[1]["metrics"] and found[0]["samples"] == found[1]["samples"] == 40


def test_a_killed_worker_is_one_line(run: Path, tmp_path: Path) -> None:
    def kill() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.05)
        os.kill(workers[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(
        InputError, match=r"^samples \d+ to \d+: its worker was killed by signal 9; give the same command"
    ):
        evaluate(run, str(run.parent / "real.tar"), "fd", n=40, batch_size=16, device="cpu", processes=2,
                 out=tmp_path / "r.json")  # fmt: skip
    killer.join()
    assert not (tmp_path / "r.json").exists()


def test_reference_features_are_remembered(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"metrics": "fd", "n": 6, "steps": 1, "device": "cpu", "out": tmp_path / "r.json"}
    first = evaluate(run, str(run.parent / "real.tar"), **args)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "batches", None)  # a second reading would fail
        second = evaluate(run, str(run.parent / "real.tar"), **args)
    assert first["metrics"] == second["metrics"] and second["reference_images"] == 64
    for file in (cache_home() / "features").glob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert evaluate(run, str(run.parent / "real.tar"), **args)["metrics"] == first["metrics"]


def test_samples_on_disk_are_judged_by_the_run_that_holds_them(run: Path) -> None:
    folder = run / "samples" / "made"
    folder.mkdir(parents=True)
    pipe = SelfGuidedPipeline.from_pretrained(run / "pipeline")
    latents = LatentSet(run.parent / "set")
    images, k = pipe.decode(latents.latents(torch.arange(8), None)), latents.signals.k[:8]
    for i in range(8):
        Image.fromarray(images[i].permute(1, 2, 0).numpy()).save(folder / f"{i}.png")
    wrong = [int(k[i]) if i < 6 else (int(k[i]) + 1) % 4 for i in range(8)]
    (folder / "samples.jsonl").write_text("\n".join(json.dumps({"file": f"{i}.png", "k": wrong[i]}) for i in range(8)))
    result = evaluate(folder, str(run.parent / "real.tar"), "consistency,prdc", device="cpu")
    assert result["metrics"]["tiny-g"]["consistency"] == 0.75
    (folder / "samples.jsonl").write_text('{"file": "0.png", "k": 1}\n' * 2)
    with pytest.raises(InputError, match=r"'0\.png' is listed twice"):
        evaluate(folder, str(run.parent / "real.tar"), "consistency,prdc", device="cpu")
    assert (folder / "evaluation.json").is_file() and "8 samples, not the 10,000 asked for" in result["notes"]


def test_wrong_input_is_one_line_and_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, plain = str(run.parent / "real.tar"), folder_of(tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    unfinished = folder_of(tmp_path / "unfinished" / "samples").parent
    (unfinished / "checkpoints").mkdir()
    one = folder_of(tmp_path / "one", 1)
    cases = [
        ((run, real, "fdd"), {}, "did you mean 'fd'"),
        ((run, real), {"n": 0}, "n=0"),
        ((run, real, "fd"), {"n": 1}, "1 images are too few for fd"),
        ((run, real), {"n": 5}, "5 images are too few for prdc"),
        ((run, real), {"w": float("nan")}, "w=nan: from -1,000"),
        ((run, real), {"scheduler": "ddimm"}, "did you mean 'ddim'"),
        ((run, real), {"size": 32}, "size=32"),
        ((run, real, "is"), {"n": 10}, "reads a classifier"),
        ((run, str(tmp_path / "empty")), {}, "no images in this folder"),
        ((run, str(one), "fd"), {}, "1 images are too few"),
        ((run, str(tmp_path / "nothing")), {}, "shards found"),
        ((tmp_path / "norun", real), {}, "shards found"),
        ((unfinished, real, "fd"), {"features": "tiny"}, "no complete pipeline"),
        ((plain, str(run), "fd"), {"features": "tiny"}, "not images"),
        ((plain, real, "fd"), {}, "belongs to no run"),
        ((plain, real, "fd,consistency"), {"features": "tiny"}, "asked for"),
        ((run, real, "consistency"), {"features": "tiny"}, "leave features out"),
        ((run, real, "fd"), {"features": "own,resnet9000"}, "resnet9000"),
        ((run, real, "fd"), {"features": "inception,inception:x.pth"}, "two judges are called inception"),
        ((run, real, "fd"), {"features": f"own,{run.parent / 'g'}"}, "g is the run's own g: name each"),
        ((run, real, "fd"), {"features": "own,,inception"}, "a name is missing"),
        ((run, real, "fd"), {"features": ""}, "a name is missing"),
        ((run, real, "fd"), {"resize": "cleen"}, "did you mean 'clean'"),
        ((run, real, "fd"), {"resize": "clean"}, "for the judge inception"),
        ((plain, real, "fd"), {"features": "resnet9000"}, "resnet9000"),
        ((plain, real, "fd"), {"run": tmp_path / "norun"}, "norun"),
        ((plain, real, "fd"), {"features": "tiny", "steps": 3}, "for drawing from a run"),
        ((plain, real, "fd"), {"features": "tiny", "size": -3}, "size=-3: from 1 to 8,192"),
        ((plain, real, "fd"), {"features": "tiny", "size": 0}, "size=0: from 1"),
        ((run, real, "fd"), {"run": run}, "is a run itself"),
        ((plain, real, "fd"), {"features": "no.safetensors"}, "no such file"),
        ((run, real), {"out": plain}, "cannot be written"),
        ((run, real), {"out": plain / "000.png" / "x.json"}, "cannot be written"),
        ((run, real), {"device": "gpu"}, "device='gpu'"),
        ((run, real), {"device": "cpu:x"}, "device='cpu:x'"),
        ((run, real), {"interval": [0.1]}, "write it as 0.2,0.8"),
        ((run, real), {"spacing": "trailling"}, "did you mean 'trailing'"),
        ((run, ""), {}, "reference='': empty"),
        ((run, real), {"statistics": "x.txt"}, "give a file NAME.npz"),
        ((run, real, "fd"), {"statistics": str(tmp_path / "x.npz"), "out": tmp_path / "x.npz"}, "name another file"),
        ((run, real), {"executor": "dask"}, "executor=dask: local or ray"),
        ((run, real), {"processes": -1}, "processes=-1: 0"),
        ((run, real), {"address": "ray://10.0.0.1:10001"}, "belongs to executor=ray"),
    ]
    before = sorted(run.rglob("*"))
    for args, extra, wrong in cases:
        with pytest.raises(InputError, match=wrong) as caught:
            evaluate(*args, **{"device": "cpu", "n": 8, **extra})
        assert "\n" not in str(caught.value), caught.value
    assert sorted(p for p in run.rglob("*") if p.is_file()) == [p for p in before if p.is_file()]


def test_a_run_of_ground_truth_labels_says_what_to_do(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def oracle(*_):
        raise InputError("annotator.kind=oracle reads ground truth from shards")

    monkeypatch.setattr("ldm_sg.evaluate.judges.load_annotator", oracle)
    with pytest.raises(InputError, match=r"oracle.*--features"):
        evaluate(run, str(run.parent / "real.tar"), "fd", n=4, device="cpu")


def test_other_networks_judge_beside_the_runs_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances with g from a YAML at another size; consistency still with the run's own g."""
    (tmp_path / "g.yaml").write_text(f"model: {run.parent / 'g'}\nsize: 48\n")
    args = {"metrics": "fd,consistency", "n": 10, "steps": 2, "device": "cpu"}
    own = evaluate(run, str(run.parent / "real.tar"), out=tmp_path / "own.json", **args)
    other = evaluate(run, str(run.parent / "real.tar"), features=str(tmp_path / "g.yaml"), **args)
    assert other["judges"]["g"]["size"] == 48 and other["judges"]["tiny-g"]["size"] == 32
    assert other["judges"]["g"]["guide"]  # the same weights
    assert other["metrics"]["g"]["fd"] != own["metrics"]["tiny-g"]["fd"]
    assert other["metrics"]["tiny-g"]["consistency"] == own["metrics"]["tiny-g"]["consistency"]
    assert (run / "evaluations" / "w2_dpmpp_2m2_seed0_n10_g.json").is_file()


def test_several_judges_see_the_same_samples_and_each_figure_says_its_space(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "fine.yaml").write_text(f"model: {run.parent / 'g'}\nsize: 48\n")
    calls, draw = [], SelfGuidedPipeline.generate
    monkeypatch.setattr(
        SelfGuidedPipeline, "generate", lambda self, *a, **k: calls.append(k["first_index"]) or draw(self, *a, **k)
    )
    args = {"metrics": "fd,prdc,consistency", "n": 20, "steps": 2, "device": "cpu"}
    result = evaluate(run, str(run.parent / "real.tar"), features=f"own,{tmp_path / 'fine.yaml'}", **args)
    assert calls == [0, 16]
    found, shown = result["metrics"], capsys.readouterr().out
    assert found.keys() == result["judges"].keys() == {"tiny-g", "fine"}
    assert "consistency" in found["tiny-g"] and "consistency" not in found["fine"]
    for space, values in found.items():
        assert all(re.search(rf"^{name} .* in {space}$", shown, re.M) for name in values)
        alone = {"tiny-g": "own", "fine": str(tmp_path / "fine.yaml")}[space]
        again = evaluate(run, str(run.parent / "real.tar"), features=alone, **args)["metrics"][space]
        assert again == pytest.approx({name: values[name] for name in again})
    assert (run / "evaluations" / "w2_dpmpp_2m2_seed0_n20_own_fine.json").is_file()
    assert any("20 of the 64 reference images, chosen at random" in note for note in result["notes"])


def test_a_network_that_is_the_runs_own_g_is_one_judge(run: Path, tmp_path: Path) -> None:
    """Named by its folder, it still is the guide: one space, one pass, and a warning."""
    result = evaluate(run, str(run.parent / "real.tar"), "fd,consistency", features=str(run.parent / "g"), n=4, steps=1,
                      device="cpu", out=tmp_path / "r.json")  # fmt: skip
    assert result["metrics"].keys() == {"g"} and result["judges"]["g"]["guide"]
    assert {"fd", "consistency"} <= result["metrics"]["g"].keys()


def trained_with(drop: float, run: Path, folder: Path) -> Path:
    """A copy of `run` that says so."""
    copy = Path(shutil.copytree(run / "pipeline", folder / "pipeline"))
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"drop": drop}))
    return folder


def test_a_run_without_guidance_is_drawn_with_w_0(run: Path, tmp_path: Path) -> None:
    """guidance.drop=1 never trained the label table: whatever w is asked for, only w = 0 means anything."""
    args = {"n": 6, "steps": 1, "seed": 3, "device": "cpu", "out": tmp_path / "r.json"}
    free = evaluate(run, str(run.parent / "real.tar"), "fd", w=0, **args)
    reference, plain = str(run.parent / "real.tar"), trained_with(1.0, run, tmp_path / "run")
    for w in (None, 2.0):
        result = evaluate(plain, str(run.parent / "real.tar"), w=w, **args)
        assert result["sampling"]["w"] == 0 and result["asked"]["metrics"] == ["fd", "prdc"]
        assert result["metrics"]["tiny-g"]["fd"] == free["metrics"]["tiny-g"]["fd"]
        assert "w is 0" in result["notes"][0]
    for metric in ("consistency", "layout"):
        with pytest.raises(InputError, match="without guidance"):
            evaluate(plain, reference, metric, **args)


def test_a_run_without_a_null_is_drawn_with_w_1(run: Path, tmp_path: Path) -> None:
    args = {"metrics": "fd", "n": 4, "steps": 1, "device": "cpu", "out": tmp_path / "r.json"}
    reference, never = str(run.parent / "real.tar"), trained_with(0.0, run, tmp_path / "run")
    assert evaluate(never, reference, **args)["sampling"]["w"] == 1
    with pytest.raises(InputError, match=r"w=2: .*drop=0"):
        evaluate(never, reference, w=2.0, **args)


def test_strategies_are_used_and_recorded(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = {"metrics": "fd", "n": 6, "steps": 4, "w": 3.0, "device": "cpu", "out": tmp_path / "r.json"}
    used, draw = [], SelfGuidedPipeline.generate
    monkeypatch.setattr(
        SelfGuidedPipeline, "generate", lambda self, *a, **k: used.append(k["strategy"]) or draw(self, *a, **k)
    )
    assert evaluate(run, str(run.parent / "real.tar"), **args)["sampling"]["strategy"] == "cfg"
    made = evaluate(run, str(run.parent / "real.tar"), strategy="apg", interval=[0.1, 0.9], **args)["sampling"]
    assert made["strategy"] == "apg" and made["interval"] == [0.1, 0.9]
    assert [used[0].__name__, used[1].__qualname__] == ["cfg", "interval.<locals>.limited"]
    del args["out"]  # none is in the name of the file, and none replaces another's figures
    for _ in range(2):
        for strategy in ("cfg", "apg"):
            evaluate(run, str(run.parent / "real.tar"), strategy=strategy, seed=8, **args)
    kept = sorted((run / "evaluations").glob("*_seed8_*"))
    assert [json.loads(file.read_text())["sampling"]["strategy"] for file in kept] == ["cfg", "apg"], kept


def test_no_more_real_images_than_samples_pass_through_the_autoencoder(run: Path, tmp_path: Path) -> None:
    args = {"metrics": "consistency", "steps": 1, "device": "cpu", "out": tmp_path / "r.json"}
    for n in (6, 100):
        assert evaluate(run, str(run.parent / "real.tar"), n=n, **args)["reference_images"] == min(n, 64)


def test_the_runs_report_shows_the_figures(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run / "pipeline", folder / "pipeline")
    (folder / "config.yaml").write_text("steps: 3\n")
    evaluate(folder, str(run.parent / "real.tar"), "fd", n=4, steps=1, device="cpu")
    page = (folder / "report.html").read_text()
    assert "w = 2, 1 dpmpp_2m" in page and "tiny-g (its guide)" in page


def test_samples_are_dropped_once_they_are_seen() -> None:
    """Of 50,000 images features stay in memory, never pixels."""
    alive: list[weakref.ref] = []

    def batches(part, on_skip):
        on_skip("x.png", "bad")
        for i in range(5):
            images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
            alive.append(weakref.ref(images))
            assert sum(ref() is not None for ref in alive) <= 2
            yield torch.tensor([2 * i, 2 * i + 1]), images
            del images

    networks = {("a", ""): lambda x: x.mean((2, 3)), ("b", ""): lambda x: x[:, :1, 0, 0]}
    look = Look(SimpleNamespace(batches=batches), networks, CPU)
    (places, a, b), skipped = look(Task(None, list(networks), slice(None)))
    assert (
        places.tolist() == list(range(10)) and a.shape == (10, 3) and b.shape == (10, 1) and skipped == {"x.png": "bad"}
    )
    assert not any(ref() is not None for ref in alive)


def test_evaluate_as_it_is_typed(run: Path, tmp_path: Path) -> None:
    flags = ("--reference", run.parent / "real.tar", "--metrics", "fd", "-n", "4", "--steps", "1", "--device", "cpu")
    code, shown = invoke("evaluate", run, *flags, "--features", "own", "--out", tmp_path / "r.json")
    assert code == 0 and re.search(r"fd +[\d.]+  in tiny-g\n", shown), shown
    for wrong in (("--features", "own,own"), ("--features", "own,"), ("--resize", "clean"), ("--w", "nan")):
        code, shown = invoke("evaluate", run, *flags, *wrong, "--out", tmp_path / "wrong.json")
        assert code == 2 and shown.count("\n") == 1, shown
    assert not (tmp_path / "wrong.json").exists()


def test_drawing_is_by_samples_own_defaults() -> None:
    usual = SampleOptions()
    for name, value in DRAWING.items():
        assert name == "precision" or (value or None) == (getattr(usual, name) or None), name


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    evaluate(run, str(run.parent / "real.tar"), "fd", n=4, steps=1, device="cpu", out=tmp_path / "r.json")
    assert (tmp_path / "r.json").is_file() and "not remembered" in capsys.readouterr().err


def test_a_full_disk_loses_no_figures(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(self, target):
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(InputError, match="No space left"):
            evaluate(run, str(run.parent / "real.tar"), "fd", n=4, steps=1, device="cpu", out=tmp_path / "o" / "r.json")
    assert capsys.readouterr().out.startswith("fd ") and list((tmp_path / "o").iterdir()) == []


def test_small_references_are_noted_when_enlarged(tmp_path: Path, run: Path) -> None:
    big, small = tmp_path / "big", folder_of(tmp_path / "small")
    big.mkdir()
    for i in range(6):
        (big / f"{i}.png").write_bytes(photo(i, (64, 80)))
    result = evaluate(big, small, "fd", features=str(run.parent / "g"), device="cpu")
    assert result["preprocessing"]["size"] == 64 and any("enlarged to 64 px" in note for note in result["notes"])
    assert json.loads((big / "evaluation.json").read_text())["samples"] == 6


def test_damaged_reference_images_are_noted(run: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "real")
    (folder / "bad.png").write_bytes(b"x")
    result = evaluate(run, folder, "fd", n=4, steps=1, device="cpu", out=tmp_path / "r.json")
    assert result["reference_images"] == 8 and any("bad.png" in note for note in result["notes"])
    again = evaluate(run, folder, "fd", n=4, steps=1, device="cpu", out=tmp_path / "r.json")
    assert again["notes"] == result["notes"]  # by features that were remembered
    assert tarfile.is_tarfile(run.parent / "real.tar")
