"""What happens in the fork of a mutant: its source is found in place of the file's, and tests are run on it."""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import threading
import time
import types
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

OPTIONS = ["-x", "-q", "-m", "not slow", "-o", "addopts=--strict-markers"]
OPTIONS += ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
OWN = ("aldm", "pipelines", "serve", "tune", "k8s", "conftest", "test_")


@dataclass
class Coverage:
    """Which tests run which lines of a file, when nothing is changed."""

    tests: dict[str, float] = field(default_factory=dict)
    """Test -> seconds, in the order in which they ran."""
    lines: dict[int, list[str]] = field(default_factory=dict)
    """Line -> tests that ran it."""
    shared: list[int] = field(default_factory=list)
    """Lines that run on import or in a fixture of several tests: any test may depend on them."""
    modules: list[str] = field(default_factory=list)
    """Packages of others that were imported."""

    def tests_for(self, first: int, last: int) -> list[str]:
        """Return the tests that a change in these lines might fail: those that run them first, quick ones first."""
        span = range(first, last + 1)
        own = {test for line in span for test in self.lines.get(line, ())}
        every = self.tests if any(line in self.shared for line in span) else own
        return sorted(every, key=lambda test: (test not in own, test.partition("::")[0], self.tests[test]))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module with another source than its file's."""

    def __init__(self, file: str, source: str) -> None:
        self._path, self._source = str(Path(file).resolve()), source
        self._name = file.removesuffix(".py").replace("/", ".")

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        loader = importlib.machinery.SourceFileLoader(name, self._path)
        loader.get_code = lambda _: compile(self._source, self._path, "exec", dont_inherit=True)  # type: ignore[method-assign,assignment,misc]
        return importlib.util.spec_from_file_location(name, self._path, loader=loader)


class _Recorder:
    """A pytest plugin that notes which test runs which line of a file."""

    def __init__(self, file: str) -> None:
        self._path = str(Path(file).resolve())
        self._test, self._in_shared = "", 0
        self._lines: dict[int, set[str]] = defaultdict(set)
        self._seconds: dict[str, float] = {}

    def trace(self, frame: types.FrameType, event: str, _: Any) -> Any:
        """Follow a call, if it is one into the file."""
        if frame.f_code.co_filename != self._path:
            return None
        if event == "line":
            self._lines[frame.f_lineno].add("" if self._in_shared else self._test)
        return self.trace

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._test, self._seconds[nodeid] = nodeid, 0.0

    def pytest_runtest_logfinish(self) -> None:
        self._test = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        shared = fixturedef.scope != "function"
        self._in_shared += shared
        try:
            return (yield)
        finally:
            self._in_shared -= shared

    def coverage(self) -> Coverage:
        """Return what was seen."""
        lines = {line: sorted(tests - {""}) for line, tests in self._lines.items()}
        shared = [line for line, tests in self._lines.items() if "" in tests]
        root = str(Path.cwd())
        others = [
            name
            for name, module in sys.modules.items()
            if not name.startswith((*OWN, "_", "hypothesis"))
            and not str(getattr(module, "__file__", None) or root).startswith(root)
        ]
        return Coverage(self._seconds, lines, shared, others)


def run_tests(file: str, source: str, tests: Sequence[str]) -> int:
    """Run tests on a changed file; return pytest's exit code."""
    sys.meta_path.insert(0, _Finder(file, source))
    return int(pytest.main([*OPTIONS, *tests]))


def record(file: str, tests: Sequence[str], out: Path) -> int:
    """Run tests on a file as it is and write their coverage."""
    recorder = _Recorder(file)
    sys.meta_path.insert(0, _Finder(file, Path(file).read_text()))
    threading.settrace(recorder.trace)
    sys.settrace(recorder.trace)
    code = int(pytest.main([*OPTIONS, *tests], plugins=[recorder]))
    sys.settrace(None)
    out.write_text(json.dumps(asdict(recorder.coverage())))
    return code


def read(out: Path) -> Coverage:
    """Read what `record` wrote."""
    values = json.loads(out.read_text())
    return Coverage(**values | {"lines": {int(line): tests for line, tests in values["lines"].items()}})


def forked(work: Any, log: Path) -> int:
    """Fork; the child does `work` in a session of its own and ends with the code that it returns. Return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        code = work()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Child:
    """A fork at work."""

    def __init__(self, work: Any, log: Path, limit_s: float) -> None:
        self.begin, self.limit_s, self.log = time.monotonic(), limit_s, log
        self.pid = forked(work, log)

    def ended(self) -> int | None:
        """Return its exit code, -9 where it took too long, None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - self.begin < self.limit_s:
            return None
        self.kill()
        return -9

    def kill(self) -> None:
        """End it and what it started."""
        try:
            os.killpg(self.pid, 9)
        except ProcessLookupError:
            os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
