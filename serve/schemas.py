"""What goes over HTTP, as the OpenAPI document describes it."""

from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from aldm.data.naming import SaidBy
from aldm.translate import NOTICE
from serve.problems import MEDIA_TYPE
from serve.records import Job


class ProblemDetail(BaseModel):
    """An error (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str = Field(description="what is wrong, what was wanted, and the way out")


REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ProblemDetail, "description": words, "content": {MEDIA_TYPE: {}}}
    for status, words in {
        400: "A request that cannot be read.",
        401: "No token, or a wrong one.",
        403: "Not from this machine, which alone is answered without tokens.",
        404: "No such translation.",
        409: "Not finished yet.",
        408: "The body took too long to arrive.",
        411: "The length of the body is not said.",
        413: "Too large.",
        415: "Another kind of file.",
        422: "Cannot be translated; the detail says why.",
        503: "Busy; Retry-After says for how long.",
    }.items()
}
"""What any request may be answered with."""


class ModelName(BaseModel):
    """Which model."""

    name: str
    hash: str


class ResultLinks(BaseModel):
    """Where the results for one target are."""

    result: str
    preview: str
    uncertainty: str | None
    spread: str | None


class Links(BaseModel):
    """Where the parts of a job are."""

    self: str
    events: str
    source: str = Field(description="the first volume")
    sources: dict[str, str] = Field(description="every volume, by its modality")
    results: dict[str, ResultLinks]


class LikenessView(BaseModel):
    """How unlike the volume is to the training data; of several, that which is most."""

    distance: float = Field(description="1 is as unlike as is taken without accept_unlike")
    source: str = Field(description="the modality whose training volumes it is compared with")
    differs_in: str = Field(description="in what: shape, brightness (where it is bright), contrast or texture")
    looks_like: str = Field(description="the modality whose training volumes it is nearest to")


class JobView(BaseModel):
    """A translation: what was asked for and where it stands."""

    id: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    source: str = Field(description="modality of the first volume, whose grid the results have")
    source_from: SaidBy
    sources: dict[str, SaidBy] = Field(description="modality of every volume, in the form's order, and who said so")
    targets: list[str]
    sampler: str | None
    num_inference_steps: int
    num_samples: int
    eta: float
    seed: int
    format: Literal["nii.gz", "dicom"]
    num_boxes: int | None = Field(description="boxes of the model's shape that the volume took; null until it is done")
    share_outside: float | None = Field(
        description="share of the volume's foreground outside of these, which is background in the result"
    )
    uncertainty_level: float | None = Field(
        description="share of the voxels whose true value is to lie within the uncertainty; null: the model has none"
    )
    accept_unlike: bool
    likeness: LikenessView | None = Field(
        description="null until the job ends, and for a model that keeps no statistics of its training data"
    )
    progress: float = Field(ge=0, le=1)
    queue_position: int | None
    attempt: int = Field(description="how often it was begun: above 1 after a copy of the model died")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None
    seconds_waited: float
    seconds_running: float | None
    error: ProblemDetail | None
    model: ModelName
    notice: str
    links: Links


class Sampler(BaseModel):
    """A way to sample that goes with the model."""

    name: str


class Default(BaseModel):
    """What is taken where a request says nothing."""

    sampler: str | None
    num_inference_steps: int
    num_samples: int


class Grid(BaseModel):
    """The grid that volumes are resampled to."""

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]


class ModelCard(BaseModel):
    """A model and what was measured of it."""

    name: str
    description: str
    hash: str
    kind: str
    modalities: list[str]
    takes_several: bool = Field(description="whether it translates several volumes of one head together")
    default: Default
    samplers: list[Sampler]
    uncertainty_level: float | None = Field(description="as of a translation that is sampled by default")
    card: list[dict[str, Any]] = Field(description="measured quality and latency per sampler and number of steps")
    grid: Grid


class Limits(BaseModel):
    """What the service takes."""

    max_upload_bytes: int
    max_voxels: int
    max_grid_voxels: int = Field(description="of the volume on the model's grid, which covers its field of view")
    max_queue: int
    max_samples: int
    max_evaluations: int
    keep_hours: float


class Models(BaseModel):
    """What the service offers."""

    models: list[ModelCard]
    limits: Limits
    notice: str


class Health(BaseModel):
    """That the service is well."""

    status: Literal["ok"]


def job_view(values: dict[str, Any], now: float) -> JobView:
    """Return a job as HTTP shows it.

    Args:
        values: what `JobStore.view` returned.
        now: seconds since the epoch.
    """
    job = Job(**{name: value for name, value in values.items() if name not in ("queue_position", "expires")})
    base = f"/v1/translations/{job.id}"
    started = job.started or job.finished or now
    return JobView(
        **{
            name: values[name]
            for name in JobView.model_fields
            if name in values and name not in ("error", "model", "links", "sources")
        },
        sources=job.sources,
        created_at=_time(job.created),
        started_at=_time(job.started),
        finished_at=_time(job.finished),
        expires_at=_time(values["expires"]),
        seconds_waited=round(started - job.created, 3),
        seconds_running=None if job.started is None else round((job.finished or now) - job.started, 3),
        error=None if job.error is None else ProblemDetail(**job.error),
        model=ModelName(**job.model),
        notice=NOTICE,
        links=Links(
            self=base,
            events=f"{base}/events",
            source=f"{base}/source",
            sources={name: f"{base}/source?modality={name}" for name in job.sources},
            results={
                target: ResultLinks(
                    result=f"{base}/result?target={target}",
                    preview=f"{base}/preview.png?target={target}",
                    uncertainty=None if job.uncertainty_level is None else f"{base}/uncertainty?target={target}",
                    spread=f"{base}/spread?target={target}" if job.num_samples > 1 else None,
                )
                for target in job.targets
            },
        ),
    )


def _time(seconds: float | None) -> Any:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
