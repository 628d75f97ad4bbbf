"""The jobs of the service: what is asked for, who works on it, where it stands. Kept in memory and on disk.

`JobStore` runs as one named actor. Every change of a job is written to `WORK_DIR/jobs/ID/job.json` before anybody hears
of it, so a store that is killed and started again knows every job. A worker claims jobs for as long as it says every
few seconds that it lives; when it stops doing so the job goes back to the head of the queue.
"""

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from aldm.errors import UserError
from serve.problems import Problem, busy
from serve.settings import Settings

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
FINISHED = (DONE, FAILED, CANCELLED)
JOB_FILE = "job.json"
LEASE_S = 10.0
"""A worker that is silent for so long is dead."""
TICKET_S = 900.0
"""An upload that takes longer has lost its place."""
MAX_ATTEMPTS = 3
"""A job whose worker dies so often is not tried again: it may be what kills them."""
SECONDS_EDGES = (1, 2, 5, 10, 30, 60, 120, 300, 900)
"""Upper edges of the histogram of a job's seconds."""


@dataclass
class Job:
    """One translation request; times are seconds since the epoch."""

    id: str
    owner: str
    """Name of the token that made it."""
    source: str
    source_from: str
    """request, file name or header."""
    targets: list[str]
    sampler: str | None
    num_inference_steps: int
    num_samples: int
    eta: float
    seed: int
    format: str
    model: dict[str, str]
    """name and hash."""
    state: str = QUEUED
    progress: float = 0.0
    attempt: int = 0
    """How often a worker has begun it."""
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    error: dict[str, Any] | None = None

    def batch_key(self) -> tuple[Any, ...]:
        """Jobs of the same key can be made in one pass: volumes all lie on the model's grid, so shapes are equal."""
        return (self.sampler, self.num_inference_steps, self.num_samples, self.eta, self.model["hash"])


@dataclass
class _Lease:
    worker: str
    """Empty after a restart of the store, until the worker says that the job is its own."""
    until: float
    cancelled: bool = False

    def belongs_to(self, worker: str) -> bool:
        """Whether the worker holds this; the first who asks takes one that nobody holds."""
        self.worker = self.worker or worker
        return self.worker == worker


