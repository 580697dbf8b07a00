"""reproduce: a suite of configs/reproduce/ -> its runs, by the ordinary verbs, and one report of what evaluate said of them."""

import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from shutil import ignore_patterns
from types import SimpleNamespace
from typing import Any

from tqdm import tqdm

from ldm_sg import executor
from ldm_sg.commands import ReproduceOptions
from ldm_sg.configfile import to_mapping
from ldm_sg.data.progress import finished_manifest
from ldm_sg.errors import InputError, need_within, one_line
from ldm_sg.executor import Part
from ldm_sg.folder import check, claim, flat, locked, read_mapping, turn, write_text
from ldm_sg.hardware import pick_device
from ldm_sg.reproduce.report import Row, write_suite_report
from ldm_sg.reproduce.suite import SIZES, Cell, SuiteConfig, judge_files, plan, read_suite
from ldm_sg.verbs.annotate import annotate
from ldm_sg.verbs.evaluate import evaluate
from ldm_sg.verbs.pack import pack
from ldm_sg.verbs.sample import sample
from ldm_sg.verbs.train import train


def reproduce(suite: str, overrides: list[str] | None = None, **options: Any) -> Path | None:
    """The report; `options`: the other fields of ReproduceOptions. What is done is not done again; suites of one `out` share what
    they have in common. InputError, when that is written, where a cell failed."""
    asked = ReproduceOptions(suite, overrides, **options)
    need_within("jobs", asked.jobs, 1)
    read = read_suite(suite, overrides, asked.size)
    root = asked.out or Path("runs") / ("reproduce" if asked.size == SIZES[0] else f"reproduce-{asked.size}")
    out, cells = root / "suites" / read.name, plan(read, root)
    if asked.dry_run:
        for cell in cells:
            print("\n".join([f"# {cell}", *cell.commands]))
        return None
    with locked(out):
        wanted = to_mapping(read)
        claim(out, "suite.yaml", wanted, free=[key for key in wanted if key != "name"])
        for path, text in judge_files(read, root).items():
            write_text(path, text)
        failed: dict[str, str] = {}

        def report() -> Path:
            return write_suite_report(out, wanted, list(_rows(read, cells, failed, out)), _pictures(cells))

        for cell, why in _run(cells, out, asked.jobs, asked.device, read.name):
            failed |= {str(cell): why} if why else {}
            report()  # of what there is so far
        page = report()
    print(f"{out / 'table.md'}\n{page}")
    if failed:
        name, why = next(iter(failed.items()))
        raise InputError(
            f"{len(failed)} of {len(cells)} runs failed, the others stand in {page}; the first: {name}: {why}"
        )
    return page


def _run(cells: list[Cell], out: Path, jobs: int, device: str, title: str) -> Iterator[tuple[Cell, str | None]]:
    """Makes what is not done; gives each cell when it is through, and why it failed, if it did."""
    todo = [cell for cell in cells if not _is_done(cell, out)]
    settings = SimpleNamespace(executor="local", processes=jobs, address=None)
    with tqdm(desc=title, total=len(cells), initial=len(cells) - len(todo), unit="run", mininterval=0) as bar:
        for cell, why in _results(todo, settings, pick_device(device), out, bar):
            why = why.why if isinstance(why, executor.Lost) else why
            if why:
                bar.write(f"{cell} failed: {why}", file=sys.stderr)
            else:
                _call(cell, out)
                write_text(_done_file(cell, out), cell.identity)
            bar.update()
            yield cell, why


def _results(todo: list[Cell], settings: Any, on: Any, out: Path, bar: tqdm) -> Iterator[tuple[Cell, Any]]:
    if settings.processes > 1:
        yield from executor.run(partial(_worker, out), todo, settings, on, bar.refresh)
        return
    work = _worker(out, str(on))
    for cell in todo:
        bar.set_postfix_str(str(cell))
        yield cell, work(cell)


def _worker(out: Path, device: str) -> Callable[[Cell], str | None]:
    return partial(_work, out, device)


def _work(out: Path, device: str, cell: Cell) -> str | None:
    """None, or why it failed. What the verbs print goes to OUT/logs/."""
    path = out / "logs" / f"{cell.name}-{cell.seed}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            _make(cell, device)
        except InputError as err:
            return str(err)
        except Exception as err:  # a bug of one cell, or memory it has not: the others go on
            traceback.print_exc()
            return f"{type(err).__name__}: {one_line(err)} ({path})"
    return None


