"""The results over HTTP: what lies in a job's folder."""

import json
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.responses import FileResponse

from serve import files
from serve.problems import Problem
from serve.records import CANCELLED, FAILED
from serve.schemas import REFUSALS
from serve.submissions import Service

GZIP, ZIP, PNG = "application/gzip", "application/zip", "image/png"
Modality = Annotated[str | None, Query(description="of the volume; none takes the first")]
Target = Annotated[str, Query(description="modality of the result")]


def add_results(app: FastAPI, service: Service) -> None:
    def kinds(*media: str) -> dict[int | str, dict[str, Any]]:
        return REFUSALS | {200: {"content": {one: {} for one in media}, "description": "The file."}}

    base = "/v1/translations/{job_id}"

    @app.get(f"{base}/result", response_class=FileResponse, responses=kinds(GZIP, ZIP), tags=["results"])
    async def result(request: Request, job_id: str, target: Target) -> FileResponse:
        """Return the translated volume: NIfTI, or a zip of a DICOM series."""
        view, folder = await service.file(job_id, request.state.owner, target)
        return attached(files.result_file(folder, target, view.format), f"synthetic-{target}")

    @app.get(f"{base}/uncertainty", response_class=FileResponse, responses=kinds(GZIP), tags=["results"])
    async def uncertainty(request: Request, job_id: str, target: Target) -> FileResponse:
        """Return how far the result may be from the truth, in its units, as NIfTI: see uncertainty_level."""
        view, folder = await service.file(job_id, request.state.owner, target)
        if view.uncertainty_level is None:
            raise Problem(404, "the model does not know how far off it may be, or was not sampled as it is by default")
        return attached(files.map_file(folder, "uncertainty", target), f"synthetic-{target}_uncertainty")

    @app.get(f"{base}/spread", response_class=FileResponse, responses=kinds(GZIP), tags=["results"])
    async def spread(request: Request, job_id: str, target: Target) -> FileResponse:
        """Return the voxelwise standard deviation of the samples, in the result's units, as NIfTI; not calibrated."""
        view, folder = await service.file(job_id, request.state.owner, target)
        if view.num_samples < 2:
            raise Problem(404, "one sample has no spread: ask for num_samples of at least 2")
        return attached(files.map_file(folder, "spread", target), f"synthetic-{target}_spread")

    @app.get(f"{base}/preview.png", response_class=FileResponse, responses=kinds(PNG), tags=["results"])
    async def preview(request: Request, job_id: str, target: Target) -> FileResponse:
        """Return a picture of source and result."""
        _, folder = await service.file(job_id, request.state.owner, target)
        return KeptFile(files.preview_file(folder, target), media_type=PNG)

    @app.get(f"{base}/provenance", responses=REFUSALS, tags=["results"])
    async def provenance(request: Request, job_id: str, target: Target) -> dict[str, Any]:
        """Say how the translated volume was made."""
        _, folder = await service.file(job_id, request.state.owner, target)
        try:
            made: dict[str, Any] = json.loads(files.provenance_file(folder, target).read_text())
        except FileNotFoundError as error:
            raise expired() from error
        return made

    @app.get(f"{base}/source", response_class=FileResponse, responses=kinds(GZIP), tags=["results"])
    async def source(request: Request, job_id: str, modality: Modality = None) -> FileResponse:
        """Return a volume of the upload as NIfTI, its header free of names."""
        view, folder = await service.file(job_id, request.state.owner)
        if view.state in (FAILED, CANCELLED):
            raise Problem(404, f"the translation is {view.state}, its files are gone")
        if modality is not None and modality not in view.sources:
            have = ", ".join(view.sources)
            raise Problem(404, f"this translation has no source {modality[:40]!r}; it has {have}")
        name = modality or view.source
        folders = dict(zip(view.sources, files.volume_folders(folder, len(view.sources)), strict=True))
        return attached(files.source_file(folders[name]), f"source-{name}")


class KeptFile(FileResponse):
    """A file of a job, which may go at any moment: 404 then."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send it, opened before the answer begins."""
        try:
            self.set_stat_headers(stat := Path(self.path).stat())
            self.stat_result = stat
        except FileNotFoundError as error:
            raise expired() from error
        await super().__call__(scope, receive, send)


def expired() -> Problem:
    """Return the answer for a file that was there a moment ago."""
    return Problem(404, "the file has expired")


def attached(path: Path, name: str) -> FileResponse:
    """Return a file of a job under a name of its own."""
    suffix = ".zip" if path.suffix == ".zip" else ".nii.gz"
    return KeptFile(
        path,
        media_type=ZIP if suffix == ".zip" else GZIP,
        headers={"Content-Disposition": f'attachment; filename="{name}{suffix}"'},
    )
