"""The HTTP interface: a FastAPI application over the job store.

It holds no job and no model, so it may die at any time.
"""

import json
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import FastAPI, Form, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from aldm import __version__
from aldm.pairs import takes_several
from aldm.sampling import allowed_samplers
from aldm.translate import NOTICE
from serve import files
from serve.metrics import prometheus_text
from serve.models import Model
from serve.pages import add_pages, example_of
from serve.problems import FIELDS, MEDIA_TYPE, Problem, busy
from serve.records import DONE, FINISHED
from serve.results import GZIP, add_results, attached
from serve.schemas import REFUSALS, Default, Grid, Health, JobView, Limits, ModelCard, Models, Sampler
from serve.security import Guard
from serve.settings import Settings
from serve.store import StoreHandle
from serve.submissions import Service
from serve.volumes import OF_FIELD, Uploads
from serve.work_folder import INCOMING

ALIVE_S = 10.0
"""How long an event stream may be silent."""
MAX_TARGETS = 16
"""Of an upload's form: the volumes, targets, and each other field once."""

DESCRIPTION = f"""Translate a 3D MR volume into other modalities. Results are on exactly the grid of the upload, and
each is a {NOTICE}. Errors are problem details (RFC 9457)."""
SamplerName = Annotated[str | None, Form(description="of the model's samplers; none takes the default")]
Steps = Annotated[int | None, Form(ge=1, le=10_000, description="network evaluations per sample")]
Samples = Annotated[
    int | None,
    Form(
        ge=1,
        le=10_000,
        description="the result is their mean; above 1 gives their spread; objective regression takes 1",
    ),
]
SeriesName = Annotated[
    str | None,
    Form(description="which series of a zip that holds several: its number, UID, or a part of its description"),
]
AcceptUnlike = Annotated[
    bool,
    Form(description="translate a volume that is unlike the model's training data, which is answered 422 otherwise"),
]
Seed = Annotated[int, Form(ge=0, lt=2**63 - 2**20, description="of the first sample; sample i has seed + i")]


def build_api(settings: Settings, model: Model, tokens: Mapping[str, str], store: StoreHandle) -> Any:
    """Return the ASGI application, guard included.

    Args:
        settings: of the service.
        model: what the workers run.
        tokens: name -> SHA-256; empty answers this machine alone.
        store: the jobs.
    """
    tempfile.tempdir = str(settings.folder / INCOMING)  # where a form's files are kept while they arrive
    service = Service(settings, model, store)
    app = FastAPI(
        title="aldm: MR translation",
        description=DESCRIPTION,
        version=__version__,
        docs_url=None,
        redoc_url=None,
        form_limits={"max_files": len(OF_FIELD), "max_fields": MAX_TARGETS + 8, "max_part_size": 1024},
    )
    _add_errors(app)
    _add_translations(app, service)
    add_results(app, service)
    _add_service(app, service)
    add_pages(app)
    return Guard(app, settings=settings, tokens=tokens, store=store)


