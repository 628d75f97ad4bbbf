"""Draws docs/images/layers.svg: the layers of the import contracts in pyproject.toml. Run by `make docs`."""

import re
import textwrap
import tomllib
from dataclasses import dataclass
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "layers.svg"
PROJECT = ROOT / "pyproject.toml"
WIDTH, LEFT, LINE, GAP, COLUMNS = 960, 250, 18, 8, 98
"""Pixels, and the characters of a line of modules."""
PLATFORM, LIBRARY = ("#e8eaf6", "#3f51b5"), ("#f1f8e9", "#558b2f")
"""Fill and border."""
PURPOSES = {
    "tune | serve": ["sweeps with Ray Tune", "the translation service on Ray Serve"],
    "pipelines": ["the jobs of aldm", "Ray Train", "DeepSpeed", "MLflow", "Kubeflow", "Kubernetes"],
}
"""What the packages over the library do, by their layer."""


@dataclass
class Band:
    """A row of the picture: a title and the modules beside it."""

    title: str
    modules: list[str]
    colours: tuple[str, str]


def bands(text: str) -> list[Band]:
    """Return the bands of pyproject.toml, top to bottom: the packages over the library, then the library's comments.

    Raises:
        ValueError: a layer of the library that stands before the first comment.
    """
    packages, library = (c for c in tomllib.loads(text)["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    found = [Band(layer.replace(" | ", " and "), PURPOSES[layer], PLATFORM) for layer in packages["layers"][:-1]]
    listed = text[text.index(f'name = "{library["name"]}"') :].partition("layers = [\n")[2].partition("\n]")[0]
    for line in map(str.strip, listed.splitlines()):
        if line.startswith("#"):
            found.append(Band(line.removeprefix("# "), [], LIBRARY))
        elif found[-1].colours is LIBRARY:
            found[-1].modules += [name.removeprefix("aldm.") for name in re.findall(r"[\w.]+", line)]
        else:
            raise ValueError(f"pyproject.toml: a comment that names its band is missing above {line}")
    return found


def picture(rows: list[Band]) -> str:
    """Return the SVG; it has its own background, so that it can be read on a dark page."""
    parts, top = [], GAP
    for band in rows:
        title = textwrap.wrap(band.title, 28)
        modules = textwrap.wrap(", ".join(band.modules), COLUMNS)
        height = LINE * max(len(title), len(modules)) + GAP
        box = f'x="{GAP}" y="{top}" width="{WIDTH - 2 * GAP}" height="{height}" rx="4"'
        parts.append('<rect {} fill="{}" stroke="{}"/>'.format(box, *band.colours))
        parts += _lines(title, GAP * 2, top, ' font-weight="bold"')
        parts += _lines(modules, LEFT, top, "")
        top += height + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" height="{top}" '
        f'font-family="sans-serif" font-size="13" fill="#212121">\n'
        f'<rect width="{WIDTH}" height="{top}" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _lines(texts: list[str], x: int, top: int, style: str) -> list[str]:
    return [
        f'<text x="{x}" y="{top + LINE * (number + 1)}"{style}>{escape(text)}</text>'
        for number, text in enumerate(texts)
    ]


def drawn() -> str:
    """Return the picture of the project as it is."""
    return picture(bands(PROJECT.read_text(encoding="utf-8")))


if __name__ == "__main__":
    PICTURE.write_text(drawn(), encoding="utf-8")
