"""The HTTP interface: a FastAPI application over the job store.

It holds no job and no model, so it may die at any time.
"""

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import FastAPI, File, Form, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from aldm import __version__
from aldm.config import SamplingConfig
from aldm.errors import UserError
from aldm.sampling import allowed_samplers
from aldm.translate import NOTICE, choose_sampling
from serve import files
from serve.jobs import DONE, FINISHED, Job, new_id
from serve.metrics import prometheus_text
from serve.models import Model
from serve.problems import MEDIA_TYPE, Problem, busy
from serve.schemas import (
    Default,
    Grid,
    Health,
    JobView,
    Limits,
    ModelCard,
    Models,
    ProblemDetail,
    Sampler,
    job_view,
)
from serve.security import Guard
from serve.settings import Settings
from serve.store import StoreHandle
from serve.uploads import accept, guess_source

AUTO = "auto"
EVENTS_S, ALIVE_S = 0.3, 10.0
"""How often an event stream looks for news, and how long it may be silent."""
WAIT_S = 0.1
GZIP, ZIP, PNG = "application/gzip", "application/zip", "image/png"
EXAMPLE_SPACING_MM = 3.0

DESCRIPTION = f"""Translate a 3D MR volume into other modalities. Results are on exactly the grid of the upload, and
each is a {NOTICE}. Errors are problem details (RFC 9457)."""
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemDetail, "description": words, "content": {MEDIA_TYPE: {}}}
    for status, words in {
        400: "A request that cannot be read.",
        401: "No token, or a wrong one.",
        403: "Not from this machine, which alone is answered without tokens.",
        404: "No such translation.",
        409: "Not finished yet.",
        413: "Too large.",
        415: "Another kind of file.",
        422: "Cannot be translated; the detail says why.",
        503: "Busy; Retry-After says for how long.",
    }.items()
}

Volume = Annotated[UploadFile, File(description="NIfTI (.nii, .nii.gz) or a zip of one DICOM series")]
Source = Annotated[str, Form(description="modality of the volume; auto reads it from the file's name or header")]
SamplerName = Annotated[str | None, Form(description="of the model's samplers; none takes the default")]
Steps = Annotated[int | None, Form(ge=1, le=10_000, description="network evaluations per sample")]
Samples = Annotated[
    int | None, Form(ge=1, le=10_000, description="the result is their mean; above 1 gives an uncertainty")
]
Seed = Annotated[int, Form(ge=0, lt=2**63 - 2**20, description="of the first sample; sample i has seed + i")]
Target = Annotated[str, Query(description="modality of the result")]


def build_api(settings: Settings, model: Model, tokens: dict[str, str], store: StoreHandle) -> Any:
    """Return the ASGI application, guard included.

    Args:
        settings: of the service.
        model: what the workers run.
        tokens: name -> SHA-256; empty answers this machine alone.
        store: the jobs.
    """
    incoming = settings.folder / "incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(incoming)  # where a form's files are kept while they arrive
    service = Service(settings, model, store)
    app = FastAPI(
        title="aldm: MR translation", description=DESCRIPTION, version=__version__, docs_url=None, redoc_url=None
    )
    _add_errors(app)
    _add_translations(app, service)
    _add_results(app, service)
    _add_service(app, service, tokens)
    _add_pages(app)
    return Guard(app, settings=settings, tokens=tokens, store=store)


class Service:
    """What the routes share."""

    def __init__(self, settings: Settings, model: Model, store: StoreHandle) -> None:
        self.settings, self.model, self.store = settings, model, store
        self.folder = settings.folder / "jobs"
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
                words = await anyio.to_thread.run_sync(accept, volume.file, name, folder, self.settings)
            source, source_from = self._source(values["source"], name, words)
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
                model={"name": self.model.name, "hash": self.model.hash},
            )
            view = await self.store.acall("submit", request.state.ticket, job)
        except BaseException:
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

    def _source(self, wanted: str, name: str, words: str) -> tuple[str, str]:
        if wanted != AUTO:
            return wanted, "request"
        for place, text in (("file name", name), ("header", words)):
            found = guess_source(text, self.model.config.modalities)
            if found is not None:
                return found, place
        known = ", ".join(self.model.config.modalities)
        raise Problem(422, f"neither the file's name nor its header says the modality: give source, one of {known}")

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


