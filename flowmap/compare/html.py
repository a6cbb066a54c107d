"""Pieces of a self-contained HTML page: text, tables, pictures as data URIs. Nothing in it is loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1080px; margin: 2em auto; padding: 0 1em; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2em; border-top: 1px solid #ccc; padding-top: 1em; }
table { border-collapse: collapse; margin: 0.7em 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2em 0.8em; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child, table.text th, table.text td { text-align: left; } th { border-bottom: 2px solid #999; }
img { max-width: 100%; image-rendering: pixelated; } img.smooth { image-rendering: auto; }
pre { background: #f6f6f6; padding: 0.8em; overflow-x: auto; font-size: 13px; } .note { color: #666; }
.wide { overflow-x: auto; }
"""


def document(title: str, parts: Iterable[str], *, made_by: str) -> str:
    """The whole page. made_by: a tag of its head by which a later call recognises it."""
    head = f'<meta charset="utf-8">{made_by}<title>{escape(title)}</title><style>{STYLE}</style>'
    return "\n".join(["<!doctype html>", f'<html lang="en"><head>{head}</head><body>', *parts, "</body></html>", ""])


def heading(level: int, text: str, name: str | None = None) -> str:
    """A heading; name: that links point to."""
    return f"<h{level}{f' id={chr(34)}{escape(name)}{chr(34)}' if name else ''}>{escape(text)}</h{level}>"


def paragraph(text: str, *, note: bool = False) -> str:
    return f'<p class="note">{escape(text)}</p>' if note else f"<p>{escape(text)}</p>"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, text: bool = False) -> str:
    """A table; the first column is text, the others too if `text` is set, otherwise they are numbers."""
    line = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
    body = "".join(line("td", row) for row in rows)
    kind = ' class="text"' if text else ""
    return f'<div class="wide"><table{kind}><thead>{line("th", heads)}</thead><tbody>{body}</tbody></table></div>'


def from_markdown(lines: Sequence[str]) -> str:
    """A table of Markdown, with its cells as they are."""
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return table(cells[0], cells[2:])


def folded(summary: str, text: str) -> str:
    """Text that is shown when its summary is clicked."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def preformatted(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def picture(image: Image.Image, what: str) -> str:
    """A picture as PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return image_of(file.getvalue(), "image/png", what)


def image_of(data: bytes, kind: str, what: str, *, smooth: bool = False) -> str:
    """The bytes of a picture file of that media type. smooth: its pixels are no samples."""
    style = ' class="smooth"' if smooth else ""
    return f'<p><img{style} alt="{escape(what)}" src="data:{kind};base64,{base64.b64encode(data).decode()}"></p>'
