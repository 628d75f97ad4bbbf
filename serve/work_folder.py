"""The work folder: made for its owner alone, locked, and never swept of what the service did not make.

`jobs/ID/` holds the jobs, `incoming/` what is arriving, `models/` a registered model, `service.json` says that the
folder is a service's and how that one was set up last.
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Container
from pathlib import Path
from typing import IO, Any

from aldm.errors import UserError
from serve.records import is_id, write_synced

MARKER = "service.json"
JOBS, INCOMING, MODELS = "jobs", "incoming", "models"


def locked(folder: Path) -> IO[str]:
    """Make the work folder where it is missing and take its lock, which goes with the process.

    Raises:
        UserError: it cannot be written to, is somebody else's, or another service has it.
    """
    check_ours(folder)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        stream = (folder / ".lock").open("w")
        _lock(stream, folder)
        if not (folder / MARKER).exists():
            write_synced(folder / MARKER, "{}")
        for name in (JOBS, INCOMING):
            (folder / name).mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise UserError(f"--work-dir {folder} cannot be used: {error.strerror}") from error
    return stream


def check_ours(folder: Path) -> None:
    """Refuse a folder that holds things of the names that the service writes and clears, and is not a service's.

    Raises:
        UserError: so, or it is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--work-dir {folder} is a file, wanted a folder")
    found = [name for name in (JOBS, INCOMING) if (folder / name).exists()]
    if found and not (folder / MARKER).is_file():
        raise UserError(
            f"--work-dir {folder} holds {' and '.join(found)} that no translation service made (there is no {MARKER}): "
            "give the service a folder of its own"
        )


def check_free(folder: Path) -> None:
    """See what `locked` would say, and make nothing.

    Raises:
        UserError: as `locked`.
    """
    check_ours(folder)
    with contextlib.suppress(FileNotFoundError), (folder / ".lock").open() as stream:
        _lock(stream, folder)


def _lock(stream: IO[str], folder: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"--work-dir {folder} is in use by another service: give this one another folder") from error


def read_setup(folder: Path) -> dict[str, Any]:
    """Return what `write_setup` wrote; empty where there is nothing."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / MARKER).read_text())
        if isinstance(found, dict):
            return found
    return {}


def write_setup(folder: Path, **values: Any) -> None:
    """Keep how the service is set up, for a job store that is started again."""
    write_synced(folder / MARKER, json.dumps(values))


def sweep(jobs: Path, known: Container[str], before: float) -> None:
    """Remove folders of uploads that led to no job: their ingress died.

    Args:
        jobs: where the jobs are.
        known: ids of jobs.
        before: only what nobody has written to since then, seconds since the epoch.
    """
    for folder in jobs.iterdir():
        with contextlib.suppress(FileNotFoundError):
            if folder.name not in known and is_id(folder.name) and folder.stat().st_mtime < before:
                shutil.rmtree(folder, ignore_errors=True)


def bytes_in(folder: Path) -> int:
    """Return the size of all files of a folder, whatever disappears meanwhile."""
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def bytes_beside_jobs(folder: Path) -> int:
    """Return the size of what the service keeps beside its jobs: models, the example, uploads that are arriving."""
    with contextlib.suppress(OSError):
        return (
            bytes_in(folder / MODELS)
            + bytes_in(folder / INCOMING)
            + sum(file.stat().st_size for file in folder.glob("example_*") if file.is_file())
        )
    return 0