class JobStore:
    """The queue and all jobs; made for one thread."""

    def __init__(self, settings: Settings) -> None:
        """Read what is in the work folder and take its lock.

        Raises:
            UserError: the folder cannot be used, or another service uses it.
        """
        self.settings = settings
        self.folder = settings.folder / "jobs"
        self._lock = locked(settings.folder)
        self._jobs: dict[str, Job] = {}
        self._queue: list[str] = []
        self._leases: dict[str, _Lease] = {}
        self._tickets: dict[str, float] = {}
        self._sizes: dict[str, int] = {}
        self._totals: Counter[str] = Counter()
        self._durations: list[float] = []
        self._histogram: Counter[float] = Counter()
        self._seconds = 0.0
        self._draining = False
        self._workers: dict[str, float] = {}
        self._recover()

    # ------------------------------------------------------------------------------------------------ for the ingress

    def reserve(self) -> str:
        """Return a ticket for one upload.

        Raises:
            Problem: 503, the queue is full, the folder is full, or the service is about to stop.
        """
        self._expire()
        if self._draining:
            raise busy("the service is about to stop and takes no new jobs", 30)
        if len(self._queue) + len(self._tickets) >= self.settings.max_queue:
            raise busy(f"the queue is full ({self.settings.max_queue} jobs)", self._expected_wait())
        if not self._make_room(3 * self.settings.max_upload_bytes):
            raise busy(f"the service's folder ({self.settings.max_folder_gb:g} GB) is full of unfinished jobs", 60)
        ticket = secrets.token_hex(8)
        self._tickets[ticket] = time.time() + TICKET_S
        return ticket

    def release(self, ticket: str) -> None:
        """Give a ticket back that led to no job."""
        self._tickets.pop(ticket, None)

    def submit(self, ticket: str, job: Job) -> dict[str, Any]:
        """Queue a job whose files lie in `jobs/ID`; return its view. The same job a second time changes nothing."""
        if job.id not in self._jobs:
            if self._tickets.pop(ticket, None) is None and len(self._queue) >= self.settings.max_queue:
                raise busy("the upload took too long and lost its place", 5)
            self._save(job)
            self._jobs[job.id] = job
            self._sizes[job.id] = _size(self.folder / job.id)
            self._queue.append(job.id)
            self._totals["accepted"] += 1
        return self.view(job)

    def get(self, job_id: str, owner: str) -> dict[str, Any]:
        """Return the view of a job.

        Raises:
            Problem: 404, there is none, or another token made it.
        """
        self._expire()
        return self.view(self._of(job_id, owner))

    def cancel(self, job_id: str, owner: str) -> None:
        """Cancel an unfinished job, forget a finished one.

        Raises:
            Problem: 404, as `get`.
        """
        job = self._of(job_id, owner)
        if job.state in FINISHED:
            self._forget(job)
            return
        lease = self._leases.get(job_id)
        if lease is not None:
            lease.cancelled = True
        self._finish(job, CANCELLED)

    def view(self, job: Job) -> dict[str, Any]:
        """Return what the client sees of a job; times in seconds since the epoch."""
        values = asdict(job)
        waiting = job.id in self._queue
        values["queue_position"] = self._queue.index(job.id) if waiting else None
        values["expires"] = None if job.finished is None else job.finished + 3600 * self.settings.keep_hours
        return values

    # ------------------------------------------------------------------------------------------------ for the workers

    def claim(self, worker: str, count: int) -> list[Job]:
        """Lend a worker the job at the head of the queue, and up to count - 1 that can be made with it."""
        self._workers[worker] = time.time()
        self._expire()
        if self._draining or not self._queue:
            return []
        key = self._jobs[self._queue[0]].batch_key()
        chosen = [job_id for job_id in self._queue if self._jobs[job_id].batch_key() == key][:count]
        jobs = [self._jobs[job_id] for job_id in chosen]
        for job in jobs:
            self._queue.remove(job.id)
            self._leases[job.id] = _Lease(worker, time.time() + LEASE_S)
            job.state, job.attempt, job.progress = RUNNING, job.attempt + 1, 0.0
            job.started = time.time()
            self._save(job)
        return jobs

    def beat(self, worker: str, progress: dict[str, float]) -> list[str]:
        """Renew a worker's leases, note how far its jobs are (0 to 1), and return those that it has to stop."""
        self._workers[worker] = time.time()
        stop = []
        for job_id, done in progress.items():
            job, lease = self._jobs.get(job_id), self._leases.get(job_id)
            if job is None or lease is None or not lease.belongs_to(worker) or lease.cancelled:
                stop.append(job_id)
                continue
            lease.until = time.time() + LEASE_S
            job.progress = max(job.progress, min(done, 1.0))
        return stop

    def finish(self, worker: str, job_id: str, error: dict[str, Any] | None = None) -> None:
        """End a job of a worker: done, or failed with a problem; what is no longer the worker's stays as it is."""
        job, lease = self._jobs.get(job_id), self._leases.get(job_id)
        if job is None or lease is None or not lease.belongs_to(worker):
            return
        if job.state == RUNNING:
            job.error = error
            self._finish(job, DONE if error is None else FAILED)
        else:
            self._clear(job)  # cancelled while the worker wrote
        self._leases.pop(job_id, None)

    # -------------------------------------------------------------------------------------------------- for operators

    def configure(self, settings: dict[str, Any]) -> None:
        """Take the limits of a service that was deployed again.

        Raises:
            Problem: 500, its work folder is another one.
        """
        wanted = Settings(**settings)
        if wanted.folder != self.settings.folder:
            raise Problem(500, f"this cluster runs a service in {self.settings.folder} already; end that one first")
        self.settings, self._draining = wanted, False

    def drain(self) -> int:
        """Take no new job and start none; return how many are running. What is queued waits for the next start."""
        self._draining = True
        self._expire()
        return sum(job.state == RUNNING for job in self._jobs.values())

    def counts(self) -> dict[str, Any]:
        """Return the numbers behind /metrics and the health checks."""
        self._expire()
        return {
            "queued": len(self._queue),
            "uploading": len(self._tickets),
            "running": sum(job.state == RUNNING for job in self._jobs.values()),
            "totals": dict(self._totals),
            "histogram": [(edge, self._histogram[edge]) for edge in (*SECONDS_EDGES, float("inf"))],
            "seconds": self._seconds,
            "folder_bytes": sum(self._sizes.values()),
            "draining": self._draining,
            "workers": len(self._workers),
        }

    def pid(self) -> int:
        """Return the id of the process that this runs in."""
        return os.getpid()

    # ---------------------------------------------------------------------------------------------------------- inside

    def _of(self, job_id: str, owner: str) -> Job:
        job = self._jobs.get(job_id)
        if job is None or job.owner != owner:
            raise Problem(404, "there is no such translation; it may have expired, or another token made it")
        return job

    def _recover(self) -> None:
        """Read the jobs of the work folder; what was running may still be: its worker has a lease's time to say so."""
        self.folder.mkdir(exist_ok=True)
        now = time.time()
        for folder in sorted(self.folder.iterdir()):
            job = _read(folder)
            if job is None:
                if now - folder.stat().st_mtime > TICKET_S:
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            self._jobs[job.id] = job
            self._sizes[job.id] = _size(folder)
            if job.state == RUNNING:
                self._leases[job.id] = _Lease("", now + LEASE_S)
        self._queue = [job.id for job in self._by_age(QUEUED)]

    def _by_age(self, *states: str) -> list[Job]:
        return sorted((job for job in self._jobs.values() if job.state in states), key=lambda job: job.created)

    def _expire(self) -> None:
        """Take back what silent workers hold, and forget what is too old."""
        now = time.time()
        self._workers = {worker: seen for worker, seen in self._workers.items() if now - seen < LEASE_S}
        self._tickets = {ticket: until for ticket, until in self._tickets.items() if until > now}
        for job_id, lease in list(self._leases.items()):
            if lease.until > now:
                continue
            del self._leases[job_id]
            job = self._jobs.get(job_id)
            if job is None or job.state != RUNNING:
                continue
            self._totals["retried"] += 1
            if job.attempt >= MAX_ATTEMPTS:
                problem = Problem(500, f"the worker died {job.attempt} times on this job; it is not tried again")
                job.error = problem.as_dict()
                self._finish(job, FAILED)
            else:
                job.state, job.progress = QUEUED, 0.0
                self._queue.insert(0, job_id)
                self._save(job)
        for job in self._by_age(*FINISHED):
            if job.finished is not None and now - job.finished > 3600 * self.settings.keep_hours:
                self._forget(job)

    def _finish(self, job: Job, state: str) -> None:
        job.state, job.finished = state, time.time()
        if job.id in self._queue:
            self._queue.remove(job.id)
        if state == DONE:
            job.progress = 1.0
        else:
            self._clear(job)
        self._totals[state] += 1
        if state == DONE and job.started is not None:
            seconds = job.finished - job.started
            self._seconds += seconds
            self._histogram[next((edge for edge in SECONDS_EDGES if seconds <= edge), float("inf"))] += 1
            self._durations = [*self._durations[-19:], seconds]
        self._save(job)
        self._sizes[job.id] = _size(self.folder / job.id)

    def _clear(self, job: Job) -> None:
        """Remove a job's volumes; its record stays."""
        for file in (self.folder / job.id).glob("*"):
            if file.name != JOB_FILE:
                shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)

    def _forget(self, job: Job) -> None:
        shutil.rmtree(self.folder / job.id, ignore_errors=True)
        for known in (self._jobs, self._sizes, self._leases):
            known.pop(job.id, None)  # type: ignore[attr-defined]

    def _make_room(self, wanted: int) -> bool:
        """Forget the oldest finished jobs until `wanted` bytes fit; whether they do."""
        limit = self.settings.max_folder_gb * 1e9
        for job in self._by_age(*FINISHED):
            if sum(self._sizes.values()) + wanted <= limit:
                break
            self._forget(job)
        return sum(self._sizes.values()) + wanted <= limit

    def _expected_wait(self) -> int:
        """Return in how many seconds a place may be free: the mean of the last jobs."""
        if not self._durations:
            return 5
        return max(1, min(120, round(sum(self._durations) / len(self._durations))))

    def _save(self, job: Job) -> None:
        """Write a job's record whole. Not synced to the disk: it has to outlive a process, not the machine's power.

        A job whose folder is gone (its client hung up while it was queued) has no record; its worker will fail it.
        """
        path = self.folder / job.id / JOB_FILE
        temporary = path.with_name(f".{JOB_FILE}")
        with contextlib.suppress(FileNotFoundError):
            temporary.write_text(json.dumps(asdict(job)))
            os.replace(temporary, path)


def new_id() -> str:
    """Return an id that cannot be guessed."""
    return secrets.token_urlsafe(24)


def locked(folder: Path) -> IO[str]:
    """Make the work folder where it is missing and take its lock, which goes with the process.

    Raises:
        UserError: it cannot be written to, or another service has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        stream = (folder / ".lock").open("w")
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"--work-dir {folder} is in use by another service: give this one another folder") from error
    except OSError as error:
        raise UserError(f"--work-dir {folder} cannot be used: {error.strerror}") from error
    return stream


def _read(folder: Path) -> Job | None:
    try:
        values = json.loads((folder / JOB_FILE).read_text())
        known = {item.name for item in fields(Job)}
        return Job(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError):
        return None


def _size(folder: Path) -> int:
    return sum(_stat(file) for file in _files(folder))


def _files(folder: Path) -> Iterable[Path]:
    return (file for file in folder.rglob("*") if file.is_file())


def _stat(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0
