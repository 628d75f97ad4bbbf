"""A chain of aldm commands in one folder: each is noted when it is done, and a second start goes on where one stopped.

`aldm demo` and `aldm reproduce` are such chains.
"""

import importlib
import json
import os
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aldm.cli import JOBS
from aldm.errors import UserError
from aldm.files import atomic_path, check_folder
from aldm.run_folder import without_secrets
from pipelines.tracking_server import DATABASE_FILE, default_server

UNITS = (("years", 60 * 24 * 365.25), ("days", 60.0 * 24), ("h", 60.0), ("min", 1.0))
"""Names of times, and minutes in them."""
REPORT, SPLITS_FILE = "report.html", "splits.csv"
"""What a chain leaves for people in its folder, and whom it trains and tests on."""
SLOWEST = 3.0
"""A step takes 1 to 3 times what the throughput of a convolution promises (aldm.planner.measure_throughput)."""


@dataclass(frozen=True)
class Step:
    """One command of a chain.

    Attributes:
        title: what it does.
        command: the words after `aldm`.
        output: the file or folder it makes.
        budget_minutes: what it takes, about.
        again: the flag that goes on with, or replaces, an output that an interrupted start left.
        where: further words that say where it runs and do not change what it makes: another start may have others.
    """

    title: str
    command: list[str]
    output: Path
    budget_minutes: float
    again: str | None = "--overwrite"
    where: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The command without `where`: it says what the step makes."""
        return "aldm " + shlex.join(self.command)

    @property
    def typed(self) -> str:
        """The whole command as a user would type it, but for secrets in a URI."""
        return without_secrets("aldm " + shlex.join([*self.command, *self.where]))


@dataclass(frozen=True)
class Chain:
    """The folder of a chain.

    Attributes:
        out: the folder.
        file: name of the JSON file in it that says what the chain is made of and which steps are done.
        noun: what the chain is, for messages.
        settings: what its results depend on; it continues with the same ones only.
        spread: how many times its budget a step may take.
    """

    out: Path
    file: str
    noun: str
    settings: dict[str, Any]
    spread: float = 1.0

    @property
    def tracking_uri(self) -> str:
        """MLflow's server for all steps: that of the environment, or a file in the folder."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.out.resolve() / DATABASE_FILE}"

    def earlier_record(self, overwrite: bool) -> dict[str, Any] | None:
        """Return the record of the chain that is to go on in the folder; None where one starts from scratch.

        Raises:
            UserError: a chain made with other settings is there, or the folder cannot be made.
        """
        file = self.out / self.file
        if file.is_file() and not overwrite:
            record: dict[str, Any] = json.loads(file.read_text())
            before, now = record["settings"], self.settings
            if changed := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
                made, wanted = (", ".join(f"{name} {one.get(name)}" for name in changed) for one in (before, now))
                raise UserError(
                    f"{self.out} holds a {self.noun} made with {made}, wanted {wanted}: give another --out, or "
                    "--overwrite to start from scratch"
                )
            return record
        check_folder(self.out, overwrite, marker=self.file)
        return None

    def open(self, overwrite: bool, folders: Sequence[str] = ()) -> dict[str, Any]:
        """Make the folder with further folders in it, or go on with the chain that is there; return its record.

        Raises:
            UserError: as `earlier_record`.
        """
        record = self.earlier_record(overwrite)
        if record is not None:
            return record
        if self.out.exists():
            shutil.rmtree(self.out)
        for folder in (self.out, *(self.out / name for name in folders)):
            folder.mkdir()
        record = {"settings": self.settings, "steps": []}
        self._write(record)
        return record

    def run(self, steps: Sequence[Step], record: dict[str, Any]) -> None:
        """Run the steps that are not done yet, in this process.

        Raises:
            UserError: one of them failed, or as its job does.
        """
        with default_server(self.tracking_uri):
            for number, step in enumerate(steps, start=1):
                left = sum(each.budget_minutes for each in steps[number - 1 :] if not is_done(each, record))
                counter = f"[{number}/{len(steps)}, about {span(left, self.spread)} to go]"
                if is_done(step, record):
                    print(f"{counter} {step.title}: done before")
                    continue
                print(
                    f"{counter} {step.title} ({span(step.budget_minutes, self.spread)})\n  $ {step.typed}", flush=True
                )
                record["steps"].append(run_step(step))
                self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        with atomic_path(self.out / self.file, overwrite=True) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


def is_done(step: Step, record: dict[str, Any]) -> bool:
    """Whether an earlier start of the chain finished a step."""
    return any(done["command"] == step.line for done in record["steps"])


def run_step(step: Step) -> dict[str, Any]:
    """Run one command; return what is noted of it, its time and memory among it.

    Raises:
        UserError: it failed, or as its job does.
    """
    from aldm.memory import PeakMemory

    job, *arguments = step.command
    arguments += step.where
    if step.again is not None and step.output.exists():
        arguments.append(step.again)
    begin = time.monotonic()
    with PeakMemory() as memory:
        if importlib.import_module(JOBS[job][0]).main(arguments):
            raise UserError(f"the step failed: {step.typed}")
    seconds = time.monotonic() - begin
    print(f"  {seconds:.0f} s", flush=True)
    return {
        "title": step.title,
        "command": step.line,
        "budget_s": step.budget_minutes * 60,
        "seconds": round(seconds, 1),
        "peak_gb": round(memory.peak_bytes / 1e9, 2),
    }


def span(minutes: float, spread: float = 1.0) -> str:
    """Return a time in the unit that suits it, or a range up to `spread` times as much: 5 min, 3 to 9 h, 2 days."""
    most = minutes * spread
    unit, size = next((unit, size) for unit, size in UNITS if most >= 2 * size or size == 1)
    values = minutes / size, most / size
    digits = 0 if values[1] >= 9.95 or all(value == round(value) for value in values) else 1
    low, high = (f"{value:,.{digits}f}" for value in values)
    return f"{low} {unit}" if low == high else f"{low} to {high} {unit}"
