"""What preparing a data set would do: its subjects, what is wrong with their files, and whether it may be written."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aldm.config import PreprocessConfig, to_dict
from aldm.data.integrity import SubjectCheck, check_subject, digest, stored_metadata
from aldm.data.layouts import FIRST_RUN, Problem, SubjectFiles, apply_splits, discover, stopping
from aldm.data.modalities import sort_modalities
from aldm.data.nifti_header import MAX_VOXELS
from aldm.data.parallel import Workers
from aldm.data.store import FORMAT_VERSION, MANIFEST_FILE, SPLITS, STORE_FILE, read_manifest, read_store_file
from aldm.errors import UserError
from aldm.files import check_folder
from aldm.words import counted

logger = logging.getLogger(__name__)

_BYTES_PER_VOXEL = 16  # of a subject's files while it is prepared (measured at equal spacing: 8, with registration 20)
MAX_NOTES = 40
"""So many are shown."""
_BYTES_PER_GRID_VOXEL = 8  # of its arrays on the model's grid (measured: 5 to 7)


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which data set becomes which store."""

    source: Path
    """Folder of the data set, or the CSV file of layout table."""
    store: Path
    """Folder of the store."""
    layout: str
    """brats, ixi, bids or table."""
    config: PreprocessConfig
    splits: Path | None = None
    """CSV file of subject_id, split that wins over the layout's."""
    run: str = FIRST_RUN
    """Which of several images of one modality counts in layout bids: first, last or a number."""
    overwrite: bool = False
    """Whether a store of another configuration or other subjects may be replaced."""
    max_voxels: int = MAX_VOXELS
    """Limit on what a header may claim, and on the model's grid before it is cropped."""

    @property
    def root(self) -> Path:
        """The folder that file names are relative to."""
        return self.source.parent if self.layout == "table" else self.source


@dataclass(frozen=True)
class Plan:
    """What prepare_store would do."""

    subjects: tuple[SubjectFiles, ...]
    keys: dict[str, str]
    """subject_id -> content key."""
    finished: tuple[str, ...]
    """Subjects whose shard is there already."""
    fingerprint: str
    memory_per_process_gib: float
    """Expected peak of one process."""
    notes: tuple[Problem, ...] = ()
    """What is to be said of the files and stops nothing."""

    def summary(self) -> str:
        """Return the counts in a few lines."""
        splits = Counter(subject.split for subject in self.subjects)
        modalities = Counter(name for subject in self.subjects for name in subject.volumes)
        number, finished = len(self.subjects), len(self.finished)
        complete = sum(len(subject.volumes) == len(modalities) for subject in self.subjects)
        return "\n".join(
            [
                f"{counted(number, 'subject')}: " + ", ".join(f"{splits[split]} {split}" for split in SPLITS),
                "volumes: " + ", ".join(f"{modalities[name]} {name}" for name in sort_modalities(modalities)),
                f"{counted(complete, 'subject')} with every modality, {number - complete} used for the pairs they have",
                f"{counted(finished, 'subject')} prepared already, {number - finished} to do",
            ]
        )


def make_plan(request: Request, workers: Workers) -> Plan:
    """Find the subjects and check every file of the data set and the place of the store; writes nothing.

    Raises:
        UserError: everything that is wrong with the data set in one message, a line for each problem with its file; or
            the store is one of another configuration and `overwrite` is off.
    """
    _check_place(request)
    subjects, problems = discover(request.source, request.layout, request.run)
    if request.splits is not None:
        subjects = apply_splits(subjects, request.splits)
    known = None if request.overwrite or not (request.store / STORE_FILE).is_file() else request.store
    check = partial(check_subject, config=request.config, root=request.root, store=known, max_voxels=request.max_voxels)
    checks = list(workers.map(check, subjects, description="checking the files", unit="subject"))
    problems += [problem for result in checks for problem in result.problems]
    if wrong := stopping(problems):
        raise UserError(report(request.source, wrong))
    keys = {result.subject_id: result.key for result in sorted(checks, key=lambda result: result.subject_id)}
    plan = Plan(
        subjects=tuple(subjects),
        keys=keys,
        finished=tuple(sorted(result.subject_id for result in checks if result.finished)),
        fingerprint=_fingerprint(subjects, keys, request),
        memory_per_process_gib=_memory_gib(checks),
        notes=tuple(sorted((problem for problem in problems if not problem.stops), key=lambda note: note.path)),
    )
    if known is not None:
        _check_same_subjects(known, plan)
    for note in plan.notes[:MAX_NOTES]:
        logger.warning("%s: %s", note.path, note.message)
    if len(plan.notes) > MAX_NOTES:
        logger.warning("and %d more files of which something is to be said", len(plan.notes) - MAX_NOTES)
    return plan


