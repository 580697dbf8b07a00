"""report.html of a run folder. Every part is optional: what the folder does not hold is left out."""

import csv
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm_sg.errors import InputError
from ldm_sg.folder import read_mapping, write_text
from ldm_sg.report import charts, html
from ldm_sg.report.annotation import BOXES, MASKS, WORDS, figures, recipe, wall

METRICS = {  # key in a JSON -> what a reader sees
    "fd": "Fréchet distance ↓",
    "kid": "Kernel distance ↓",
    "is": "Inception score ↑",
    "sfid": "sFID ↓",
    "cmmd": "CMMD ↓",
    "fd_clusters": "FD of a cluster ↓",
    "memory_copies": "Near-copies (0.01 by chance) ↓",
    "precision": "Precision ↑",
    "recall": "Recall ↑",
    "density": "Density ↑",
    "coverage": "Coverage ↑",
    "consistency": "Cluster consistency ↑",
    "consistency_top3": "… in the 3 nearest ↑",
    "layout_agreement": "Layout agreement ↑",
    "layout_miou": "Layout mIoU ↑",
    "layout_iou": "Box IoU ↑",
}
SHORT = {"fd": "FD ↓", "kid": "KID ↓", "is": "IS ↑", "consistency": "Consist. ↑", "consistency_top3": "Top 3 ↑"}
SHARES = ("consistency", "consistency_top3", "layout_agreement", "layout_miou", "layout_iou")  # shown as percentages
VARIANTS = {"untrained": 0, "real": 3, "chance": 4, "shuffled": 5}  # and their places among 1 (none) and 2 (of a w)
LABELS = {"refit": "new ones (refit)", "reuse": "its base's (reuse)", "extend": "its base's and new ones (extend)"}
MAIN = {  # the picture that says most -> heading, sentence
    "clusters.png": ("Clusters", "Each row is one cluster: real members on the left, samples on the right."),
    "layouts.png": ("Layouts", "Each row is one layout: a real image, its signal, and samples that are to follow it."),
}
PICTURES = {  # file in the run folder -> heading, sentence
    "sweep_w.png": (
        "Guidance strength",
        "One row a strength w, with the same noise and the same clusters in each column.",
    ),
    "nearest.png": (
        "Learnt by heart?",
        "Samples, and below each the training image that g finds most like it, as the first stage gives it back.",
    ),
    "trajectory.png": ("From noise to image", "The clean image that the network predicts as denoising proceeds."),
    "interpolation.png": (
        "Between two clusters",
        "From one cluster's embedding to another's, with fixed and moving noise.",
    ),
}


def write_report(run: Path) -> Path:
    """RUN/report.html, in one file.

    Read when present: config.yaml, metrics.csv, metrics.json, evaluations/*.json, clusters.png, the PICTURES,
    samples/step_*.png, command.txt, timings.json (seconds a stage), the annotation set that config.yaml names
    (manifest.yaml and its wall). Raises InputError if `run` is no folder."""
    if not run.is_dir():
        raise InputError(f"run {str(run)!r}: no such folder")
    config = _read(run / "config.yaml")
    annotation = annotation_folder(run, config)
    manifest = _read(annotation / "manifest.yaml") if annotation else {}
    timings = _numbers(_read(run / "timings.json"))
    curves = read_curves(run / "metrics.csv")
    sections = [
        html.facts(_facts(config, manifest, curves, timings)),
        *_pictures(run, MAIN),
        html.section(
            "Metrics",
            "",
            metrics_table(_read(run / "metrics.json")),
            html.table(*evaluations(run)),
            html.paragraph(_consistency(run)),
        ),
        _training(curves),
        *_pictures(run, PICTURES),
        _progress(run),
        _signals(annotation, manifest),
        wall(annotation, manifest, shlex.quote(str(run))) if annotation else "",
        html.section("Time", "", html.chart(charts.stages(timings))),
        html.section(
            "How it was made",
            "",
            html.code(_text(run / "command.txt")),
            html.folded("config.yaml, resolved", html.yaml_code(config)),
            recipe(manifest),
        ),
    ]
    lead = "Self-guided diffusion: trained without labels, guided by clusters of self-supervised features."
    write_text(run / "report.html", html.page(run.resolve().name, lead, sections, "Made by ldm-sg."))
    return run / "report.html"


def _pictures(run: Path, words: Mapping[str, tuple[str, str]]) -> list[str]:
    return [html.section(*said, html.picture(run / name, alt=said[0])) for name, said in words.items()]


def run_facts(run: Path) -> dict[str, str]:
    """What stands at the top of the report, in words, and which images it learnt from."""
    config = _read(run / "config.yaml")
    annotation = annotation_folder(run, config)
    manifest = _read(annotation / "manifest.yaml") if annotation else {}
    folders = [Path(str(folder)).name for folder in manifest.get("source") or []]
    curves, timings = read_curves(run / "metrics.csv"), _numbers(_read(run / "timings.json"))
    return {"data": ", ".join(folders)} | _facts(config, manifest, curves, timings) | _finetuned(run, config)