def _add_translations(app: FastAPI, service: Service) -> None:
    @app.post("/v1/translations", status_code=202, responses=_REFUSALS, tags=["translations"])
    async def submit(
        request: Request,
        response: Response,
        volume: Volume,
        target: Annotated[list[str], Form(min_length=1, max_length=16, description="wanted modality; repeatable")],
        source: Source = AUTO,
        sampler: SamplerName = None,
        num_inference_steps: Steps = None,
        num_samples: Samples = None,
        seed: Seed = 0,
        format: Annotated[Literal["nii.gz", "dicom"], Form(description="of the results")] = "nii.gz",
    ) -> JobView:
        """Queue a translation. Its state is at the answer's Location."""
        values = {"source": source, "sampler": sampler, "num_inference_steps": num_inference_steps}
        values |= {"num_samples": num_samples, "seed": seed, "format": format}
        view = await service.submit(request, volume, values, target)
        response.headers["Location"] = view.links.self
        return view

    @app.post(
        "/v1/translate",
        response_class=FileResponse,
        responses=_REFUSALS | {200: {"content": {GZIP: {}}, "description": "The translation, NIfTI (.nii.gz)."}},
        tags=["translations"],
    )
    async def translate(
        request: Request,
        volume: Volume,
        target: Annotated[str, Form(description="wanted modality")],
        source: Source = AUTO,
        sampler: SamplerName = None,
        num_inference_steps: Steps = None,
        num_samples: Samples = None,
        seed: Seed = 0,
    ) -> FileResponse:
        """Translate in one call that ends with the result, for scripts."""
        values = {"source": source, "sampler": sampler, "num_inference_steps": num_inference_steps}
        values |= {"num_samples": num_samples, "seed": seed, "format": files.NIFTI}
        view = await service.submit(request, volume, values, [target])
        owner = request.state.owner
        try:
            while view.state not in FINISHED:
                await asyncio.sleep(WAIT_S)
                view = await service.view(view.id, owner)
        except asyncio.CancelledError:  # the client hung up
            service.store.tell("cancel", view.id, owner)
            raise
        if view.error is not None:
            raise Problem(view.error.status, view.error.detail)
        if view.state != DONE:
            raise Problem(409, "the translation was cancelled")
        return _attached(files.result_file(service.folder / view.id, target, files.NIFTI), f"synthetic-{target}")

    @app.get("/v1/translations/{job_id}", responses=_REFUSALS, tags=["translations"])
    async def state(request: Request, job_id: str) -> JobView:
        """Say where a translation stands."""
        return await service.view(job_id, request.state.owner)

    @app.get(
        "/v1/translations/{job_id}/events",
        response_class=StreamingResponse,
        responses=_REFUSALS | {200: {"content": {"text/event-stream": {}}, "description": "A `job` event per change."}},
        tags=["translations"],
    )
    async def events(request: Request, job_id: str) -> StreamingResponse:
        """Stream every change of a translation as a server-sent event, until it ends."""
        first = await service.view(job_id, request.state.owner)
        stream = _events(service, first, request.state.owner)
        return StreamingResponse(stream, media_type="text/event-stream")

    @app.delete("/v1/translations/{job_id}", status_code=204, responses=_REFUSALS, tags=["translations"])
    async def cancel(request: Request, job_id: str) -> Response:
        """Cancel a translation (the sampler stops at its next step); of a finished one, remove every file."""
        await service.store.acall("cancel", job_id, request.state.owner)
        return Response(status_code=204)


async def _events(service: Service, view: JobView, owner: str) -> AsyncIterator[str]:
    told, told_at = "", 0.0
    while True:
        moving = {"state", "progress", "queue_position", "attempt", "finished_at"}
        news = view.model_dump_json(include=moving)
        if news != told:
            told, told_at = news, time.monotonic()
            yield f"event: job\ndata: {view.model_dump_json()}\n\n"
        elif time.monotonic() - told_at > ALIVE_S:
            told_at = time.monotonic()
            yield ": alive\n\n"
        if view.state in FINISHED:
            return
        await asyncio.sleep(EVENTS_S)
        try:
            view = await service.view(view.id, owner)
        except Problem as problem:
            yield f"event: problem\ndata: {json.dumps(problem.as_dict())}\n\n"
            return


