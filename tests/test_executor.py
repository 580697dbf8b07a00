"""Workers that die, fail or refuse; and one annotation set made by one process, by two, by parts and by Ray, byte for byte."""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_annotate import config, make_shards
from workers import make

from ldm_sg import executor
from ldm_sg.annotate import clusters
from ldm_sg.annotate import run as annotate_run
from ldm_sg.annotate.run import annotate_shards
from ldm_sg.config import AnnotateConfig, AnnotatorConfig
from ldm_sg.data.latents import LatentSet
from ldm_sg.errors import InputError
from ldm_sg.executor import Lost, Part, read_part

CPU = torch.device("cpu")


def settings(kind: str, processes: int) -> SimpleNamespace:
    return SimpleNamespace(executor=kind, processes=processes, address=None)


@pytest.fixture(scope="module", params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "ray":
        ray = pytest.importorskip("ray", reason="pip install 'ldm-sg[distributed]'")
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # where actors find this folder's files
        ray.init(num_cpus=2, _node_ip_address="127.0.0.1", include_dashboard=False, logging_level="error")
        request.addfinalizer(ray.shutdown)
    return request.param


def test_tasks_of_a_worker_that_dies_come_back_and_another_takes_its_place(kind: str, tmp_path: Path) -> None:
    tasks, ticks = ["a", "dies", "b", "bug", "c", "d"], []
    found = dict(executor.run(partial(make, tmp_path), tasks, settings(kind, 2), CPU, lambda: ticks.append(1)))
    assert set(found) == set(tasks) and ticks
    assert isinstance(found["dies"], Lost) and (
        kind == "ray" or found["dies"].why == "its worker was killed by signal 9"
    )
    assert isinstance(found["bug"], Lost) and found["bug"].why == "ZeroDivisionError: of 1 by 0"
    pids = {found[task][1] for task in "abcd"}
    assert os.getpid() not in pids and len(pids) <= 3 and {found[task][2] for task in "abcd"} == {"cpu"}
    again = dict(executor.run(partial(make, tmp_path), ["dies"], settings(kind, 1), CPU))
    assert again["dies"][0] == "dies"


def test_a_worker_that_has_failed_is_given_nothing_more(kind: str, tmp_path: Path) -> None:
    """As a GPU after a failed assertion: all else would fail there too."""
    found = dict(executor.run(partial(make, tmp_path), ["breaks", *"abcdefgh"], settings(kind, 2), CPU))
    assert isinstance(found.pop("breaks"), Lost) and not any(isinstance(each, Lost) for each in found.values())


def test_results_in_order(kind: str, tmp_path: Path) -> None:
    found = executor.in_order(partial(make, tmp_path), list("abcdefgh"), settings(kind, 2), CPU)
    assert [task for task, _, _ in found] == list("abcdefgh")
    with pytest.raises(InputError, match=r"bug: ZeroDivisionError.*give the same command again"):
        list(executor.in_order(partial(make, tmp_path), ["a", "bug"], settings(kind, 2), CPU))
    (tmp_path / "died").touch()
    here = executor.in_order(partial(make, tmp_path), ["a", "dies"], settings("local", 1), CPU)
    assert [pid for _, pid, _ in here] == [os.getpid()] * 2


def test_bad_input_ends_everything(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bad input"):
        list(executor.run(partial(make, tmp_path), ["a", "bad", "b"], settings(kind, 2), CPU))
    (tmp_path / "refuses").touch()
    with pytest.raises(InputError, match="no weights there"):
        list(executor.run(partial(make, tmp_path), ["a"], settings(kind, 1), CPU))


def test_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [task for task in range(7) if task in Part(1, 3)] == [1, 4] and read_part("1/3") == Part(1, 3)
    for text in ("3/3", "1", "a/2", "-1/2", "1/0"):
        with pytest.raises(InputError, match="I/N with I from 0"):
            read_part(text)
    for name in {name for job in executor._JOBS for name in job if name}:
        monkeypatch.delenv(name, raising=False)
    assert read_part(None) is None
    for name, value in {"ID": "14", "COUNT": "3", "MIN": "10", "STEP": "2"}.items():  # sbatch --array=10-14:2
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert read_part(None) == Part(2, 3)
    for name, value in (("ID", "13"), ("ID", "16"), ("ID", "8"), ("ID", "x")):  # --array=10,13,14; numbers of nobody
        with monkeypatch.context() as odd:
            odd.setenv(f"SLURM_ARRAY_TASK_{name}", value)
            with pytest.raises(InputError, match="give --part I/N"):
                read_part(None)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert read_part(None) == Part(1, 2) and read_part("0/5") == Part(0, 5)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """Shards, and the annotation set that one process makes of them."""
    folder = tmp_path_factory.mktemp("executor")
    shards = make_shards(folder / "source", 6, 4)
    return shards, contents(annotate_shards(config(folder, shards, out=str(folder / "alone"))))


def contents(out: Path) -> dict[str, bytes]:
    """All files of an annotation set but the record of its command."""
    assert LatentSet(out).hash and not (out / "work").exists()
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and "index" not in path.parts and path.name != "config.yaml"
    }


def test_two_processes_make_the_same_set_though_one_is_killed(source: tuple, tmp_path: Path) -> None:
    shards, alone = source

    def kill_one() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        time.sleep(0.5)
        os.kill(children[0].pid, signal.SIGKILL)

    threading.Thread(target=kill_one).start()
    out = annotate_shards(config(tmp_path, shards, out=str(tmp_path / "two"), processes=2))
    assert contents(out) == alone and not (out / "failed.jsonl").exists()


@pytest.mark.slow
def test_k_means_in_passes_is_the_same_by_any_number_of_processes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(clusters, "WORTH_WORKERS", 0)
    shards = make_shards(tmp_path / "source", 4, 6)
    streamed = AnnotatorConfig(kind="clusters", k=3, fit="stream", sample=12, niter=2)
    sets = [
        contents(annotate_shards(config(tmp_path, shards, out=str(tmp_path / f"{n}"), annotator=streamed, processes=n)))
        for n in (1, 2)
    ]
    assert sets[0] == sets[1] and b"fit: stream" in sets[0]["manifest.yaml"]


def test_three_parts_make_the_same_set(source: tuple, tmp_path: Path) -> None:
    shards, alone = source
    cfg = config(tmp_path, shards, out=str(tmp_path / "parts"))
    for index in (2, 0):
        annotate_shards(cfg, Part(index, 3))
    with pytest.raises(InputError, match=r"2 of 6 shards are not through, the first is .*000001.tar"):
        annotate_shards(cfg, finish=True)
    annotate_shards(cfg, Part(1, 3))
    assert contents(annotate_shards(cfg, finish=True)) == alone


@pytest.mark.parametrize("kind", [pytest.param("ray", marks=pytest.mark.slow)], indirect=True)
def test_ray_makes_the_same_set(source: tuple, kind: str, tmp_path: Path) -> None:
    shards, alone = source
    out = annotate_shards(config(tmp_path, shards, out=str(tmp_path / "ray"), executor="ray", processes=2))
    assert contents(out) == alone


def test_what_fails_three_times_is_listed_and_the_rest_goes_on(
    source: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards, alone = source
    cfg = config(tmp_path, shards, out=str(tmp_path / "set"), processes=2)
    asked, real = [], executor.run

    def unlucky(make, tasks, settings, device, on_wait=lambda: None):
        asked.append(list(tasks))
        if "Writing" in repr(make):
            return real(make, tasks, settings, device, on_wait)
        well = make("cpu")
        return ((task, Lost("its worker was killed by signal 9") if 3 in task else well(task)) for task in tasks)

    monkeypatch.setattr(executor, "run", unlucky)
    with pytest.raises(
        InputError, match=r"1 of 6 shards failed, the others are done; the first: .*000003.tar: failed 3"
    ):
        annotate_shards(cfg)
    assert asked[1:] == [[[3]], [[3]]]
    lines = [json.loads(line) for line in (tmp_path / "set" / "failed.jsonl").read_text().splitlines()]
    assert [(line["index"], line["reason"]) for line in lines] == [
        (3, "failed 3 times: its worker was killed by signal 9")
    ]
    monkeypatch.setattr(executor, "run", real)
    out = annotate_shards(cfg)
    assert contents(out) == alone and not (out / "failed.jsonl").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"executor": "dask"}, "executor=dask: local or ray"),
        ({"processes": -1}, "processes=-1: 0 "),
        ({"address": "ray://10.0.0.1:10001"}, "belongs to executor=ray"),
    ],
)
def test_wrong_settings(changes: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        AnnotateConfig(shards="a", out="b", autoencoder="patch1", **changes).check()


def test_parts_of_another_config_are_refused_while_one_works(source: tuple, tmp_path: Path, monkeypatch) -> None:
    """Also before the first shard is through, when the folder would bind nobody else."""
    shards, alone = source
    cfg, real = config(tmp_path, shards, out=str(tmp_path / "set")), annotate_run.pass_over

    def meanwhile(*args: object) -> None:
        monkeypatch.setattr(annotate_run, "others_work_in", lambda out: True)  # as seen from another process
        other = config(tmp_path, shards, out=cfg.out, annotator=AnnotatorConfig(k=3, seed=5), size=64)
        with pytest.raises(InputError, match="belongs to another config: size is"):
            annotate_shards(other, Part(1, 2))
        monkeypatch.undo()
        real(*args)

    monkeypatch.setattr(annotate_run, "pass_over", meanwhile)
    annotate_shards(cfg, Part(0, 2))
    annotate_shards(cfg, Part(1, 2))
    assert contents(annotate_shards(cfg, finish=True)) == alone