def _add_translations(app: FastAPI, service: Service) -> None:
    @app.post("/v1/translations", status_code=202, responses=REFUSALS, tags=["translations"])
    async def submit(
        request: Request,
        response: Response,
        uploads: Uploads,
        target: Annotated[
            list[str], Form(min_length=1, max_length=MAX_TARGETS, description="wanted modality; repeatable")
        ],
        sampler: SamplerName = None,
        num_inference_steps: Steps = None,
        num_samples: Samples = None,
        seed: Seed = 0,
        series: SeriesName = None,
        format: Annotated[Literal["nii.gz", "dicom"], Form(description="of the results")] = "nii.gz",
        accept_unlike: AcceptUnlike = False,
    ) -> JobView:
        """Queue a translation. Its state is at the answer's Location."""
        await _check_fields(request, FIELDS, service.model.config.modalities)
        values = {"sampler": sampler, "num_inference_steps": num_inference_steps}
        values |= {"num_samples": num_samples, "seed": seed, "format": format, "series": series}
        values |= {"accept_unlike": accept_unlike}
        view = await service.submit(request, uploads, values, target)
        response.headers["Location"] = view.links.self
        return view

    @app.post(
        "/v1/translate",
        response_class=FileResponse,
        responses=REFUSALS | {200: {"content": {GZIP: {}}, "description": "The translation, NIfTI (.nii.gz)."}},
        tags=["translations"],
    )
    async def translate(
        request: Request,
        uploads: Uploads,
        target: Annotated[str, Form(description="wanted modality")],
        sampler: SamplerName = None,
        num_inference_steps: Steps = None,
        num_samples: Samples = None,
        seed: Seed = 0,
        series: SeriesName = None,
        accept_unlike: AcceptUnlike = False,
    ) -> FileResponse:
        """Translate in one call that ends with the result, for scripts."""
        await _check_fields(request, FIELDS - {"format"}, service.model.config.modalities)
        values = {"sampler": sampler, "num_inference_steps": num_inference_steps}
        values |= {"num_samples": num_samples, "seed": seed, "format": files.NIFTI, "series": series}
        values |= {"accept_unlike": accept_unlike}
        view = await service.submit(request, uploads, values, [target])
        owner = request.state.owner
        try:
            while view.state not in FINISHED:
                view = await service.news.next(view.id, owner)
        except BaseException:  # the client hung up, or gets an error: nobody will come for the result
            service.store.tell("cancel", view.id, owner)
            raise
        if view.error is not None:
            raise Problem(view.error.status, view.error.detail)
        if view.state != DONE:
            raise Problem(409, "the translation was cancelled")
        return attached(files.result_file(service.folder / view.id, target, files.NIFTI), f"synthetic-{target}")

    @app.get("/v1/translations/{job_id}", responses=REFUSALS, tags=["translations"])
    async def state(request: Request, job_id: str) -> JobView:
        """Say where a translation stands."""
        return await service.view(job_id, request.state.owner)

    @app.get(
        "/v1/translations/{job_id}/events",
        response_class=StreamingResponse,
        responses=REFUSALS | {200: {"content": {"text/event-stream": {}}, "description": "A `job` event per change."}},
        tags=["translations"],
    )
    async def events(request: Request, job_id: str) -> StreamingResponse:
        """Stream every change of a translation as a server-sent event, until it ends."""
        first = await service.view(job_id, request.state.owner)
        stream = _events(service, first, request.state.owner)
        return StreamingResponse(stream, media_type="text/event-stream")

    @app.delete("/v1/translations/{job_id}", status_code=204, responses=REFUSALS, tags=["translations"])
    async def cancel(request: Request, job_id: str) -> Response:
        """Cancel a translation (the sampler stops at its next step); of a finished one, remove every file."""
        await service.remove(job_id, request.state.owner)
        return Response(status_code=204)


async def _check_fields(request: Request, known: frozenset[str], modalities: Sequence[str]) -> None:
    """Refuse a field that would be passed over, such as a misspelt one."""
    unknown = sorted(set(await request.form()) - known - set(OF_FIELD))
    if unknown:
        volumes = [field for field, name in OF_FIELD.items() if name is None or name in modalities]
        raise Problem(422, f"unknown field {unknown[0]!r}, wanted of {', '.join((*volumes, *sorted(known)))}")


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
        try:
            view = await service.news.next(view.id, owner)
        except Problem as problem:
            yield f"event: problem\ndata: {json.dumps(problem.as_dict())}\n\n"
            return


def _add_service(app: FastAPI, service: Service) -> None:
    settings, model = service.settings, service.model
    base = model.config.sampling
    diffusion = model.kind == "aldm"

    @app.get("/v1/models", responses=REFUSALS, tags=["service"])
    async def models() -> Models:
        """Say what can be translated, how, how well, and within which limits."""
        card = ModelCard(
            name=model.name,
            description=model.description,
            hash=model.hash,
            kind=model.kind,
            modalities=list(model.config.modalities),
            takes_several=takes_several(model.config, model.kind),
            default=Default(
                sampler=base.sampler if diffusion else None,
                num_inference_steps=base.num_inference_steps if diffusion else 1,
                num_samples=base.num_samples if diffusion else 1,
            ),
            samplers=[Sampler(name=name) for name in allowed_samplers(model.config.diffusion.objective)]
            if diffusion
            else [],
            uncertainty_level=model.uncertainty_level,
            card=model.card,
            grid=Grid(shape=model.config.preprocess.spatial_shape, spacing_mm=model.config.preprocess.spacing_mm),
        )
        limits = {name: getattr(settings, name) for name in Limits.model_fields}
        return Models(models=[card], limits=Limits(**limits), notice=NOTICE)

    @app.get("/v1/example", response_class=FileResponse, responses=REFUSALS, tags=["service"])
    async def example() -> FileResponse:
        """Return the built-in example, a simulated head."""
        name, path = await anyio.to_thread.run_sync(example_of, settings.folder, model)
        return attached(path, f"example_{name}")

    @app.get("/v1/health/live", tags=["service"])
    async def live() -> Health:
        """Say that the service answers."""
        return Health(status="ok")

    @app.get("/v1/health/ready", responses={503: REFUSALS[503]}, tags=["service"])
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
