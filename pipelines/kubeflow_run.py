"""How a step of the pipeline is run: in its own process or as a job of a Ray cluster; begun, gone on with, or skipped.

A step that was stopped or failed is run again so that it goes on: trainings with --resume, `aldm prepare` as it is, the
others with --overwrite. A job on a cluster outlives the step that submitted it where that is killed (its pod's node is
lost, say): so its id is noted before it is submitted, and the next start of the step follows the job that still runs
instead of submitting a second one beside it.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from aldm.cli import EXIT_INTERRUPTED, EXIT_TERMINATED, EXIT_USER_ERROR, Terminated, with_flags
from aldm.errors import UserError
from aldm.files import atomic_path
from pipelines.kubeflow_steps import (
    ON_RAY,
    SETTINGS,
    STEPS,
    Parameters,
    check,
    check_parameters,
    commands,
    goes_on,
    has_begun,
    is_done,
    line_of,
    made_of,
    read_step,
    result_of,
)
from pipelines.ray_jobs import LIVE, SUCCEEDED, RayJob

END_WAIT_S = 60.0
"""For so long a command that is no longer waited for may write its last checkpoint."""


def step(name: str, parameters: dict[str, Any]) -> Parameters:
    """Run a step in its pod, as `run_step`, and return the parameters; see `_explained`."""
    with _explained():
        p = Parameters.of(parameters)
        run_step(name, p)
        return p


def checked(parameters: dict[str, Any]) -> Parameters:
    """Return parameters that can work, whatever the storage holds, in a pod; see `_explained`."""
    with _explained():
        p = Parameters.of(parameters)
        check_parameters(p)
        return p


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Let what the user can fix end the process with one line and exit code 2, and what ended it with its own code."""
    try:
        yield
    except UserError as error:
        print(f"pipeline: {with_flags(str(error))}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_USER_ERROR) from error
    except KeyboardInterrupt as stop:
        raise SystemExit(EXIT_TERMINATED if isinstance(stop, Terminated) else EXIT_INTERRUPTED) from stop


def run_step(step: str, p: Parameters) -> None:
    """Run the command of a step, go on with it where it was stopped, or leave it where it is done.

    Raises:
        UserError: the command failed; the record keeps the last line that it printed.
    """
    check(p)
    words = commands(p)[step]
    if words is None:
        print(f"{step}: nothing to do", flush=True)
        return
    if _followed(step, p):
        return
    if is_done(step, p):
        print(f"{step}: done before, {result_of(step, p)}", flush=True)
        return
    begun = bool(read_step(step, p))
    _open(p)
    words = (*words, *(_again(step, p) if begun else ()))
    print(f"$ aldm {' '.join(words)}", flush=True)
    begin = time.time()
    job = RayJob(p.ray_address, f"{step}-{secrets.token_hex(4)}") if p.ray_address and step in ON_RAY else None
    _note(step, p, state="running", begun=begin, **({} if job is None else {"job": vars(job)}))
    _finish(step, p, begin, *(_run(words, p) if job is None else _run_on_ray(job, words, p)))


def _followed(step: str, p: Parameters) -> bool:
    """Follow the job of an earlier start that was killed, to its end; return False where none runs any more.

    Raises:
        UserError: the job failed, or its cluster does not say whether it runs.
    """
    record = read_step(step, p)
    if record.get("state") != "running" or "job" not in record:
        return False
    job = RayJob(**record["job"])
    try:
        state = job.state()
    except UserError as error:
        raise UserError(
            f"{step} was submitted as the job {job.id}, which may still run: {error}. Start again when it answers; if "
            f"that cluster is gone for good, remove {p.folder / STEPS / step}.json first"
        ) from error
    if state in LIVE and record["command"] != line_of(step, p):
        print(f"{step}: the job {job.id} runs another command and is stopped", flush=True)
        job.stop(END_WAIT_S)
        return False
    if state in LIVE:
        print(f"{step}: the job {job.id} of an earlier start runs still: following it", flush=True)
        _finish(step, p, record["begun"], *_run_on_ray(job, None, p))
        return True
    if state == SUCCEEDED and record["command"] == line_of(step, p):
        print(f"{step}: the job {job.id} of an earlier start has succeeded meanwhile", flush=True)
        _finish(step, p, record["begun"], 0, "")
        return is_done(step, p)
    return False


def _finish(step: str, p: Parameters, begin: float, code: int, last: str) -> None:
    """Note how a step ended.

    Raises:
        UserError: it failed.
    """
    seconds = round(time.time() - begin, 1)
    if code:
        _note(step, p, state="failed", begun=begin, seconds=seconds, message=last)
        raise UserError(f"{step}: aldm {line_of(step, p).split()[1]} ended with code {code}: {last}")
    _note(step, p, state="done", begun=begin, seconds=seconds)


def _again(step: str, p: Parameters) -> tuple[str, ...]:
    """Return the flag with which a step that began before is run again."""
    if step.startswith("train-"):
        return ("--resume",) if goes_on(step, p) else ("--overwrite",)
    return ("--overwrite",) if step in ("simulate", "encode", "export", "evaluate") else ()


def _open(p: Parameters) -> None:
    """Make the run's folder."""
    if has_begun(p):
        return
    try:
        (p.folder / STEPS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{p.folder} cannot be made: {error.strerror}") from error
    with atomic_path(p.folder / SETTINGS, overwrite=True) as temporary:
        temporary.write_text(json.dumps(made_of(p), indent=1) + "\n")


def _note(step: str, p: Parameters, **values: Any) -> None:
    record = {"command": line_of(step, p), "num_workers": p.num_workers, **values}
    with atomic_path(p.folder / STEPS / f"{step}.json", overwrite=True) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n")


def _environment(p: Parameters) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": p.server}


class _Shown:
    """Prints what a command prints, and keeps the last line that is not empty."""

    def __init__(self) -> None:
        self.last = ""

    def __call__(self, text: str) -> None:
        print(text, end="", flush=True)
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        self.last = lines[-1] if lines else self.last


def _run(words: Sequence[str], p: Parameters) -> tuple[int, str]:
    """Run an `aldm` command in a process of its own, show what it prints, and return its exit code and last line."""
    show = _Shown()
    with _sigterm_raised():
        process = subprocess.Popen(
            [sys.executable, "-m", "aldm.cli", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | _environment(p),
            text=True,
            errors="replace",
            process_group=0,  # Ctrl-C of a terminal reaches it once, from here
        )
        try:
            assert process.stdout is not None
            for line in process.stdout:
                show(line)
            return process.wait(), show.last
        finally:
            if process.poll() is None:
                _end(process)


def _run_on_ray(job: RayJob, words: Sequence[str] | None, p: Parameters) -> tuple[int, str]:
    """Run an `aldm` command as a job, show what it prints, and return its exit code and last line.

    Where this process is told to end, the job ends with it.

    Args:
        job: has not been submitted, or runs already.
        words: after `aldm`; None where it runs already.
        p: the parameters.
    """
    show = _Shown()
    with _sigterm_raised():
        try:
            if words is not None:
                job.submit(("aldm", *words), _environment(p))
            code, message = job.follow(show)
            return code, show.last or message
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            job.stop(END_WAIT_S)
            raise


@contextlib.contextmanager
def _sigterm_raised() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in the block."""

    def terminate(*_: object) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end(process: "subprocess.Popen[str]") -> None:
    """End a command that is no longer waited for; a second SIGTERM does not hurry it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(END_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
