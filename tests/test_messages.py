"""Messages of the library name parameters; the command line makes flags of them, the service fields of its form."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import aldm
from aldm.cli import main, with_flags
from aldm.words import counted
from serve.problems import Problem

LIBRARY = Path(aldm.__file__).parent
PAGE = LIBRARY.parent / "docs" / "commands.md"
FLAG = re.compile(r"--[a-z][a-z0-9-]*")


@pytest.fixture(scope="module")
def flags() -> set[str]:
    """Every flag of every job."""
    return set(FLAG.findall(PAGE.read_text(encoding="utf-8")))


def _strings(node: ast.AST) -> Iterator[str]:
    """Yield the strings of a module but its docstrings, with x=x where something is filled in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "x=x" for part in child.values)
        elif isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.value
        elif not (isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)):
            yield from _strings(child)


def _library_strings() -> list[tuple[str, str]]:
    """Return (file, string) of the library without its command line and its Markdown."""
    files = [file for file in LIBRARY.rglob("*.py") if file.name not in ("cli.py", "score_table.py", "model_card.py")]
    return [(file.name, text) for file in files for text in _strings(ast.parse(file.read_text(encoding="utf-8")))]


def test_no_string_of_the_library_names_a_flag(flags: set[str]) -> None:
    assert {"--overwrite", "--max-memory-gb", "--set"} <= flags
    assert [(file, text) for file, text in _library_strings() if flags & set(FLAG.findall(text))] == []


def test_what_the_library_names_in_backticks_is_a_flag_on_the_command_line(flags: set[str]) -> None:
    named = {flag for _, text in _library_strings() if "`" in text for flag in FLAG.findall(with_flags(text))}
    assert {"--overwrite", "--max-memory-gb", "--num-samples", "--set"} <= named
    assert named <= flags


def test_the_command_line_shows_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "there.txt").touch()
    assert main(["phantom", str(tmp_path), "--layout", "ixi", "--num-subjects", "1"]) == 2
    assert "give another name, or --overwrite to replace it" in capsys.readouterr().err
    assert main(["info", "--set", "sampling.colour=1"]) == 2
    assert "aldm info: --set sampling.colour=1: unknown key" in capsys.readouterr().err


def test_one_of_a_thing_is_singular() -> None:
    assert [counted(number, "step") for number in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]


def test_the_service_shows_fields_and_calls_the_rest_its_own() -> None:
    problem = Problem(422, "`num_samples` is 0, `max_memory_gb` 2 is too little")
    assert problem.as_dict()["detail"] == "num_samples is 0, the service's max_memory_gb 2 is too little"