def _finetuned(run: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """What finetune.json says, in words; nothing of a run that was not moved from another one."""
    found = _read(run / "finetune.json")
    figures, made = _numbers(found), str(found.get("clusters", ""))
    facts = {"fine-tuned from": Path(str(config.get("init") or "")).name, "its labels": LABELS.get(made, made)}
    if {"fd_held_out_first", "fd_held_out"} <= figures.keys():
        facts["FD to held-out images"] = "{fd_held_out_first:.4g} at first, {fd_held_out:.4g} at best".format(**figures)
    if "nearest_cosine" in figures:
        facts["nearest training image"] = "cosine {nearest_cosine:.3f} to a sample, on average".format(**figures)
    return facts if found else {}


def read_curves(path: Path) -> dict[str, list[tuple[float, float]]]:
    """metrics.csv -> column -> [(step, value)]; empty, unreadable and non-finite cells are left out."""
    curves: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():
        return curves
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            step = _number(row.pop("step", None))
            for name, cell in row.items():
                value = _number(cell)
                if step is not None and value is not None and name is not None:
                    curves.setdefault(name, []).append((step, value))
    return curves


def metrics_table(metrics: Mapping[str, Any]) -> str:
    """metrics.json: keys METRIC or METRIC_VARIANT (untrained, w0, w2, real, chance) -> a table, a row a metric, then what
    else it holds."""
    cells: dict[str, dict[str, float]] = {}
    other: list[tuple[str, str]] = []
    for key, value in _numbers(metrics).items():
        name, variant = split_key(key)
        if name in METRICS:
            cells.setdefault(name, {})[variant] = value
        elif key != "seconds":
            other.append((key.replace("_", " "), f"{value:,.4g}"))
    variants = sorted({v for row in cells.values() for v in row}, key=_variant_order)
    rows = [
        [METRICS[name], *(show(name, cells[name][v]) if v in cells[name] else "–" for v in variants)]
        for name in METRICS
        if name in cells
    ]
    head = ["", *(re.sub(r"^w(?=[\d.])", "w = ", variant) for variant in variants)]
    return html.table(head, rows) + html.table(["", "value"], other)


def split_key(key: str) -> tuple[str, str]:
    """'consistency_top3_w2' -> ('consistency_top3', 'w2'); 'fd' -> ('fd', '')."""
    head, _, tail = key.rpartition("_")
    return (head, tail) if head and (tail in VARIANTS or re.fullmatch(r"w\d+(\.\d+)?", tail)) else (key, "")


def show(name: str, value: float) -> str:
    """A figure as a reader wants it: consistency in percent, precision and the like with three decimals."""
    if name in SHARES:
        return f"{100 * value:.1f}%"
    return f"{value:.3f}" if name in ("precision", "recall", "density", "coverage") else f"{value:,.4g}"


def _variant_order(variant: str) -> tuple[int, float]:
    of_w = variant and variant not in VARIANTS
    return (2, float(variant[1:])) if of_w else (VARIANTS.get(variant, 1), 0.0)


def _judged(run: Path) -> list[tuple[str, dict[str, Any], str, dict[str, Any]]]:
    """(name, content, judge, figures) of each judge of each JSON that `ldm-sg evaluate` left in the run."""
    found = [(path.stem, _read(path)) for path in sorted((run / "evaluations").glob("*.json"))]
    judges = [(stem, result, *judge) for stem, result in found for judge in (result.get("metrics") or {}).items()]
    return [judge for judge in judges if isinstance(judge[-1], dict)]


def evaluations(run: Path) -> tuple[list[str], list[list[str]]]:
    """A head, and a row for each judge."""
    judged = _judged(run)
    names = [name for name in METRICS if any(name in values for *_, values in judged)]
    rows = []
    for stem, result, space, values in judged:
        judge = (result.get("judges") or {}).get(space) or {}
        aside = ["its guide"] * bool(judge.get("guide")) + [f"resize {judge.get('resize')}"] * ("resize" in judge)
        size = f"{result.get('samples', '?')} / {result.get('reference_images', '?')}"
        head = [_settings(result) or stem, f"{space} ({', '.join(aside)})" if aside else space, size]
        figures = _numbers(values)
        rows.append([*head, *(show(name, figures[name]) if name in figures else "–" for name in names)])
    titles = [SHORT.get(name, METRICS[name]) for name in names]
    return ["samples made with", "judged in", "samples / real", *titles], rows


def _consistency(run: Path) -> str:
    """What real images reach, where an evaluation says so."""
    bounds = [numbers for *_, values in _judged(run) if "consistency_real" in (numbers := _numbers(values))]
    text = (
        "Consistency: real images reach {consistency_real:.1%} after the autoencoder, chance {consistency_chance:.1%}."
    )
    return text.format(**bounds[-1]) if bounds and "consistency_chance" in bounds[-1] else ""


def _settings(result: Mapping[str, Any]) -> str:
    """'w = 2, 25 dpmpp_2m', and which pipeline of the run where it is not the one at the end of training."""
    sampling, judged = result.get("sampling") or {}, Path(str(result.get("source", ""))).name
    w = sampling.get("w")
    parts = [] if w is None else [f"w = {w:g}" if isinstance(w, int | float) else f"w = {w}"]
    if {"steps", "scheduler"} <= sampling.keys():
        parts.append(f"{sampling['steps']} {sampling['scheduler']}")
    parts += [f"step {sampling.get('checkpoint')}"] * ("checkpoint" in sampling)
    return ", ".join(parts + [judged] * judged.startswith("pipeline_"))


def _training(curves: Mapping[str, list[tuple[float, float]]]) -> str:
    get = curves.get
    train, guided, null = (get(name, []) for name in ("train_loss", "val_loss_guided", "val_loss_null"))
    loss = html.chart(charts.losses(train, guided, null))
    speed, rate = charts.line(get("images_per_s", []), "images/s"), charts.line(get("lr", []), "learning rate")
    return html.section(
        "Training",
        "Guidance helps where the held-out loss with it lies below the one with the null." if guided and null else "",
        loss,
        html.pair(html.chart(speed), html.chart(rate)),
    )


def _progress(run: Path, most: int = 4) -> str:
    """The sample grids of training: first, last, and evenly between."""
    grids = sorted((run / "samples").glob("step_*.png"), key=lambda path: _step(path))
    shown = [grids[round(i * (len(grids) - 1) / (most - 1))] for i in range(most)] if len(grids) > most else grids
    pictures = [html.picture(path, f"step {_step(path):,}") for path in shown]
    return html.section(
        "Samples during training", "The same noise and the same clusters each time.", html.pair(*pictures)
    )


def _step(path: Path) -> int:
    digits = re.sub(r"\D", "", path.stem)
    return int(digits) if digits else 0


def _signals(annotation: Path | None, manifest: Mapping[str, Any]) -> str:
    annotator = manifest.get("annotator") or {}
    counts = [c for c in annotator.get("counts") or [] if isinstance(c, int)]
    facts = {"smallest / largest": f"{min(counts):,} / {max(counts):,}"} if counts else {}
    oracle = annotator.get("kind") == "oracle"
    text = "Found without labels; classes, where the shards carry them, only measure the match."
    return html.section(
        "What the signals are",
        "Ground truth, read from the shards: a baseline." if oracle else text,
        html.facts(figures(annotator) | facts),
        html.paragraph(WORDS) if counts else "",
        html.chart(charts.sizes(counts)),
        *(html.picture(annotation / name, alt=name) for name in (BOXES, MASKS) if annotation),
    )


def _facts(
    config: Mapping[str, Any],
    manifest: Mapping[str, Any],
    curves: Mapping[str, list[tuple[float, float]]],
    timings: Mapping[str, float],
) -> dict[str, str]:
    """The cards at the top."""
    guidance, last = manifest.get("guidance") or {}, {name: points[-1] for name, points in curves.items()}
    step, steps = max((x for x, _ in last.values()), default=0), config.get("steps")
    view = manifest.get("view")
    buckets = view.get("buckets") if isinstance(view, Mapping) else None
    facts = {
        "images": f"{manifest['num_images']:,}" if isinstance(manifest.get("num_images"), int) else "",
        "size": ", ".join(map(str, buckets)) if buckets else f"{manifest['size']} px" if manifest.get("size") else "",
        "labels": f"{guidance['num_labels']:,}" if guidance.get("num_labels") else "",
        "guided by": str(guidance.get("spatial") or ""),
        "autoencoder": str((manifest.get("autoencoder") or {}).get("name") or ""),
        "latent": "" if buckets else " × ".join(map(str, manifest.get("latent_shape") or [])),
        "g": str((manifest.get("features") or {}).get("name") or (manifest.get("features") or {}).get("model") or ""),
        "steps": f"{step:,.0f}" + (f" of {steps:,}" if isinstance(steps, int) and step < steps else ""),
        "batch size": str(config.get("batch_size") or ""),
        "training loss": f"{last['train_loss'][1]:.4f}" if "train_loss" in last else "",
        "total time": charts.duration(sum(timings.values())) if timings else "",
    }
    return {name: value for name, value in facts.items() if value and (name != "steps" or step)}


def annotation_folder(run: Path, config: Mapping[str, Any]) -> Path | None:
    """What config.yaml names, from the current folder or from the run's; None when it is not here any more."""
    named = config.get("annotation")
    places = [Path(named), run / named] if isinstance(named, str) else []
    return next((place for place in places if (place / "manifest.yaml").is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    return read_mapping(path) if path.is_file() else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _number(value: Any) -> float | None:
    """A finite number from a cell or a JSON value, None otherwise."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def _numbers(mapping: Mapping[str, Any]) -> dict[str, float]:
    return {str(key): number for key, value in mapping.items() if (number := _number(value)) is not None}
