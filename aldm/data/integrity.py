"""Are the files of a data set usable? Headers, voxels and geometry of every file, before anything is computed."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aldm.config import PreprocessConfig, to_dict
from aldm.data.dicom import is_series, read_series
from aldm.data.layouts import LABEL_MAPS, Problem, SubjectFiles, stopping
from aldm.data.nifti_header import MAX_VOXELS
from aldm.data.overlap import MIN_OVERLAP, labels_inside, lost_labels, shared_field_of_view
from aldm.data.preprocess import model_grid
from aldm.data.registration import misalignment_mm
from aldm.data.store import FORMAT_VERSION, ShardReader, shard_path
from aldm.data.volume import NiftiSource, Volume, load_nifti
from aldm.errors import UserError

MIN_LABELS_INSIDE = 0.95
"""Of a segmentation's or mask's voxels, in the field of view of the first modality."""
MAX_MISALIGNMENT_MM = 2.0
"""Distance by mutual information above which volumes do not lie on each other; half a voxel where that is more."""
_EDGE_BYTES = 2**16


@dataclass(frozen=True, eq=False)
class LoadedSubject:
    """The volumes of a subject as they are in their files, RAS+."""

    volumes: dict[str, Volume]
    sources: dict[str, NiftiSource]
    mask: Volume | None
    seg: Volume | None
    tissue: Volume | None


@dataclass(frozen=True)
class SubjectCheck:
    """What check_subject found."""

    subject_id: str
    key: str
    """Content key of the subject's files and the preprocessing ('' when a file cannot be read)."""
    finished: bool
    """The store already holds a shard with this key."""
    problems: tuple[Problem, ...]
    num_voxels: int = 0
    """Voxels of all its files (0 when finished)."""
    num_grid_voxels: int = 0
    """Voxels of all its arrays on the model's grid (0 when finished)."""


def load_labels(path: Path, *, max_voxels: int = MAX_VOXELS) -> Volume:
    """Read a label map: whole numbers from 0 to 255, as float32.

    Raises:
        UserError: as load_nifti, and for other values.
    """
    volume, _ = load_nifti(path, max_voxels=max_voxels, allow_constant=True)
    low, high = float(volume.data.min()), float(volume.data.max())
    if low < 0 or high > 255 or np.any(np.abs(volume.data - np.rint(volume.data)) > 1e-3):
        raise UserError(f"{path}: values from {low:g} to {high:g}, wanted labels: whole numbers from 0 to 255")
    return Volume(np.rint(volume.data), volume.affine)


def load_volume(path: Path, series: str | None = None, *, max_voxels: int = MAX_VOXELS) -> tuple[Volume, NiftiSource]:
    """Read a NIfTI file or a DICOM series as an RAS+ volume, and its grid.

    Raises:
        UserError: as load_nifti and read_series, and for a `series` where there is none.
    """
    if is_series(path):
        volume, source = read_series(path, series=series, max_voxels=max_voxels, patient=False)
        return volume, source.as_nifti()
    if series is not None:
        raise UserError(f"{path}: `series` chooses among DICOM series, and this is none: leave it out")
    return load_nifti(path, max_voxels=max_voxels)


def load_subject(files: SubjectFiles, *, max_voxels: int = MAX_VOXELS) -> tuple[LoadedSubject, list[Problem]]:
    """Read all files of a subject; what cannot be used, or is to be said, is named in the problems.

    What has problems that stop is not whole.
    """
    problems: list[Problem] = []
    volumes: dict[str, Volume] = {}
    sources: dict[str, NiftiSource] = {}
    labels: dict[str, Volume] = {}
    for role, path in files.files().items():
        try:
            if role in LABEL_MAPS:
                labels[role] = load_labels(path, max_voxels=max_voxels)
                if role == "mask" and not labels[role].data.any():
                    raise UserError(f"{path}: the mask is empty")
                if role == "tissue" and labels[role].data.max() > 3:
                    raise UserError(f"{path}: labels above 3, wanted 1 CSF, 2 grey and 3 white matter, 0 elsewhere")
            else:
                volumes[role], sources[role] = load_volume(path, files.series.get(role), max_voxels=max_voxels)
                problems += [Problem(path, note, stops=False) for note in sources[role].notes]
        except UserError as error:
            problems.append(Problem(path, str(error).removeprefix(f"{path}: ")))
    loaded = LoadedSubject(volumes, sources, *(labels.get(role) for role in LABEL_MAPS))
    if not stopping(problems):
        problems += _geometry_problems(files, {**volumes, **labels})
    return loaded, problems


def check_subject(
    files: SubjectFiles, config: PreprocessConfig, root: Path, store: Path | None, max_voxels: int
) -> SubjectCheck:
    """Check every file of a subject, unless the store already holds what would come of them."""
    try:
        key = subject_key(files, config, root)
    except OSError as error:
        path = Path(error.filename or root)
        return SubjectCheck(files.subject_id, "", False, (Problem(path, f"cannot be read: {error.strerror}"),))
    if store is not None and stored_metadata(store, files.subject_id).get("key") == key:
        return SubjectCheck(files.subject_id, key, True, ())
    loaded, problems = load_subject(files, max_voxels=max_voxels)
    if stopping(problems):
        return SubjectCheck(files.subject_id, key, False, tuple(problems))
    extra = [volume for volume in (loaded.mask, loaded.seg, loaded.tissue) if volume is not None]
    volumes = [*loaded.volumes.values(), *extra]
    try:
        _, grid = model_grid(volumes, config, max_voxels=max_voxels)
        affine, shape = model_grid(volumes[:1], config, max_voxels=max_voxels)
    except UserError as error:
        problem = Problem(next(iter(files.volumes.values())), f"{error} (`spacing_mm`, or a higher `max_voxels`)")
        return SubjectCheck(files.subject_id, key, False, (problem,))
    problems += _label_notes(files, loaded.seg, affine, shape)
    if config.register == "none":
        problems += _alignment_notes(files, loaded)
    num_voxels = sum(volume.data.size for volume in volumes)
    return SubjectCheck(files.subject_id, key, False, tuple(problems), num_voxels, math.prod(grid) * len(volumes))


