"""What each input of `aldm translate` is taken for: as --source says, or what its name and header say."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from aldm.cli import with_flags
from aldm.data.layouts import discover, stopping
from aldm.data.naming import NotAVolume, check_source, choose_source, read_name
from aldm.errors import UserError
from pipelines.translate_files import Input

AUTO, ALL = "auto", "all"
TABLE_SUFFIX = ".csv"


class Pairs(Protocol):
    """What knows which translations there are."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that it knows."""

    def translates(self, source: str, target: str) -> bool:
        """Whether it makes one of the other."""

    def check_pair(self, source: str, target: str) -> None:
        """Refuse with a UserError what it does not translate."""

    def check_sources(self, sources: Sequence[str], target: str) -> None:
        """Refuse with a UserError several sources that it does not translate together."""


def named_sources(values: Sequence[str]) -> list[tuple[str, Path]]:
    """Return (modality, path) of `--source MODALITY=PATH`, said several times; [] where the flag names no path.

    Raises:
        UserError: some name a path and some do not, or two name one modality.
    """
    pairs = [value.partition("=") for value in values]
    named = [(name, Path(path)) for name, sign, path in pairs if sign]
    if not named:
        if len(values) > 1:
            raise UserError(
                f"--source is given {len(values)} times: once for an INPUT, or each with its file, such as "
                "--source t1=a.nii.gz --source t2=b.nii.gz"
            )
        return []
    wrong = [value for value, (name, sign, path) in zip(values, pairs, strict=True) if not (name and sign and path)]
    if wrong:
        raise UserError(f"--source {wrong[0]}: wanted MODALITY=PATH, as the others have it")
    names = [name for name, _ in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"--source names {', '.join(twice)} twice: give each modality once")
    return named


def several_sources(named: Sequence[tuple[str, Path]], target: str, pairs: Pairs) -> Input:
    """Return the one input that several named files are: the result lies on the first one's grid.

    Args:
        named: (modality, path), at least one.
        target: a modality, or all: every one that is not among the sources.
        pairs: of the model.

    Raises:
        UserError: a file that is missing or whose name says another modality, or what the model does not translate.
    """
    for name, path in named:
        if not path.exists():
            raise UserError(f"{path} does not exist")
        check_source(path.name, name)
    (first, path), *others = named
    names = tuple(name for name, _ in named)
    targets = tuple(name for name in pairs.modalities if name not in names) if target == ALL else (target,)
    if not targets:
        raise UserError(f"the sources {' and '.join(names)} are all that the model knows: nothing is left to make")
    for one in targets:
        if others:
            pairs.check_sources(names, one)
        else:
            pairs.check_pair(first, one)
    return Input(path, first, "request", targets, others=tuple(others))


def table_inputs(table: Path, source: str, target: str, pairs: Pairs) -> list[Input]:
    """Return an input for each subject of a table, of which nothing is made where its volumes do not allow it.

    Args:
        table: as layout table of `aldm prepare`: subject_id, modality, path.
        source: a modality, or auto: every volume that the model knows but the target.
        target: a modality, or all: every one that is not among a subject's sources.
        pairs: of the model.

    Raises:
        UserError: not such a table.
    """
    subjects, problems = discover(table, "table")
    if wrong := stopping(problems):
        raise UserError(f"{wrong[0].path}: {wrong[0].message}" + f" (and {len(wrong) - 1} more)" * (len(wrong) > 1))
    if any(subject.series for subject in subjects):
        raise UserError(f"{table}: the column series is for aldm prepare: leave it out, and give folders of one series")
    inputs = []
    for subject in subjects:
        known = [name for name in subject.volumes if name in pairs.modalities and name != target]
        named = [(name, subject.volumes[name]) for name in known if source in (AUTO, name)]
        try:
            if not named:
                raise NotAVolume(f"subject {subject.subject_id} has no volume to make {target} of")
            inputs.append(replace(several_sources(named, target, pairs), name=subject.subject_id))
        except UserError as error:
            status = "skipped" if isinstance(error, NotAVolume) and not named else "failed"
            path = (named or list(subject.volumes.items()))[0][1]
            inputs.append(Input(path, status=status, message=with_flags(str(error))))
    return inputs


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
