"""A translation is asked for: the request is checked to the end, its volume kept, and the job queued."""

import asyncio
import shutil
import time
from pathlib import Path
from typing import Any

import anyio.to_thread
from fastapi import Request, UploadFile

from aldm.config import SamplingConfig
from aldm.data.naming import choose_source
from aldm.errors import UserError
from aldm.pairs import check_pair
from aldm.sampling_choice import choose_sampling
from serve import files
from serve.grids import check_grid
from serve.models import Model
from serve.news import News
from serve.problems import Problem
from serve.records import DONE, FINISHED, Job, new_id
from serve.schemas import JobView, job_view
from serve.settings import Settings
from serve.store import StoreHandle
from serve.uploads import accept
from serve.work_folder import JOBS

AUTO = "auto"


class Service:
    """What the routes share."""

    def __init__(self, settings: Settings, model: Model, store: StoreHandle) -> None:
        self.settings, self.model, self.store = settings, model, store
        self.news = News(store)
        self.folder = settings.folder / JOBS
        self._checking = asyncio.Semaphore(1)  # volumes are held in memory one at a time

    async def view(self, job_id: str, owner: str) -> JobView:
        """Return a job; raises Problem 404."""
        return job_view(await self.store.acall("get", job_id, owner), time.time())

    async def submit(self, request: Request, volume: UploadFile, values: dict[str, Any], targets: list[str]) -> JobView:
        """Check a request to the end, keep its volume, and queue it.

        Raises:
            Problem: whatever is wrong with it; nothing is kept then.
        """
        targets = list(dict.fromkeys(targets))
        sampling = self._check(values, targets)
        job_id = new_id()
        folder = self.folder / job_id
        name = volume.filename or ""
        folder.mkdir(mode=0o700)
        try:
            async with self._checking:
                words, voxels = await anyio.to_thread.run_sync(
                    accept, volume.file, name, folder, self.settings, values["series"] or None
                )
                limit = self.settings.max_grid_voxels
                await anyio.to_thread.run_sync(check_grid, folder, self.model.config.preprocess, limit)
            source, source_from = self._source(values["source"], name, words)
            self.check_pairs(source, targets)
            if values["format"] == files.DICOM and not files.is_series(folder):
                raise Problem(422, "format dicom makes a derived series, wanted a zip of a DICOM series as volume")
            job = Job(
                id=job_id,
                owner=request.state.owner,
                source=source,
                source_from=source_from,
                targets=targets,
                sampler=sampling.sampler if self.model.kind == "aldm" else None,
                num_inference_steps=sampling.num_inference_steps,
                num_samples=sampling.num_samples,
                eta=sampling.eta,
                seed=values["seed"],
                format=values["format"],
                accept_unlike=values["accept_unlike"],
                model={"name": self.model.name, "hash": self.model.hash},
                voxels=voxels,
            )
            view = await self.store.acall("submit", request.state.ticket, job)
        except BaseException:
            self.store.tell("cancel", job_id, request.state.owner)  # where it is queued already: the client hung up
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return job_view(view, time.time())

    def _check(self, values: dict[str, Any], targets: list[str]) -> SamplingConfig:
        """Refuse what needs no look at the volume."""
        known = self.model.config.modalities
        for name in ([] if values["source"] == AUTO else [values["source"]]) + targets:
            if name not in known:
                raise Problem(422, f"unknown modality {name[:40]!r}: this model knows {', '.join(known)}")
        if (values["num_samples"] or 1) > self.settings.max_samples:
            raise Problem(422, f"num_samples is {values['num_samples']}, the limit is {self.settings.max_samples}")
        try:
            sampling = choose_sampling(
                self.model.config,
                self.model.kind,
                values["sampler"],
                values["num_inference_steps"],
                values["num_samples"],
            )
        except UserError as error:
            raise Problem(422, str(error)) from error
        work = sampling.num_inference_steps * sampling.num_samples * len(targets)
        if work > self.settings.max_evaluations:
            raise Problem(
                422,
                f"{work:,} network evaluations (steps x samples x targets), the limit is "
                f"{self.settings.max_evaluations:,}: ask for fewer",
            )
        return sampling

    def check_pairs(self, source: str, targets: list[str]) -> None:
        """Refuse a translation that the model was not trained for; raises Problem 422."""
        try:
            for target in targets:
                check_pair(self.model.config, self.model.kind, source, target)
        except UserError as error:
            raise Problem(422, str(error)) from error

    def _source(self, wanted: str, name: str, words: str) -> tuple[str, str]:
        if wanted != AUTO:
            return wanted, "request"
        try:
            return choose_source(name, words, self.model.config.modalities)
        except UserError as error:
            raise Problem(422, f"volume: {error}") from error

    async def remove(self, job_id: str, owner: str) -> None:
        """Cancel a job that is not finished, forget one that is; raises Problem 404."""
        view = await self.view(job_id, owner)
        await self.store.acall("forget" if view.state in FINISHED else "cancel", job_id, owner)

    async def file(self, job_id: str, owner: str, target: str | None = None) -> tuple[JobView, Path]:
        """Return a job that is done (any state for `target` None) and its folder.

        Raises:
            Problem: 404 for no such job or target, 409 before it is done.
        """
        view = await self.view(job_id, owner)
        if target is not None and target not in view.targets:
            raise Problem(404, f"this translation has no target {target[:40]!r}; it has {', '.join(view.targets)}")
        if target is not None and view.state != DONE:
            raise Problem(409, f"the translation is {view.state}, its results can be read once it is done")
        return view, self.folder / view.id
