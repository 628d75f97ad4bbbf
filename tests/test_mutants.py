"""The tool that asks whether the tests notice: its changes, its tables, and that it finds what is noticed."""

import ast
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORMULA = """
def area(width: float, height: float = 2) -> float:
    \"\"\"Return 1 area.\"\"\"
    if width < 0 or not height:
        raise ValueError(f"{width - 1} is below 0")
    assert width > 1
    note("1")
    return -width * height
"""


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The modules of tests/mutants, which are scripts of no package."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "mutants"))
    monkeypatch.chdir(ROOT)
    names = ("operators", "targets", "named", "equivalent", "page")
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        for name in names:
            sys.modules.pop(name, None)


def test_signs_comparisons_numbers_and_conditions_are_changed_and_words_are_not(tools: dict[str, ModuleType]) -> None:
    changed = {mutant.after for mutant in tools["operators"].mutants_of("x.py", FORMULA)}
    assert changed == {
        "def area(width: float, height: float = 3) -> float:",
        "if width >= 0 or not height:",
        "if width <= 0 or not height:",
        "if width < 1 or not height:",
        "if width < 0 and not height:",
        "if width < 0 or (height):",
        "if not (width < 0 or not height):",
        "pass",
        "return (width) * height",
        "return -width / height",
    }


def test_every_change_of_the_project_is_python_and_of_its_line_alone(tools: dict[str, ModuleType]) -> None:
    for file in tools["targets"].TARGETS:
        source = (ROOT / file).read_text()
        tree = ast.parse(source)
        mutants = tools["operators"].mutants_of(file, source)
        assert len({mutant.source for mutant in mutants}) == len(mutants) > 10
        for mutant in mutants[:: max(1, len(mutants) // 20)]:
            ast.parse(mutant.source)
            first, last = tools["operators"].span_of(tree, mutant.line)
            assert first <= mutant.line <= last
            assert mutant.before == source.splitlines()[mutant.line - 1].strip()
            assert mutant.source.splitlines()[: first - 1] == source.splitlines()[: first - 1]


def test_the_tables_are_of_the_code_as_it_is(tools: dict[str, ModuleType]) -> None:
    named = tools["named"].named_mutants()  # raises where the text of a row is not there
    for name, mutant in named:
        assert mutant.source != (ROOT / mutant.file).read_text(), name
        compile(mutant.source, mutant.file, "exec")
    known = {(mutant.file, mutant.change) for _, mutant in named}
    for file in tools["targets"].TARGETS:
        found = tools["operators"].mutants_of(file, (ROOT / file).read_text())
        known |= {(file, mutant.change) for mutant in found}
    assert set(tools["equivalent"].EQUIVALENT) - known == set(), "of lines that are no longer there"
    of_rows, every = {mutant.file for _, mutant in named}, tools["targets"].TARGETS | tools["targets"].NAMED_ONLY
    assert of_rows - set(every) == set(), "never asked: in no table of targets.py"
    assert set(tools["targets"].NAMED_ONLY) - of_rows == set(), "nothing to ask: no row of named.py"
    for file in every:
        for test in tools["targets"].tests_of(file):
            assert (ROOT / test).is_file()


def test_the_page_counts_equivalent_changes_as_neither(tools: dict[str, ModuleType]) -> None:
    first, second, third = tools["operators"].mutants_of("x.py", FORMULA)[:3]
    outcome = tools["page"].Outcome
    outcomes = [outcome(first, "", True, ""), outcome(second, "", False, ""), outcome(third, "", False, "no effect")]
    assert tools["page"].share_survived(outcomes) == 0.5
    text = tools["page"].page(outcomes, 40)
    assert "**1 of 2 noticed, 1 survived (50.0 %)**, and 1 equivalent." in text
    assert "| x.py | 3 | 1 | 1 | 1 |" in text


MODULE = """
LIMIT = 3


def half(x):
    if x > LIMIT:
        raise ValueError(x)
    return x / 2


def unseen(x):
    return x + 1
"""
TESTS = """
import pytest

from half import LIMIT, half


@pytest.fixture(scope="module")
def two():
    return half(2)


def test_half(two):
    assert two == 1


def test_limit():
    with pytest.raises(ValueError, match="4"):
        half(LIMIT + 1)
"""
SCRIPT = """
import sys
from pathlib import Path

from operators import mutants_of
from run import asked_of, covered

coverage = covered("half.py", ["test_half.py"])
mutants = mutants_of("half.py", Path("half.py").read_text())
for mutant, noticed in asked_of(mutants, coverage, 2):
    print(noticed, mutant.after, sep=": ")
print(sorted(Path().rglob("*.py")), coverage.tests_for(8, 8), coverage.tests_for(12, 12))
"""


def test_a_change_is_noticed_where_a_test_fails_on_it_and_nothing_is_written(tmp_path: Path) -> None:
    """A module and its tests of a few lines, asked in forks as the project's are."""
    (tmp_path / "half.py").write_text(MODULE)
    (tmp_path / "test_half.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'mutants'}:{tmp_path}"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-c", SCRIPT]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    *found, last = ran.stdout.splitlines()
    assert set(found) == {
        "True: LIMIT = 4",
        "True: if x <= LIMIT:",
        "False: if x >= LIMIT:",
        "True: if False:",
        "True: return x * 2",
        "True: return x / 3",
        "False: return x - 1",
        "False: return x + 2",
    }
    # both tests, the quicker first; test_half calls nothing itself, but its fixture does, and any test may depend on it
    orders = (
        "['test_half.py::test_half', 'test_half.py::test_limit']",
        "['test_half.py::test_limit', 'test_half.py::test_half']",
    )
    assert last in [f"[PosixPath('half.py'), PosixPath('test_half.py')] {tests} []" for tests in orders]
    assert (tmp_path / "half.py").read_text() == MODULE


def test_a_second_run_in_a_checkout_is_refused(tmp_path: Path) -> None:
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "tests" / "mutants")!r})
from run import alone

build = Path("build")
with alone(build):
    try:
        with alone(build):
            raise AssertionError("two at once")
    except SystemExit as error:
        print(error)
with alone(build):  # the next one
    pass
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("another make mutants runs in this checkout")
