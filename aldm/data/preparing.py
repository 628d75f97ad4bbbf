"""A data set of NIfTI files -> a store of prepared volumes: check everything, then preprocess, resumable.

Every subject is one shard that appears whole; the manifest is written last, from what the shards say of themselves. So
an interrupted run goes on where it was and ends with the same bytes.
"""

import fcntl
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from aldm.config import PreprocessConfig, to_dict
from aldm.data.integrity import (
    SubjectCheck,
    check_subject,
    digest,
    load_subject,
    relative_name,
    stored_metadata,
)
from aldm.data.layouts import Problem, SubjectFiles, apply_splits, discover
from aldm.data.modalities import sort_modalities
from aldm.data.nifti_header import MAX_VOXELS
from aldm.data.parallel import parallel_map
from aldm.data.preprocess import PreparedSubject, prepare_subject
from aldm.data.store import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    SHARD_FOLDER,
    SPLITS,
    STORE_FILE,
    SubjectRecord,
    VolumeStore,
    read_manifest,
    read_store_file,
    shard_path,
    write_manifest,
    write_shard,
    write_store_file,
)
from aldm.errors import UserError
from aldm.files import check_folder

logger = logging.getLogger(__name__)
_BYTES_PER_VOXEL = 24  # of a subject's files while it is prepared (measured at equal spacing: 8, with registration 20)


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

    def summary(self) -> str:
        """Return the counts in a few lines."""
        splits = Counter(subject.split for subject in self.subjects)
        modalities = Counter(name for subject in self.subjects for name in subject.volumes)
        complete = sum(len(subject.volumes) == len(modalities) for subject in self.subjects)
        return "\n".join(
            [
                f"{len(self.subjects)} subjects: " + ", ".join(f"{splits[split]} {split}" for split in SPLITS),
                "volumes: " + ", ".join(f"{modalities[name]} {name}" for name in sort_modalities(modalities)),
                f"{complete} subjects have every modality, {len(self.subjects) - complete} are used for the pairs "
                "they have",
                f"{len(self.finished)} subjects are prepared already, {len(self.subjects) - len(self.finished)} to do",
            ]
        )


def plan_store(
    source: str | Path,
    store: str | Path,
    *,
    layout: str,
    config: PreprocessConfig,
    splits: str | Path | None = None,
    num_processes: int | None = None,
    overwrite: bool = False,
    max_voxels: int = MAX_VOXELS,
) -> Plan:
    """Find the subjects and check every file of the data set and the place of the store; writes nothing.

    Args:
        source: folder of the data set, or the CSV file of layout table.
        store: folder of the store.
        layout: brats, ixi, bids or table.
        config: the preprocessing.
        splits: CSV file of subject_id, split that wins over the layout's.
        num_processes: how many subjects are worked on at a time; None takes as many as the cores and the free memory
            allow.
        overwrite: whether a store of another configuration or other subjects may be replaced.
        max_voxels: limit on what a header may claim.

    Raises:
        UserError: everything that is wrong with the data set in one message, a line for each problem with its file; or
            the store is one of another configuration and `overwrite` is off.
    """
    source, store = Path(source), Path(store)
    _check_place(store, layout, config, overwrite)
    subjects, problems = discover(source, layout)
    if splits is not None:
        subjects = apply_splits(subjects, splits)
    root = source.parent if layout == "table" else source
    known = None if overwrite or not (store / STORE_FILE).is_file() else store
    check = partial(check_subject, config=config, root=root, store=known, max_voxels=max_voxels)
    checks = list(
        parallel_map(
            check, subjects, num_processes=_processes(num_processes), description="checking the files", unit="subject"
        )
    )
    problems += [problem for result in checks for problem in result.problems]
    if problems:
        raise UserError(_report(source, problems))
    keys = {result.subject_id: result.key for result in sorted(checks, key=lambda result: result.subject_id)}
    plan = Plan(
        subjects=tuple(subjects),
        keys=keys,
        finished=tuple(sorted(result.subject_id for result in checks if result.finished)),
        fingerprint=_fingerprint(subjects, keys, layout, config),
        memory_per_process_gib=_memory_gib(checks, config),
    )
    if known is not None:
        _check_same_subjects(known, plan)
    return plan


