"""`aldm benchmark`: train methods under one budget on one split, score them, and put them into one table."""

import argparse
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.errors import UserError
from aldm.files import atomic_path
from aldm.words import counted
from pipelines.arguments import JobParser, job_parser, resolve_config
from pipelines.benchmark_plan import BENCHMARKED, LOG, RECORD, Contest, Entry, check_methods, plan_entry
from pipelines.ray_workers import add_worker_arguments, open_workers

if TYPE_CHECKING:
    from aldm.config import Config
    from aldm.data.store import VolumeStore

logger = logging.getLogger(__name__)

DESCRIPTION = """Train methods under one time budget on one split, score them on the held-out subjects, and write one
table with the rows that keep a model honest, pictures side by side and MLflow runs under one parent. Started again with
the same --out it goes on where it stopped; more methods and seeds may be added then, and the table holds all."""
SETTINGS, TABLE = "benchmark.json", "benchmark.md"
KILOBYTE = 1024
"""Unit of ru_maxrss."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm benchmark ARGUMENTS`.

    Raises:
        UserError: everything that the user can mend; what is finished is kept.
    """
    args = _parser().parse_args(argv)
    check_methods(args.methods)
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}, wanted at least 1")
    if not args.budget > 0:
        raise UserError(f"--budget is {args.budget}, wanted minutes above 0")
    config = resolve_config(args)
    from aldm.data.store import VolumeStore

    store = VolumeStore.open(args.store.absolute())
    _check_pair(store, args.source, args.target)
    contest = Contest(
        args.store.absolute(),
        store.fingerprint,
        args.out.absolute(),
        (args.source, args.target),
        args.budget,
        _flags(args),
        None if args.vit_weights is None else args.vit_weights.absolute(),
    )
    entries = [plan_entry(method, seed, contest, config) for seed in range(args.seeds) for method in args.methods]
    hours = len(entries) * args.budget / 60
    print(f"{counted(len(entries), 'training')} of {args.budget:g} min: about {hours:.1f} h one after another")
    if args.dry_run:
        _check_folder(contest)
        print("\n".join(line for entry in entries for line in entry.describe()))
        return 0
    _open_folder(contest)
    from pipelines.tracking_server import EXPERIMENT, answering, connect, default_server, experiment_id, tracking_uri

    uri = os.environ.get("MLFLOW_TRACKING_URI") or tracking_uri(contest.out / "runs")
    with answering(uri):  # once, before several trainings find no file and each makes one
        experiment_id(connect(uri), uri, EXPERIMENT)
    with open_workers(args, use_gpus=True) as workers, default_server(uri):
        run = _Runner(uri, args.device)
        if workers is None:
            for number, entry in enumerate(entries, start=1):
                print(f"[{number}/{len(entries)}] {entry.method}, seed {entry.seed}", flush=True)
                run(entry)
        else:
            for _ in workers.map(run, entries, description="benchmark", unit="method"):
                pass
    from pipelines.benchmark_table import write_benchmark

    print(write_benchmark(contest, _finished(contest, config), store))
    print(f"\neverything: {args.out / TABLE}")
    return 0


def _finished(contest: Contest, config: "Config") -> list[Entry]:
    """Return what is finished in the contest's folder, those of earlier starts with other methods among it."""
    found = []
    for record in sorted(contest.out.glob(f"*/seed-*/{RECORD}")):
        method, seed = record.parent.parent.name, int(record.parent.name.removeprefix("seed-"))
        entry, done = plan_entry(method, seed, contest, config), json.loads(record.read_text())["done"]
        if all(" ".join(command) in done for command in entry.commands()):
            found.append(entry)
    return sorted(found, key=lambda entry: (entry.seed, BENCHMARKED.index(entry.method)))


