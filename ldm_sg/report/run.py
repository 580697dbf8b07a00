"""report.html of a run folder. Every part is optional: what the folder does not hold is left out."""

import csv
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ldm_sg.errors import InputError
from ldm_sg.folder import check, read_mapping, write_text
from ldm_sg.report import charts, html
from ldm_sg.report.annotation import BOXES, MASKS, WORDS, cards, evenly, recipe, wall

NUMBER, SCORE, SHARE = "{:,.4g}", "{:.3f}", "{:.1%}"
METRICS = {  # key in an evaluation -> what a reader sees, and how
    "fd": ("FD ↓", NUMBER),
    "kid": ("KID ↓", NUMBER),
    "is": ("IS ↑", NUMBER),
    "sfid": ("sFID ↓", NUMBER),
    "cmmd": ("CMMD ↓", NUMBER),
    "fd_clusters": ("FD of a cluster ↓", NUMBER),
    "memory_copies": ("Near-copies (0.01 by chance) ↓", NUMBER),
    "precision": ("Precision ↑", SCORE),
    "recall": ("Recall ↑", SCORE),
    "density": ("Density ↑", SCORE),
    "coverage": ("Coverage ↑", SCORE),
    "consistency": ("Consist. ↑", SHARE),
    "consistency_top3": ("Top 3 ↑", SHARE),
    "layout_agreement": ("Layout agreement ↑", SHARE),
    "layout_miou": ("Layout mIoU ↑", SHARE),
    "layout_iou": ("Box IoU ↑", SHARE),
}
# what each is called where samples follow nothing
BOUNDS = {"consistency": "chance", "layout_agreement": "shuffled", "layout_iou": "shuffled"}
LABELS = {"refit": "new ones (refit)", "reuse": "its base's (reuse)", "extend": "its base's and new ones (extend)"}
MAIN = {  # the picture that says most -> heading, sentence
    "clusters.png": ("Clusters", "Each row is one cluster: real members on the left, samples on the right."),
    "layouts.png": ("Layouts", "Each row is one layout: a real image, its signal, and samples that are to follow it."),
}
PICTURES = {  # file in the run folder -> heading, sentence
    "sweep_w.png": ("Guidance strength", "One row a strength w, with the same noise and clusters in each column."),
    "nearest.png": ("Learnt by heart?", "Samples, and below each the training image that g finds most like it."),
    "trajectory.png": ("From noise to image", "The clean image that the network predicts as denoising proceeds."),
    "interpolation.png": ("Between two clusters", "From one's embedding to the other's, with fixed and moving noise."),
}
TUNED = {  # key of finetune.json -> what a reader sees
    "fd_held_out": ("FD to held-out images", "{fd_held_out_first:.4g} at first, {fd_held_out:.4g} at best"),
    "nearest_cosine": ("nearest training image", "cosine {nearest_cosine:.3f} to a sample, on average"),
}