def prepare_store(
    source: str | Path,
    store: str | Path,
    *,
    layout: str,
    config: PreprocessConfig,
    splits: str | Path | None = None,
    num_processes: int | None = None,
    overwrite: bool = False,
    max_voxels: int = MAX_VOXELS,
) -> VolumeStore:
    """Check a data set and write its store, or go on with an interrupted one; arguments and errors as plan_store."""
    source, store = Path(source), Path(store)
    plan = plan_store(
        source,
        store,
        layout=layout,
        config=config,
        splits=splits,
        num_processes=num_processes,
        overwrite=overwrite,
        max_voxels=max_voxels,
    )
    logger.info("%s", plan.summary())
    header = {
        "layout": layout,
        "preprocess": to_dict(config),
        "modalities": list(sort_modalities(name for subject in plan.subjects for name in subject.volumes)),
        "fingerprint": plan.fingerprint,
    }
    store.mkdir(exist_ok=True)
    with _locked(store):
        if overwrite:
            _clear(store)
        (store / SHARD_FOLDER).mkdir(exist_ok=True)
        _remove_leftovers(store, plan)
        if not (store / STORE_FILE).is_file():
            write_store_file(store, header)
        root = source.parent if layout == "table" else source
        processes = _processes(num_processes, plan.memory_per_process_gib)
        _write_shards(plan, store, config, root, processes, max_voxels)
        records = [_stored(store, subject, plan) for subject in plan.subjects]
        write_store_file(store, header)
        write_manifest(store, records, plan.fingerprint)
    return VolumeStore.open(store)


def _write_shards(
    plan: Plan, store: Path, config: PreprocessConfig, root: Path, num_processes: int, max_voxels: int
) -> None:
    """Prepare the subjects that are not finished; their problems are reported together at the end."""
    todo = [(files, plan.keys[files.subject_id]) for files in plan.subjects if files.subject_id not in plan.finished]
    write = partial(_write_subject, store=store, config=config, root=root, max_voxels=max_voxels)
    problems: list[Problem] = []
    for found in parallel_map(
        write, todo, num_processes=num_processes, description="preparing the volumes", unit="subject"
    ):
        problems += found
    if problems:
        raise UserError(_report(root, problems))


def _write_subject(
    task: tuple[SubjectFiles, str], store: Path, config: PreprocessConfig, root: Path, max_voxels: int
) -> list[Problem]:
    """Prepare one subject and write its shard; return what is wrong with it."""
    files, key = task
    loaded, problems = load_subject(files, max_voxels=max_voxels)
    if problems:
        return problems
    try:
        prepared = prepare_subject(loaded.volumes, config, mask=loaded.mask, seg=loaded.seg)
    except UserError as error:
        return [Problem(next(iter(files.volumes.values())), f"subject {files.subject_id}: {error}")]
    sources = {
        name: {
            "path": relative_name(source.path, root),
            "affine": source.affine.tolist(),
            "shape": list(source.shape),
        }
        for name, source in loaded.sources.items()
    }
    metadata = {"key": key, "record": json.dumps(_record(files, prepared, sources), sort_keys=True)}
    write_shard(shard_path(store, files.subject_id), _arrays(prepared), metadata)
    return []


def _arrays(prepared: PreparedSubject) -> Iterator[tuple[str, np.ndarray]]:
    for name, data in prepared.volumes.items():
        yield name, data.astype(np.float16)
    yield "mask", prepared.mask.astype(np.uint8)
    if prepared.seg is not None:
        yield "seg", prepared.seg


