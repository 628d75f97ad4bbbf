import gzip
import itertools
import math
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import BAD, nifti_bytes, noise, oblique, with_header
from scipy import ndimage

from aldm.data.volume import (
    Volume,
    crop_or_pad,
    load_nifti,
    read_source,
    resample,
    save_nifti,
    to_source_orientation,
)
from aldm.errors import UserError

SHAPE = (7, 9, 11)
ORIENTATIONS = [
    "".join(pair) for axes in itertools.permutations(("RL", "AP", "SI")) for pair in itertools.product(*axes)
]


def world_of(affine, shape):
    """World coordinates of every voxel, (3, X, Y, Z)."""
    index = np.indices(shape).reshape(3, -1)
    return (affine[:3, :3] @ index + affine[:3, 3:]).reshape(3, *shape)


def ramp(affine, shape):
    """A volume whose intensity is a linear function of the world position, which linear interpolation keeps."""
    x, y, z = world_of(affine, shape)
    return Volume((50 + 2 * x - 3 * y + 0.5 * z).astype(np.float32), affine)


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_is_read_as_ras_and_written_back_exactly(tmp_path, orientation):
    ornt = nibabel.orientations.axcodes2ornt(orientation)
    turn = nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), ornt)
    data = nibabel.orientations.apply_orientation(noise(), turn)
    affine = oblique() @ nibabel.orientations.inv_ornt_aff(turn, SHAPE)
    nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / "in.nii")

    volume, source = load_nifti(tmp_path / "in.nii")
    assert source.orientation == orientation
    assert volume.orientation == "RAS"
    expected = nibabel.as_closest_canonical(nibabel.load(tmp_path / "in.nii"))
    np.testing.assert_array_equal(volume.data, expected.get_fdata(dtype=np.float32))
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-5)

    save_nifti(tmp_path / "out.nii", to_source_orientation(volume.data, source), source)
    written = nibabel.load(tmp_path / "out.nii")
    np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), data)
    np.testing.assert_array_equal(written.affine, nibabel.load(tmp_path / "in.nii").affine)


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("endianness", ["<", ">"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_the_written_header_keeps_grid_codes_and_units(tmp_path, kind, endianness, suffix, dtype):
    data = noise().astype(dtype)
    image = kind(data, None, header=kind.header_class(endianness=endianness))
    image.header.set_data_dtype(dtype)
    image.header.set_qform(oblique(), code=2)
    image.header.set_sform(oblique(angles=(0.1, 0.1, 0.1)), code=4)
    image.header.set_xyzt_units("mm", "sec")
    image.header["intent_code"], image.header["cal_max"] = 1001, 5
    nibabel.save(image, tmp_path / f"in{suffix}")
    before = nibabel.load(tmp_path / f"in{suffix}").header

    volume, source = load_nifti(tmp_path / f"in{suffix}")
    np.testing.assert_array_equal(to_source_orientation(volume.data, source), data.astype(np.float32))
    save_nifti(tmp_path / f"out{suffix}", to_source_orientation(volume.data, source), source, description="synthetic")
    written = nibabel.load(tmp_path / f"out{suffix}")
    np.testing.assert_array_equal(written.get_fdata(dtype=np.float32), data.astype(np.float32))
    after = written.header
    for name in ("dim", "pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "srow_y", "srow_z"):
        np.testing.assert_array_equal(after[name], before[name], err_msg=name)
    np.testing.assert_array_equal(after.get_qform(), before.get_qform())
    assert after.get_data_dtype() == np.float32
    assert after["descrip"].tobytes().startswith(b"synthetic\0")
    assert after["intent_code"] == after["cal_max"] == 0


@pytest.mark.parametrize(
    ("factors", "slope", "intercept"),
    [
        ((0.5, -3), 0.5, -3),
        ((2, 0), 2, 0),
        ((1, 3), 1, 3),
        ((1, 0), 1, 0),
        ((0, 7), 1, 0),  # by the standard, a slope of 0 says that there are none
        ((math.nan, math.nan), 1, 0),
    ],
)
def test_scale_factors_are_applied(
    tmp_path: Path, factors: tuple[float, float], slope: float, intercept: float
) -> None:
    data = np.arange(27, dtype=np.int16).reshape(3, 3, 3)

    def scaled(header: nibabel.Nifti1Header) -> None:
        header["scl_slope"], header["scl_inter"] = factors

    (tmp_path / "scaled.nii").write_bytes(nifti_bytes(data, change=scaled))
    volume, _ = load_nifti(tmp_path / "scaled.nii")
    np.testing.assert_array_equal(volume.data, data * slope + intercept)


def test_scale_factors_of_integers_that_float32_cannot_hold_are_applied_before_they_are_rounded(tmp_path: Path) -> None:
    def scaled(header: nibabel.Nifti1Header) -> None:
        header["scl_slope"], header["scl_inter"] = 1, -(2**24)

    data = np.arange(27, dtype=np.int32).reshape(3, 3, 3)
    (tmp_path / "large.nii").write_bytes(nifti_bytes(data + np.int32(2**24), change=scaled))
    np.testing.assert_array_equal(load_nifti(tmp_path / "large.nii")[0].data, data)


def test_a_scan_of_16_bits_is_not_read_in_double_precision(tmp_path: Path) -> None:
    """Most are, and it would take twice the memory: peak 10 bytes a voxel."""

    def scaled(header: nibabel.Nifti1Header) -> None:
        header["scl_slope"], header["scl_inter"] = 0.5, 1

    data = np.random.default_rng(0).integers(0, 1000, (64, 64, 64)).astype(np.int16)
    (tmp_path / "scan.nii").write_bytes(nifti_bytes(data, change=scaled))
    tracemalloc.start()
    load_nifti(tmp_path / "scan.nii")
    assert tracemalloc.get_traced_memory()[1] < 13 * data.size
    tracemalloc.stop()


def test_a_trailing_singleton_axis_is_dropped_and_written_again(tmp_path):
    nibabel.save(nibabel.Nifti1Image(noise()[..., None], np.eye(4)), tmp_path / "in.nii.gz")
    volume, source = load_nifti(tmp_path / "in.nii.gz")
    assert volume.data.shape == SHAPE
    save_nifti(tmp_path / "out.nii.gz", to_source_orientation(volume.data, source), source)
    assert nibabel.load(tmp_path / "out.nii.gz").shape == (*SHAPE, 1)


def test_other_spatial_units_become_mm(tmp_path):
    for unit, scale in (("meter", 1e-3), ("micron", 1e3)):
        affine = np.diag([scale, scale, scale, 1.0])
        image = nibabel.Nifti1Image(noise(), affine)
        image.header.set_xyzt_units(unit)
        nibabel.save(image, tmp_path / f"{unit}.nii")
        volume, _ = load_nifti(tmp_path / f"{unit}.nii")
        np.testing.assert_allclose(volume.spacing_mm, (1, 1, 1), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_bad_input_is_refused_with_its_name_and_reason(tmp_path, name, suffix):
    content, reason = BAD[name]
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" and content else content)
    with pytest.raises(UserError, match=reason) as caught:
        load_nifti(path)
    assert str(path) in str(caught.value)


def test_damaged_compression_is_refused(tmp_path):
    whole = gzip.compress(nifti_bytes(noise()))
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "no-checksum": whole[:-8],
        "wrong-checksum": whole[:-8] + bytes(8),
        "garbage": whole[:400] + bytes(200) + whole[600:],
    }.items():
        path = tmp_path / f"{name}.nii.gz"
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"truncated|damaged"):
            load_nifti(path)


def test_content_that_does_not_fit_the_suffix_is_refused(tmp_path):
    (tmp_path / "zipped.nii").write_bytes(gzip.compress(nifti_bytes(noise())))
    (tmp_path / "plain.nii.gz").write_bytes(nifti_bytes(noise()))
    (tmp_path / "image.mha").write_bytes(nifti_bytes(noise()))
    for name, reason in {"zipped.nii": "is gzip", "plain.nii.gz": "not gzip", "image.mha": "by its name"}.items():
        with pytest.raises(UserError, match=reason):
            load_nifti(tmp_path / name)
    for missing in (tmp_path / "missing.nii", tmp_path):
        with pytest.raises(UserError):
            load_nifti(missing)


def test_the_header_is_checked_before_anything_is_allocated(tmp_path):
    claims = with_header(dim=[3, 600, 600, 600, 1, 1, 1, 1])
    bomb = nifti_bytes(noise()) + bytes(64 * 2**20)
    (tmp_path / "claims.nii").write_bytes(claims)
    (tmp_path / "claims.nii.gz").write_bytes(gzip.compress(claims))
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(bomb, compresslevel=1))
    cases = [
        ("claims.nii", "limit", {}),
        ("claims.nii.gz", "limit", {}),
        ("bomb.nii.gz", "decompresses to far more", {}),
    ]
    cases += [(name, "truncated", {"max_voxels": 600**3}) for name in ("claims.nii", "claims.nii.gz")]
    for name, reason, limit in cases:
        tracemalloc.start()
        with pytest.raises(UserError, match=reason):
            load_nifti(tmp_path / name, **limit)
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
        tracemalloc.stop()


def test_the_header_alone_can_be_read(tmp_path):
    (tmp_path / "a.nii").write_bytes(nifti_bytes(noise(), oblique()))
    source = read_source(tmp_path / "a.nii")
    assert source.shape == SHAPE
    np.testing.assert_allclose(source.affine, oblique(), atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ writing


@pytest.mark.linux
def test_nothing_is_overwritten_or_half_written(tmp_path, monkeypatch):
    (tmp_path / "in.nii").write_bytes(nifti_bytes(noise()))
    volume, source = load_nifti(tmp_path / "in.nii")
    data = to_source_orientation(volume.data, source)
    (tmp_path / "there.nii").write_bytes(b"mine")
    for path in (tmp_path / "there.nii", tmp_path / "no" / "folder.nii", tmp_path / "name.mha"):
        with pytest.raises(UserError, match=path.name):
            save_nifti(path, data, source)
    assert (tmp_path / "there.nii").read_bytes() == b"mine"

    real = Path.open

    def full(self, mode):
        stream = real(self, mode)
        if mode != "wb":
            return stream
        stream.close()
        return real(Path("/dev/full"), mode)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(UserError, match="disk full"):
            save_nifti(tmp_path / "there.nii", data, source, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.nii", "there.nii"]
    assert (tmp_path / "there.nii").read_bytes() == b"mine"
    save_nifti(tmp_path / "there.nii", data, source, overwrite=True)
    np.testing.assert_array_equal(load_nifti(tmp_path / "there.nii")[0].data, volume.data)


# ----------------------------------------------------------------------------------------------------------- geometry

starts = st.tuples(*[st.integers(-6, 8)] * 3)
sizes = st.tuples(*[st.integers(1, 14)] * 3)


@settings(max_examples=60, deadline=None)
@given(start=starts, shape=sizes)
def test_a_crop_keeps_world_coordinates(start, shape):
    volume = ramp(oblique(), SHAPE)
    box = crop_or_pad(volume, start, shape, fill=-1)
    index = np.indices(shape) + np.array(start).reshape(3, 1, 1, 1)
    inside = ((index >= 0) & (index < np.array(SHAPE).reshape(3, 1, 1, 1))).all(axis=0)
    np.testing.assert_allclose(box.data[inside], ramp(box.affine, shape).data[inside], atol=1e-4)
    assert (box.data[~inside] == -1).all()


angles = st.tuples(*[st.floats(-0.5, 0.5)] * 3)
spacings = st.tuples(*[st.floats(0.5, 1.3)] * 3)


@settings(max_examples=60, deadline=None)
@given(angles=angles, spacing=spacings)
def test_resampling_keeps_world_coordinates(angles, spacing):
    volume = ramp(oblique(spacing=(1.3, 1.3, 1.3)), (20, 20, 20))
    centre = volume.affine @ [9.5, 9.5, 9.5, 1]
    target = oblique(spacing=spacing, angles=angles)
    target[:3, 3] = centre[:3] - target[:3, :3] @ [4, 4, 4]
    result = resample(volume, target, (9, 9, 9))
    np.testing.assert_allclose(result.data, ramp(target, (9, 9, 9)).data, atol=0.05)


def test_whole_voxel_shifts_and_the_identity_interpolate_nothing():
    volume = Volume(noise(), oblique())
    np.testing.assert_array_equal(resample(volume, oblique(), SHAPE).data, volume.data)
    box = crop_or_pad(volume, (2, -1, 3), (5, 6, 7), fill=-5)
    np.testing.assert_array_equal(resample(volume, box.affine, (5, 6, 7), fill=-5).data, box.data)


@pytest.mark.parametrize(
    ("start", "step", "exact"),
    [
        ((3.0004, 1, 2), 1.0, True),
        ((0.001, 1, 2), 1.0, False),
        ((3, 1, 2), 1.0004, True),  # at the outer of two voxels so much off, at one beyond it too much
        ((3, 1, 2), 1.0011, False),
    ],
)
def test_less_than_a_thousandth_of_a_voxel_anywhere_on_the_grid_interpolates_nothing(
    start: tuple[float, float, float], step: float, exact: bool
) -> None:
    volume, target = Volume(noise(), np.eye(4)), np.diag([step, step, step, 1.0])
    target[:3, 3] = start
    result = resample(volume, target, (2, 2, 2))
    np.testing.assert_array_equal(result.affine, target)
    nearest = tuple(slice(round(low), round(low) + 2) for low in start)
    assert np.array_equal(result.data, volume.data[nearest]) is exact


@pytest.mark.parametrize("signs", list(itertools.product((1.0, -1.0), repeat=3)))
def test_a_grid_that_runs_the_other_way_samples_the_same_places(signs: tuple[float, float, float]) -> None:
    volume, steps = Volume(noise((12, 13, 14)), np.eye(4)), np.array([0.7, 0.9, 0.5])
    target, flipped = np.diag([*steps, 1.0]), np.diag([*steps * signs, 1.0])
    shape, backwards = (15, 14, 16), np.array(signs) < 0
    target[:3, 3] = 0.3, -0.2, 2.1
    flipped[:3, 3] = target[:3, 3] + backwards * steps * (np.array(shape) - 1)
    wanted = resample(volume, target, shape, fill=-9).data
    got = np.flip(resample(volume, flipped, shape, fill=-9).data, np.flatnonzero(backwards))
    np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_diagonal_and_general_affines_agree():
    volume = Volume(noise((12, 13, 14)), np.diag([1.0, 1.5, 2.0, 1]))
    target = np.diag([0.7, 1.1, 1.3, 1])
    target[:3, 3] = 0.3, -0.2, 0.1
    tilted = target.copy()
    tilted[0, 1] = 1e-4  # just enough to take the general way
    straight = resample(volume, target, (15, 15, 15), fill=-9).data
    np.testing.assert_allclose(straight, resample(volume, tilted, (15, 15, 15), fill=-9).data, atol=0.2)


def test_the_field_of_view_ends_half_a_voxel_beyond_the_outer_centres():
    volume = Volume(np.full((4, 4, 4), 3, np.float32), np.eye(4))
    target = np.diag([0.25, 0.25, 0.25, 1])
    target[:3, 3] = -1
    result = resample(volume, target, (24, 24, 24), fill=-9).data
    position = np.arange(24) * 0.25 - 1
    inside = (position >= -0.5) & (position <= 3.5)
    expected = inside[:, None, None] & inside[None, :, None] & inside[None, None, :]
    np.testing.assert_array_equal(result == 3, expected)
    np.testing.assert_array_equal(result == -9, ~expected)
    for place, wanted in ((-0.501, 3), (-0.502, -9), (3.501, 3), (3.502, -9)):  # a rounding takes nothing away
        target = np.eye(4)
        target[:3, 3] = place
        assert resample(volume, target, (1, 1, 1), fill=-9).data == wanted


def test_downsampling_takes_away_what_the_coarse_grid_cannot_carry():
    fine = np.indices((40, 40, 40)).sum(axis=0) % 2 * 200.0  # alternates at every voxel, mean 100
    volume = Volume(fine.astype(np.float32), np.eye(4))
    target = np.diag([3.0, 3, 3, 1])
    target[:3, 3] = 3
    smooth = resample(volume, target, (11, 11, 11)).data
    naive = fine[3:36:3, 3:36:3, 3:36:3]
    assert naive.std() > 90
    assert smooth.std() < 5
    np.testing.assert_allclose(smooth.mean(), 100, atol=1)


def test_labels_stay_labels():
    labels = np.random.default_rng(0).choice([0, 1, 2, 4], size=(20, 20, 20)).astype(np.float32)
    result = resample(Volume(labels, np.eye(4)), oblique(spacing=(1.5, 1.5, 1.5)), (9, 9, 9), order="nearest").data
    assert set(np.unique(result)) <= {0, 1, 2, 4}


@pytest.mark.parametrize("steps", [(2.0, 1.0, 3.0), (1.2, 1.2, 1.2), (0.5, 2.5, 1.0)])
def test_a_coarser_grid_sees_a_gaussian_that_matches_the_two_point_spread_functions(steps):
    """Cardoso et al. 2015: sigma^2 = (f^2 - 1) / (8 ln 2) of old voxels, nothing on an axis that is finer."""
    volume = Volume(noise((24, 20, 22)), np.eye(4))
    shape = tuple(int((n - 1) / step) for n, step in zip(volume.data.shape, steps, strict=True))
    sigma = [math.sqrt(max(step**2 - 1, 0) / (8 * math.log(2))) for step in steps]
    smooth = ndimage.gaussian_filter(volume.data.astype(np.float64), sigma, mode="nearest")
    index = np.indices(shape) * np.array(steps)[:, None, None, None]
    wanted = ndimage.map_coordinates(smooth, index, order=1, mode="nearest")
    got = resample(volume, np.diag([*steps, 1.0]), shape).data
    np.testing.assert_allclose(got, wanted, atol=1e-3)
