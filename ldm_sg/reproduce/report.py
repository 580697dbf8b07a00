"""What evaluate said of a suite's runs -> results.csv, table.md, plots/ and report.html."""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm_sg.folder import write_text
from ldm_sg.report import charts, html
from ldm_sg.report.card import markdown
from ldm_sg.report.run import METRICS, show

GUIDE = "judged by the network that made the cell's signals, which favours it"


@dataclass(frozen=True)
class Row:
    """The figures of one judge, of one evaluation of one cell with one seed, as evaluate wrote them into `file`."""

    cell: str
    seed: int
    paper: str
    line: str
    swept: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    judge: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    guide: bool = False
    file: str = ""
    error: str = ""

    def csv(self) -> dict[str, Any]:
        own = {"cell": self.cell, "seed": self.seed} | self.swept | self.facts
        return (
            own | {"judge": self.judge, "guide": self.guide} | self.figures | {"file": self.file, "error": self.error}
        )


def write_suite_report(out: Path, suite: Mapping[str, Any], rows: Sequence[Row], pictures: Mapping[str, Path]) -> Path:
    """OUT/report.html, with OUT/results.csv, table.md and plots/*.svg beside it."""
    lines = [row.csv() for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(out / "results.csv", text.getvalue())
    head, body = table(rows, list(suite["columns"]))
    notes = [f"{row.cell} seed {row.seed} failed: {row.error}" for row in rows if row.error]
    notes += [f"\\*: {GUIDE}"] * any(row.guide for row in rows)
    title = suite["title"] or suite["name"]
    seeds = f"Mean ± standard deviation over seeds {', '.join(map(str, suite['seeds']))}."
    write_text(out / "table.md", "\n\n".join([f"# {title}", seeds, markdown(head, body).strip(), *notes, ""]))
    drawn = plots(rows, suite["plot"])
    for name, svg in drawn.items():
        write_text(out / "plots" / f"{name}.svg", svg)
    sections = [
        html.section("Table", seeds, html.table(head, body), *map(html.paragraph, notes)),
        html.section("Plots", "Bars and bands: one standard deviation.", *map(html.chart, drawn.values())),
        html.section(
            "Samples", "The same noise in every cell.", *(html.picture(at, name) for name, at in pictures.items())
        ),
        html.section("How it was made", "", html.yaml_code(suite)),
    ]
    write_text(out / "report.html", html.page(title, f"Suite {suite['name']}.", sections, "Made by ldm-sg."))
    return out / "report.html"


def table(rows: Sequence[Row], columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """A head, and a row for each cell and what was swept in it; the paper's figures, where any, come last."""
    swept = list(dict.fromkeys(key for row in rows for key in row.swept))
    judged = dict.fromkeys((row.judge, name) for row in rows for name in METRICS if name in row.figures)
    papers = any(row.paper for row in rows)
    head = ["cell", *columns, *swept, "seeds", *(f"{METRICS[name][0]} {judge}" for judge, name in judged)]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.cell, str(row.swept) if not row.error else "failed"), []).append(row)
    body = []
    for (cell, _), own in groups.items():
        facts, asked = own[0].facts, own[0].swept
        known = [_cell(facts.get(name)) for name in columns] + [_cell(asked.get(name)) for name in swept]
        seeds = len({row.seed for row in own})
        said = [_figure(own, judge, name) for judge, name in judged]
        line = [cell, *known, f"{seeds} failed" if own[0].error else str(seeds), *said]
        body.append(line + [own[0].paper] * papers)
    return head + ["paper"] * papers, body


def plots(rows: Sequence[Row], x: str | None) -> dict[str, str]:
    """Name -> SVG of the first distance of each judge over `x`: a line a cell where x is swept, else the cells' own lines, one for
    each combination of what is swept."""
    found = {}
    for judge in dict.fromkeys(row.judge for row in rows if row.figures and x):
        own = [row for row in rows if row.judge == judge and row.figures]
        metric = next((name for name in METRICS if any(name in row.figures for row in own)), None)
        points: dict[str, dict[float | None, list[float]]] = {}
        for row in (row for row in own if metric in row.figures):
            at = row.swept.get(x, row.facts.get(x))
            number = isinstance(at, int | float)  # words have no place on an axis
            inner = number and (x in row.swept or (x == "images" and "checkpoint" in row.swept))
            shared = (x, "checkpoint") if inner else ()
            others = [f"{key} = {value}" for key, value in row.swept.items() if key not in shared]
            at = at if number and (inner or row.line) else None
            name = ", ".join([row.cell if inner or at is None else row.line, *others])
            places = points.setdefault(name, {})
            places.setdefault(None if at is None else float(at), []).append(row.figures[metric])
        if metric:
            lines = {name: [(at, *spread(of)) for at, of in places.items()] for name, places in points.items()}
            found[f"{metric}-{judge}-{x}"] = charts.compared(lines, str(x), f"{METRICS[metric][0]} in {judge}")
    return found


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (n - 1; 0 of one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _figure(rows: Sequence[Row], judge: str, name: str) -> str:
    own = [row for row in rows if row.judge == judge and name in row.figures]
    if not own:
        return "–"
    mean, deviation = spread([row.figures[name] for row in own])
    return show(name, mean) + f" ± {show(name, deviation)}" * (len(own) > 1) + " *" * any(row.guide for row in own)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
