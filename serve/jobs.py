"""The queue of the service: who works on which job, what there is room for, and what goes.

`JobStore` runs as one named actor. Every change of a job is written to `WORK_DIR/jobs/ID/job.json` before anybody hears
of it, so a store that is killed and started again knows every job. A worker claims jobs for as long as it says every
few seconds that it lives; when it stops doing so the job goes back to the head of the queue. Every method can be called
a second time with the same arguments, because callers do that when an answer is late.
"""

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import ValidationError

from aldm.words import counted
from serve import work_folder
from serve.metrics import Tally
from serve.problems import Problem, busy
from serve.records import CANCELLED, DONE, FAILED, FINISHED, QUEUED, RUNNING, Job
from serve.settings import Settings

LEASE_S = float(os.environ.get("ALDM_SERVE_LEASE_S", "20"))
"""A worker that is silent for so long is dead. It speaks every 2 s, but a busy machine may keep it from doing so."""
CHECK_S = 900.0
"""The checks of an upload that has arrived, others before it, take less."""
MAX_ATTEMPTS = 3
"""A job whose worker dies so often is not tried again: it may be what kills them."""


@dataclass
class _Lease:
    worker: str
    until: float
    cancelled: bool = False
    inherited: bool = False
    """Of the store before this one; its worker has not spoken to this one yet."""


@dataclass
class _Ticket:
    until: float
    bytes: int
    """What the upload may take."""