def _record(files: SubjectFiles, prepared: PreparedSubject, sources: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of SubjectRecord that the shard keeps: all but the split."""
    first = next(iter(prepared.records.values()))
    return {
        "subject_id": files.subject_id,
        "modalities": list(prepared.volumes),
        "has_seg": prepared.seg is not None,
        "region": prepared.region,
        "grid_affine": first.grid_affine,
        "grid_shape": first.grid_shape,
        "crop_start": first.crop_start,
        "percentiles": {name: (record.low, record.high) for name, record in prepared.records.items()},
        "sources": sources,
    }


def _stored(store: Path, subject: SubjectFiles, plan: Plan) -> SubjectRecord:
    """Return the manifest's record of a finished subject, from its shard."""
    metadata = stored_metadata(store, subject.subject_id)
    if metadata.get("key") != plan.keys[subject.subject_id]:
        raise UserError(
            f"{shard_path(store, subject.subject_id)} went missing while the store was written: run it again"
        )
    return SubjectRecord(**{**json.loads(metadata["record"]), "split": subject.split})


def _fingerprint(subjects: Sequence[SubjectFiles], keys: dict[str, str], layout: str, config: PreprocessConfig) -> str:
    """Return the sha256 of format version, layout, preprocessing, and each subject's split and content key."""
    described = {subject.subject_id: [subject.split, keys[subject.subject_id]] for subject in subjects}
    return digest(
        {"format_version": FORMAT_VERSION, "layout": layout, "preprocess": to_dict(config), "subjects": described}
    )


def _check_place(store: Path, layout: str, config: PreprocessConfig, overwrite: bool) -> None:
    """Refuse a place that holds something else than an earlier store of the same configuration."""
    if overwrite or not (store / STORE_FILE).is_file():
        check_folder(store, overwrite, marker=STORE_FILE)
        return
    header = read_store_file(store)
    assert header is not None
    wanted = {"layout": layout, **to_dict(config)}
    stored = {"layout": header["layout"], **header["preprocess"]}
    changes = [f"{key} {stored.get(key)} -> {wanted[key]}" for key in wanted if stored.get(key) != wanted[key]]
    if changes:
        raise UserError(
            f"{store} is a store of another configuration ({'; '.join(changes)}): "
            "give another folder, or --overwrite to replace it"
        )
    if not os.access(store, os.W_OK | os.X_OK):
        raise UserError(f"cannot write into {store}: the folder is read-only for this user")


def _check_same_subjects(store: Path, plan: Plan) -> None:
    """A finished store may grow; what is in it neither goes, nor changes, nor moves to another split."""
    if not (store / MANIFEST_FILE).is_file():
        return
    splits = {subject.subject_id: subject.split for subject in plan.subjects}
    changes = []
    for record in read_manifest(store):
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
            f"{store} holds {len(changes)} subjects that are no longer the same ({shown}): "
            "give another folder, or --overwrite to replace the store"
        )


def _processes(requested: int | None, memory_gib: float = 0.2) -> int:
    """Return the number of processes: as requested, else what the cores and the free memory allow."""
    if requested is not None:
        return requested
    affordable = int(psutil.virtual_memory().available / 2**30 / memory_gib)
    return max(1, min(len(os.sched_getaffinity(0)), affordable))


def _memory_gib(checks: Sequence[SubjectCheck], config: PreprocessConfig) -> float:
    """Return the expected peak of one process, GiB: 0.2 for the program, the rest from the largest subject."""
    return 0.2 + max((check.num_voxels for check in checks), default=0) * _BYTES_PER_VOXEL / 2**30


@contextmanager
def _locked(store: Path) -> Iterator[None]:
    """Keep a second run out of the store (a lock on the folder itself, gone with the process)."""
    descriptor = os.open(store, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"another aldm prepare is writing {store}: wait for it, or give another folder") from error
    finally:
        os.close(descriptor)


def _clear(store: Path) -> None:
    """Remove an earlier store's files, the manifest first so that nobody opens half of it."""
    for name in (MANIFEST_FILE, STORE_FILE):
        (store / name).unlink(missing_ok=True)
    shutil.rmtree(store / SHARD_FOLDER, ignore_errors=True)


def _remove_leftovers(store: Path, plan: Plan) -> None:
    """Remove what an interrupted run left: temporary files, and shards of subjects that are gone from the source."""
    for folder in (store, store / SHARD_FOLDER):
        for leftover in folder.glob(".tmp-*"):
            leftover.unlink()
    for shard in (store / SHARD_FOLDER).glob("*.arrow"):
        if shard.stem not in plan.keys:
            shard.unlink()


def _report(source: Path, problems: Sequence[Problem]) -> str:
    lines = [f"  {problem.path}: {problem.message}" for problem in sorted(problems, key=lambda p: (p.path, p.message))]
    count = f"{len(lines)} problem" + ("s" if len(lines) > 1 else "")
    return "\n".join([f"{count} in {source}; mend or remove these files and run it again:", *lines])
