"""Do the tests notice when a formula or a guard is broken? `make mutants` asks them, and writes docs/mutants.md.

One line of one module is changed at a time (operators.py, and by name in named.py), and the quick tests that should
notice are run until one fails. Changes that change nothing anybody could see are listed in equivalent.py.

Everything happens in a copy of the project. torch and the other packages are imported once; a mutant is a fork of that
process, which finds the changed source in place of the file's. A first run without change says which tests run which
lines, so that only those are asked. What was found is kept in build/mutants.json, so that a run that was stopped
(Ctrl-C) goes on; a change of the file or of its tests makes it ask again.
"""

import argparse
import ast
import fcntl
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from equivalent import EQUIVALENT
from harness import Child, Coverage, read, record, run_tests
from named import named_mutants
from operators import Mutant, mutants_of, span_of
from page import MOST_SURVIVE, Outcome, page, share_survived
from targets import NAMED_ONLY, TARGETS, tests_of

ROOT = Path(__file__).resolve().parents[2]
IN_COPY = "ALDM_MUTANTS_OF"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
SEED = 0


def main() -> int:
    """Run it; 0 if at most 5 % survive, 1 if more do."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="parts of file names; the page is not written then")
    parser.add_argument("--per-file", type=int, default=25, help="most changes of a file, drawn with a fixed seed")
    parser.add_argument("--workers", type=int, default=2, help="mutants at the same time")
    args = parser.parse_args()
    if IN_COPY not in os.environ:
        return in_a_copy()
    files = [file for file in TARGETS | NAMED_ONLY if any(part in file for part in args.only)]
    known = Known(Path(os.environ[IN_COPY]) / "build" / "mutants.json")
    outcomes: list[Outcome] = []
    wanted = {file: chosen(file, args.per_file) for file in files}
    progress = Progress(sum(map(len, wanted.values())))
    for file in files:
        outcomes += outcomes_of(file, wanted[file], known, args.workers, progress)
    text = page(outcomes, args.per_file)
    print(text)
    if args.only == [""]:
        (Path(os.environ[IN_COPY]) / "docs" / "mutants.md").write_text(text)
    return 0 if share_survived(outcomes) <= MOST_SURVIVE else 1


def in_a_copy() -> int:
    """Copy what git knows of the project and run there, so that nobody's edits get in between."""
    with alone(ROOT / "build"), tempfile.TemporaryDirectory(prefix="aldm-mutants-") as folder:
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (Path(folder) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, Path(folder) / name)
        script = Path(folder) / Path(__file__).resolve().relative_to(ROOT)
        environment = os.environ | ENVIRONMENT | {IN_COPY: str(ROOT), "PYTHONPATH": folder}
        process = subprocess.Popen([sys.executable, str(script), *sys.argv[1:]], cwd=folder, env=environment)
        previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal has told the other process, too
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, previous)


