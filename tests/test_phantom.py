"""Simulated subjects: their files, their grids, their contrast."""

import hashlib
from pathlib import Path

import nibabel
import numpy as np
import pytest

from aldm.data import phantom
from aldm.data.phantom import (
    SimulatedVolume,
    brats_grid,
    expected_memory_gib,
    oblique_grid,
    simulate_subject,
    write_phantom,
)
from aldm.data.phantom_anatomy import Head, SmoothField
from aldm.data.phantom_physics import SEQUENCES, Sequence, Tissue, magnitude, rician, tissues_of_subject
from aldm.data.volume import resample, to_ras
from aldm.errors import UserError
from pipelines.phantom import main

SPACING_MM = 8.0


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every NIfTI file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.nii.gz"))
    }


@pytest.fixture(scope="module")
def brats_subject() -> dict[str, SimulatedVolume]:
    return simulate_subject(1, 0, "brats", 3.0)


@pytest.fixture(scope="module")
def ixi_subject() -> dict[str, SimulatedVolume]:
    return simulate_subject(1, 0, "ixi", 4.0)


@pytest.mark.parametrize("layout", ["brats", "ixi"])
def test_more_subjects_leave_the_bytes_of_the_first_ones(layout: str, tmp_path: Path) -> None:
    write_phantom(tmp_path / "one", layout, 1, seed=3, spacing_mm=SPACING_MM)
    write_phantom(tmp_path / "two", layout, 2, seed=3, spacing_mm=SPACING_MM)
    write_phantom(tmp_path / "other", layout, 1, seed=4, spacing_mm=SPACING_MM)
    one, two, other = (digests(tmp_path / name) for name in ("one", "two", "other"))
    assert len(two) == 2 * len(one)
    assert one.items() <= two.items()
    assert len(set(two.values())) == len(two)
    assert not set(one.values()) & set(other.values())


def test_brats_tree_is_named_and_laid_out_like_brats(brats_tree: Path) -> None:
    names = [path.relative_to(brats_tree).as_posix() for path in brats_tree.rglob("BraTS2021_00001_*")]
    assert sorted(names) == [
        f"BraTS2021_00001/BraTS2021_00001_{role}.nii.gz" for role in ("flair", "seg", "t1", "t1ce", "t2", "tissue")
    ]
    images = {name: nibabel.load(brats_tree / name) for name in names}
    assert {nibabel.aff2axcodes(image.affine) for image in images.values()} == {("L", "P", "S")}
    assert len({image.shape for image in images.values()}) == 1
    assert len({image.affine.tobytes() for image in images.values()}) == 1
    dtypes = {name.split("_")[-1]: image.get_data_dtype() for name, image in images.items()}
    assert dtypes["seg.nii.gz"] == np.uint8
    assert dtypes["t1.nii.gz"] == np.int16


def test_ixi_tree_has_t1_on_a_grid_of_its_own(ixi_tree: Path) -> None:
    assert (ixi_tree / "IXI-T1" / "IXI002-Guys-0828-T1.nii.gz").is_file()
    for t1_path in (ixi_tree / "IXI-T1").iterdir():
        t1, t2, pd = (
            nibabel.load(ixi_tree / f"IXI-{name}" / t1_path.name.replace("-T1.", f"-{name}."))
            for name in ("T1", "T2", "PD")
        )
        assert nibabel.aff2axcodes(t1.affine) == ("P", "S", "R")
        assert nibabel.aff2axcodes(t2.affine) == ("L", "A", "S")
        assert t2.shape == pd.shape != t1.shape
        assert np.array_equal(t2.affine, pd.affine)
        assert 0.1 < np.rad2deg(nibabel.affines.obliquity(t1.affine)).max() < 9
        assert t1.header["qform_code"] == t1.header["sform_code"] == 1
        assert np.allclose(t1.get_qform(), t1.get_sform(), atol=1e-3)
        assert t1.header.get_xyzt_units() == ("mm", "sec")