def _add_results(app: FastAPI, service: Service) -> None:
    def kinds(*media: str) -> dict[int | str, dict[str, Any]]:
        return _REFUSALS | {200: {"content": {one: {} for one in media}, "description": "The file."}}

    base = "/v1/translations/{job_id}"

    @app.get(f"{base}/result", response_class=FileResponse, responses=kinds(GZIP, ZIP), tags=["results"])
    async def result(request: Request, job_id: str, target: Target) -> FileResponse:
        """Return the translated volume: NIfTI, or a zip of a DICOM series."""
        view, folder = await service.file(job_id, request.state.owner, target)
        return _attached(files.result_file(folder, target, view.format), f"synthetic-{target}")

    @app.get(f"{base}/uncertainty", response_class=FileResponse, responses=kinds(GZIP), tags=["results"])
    async def uncertainty(request: Request, job_id: str, target: Target) -> FileResponse:
        """Return the voxelwise standard deviation of the samples, in the result's units, as NIfTI."""
        view, folder = await service.file(job_id, request.state.owner, target)
        if view.num_samples < 2:
            raise Problem(404, "one sample has no uncertainty: ask for num_samples of at least 2")
        return _attached(files.uncertainty_file(folder, target), f"synthetic-{target}_std")

    @app.get(f"{base}/preview.png", response_class=FileResponse, responses=kinds(PNG), tags=["results"])
    async def preview(request: Request, job_id: str, target: Target) -> FileResponse:
        """Return a picture of source and result."""
        _, folder = await service.file(job_id, request.state.owner, target)
        return FileResponse(files.preview_file(folder, target), media_type=PNG)

    @app.get(f"{base}/provenance", responses=_REFUSALS, tags=["results"])
    async def provenance(request: Request, job_id: str, target: Target) -> dict[str, Any]:
        """Say how the translated volume was made."""
        _, folder = await service.file(job_id, request.state.owner, target)
        made: dict[str, Any] = json.loads(files.provenance_file(folder, target).read_text())
        return made

    @app.get(f"{base}/source", response_class=Response, responses=kinds(GZIP), tags=["results"])
    async def source(request: Request, job_id: str) -> Response:
        """Return the upload as NIfTI, its header free of names."""
        view, folder = await service.file(job_id, request.state.owner)
        path = files.source_file(folder)
        if not path.is_file():
            raise Problem(404, f"the translation is {view.state}, its files are gone")
        content = await anyio.to_thread.run_sync(_compressed, path)
        return Response(content, media_type=GZIP, headers=_disposition(f"source-{view.source}.nii.gz"))


def _add_service(app: FastAPI, service: Service, tokens: dict[str, str]) -> None:
    settings, model = service.settings, service.model
    base = model.config.sampling
    diffusion = model.kind == "aldm"

    @app.get("/v1/models", responses=_REFUSALS, tags=["service"])
    async def models() -> Models:
        """Say what can be translated, how, how well, and within which limits."""
        card = ModelCard(
            name=model.name,
            description=model.description,
            hash=model.hash,
            kind=model.kind,
            modalities=list(model.config.modalities),
            default=Default(
                sampler=base.sampler if diffusion else None,
                num_inference_steps=base.num_inference_steps if diffusion else 1,
                num_samples=base.num_samples if diffusion else 1,
            ),
            samplers=[Sampler(name=name) for name in allowed_samplers(model.config.diffusion.objective)]
            if diffusion
            else [],
            card=model.card,
            grid=Grid(shape=model.config.preprocess.spatial_shape, spacing_mm=model.config.preprocess.spacing_mm),
        )
        limits = {name: getattr(settings, name) for name in Limits.model_fields}
        return Models(models=[card], limits=Limits(**limits), notice=NOTICE)

    @app.get("/v1/example", response_class=FileResponse, responses=_REFUSALS, tags=["service"])
    async def example() -> FileResponse:
        """Return the built-in example, a simulated head."""
        name, path = await anyio.to_thread.run_sync(_example, settings.folder, model)
        return _attached(path, f"example_{name}")

    @app.get("/v1/health/live", tags=["service"])
    async def live() -> Health:
        """Say that the service answers."""
        return Health(status="ok")

    @app.get("/v1/health/ready", responses={503: _REFUSALS[503]}, tags=["service"])
    async def ready() -> Health:
        """Say that jobs are taken: the store answers, and a copy of the model is loaded and warm."""
        counts = await service.store.acall("counts")
        if counts["draining"]:
            raise busy("the service is about to stop", 30)
        if not counts["workers"]:
            raise busy("no copy of the model is ready", 5)
        return Health(status="ok")

    @app.get("/metrics", response_class=Response, tags=["service"])
    async def metrics() -> Response:
        """Return the service's numbers for Prometheus."""
        return Response(prometheus_text(await service.store.acall("counts")), media_type="text/plain; version=0.0.4")