@dataclass(frozen=True)
class _Runner:
    """Runs the commands of one entry, each in a process of its own; what was finished before is not run again."""

    tracking_uri: str
    device: str

    def __call__(self, entry: Entry) -> None:
        entry.folder.mkdir(parents=True, exist_ok=True)
        file = entry.folder / RECORD
        record: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"done": {}}
        for command in entry.commands():
            line = " ".join(command)
            if line in record["done"]:
                continue
            record["done"][line] = self._run(command, entry)
            with atomic_path(file, overwrite=True) as temporary:
                temporary.write_text(json.dumps(record, indent=1) + "\n")

    def _run(self, command: Sequence[str], entry: Entry) -> dict[str, float]:
        """Run a command; return its seconds (those of the last start) and peak memory.

        Raises:
            UserError: it failed; the log has what it said.
        """
        words = [sys.executable, "-m", "pipelines.bound", str(os.getpid()), *command, *_again(command)]
        if command[0] in ("train", "encode", "evaluate"):
            words += ["--device", self.device]
        environment = os.environ | {"MLFLOW_TRACKING_URI": self.tracking_uri}
        log = entry.folder / LOG
        begin = time.monotonic()
        with log.open("ab") as stream:
            stream.write(f"$ aldm {' '.join(command)}\n".encode())
            stream.flush()
            process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, env=environment)
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:
                _end(process)
                raise
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-3:])
            raise UserError(f"{entry.method}, seed {entry.seed}: aldm {' '.join(command)} failed; {log} ends:\n{tail}")
        return {"seconds": time.monotonic() - begin, "peak_bytes": usage.ru_maxrss * KILOBYTE}


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


def _check_pair(store: "VolumeStore", source: str, target: str) -> None:
    from aldm.data.modalities import check_modality

    check_modality("source", source, store.modalities)
    check_modality("target", target, store.modalities)
    if source == target:
        raise UserError(f"--source and --target are both {source}, wanted two different modalities")
    for split in ("train", "test"):
        if not any({source, target} <= set(record.modalities) for record in store.subjects(split)):
            raise UserError(f"the store {store.path} has no subject in the split {split} with {source} and {target}")


def _flags(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the configuration's flags for every training, absolute where they name a file."""
    preset = args.preset or "small"
    flags = ["--preset", str(Path(preset).absolute()) if Path(preset).suffix else preset]
    flags += [word for assignment in args.set for word in ("--set", assignment)]
    return (*flags, *(("--precision", args.precision) if args.precision else ()))


def _check_folder(contest: Contest) -> bool:
    """Return whether a benchmark is there that goes on.

    Raises:
        UserError: one with other settings, or a folder of something else.
    """
    file = contest.out / SETTINGS
    if file.is_file():
        before = json.loads(file.read_text())
        if before != _settings(contest):
            raise UserError(
                f"{contest.out} holds a benchmark with other settings ({before}), wanted {_settings(contest)}: give "
                "another --out"
            )
        return True
    if contest.out.exists() and any(contest.out.iterdir()):
        raise UserError(f"{contest.out} holds something else than a benchmark: give another --out")
    return False


def _open_folder(contest: Contest) -> None:
    if _check_folder(contest):
        return
    try:
        contest.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {contest.out} cannot be made: {error.strerror}") from error
    with atomic_path(contest.out / SETTINGS, overwrite=True) as temporary:
        temporary.write_text(json.dumps(_settings(contest), indent=1) + "\n")


def _settings(contest: Contest) -> dict[str, Any]:
    return {
        "store": str(contest.store),
        "store_fingerprint": contest.fingerprint,
        "pair": list(contest.pair),
        "minutes": contest.minutes,
        "flags": list(contest.flags),
        "vit_weights": None if contest.vit_weights is None else str(contest.vit_weights),
    }


def _parser() -> JobParser:
    parser = job_parser("benchmark", DESCRIPTION)
    parser.add_argument("--store", type=Path, required=True, help="store of volumes, from aldm prepare")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that the benchmark makes")
    parser.add_argument("--source", required=True, metavar="MODALITY", help="translate from this one")
    parser.add_argument("--target", required=True, metavar="MODALITY", help="into this one")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(BENCHMARKED),
        metavar="METHOD",
        help=f"of {', '.join(BENCHMARKED)} (default: all)",
    )
    parser.add_argument("--budget", type=float, default=10, metavar="MINUTES", help="training time of each method")
    parser.add_argument(
        "--vit-weights", type=Path, metavar="FILE", help="as of aldm train resvit (default: random, and said so)"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="trainings of each method, seeds 0 to N - 1")
    add_worker_arguments(parser, "a method with one seed")
    return parser
