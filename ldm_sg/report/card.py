"""README.md of an exported pipeline: what made it, its figures with their judges, whose parts it holds, how to load it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_sg.configfile import ASSETS
from ldm_sg.report.run import evaluations, run_facts

HEAD = (ASSETS / "card.md").read_text(encoding="utf-8")
ONNX = """
## ONNX

`onnx/unet.onnx` takes latents `x`, times `t` and the signals, of which `keep` = false means the null; `onnx/decoder.onnx` takes
normalised `latents` and gives `images` in [-1, 1].
"""
FIGURES = """## Figures

Each in the space of the network that judges; `its guide` is the network that made the signals.

"""


def card(source: str, run: Path, parts: Mapping[str, Any], signal: str, labels: int, w: float, onnx: bool) -> str:
    """`source`: what a user gives to load it. `parts`: name -> manifest of the first stage and of g (None: no g made the
    signals)."""
    call = "cluster=[0] * 8, " if labels else "num_images_per_prompt=8, "
    head, rows = evaluations(run)
    texts = [
        HEAD.format(name=Path(source).name, source=source, call=call, w=w, signal=signal) + ONNX * onnx,
        "## How it was made\n",
        markdown(["", ""], [[name, value] for name, value in run_facts(run).items() if value]),
        FIGURES + markdown(head, rows) if rows else "",
        "## Parts and their licences\n",
        markdown(["part", "what", "licence"], [_part(*item) for item in parts.items()]),
    ]
    return "\n".join(text for text in texts if text)


def _part(name: str, manifest: Mapping[str, Any] | None) -> list[str]:
    if manifest is None:
        return [name, "none: the signals are not a network's", "–"]
    what = f"{manifest.get('name', manifest.get('model', '?'))} ({manifest.get('kind', manifest.get('library', 'network'))})"
    return [name, what, str(manifest.get("licence") or "as at its source")]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    cells = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in cells)