@contextmanager
def alone(build: Path) -> Iterator[None]:
    """Keep a second run out, which would write what it has found over what this one has."""
    build.mkdir(exist_ok=True)
    with (build / "mutants.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            words = "another make mutants runs in this checkout: wait for it, or use another checkout"
            raise SystemExit(words) from None
        yield


def chosen(file: str, per_file: int) -> list[tuple[str, Mutant]]:
    """Return the mutants of a file with their names: those of the table, and some of all others."""
    named = [(name, mutant) for name, mutant in named_mutants() if mutant.file == file]
    if file not in TARGETS:
        return named
    sources = {mutant.source for _, mutant in named}
    others = [mutant for mutant in mutants_of(file, Path(file).read_text()) if mutant.source not in sources]
    drawn = random.Random(SEED).sample(others, min(per_file, len(others)))
    return named + [("", mutant) for mutant in sorted(drawn, key=lambda one: one.line)]


def outcomes_of(
    file: str, mutants: list[tuple[str, Mutant]], known: "Known", workers: int, progress: "Progress"
) -> Iterator[Outcome]:
    """Yield what became of the mutants of a file."""
    tests = tests_of(file)
    keys = {mutant.source: known.key(mutant, tests) for _, mutant in mutants}
    asked = [
        mutant for _, mutant in mutants if keys[mutant.source] not in known and (file, mutant.change) not in EQUIVALENT
    ]
    if asked:
        coverage = covered(file, tests)
        for mutant, noticed in asked_of(asked, coverage, workers):
            known.add(keys[mutant.source], noticed)
            progress.asked(file, mutant, noticed)
    progress.skip(len(mutants) - len(asked))
    for name, mutant in mutants:
        reason = EQUIVALENT.get((file, mutant.change), "")
        yield Outcome(mutant, name, not reason and known[keys[mutant.source]], reason)


def covered(file: str, tests: list[str]) -> Coverage:
    """Run the tests on the file as it is, and import here what they import of others."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "coverage.json", Path(folder) / "log"
        child = Child(lambda: record(file, tests, out), log, limit_s=1200)
        while (code := child.ended()) is None:
            time.sleep(0.05)
        if code:
            raise SystemExit(f"{' '.join(tests)} fail without any change, exit code {code}:\n{log.read_text()}")
        coverage = read(out)
    for name in coverage.modules:
        try:
            importlib.import_module(name)
        except Exception:  # noqa: BLE001 one that cannot be imported here is imported by the tests
            continue
    return coverage


def asked_of(mutants: list[Mutant], coverage: Coverage, workers: int) -> Iterator[tuple[Mutant, bool]]:
    """Yield whether the tests notice, `workers` mutants at a time."""
    tree = ast.parse(Path(mutants[0].file).read_text())
    waiting, running = list(reversed(mutants)), list[tuple[Mutant, Child]]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    mutant = waiting.pop()
                    tests = coverage.tests_for(*span_of(tree, mutant.line))
                    if not tests:
                        yield mutant, False
                        continue
                    limit_s = 20 + 3 * sum(coverage.tests[test] for test in tests)
                    log = Path(folder) / f"{len(waiting)}"
                    work = partial(run_tests, mutant.file, mutant.source, tests)
                    running.append((mutant, Child(work, log, limit_s)))
                for mutant, child in list(running):
                    code = child.ended()
                    if code is not None:
                        running.remove((mutant, child))
                        yield mutant, code != 0
                time.sleep(0.02)
        finally:
            for _, child in running:
                child.kill()


class Known:
    """What earlier runs found: whether the tests notice a changed file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._noticed: dict[str, bool] = json.loads(path.read_text()) if path.is_file() else {}

    def key(self, mutant: Mutant, tests: list[str]) -> str:
        """Return a hash of the changed file and of its tests."""
        parts = [mutant.file, mutant.source, *(Path(test).read_text() for test in tests)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]

    def __contains__(self, key: str) -> bool:
        return key in self._noticed

    def __getitem__(self, key: str) -> bool:
        return self._noticed[key]

    def add(self, key: str, noticed: bool) -> None:
        """Keep it, also if the next one is never reached, or this one is not written to its end."""
        self._noticed[key] = noticed
        self._path.parent.mkdir(exist_ok=True)
        whole = self._path.with_suffix(".part")
        whole.write_text(json.dumps(self._noticed))
        whole.replace(self._path)


class Progress:
    """Says how far it is and how long it will take."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._asked = total, 0, 0
        self._begin = time.monotonic()

    def skip(self, count: int) -> None:
        """Take note of mutants that need not be asked about."""
        self._done += count

    def asked(self, file: str, mutant: Mutant, noticed: bool) -> None:
        """Take note of one, and show it."""
        self._done, self._asked = self._done + 1, self._asked + 1
        left_s = (time.monotonic() - self._begin) / self._asked * (self._total - self._done)
        what = "noticed " if noticed else "SURVIVED"
        place = f"[{self._done}/{self._total}, {left_s / 60:.0f} min left]"
        print(f"{place} {what} {file}:{mutant.line}: {mutant.change}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