def subject_key(files: SubjectFiles, config: PreprocessConfig, root: Path) -> str:
    """Return the sha256 of what a subject's shard depends on: format version, preprocessing, and its files.

    Of each file: role, path (relative to `root` where it lies below), size, and a sha256 of the content. Of a .nii.gz
    that is its first and last 64 KiB: the header, and the checksum of all voxels that gzip ends with. Of a .nii it is
    the whole file, of the folder of a DICOM series every file in it, and which series is meant.
    """
    described = {role: [relative_name(path, root), *_content(path)] for role, path in files.files().items()}
    for role, series in files.series.items():
        described[role].append(series)
    return digest({"format_version": FORMAT_VERSION, "preprocess": to_dict(config), "files": described})


def relative_name(path: Path, root: Path) -> str:
    """Return the path below `root`, or the whole path when it lies elsewhere."""
    path, root = Path(os.path.abspath(path)), Path(os.path.abspath(root))  # links keep their own names
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def digest(values: Mapping[str, Any]) -> str:
    """Return the sha256 of values that JSON takes, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def stored_metadata(store: Path, subject_id: str) -> dict[str, str]:
    """Return the `key` and the `record` in a subject's shard; nothing where there is no shard or a damaged one."""
    path = shard_path(store, subject_id)
    if not path.is_file():
        return {}
    try:
        return ShardReader(path).metadata
    except UserError:
        return {}


def _content(path: Path) -> tuple[int, str]:
    """Return the size of a file, or of all files in a folder, and a hash of what they hold."""
    if not path.is_dir():
        return path.stat().st_size, _content_hash(path)
    inside = [file for file in sorted(path.iterdir()) if file.is_file()]
    held = [[file.name, file.stat().st_size, _content_hash(file)] for file in inside]
    return sum(file.stat().st_size for file in inside), digest({"files": held})


def _content_hash(path: Path) -> str:
    with path.open("rb") as stream:
        if not path.name.lower().endswith(".gz"):
            return hashlib.file_digest(stream, "sha256").hexdigest()
        content = stream.read(_EDGE_BYTES)
        stream.seek(max(0, path.stat().st_size - _EDGE_BYTES))
        return hashlib.sha256(content + stream.read()).hexdigest()


def _geometry_problems(files: SubjectFiles, volumes: Mapping[str, Volume]) -> list[Problem]:
    """Every file has to lie on the reference, the first modality, as far as the headers say."""
    reference = next(iter(files.volumes))
    fixed = volumes[reference]
    problems = []
    for role, path in files.files().items():
        if role == reference:
            continue
        volume = volumes[role]
        way_out = f"fix its affine, or that of {reference}"
        if volume.data.shape == fixed.data.shape and not np.allclose(volume.affine, fixed.affine, atol=1e-2):
            way_out = (
                f"it has the shape of {reference} and another affine: if the voxels belong together, copy the affine"
            )
        overlap = shared_field_of_view(fixed, volume)
        inside, labelled = labels_inside(volume, fixed) if role in LABEL_MAPS else (1, 1)
        if overlap < MIN_OVERLAP:
            words = "its field of view lies outside"
            if overlap > 0:
                words = f"{overlap:.0%} of its field of view, or of the smaller one, lie in"
            words += f" that of {reference} ({files.volumes[reference].name}), wanted {MIN_OVERLAP:.0%}; {way_out}"
            problems.append(Problem(path, words))
        elif inside < MIN_LABELS_INSIDE * labelled:
            words = f"{inside:,} of {labelled:,} labelled voxels lie in the field of view of {reference}"
            problems.append(Problem(path, f"{words}, wanted {MIN_LABELS_INSIDE:.0%}; {way_out}"))
        elif inside < labelled:
            words = f"{labelled - inside:,} of {labelled:,} labelled voxels lie outside {reference} and are lost"
            problems.append(Problem(path, words, stops=False))
    return problems


def _alignment_notes(files: SubjectFiles, loaded: LoadedSubject) -> list[Problem]:
    """Say which volumes do not lie on the reference, whatever their headers say."""
    (reference, fixed), *others = loaded.volumes.items()
    notes = []
    for name, volume in others:
        usual = max(MAX_MISALIGNMENT_MM, max(*fixed.spacing_mm, *volume.spacing_mm) / 2)
        try:
            distance = misalignment_mm(fixed, volume)
        except UserError as error:
            words = f"whether it lies on {reference} is not known: {error}"
        else:
            if distance <= usual:
                continue
            words = f"lies about {distance:.1f} mm from {reference} by mutual information: `preprocess.register=rigid` "
            words += "would align the two"
        notes.append(Problem(files.volumes[name], f"{name} of {files.subject_id} {words}", stops=False))
    return notes


def _label_notes(files: SubjectFiles, seg: Volume | None, affine: np.ndarray, shape: Sequence[int]) -> list[Problem]:
    """Say which labels have no voxel on the model's grid."""
    if seg is None or files.seg is None:
        return []
    lost = [f"{label} ({count:,} voxels)" for label, count in lost_labels(seg, affine, shape).items()]
    words = f"no voxel is left on the model's grid of label {', '.join(lost)}"
    return [Problem(files.seg, words, stops=False)] if lost else []