class JobStore:
    """The queue and all jobs; made for one thread.

    Attributes:
        lock: the open file that keeps other services out of the work folder.
    """

    def __init__(self, settings: Settings, *, as_configured: bool = False) -> None:
        """Read what is in the work folder and take its lock.

        Args:
            settings: of the service.
            as_configured: what `configure` was told last counts instead, where that is known.

        Raises:
            UserError: the folder cannot be used, or another service uses it.
        """
        self.lock = work_folder.locked(settings.folder)
        setup = work_folder.read_setup(settings.folder)
        self._model: dict[str, str] | None = setup.get("model")
        self.settings = _settings_of(setup, settings) if as_configured else settings
        self._folders = work_folder.JobFolders(settings.folder)
        self.folder = self._folders.folder
        self._jobs: dict[str, Job] = {}
        self._queue: list[str] = []
        self._leases: dict[str, _Lease] = {}
        self._tickets: dict[str, _Ticket] = {}
        self._tally = Tally()
        self._draining = self._halted = False
        self._workers: dict[str, float] = {}
        self._asked: dict[str, float] = {}
        self._recover()

    # ------------------------------------------------------------------------------------------------ for the ingress

    def reserve(self, ticket: str, size: int) -> None:
        """Keep a place, and room in the folder, for one upload.

        Args:
            ticket: any name that nobody else uses.
            size: bytes of the request at most.

        Raises:
            Problem: 503, the queue is full, the folder or the disk is full, or the service is about to stop.
        """
        if ticket in self._tickets:
            return
        self._expire()
        if self._draining:
            raise busy("the service is about to stop and takes no new jobs", 30)
        if len(self._queue) + len(self._tickets) >= self.settings.max_queue:
            raise busy(f"the queue is full ({counted(self.settings.max_queue, 'job')})", self._tally.expected_wait())
        wanted = self.settings.bytes_of_upload(size)
        if not self._make_room(wanted):
            raise busy(f"the service's folder ({self.settings.max_folder_gb:g} GB) is full of unfinished jobs", 60)
        if self._folders.free_bytes < wanted:
            raise busy("the disk of the service's folder is full", 60)
        self._tickets[ticket] = _Ticket(time.time() + self._ticket_seconds(), wanted)

    def release(self, ticket: str) -> None:
        """Give a ticket back that led to no job."""
        self._tickets.pop(ticket, None)

    def submit(self, ticket: str, job: Job) -> dict[str, Any]:
        """Queue a job whose files lie in `jobs/ID`; return its view. The same job a second time changes nothing."""
        if job.id not in self._jobs:
            if self._model is not None and job.model["hash"] != self._model["hash"]:
                raise busy("the service is being started again with another model", 10)
            if self._tickets.pop(ticket, None) is None and len(self._queue) >= self.settings.max_queue:
                raise busy("the upload took too long and lost its place", 5)
            self._folders.save(job)
            self._jobs[job.id] = job
            self._folders.measure(job)
            self._queue.append(job.id)
            self._tally.totals["accepted"] += 1
        return self.view(job)

    def get(self, job_id: str, owner: str) -> dict[str, Any]:
        """Return the view of a job.

        Raises:
            Problem: 404, there is none, or another token made it.
        """
        self._expire()
        return self.view(self._of(job_id, owner))

    def views(self, wanted: list[tuple[str, str]]) -> list[tuple[dict[str, Any] | None, Problem | None]]:
        """Return what `get` does, of each (id, owner): the view, or the problem."""
        self._expire()
        found: list[tuple[dict[str, Any] | None, Problem | None]] = []
        for job_id, owner in wanted:
            try:
                found.append((self.view(self._of(job_id, owner)), None))
            except Problem as problem:
                found.append((None, problem))
        return found

    def cancel(self, job_id: str, owner: str) -> None:
        """Cancel an unfinished job; a finished one stays as it is.

        Raises:
            Problem: 404, as `get`.
        """
        job = self._of(job_id, owner)
        if job.state in FINISHED:
            return
        lease = self._leases.get(job_id)
        if lease is not None:
            lease.cancelled = True
        self._finish(job, CANCELLED)

    def forget(self, job_id: str, owner: str) -> None:
        """Remove a finished job and its files; one that is not there is forgotten already.

        Raises:
            Problem: 404, another token made it; 409, it is not finished.
        """
        if job_id not in self._jobs:
            return
        job = self._of(job_id, owner)
        if job.state not in FINISHED:
            raise Problem(409, f"the translation is {job.state}: cancel it first")
        self._forget(job)

    def view(self, job: Job) -> dict[str, Any]:
        """Return what the client sees of a job; times in seconds since the epoch."""
        values = asdict(job)
        waiting = job.id in self._queue
        values["queue_position"] = self._queue.index(job.id) if waiting else None
        values["expires"] = None if job.finished is None else job.finished + 3600 * self.settings.keep_hours
        return values

    # ------------------------------------------------------------------------------------------------ for the workers

    def claim(self, worker: str, count: int, claim: str, model_hash: str) -> list[Job]:
        """Lend a worker the first job of its model, and up to count - 1 that can be made with it.

        Args:
            worker: who asks.
            count: most jobs.
            claim: name of this request; asked again under the same name the answer is the same.
            model_hash: of the worker's model.
        """
        self._workers[worker] = time.time()
        self._asked[model_hash] = time.time()
        held = [self._jobs[job_id] for job_id, lease in self._leases.items() if lease.worker == worker]
        if lent := [job for job in held if job.claim == claim and job.state == RUNNING]:
            return lent
        self._expire()
        waiting = [self._jobs[job_id] for job_id in self._queue if self._jobs[job_id].model["hash"] == model_hash]
        if self._draining or not waiting:
            return []
        key = waiting[0].batch_key()
        chosen = [job for job in waiting if job.batch_key() == key][:count]
        now = time.time()
        for job in chosen:
            self._queue.remove(job.id)
            self._leases[job.id] = _Lease(worker, now + LEASE_S)
            job.state, job.attempt, job.progress, job.started = RUNNING, job.attempt + 1, 0.0, now
            job.worker, job.claim = worker, claim
            self._folders.save(job)
        return chosen

    def beat(self, worker: str, progress: dict[str, float]) -> list[str]:
        """Renew a worker's leases, note how far its jobs are (0 to 1), and return those that it has to stop."""
        self._workers[worker] = time.time()
        stop = []
        for job_id, done in progress.items():
            job, lease = self._jobs.get(job_id), self._leases.get(job_id)
            if job is None or lease is None or lease.worker != worker or lease.cancelled or self._halted:
                stop.append(job_id)
                continue
            lease.until, lease.inherited = time.time() + LEASE_S, False
            job.progress = max(job.progress, min(done, 1.0))
        return stop

    def finish(
        self,
        worker: str,
        job_id: str,
        error: dict[str, Any] | None = None,
        num_boxes: int | None = None,
        share_outside: float | None = None,
        likeness: dict[str, Any] | None = None,
    ) -> None:
        """End a job of a worker: done, or failed with a problem; what is no longer the worker's stays as it is."""
        job, lease = self._jobs.get(job_id), self._leases.get(job_id)
        if self._halted:
            return  # it stopped because it was told to; the next start makes the job
        if job is None or lease is None or lease.worker != worker:
            if job is not None and job.state in (CANCELLED, FAILED):
                self._folders.clear(job)  # what a worker wrote that did not hear of it
            return
        if job.state == RUNNING:
            job.error, job.num_boxes, job.share_outside, job.likeness = error, num_boxes, share_outside, likeness
            self._finish(job, DONE if error is None else FAILED)
        else:
            self._folders.clear(job)  # cancelled while the worker wrote
        self._leases.pop(job_id, None)

    # -------------------------------------------------------------------------------------------------- for operators

    def may_serve(self, model_hash: str) -> bool:
        """Whether `configure` may be told of a model: the first, the one that is served, or one with an idle copy."""
        known = self._model is None or self._model["hash"] == model_hash
        return known or time.time() - self._asked.get(model_hash, 0.0) < LEASE_S

    def configure(self, settings: dict[str, Any], model: dict[str, str]) -> None:
        """Take the limits and the model of a service that was started or deployed again.

        Jobs that wait for another model fail: nobody will make them.

        Raises:
            Problem: 500, its work folder is another one.
        """
        wanted = Settings(**settings)
        if wanted.folder != self.settings.folder:
            raise Problem(500, f"this cluster runs a service in {self.settings.folder} already; end that one first")
        self.settings, self._model, self._draining, self._halted = wanted, model, False, False
        work_folder.write_setup(wanted.folder, settings=settings, model=model)
        for job in self._by_age(QUEUED):
            if job.model["hash"] != model["hash"]:
                self._finish_replaced(job)

    def drain(self) -> int:
        """Take no new job and start none; return how many are running. What is queued waits for the next start."""
        self._draining = True
        self._expire()
        return sum(job.state == RUNNING for job in self._jobs.values())

    def halt(self) -> None:
        """Have the workers stop what they are making; the next start makes it from its beginning."""
        self._draining = self._halted = True

    def counts(self) -> dict[str, Any]:
        """Return the numbers behind /metrics and the health checks."""
        self._expire()
        return {
            "queued": len(self._queue),
            "uploading": len(self._tickets),
            "running": sum(job.state == RUNNING for job in self._jobs.values()),
            **self._tally.counts(),
            "folder_bytes": self._folders.bytes,
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
        now = time.time()
        for job in self._folders.records():
            self._jobs[job.id] = job
            if job.state == RUNNING:
                self._leases[job.id] = _Lease(job.worker, now + LEASE_S, inherited=True)
        self._queue = [job.id for job in self._by_age(QUEUED)]
        self._folders.sweep(self._jobs, now, self._ticket_seconds())

    def _ticket_seconds(self) -> float:
        """Return after how long an upload has lost its place: it was refused before, or its ingress has died."""
        return self.settings.max_upload_seconds + CHECK_S

    def _by_age(self, *states: str) -> list[Job]:
        return sorted((job for job in self._jobs.values() if job.state in states), key=lambda job: job.created)

    def _expire(self) -> None:
        """Take back what silent workers hold, and forget what is too old."""
        now = time.time()
        self._workers = {worker: seen for worker, seen in self._workers.items() if now - seen < LEASE_S}
        self._tickets = {name: ticket for name, ticket in self._tickets.items() if ticket.until > now}
        self._folders.sweep(self._jobs, now, self._ticket_seconds())
        for job_id, lease in list(self._leases.items()):
            if lease.until > now:
                continue
            del self._leases[job_id]
            job = self._jobs.get(job_id)
            if job is None or job.state != RUNNING:
                continue
            self._tally.totals["retried"] += 1
            if not lease.inherited:  # otherwise it was the store, or the whole service, that ended
                job.deaths += 1
            if job.deaths >= MAX_ATTEMPTS:
                problem = Problem(500, f"the worker died {job.deaths} times on this job; it is not tried again")
                job.error = problem.as_dict()
                self._finish(job, FAILED)
            elif self._model is not None and job.model["hash"] != self._model["hash"]:
                self._finish_replaced(job)
            else:
                job.state, job.progress = QUEUED, 0.0
                self._queue.insert(0, job_id)
                self._folders.save(job)
        for job in self._by_age(*FINISHED):
            if job.finished is not None and now - job.finished > 3600 * self.settings.keep_hours:
                self._forget(job)

    def _finish_replaced(self, job: Job) -> None:
        assert self._model is not None
        problem = Problem(
            409,
            f"the service was started again with another model ({self._model['name']}, it was {job.model['name']}) "
            "before this translation was made: send the volume again",
        )
        job.error = problem.as_dict()
        self._finish(job, FAILED)

    def _finish(self, job: Job, state: str) -> None:
        job.state, job.finished = state, time.time()
        if job.id in self._queue:
            self._queue.remove(job.id)
        if state == DONE:
            job.progress = 1.0
        else:
            self._folders.clear(job)
        self._tally.totals[state] += 1
        if state == DONE and job.started is not None:
            self._tally.took(job.finished - job.started)
        self._folders.save(job)
        self._folders.measure(job)

    def _forget(self, job: Job) -> None:
        self._folders.remove(job)
        self._jobs.pop(job.id, None)
        self._leases.pop(job.id, None)

    def _make_room(self, wanted: int) -> bool:
        """Forget the oldest finished jobs until `wanted` bytes fit; whether they do.

        Uploads that are arriving and results that will be written count as if they were there.
        """
        limit = self.settings.max_folder_gb * 1e9 - wanted
        limit -= sum(ticket.bytes for ticket in self._tickets.values())
        limit -= sum(job.expected_bytes() for job in self._by_age(QUEUED, RUNNING))
        for job in self._by_age(*FINISHED):
            if self._folders.bytes <= limit:
                break
            self._forget(job)
        return self._folders.bytes <= limit


def _settings_of(setup: dict[str, Any], otherwise: Settings) -> Settings:
    """Return the settings of the last `configure`, where they are there and of this folder."""
    try:
        found = Settings(**setup["settings"])
    except (KeyError, TypeError, ValidationError):
        return otherwise
    return found if found.folder == otherwise.folder else otherwise
