"""The work folder: made for its owner alone, locked, and never swept of what the service did not make.

`jobs/ID/` holds the jobs, `incoming/` what is arriving, `models/` a registered model, `service.json` says that the
folder is a service's and how that one was set up last.
"""

import contextlib
import fcntl
import json
import shutil
from collections.abc import Container, Iterator
from pathlib import Path
from typing import IO, Any

from aldm.errors import UserError
from serve.records import JOB_FILE, Job, is_id, read_record, write_record, write_synced

MARKER = "service.json"
JOBS, INCOMING, MODELS = "jobs", "incoming", "models"
SWEEP_S = 60.0
"""How often the folder is looked through for what belongs to no job."""


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


class JobFolders:
    """The folders of all jobs, and how large everything in the work folder is."""

    def __init__(self, folder: Path) -> None:
        """Look at a work folder that is locked."""
        self.folder = folder / JOBS
        self._work = folder
        self._sizes: dict[str, int] = {}
        self._beside, self._swept = 0, 0.0

    def records(self) -> Iterator[Job]:
        """Yield the jobs that are there."""
        for folder in sorted(self.folder.iterdir()):
            job = read_record(folder)
            if job is not None:
                self.measure(job)
                yield job

    def save(self, job: Job) -> None:
        """Write a job's record."""
        write_record(self.folder / job.id, job)

    def measure(self, job: Job) -> None:
        """See how large a job's folder is."""
        self._sizes[job.id] = _bytes_in(self.folder / job.id)

    def clear(self, job: Job) -> None:
        """Remove a job's volumes; its record stays."""
        for file in (self.folder / job.id).glob("*"):
            if file.name != JOB_FILE:
                shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)

    def remove(self, job: Job) -> None:
        """Remove a job's folder."""
        shutil.rmtree(self.folder / job.id, ignore_errors=True)
        self._sizes.pop(job.id, None)

    @property
    def bytes(self) -> int:
        """Size of everything."""
        return sum(self._sizes.values()) + self._beside

    @property
    def free_bytes(self) -> int:
        """What the disk has left."""
        return shutil.disk_usage(self.folder).free

    def sweep(self, known: Container[str], now: float, older_s: float) -> None:
        """Remove, now and then, what uploads left whose ingress died, and see how large all else is.

        Args:
            known: ids of jobs.
            now: seconds since the epoch.
            older_s: nobody has written to what goes for so long.
        """
        if now - self._swept < SWEEP_S:
            return
        self._swept = now
        for folder in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if folder.name not in known and is_id(folder.name) and folder.stat().st_mtime < now - older_s:
                    shutil.rmtree(folder, ignore_errors=True)
        beside = [self._work / MODELS, self._work / INCOMING, *self._work.glob("example_*")]
        self._beside = sum(map(_bytes_in, beside))


def _bytes_in(path: Path) -> int:
    """Return the size of a file, or of all files of a folder, whatever disappears meanwhile."""
    total = 0
    for file in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):
            total += file.stat().st_size if file.is_file() else 0
    return total
