"""Self-contained HTML: inline CSS, pictures as base64, light and dark, nothing loaded from anywhere."""

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from ldm_sg.configfile import ASSETS
from ldm_sg.errors import InputError

CSS = (ASSETS / "report.css").read_text(encoding="utf-8")


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


def row(title: str, note: str, command: str, path: Path, at: str, like: Sequence[tuple[str, str]] = ()) -> str:
    """Title, note and command (a click selects it) beside the picture of `path`; its id on the page is `at`. `like`: ids of
    other rows, or '', and what they are called."""
    near = ", ".join(f'<a href="#{escape(to)}">{escape(said)}</a>' if to else escape(said) for to, said in like)
    near = f"<span>like {near}</span>" if near else ""
    words = f"<div><b>{escape(title)}</b><span>{escape(note)}</span>{near}<code>{escape(command)}</code></div>"
    return f'<div class="row" id="{escape(at)}">{words}<img alt="{escape(title)}" src="{_embedded(path)}"></div>'


def script(name: str, data: Any) -> str:
    """`data` as JSON, in which nothing can end it, and the script of ldm_sg/assets that reads it once the page is there."""
    held = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    code = (ASSETS / name).read_text(encoding="utf-8")
    return f'<script type="application/json" id="data">{held}</script><script type="module">{code}</script>'


def _embedded(path: Path) -> str:
    """A PNG or WebP file as a data URI: WebP where that is the smaller one, as it is for photos."""
    data, kind = path.read_bytes(), path.suffix[1:]
    try:
        image = Image.open(path)
    except OSError as err:
        raise InputError(f"{path} is damaged: remove it, and the report can be made") from err
    with image:
        if kind == "png" and max(image.size) < 2**14:  # WebP's largest side
            image.convert("RGB").save(smaller := io.BytesIO(), "WEBP", quality=85)
            data, kind = min((data, kind), (smaller.getvalue(), "webp"), key=lambda pair: len(pair[0]))
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def chart(svg: str) -> str:
    """An inline SVG drawing, ready-made."""
    return f'<figure class="chart">{svg}</figure>' if svg else ""


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


def yaml_code(content: Mapping[str, Any]) -> str:
    return code(yaml.safe_dump(dict(content), sort_keys=False, width=110, allow_unicode=True)) if content else ""


def folded(label: str, inner: str) -> str:
    """Shown on a click."""
    return f"<details><summary>{escape(label)}</summary>{inner}</details>" if inner else ""
