"""Headers that scanners and converters really write: emptied forms, odd time codes, units that cannot be."""

import json

import nibabel
import numpy as np
import pytest
from untrained import save_untrained

from aldm.cli import main
from aldm.data.volume import load_nifti, save_nifti, to_source_orientation
from aldm.errors import UserError
from serve.files import keep_nifti, load_source

AFFINE = np.array([[0, 0, 2.0, -30], [-1.5, 0, 0, 40], [0, 1.2, 0, -20], [0, 0, 0, 1]])
DATA = np.random.default_rng(0).normal(size=(10, 12, 14)).astype(np.float32)


def image(affine=AFFINE, qform=1, sform=1, **header):
    made = nibabel.Nifti1Image(DATA, affine)
    made.set_qform(affine, code=qform)
    made.set_sform(affine, code=sform)
    for name, value in header.items():
        made.header[name] = value
    return made


def emptied(path, rows=0.0, **codes):
    """A file whose sform says nothing: nibabel would fix it while it saves, so the bytes are written by hand."""
    nibabel.save(image(**codes), path)
    content = bytearray(path.read_bytes())
    content[280:328] = np.full((3, 4), rows, "<f4").tobytes()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("rows", [0.0, np.nan, 1.0])
def test_an_emptied_sform_gives_way_to_a_good_qform_and_that_is_said(tmp_path, rows):
    volume, source = load_nifti(emptied(tmp_path / "in.nii", rows))
    np.testing.assert_allclose(source.affine, AFFINE, atol=1e-4)
    assert source.notes == ("the sform (code 1) is empty or singular, so the qform was used",)
    save_nifti(tmp_path / "out.nii", to_source_orientation(volume.data, source), source)
    again, result = load_nifti(tmp_path / "out.nii")
    assert result.notes == ()
    np.testing.assert_allclose(nibabel.load(tmp_path / "out.nii").affine, AFFINE, atol=1e-4)
    np.testing.assert_array_equal(again.data, volume.data)


def test_a_translation_s_sidecar_says_it(tmp_path):
    source = emptied(tmp_path / "scan.nii", affine=AFFINE * [[5, 5, 5, 1]])
    model = save_untrained(tmp_path / "model")
    flags = ("--model", model, "--source", "t1", "--target", "t2", "--num-inference-steps", 1)
    assert main(["translate", *map(str, (source, tmp_path / "out.nii", *flags))]) == 0
    (note,) = json.loads((tmp_path / "out.json").read_text())["notes"]
    assert "qform was used" in note
    np.testing.assert_allclose(nibabel.load(tmp_path / "out.nii").affine, AFFINE * [[5, 5, 5, 1]], atol=1e-4)


def test_the_service_keeps_what_is_to_be_said(tmp_path):
    keep_nifti(tmp_path, *load_nifti(emptied(tmp_path / "in.nii")))
    _, source = load_source(tmp_path)
    np.testing.assert_allclose(source.affine, AFFINE, atol=1e-4)
    assert source.notes == load_nifti(tmp_path / "in.nii")[1].notes


def test_an_emptied_sform_without_a_qform_is_refused(tmp_path):
    with pytest.raises(UserError, match="singular affine"):
        load_nifti(emptied(tmp_path / "in.nii", qform=0))


def test_a_good_sform_is_kept_beside_any_qform(tmp_path):
    nibabel.save(image(), tmp_path / "in.nii")
    assert load_nifti(tmp_path / "in.nii")[1].notes == ()


@pytest.mark.parametrize("time", [0, 8, 16, 24, 32, 40, 56, 64, 72, 128, 248])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_the_spatial_unit_decides_whatever_the_time_code(tmp_path, time, kind):
    for unit, mm in ((0, 1), (1, 1000), (2, 1), (3, 0.001)):
        affine = np.diag([*np.array([1.0, 2.0, 3.0]) / mm, 1])
        made = kind(DATA, affine)
        made.header["xyzt_units"] = unit | time
        nibabel.save(made, tmp_path / "in.nii")
        volume, source = load_nifti(tmp_path / "in.nii")
        np.testing.assert_allclose(volume.spacing_mm, (1, 2, 3), rtol=1e-6)
        assert source.parsed_header()["xyzt_units"] == unit | time


@pytest.mark.parametrize(("unit", "words"), [(3, "micron"), (1, "metre")])
def test_a_unit_that_makes_no_head_is_named(tmp_path, unit, words):
    nibabel.save(image(np.diag([1.0, 1, 1, 1]), xyzt_units=unit), tmp_path / "in.nii")
    with pytest.raises(
        UserError, match=rf"in\.nii: a field of view of .* unit is {words}: if its numbers are mm \(10 x 12"
    ):
        load_nifti(tmp_path / "in.nii")


def test_a_size_in_unknown_units_that_no_head_has_is_named(tmp_path):
    nibabel.save(image(np.diag([1e-3, 1e-3, 1e-3, 1]), xyzt_units=0), tmp_path / "in.nii")
    with pytest.raises(UserError, match=r"0\.01 x 0\.012 x 0\.014 mm, wanted .* unit is unknown: fix its voxel size"):
        load_nifti(tmp_path / "in.nii")
