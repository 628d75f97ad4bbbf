"""The HTML report: well-formed, complete, self-contained, and safe whatever the text says."""

import re
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aldm.errors import UserError
from aldm.report import Code, Figures, Picture, Section, Table, Text, render_report, write_report

VOID = {"meta", "img", "br"}


class Reader(HTMLParser):
    """Collects elements, attributes and text, and checks that every element is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)


def png(width: int, height: int) -> bytes:
    """A grey picture, written by hand."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x80" * width) * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def sections(text: str) -> list[Section]:
    return [
        Section(
            text,
            [
                Text(text),
                Figures([(text, text)]),
                Table([text, "b"], [[text, 1.5]], caption=text),
                Picture(png(3, 2), caption=text, description=text),
                Code(text),
            ],
        ),
        Section("second", [Text("end")]),
    ]


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_text_is_never_markup(text: str) -> None:
    plain = Reader(render_report("t", sections("x"), summary="x", footer="x"))
    reader = Reader(render_report("t", sections(text), summary=text or "x", footer=text or "x"))
    kinds = [tag for tag, _ in reader.elements if tag not in ("p", "caption")]
    assert kinds == [tag for tag, _ in plain.elements if tag not in ("p", "caption")]
    assert {name for _, attrs in reader.elements for name in attrs} <= {
        name for _, attrs in plain.elements for name in attrs
    } | {"class"}


def test_an_attack_is_shown_as_text() -> None:
    attack = "<script>alert(1)</script><img src=x onerror='alert(1)'>\" onload=\"alert(1)"
    reader = Reader(render_report(attack, sections(attack), summary=attack, footer=attack))
    assert "script" not in {tag for tag, _ in reader.elements}
    assert not [attrs for _, attrs in reader.elements if any(name.startswith("on") for name in attrs)]
    assert "".join(reader.texts).count(attack) >= 8


def test_nothing_is_loaded_from_elsewhere() -> None:
    html = render_report("t", sections("see https://example.org/a.png"))
    reader = Reader(html)
    sources = [attrs["src"] for _, attrs in reader.elements if "src" in attrs]
    assert [str(source)[:22] for source in sources] == ["data:image/png;base64,"]
    assert [attrs["href"] for tag, attrs in reader.elements if "href" in attrs] == ["#s1", "#s2"]
    assert not {"link", "script", "iframe", "object"} & {tag for tag, _ in reader.elements}
    assert "url(" not in html
    assert "@import" not in html
    policies = [attrs["content"] for tag, attrs in reader.elements if attrs.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_a_table_shows_every_cell_and_aligns_numbers() -> None:
    rows = [["aldm", 23.456789, "21.5 ± 0.3", None], ["identity", 7, "15.0 ± 1.25", "-"]]
    html = render_report("t", [Section("s", [Table(["method", "a", "b", "c"], rows)])])
    cells = re.findall(r"<td( class=\"number\")?>(.*?)</td>", html)
    assert [text for _, text in cells] == ["aldm", "23.46", "21.5 ± 0.3", "", "identity", "7", "15.0 ± 1.25", "-"]
    assert [bool(number) for number, _ in cells] == [False, True, True, False] * 2


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="'scores' is not 2 cells long"):
        render_report("t", [Section("s", [Table(["a", "b"], [[1, 2], [1]], caption="scores")])])


def test_a_table_may_be_empty() -> None:
    Reader(render_report("t", [Section("s", [Table(["a", "b"], [])])]))


def test_paragraphs_are_kept() -> None:
    html = render_report("t", [Section("s", [Text("one\nstill one\n\n\ntwo\n")])])
    assert re.findall(r"<p>(.*?)</p>", html, re.DOTALL) == ["one\nstill one", "two"]


def test_a_picture_says_its_size_and_wide_ones_may_scroll(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(50, 10))
    blocks = [Picture(tmp_path / "a.png", "wide"), Picture(png(10, 10), "square", description="a square")]
    reader = Reader(render_report("t", [Section("s", blocks)]))
    images = [attrs for tag, attrs in reader.elements if tag == "img"]
    assert [(image["width"], image["height"], image["alt"]) for image in images] == [
        ("50", "10", "wide"),
        ("10", "10", "a square"),
    ]
    assert [attrs.get("class") for tag, attrs in reader.elements if tag == "div"] == ["wide", None]
    with pytest.raises(ValueError, match="'photo' is not PNG"):
        render_report("t", [Section("s", [Picture(b"\xff\xd8\xff", "photo")])])


def test_the_file_is_written_once(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, "Ünïcode → title", sections("x"))
    assert path.read_text(encoding="utf-8") == render_report("Ünïcode → title", sections("x"))
    with pytest.raises(UserError, match="`overwrite`"):
        write_report(path, "again", [])
    write_report(path, "again", [], overwrite=True)
    assert "<title>again</title>" in path.read_text(encoding="utf-8")
