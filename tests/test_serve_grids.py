"""What a volume may cost on the model's grid, seen before it is queued; and nothing is done for who has cancelled."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from test_serve_guard import Service, detail
from test_serve_worker import LIMIT, accepted
from untrained import save_untrained

from aldm.translate import Translator
from serve.problems import Problem
from serve.worker import translate


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 8 mm."""
    return save_untrained(tmp_path_factory.mktemp("translators") / "model")


@pytest.fixture
def started(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Service]:
    monkeypatch.setattr(tempfile, "tempdir", None)  # the service sets its own
    return lambda **limits: Service(model, tmp_path / "work", {}, **limits)


def form(spacing: tuple[float, float, float], *, turned: bool = False, unit: str = "mm") -> dict[str, Any]:
    """A scan of 8 x 8 x 8 voxels, on the body's axes or turned by 45 degrees about the first."""
    affine = np.diag([*spacing, 1.0])
    if turned:
        cosine = np.sqrt(0.5)
        affine = np.array([[1, 0, 0, 0], [0, cosine, -cosine, 0], [0, cosine, cosine, 0], [0, 0, 0, 1]]) @ affine
    data = np.random.default_rng(0).normal(100, 20, (8, 8, 8)).astype(np.float32)
    image = nibabel.Nifti1Image(data, affine)
    image.header.set_xyzt_units(unit)
    return {"files": {"volume": ("t1.nii", image.to_bytes())}, "data": {"target": "t2"}}


@pytest.mark.parametrize(
    "scan",
    [form((188, 188, 188)), form((20, 20, 76)), form((76, 10, 10), turned=True), form((0.188,) * 3, unit="meter")],
    ids=["all axes", "one axis", "turned", "metres"],
)
def test_a_field_of_view_longer_than_any_scanner_s_is_refused(
    started: Callable[..., Service], scan: dict[str, Any]
) -> None:
    service = started()
    words = detail(service.ask("POST", "/v1/translations", **scan), 422)
    assert "wanted at most 600 mm along each axis: are its voxels really" in words
    assert service.at_rest


def test_a_field_of_view_as_long_as_a_scanner_s_is_taken_however_it_lies(started: Callable[..., Service]) -> None:
    service = started()
    for scan in (form((75, 20, 20)), form((20, 75, 75), turned=True)):
        assert service.ask("POST", "/v1/translations", **scan).status_code == 202


@pytest.mark.parametrize(("turned", "sides"), [(False, (20, 20, 20)), (True, (20, 30, 29))])
def test_a_grid_of_more_voxels_than_the_limit_is_refused(
    turned: bool, sides: tuple[int, int, int], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 160 mm on a side: 20 voxels of 8 mm; turned, the box around it is 28.3 voxels long on two axes.

    Along one of them it lies in 30 voxels of the grid, whose place the file's own voxels fix.
    """
    monkeypatch.setattr(tempfile, "tempdir", None)
    scan, voxels = form((20, 20, 20), turned=turned), int(np.prod(sides))
    wide = Service(model, tmp_path / "wide", {}, max_grid_voxels=voxels)
    assert wide.ask("POST", "/v1/translations", **scan).status_code == 202
    service = Service(model, tmp_path / "narrow", {}, max_grid_voxels=voxels - 1)
    words = detail(service.ask("POST", "/v1/translations", **scan), 422)
    assert f"is a grid of {' x '.join(map(str, sides))} = {voxels} voxels" in words
    assert service.at_rest
    assert service.ask("GET", "/v1/models").json()["limits"]["max_grid_voxels"] == voxels - 1


def test_a_job_that_was_cancelled_is_not_even_read(model: Path, tmp_path: Path) -> None:
    """Reading and preparing a volume may take as long as the networks."""
    jobs = [accepted(tmp_path, number) for number in range(2)]
    for job in jobs:
        (tmp_path / job.id / "volume.nii.gz").write_bytes(b"\x1f\x8bdamaged")
    problems: dict[str, Problem] = {}
    translate(Translator.load(model), tmp_path, jobs, problems, {jobs[0].id}, lambda jobs, share: None, LIMIT)
    assert problems.keys() == {jobs[1].id}
