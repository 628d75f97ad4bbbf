"""What each input of `aldm translate` is taken for: as --source says, or what its name and header say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from aldm.cli import with_flags
from aldm.data.naming import NotAVolume, check_source, choose_source, read_name
from aldm.errors import UserError
from pipelines.translate_files import Input

AUTO, ALL = "auto", "all"


class Pairs(Protocol):
    """What knows which translations there are."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that it knows."""

    def translates(self, source: str, target: str) -> bool:
        """Whether it makes one of the other."""

    def check_pair(self, source: str, target: str) -> None:
        """Refuse with a UserError what it does not translate."""


def choose_inputs(
    paths: Sequence[Path],
    source: str,
    target: str,
    pairs: Pairs,
    *,
    is_batch: bool,
    series: str | None,
    max_voxels: int,
) -> list[Input]:
    """Return what each input is taken for, and of what nothing is made.

    Args:
        paths: files or series folders.
        source: a modality, or auto: by their names, and by their headers where the names do not say.
        target: a modality, or all.
        pairs: of the model.
        is_batch: whether an input that is something else than `source`, or than anything that the model translates, is
            skipped; otherwise it is an error.
        series: which DICOM series, where there are several.
        max_voxels: largest volume that is read.

    Raises:
        UserError: what is wrong with the one input, where it is no batch.
    """
    inputs = []
    for path in paths:
        try:
            if source != AUTO:
                check_source(path.name, source)
                inputs.append(Input(path, source, "request", _targets(source, target, pairs)))
            else:
                inputs.append(_guessed(path, target, pairs, series, max_voxels))
        except UserError as error:
            message = str(error).removeprefix(f"{path}: ")
            if not is_batch:
                raise UserError(f"{path}: {message}") from error
            status = "skipped" if isinstance(error, NotAVolume) else "failed"
            inputs.append(Input(path, status=status, message=with_flags(message)))
    return inputs


def _guessed(path: Path, target: str, pairs: Pairs, series: str | None, max_voxels: int) -> Input:
    reading = read_name(path.name)
    header = "" if reading.refused or reading.modality else _header_words(path, series, max_voxels)
    found, place = choose_source(path.name, header, pairs.modalities)
    if found == target:
        raise NotAVolume(f"by its {place} it is {found} already")
    try:
        return Input(path, found, place, _targets(found, target, pairs))
    except UserError as error:  # another volume of the folder than those that the model was trained for
        raise NotAVolume(f"by its {place} it is {found}: {error}") from error


def _targets(source: str, target: str, pairs: Pairs) -> tuple[str, ...]:
    if target == ALL:
        return tuple(name for name in pairs.modalities if pairs.translates(source, name))
    pairs.check_pair(source, target)
    return (target,)


def _header_words(path: Path, series: str | None, max_voxels: int) -> str:
    """Return what a volume's header says in words."""
    from aldm.data.dicom import is_series, series_description
    from aldm.data.volume import read_source

    if is_series(path):
        return series_description(path, series=series, max_voxels=max_voxels)
    return read_source(path, max_voxels=max_voxels).words()