def _make(cell: Cell, device: str) -> None:
    """pack -> annotate -> train -> evaluate -> sample. Cells that share a folder wait for one another."""
    if cell.packed:
        folder, arguments = cell.packed
        with turn(folder):
            pack(**arguments, dst=folder)
    out = Path(cell.annotate.out)
    with turn(out):
        if cell.passed and not (out / "config.yaml").is_file():
            with turn(cell.passed.parent):  # a part takes its own turn in its folder
                annotate(replace(cell.annotate, device=device, out=str(cell.passed)), part=Part(0, 1))
            files = ignore_patterns(".*", "config.yaml")
            shutil.copytree(cell.passed, out, copy_function=_link, ignore=files, dirs_exist_ok=True)
            _link(cell.passed / "config.yaml", out / "config.yaml")
        annotate(replace(cell.annotate, device=device))
    with turn(cell.run):
        train(replace(cell.train, device=device))
        for each in cell.evaluations:
            if not _is_fresh(Path(str(each.options.out)), cell.run):
                evaluate(**asdict(each.options) | {"device": device})
        if cell.sample and not _is_fresh(_picture(cell), cell.run):
            sample(str(cell.run), replace(cell.sample, device=device))


def _call(cell: Cell, out: Path) -> None:
    """OUT/runs/CELL-SEED, OUT/annotations/CELL-SEED: names of the folders that suites share."""
    for made in (cell.run, Path(cell.annotate.out)):
        name = out / made.parent.name / f"{cell.name}-{cell.seed}"
        name.parent.mkdir(parents=True, exist_ok=True)
        name.unlink(missing_ok=True)
        name.symlink_to(os.path.relpath(made, name.parent))


def _link(there: str | Path, here: str | Path) -> None:
    """A file of a pass that `here` shares; all of them are only ever replaced as a whole."""
    if not Path(here).exists():
        os.link(there, here)


def _is_fresh(made: Path, run: Path) -> bool:
    """Whether it is younger than the pipeline it was made by."""
    return made.is_file() and made.stat().st_mtime > (run / "pipeline" / "model_index.json").stat().st_mtime


def _is_done(cell: Cell, out: Path) -> bool:
    there = all(Path(str(each.options.out)).is_file() for each in cell.evaluations)
    file = _done_file(cell, out)
    return there and file.is_file() and file.read_bytes() == cell.identity.encode()


def _done_file(cell: Cell, out: Path) -> Path:
    return out / "done" / f"{cell.name}-{cell.seed}.json"


def _picture(cell: Cell) -> Path:
    assert cell.sample is not None
    return cell.run / "samples" / cell.sample.name() / "grid.png"


def _pictures(cells: list[Cell]) -> dict[str, Path]:
    """A grid each cell, of the same noise."""
    return {cell.name: path for cell in cells if cell.sample and (path := _picture(cell)).is_file()}


def _rows(suite: SuiteConfig, cells: list[Cell], failed: dict[str, str], out: Path) -> Iterator[Row]:
    """What evaluate wrote, a row each judge of each evaluation of the cells that are done; one row for a cell that failed."""
    for cell in cells:
        if str(cell) in failed:
            yield Row(cell.name, cell.seed, cell.paper, cell.line, error=failed[str(cell)])
            continue
        if not _is_done(cell, out):
            continue
        try:
            facts = _facts(suite, cell)
        except InputError as err:  # its set was removed or damaged
            failed[str(cell)] = str(err)
            yield Row(cell.name, cell.seed, cell.paper, cell.line, error=failed[str(cell)])
            continue
        for each in cell.evaluations:
            try:
                found = _read(Path(str(each.options.out)))
            except InputError as err:
                failed[str(cell)] = f"{err}: remove it, and it is made again"
                yield Row(cell.name, cell.seed, cell.paper, cell.line, error=failed[str(cell)])
                continue
            swept = each.swept | ({"w": found["sampling"]["w"]} if "w" in each.swept else {})
            images = int(found["sampling"].get("checkpoint", cell.train.steps)) * cell.train.batch_size
            for judge, figures in found["metrics"].items():
                yield Row(
                    cell.name, cell.seed, cell.paper, cell.line, swept, facts | {"images": images}, judge, figures,
                    guide=found["judges"][judge]["guide"], file=str(each.options.out),
                )  # fmt: skip


def _facts(suite: SuiteConfig, cell: Cell) -> dict[str, Any]:
    """The suite's columns of a cell that is done. InputError where its set, if it reads one, is not there."""
    whole = {"train": to_mapping(cell.train)}
    if cell.train.guidance.drop < 1:  # it reads the signals of its set
        whole["annotate"] = to_mapping(cell.annotate)
        whole["set"] = read_mapping(finished_manifest(Path(cell.annotate.out)))
    return {name: flat(whole).get(key) for name, key in suite.columns.items()}


def _read(path: Path) -> dict[str, Any]:
    """What `ldm-sg evaluate` wrote; InputError where it did not write this."""
    number = (int, float)
    found = read_mapping(path, {"metrics": dict, "judges": dict, "sampling": {"w": number}})
    check(found["sampling"].get("checkpoint", 0), int, f"{path}: sampling: checkpoint")
    for judge, figures in found["metrics"].items():
        check(figures, {}, f"{path}: metrics: {judge}")
        check(figures, dict.fromkeys(figures, number), f"{path}: metrics: {judge}")
        check(found["judges"], {judge: {"guide": bool}}, f"{path}: judges")
    if not found["metrics"]:
        raise InputError(f"{path}: no metrics in it")
    return found
