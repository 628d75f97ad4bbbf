"""A job of the service: what is asked for and where it stands, kept as `jobs/ID/job.json`."""

import contextlib
import json
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from aldm.data.naming import SaidBy

QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
FINISHED = (DONE, FAILED, CANCELLED)
JOB_FILE = "job.json"
_ID_BYTES = 24
_ID = re.compile(r"[\w-]{32}", re.ASCII)
_PICTURE_BYTES = 2**21
"""Of a preview and of what is said of a translation, with room to spare."""


@dataclass
class Job:
    """One translation request; times are seconds since the epoch."""

    id: str
    owner: str
    """Name and part of the hash of the token that made it."""
    source: str
    """Of the volume whose grid the result has."""
    source_from: SaidBy
    targets: list[str]
    sampler: str | None
    num_inference_steps: int
    num_samples: int
    eta: float
    seed: int
    format: str
    model: dict[str, str]
    """name and hash."""
    voxels: int = 0
    """Of the first volume, and so of every result."""
    num_boxes: int | None = None
    """Boxes of the model's shape that the volume took; None before it has been made."""
    share_outside: float | None = None
    """Share of the volume's foreground that lies in none of them, and so is background in the result."""
    uncertainty_level: float | None = None
    """Share of the voxels whose true value is to lie within the uncertainty; None where the model gives none."""
    accept_unlike: bool = False
    """Whether a volume unlike the training data is to be translated."""
    likeness: dict[str, Any] | None = None
    """How unlike it is (`aldm.likeness.Likeness`); None before it was prepared, and where the model cannot tell."""
    state: str = QUEUED
    progress: float = 0.0
    attempt: int = 0
    """How often a worker has begun it."""
    deaths: int = 0
    """How often its worker fell silent."""
    worker: str = ""
    """Who has it, or had it last."""
    claim: str = ""
    """Which of the worker's requests it was lent at."""
    sources: dict[str, SaidBy] = field(default_factory=dict)
    """Modality of every volume, in the form's order -> who said so; `source` is the first."""
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    error: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Complete a record that was written when a job had one volume."""
        self.sources = self.sources or {self.source: self.source_from}

    def batch_key(self) -> tuple[Any, ...]:
        """Jobs of the same key can be made in one pass: volumes all lie on the model's grid, so shapes are equal."""
        return (self.sampler, self.num_inference_steps, self.num_samples, self.eta, self.model["hash"])

    def expected_bytes(self) -> int:
        """Return what its results may take, with what is written on the way to them."""
        volumes = (
            1 + (self.num_samples > 1) + (self.uncertainty_level is not None)
        )  # float32, or 16-bit numbers twice: as files and zipped
        return len(self.targets) * (round(4.2 * self.voxels) * volumes + _PICTURE_BYTES)


def new_id() -> str:
    """Return an id that cannot be guessed."""
    return secrets.token_urlsafe(_ID_BYTES)


def is_id(name: str) -> bool:
    """Whether a name has the form of `new_id`'s."""
    return _ID.fullmatch(name) is not None


def read_record(folder: Path) -> Job | None:
    """Return the job of a folder; None for a folder that holds none."""
    try:
        values = json.loads((folder / JOB_FILE).read_text())
        known = {item.name for item in fields(Job)}
        job = Job(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    return job if job.id == folder.name else None


def write_record(folder: Path, job: Job) -> None:
    """Write a job's record whole and have it on the disk: it outlives the process and the machine's power.

    A job whose folder is gone (its client hung up while it was queued) gets no record; its worker will fail it.
    """
    with contextlib.suppress(FileNotFoundError):
        write_synced(folder / JOB_FILE, json.dumps(asdict(job)))


def write_synced(path: Path, text: str) -> None:
    """Replace a small file whole; it and its name are on the disk when this returns."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
