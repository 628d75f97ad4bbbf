"""A data set of NIfTI files -> a store of prepared volumes: check everything, then preprocess, resumable.

Every subject is one shard that appears whole; the manifest is written last, from what the shards say of themselves. So
an interrupted run goes on where it was and ends with the same bytes.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aldm.config import PreprocessConfig, to_dict
from aldm.data.integrity import load_subject, relative_name, stored_metadata
from aldm.data.layouts import Problem, SubjectFiles, stopping
from aldm.data.modalities import sort_modalities
from aldm.data.nifti_header import MAX_VOXELS
from aldm.data.parallel import ProcessWorkers, Workers, remove_leftovers
from aldm.data.prepare_plan import Plan, Request, make_plan, report
from aldm.data.preprocess import PreparedSubject, prepare_subject
from aldm.data.store import (
    MANIFEST_FILE,
    SHARD_FOLDER,
    STORE_FILE,
    SubjectRecord,
    VolumeStore,
    shard_path,
    write_manifest,
    write_shard,
    write_store_file,
)
from aldm.errors import UserError
from aldm.files import make_folder

logger = logging.getLogger(__name__)


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
    workers: Workers | None = None,
) -> VolumeStore:
    """Check a data set and write its store, or go on with an interrupted one.

    Args:
        source: folder of the data set, or the CSV file of layout table.
        store: folder of the store.
        layout: brats, ixi, bids or table.
        config: the preprocessing.
        splits: CSV file of subject_id, split that wins over the layout's.
        num_processes: how many subjects are worked on at a time; None takes as many as the cores and the free memory
            allow.
        overwrite: whether a store of another configuration or other subjects may be replaced.
        max_voxels: limit on what a header may claim, and on the model's grid before it is cropped.
        workers: run the tasks instead of processes of this machine; give absolute paths that all of them reach.

    Raises:
        UserError: everything that is wrong with the data set in one message, a line for each problem with its file; or
            the store is one of another configuration and `overwrite` is off, or another run is writing it.
    """
    request = Request(
        source=Path(source),
        store=Path(store),
        layout=layout,
        config=config,
        splits=None if splits is None else Path(splits),
        overwrite=overwrite,
        max_voxels=max_voxels,
    )
    return run_request(request, num_processes, workers)


def run_request(request: Request, num_processes: int | None = None, workers: Workers | None = None) -> VolumeStore:
    """Do what prepare_store does, from a request."""
    with ExitStack() as stack:
        pool = workers or stack.enter_context(ProcessWorkers(num_processes or _num_cores()))
        plan = make_plan(request, pool)
        logger.info("%s", plan.summary())
        _write_store(request, plan, pool, at_once=None if workers or num_processes else _affordable(plan))
    return VolumeStore.open(request.store)


def _affordable(plan: Plan) -> int:
    """Return how many processes the free memory allows."""
    import psutil

    return max(1, int(psutil.virtual_memory().available / 2**30 / plan.memory_per_process_gib))


def plan_store(request: Request, num_processes: int | None = None, workers: Workers | None = None) -> Plan:
    """Check everything that prepare_store would, and write nothing; errors as prepare_store."""
    with ExitStack() as stack:
        return make_plan(request, workers or stack.enter_context(ProcessWorkers(num_processes or _num_cores())))


def _write_store(request: Request, plan: Plan, workers: Workers, *, at_once: int | None) -> None:
    """Write what the plan says, `at_once` subjects at a time (None: as many as there are workers)."""
    store = request.store
    header = {
        "layout": request.layout,
        "preprocess": to_dict(request.config),
        "modalities": list(sort_modalities(name for subject in plan.subjects for name in subject.volumes)),
        "fingerprint": plan.fingerprint,
    }
    make_folder(store)
    with _locked(store):
        if request.overwrite:
            _clear(store)
        make_folder(store / SHARD_FOLDER)
        _remove_leftovers(store, plan)
        if not (store / STORE_FILE).is_file():
            write_store_file(store, header)
        try:
            _write_shards(request, plan, workers, at_once)
        finally:
            remove_leftovers(store)
        records = [_stored(store, subject, plan) for subject in plan.subjects]
        write_store_file(store, header)
        write_manifest(store, records, plan.fingerprint)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _write_shards(request: Request, plan: Plan, workers: Workers, at_once: int | None) -> None:
    """Prepare the subjects that are not finished; their problems are reported together at the end."""
    todo = [(files, plan.keys[files.subject_id]) for files in plan.subjects if files.subject_id not in plan.finished]
    write = partial(_write_subject, request=request)
    problems: list[Problem] = []
    for found in workers.map(write, todo, description="preparing the volumes", unit="subject", at_once=at_once):
        problems += found
    if problems:
        raise UserError(report(request.source, problems))


def _write_subject(task: tuple[SubjectFiles, str], request: Request) -> list[Problem]:
    """Prepare one subject and write its shard; return what is wrong with it."""
    files, key = task
    loaded, problems = load_subject(files, max_voxels=request.max_voxels)
    if wrong := stopping(problems):
        return wrong
    try:
        prepared = prepare_subject(
            loaded.volumes,
            request.config,
            mask=loaded.mask,
            seg=loaded.seg,
            tissue=loaded.tissue,
            max_voxels=request.max_voxels,
        )
    except UserError as error:
        return [Problem(next(iter(files.volumes.values())), f"subject {files.subject_id}: {error}")]
    sources = {
        name: {
            "path": relative_name(source.path, request.root),
            "affine": source.affine.tolist(),
            "shape": list(source.shape),
        }
        for name, source in loaded.sources.items()
    }
    metadata = {"key": key, "record": json.dumps(_record(files, prepared, sources), sort_keys=True)}
    write_shard(shard_path(request.store, files.subject_id), _arrays(prepared), metadata)
    return []


def _arrays(prepared: PreparedSubject) -> Iterator[tuple[str, np.ndarray]]:
    for name, data in prepared.volumes.items():
        yield name, data.astype(np.float16)
    yield "mask", prepared.mask.astype(np.uint8)
    if prepared.seg is not None:
        yield "seg", prepared.seg
    if prepared.tissue is not None:
        yield "tissue", prepared.tissue


def _record(files: SubjectFiles, prepared: PreparedSubject, sources: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of SubjectRecord that the shard keeps: all but the split."""
    first = next(iter(prepared.records.values()))
    return {
        "subject_id": files.subject_id,
        "modalities": list(prepared.volumes),
        "has_seg": prepared.seg is not None,
        "has_tissue": prepared.tissue is not None,
        "region": prepared.region,
        "grid_affine": first.grid_affine,
        "grid_shape": first.grid_shape,
        "crop_start": first.boxes[0],
        "share_outside": first.share_outside,
        "percentiles": {name: (record.low, record.high) for name, record in prepared.records.items()},
        "backgrounds": {name: record.background for name, record in prepared.records.items()},
        "clipped": {name: (clipped.mask, clipped.seg) for name, clipped in prepared.clipped.items()},
        "sources": sources,
        "likeness": {name: record.features[0] for name, record in prepared.records.items()},
    }


def _stored(store: Path, subject: SubjectFiles, plan: Plan) -> SubjectRecord:
    """Return the manifest's record of a finished subject, from its shard."""
    metadata = stored_metadata(store, subject.subject_id)
    if metadata.get("key") != plan.keys[subject.subject_id]:
        raise UserError(
            f"{shard_path(store, subject.subject_id)} went missing while the store was written: run it again"
        )
    return SubjectRecord(**{**json.loads(metadata["record"]), "split": subject.split})


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
    remove_leftovers(store)
    for shard in (store / SHARD_FOLDER).glob("*.arrow"):
        if shard.stem not in plan.keys:
            shard.unlink()