def report(source: Path, problems: Sequence[Problem]) -> str:
    """Return the message that names every problem with its file."""
    lines = [f"  {problem.path}: {problem.message}" for problem in sorted(problems, key=lambda p: (p.path, p.message))]
    return "\n".join(
        [f"{counted(len(lines), 'problem')} in {source}; fix or remove these files and run it again:", *lines]
    )


def _fingerprint(subjects: Sequence[SubjectFiles], keys: dict[str, str], request: Request) -> str:
    """Return the sha256 of format version, layout, preprocessing, and each subject's split and content key."""
    described = {subject.subject_id: [subject.split, keys[subject.subject_id]] for subject in subjects}
    return digest(
        {
            "format_version": FORMAT_VERSION,
            "layout": request.layout,
            "preprocess": to_dict(request.config),
            "subjects": described,
        }
    )


def _check_place(request: Request) -> None:
    """Refuse a place that holds something else than an earlier store of the same configuration."""
    store = request.store
    if request.overwrite or not (store / STORE_FILE).is_file():
        check_folder(store, request.overwrite, marker=STORE_FILE)
        return
    header = read_store_file(store)
    assert header is not None
    wanted = {"layout": request.layout, **to_dict(request.config)}
    stored = {"layout": header["layout"], **header["preprocess"]}
    changes = [f"{key} {stored.get(key)} -> {wanted[key]}" for key in wanted if stored.get(key) != wanted[key]]
    if changes:
        raise UserError(
            f"{store} is a store of another configuration ({'; '.join(changes)}): "
            "give another folder, or `overwrite` to replace it"
        )
    if not os.access(store, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {store}: the folder is read-only for this user")


def _check_same_subjects(store: Path, plan: Plan) -> None:
    """A finished store may grow; what is in it neither goes, nor changes, nor moves to another split."""
    if not (store / MANIFEST_FILE).is_file():
        return
    try:
        records = read_manifest(store)
    except UserError:  # damaged: the store is not finished, and what it holds is in its shards
        return
    splits = {subject.subject_id: subject.split for subject in plan.subjects}
    changes = []
    for record in records:
        stored_key = stored_metadata(store, record.subject_id).get("key")
        if record.subject_id not in splits:
            changes.append(f"{record.subject_id} is not in the source")
        elif record.split != splits[record.subject_id]:
            changes.append(f"{record.subject_id} goes from {record.split} to {splits[record.subject_id]}")
        elif stored_key not in (None, plan.keys[record.subject_id]):
            changes.append(f"the files of {record.subject_id} changed")
    if changes:
        shown = "; ".join(changes[:5]) + ("; ..." if len(changes) > 5 else "")
        raise UserError(
            f"{store} differs from the data set in {counted(len(changes), 'subject')} ({shown}): "
            "give another folder, or `overwrite` to replace the store"
        )


def _memory_gib(checks: Sequence[SubjectCheck]) -> float:
    """Return the expected peak of one process, GiB: 0.4 for the program, the rest from the largest subject.

    Measured with preset brats and five files of 240 x 240 x 155 voxels, GiB resident: 0.91 from 1 to 1 mm (expected
    1.4), 0.63 from 2 to 1 mm (0.82), 0.48 from 2 to 2 mm (0.53).
    """
    sizes = (_BYTES_PER_VOXEL * check.num_voxels + _BYTES_PER_GRID_VOXEL * check.num_grid_voxels for check in checks)
    return 0.4 + max(sizes, default=0) / 2**30
