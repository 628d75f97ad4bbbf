"""The volumes of a request: the form's fields `volume`, whose modality `source` says, and `volume_MODALITY`.

`volume` may be given several times where each one's name or header says what it is.
The first one in the form's order sets the grid of the result, as the first `--source` of `aldm translate` does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, File, Form, Request, UploadFile
from pydantic import WithJsonSchema
from starlette.datastructures import UploadFile as FormFile

from aldm.data.modalities import MODALITIES
from serve.files import volume_folders
from serve.problems import Problem, without_paths
from serve.settings import Settings
from serve.uploads import accept

AUTO = "auto"
VOLUME = "volume"
OF_FIELD = {VOLUME: None} | {f"{VOLUME}_{name}": name for name in MODALITIES}
"""Field -> the modality of its volume; None: `source` says it."""
_BYTES: dict[str, Any] = {"type": "string", "format": "binary"}
_FILE, _FILES = WithJsonSchema(_BYTES), WithJsonSchema({"type": "array", "items": _BYTES})


def _described(words: str) -> Any:
    return File(description=f"{words}: NIfTI (.nii, .nii.gz) or a zip of one DICOM series")


def _of(modality: str) -> Any:
    return _described(f"a {modality} volume of the same head, beside or instead of `volume`")


@dataclass(frozen=True)
class Upload:
    """A volume as it came."""

    field: str
    """Of the form; with its place among all volumes where the form has it several times."""
    source: str
    """Its modality; auto where its name or header is to say it."""
    file: FormFile

    @property
    def name(self) -> str:
        """What the client calls the file."""
        return self.file.filename or ""


async def _uploads(
    request: Request,
    volume: Annotated[list[UploadFile] | None, _described("the volume, or some of several"), _FILES] = None,
    volume_t1: Annotated[UploadFile | None, _of("t1"), _FILE] = None,
    volume_t1ce: Annotated[UploadFile | None, _of("t1ce"), _FILE] = None,
    volume_t2: Annotated[UploadFile | None, _of("t2"), _FILE] = None,
    volume_flair: Annotated[UploadFile | None, _of("flair"), _FILE] = None,
    volume_pd: Annotated[UploadFile | None, _of("pd"), _FILE] = None,
    source: Annotated[
        str, Form(description="modality of `volume`; auto reads it from the file's name or header")
    ] = AUTO,
) -> list[Upload]:
    """Return the volumes in the form's order, which the parameters do not tell.

    Raises:
        Problem: 422, there is none, a field of a modality is given twice, or `source` with another number of `volume`
            than one.
    """
    form = await request.form()
    plain, found = len(form.getlist(VOLUME)), dict[str, Upload]()
    if source != AUTO and plain != 1:
        raise Problem(422, f"source says what one {VOLUME} is, got {plain} of them: leave it out")
    for field, value in form.multi_items():
        if field not in OF_FIELD:
            continue
        if isinstance(value, str):
            raise Problem(422, f"{field}: wanted a file, got text")
        name = f"{VOLUME} {len(found) + 1}" if field == VOLUME and plain > 1 else field
        if name in found:
            raise Problem(422, f"{field} is given twice: give each modality once")
        found[name] = Upload(name, OF_FIELD[field] or source, value)
    if not found:
        raise Problem(422, f"no volume: give {VOLUME}, or {VOLUME}_MODALITY, such as {VOLUME}_t1")
    return list(found.values())


Uploads = Annotated[list[Upload], Depends(_uploads)]


def accept_all(
    uploads: Sequence[Upload], folder: Path, settings: Settings, series: str | None = None
) -> tuple[list[str], int]:
    """Check the volumes of a request, one after another, and keep them in the folder of its job.

    Returns the words of their headers, and the first one's voxels.

    Args:
        uploads: in the form's order.
        folder: of the job, empty.
        settings: the limits; that on voxels is of all of them together.
        series: as `accept` takes it, of every one.

    Raises:
        Problem: as `accept`; it names the field.
    """
    words = list[str]()
    voxels = list[int]()
    for upload, place in zip(uploads, volume_folders(folder, len(uploads)), strict=True):
        place.mkdir(mode=0o700, exist_ok=True)
        left = settings.max_voxels - sum(voxels)
        try:
            said, count = accept(
                upload.file.file, upload.name, place, settings.model_copy(update={"max_voxels": left}), series
            )
        except Problem as problem:
            detail = re.sub(rf"^{VOLUME}\b", upload.field, without_paths(problem.detail, folder.parent))
            if voxels and f"limit is {left:,}" in detail:
                detail += f": the volumes of a request count together, of {settings.max_voxels:,} voxels"
            raise Problem(problem.status, detail, headers=problem.headers) from problem
        words.append(said)
        voxels.append(count)
    return words, voxels[0]
