"""A batch of the service's worker, in this process: what goes wrong with one job does not touch the others."""

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from scans import blob
from untrained import save_untrained

from aldm.data.volume import load_nifti
from aldm.translate import Translator
from serve.files import keep_nifti, provenance_file, result_file
from serve.problems import Problem
from serve.records import Job, new_id
from serve.worker import translate

NUMBER = 5
LIMIT = 4096


@pytest.fixture(scope="module")
def translator(tmp_path_factory: pytest.TempPathFactory) -> Translator:
    return Translator.load(save_untrained(tmp_path_factory.mktemp("translators") / "model"))


def accepted(folder: Path, number: int) -> Job:
    """A job whose volume is kept in its folder; each is of another volume, target and seed."""
    job_id = new_id()
    (folder / job_id).mkdir(parents=True)
    nibabel.save(nibabel.Nifti1Image(blob() + 3 * number, np.diag([8.0, 8, 8, 1])), folder / "scan.nii")
    keep_nifti(folder / job_id, *load_nifti(folder / "scan.nii"))
    values: dict[str, Any] = {"sampler": "ddim", "num_inference_steps": 3, "num_samples": 2, "eta": 0.0}
    values |= {"source": "t1", "source_from": "request", "format": "nii.gz", "model": {"name": "m", "hash": "h"}}
    targets = ["t2", "pd"] if number % 2 else ["pd"]
    return Job(id=job_id, owner="me", targets=targets, seed=number, **values)


def test_a_batch_makes_what_single_jobs_make_whatever_becomes_of_some(translator: Translator, tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    jobs = [accepted(folder, number) for number in range(NUMBER)]
    wanted = {}
    for job in jobs:
        problems: dict[str, Problem] = {}
        translate(translator, folder, [job], problems, set(), lambda jobs, share: None, LIMIT)
        assert problems == {}
        wanted[job.id] = {
            target: nibabel.load(result_file(folder / job.id, target, "nii.gz")) for target in job.targets
        }
        for target in job.targets:
            wanted[job.id][target] = wanted[job.id][target].get_fdata()
            result_file(folder / job.id, target, "nii.gz").unlink()
    forgotten, cancelled, damaged, *whole = jobs
    (folder / damaged.id / "volume.nii.gz").write_bytes(b"\x1f\x8bdamaged")
    problems, stopped, shares = {}, set(), []

    def step(wanted: list[Job], share: float) -> None:
        shares.append(share)
        if share > 0.2:  # in the middle of the first pass
            shutil.rmtree(folder / forgotten.id, ignore_errors=True)
            stopped.add(cancelled.id)

    translate(translator, folder, jobs, problems, stopped, step, LIMIT)
    assert shares == sorted(shares)
    assert problems.keys() <= {forgotten.id, damaged.id}
    assert problems[damaged.id].status == 422
    for problem in problems.values():
        assert str(tmp_path) not in problem.detail
        assert not [job.id for job in jobs if job.id in problem.detail]
    assert not (folder / forgotten.id).exists()
    assert not list((folder / cancelled.id).glob("result*"))
    for job in whole:
        for target in job.targets:
            got = nibabel.load(result_file(folder / job.id, target, "nii.gz")).get_fdata()
            other = wanted[job.id][target]
            np.testing.assert_allclose(got, other, rtol=1e-4, atol=1e-4 * np.ptp(other))


def test_a_volume_in_several_boxes_is_made_whole_and_counted(translator: Translator, tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    single, several, huge = (accepted(folder, number) for number in (0, 1, 3))
    wide = np.tile(blob(), (3, 1, 1))
    for job in (several, huge):
        (folder / job.id / "volume.nii.gz").unlink()
        nibabel.save(nibabel.Nifti1Image(wide, np.diag([8.0, 8, 8, 1])), tmp_path / "wide.nii")
        keep_nifti(folder / job.id, *load_nifti(tmp_path / "wide.nii"))
    problems: dict[str, Problem] = {}
    shares: list[float] = []
    translate(translator, folder, [single, several], problems, set(), lambda _, share: shares.append(share), LIMIT)
    assert problems == {}
    assert shares == sorted(shares)
    assert single.num_boxes == 1
    assert several.num_boxes is not None
    assert several.num_boxes > 1
    assert single.share_outside == several.share_outside == 0
    for target in several.targets:
        made = json.loads(provenance_file(folder / several.id, target).read_text())
        assert (made["num_boxes"], made["share_outside"]) == (several.num_boxes, 0)
        assert nibabel.load(result_file(folder / several.id, target, "nii.gz")).shape == wide.shape
    translate(
        translator, folder, [huge], problems, set(), lambda jobs, share: None, 12
    )  # 3 steps, 2 samples, 2 targets
    assert problems[huge.id].status == 422
    assert "the limit is 1" in problems[huge.id].detail
