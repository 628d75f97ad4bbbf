"""What tests look at in a training on Ray that is stopped: its committed checkpoint, its log, its processes."""

import contextlib
import json
from pathlib import Path

import psutil

END_S = 180.0
"""The longest wait for processes to end, on a machine that is busy with other things."""


def committed(folder: Path) -> int:
    """Return the step of the last checkpoint that Ray Train has committed in a run folder; 0 before the first."""
    snapshot = folder / "checkpoints" / "checkpoint_manager_snapshot.json"
    try:
        return int(json.loads(snapshot.read_text())["latest_checkpoint_result"]["metrics"]["step"])
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or being written
        return 0


def lines_until(folder: Path, step: int) -> list[str]:
    """Return the whole lines of metrics.jsonl up to a step, as they stand in it."""
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]


def losses(folder: Path) -> dict[int, float]:
    """Return the loss of every step; a step that is logged twice is a mistake."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = [(record["step"], record["ms-spade/loss"]) for record in records if "ms-spade/loss" in record]
    assert len(dict(found)) == len(found)
    return dict(found)


def command_of(process: psutil.Process) -> list[str]:
    """Return a process's command line; nothing if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def wait_for_end(started: list[psutil.Process], *, killed: bool) -> None:
    """Wait until what a driver has started has ended with it.

    Args:
        started: its children, from before its end.
        killed: by SIGKILL: nobody is left to end Ray's own agents, which hold nothing of the run; they are ended here.
    """
    agents = [process for process in started if killed and "agent" in " ".join(command_of(process)).lower()]
    _, alive = psutil.wait_procs([process for process in started if process not in agents], timeout=END_S)
    for process in agents:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert not alive, [command_of(process) for process in alive]