def _add_pages(app: FastAPI) -> None:
    web = Path(str(resources.files("serve"))) / "web"
    borrowed = {
        "niivue.js": Path(str(resources.files("nilearn"))) / "_assets/js/niivue.umd.js",
        "swagger-ui.js": Path(str(resources.files("fastapi_offline"))) / "static/swagger-ui-bundle.js",
        "swagger-ui.css": Path(str(resources.files("fastapi_offline"))) / "static/swagger-ui.css",
    }
    pages = {file.name: file for file in web.iterdir() if file.is_file()} | borrowed

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(pages["index.html"], media_type="text/html")

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(pages["docs.html"], media_type="text/html")

    @app.get("/web/{name}", include_in_schema=False)
    async def file(name: str) -> FileResponse:
        if name not in pages:
            raise Problem(404, "there is no such page")
        return FileResponse(pages[name], headers={"Cache-Control": "max-age=3600"})


def _add_errors(app: FastAPI) -> None:
    def answer(problem: Problem) -> JSONResponse:
        return JSONResponse(problem.as_dict(), problem.status, headers=problem.headers, media_type=MEDIA_TYPE)

    @app.exception_handler(Problem)
    async def ours(request: Request, error: Problem) -> JSONResponse:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def fields(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = (f"{'.'.join(str(part) for part in item['loc'][1:])}: {item['msg']}" for item in error.errors())
        return answer(Problem(422, "; ".join(wrong)))

    @app.exception_handler(HTTPException)
    async def framework(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, Problem):  # raised while the form was read
            return answer(error.__cause__)
        return answer(Problem(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        return answer(Problem(500, "an internal error; the service's log has more"))


def _attached(path: Path, name: str) -> FileResponse:
    if not path.is_file():
        raise Problem(404, "the file has expired")
    suffix = ".zip" if path.suffix == ".zip" else ".nii.gz"
    return FileResponse(path, media_type=ZIP if suffix == ".zip" else GZIP, headers=_disposition(f"{name}{suffix}"))


def _disposition(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}


def _compressed(path: Path) -> bytes:
    import gzip

    return gzip.compress(path.read_bytes(), compresslevel=1, mtime=0)


def _example(folder: Path, model: Model) -> tuple[str, Path]:
    """Return modality and file of the example, simulated at the first call."""
    from aldm.data.nifti_header import source_of
    from aldm.data.phantom import MODALITIES_OF_LAYOUT, simulate_subject
    from aldm.data.volume import save_nifti

    names = model.config.modalities
    layout = max(MODALITIES_OF_LAYOUT, key=lambda one: len(set(MODALITIES_OF_LAYOUT[one]) & set(names)))
    source = next(name for name in names if name in MODALITIES_OF_LAYOUT[layout])
    path = folder / f"example_{source}.nii.gz"
    if not path.exists():
        volume = simulate_subject(20_261, 0, layout, EXAMPLE_SPACING_MM)[source]
        grid = source_of(volume.affine, volume.data.shape, path)
        save_nifti(path, volume.data, grid, description="simulated head", overwrite=True)
    return source, path
