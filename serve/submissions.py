"""A translation is asked for: the request is checked to the end, its volume kept, and the job queued."""

import asyncio
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio.to_thread
from fastapi import Request

from aldm.config import SamplingConfig
from aldm.data.naming import SaidBy, choose_source
from aldm.errors import UserError
from aldm.pairs import check_sources
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
from serve.volumes import AUTO, Upload, accept_all
from serve.work_folder import JOBS


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

    async def submit(
        self, request: Request, uploads: Sequence[Upload], values: dict[str, Any], targets: list[str]
    ) -> JobView:
        """Check a request to the end, keep its volumes, and queue it.

        Raises:
            Problem: whatever is wrong with it; nothing is kept then.
        """
        targets = list(dict.fromkeys(targets))
        sampling = self._check(uploads, values, targets)
        job_id = new_id()
        folder = self.folder / job_id
        folder.mkdir(mode=0o700)
        try:
            async with self._checking:
                words, voxels = await anyio.to_thread.run_sync(
                    accept_all, uploads, folder, self.settings, values["series"] or None
                )
                folders, fields = files.volume_folders(folder, len(uploads)), [upload.field for upload in uploads]
                limit = self.settings.max_grid_voxels
                await anyio.to_thread.run_sync(check_grid, folders, fields, self.model.config.preprocess, limit)
            sources = self._sources(uploads, words)
            self.check_sources(list(sources), targets)
            if values["format"] == files.DICOM and not files.is_series(folder):
                raise Problem(
                    422, f"format dicom makes a derived series, wanted a zip of a DICOM series as {fields[0]}"
                )
            source = next(iter(sources))
            job = Job(
                id=job_id,
                owner=request.state.owner,
                source=source,
                source_from=sources[source],
                sources=sources,
                targets=targets,
                sampler=sampling.sampler if self.model.kind == "aldm" else None,
                num_inference_steps=sampling.num_inference_steps,
                num_samples=sampling.num_samples,
                uncertainty_level=self._uncertainty_level(sampling),
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

    def _check(self, uploads: Sequence[Upload], values: dict[str, Any], targets: list[str]) -> SamplingConfig:
        """Refuse what needs no look at the volumes."""
        known = self.model.config.modalities
        named = [upload.source for upload in uploads if upload.source != AUTO]
        for name in named + targets:
            if name not in known:
                raise Problem(422, f"unknown modality {name[:40]!r}: this model knows {', '.join(known)}")
        if len(named) == len(uploads) > 1:
            self.check_sources(named, targets)
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

    def _uncertainty_level(self, sampling: SamplingConfig) -> float | None:
        """Return what the model's intervals are to hold, where it is sampled as it was when they were fitted."""
        own = choose_sampling(self.model.config, self.model.kind)
        return self.model.uncertainty_level if sampling == own else None

    def check_sources(self, sources: Sequence[str], targets: list[str]) -> None:
        """Refuse a translation that the model was not trained for; raises Problem 422."""
        try:
            for target in targets:
                check_sources(self.model.config, self.model.kind, sources, target)
        except UserError as error:
            raise Problem(422, str(error)) from error

    def _sources(self, uploads: Sequence[Upload], words: Sequence[str]) -> dict[str, SaidBy]:
        """Return the modality of every volume, and who said so; raises Problem 422 where two are of one."""
        found: dict[str, SaidBy] = {}
        for upload, header in zip(uploads, words, strict=True):
            source = upload.source
            said_by: SaidBy = "request"
            if source == AUTO:
                try:
                    source, said_by = choose_source(upload.name, header, self.model.config.modalities)
                except UserError as error:
                    raise Problem(422, f"{upload.field}: {error}") from error
            if source in found:
                raise Problem(422, f"two of the volumes are {source}: give each modality once")
            found[source] = said_by
        return found

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
