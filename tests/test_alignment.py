"""`prepare` says which files of a subject do not lie on each other: labels that fall outside, moved contrasts."""

import shutil
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from aldm.data.integrity import check_subject, load_subject
from aldm.data.layouts import discover, stopping
from aldm.data.overlap import labels_inside, shared_field_of_view
from aldm.data.prepare_plan import Request
from aldm.data.preparing import plan_store
from aldm.data.registration import misalignment_mm
from aldm.data.volume import Volume, load_nifti
from aldm.errors import UserError
from aldm.presets import tiny

CONFIG = tiny().preprocess


@pytest.fixture
def subject(brats_tree: Path, tmp_path: Path) -> Path:
    """The folder of one subject, alone in a tree of its own; its volumes are LPS."""
    first = sorted(path for path in brats_tree.iterdir() if path.is_dir())[0]
    return Path(shutil.copytree(first, tmp_path / "tree" / first.name))


def rewrite(path: Path, change) -> None:
    """Save a file with `change(affine)` in place of its affine."""
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), change(image.affine)), path)


def identity(affine: np.ndarray) -> np.ndarray:
    """An affine that knows the voxels' size and nothing else."""
    return np.diag([*np.linalg.norm(affine[:3, :3], axis=0), 1.0])


def file_of(subject: Path, role: str) -> Path:
    return subject / f"{subject.name}_{role}.nii.gz"


def check(subject: Path, **config):
    (files,), _ = discover(subject.parent, "brats")
    return check_subject(files, replace(CONFIG, **config), subject.parent, None, 10**8)


@pytest.mark.parametrize("role", ["seg", "flair"])
def test_a_file_that_lost_its_affine_is_refused_with_the_way_out(subject, role):
    rewrite(file_of(subject, role), identity)
    with pytest.raises(UserError) as caught:
        plan_store(Request(source=subject.parent, store=subject.parent / "s", layout="brats", config=CONFIG), 1)
    assert str(caught.value).startswith("1 problem in ")
    assert file_of(subject, role).name in str(caught.value)
    assert "lies outside that of t1" in str(caught.value)
    assert "it has the shape of t1 and another affine: if the voxels belong together, copy the affine" in str(
        caught.value
    )


def test_labels_outside_the_first_modality_are_counted(subject):
    seg = file_of(subject, "seg")
    volume, labels = load_nifti(file_of(subject, "t1"))[0], load_nifti(seg, allow_constant=True)[0]
    assert labels_inside(labels, volume) == ((labels.data > 0).sum(),) * 2
    lowest = np.argwhere(labels.data > 0)[:, 0].min()

    def moved(voxels):
        def change(affine):
            shift = np.zeros(4)
            shift[0] = -voxels * volume.spacing_mm[0]
            return affine + np.outer(shift, [0, 0, 0, 1])

        return change

    rewrite(seg, moved(lowest))
    assert not stopping(check(subject).problems)
    rewrite(seg, moved(1))  # the lowest slice of the labels is outside now
    outside = int((labels.data[lowest] > 0).sum())
    total = int((labels.data > 0).sum())
    (problem,) = [p for p in check(subject).problems if "labelled voxels" in p.message]
    if outside > 0.05 * total:
        assert problem.stops
        assert f"{total - outside:,} of {total:,} labelled voxels" in problem.message
    else:
        assert not problem.stops
        assert f"{outside:,} of {total:,} labelled voxels lie outside t1" in problem.message
    rewrite(seg, moved(2))
    assert any(
        "labelled voxels lie in the field of view of t1, wanted 95%" in p.message for p in check(subject).problems
    )


def test_a_label_that_the_model_s_grid_loses_is_named(subject):
    seg = file_of(subject, "seg")
    image = nibabel.load(seg)
    labels = np.asarray(image.dataobj).copy()
    labels[5, 5, 5] = 9
    nibabel.save(nibabel.Nifti1Image(labels, image.affine), seg)
    problems = check(subject, spacing_mm=(20.0, 20.0, 20.0)).problems
    assert any(
        "no voxel is left on the model's grid of label" in p.message and "9 (1 voxels)" in p.message for p in problems
    )
    assert not stopping(problems)


@pytest.mark.parametrize("angles", [(0, 0, 0), (20, -30, 10)])
def test_shared_fields_of_view_are_measured(angles):
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    box = Volume(np.zeros((20, 30, 40), np.float32), turn @ np.diag([2.0, 1, 1, 1]))
    for shift, share in (((0, 0, 0), 1), ((20, 0, 0), 0.5), ((20, 15, 20), 0.125), ((0, 31, 0), 0)):
        other = Volume(box.data, box.affine.copy())
        other.affine[:3, 3] += turn[:3, :3] @ shift
        assert shared_field_of_view(box, other) == pytest.approx(share, abs=0.05)
    slab = Volume(np.zeros((20, 30, 5), np.float32), box.affine)
    assert shared_field_of_view(box, slab) == shared_field_of_view(slab, box) == 1


# ------------------------------------------------------------------------------------------- alignment by the contents


def test_volumes_that_lie_on_each_other_are_not_spoken_of(brats_tree, ixi_tree):
    for tree, layout in ((brats_tree, "brats"), (ixi_tree, "ixi")):
        for files in discover(tree, layout)[0][:3]:
            (_, first), *others = load_subject(files)[0].volumes.items()
            assert all(misalignment_mm(first, volume) < 2.5 for _, volume in others)


def test_a_moved_contrast_is_said_to_need_registration(subject):
    assert not [p for p in check(subject).problems if "mutual information" in p.message]

    def away(affine):
        moved = affine.copy()
        moved[:3, 3] += [0, 9, -9]
        return moved

    rewrite(file_of(subject, "t2"), away)
    (problem,) = check(subject).problems
    assert (problem.path.name, problem.stops) == (file_of(subject, "t2").name, False)
    said = float(problem.message.split("about ")[1].split(" mm")[0])
    assert said == pytest.approx(9 * 2**0.5, abs=2)
    assert "`preprocess.register=rigid` would align the two" in problem.message
    assert check(subject, register="rigid").problems == ()


@pytest.mark.parametrize("shift", [(6, 0, 0), (0, -15, 8), (0, 0, 25)])
def test_the_distance_is_that_of_the_shift(subject, shift):
    fixed, moving = (load_nifti(file_of(subject, role))[0] for role in ("t1", "t1ce"))
    moved = Volume(moving.data, moving.affine.copy())
    moved.affine[:3, 3] += shift
    assert misalignment_mm(fixed, moved) == pytest.approx(float(np.linalg.norm(shift)), abs=2.5)
