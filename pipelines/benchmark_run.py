"""How a benchmark runs: its folder, and its commands, each in a process of its own and none that is finished again."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from aldm.errors import UserError
from aldm.files import atomic_path
from pipelines.benchmark_plan import LOG, RECORD_FILE, Terms
from pipelines.ray_pool import WantedWorkers, open_workers

SETTINGS = "benchmark.json"
KILOBYTE = 1024
"""Unit of ru_maxrss."""


class Planned(Protocol):
    """What is run for one row of the table and one seed; all that it makes lies in `folder`."""

    @property
    def method(self) -> str:
        """Name of the row."""

    @property
    def seed(self) -> int:
        """Of the trainings."""

    @property
    def folder(self) -> Path:
        """Of everything that it makes."""

    def commands(self) -> list[tuple[str, ...]]:
        """Return the commands without `aldm`, in their order."""


P = TypeVar("P", bound=Planned)


def flags_of(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the configuration's flags for every training, absolute where they name a file."""
    preset = args.preset or "small"
    flags = ["--preset", str(Path(preset).absolute()) if Path(preset).suffix else preset]
    flags += [word for assignment in args.set for word in ("--set", assignment)]
    return (*flags, *(("--precision", args.precision) if args.precision else ()))


def run_all(entries: Sequence[Planned], terms: Terms, args: argparse.Namespace) -> None:
    """Run what is not finished yet, one after another or on the workers that --num-workers asks for.

    Raises:
        UserError: a command failed, no such cluster, or no tracking server.
    """
    from pipelines.tracking_server import EXPERIMENT, answering, connect, default_server, experiment_id, tracking_uri

    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri(terms.out / "runs")
    with answering(uri):  # once, before several trainings find no file and each makes one
        experiment_id(connect(uri), uri, EXPERIMENT)
    with open_workers(WantedWorkers.of(args), use_gpus=True) as workers, default_server(uri):
        run = Runner(uri, args.device)
        if workers is None:
            for number, entry in enumerate(entries, start=1):
                print(f"[{number}/{len(entries)}] {entry.method}, seed {entry.seed}", flush=True)
                run(entry)
        else:
            for _ in workers.map(run, entries, description="benchmark", unit="training"):
                pass


def finished(out: Path, names: Sequence[str], plan: Callable[[str, int], P]) -> list[P]:
    """Return what is finished in a benchmark's folder, that of earlier starts with other rows among it.

    Args:
        out: the folder.
        names: all rows that there are, in the order of the result.
        plan: name and seed -> what is run for it.
    """
    found = []
    for record in sorted(out.glob(f"*/seed-*/{RECORD_FILE}")):
        name, seed = record.parent.parent.name, int(record.parent.name.removeprefix("seed-"))
        if name not in names:  # of another version
            continue
        entry, done = plan(name, seed), json.loads(record.read_text())["done"]
        if all(" ".join(command) in done for command in entry.commands()):
            found.append(entry)
    return sorted(found, key=lambda entry: (entry.seed, names.index(entry.method)))


@dataclass(frozen=True)
class Runner:
    """Runs the commands of one entry, each in a process of its own; what was finished before is not run again."""

    tracking_uri: str
    device: str

    def __call__(self, entry: Planned) -> None:
        entry.folder.mkdir(parents=True, exist_ok=True)
        file = entry.folder / RECORD_FILE
        record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"done": {}}
        for command in entry.commands():
            line = " ".join(command)
            if line in record["done"]:
                continue
            record["done"][line] = self._run(command, entry)
            with atomic_path(file, overwrite=True) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n")

    def _run(self, command: Sequence[str], entry: Planned) -> dict[str, float]:
        """Run a command; return its seconds (those of the last start) and peak memory.

        Raises:
            UserError: it failed; the log has what it said.
        """
        words = [*command, *_again(command)]
        if command[0] in ("train", "encode", "evaluate"):
            words += ["--device", self.device]
        environment = os.environ | {"MLFLOW_TRACKING_URI": self.tracking_uri}
        log = entry.folder / LOG
        begin = time.monotonic()
        with log.open("ab") as stream:
            stream.write(f"$ aldm {' '.join(command)}\n".encode())
            stream.flush()
            code, peak_bytes = run_bound(words, stream, environment)
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-3:])
            raise UserError(f"{entry.method}, seed {entry.seed}: aldm {' '.join(command)} failed; {log} ends:\n{tail}")
        return {"seconds": time.monotonic() - begin, "peak_bytes": peak_bytes}


def run_bound(words: Sequence[str], stream: IO[bytes], environment: Mapping[str, str]) -> tuple[int, int]:
    """Run `aldm WORDS` in a process that ends with this one; return its exit code and its peak memory in bytes.

    Args:
        words: the job and its arguments.
        stream: a file that takes what it says.
        environment: of the process.
    """
    own = [sys.executable, "-m", "pipelines.bound", str(os.getpid()), *words]
    process = subprocess.Popen(own, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except BaseException:
        _end(process)
        raise
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * KILOBYTE


def _again(command: Sequence[str]) -> list[str]:
    """Return the flag with which a command that was interrupted is run again."""
    if command[0] == "train":
        run = Path(command[command.index("--run-dir") + 1])
        return ["--resume"] if (run / "last").exists() else ["--overwrite"] if run.exists() else []
    out = Path(command[command.index("--out") + 1])
    return ["--overwrite"] if out.exists() else []


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End a command that is no longer waited for: politely, so that it writes a checkpoint."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired, ChildProcessError):
        process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        process.kill()


def check_folder(out: Path, settings: dict[str, Any]) -> bool:
    """Return whether a benchmark is there that goes on.

    Raises:
        UserError: one with other settings, or a folder of something else.
    """
    file = out / SETTINGS
    if file.is_file():
        before = json.loads(file.read_text())
        if before != settings:
            raise UserError(
                f"{out} holds a benchmark with other settings ({before}), wanted {settings}: give another --out"
            )
        return True
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} holds something else than a benchmark: give another --out")
    return False


def open_folder(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a benchmark, unless it is there.

    Raises:
        UserError: as `check_folder`, or it cannot be made.
    """
    if check_folder(out, settings):
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}") from error
    with atomic_path(out / SETTINGS, overwrite=True) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
