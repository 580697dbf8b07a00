"""Suites: killed and resumed, with a cell that fails, their figures those that evaluate wrote; and what is no suite."""

import csv
import json
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import COLOURS, TINY
from PIL import Image
from typer.testing import CliRunner

from ldm_sg.cli import app
from ldm_sg.config import model_config
from ldm_sg.configfile import ASSETS, ROOT
from ldm_sg.data.latents import LatentSet
from ldm_sg.errors import InputError
from ldm_sg.reproduce import run as running
from ldm_sg.reproduce.report import Row, plots, table
from ldm_sg.reproduce.suite import SIZES, plan, read_suite

SUITES = sorted((ROOT / "configs" / "reproduce").glob("*.yaml"))


def photos(folder: Path, n: int = 32) -> Path:
    """Photos of four colours, in no class folders."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(n):
        noise = 0.1 * torch.randn(16, 16, 3, generator=generator)
        pixels = ((COLOURS[i % 4] + noise).clamp(-1, 1) + 1) * 127.5
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{i:03d}.png")
    return folder


def suite(path: Path, **changes: object) -> Path:
    """Two cells, of which `labels` has none to read, on two seeds."""
    content = {
        "title": "Small",
        "data": {"photos": str(path.parent / "photos")},
        "judges": {"small-g": {"model": "demo-g", "size": 32}},
        "seeds": [0, 1],
        "pack": {"src": "${data.photos}", "size": 16, "format": "png", "workers": 0},
        "annotate": {
            "config": "configs/annotate/cifar100.yaml", "autoencoder": "patch2", "workers": 0,
            "features": {"model": "demo-g", "size": 32}, "annotator": {"kind": "clusters", "k": 4},
        },
        "train": {
            "config": "configs/train/cifar100.yaml", "model": TINY, "steps": 12, "batch_size": 8, "warmup": 2, "ema": 0.9,
            "workers": 0, "sample_every": 0, "val_every": 0, "checkpoint_every": 2, "log_every": 2, "precision": "fp32",
        },
        "evaluate": {"metrics": "fd", "n": 12, "steps": 2, "w": [0, 2]},
        "sample": {"n": 4, "steps": 2},
        "columns": {"k": "annotate.annotator.k"},
        "plot": "w",
        "cells": {"clusters": {"paper": "FD 1.5"}, "labels": {"annotate": {"annotator": {"kind": "oracle", "k": 300}}}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content | changes, sort_keys=False))
    return path


def results(out: Path) -> list[dict[str, str]]:
    (own,) = (out / "suites").iterdir()
    return list(csv.DictReader((own / "results.csv").open()))


def kill(command: list[str], when: Path) -> None:
    begun = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not when.exists() and begun.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    begun.kill()
    begun.wait()


@pytest.mark.parametrize("how", ["ctrl-c", pytest.param("kill", marks=pytest.mark.slow)])
def test_a_suite_with_a_cell_that_fails_is_stopped_and_goes_on(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path / "photos")
    file, out = suite(tmp_path / "small.yaml"), tmp_path / "out"
    command = [sys.executable, "-c", "from ldm_sg.cli import main; main()", "reproduce", str(file), "--out", str(out), "--device", "cpu"]  # fmt: skip
    last, own = plan(read_suite(str(file)), out)[0].run / "checkpoints" / "last.ckpt", out / "suites" / "small"
    if how == "kill":
        kill(command, last)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(running, "evaluate", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
            assert CliRunner().invoke(app, command[3:]).exit_code == 130
    assert last.exists() and not (own / "done").exists()

    result = CliRunner().invoke(app, [*command[3:]])
    assert result.exit_code == 2, result.output
    assert "2 of 4 runs failed" in result.output and "has no .cls" in result.output
    assert last.parents[1].name in (own / "logs" / "clusters-0.txt").read_text()
    rows = results(out)
    good, bad = [row for row in rows if row["file"]], [row for row in rows if row["error"]]
    assert [(row["cell"], row["seed"]) for row in bad] == [("labels", "0"), ("labels", "1")]
    assert [(row["seed"], row["w"]) for row in good] == [("0", "0"), ("0", "2"), ("1", "0"), ("1", "2")]
    written = [json.loads(Path(row["file"]).read_text()) for row in good]
    assert [row["fd"] for row in good] == [str(each["metrics"]["small-g"]["fd"]) for each in written]
    assert len({row["fd"] for row in good}) == 4 and good[0]["k"] == "4" and good[0]["images"] == "96"
    at_two = [each["metrics"]["small-g"]["fd"] for each in written if each["sampling"]["w"] == 2]
    mean, deviation = statistics.fmean(at_two), statistics.stdev(at_two)
    text = (own / "table.md").read_text()
    assert f"| clusters | 4 | 2 | 2 | {mean:,.4g} ± {deviation:,.4g} * | FD 1.5 |" in text, text
    assert "labels seed 1 failed: " in text and "| labels |  |  | 2 failed | – |  |" in text
    page = (own / "report.html").read_text()
    assert "<svg" in page and "data:image/" in page and (own / "plots" / "fd-small-g-w.svg").is_file()

    assert (own / "runs" / "clusters-0").resolve() == last.parents[1] and (own / "annotations" / "clusters-1").is_dir()
    written_by = Path(good[0]["file"])
    text = written_by.read_text()
    written_by.write_text(text.replace('"guide"', '"gide"'))
    again = CliRunner().invoke(app, [*command[3:], "cells.labels=null"])
    assert (
        again.exit_code == 2 and "no guide in it" in again.output and "remove it, and it is made again" in again.output
    )
    written_by.write_text(text)
    before = {path: path.stat().st_mtime_ns for path in last.parents[1].rglob("*") if path.is_file()}
    assert CliRunner().invoke(app, command[3:]).exit_code == 2  # only what failed is tried again
    assert {path: path.stat().st_mtime_ns for path in before} == before and results(out) == rows
    taken = (own / "annotations" / "clusters-0").resolve()
    taken.rename(moved := tmp_path / "moved")
    done = CliRunner().invoke(app, [*command[3:], "cells.labels=null"])
    assert done.exit_code == 2 and f"{taken} is not an annotation set" in done.output
    moved.rename(taken)
    more = CliRunner().invoke(app, [*command[3:], "cells.labels=null", "evaluate.w=[0,2,3]", "seeds=[0]"])
    assert more.exit_code == 0, more.output
    assert [row["w"] for row in results(out)] == ["0", "2", "3"]
    assert {path: path.stat().st_mtime_ns for path in before if "evaluations" in str(path)}.items() <= before.items()


@pytest.mark.slow
def test_cells_side_by_side_share_what_they_have_in_common(tmp_path: Path) -> None:
    photos(tmp_path / "photos")
    cells = {"plain": {}, "apg": {"evaluate": {"strategy": "apg"}}, "gone": {"pack": {"src": "not-there"}}}
    file = suite(tmp_path / "small.yaml", cells=cells, seeds=[3], evaluate={"metrics": "fd", "n": 12, "steps": 2})
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"1 of 3 runs failed.*gone seed 3: .*not-there"):
        running.reproduce(str(file), out=out, jobs=2, device="cpu")
    named = list((out / "suites" / "small" / "runs").iterdir())
    assert sorted(path.name for path in named) == ["apg-3", "plain-3"]
    assert {path.resolve() for path in named} == {*(out / "runs").iterdir()}  # one run
    assert len(list((out / "suites" / "small" / "done").iterdir())) == 2
    found = {row["cell"]: row["fd"] for row in results(out)}
    assert found["plain"] and found["apg"] and found["plain"] != found["apg"]


def test_sets_that_differ_in_k_share_the_pass_of_g_and_suites_of_a_folder_their_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path / "photos")
    begun, annotating = [], running.annotate
    monkeypatch.setattr(running, "annotate", lambda cfg, **part: begun.append(cfg) or annotating(cfg, **part))
    for name in ("train", "evaluate", "sample"):
        monkeypatch.setattr(running, name, lambda *_, **__: None)
    monkeypatch.setattr(running, "_is_done", lambda *_: False)
    cells = {name: {"annotate": {"annotator": {"kind": "clusters", "k": k}}} for name, k in (("two", 2), ("four", 4))}
    out = tmp_path / "out"
    running.reproduce(str(suite(tmp_path / "one.yaml", cells=cells, seeds=[0])), out=out, device="cpu")
    sets = [(out / "suites" / "one" / "annotations" / f"{name}-0").resolve() for name in cells]
    [passed] = (out / "passes").iterdir()
    assert [Path(cfg.out) for cfg in begun] == [passed, sets[0], passed, sets[1]]
    assert len({next((made / "features").iterdir()).stat().st_ino for made in sets}) == 1
    annotating(replace(begun[-1], out=str(tmp_path / "alone")))
    hashes = [LatentSet(made).hash for made in (*sets, tmp_path / "alone")]
    assert hashes[0] != hashes[1] == hashes[2]

    made = {path: path.stat().st_mtime_ns for path in (out / "annotations").rglob("*.tar")}
    judges = {"small-g": {"model": "demo-g", "size": 64}}  # other settings under the same name: other figures
    other = suite(tmp_path / "other.yaml", cells=cells, seeds=[0, 1], judges=judges)
    running.reproduce(str(other), out=out, device="cpu")
    assert len(list((out / "judges").glob("*/small-g.yaml"))) == 2
    assert {path: path.stat().st_mtime_ns for path in (out / "annotations").rglob("*.tar")} == made
    cells = {"eight": {"annotate": {"annotator": {"kind": "clusters", "k": 8}}}, "four": cells["four"]}  # another first
    running.reproduce(str(suite(tmp_path / "third.yaml", cells=cells, seeds=[0])), out=out, device="cpu")
    assert [len(list((out / kind).iterdir())) for kind in ("shards", "passes", "annotations")] == [1, 1, 3]
    assert {path: path.stat().st_mtime_ns for path in made} == made


def test_the_dry_run_prints_commands_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = suite(tmp_path / "small.yaml")
    running.reproduce(str(file), ["evaluate.w=0"], out=tmp_path / "out", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# clusters seed 0" and len(lines) == 4 * 5 + 2 and not (tmp_path / "out").exists()
    assert lines[1].startswith("ldm-sg pack") and "--size 16 --format png" in lines[1]
    assert "--w 0 " in lines[4] and lines[4].startswith(
        f"ldm-sg evaluate {plan(read_suite(str(file)), tmp_path / 'out')[0].run} --reference"
    )


COMMANDS = [
    line.removeprefix("ldm-sg ")
    for line in (ROOT / "docs" / "reproduction.md").read_text().replace("\\\n", "").splitlines()
    if line.startswith("ldm-sg ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_docs_make_cells(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*shlex.split(command), "seeds=[0]", "--dry-run"])
    assert result.exit_code == 0 and result.output.count("# ") >= (1 if "cells.cfg=null" in command else 3), (
        result.output
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cels": {}}, "unknown key 'cels'; did you mean 'cells'?"),
        ({"cells": {}}, "cells: there is none"),
        ({"cells": {"a": {"trian": {"steps": 1}}}}, "cells.a.trian: no such verb; did you mean 'train'?"),
        (
            {"cells": {"a": {"train": {"stepz": 1}}}},
            "small: cells.a: stepz=1: unknown key 'stepz'; did you mean 'steps'?",
        ),
        ({"cells": {"a": {"evaluate": {"ww": 1}}}}, "cells.a: evaluate.ww: unknown"),
        (
            {"cells": {"a": {"evaluate": {"w": "much"}}}},
            "cells.a: evaluate.w: float or null or int is expected, not 'much'",
        ),
        ({"cells": {"a": 3}}, "cells.a=3: a mapping"),
        ({"cells": {"../a": {}}}, "cells.../a: a name of letters"),
        ({"cells": {"a": {"paper": [1]}}}, "cells.a.paper: str is expected"),
        ({"cells": {"a": {"evaluate": {"metrics": "fdd"}}}}, "did you mean 'fd'"),
        ({"cells": {"a": {"evaluate": {"scheduler": "ddimm"}}}}, "did you mean 'ddim'"),
        ({"cells": {"a": {"evaluate": {"w": []}}}}, "evaluate.w=[]: at least one"),
        ({"cells": {"a": {"evaluate": {"w": [2, 2.0]}}}}, "evaluate.w=[2, 2.0]: at least one, each once"),
        ({"judges": {"g": {"modle": "x"}}}, "did you mean 'model'"),
        ({"judges": {"a,b": "demo-g"}}, "judges.a,b: a name"),
        ({"plot": "v"}, "plot='v'; "),
        ({"columns": {"k": "annotate.anotator.k"}}, "columns.k: annotate.anotator.k; did you mean"),
        ({"seeded": ["seed"]}, "seeded: seed: write it as train.seed"),
        ({"pack": {"src": "${data.nope}"}}, "small.yaml: Interpolation key 'data.nope' not found"),
        ({"seeds": []}, "seeds=[]: at least one"),
        ({"seeds": [-1]}, "seeds=[-1]: at least one, each once, whole numbers from 0"),
        ({"pack": {"src": "x", "size": "small"}}, "cells.clusters: pack.size: int is expected, not 'small'"),
        ({"pack": {"src": "x", "quality": 101}}, "cells.clusters: quality=101: from 1 to 100"),
        ({"cells": {"a": {"sample": {"steps": 2.5}}}}, "cells.a: sample.steps: int is expected, not 2.5"),
        ({"pack": {}}, "cells.clusters: neither pack.src nor annotate.shards"),
    ],
)
def test_what_is_no_suite_gives_one_line(tmp_path: Path, changes: dict, said: str) -> None:
    file = suite(tmp_path / "small.yaml", **changes)
    result = CliRunner().invoke(app, ["reproduce", str(file), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and said in result.output and result.output.count("\n") == 1, result.output
    assert "small" in result.output and not (tmp_path / "out").exists()


def test_names_of_suites_places_and_sizes_are_checked() -> None:
    for name, overrides, size, said in (
        ("tabel_guidance", None, "small", "did you mean 'table_guidance'"),
        ("table_guidance", ["data.photo=x"], "small", "data.photo: .* did you mean 'photos'"),
        ("table_guidance", None, "huge", "size='huge'"),
    ):
        with pytest.raises(InputError, match=said):
            read_suite(name, overrides, size)


@pytest.mark.parametrize("size", [SIZES[0], pytest.param(SIZES[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_every_suite_makes_cells(path: Path, size: str) -> None:
    cells = plan(read_suite(path.stem, ["seeds=[7]"], size), Path("out"))
    assert len(cells) >= 3 and all(cell.evaluations for cell in cells) and len(path.read_text().splitlines()) <= 45
    assert len({(cell.train.steps, cell.train.batch_size, cell.train.lr) for cell in cells}) == 1  # equal budgets
    networks = {repr(replace(model_config(cell.train.model), inject="")) for cell in cells}
    assert len(networks) == 1, networks
    assert {cell.train.seed for cell in cells} == {7}


def test_lines_of_a_plot_are_means_over_seeds_and_cells_off_the_line_are_levels() -> None:
    rows = [
        Row(name, seed, "", line, facts={"k": k}, judge="g", figures={"fd": k + seed}, file="x")
        for name, line, k in (("none", "", 90), ("k2", "clusters", 2), ("k4", "clusters", 4))
        for seed in (0, 1)
    ]
    words = [replace(row, facts={"k": "many"}) for row in rows]
    assert "k2" in plots(words, "k")["fd-g-k"]  # no place on an axis: a level
    drawn = plots(rows, "k")
    assert list(drawn) == ["fd-g-k"] and "none" in drawn["fd-g-k"] and "clusters" in drawn["fd-g-k"]
    head, body = table(rows, ["k"])
    assert head == ["cell", "k", "seeds", "FD ↓ g"] and body[1] == ["k2", "2", "2", "2.5 ± 0.7071"]
    assert plots(rows, None) == {} == plots([], "k")

    kept = [replace(rows[0], swept={"w": 0, "checkpoint": at}, facts={"images": 32 * at}) for at in (200, 400)]
    drawn = plots(kept, "images")["fd-g-images"]  # one line, w named, the step not
    assert "none, w = 0" in drawn and "checkpoint" not in drawn


@pytest.mark.slow
def test_a_suite_on_the_embedded_photos_by_the_command_line(tmp_path: Path) -> None:
    changes = {
        "pack": {"src": str(ASSETS / "fruit64"), "size": 64, "format": "png", "shard_size": 1027},
        "cells": {"none": {"train": {"guidance": {"drop": 1.0}}, "evaluate": {"w": [0]}}, "clusters": {}},
        "evaluate": {"metrics": "fd,kid", "n": 64, "steps": 4, "w": [1, 2]},
    }
    file, out = suite(tmp_path / "fruit.yaml", **changes), tmp_path / "out"
    words = [
        "annotate.autoencoder=demo-f8c16",
        "annotate.annotator.k=16",
        "annotate.features.size=null",
        "train.steps=60",
    ]
    command = [sys.executable, "-c", "from ldm_sg.cli import main; main()", "reproduce", str(file), "--out", str(out), *words]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [row["w"] for row in results(out)] == ["0", "1", "2"] * 2
    assert [row["k"] for row in results(out)] == ["", "16", "16"] * 2  # none reads no clusters
    assert all(float(row["fd"]) > 0 for row in results(out)) and "4/4" in done.stderr