class _Run:
    """What lies in a run folder, and in the annotation set that it names; empty, where there is nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, _read(folder / "config.yaml")
        self.annotation = annotation_folder(folder, self.config)
        self.manifest = _read(self.annotation / "manifest.yaml") if self.annotation else {}
        self.curves = read_curves(folder / "metrics.csv")
        self.timings = _numbers(_read(folder / "timings.json"))

    def facts(self) -> dict[str, str]:
        """The cards at the top."""
        ends = {name: points[-1] for name, points in self.curves.items()}
        step, steps = max((step for step, _ in ends.values()), default=0), _numbers(self.config).get("steps", 0)
        facts = {
            "steps": step and f"{step:,.0f}" + f" of {steps:,.0f}" * (step < steps),
            "batch size": str(self.config.get("batch_size") or ""),
            "training loss": f"{ends['train_loss'][1]:.4f}" if "train_loss" in ends else "",
            "total time": charts.duration(sum(self.timings.values())) if self.timings else "",
        }
        return cards(self.manifest) | {name: value for name, value in facts.items() if value}

    def tuned(self) -> dict[str, str]:
        """What finetune.json says, in words; nothing of a run that was not moved from another one."""
        if not (found := _read(self.folder / "finetune.json")):
            return {}
        made, base = str(found.get("clusters", "")), Path(str(self.config.get("init") or ""))
        facts = {"fine-tuned from": base.name, "its labels": LABELS.get(made, made)}
        return facts | {title: form.format(**found) for key, (title, form) in TUNED.items() if key in _numbers(found)}


def write_report(folder: Path) -> Path:
    """FOLDER/report.html of a run, in one file.

    Read when present: config.yaml, metrics.csv, evaluations/*.json, clusters.png, the PICTURES, samples/step_*.png,
    command.txt, timings.json (seconds a stage), the annotation set that config.yaml names (manifest.yaml and its wall).
    Raises InputError if `folder` is none."""
    if not folder.is_dir():
        raise InputError(f"run {str(folder)!r}: no such folder")
    run, command = _Run(folder), folder / "command.txt"
    sections = [
        html.facts(run.facts()),
        *_pictures(folder, MAIN),
        html.section("Metrics", "", html.table(*evaluations(folder)), *map(html.paragraph, _bounds(folder))),
        _training(run.curves),
        *_pictures(folder, PICTURES),
        _progress(folder),
        _signals(run),
        wall(run.annotation, run.manifest, shlex.quote(str(folder))) if run.annotation else "",
        html.section("Time", "", html.chart(charts.stages(run.timings))),
        html.section(
            "How it was made",
            "",
            html.code(command.read_text(encoding="utf-8", errors="replace") if command.is_file() else ""),
            html.folded("config.yaml, resolved", html.yaml_code(run.config)),
            recipe(run.manifest),
        ),
    ]
    lead = "Self-guided diffusion: trained without labels, guided by clusters of self-supervised features."
    write_text(folder / "report.html", html.page(folder.resolve().name, lead, sections, "Made by ldm-sg."))
    return folder / "report.html"


def _pictures(run: Path, words: Mapping[str, tuple[str, str]]) -> list[str]:
    return [html.section(*said, html.picture(run / name, alt=said[0])) for name, said in words.items()]


def run_facts(folder: Path) -> dict[str, str]:
    """What stands at the top of the report, in words, and which images the run learnt from."""
    run = _Run(folder)
    sources = [Path(str(source)).name for source in run.manifest.get("source") or []]
    return {"data": ", ".join(sources)} | run.facts() | run.tuned()


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """metrics.csv -> column -> [(step, value)]; empty, unreadable and non-finite cells are left out."""
    curves: dict[str, list[tuple[float, float]]] = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            for row in map(_numbers, csv.DictReader(file)):
                step = row.pop("step", None)
                for name, value in row.items() if step is not None else ():
                    curves.setdefault(name, []).append((step, value))
    return curves


def show(name: str, value: float) -> str:
    """A figure as a reader wants it."""
    return METRICS[name][1].format(value)


def _judged(run: Path) -> list[tuple[dict[str, Any], str, dict[str, float]]]:
    """(content, judge, figures) of each judge of each JSON that `ldm-sg evaluate` left in the run."""
    judged = []
    for path in sorted((run / "evaluations").glob("*.json")):
        found = {"metrics": {}, "judges": {}, "sampling": {}, "source": "", "file": path.stem} | _read(path)
        check(found, {"metrics": dict, "judges": dict, "sampling": dict, "source": str}, str(path))
        judged += [(found, *judge) for judge in found["metrics"].items()]
    return [(found, space, _numbers(values)) for found, space, values in judged if isinstance(values, dict)]


def evaluations(run: Path) -> tuple[list[str], list[list[str]]]:
    """A head, and a row for each judge."""
    judged = _judged(run)
    names = [name for name in METRICS if any(name in values for *_, values in judged)]
    rows = []
    for found, space, values in judged:
        judge = found["judges"].get(space)
        judge = judge if isinstance(judge, dict) else {}
        aside = ["its guide"] * bool(judge.get("guide")) + [f"resize {judge.get('resize')}"] * ("resize" in judge)
        size = f"{found.get('samples', '?')} / {found.get('reference_images', '?')}"
        head = [_settings(found), f"{space} ({', '.join(aside)})" if aside else space, size]
        rows.append([*head, *(show(name, values[name]) if name in values else "–" for name in names)])
    return ["samples made with", "judged in", "samples / real", *(METRICS[name][0] for name in names)], rows


def _bounds(run: Path) -> list[str]:
    """What real images reach, and what no guidance does, where an evaluation says so."""
    lines = {}
    for *_, values in _judged(run):
        for name, floor in BOUNDS.items():
            real, least = (values.get(f"{name}_{of}") for of in ("real", floor))
            if real is not None and least is not None:
                title = METRICS[name][0].rstrip(" ↑")
                lines[name] = f"{title}: real images reach {real:.1%} after the autoencoder, {floor} {least:.1%}."
    return list(lines.values())


def _settings(found: Mapping[str, Any]) -> str:
    """'w = 2, 25 dpmpp_2m', and which pipeline of the run where it is not the one at the end of training."""
    made, judged = found["sampling"], Path(found["source"]).name
    forms = {"w": "w = {w}", "scheduler": "{steps} {scheduler}", "checkpoint": "step {checkpoint}"}
    parts = [
        form.format_map(defaultdict(str, made, w=f"{made.get('w')}".removesuffix(".0")))
        for key, form in forms.items()
        if key in made
    ]
    return ", ".join(parts + [judged] * judged.startswith("pipeline_")) or found["file"]


def _training(curves: Mapping[str, list[tuple[float, float]]]) -> str:
    train, guided, null, speed, rate = (
        curves.get(name, []) for name in ("train_loss", "val_loss_guided", "val_loss_null", "images_per_s", "lr")
    )
    return html.section(
        "Training",
        "Guidance helps where the held-out loss with it lies below the one with the null." if guided and null else "",
        html.chart(charts.losses(train, guided, null)),
        html.pair(html.chart(charts.line(speed, "images/s")), html.chart(charts.line(rate, "learning rate"))),
    )


def _progress(run: Path, most: int = 4) -> str:
    """The sample grids of training: first, last, and evenly between."""
    grids = {int(re.sub(r"\D", "", path.stem) or 0): path for path in (run / "samples").glob("step_*.png")}
    shown = [html.picture(grids[step], f"step {step:,}") for step in evenly(np.array(sorted(grids), int), most)]
    return html.section("Samples during training", "The same noise and the same clusters each time.", html.pair(*shown))


def _signals(run: _Run) -> str:
    annotator = run.manifest.get("annotator") or {}
    counts = annotator.get("counts") or []
    oracle = annotator.get("kind") == "oracle"
    text = "Found without labels; classes, where the shards carry them, only measure the match."
    return html.section(
        "What the signals are",
        "Ground truth, read from the shards: a baseline." if oracle else text,
        html.paragraph(WORDS) if counts else "",
        html.chart(charts.sizes(counts)),
        *(html.picture(run.annotation / name, alt=name) for name in (BOXES, MASKS) if run.annotation),
    )


def annotation_folder(run: Path, config: Mapping[str, Any]) -> Path | None:
    """What config.yaml names, from the current folder or from the run's; None when it is not here any more."""
    named = config.get("annotation")
    places = [Path(named), run / named] if isinstance(named, str) else []
    return next((place for place in places if (place / "manifest.yaml").is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    return read_mapping(path) if path.is_file() else {}


def _numbers(mapping: Mapping[str, Any]) -> dict[str, float]:
    """Those of its values, of a JSON or a row of a CSV, that are finite numbers."""
    found = {}
    for key, value in mapping.items():
        with suppress(TypeError, ValueError):
            if not isinstance(value, bool) and math.isfinite(float(value)):
                found[str(key)] = float(value)
    return found
