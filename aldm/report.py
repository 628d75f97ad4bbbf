"""A self-contained HTML report: one file that opens offline, on a phone and on paper.

Pictures are inlined and a content policy forbids every external resource; all text is escaped.
"""

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TypeAlias

from aldm.files import atomic_path

_PNG = b"\x89PNG\r\n\x1a\n"
_NUMBER = re.compile(r"[-+±−]?\d[\d.,]*([eE][-+]?\d+)?( ?± ?[\d.,]+)?( ?(%|dB|s|min|GiB|MB|mm|M))?")
_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --quiet: #5a636e; --line: #d9dee4; --wash: #f5f7f9; --accent: #0b5cad; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: #fff; color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
main, header, footer { max-width: 60rem; margin: 0 auto; padding: 0 1rem; overflow-wrap: anywhere; }
header { padding-top: 2rem; border-bottom: 1px solid var(--line); padding-bottom: 1rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 2.25rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.quiet, figcaption, caption, footer { color: var(--quiet); font-size: .9rem; }
nav ol { margin: .75rem 0 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
a { color: var(--accent); }
figure { margin: 1rem 0; }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); }
@media screen and (max-width: 40rem) { .wide { overflow-x: auto; } .wide img { max-width: none; width: 44rem; } }
figcaption { margin-top: .4rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .35rem; }
th, td { padding: .35rem .75rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { background: var(--wash); border-bottom: 2px solid var(--line); }
.number { text-align: right; white-space: nowrap; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1rem 0; }
dl div { display: flex; flex-direction: column-reverse; border: 1px solid var(--line); border-radius: .4rem;
  padding: .6rem .8rem; background: var(--wash); }
dd { margin: 0; font-size: 1.4rem; font-weight: 600; line-height: 1.2; }
dt { color: var(--quiet); font-size: .9rem; }
pre { background: var(--wash); border: 1px solid var(--line); border-radius: .4rem; padding: .75rem; overflow-x: auto;
  font-size: .85rem; line-height: 1.45; overflow-wrap: normal; }
footer { margin: 3rem auto 2rem; padding-top: 1rem; border-top: 1px solid var(--line); }
@media print {
  body { font-size: 10pt; }
  h2 { break-after: avoid; }
  figure, tr, dl { break-inside: avoid; }
  .scroll, pre { overflow: visible; white-space: pre-wrap; }
  thead { display: table-header-group; }
  nav { display: none; }
}
"""


@dataclass(frozen=True)
class Text:
    """Plain text; an empty line starts a new paragraph."""

    text: str


@dataclass(frozen=True)
class Figures:
    """A few numbers to see first: pairs of a value, such as "23.7 dB", and what it is."""

    values: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """Rows under column names; numbers stand right-aligned, floats are shown with four significant digits."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A PNG picture, a file or its bytes, with a caption and a description for those who cannot see it."""

    image: bytes | str | os.PathLike[str]
    caption: str
    description: str = ""


@dataclass(frozen=True)
class Code:
    """Text shown as it is: commands, a configuration."""

    text: str


Block: TypeAlias = Text | Figures | Table | Picture | Code


@dataclass(frozen=True)
class Section:
    """A titled part of the report."""

    title: str
    blocks: Sequence[Block]


def write_report(
    path: str | os.PathLike[str],
    title: str,
    sections: Sequence[Section],
    *,
    summary: str = "",
    footer: str = "",
    overwrite: bool = False,
) -> None:
    """Write the report as one HTML file.

    Args:
        path: the file to write.
        title: heading, and title of the window.
        sections: the parts in their order; two or more get a list of links on top.
        summary: a sentence or two under the title.
        footer: a closing line, such as the version and the limits of use.
        overwrite: whether an existing file may be replaced.

    Raises:
        UserError: the file cannot be written (see `atomic_path`).
        ValueError: a picture is not PNG, or a row is not as long as the columns.
    """
    text = render_report(title, sections, summary=summary, footer=footer)
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render_report(title: str, sections: Sequence[Section], *, summary: str = "", footer: str = "") -> str:
    """Return the report as HTML; see `write_report`."""
    links = "".join(f'<li><a href="#s{i}">{escape(s.title)}</a></li>' for i, s in enumerate(sections, 1))
    contents = f'<nav aria-label="Contents"><ol>{links}</ol></nav>' if len(sections) > 1 else ""
    lead = f'<p class="quiet">{escape(summary)}</p>' if summary else ""
    body = "\n".join(
        f'<section id="s{i}">\n<h2>{escape(s.title)}</h2>\n' + "\n".join(map(_block, s.blocks)) + "\n</section>"
        for i, s in enumerate(sections, 1)
    )
    closing = f"<footer>{escape(footer)}</footer>\n" if footer else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{lead}{contents}</header>\n<main>\n{body}\n</main>\n{closing}</body>\n</html>\n"
    )


def _block(block: Block) -> str:
    match block:
        case Text():
            paragraphs = [part.strip() for part in re.split(r"\n\s*\n", block.text) if part.strip()]
            return "\n".join(f"<p>{escape(part)}</p>" for part in paragraphs)
        case Figures():
            pairs = (f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for value, label in block.values)
            return f"<dl>{''.join(pairs)}</dl>"
        case Table():
            return _table(block)
        case Picture():
            return _picture(block)
        case Code():
            return f"<pre>{escape(block.text)}</pre>"


def _table(table: Table) -> str:
    cells = [[_cell(value) for value in row] for row in table.rows]
    if any(len(row) != len(table.columns) for row in cells):
        raise ValueError(f"a row of the table {table.caption!r} is not {len(table.columns)} cells long")
    columns = list(zip(*cells, strict=True)) or [()] * len(table.columns)
    numeric = [bool(column) and all(not text or _NUMBER.fullmatch(text) for text in column) for column in columns]
    style = [' class="number"' if flag else "" for flag in numeric]
    head = "".join(f'<th scope="col"{c}>{escape(name)}</th>' for name, c in zip(table.columns, style, strict=True))
    rows = "\n".join(
        "<tr>" + "".join(f"<td{c}>{escape(text)}</td>" for text, c in zip(row, style, strict=True)) + "</tr>"
        for row in cells
    )
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    return (
        f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'
    )


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _picture(picture: Picture) -> str:
    data = picture.image if isinstance(picture.image, bytes) else Path(picture.image).read_bytes()
    if not data.startswith(_PNG):
        raise ValueError(f"the picture {picture.caption!r} is not PNG")
    width, height = (int.from_bytes(data[start : start + 4], "big") for start in (16, 20))  # of its IHDR chunk
    shape = ' class="wide"' if width > 2 * height else ""
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = (
        f'<img src="{source}" width="{width}" height="{height}" alt="{escape(picture.description or picture.caption)}">'
    )
    return f"<figure><div{shape}>{image}</div><figcaption>{escape(picture.caption)}</figcaption></figure>"
