"""Are the files of a data set usable? Headers, voxels and geometry of every file, before anything is computed."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aldm.config import PreprocessConfig, to_dict
from aldm.data.layouts import Problem, SubjectFiles, stopping
from aldm.data.nifti_header import MAX_VOXELS
from aldm.data.preprocess import model_grid
from aldm.data.store import FORMAT_VERSION, ShardReader, shard_path
from aldm.data.volume import NiftiSource, Volume, load_nifti
from aldm.errors import UserError

_EDGE_BYTES = 2**16


@dataclass(frozen=True, eq=False)
class LoadedSubject:
    """The volumes of a subject as they are in their files, RAS+."""

    volumes: dict[str, Volume]
    sources: dict[str, NiftiSource]
    mask: Volume | None
    seg: Volume | None


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
            if role in ("mask", "seg"):
                labels[role] = load_labels(path, max_voxels=max_voxels)
                if role == "mask" and not labels[role].data.any():
                    raise UserError(f"{path}: the mask is empty")
            else:
                volumes[role], sources[role] = load_nifti(path, max_voxels=max_voxels)
                problems += [Problem(path, note, stops=False) for note in sources[role].notes]
        except UserError as error:
            problems.append(Problem(path, str(error).removeprefix(f"{path}: ")))
    loaded = LoadedSubject(volumes, sources, labels.get("mask"), labels.get("seg"))
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
    extra = [volume for volume in (loaded.mask, loaded.seg) if volume is not None]
    volumes = [*loaded.volumes.values(), *extra]
    try:
        _, grid = model_grid(volumes, config, max_voxels=max_voxels)
    except UserError as error:
        problem = Problem(next(iter(files.volumes.values())), f"{error} (`spacing_mm`, or a higher `max_voxels`)")
        return SubjectCheck(files.subject_id, key, False, (problem,))
    num_voxels = sum(volume.data.size for volume in volumes)
    return SubjectCheck(files.subject_id, key, False, tuple(problems), num_voxels, math.prod(grid) * len(volumes))


def subject_key(files: SubjectFiles, config: PreprocessConfig, root: Path) -> str:
    """Return the sha256 of what a subject's shard depends on: format version, preprocessing, and its files.

    Of each file: role, path (relative to `root` where it lies below), size, and a sha256 of the content. Of a .nii.gz
    that is its first and last 64 KiB: the header, and the checksum of all voxels that gzip ends with. Of a .nii it is
    the whole file.
    """
    described = {
        role: [relative_name(path, root), path.stat().st_size, _content_hash(path)]
        for role, path in files.files().items()
    }
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


def _content_hash(path: Path) -> str:
    with path.open("rb") as stream:
        if not path.name.lower().endswith(".gz"):
            return hashlib.file_digest(stream, "sha256").hexdigest()
        content = stream.read(_EDGE_BYTES)
        stream.seek(max(0, path.stat().st_size - _EDGE_BYTES))
        return hashlib.sha256(content + stream.read()).hexdigest()


def _geometry_problems(files: SubjectFiles, volumes: Mapping[str, Volume]) -> list[Problem]:
    """Every file has to share some space with the reference, the first modality."""
    reference = next(iter(files.volumes))
    low, high = _world_box(volumes[reference])
    problems = []
    for role, path in files.files().items():
        other_low, other_high = _world_box(volumes[role])
        if np.any(np.minimum(high, other_high) <= np.maximum(low, other_low)):
            problems.append(
                Problem(path, f"its field of view lies outside that of {reference} ({files.volumes[reference].name})")
            )
    return problems


def _world_box(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    corners = np.array(np.meshgrid(*([-0.5, n - 0.5] for n in volume.data.shape), indexing="ij")).reshape(3, 8)
    world = volume.affine[:3, :3] @ corners + volume.affine[:3, 3:]
    return world.min(axis=1), world.max(axis=1)
