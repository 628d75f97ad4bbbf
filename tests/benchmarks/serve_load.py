"""Load on the translation service: many clients at once against a short queue, on one machine.

    python tests/benchmarks/serve_load.py [--write]

Starts `aldm serve` with the built-in model and its default queue of 8, sends it the same head from 64 clients at once,
several rounds of it, and reads every result. Printed: what was answered, how soon, and the memory of all processes of
the service (PSS: a page that n processes share counts 1/n in each), before, at most and after. --write puts that into
docs/serving.md. The exit code is 1 if an answer was neither 202 nor 503, an accepted job did not finish, or a result is
not that of `aldm translate`.
"""

import argparse
import contextlib
import gzip
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from service import RunningService

from aldm.cli import main as aldm
from aldm.default_model import default_model

CLIENTS, ROUNDS = 64, 3
TOLERANCE = 1e-4
"""Largest difference to `aldm translate`, as a share of the range: another number of threads rounds otherwise."""
PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "serving.md"
BEGIN, END = "<!-- load: begin -->\n", "<!-- load: end -->"
GB = 1e9


@dataclass
class Memory:
    """The memory of a service's processes, read again and again in the background."""

    service: RunningService
    readings: list[float] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def read(self) -> float:
        """Return the sum of PSS, bytes."""
        total = 0.0
        for process in self.service.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total

    def __enter__(self) -> "Memory":
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.3):
            self.readings.append(self.read())


def main() -> int:
    """Measure, print, and where it is asked for write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/serving.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines, failures = measure(Path(folder))
    print("\n".join(lines))
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    if args.write and not failures:
        text = PAGE.read_text()
        before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        PAGE.write_text(before + "\n".join(lines) + "\n" + after)
    return 1 if failures else 0


def measure(folder: Path) -> tuple[list[str], list[str]]:
    """Return the lines of the table, and what went wrong."""
    with RunningService(default_model(), folder / "work") as service:
        scan = folder / "sub-01_T1w.nii.gz"
        scan.write_bytes(service.client.get("/v1/example").content)
        by_hand = folder / "t2.nii.gz"
        words = ["translate", scan, by_hand, "--model", default_model(), "--source", "t1", "--target", "t2"]
        assert aldm([str(word) for word in words]) == 0
        wanted = _image(by_hand.read_bytes())
        service.wait(service.submit(scan, source="t1", target="t2"))
        memory = Memory(service)
        idle = memory.read()
        answers: list[tuple[int, float, Any]] = []
        failures: list[str] = []
        begin = time.monotonic()
        with memory, ThreadPoolExecutor(CLIENTS) as pool:
            for _ in range(ROUNDS):
                found = list(pool.map(lambda _: _one(service, scan), range(CLIENTS)))
                answers += found
                failures += _finish(service, [job for code, _, job in found if code == 202], wanted)
        seconds = time.monotonic() - begin
        time.sleep(2)
        after = memory.read()
    taken = [took for code, took, _ in answers if code == 202]
    sent_away = [took for code, took, _ in answers if code == 503]
    failures += [f"an answer {code}" for code, _, _ in answers if code not in (202, 503)]
    shape = " x ".join(map(str, wanted.shape))
    return [
        f"{CLIENTS} clients at once, {ROUNDS} rounds, a head of {shape} voxels, the built-in model, two CPU cores:",
        "",
        "| | |",
        "|---|---|",
        f"| requests | {len(answers)} |",
        f"| answered 202 | {len(taken)}, after {_spread(taken)} |",
        f"| answered 503 | {len(sent_away)}, after {_spread(sent_away)} |",
        f"| answered otherwise | {len(answers) - len(taken) - len(sent_away)} |",
        f"| accepted jobs finished with the result of `aldm translate` | {len(taken) - len(failures)} |",
        f"| translations per minute | {60 * len(taken) / seconds:.0f} |",
        f"| memory of all processes before, at most, after | {idle / GB:.2f}, {max(memory.readings) / GB:.2f}, "
        f"{after / GB:.2f} GB |",
    ], failures


def _one(service: RunningService, scan: Path) -> tuple[int, float, Any]:
    """Send one request; return status, seconds, and what was answered."""
    begin = time.monotonic()
    answer = service.post("/v1/translations", scan, source="t1", target="t2")
    return answer.status_code, time.monotonic() - begin, answer.json()


def _finish(service: RunningService, jobs: list[Any], wanted: np.ndarray) -> list[str]:
    """Wait for jobs and compare their results; return what went wrong."""
    failures = []
    for job in jobs:
        state = service.wait(job)["state"]
        if state != "done":
            failures.append(f"job {job['id']} is {state}")
            continue
        difference = np.abs(_image(service.result(job, "t2")) - wanted).max()
        if difference > TOLERANCE * np.ptp(wanted):
            failures.append(f"the result of job {job['id']} differs by {difference:g}")
    return failures


def _image(content: bytes) -> np.ndarray:
    return np.asarray(nibabel.Nifti1Image.from_bytes(gzip.decompress(content)).dataobj, np.float32)


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.1f} s (median), {max(values):.1f} s (longest)"


if __name__ == "__main__":
    sys.exit(main())
