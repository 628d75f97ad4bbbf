"""docs/python.md: its code runs as it stands, and the functions that it names are there."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from aldm.cli import JOBS
from aldm.score_rows import read_csv

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"
CODE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NAME = re.compile(r"`(aldm(?:\.\w+)+)`")


@pytest.mark.slow
@pytest.mark.smoke
def test_the_code_of_the_page_goes_from_simulated_heads_to_scores(
    tmp_path: Path,
) -> None:
    (code,) = CODE.findall(PAGE.read_text(encoding="utf-8"))
    statements = code[code.index("write_phantom(data") :].split("\n")
    assert len([line for line in statements if line]) <= 12, "a dozen lines"
    script = tmp_path / "script.py"
    script.write_text(code, encoding="utf-8")
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True)
    work = tmp_path / "work"
    rows = read_csv(work / "scores" / "scores.csv")
    assert {(row.source, row.target) for row in rows if row.method == "aldm"} >= {("t1", "t2"), ("t2", "t1")}
    assert (work / "synthetic-t2.nii.gz").is_file()
    assert (work / "model" / "README.md").is_file()


def test_every_function_that_the_page_names_is_there() -> None:
    text = PAGE.read_text(encoding="utf-8")
    names = NAME.findall(text)
    assert len(names) > 8
    for name in names:
        assert _found(name), name
    for job in re.findall(r"^\| `aldm (\w+)", text, re.MULTILINE):
        assert job in JOBS


def _found(name: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False
