"""Errors of the service as problem details (RFC 9457): what, wanted, got, and the way out."""

import re
from http import HTTPStatus
from pathlib import Path
from typing import Any

FIELDS = frozenset(
    {"source", "target", "sampler", "num_inference_steps", "num_samples", "seed", "format", "series", "accept_unlike"}
)
"""The fields of the form, which have the library's names."""
_PARAMETER = re.compile(r"`([a-z][a-z0-9_]*)`")
MEDIA_TYPE = "application/problem+json"


class Problem(Exception):
    """An answer that is an error. `detail` never holds a path of the server or a field of a DICOM header.

    What the library calls a parameter (`num_samples`) is a field of the form there, or the service's own setting.
    """

    def __init__(self, status: int, detail: str, *, headers: dict[str, str] | None = None) -> None:
        detail = _PARAMETER.sub(_field, detail)
        super().__init__(detail)
        self.status, self.detail, self.headers = status, detail, headers or {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.status, self.detail, self.headers)

    def as_dict(self) -> dict[str, Any]:
        """Return the body of the answer."""
        title = HTTPStatus(self.status).phrase
        return {"type": "about:blank", "title": title, "status": self.status, "detail": self.detail}


def busy(detail: str, seconds: int) -> Problem:
    """Return the answer of a service that takes no more just now."""
    return Problem(503, f"{detail}; try again in {seconds} s", headers={"Retry-After": str(seconds)})


def without_paths(text: str, jobs: Path) -> str:
    """Return an error's words without paths of the service: what lies in a job's folder is the client's volume.

    Args:
        text: of an error.
        jobs: the folder of all jobs.
    """
    inside = r"(/[^\s/:,;'\"]+)"
    text = re.sub(re.escape(str(jobs)) + inside + "+", "volume", text)
    return re.sub(re.escape(str(jobs.parent)) + inside + "*", "the service's folder", text)


def _field(match: re.Match[str]) -> str:
    return match[1] if match[1] in FIELDS else f"the service's {match[1]}"


def _rebuild(status: int, detail: str, headers: dict[str, str]) -> Problem:
    return Problem(status, detail, headers=headers)
