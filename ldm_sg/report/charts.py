"""Small line and bar charts as inline SVG, in colours that read on light and dark paper."""

import io
import math
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY, BLUE, AMBER = "#8b949e", "#388bfd", "#d29922"
MOST = 400  # points a line; longer ones are averaged in equal stretches
Points = Sequence[tuple[float, float]]  # (step, value)
Spread = Sequence[tuple[float | None, float, float]]  # (x, mean, standard deviation)


def losses(train: Points, guided: Points, null: Points) -> str:
    """Training loss in grey, held-out loss with guidance (blue) and with the null (amber); '' without any points.

    The first 3% of the steps, when the loss falls from 1, do not set the scale."""
    lines = {"training": (train, GREY), "held out, guided": (guided, BLUE), "held out, null": (null, AMBER)}
    shown = {name: (thin(points), colour) for name, (points, colour) in lines.items() if points}
    if not shown:
        return ""
    figure, axes = _axes(9, 3.2)
    for name, (points, colour) in shown.items():
        faint = name == "training"
        mark = "o" if len(points) < 30 and not faint else None
        axes.plot(*zip(*points), color=colour, lw=1.0 if faint else 1.8, label=name, marker=mark, ms=3)
    last = max(x for points, _ in shown.values() for x, _ in points)
    scale = [y for points, _ in shown.values() for x, y in points if x >= 0.03 * last]
    low, high = min(scale), max(scale)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)
    axes.set_ylabel("loss")
    axes.legend(frameon=False, labelcolor=GREY, fontsize=10, loc="upper right")
    return _svg(figure, "Training and held-out loss over the steps")


def line(points: Points, label: str) -> str:
    """One quantity over the steps; '' without points."""
    if not points:
        return ""
    figure, axes = _axes(4.6, 2.2)
    axes.plot(*zip(*thin(points)), color=BLUE, lw=1.4, marker="o" if len(points) == 1 else None)
    axes.set_ylabel(label)
    low, high = min(y for _, y in points), max(y for _, y in points)
    if low >= 0:
        axes.set_ylim(0, high * 1.1 or 1.0)
    return _svg(figure, f"{label} over the steps")


def compared(lines: Mapping[str, Spread], x: str, y: str) -> str:
    """Means and standard deviations over x, a line each name; one without x is level. '' without points."""
    if not any(lines.values()):
        return ""
    figure, axes = _axes(9, 3.6)
    for number, (name, points) in enumerate(lines.items()):
        colour = f"C{number % 10}"
        if at := sorted(point for point in points if point[0] is not None):
            places, means, spreads = zip(*at)
            axes.errorbar(places, means, spreads, color=colour, label=name, lw=1.6, marker="o", ms=4, capsize=3)
        for _, mean, spread in (point for point in points if point[0] is None):
            axes.axhline(mean, color=colour, ls="--", lw=1.2, label=name)
            axes.axhspan(mean - spread, mean + spread, color=colour, alpha=0.12, lw=0)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.legend(frameon=False, labelcolor=GREY, fontsize=10)
    return _svg(figure, f"{y} over {x}")


def sizes(counts: Sequence[int]) -> str:
    """Images a cluster, largest first; '' without clusters."""
    if not counts:
        return ""
    figure, axes = _axes(9, 2.2)
    ordered = sorted(counts, reverse=True)
    if len(ordered) > 100:
        axes.stairs(ordered, fill=True, color=BLUE)
    else:
        axes.bar(range(len(ordered)), ordered, color=BLUE)
    axes.axhline(sum(ordered) / len(ordered), color=GREY, lw=1, ls="--")  # the even split
    axes.set_xlabel("clusters, largest first")
    axes.set_ylabel("images")
    axes.margins(x=0.01)
    return _svg(figure, "Number of images in each cluster")


def stages(seconds: Mapping[str, float]) -> str:
    """A bar a stage, in the order given, with its time; '' without stages."""
    if not seconds:
        return ""
    figure, axes = _axes(9, 0.5 + 0.34 * len(seconds))
    names = list(seconds)[::-1]
    bars = axes.barh(names, [seconds[name] for name in names], color=BLUE, height=0.62)
    axes.bar_label(bars, [duration(seconds[name]) for name in names], padding=6, color=GREY, fontsize=10)
    axes.margins(x=0.14)
    axes.set_xticks([])
    axes.set_xlabel("")
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    return _svg(figure, "Time of each stage")


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


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=10, length=0)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    axes.grid(axis="y", color=GREY, alpha=0.25, lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("step")
    return figure, axes


def _svg(figure: Figure, label: str) -> str:
    """The <svg> element alone; ids are made of the label, unique on a page, and text stays text in the page's font."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