def test_grids_at_the_data_sets_own_spacing() -> None:
    brats = brats_grid(1.0)
    assert brats.shape == (240, 240, 155)
    assert np.array_equal(brats.affine, [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
    spacing = np.array([0.9375, 0.9375, 1.2])
    grid = oblique_grid("PSR", (240, 240, 180), spacing, np.array([3.0, -2.0, 9.0]), np.random.default_rng(0))
    assert grid.shape == (256, 256, 150)
    assert np.allclose(np.linalg.norm(grid.affine[:3, :3], axis=0), spacing)
    assert np.linalg.norm(grid.affine[:3] @ [127.5, 127.5, 74.5, 1] - grid.head_mm) < 12


def test_field_of_view_does_not_depend_on_the_spacing() -> None:
    for spacing_mm in (1.0, 2.5, 5.0):
        grid = brats_grid(spacing_mm)
        first = grid.affine[:3] @ [-0.5, -0.5, -0.5, 1]
        last = grid.affine[:3] @ [*(np.array(grid.shape) - 0.5), 1]
        assert np.allclose(first, [0.5, 239.5, -0.5])
        assert np.allclose(np.abs(last - first), [240, 240, 155])


def test_background_is_zero_in_brats_and_noise_in_ixi(
    brats_subject: dict[str, SimulatedVolume], ixi_subject: dict[str, SimulatedVolume]
) -> None:
    brains = [brats_subject[name].data > 0 for name in ("t1", "t1ce", "t2", "flair")]
    assert all(np.array_equal(brains[0], brain) for brain in brains)
    assert 0.9e6 < brains[0].sum() * 27 < 2.1e6  # mm^3
    for name in ("t1", "t2", "pd"):
        data = ixi_subject[name].data
        corner = data[:6, :6, :6].astype(float)
        assert 0.005 * data.max() < corner.mean() < 0.05 * data.max()
        assert corner.std() / corner.mean() == pytest.approx(np.sqrt(4 / np.pi - 1), rel=0.25)  # Rayleigh


def test_lesion_is_in_the_brain_and_shows(brats_subject: dict[str, SimulatedVolume]) -> None:
    seg = brats_subject["seg"].data
    assert set(np.unique(seg)) == {0, 1, 2, 4}
    brain = brats_subject["t1"].data > 0
    assert not (seg[~brain] > 0).any()
    scans = {name: brats_subject[name].data for name in ("t1", "t1ce", "flair")}
    healthy, edema, enhancing = brain & (seg == 0), seg == 2, seg == 4
    assert np.median(scans["flair"][edema]) > np.percentile(scans["flair"][healthy], 95)
    assert np.median(scans["t1ce"][enhancing]) > np.percentile(scans["t1ce"][healthy], 99)
    assert np.median(scans["t1"][enhancing]) < np.median(scans["t1"][healthy])


def test_tissues_fill_the_healthy_brain_and_look_like_it(brats_subject: dict[str, SimulatedVolume]) -> None:
    tissue, seg = brats_subject["tissue"].data, brats_subject["seg"].data
    brain = brats_subject["t1"].data > 0
    assert tissue.dtype == np.uint8
    assert np.array_equal(tissue > 0, brain & (seg == 0))
    for name, darkest_first in (("t1", (1, 2, 3)), ("t2", (3, 2, 1))):
        means = [brats_subject[name].data[tissue == label].mean() for label in darkest_first]
        assert means == sorted(means)
        assert means[2] > 1.2 * means[0]


def test_contrast_of_every_subject_is_that_of_its_sequence() -> None:
    ones = (np.ones(3), np.ones(3), np.ones(3))
    for seed in range(50):
        tissues = tissues_of_subject(np.random.default_rng(seed))
        signal = {name: magnitude(name, np.eye(3), tissues, ones) for name in SEQUENCES}
        grey, white, csf = signal["t1"]
        assert white > grey > csf
        grey, white, csf = signal["t2"]
        assert csf > grey > white
        grey, white, csf = signal["pd"]
        assert grey > white
        assert csf > white
        grey, white, csf = signal["flair"]
        assert grey > white > 2 * csf


def test_signal_equations_at_their_limits() -> None:
    tissue = Tissue(0.8, 1000.0, 90.0)
    assert Sequence(tr_ms=1e6, te_ms=0).signal(tissue) == pytest.approx(0.8)
    assert Sequence(tr_ms=1e6, te_ms=90).signal(tissue) == pytest.approx(0.8 / np.e)
    assert Sequence(tr_ms=1000, te_ms=0).signal(tissue) == pytest.approx(0.8 * (1 - 1 / np.e))
    null = 1000 * np.log(2 / (1 + np.exp(-3)))  # where inversion recovery crosses zero at TR = 3 T1
    assert Sequence(tr_ms=3000, te_ms=10, ti_ms=null).signal(tissue) == pytest.approx(0, abs=1e-12)
    assert Sequence(tr_ms=1e6, te_ms=0, ti_ms=0).signal(tissue) == pytest.approx(-0.8)


def test_partial_volumes_add_up_before_the_magnitude() -> None:
    tissues = {"csf": Tissue(1.0, 4000.0, 1600.0), "white": Tissue(0.7, 700.0, 75.0)}
    sequence = SEQUENCES["flair"]
    ones = (np.ones(1), np.ones(1), np.ones(1))
    expected = abs(0.9 * sequence.signal(tissues["csf"]) + 0.1 * sequence.signal(tissues["white"]))
    assert magnitude("flair", np.array([[0.9], [0.1]]), tissues, ones)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("signal", [0.0, 1.0, 5.0])
def test_rician_noise_has_the_second_moment_of_the_rice_distribution(signal: float) -> None:
    noisy = rician(np.full(200_000, signal, np.float32), 0.7, np.random.default_rng(0))
    assert (noisy**2).mean() == pytest.approx(signal**2 + 2 * 0.7**2, rel=0.01)
    assert (noisy >= 0).all()


def test_smooth_field_has_unit_variance_and_no_jumps() -> None:
    field = SmoothField(np.random.default_rng(0), 20.0)
    line = np.zeros((3, 2000))
    line[0] = np.linspace(-100, 100, 2000)  # steps of 0.1 mm
    assert np.abs(np.diff(field(line))).max() < 0.05
    cube = np.random.default_rng(1).uniform(-120, 120, (3, 20_000))
    assert field(cube).std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("lesion", [None, 5])
def test_fractions_are_shares_of_a_voxel(lesion: int | None) -> None:
    head = Head(np.random.default_rng(0), None if lesion is None else np.random.default_rng(lesion))
    tissues = head.tissues_on(brats_grid(4.0))
    assert tissues.fractions.min() >= 0
    assert tissues.fractions.sum(axis=0).max() <= 1 + 1e-6
    assert len(tissues.fractions) == (3 if lesion is None else 6)
    assert (np.diff(tissues.voxels) > 0).all()


def test_lesion_takes_its_place_from_the_brain_and_adds_none() -> None:
    grid = brats_grid(4.0)
    with_lesion, healthy = (Head(np.random.default_rng(0), lesion) for lesion in (np.random.default_rng(5), None))
    assert np.allclose(
        with_lesion.tissues_on(grid).fractions.sum(axis=0), healthy.tissues_on(grid).fractions.sum(axis=0), atol=1e-6
    )


def test_a_head_is_the_same_on_every_grid() -> None:
    """Tissue volumes and their centre of mass agree between a fine, a coarse and an oblique grid."""
    head = Head(np.random.default_rng(2), None)
    oblique = oblique_grid(
        "PSR", (240, 240, 200), np.full(3, 3.0), np.array([7.0, -4.0, 2.0]), np.random.default_rng(3)
    )
    measured = []
    for grid in (brats_grid(2.5), brats_grid(5.0), oblique):
        tissues = head.tissues_on(grid)
        voxel_ml = abs(np.linalg.det(grid.affine[:3, :3])) / 1000
        weights = tissues.fractions.sum(axis=0)
        measured.append([*(tissues.fractions.sum(axis=1) * voxel_ml), *(tissues.head_mm @ weights / weights.sum())])
    volumes, centres = np.array(measured)[:, :3], np.array(measured)[:, 3:]
    assert np.allclose(volumes, volumes[0], rtol=0.03)
    assert np.allclose(centres, centres[0], atol=0.3)


def test_the_two_ixi_grids_see_one_head(ixi_subject: dict[str, SimulatedVolume]) -> None:
    t1, t2 = (to_ras(ixi_subject[name].data, ixi_subject[name].affine) for name in ("t1", "t2"))
    moved = resample(t1, t2.affine, t2.data.shape)
    inside = resample(type(t1)(np.ones_like(t1.data), t1.affine), t2.affine, t2.data.shape).data > 0
    masks = [image > 0.15 * np.percentile(image, 99) for image in (moved.data[inside], t2.data[inside])]
    dice = 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum())
    assert dice > 0.88  # cerebrospinal fluid is dark in T1


def test_nothing_is_left_behind_when_interrupted(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert (done, total) == (1, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "out", "brats", 2, 0, SPACING_MM, interrupt)
    assert list(tmp_path.iterdir()) == []


def test_only_a_phantom_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not an earlier result"):
        write_phantom(tmp_path / "mine", "brats", 1, 0, SPACING_MM, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    write_phantom(tmp_path / "out", "brats", 2, 0, SPACING_MM)
    with pytest.raises(UserError, match="`overwrite`"):
        write_phantom(tmp_path / "out", "brats", 1, 0, SPACING_MM)
    write_phantom(tmp_path / "out", "brats", 1, 0, SPACING_MM, overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"BraTS2021_00000", phantom.MARKER}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "bids"}, "layout is 'bids', wanted one of: brats, ixi"),
        ({"num_subjects": 0}, "number of subjects is 0"),
        ({"num_subjects": 999}, "number of subjects is 999"),
        ({"seed": -1}, "seed is -1"),
        ({"spacing_mm": 0.1}, "spacing is 0.1 mm"),
        ({"spacing_mm": float("nan")}, "spacing is nan mm"),
    ],
)
def test_arguments_out_of_range(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    arguments = {"layout": "brats", "num_subjects": 1, "seed": 0, "spacing_mm": SPACING_MM, **changes}
    with pytest.raises(UserError, match=message):
        write_phantom(tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_job_writes_what_the_library_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--layout", "ixi", "--num-subjects", "1", "--seed", "5", "--spacing-mm", "8"]
    main([str(tmp_path / "job"), *flags, "--dry-run"])
    said = capsys.readouterr().out
    assert "IXI-T1/IXI002-Guys-0828-T1.nii.gz" in said
    assert "GiB" in said
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="huge"):
        main([str(tmp_path / "job"), *flags, "--preset", "huge"])
    main([str(tmp_path / "job"), *flags])
    write_phantom(tmp_path / "library", "ixi", 1, seed=5, spacing_mm=SPACING_MM)
    assert digests(tmp_path / "job") == digests(tmp_path / "library")


@pytest.mark.parametrize(
    ("layout", "spacing_mm", "measured_gb"),
    [
        ("brats", 2, 0.53),
        ("brats", 1, 1.08),
        ("ixi", 2, 0.53),
        ("ixi", 1, 1.13),
        ("heads", 2, 0.88),
        ("heads", 1, 1.46),
    ],
)
def test_the_expected_memory_covers_what_was_measured(layout: str, spacing_mm: float, measured_gb: float) -> None:
    """Measured: the largest resident set (VmHWM) of `aldm phantom --num-subjects 1`."""
    assert 1 <= expected_memory_gib(layout, spacing_mm) * 2**30 / (measured_gb * 1e9) < 1.15
