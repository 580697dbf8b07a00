"""Small line and bar charts as inline SVG, in colours that read on light and dark paper."""

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY, BLUE, AMBER = "#8b949e", "#388bfd", "#d29922"
MOST = 400  # points a line; longer ones are averaged in equal stretches
Points = Sequence[tuple[float, float]]  # (step, value)
Spread = Sequence[tuple[float | None, float, float]]  # (x, mean, standard deviation)
LEGEND = {"frameon": False, "labelcolor": GREY, "fontsize": 10}


def losses(train: Points, guided: Points, null: Points) -> str:
    """Training loss in grey, held-out loss with guidance (blue) and with the null (amber); '' without any points.

    The first 3% of the steps, when the loss falls from 1, do not set the scale."""
    axes, shown = _axes(9, 3.2, "step", "loss"), []
    for name, points, colour in (
        ("training", train, GREY),
        ("held out, guided", guided, BLUE),
        ("held out, null", null, AMBER),
    ):
        if points:
            faint, points = name == "training", thin(points)
            mark = "o" if len(points) < 30 and not faint else None
            axes.plot(*zip(*points), color=colour, lw=1.0 if faint else 1.8, label=name, marker=mark, ms=3)
            shown += points
    if not shown:
        return ""
    last = max(x for x, _ in shown)
    scale = [y for x, y in shown if x >= 0.03 * last]
    low, high = min(scale), max(scale)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)
    axes.legend(loc="upper right", **LEGEND)
    return _svg(axes, "Training and held-out loss over the steps")


def line(points: Points, label: str) -> str:
    """One quantity over the steps; '' without points."""
    if not points:
        return ""
    axes = _axes(4.6, 2.2, "step", label)
    axes.plot(*zip(*thin(points)), color=BLUE, lw=1.4, marker="o" if len(points) == 1 else None)
    if min(y for _, y in points) >= 0:
        axes.set_ylim(0, max(y for _, y in points) * 1.1 or 1.0)
    return _svg(axes, f"{label} over the steps")


def compared(lines: Mapping[str, Spread], x: str, y: str) -> str:
    """Means and standard deviations over x, a line each name; one without x is level."""
    axes = _axes(9, 3.6, x, y)
    for number, (name, points) in enumerate(lines.items()):
        colour = f"C{number % 10}"
        if at := sorted(point for point in points if point[0] is not None):
            places, means, spreads = zip(*at)
            axes.errorbar(places, means, spreads, color=colour, label=name, lw=1.6, marker="o", ms=4, capsize=3)
        for _, mean, spread in (point for point in points if point[0] is None):
            axes.axhline(mean, color=colour, ls="--", lw=1.2, label=name)
            axes.axhspan(mean - spread, mean + spread, color=colour, alpha=0.12, lw=0)
    axes.legend(**LEGEND)
    return _svg(axes, f"{y} over {x}")


def sizes(counts: Sequence[int]) -> str:
    """Images a cluster, largest first; '' without clusters."""
    if not counts:
        return ""
    axes, ordered = _axes(9, 2.2, "clusters, largest first", "images"), sorted(counts, reverse=True)
    if len(ordered) > 100:
        axes.stairs(ordered, fill=True, color=BLUE)
    else:
        axes.bar(range(len(ordered)), ordered, color=BLUE)
    axes.axhline(sum(counts) / len(counts), color=GREY, lw=1, ls="--")  # the even split
    axes.margins(x=0.01)
    return _svg(axes, "Number of images in each cluster")


def stages(seconds: Mapping[str, float]) -> str:
    """A bar a stage, in the order given, with its time; '' without stages."""
    if not seconds:
        return ""
    axes = _axes(9, 0.5 + 0.34 * len(seconds), "", "")
    bars = axes.barh(list(seconds), list(seconds.values()), color=BLUE, height=0.62)
    axes.bar_label(bars, list(map(duration, seconds.values())), padding=6, color=GREY, fontsize=10)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    return _svg(axes, "Time of each stage")


def duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 2 h 03 min."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def thin(points: Points, most: int = MOST) -> list[tuple[float, float]]:
    """At most `most` points: means over equal stretches."""
    stretch = math.ceil(len(points) / most)
    groups = [points[i : i + stretch] for i in range(0, len(points), stretch)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _axes(width: float, height: float, x: str, y: str) -> Axes:
    axes = Figure(figsize=(width, height), layout="constrained").subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=10, length=0)
    axes.grid(axis="y", color=GREY, alpha=0.25, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=GREY)
    axes.set_ylabel(y, color=GREY)
    return axes


def _svg(axes: Axes, label: str) -> str:
    """The <svg> element alone; ids are made of the label, unique on a page, and text stays text in the page's font."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        axes.get_figure().savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
