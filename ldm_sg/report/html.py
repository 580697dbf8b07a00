"""Self-contained HTML: inline CSS, pictures as base64, light and dark, nothing loaded from anywhere."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from ldm_sg.folder import write_text

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #656d76; --paper: #ffffff; --card: #f6f8fa; --line: #d8dee4;
        --accent: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --faint: #8b949e; --paper: #0d1117; --card: #161b22; --line: #30363d; --accent: #58a6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI",
       Roboto, "Helvetica Neue", Arial, sans-serif; -webkit-text-size-adjust: 100%; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 96px; }
h1 { font-size: 30px; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 56px 0 6px; }
p { margin: 0 0 14px; max-width: 76ch; color: var(--faint); }
figure { margin: 14px 0 0; }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px; }
figcaption { color: var(--faint); font-size: 13px; margin: 4px 0 0; }
.chart svg { display: block; width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 20px; align-items: start; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(46%, 180px), 1fr)); gap: 10px; margin: 24px 0 14px; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; min-width: 0; }
dt { color: var(--faint); font-size: 13px; }
dd { margin: 0; font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 10px 0 14px; font-size: 15px; }
th, td { padding: 7px 16px 7px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--faint); font-weight: 500; font-size: 13px; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; overflow-x: auto;
      font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; margin: 10px 0 0; }
details { margin: 14px 0 0; } summary { cursor: pointer; color: var(--accent); }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 18px 0 0; font-size: 14px; }
a { color: var(--accent); text-decoration: none; }
.row { display: grid; grid-template-columns: minmax(0, 270px) minmax(0, 1fr); gap: 4px 20px; align-items: center;
       padding: 8px 0; border-bottom: 1px solid var(--line); }
.row img { display: block; max-width: 100%; height: auto; border-radius: 6px; }
.row span { color: var(--faint); font-size: 14px; margin-left: 6px; }
.row code { display: block; font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: var(--faint);
            user-select: all; cursor: copy; overflow-wrap: anywhere; }
@media (max-width: 700px) {  /* a phone: pictures with writing in them keep its size and are pushed sideways */
  main { padding: 24px 16px 64px; }
  figure { overflow-x: auto; } figure img, .chart svg { max-width: none; width: max(100%, 900px); }
  .row { grid-template-columns: minmax(0, 1fr); } }
footer { margin-top: 72px; color: var(--faint); font-size: 13px; }
"""


def page(title: str, lead: str, sections: Sequence[str], footer: str = "") -> str:
    """A whole document; `sections` are ready HTML, empty ones are left out."""
    body = "\n".join(part for part in sections if part)
    links = "".join(
        f'<a href="#{at}">{name}</a>' for at, name in re.findall(r'<section id="(.*?)"><h2>(.*?)</h2>', body)
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{CSS}</style></head>\n<body><main>\n<h1>{escape(title)}</h1><p>{escape(lead)}</p>\n<nav>{links}</nav>{body}\n"
        f"<footer>{escape(footer)}</footer>\n</main></body></html>\n"
    )


def section(heading: str, text: str, *parts: str) -> str:
    """A heading, a sentence and what belongs below; empty when no part has anything to show."""
    shown = [part for part in parts if part]
    if not shown:
        return ""
    at = re.sub(r"\W+", "-", heading.lower()).strip("-")
    return f'<section id="{at}"><h2>{escape(heading)}</h2>{paragraph(text)}' + "\n".join(shown) + "</section>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>" if text else ""


def picture(path: Path, caption: str = "", alt: str = "") -> str:
    """A PNG file, embedded; empty when there is none."""
    if not path.is_file():
        return ""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{escape(alt or caption or path.stem)}" src="{_embedded(path)}">{below}</figure>'


def row(title: str, note: str, command: str, path: Path) -> str:
    """Title, note and command (a click selects it) beside the picture of `path`."""
    words = f"<div><b>{escape(title)}</b><span>{escape(note)}</span><code>{escape(command)}</code></div>"
    return f'<div class="row">{words}<img alt="{escape(title)}" src="{_embedded(path)}"></div>'


def _embedded(path: Path) -> str:
    """A PNG or WebP file as a data URI: WebP where that is the smaller one, as it is for photos."""
    data, kind = path.read_bytes(), path.suffix[1:]
    with Image.open(path) as image:
        if kind == "png" and max(image.size) < 2**14:  # WebP's largest side
            image.convert("RGB").save(smaller := io.BytesIO(), "WEBP", quality=85)
            data, kind = min((data, kind), (smaller.getvalue(), "webp"), key=lambda pair: len(pair[0]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def chart(svg: str, caption: str = "") -> str:
    """An inline SVG drawing, ready-made."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="chart">{svg}{below}</figure>' if svg else ""


def pair(*parts: str) -> str:
    """Parts side by side where there is room."""
    shown = "".join(part for part in parts if part)
    return f'<div class="pair">{shown}</div>' if shown else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, numbers to the right; empty without rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(items: Mapping[str, str]) -> str:
    """Small cards: a name and a value each."""
    cards = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items.items())
    return f"<dl>{cards}</dl>" if cards else ""


def code(text: str) -> str:
    return f"<pre>{escape(text.strip())}</pre>" if text.strip() else ""


def folded(label: str, inner: str) -> str:
    """Shown on a click."""
    return f"<details><summary>{escape(label)}</summary>{inner}</details>" if inner else ""


def write(path: Path, text: str) -> Path:
    """The file appears under its name when whole."""
    write_text(path, text)
    return path
