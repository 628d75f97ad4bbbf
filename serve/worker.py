"""A copy of the model that works on the queue: claims jobs, translates them, says every few seconds that it lives.

Workers ask for work; nobody sends it to them. So neither the death of an ingress nor that of the store stops one, and
the death of a worker costs its job one more attempt.
"""

import contextlib
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.errors import UserError
from serve.autoscaling import WANTED
from serve.problems import Problem, without_paths
from serve.records import Job
from serve.settings import Settings
from serve.store import start_store

if TYPE_CHECKING:
    from aldm.data.volume import Volume
    from aldm.likeness import Likeness
    from aldm.translate import Translator
    from aldm.translation import BoxResult, Encoded, Request

logger = logging.getLogger(__name__)

POLL_S = 0.2
BEAT_S = 2.0


class Cancelled(Exception):
    """Nothing that is being made is wanted any more."""


class Worker:
    """Translates jobs, one batch after another, in a thread of its own. Ray Serve keeps copies of it alive."""

    def __init__(self, model_dir: str, settings: dict[str, Any]) -> None:
        """Load the model and make one translation with it, so that a copy that says it is ready is.

        Args:
            model_dir: translator folder.
            settings: of `Settings`.
        """
        self.settings = Settings(**settings)
        self.name = uuid.uuid4().hex
        self._translator = load(Path(model_dir), self.settings)
        self._store = start_store(self.settings)
        self._progress: dict[str, float] = {}
        self._stop_jobs: set[str] = set()
        self._claims = 0
        self._leaving = threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._work, self._beat)]
        for thread in self._threads:
            thread.start()

    def check_health(self) -> None:
        """Called by Ray Serve; raising makes it start another copy."""
        if not all(thread.is_alive() for thread in self._threads):
            raise RuntimeError("the worker's thread has ended")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve; return how many copies of the model the unfinished jobs would keep busy."""
        counts = await self._store.acall("counts")
        jobs = counts["queued"] + counts["running"]
        return {WANTED: float(math.ceil(jobs / self.settings.max_batch_size))}

    def pid(self) -> int:
        """Return the id of the process that this runs in."""
        return os.getpid()

    def __del__(self) -> None:
        """Finish the batch at hand before the copy goes; Ray Serve waits for it."""
        if hasattr(self, "_leaving"):
            self._leaving.set()
            self._threads[0].join()

    # ---------------------------------------------------------------------------------------------------------- inside

    def _work(self) -> None:
        while not self._leaving.is_set():
            try:
                self._claims += 1  # asked again, the same request gets the same jobs
                claim, model = f"{self.name}-{self._claims}", self._translator.model_hash
                jobs = self._store.call("claim", self.name, self.settings.max_batch_size, claim, model)
            except Problem:
                logger.warning("the job store does not answer")
                jobs = []
            if jobs:
                self._make(jobs)
            else:
                self._leaving.wait(POLL_S)

    def _beat(self) -> None:
        while not (self._leaving.is_set() and not self._threads[0].is_alive()):
            if self._progress:
                self._tell()
            time.sleep(BEAT_S)

    def _tell(self) -> None:
        """Renew the leases and hear what is to be stopped."""
        try:
            self._stop_jobs.update(self._store.call("beat", self.name, dict(self._progress), patience_s=BEAT_S))
        except Problem:
            logger.warning("the job store does not answer; going on")

    def _make(self, jobs: list[Job]) -> None:
        """Make a batch; a job that fails is told why, the others go on."""
        self._progress = {job.id: 0.0 for job in jobs}
        self._stop_jobs = set()
        problems: dict[str, Problem] = {}
        folder = self.settings.folder / "jobs"
        try:
            limit = self.settings.max_evaluations
            translate(self._translator, folder, jobs, problems, self._stop_jobs, self._on_step, limit)
        except Cancelled:
            pass
        except UserError as error:
            words = without_paths(str(error), folder)
            problems |= {job.id: Problem(422, words) for job in jobs if job.id not in problems}
        except Exception as error:  # one job must not end the service; the log keeps the traceback
            logger.exception("a translation failed")
            inside = f"internal error: {type(error).__name__}"
            problems |= {job.id: Problem(500, inside) for job in jobs if job.id not in problems}
        for job in jobs:
            problem = problems.get(job.id)
            try:
                found = (job.num_boxes, job.share_outside, job.likeness)
                self._store.call("finish", self.name, job.id, problem and problem.as_dict(), *found)
            except Problem:
                logger.warning("the job store does not answer; the job will be made again")
        self._progress = {}

    def _on_step(self, jobs: list[Job], share: float) -> None:
        """Note how far the batch is; after every network evaluation, and now and then in between.

        Raises:
            Cancelled: all of its jobs are.
        """
        self._progress = {job.id: share for job in jobs}
        self._tell()
        if all(job.id in self._stop_jobs for job in jobs):
            raise Cancelled


def load(folder: Path, settings: Settings) -> "Translator":
    """Load a translator and warm it up.

    Raises:
        UserError: not a translator folder, or the memory limit is too small.
    """
    import torch

    from aldm.translate import Translator
    from aldm.translation import Request

    threads = settings.threads or max(1, (os.cpu_count() or 1) // settings.num_replicas)
    torch.set_num_threads(threads)
    device = "cuda" if settings.use_gpu else "cpu"
    translator = Translator.load(folder, device, precision=settings.precision, max_memory_gb=settings.max_memory_gb)
    import numpy as np

    names = translator.modalities
    source, target = translator.config.pair or (names[0], names[-1])
    ramp = np.linspace(-1, 1, translator.config.preprocess.spatial_shape[2], dtype=np.float32)
    code = translator.encode(np.broadcast_to(ramp, translator.config.preprocess.spatial_shape))
    translator.translate_batch([Request({source: code}, target, 0)])
    return translator


def translate(
    translator: "Translator",
    folder: Path,
    jobs: list[Job],
    problems: dict[str, Problem],
    stopped: set[str],
    on_step: Any,
    max_evaluations: int,
) -> None:
    """Translate jobs of one batch key and write their results; what goes wrong with one does not touch the others.

    A pass makes one box of one target of every job that has one left.

    Args:
        translator: a loaded model.
        folder: of all jobs.
        jobs: to make; their volumes lie in folder/ID. What is found out about the volumes is noted in them.
        problems: what went wrong is noted here, by job.
        stopped: ids that nobody wants any more, looked at before each step; may grow meanwhile.
        on_step: called as on_step(jobs, share done).
        max_evaluations: most network evaluations of one job; one whose boxes take more fails.
    """
    from serve.files import load_source, volume_folders, write_translation

    first = jobs[0]
    sampling = translator.sampling(
        first.sampler, first.num_inference_steps if first.sampler else None, first.num_samples, first.eta
    )
    works: list[_Work] = []
    for job in jobs:
        evaluations = sampling.num_inference_steps * sampling.num_samples * len(job.targets)  # a box
        if job.id in stopped:
            continue
        with _noted(job, folder, problems):
            folders = volume_folders(folder / job.id, len(job.sources))
            loaded = dict(zip(job.sources, map(load_source, folders), strict=True))
            if job.id in stopped:  # to prepare it is what may take long
                continue
            volumes = {name: volume for name, (volume, _) in loaded.items()}
            encoded = translator.prepare(volumes, max_boxes=max(1, max_evaluations // evaluations))
            _check_likeness(translator.likeness(encoded.record, tuple(encoded.codes[0])), job)
            works.append(_Work(job, encoded, volumes, loaded[job.source][1]))
    if not works:
        return
    passes = max(len(work.requests) for work in works)
    for index in range(passes):
        alive = [work for work in works if work.job.id not in stopped and work.job.id not in problems]
        members = [work for work in alive if index < len(work.requests)]
        if not members:
            continue
        wanted = [work.job for work in alive]

        def report(done: int, total: int, index: int = index, wanted: list[Job] = wanted) -> None:
            on_step(wanted, (index + done / total) / passes * 0.95)

        requests = [work.requests[index] for work in members]
        results = translator.translate_batch(requests, sampling=sampling, on_step=report)
        for work, request, result in zip(members, requests, results, strict=True):
            work.results.append(result)
            if work.job.id in stopped or len(work.results) < len(work.encoded.codes):
                continue
            with _noted(work.job, folder, problems):
                made = translator.finished(work.results, request, work.recorded, work.encoded.record, sampling)
                volume, sources = work.volumes[work.job.source], list(work.job.sources)
                write_translation(folder / work.job.id, made, volume, work.source, work.job.format, sources)
            work.results.clear()


def _check_likeness(likeness: "Likeness | None", job: Job) -> None:
    """Note how unlike a job's volume is, and refuse one beyond the limit that the client does not accept."""
    job.likeness = None if likeness is None else asdict(likeness)
    if likeness is not None and likeness.is_unlike and not job.accept_unlike:
        raise UserError(f"{'volume' if len(job.sources) == 1 else 'one of the volumes'}: {likeness.words()}")


class _Work:
    """A job with its volumes."""

    def __init__(self, job: Job, encoded: "Encoded", volumes: "dict[str, Volume]", source: Any) -> None:
        self.job, self.encoded, self.volumes, self.source = job, encoded, volumes, source
        self.recorded = volumes[next(iter(encoded.codes[0]))]  # the one that the record is of
        job.num_boxes, job.share_outside = len(encoded.codes), encoded.record.share_outside
        self.requests: list[Request] = [
            request for target in job.targets for request in encoded.requests(target, job.seed)
        ]
        self.results: list[BoxResult] = []
        """Of the boxes of the target at hand."""


@contextlib.contextmanager
def _noted(job: Job, folder: Path, problems: dict[str, Problem]) -> Iterator[None]:
    """Note what goes wrong with one job, without paths of the server or ids of other jobs."""
    try:
        yield
    except UserError as error:
        problems[job.id] = Problem(422, without_paths(str(error), folder))
    except Exception as error:
        logger.exception("a translation failed")
        problems[job.id] = Problem(500, f"internal error: {type(error).__name__}")
