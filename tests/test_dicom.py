"""DICOM series: geometry and values out and back, the marks of a synthetic series, and bad input."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless
from series import DAMAGE, SHAPE, UNUSABLE, Edit, make_series

from aldm.data.dicom import is_series_folder, read_series, write_series
from aldm.data.volume import load_nifti, save_nifti, to_source_orientation
from aldm.errors import UserError


def world_ras(path: Path, column: int, row: int) -> np.ndarray:
    """World position of a pixel by DICOM's own equation (PS3.3, C.7.6.2.1.1), turned to RAS."""
    header = pydicom.dcmread(path, stop_before_pixels=True)
    cosines = np.array(header.ImageOrientationPatient, float)
    spacing = np.array(header.PixelSpacing, float)
    position = np.array(header.ImagePositionPatient, float)
    lps = position + cosines[:3] * spacing[1] * column + cosines[3:] * spacing[0] * row
    return lps * [-1, -1, 1]


@pytest.mark.parametrize("angles", [(0, 0, 0), (4, -7, 12), (90, 3, 0), (80, 85, 10)])
def test_every_pixel_is_where_dicom_says(angles: tuple[float, float, float], tmp_path: Path) -> None:
    values = make_series(tmp_path / "in", angles=angles)
    volume, source = read_series(tmp_path / "in")
    assert volume.orientation == "RAS"
    assert volume.data.dtype == np.float32
    assert source.shape == SHAPE
    to_index = np.linalg.inv(volume.affine)
    for k in range(SHAPE[2]):
        for column, row in ((0, 0), (6, 0), (2, 5)):
            world = world_ras(tmp_path / "in" / f"IM{(3 * k) % SHAPE[2]}.dcm", column, row)
            index = to_index[:3] @ [*world, 1]
            assert np.allclose(index, np.rint(index), atol=1e-5)
            assert volume.data[tuple(np.rint(index).astype(int))] == pytest.approx(values[column, row, k], abs=1e-4)


@pytest.mark.parametrize("angles", [(0, 0, 0), (4, -7, 12), (80, 85, 10)])
def test_a_derived_series_lies_on_the_same_grid(angles: tuple[float, float, float], tmp_path: Path) -> None:
    make_series(tmp_path / "in", angles=angles)
    volume, source = read_series(tmp_path / "in")
    changed = (volume.data * 1e-3 - 0.7).astype(np.float32)
    files = write_series(tmp_path / "out", changed, source, description="t2 from t1")
    again, again_source = read_series(tmp_path / "out")
    assert np.array_equal(again.affine, volume.affine)
    assert np.abs(again.data - changed).max() <= 0.51 * np.ptp(changed) / 65535
    originals = sorted((tmp_path / "in").iterdir(), key=lambda path: int(path.stem[2:]) * 2 % SHAPE[2])
    for written, original in zip(files, originals, strict=True):
        got, wanted = pydicom.dcmread(written), pydicom.dcmread(original)
        for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness"):
            assert str(got[keyword].value) == str(wanted[keyword].value)
    assert again_source.positions == source.positions


def test_other_readers_see_the_same_volume(tmp_path: Path) -> None:
    """SimpleITK's own idea of the written series, found and sorted by itself."""
    make_series(tmp_path / "in", angles=(4, -7, 12))
    volume, source = read_series(tmp_path / "in")
    write_series(tmp_path / "out", volume.data, source, description="t2 from t1")
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "out")), sitk.sitkFloat32)
    for index in ((0, 0, 0), (6, 5, 4), (1, 2, 3)):
        world = np.array(image.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
        place = np.linalg.inv(volume.affine)[:3] @ [*world, 1]
        assert image[index] == pytest.approx(volume.data[tuple(np.rint(place).astype(int))], abs=0.05)


def test_a_derived_series_says_that_it_is_synthetic(tmp_path: Path) -> None:
    make_series(tmp_path / "in")
    volume, source = read_series(tmp_path / "in")
    files = write_series(tmp_path / "out", volume.data, source, description="t2 from t1", derivation="model 1234")
    made = [pydicom.dcmread(path) for path in files]
    for header in made:
        assert list(header.ImageType[:2]) == ["DERIVED", "SECONDARY"]
        assert header.SeriesDescription == "SYNTHETIC t2 from t1"
        assert header.SyntheticData == "YES"
        assert "SYNTHETIC" in header.DerivationDescription
        assert "model 1234" in header.DerivationDescription
        assert header.Modality == "MR"
        assert header.file_meta.MediaStorageSOPInstanceUID == header.SOPInstanceUID
        assert not [element for element in header if element.tag.is_private]
    assert len({header.SOPInstanceUID for header in made}) == len(made)
    assert len({header.SeriesInstanceUID for header in made}) == 1
    assert [header.InstanceNumber for header in made] == [1, 2, 3, 4, 5]
    assert "RescaleSlope" in made[0]
    assert "RescaleIntercept" in made[0]


def test_nothing_of_the_patient_is_copied_by_default(tmp_path: Path) -> None:
    make_series(tmp_path / "in")
    volume, source = read_series(tmp_path / "in")
    files = write_series(tmp_path / "out", volume.data, source, description="t2 from t1")
    other = write_series(tmp_path / "other", volume.data, source, description="flair from t1")
    original = pydicom.dcmread(tmp_path / "in" / "IM0.dcm")
    secrets = [
        str(original[keyword].value) for keyword in ("PatientName", "PatientID", "PatientBirthDate", "StudyDate")
    ]
    secrets += [value for _, value in _uids(original)] + ["Elsewhere", "secret"]
    for path in files:
        content = path.read_bytes().decode("latin-1")
        assert not [secret for secret in secrets if secret in content]
    first, second = pydicom.dcmread(files[0]), pydicom.dcmread(other[0])
    assert first.PatientIdentityRemoved == "YES"
    assert first.StudyInstanceUID == second.StudyInstanceUID
    assert first.FrameOfReferenceUID == second.FrameOfReferenceUID
    assert first.SeriesInstanceUID != second.SeriesInstanceUID
    assert read_series(tmp_path / "in")[1].anonymous_study_uid != first.StudyInstanceUID


def test_codes_are_copied_and_free_text_is_not(tmp_path: Path) -> None:
    for name, text, wanted in (("code", "BRAIN", "BRAIN"), ("text", "DOE JANE HEAD", "")):
        make_series(tmp_path / name, edit=lambda k, header, text=text: setattr(header, "BodyPartExamined", text))
        volume, source = read_series(tmp_path / name, patient=False)
        assert (source.body_part, source.patient_position, source.patient) == (wanted, "HFS", ())
        (first, *_) = write_series(tmp_path / f"{name}-out", volume.data, source, description="t2 from t1")
        assert pydicom.dcmread(first).BodyPartExamined == wanted


def test_the_patient_is_kept_when_asked_for(tmp_path: Path) -> None:
    def too_long(k: int, header: Dataset) -> None:
        with pydicom.config.disable_value_validation():
            header.AccessionNumber = "longer than sixteen characters"

    make_series(tmp_path / "in", edit=too_long)
    volume, source = read_series(tmp_path / "in")
    files = write_series(tmp_path / "out", volume.data, source, description="t2 from t1", keep_patient=True)
    made, original = pydicom.dcmread(files[0]), pydicom.dcmread(tmp_path / "in" / "IM0.dcm")
    for keyword in ("PatientName", "PatientID", "StudyDate", "StudyInstanceUID", "FrameOfReferenceUID"):
        assert made[keyword].value == original[keyword].value
    assert made.AccessionNumber == "longer than sixteen characters"
    assert made.SeriesInstanceUID != original.SeriesInstanceUID
    assert made.SOPInstanceUID not in {value for _, value in _uids(original)}
    assert "PatientIdentityRemoved" not in made
    assert "InstitutionName" not in made


def test_a_series_becomes_a_nifti_file_on_the_same_grid(tmp_path: Path) -> None:
    make_series(tmp_path / "in", angles=(4, -7, 12))
    volume, source = read_series(tmp_path / "in")
    nifti = source.as_nifti()
    save_nifti(tmp_path / "out.nii.gz", to_source_orientation(volume.data, nifti), nifti)
    again, again_source = load_nifti(tmp_path / "out.nii.gz")
    assert again_source.shape == SHAPE
    assert np.array_equal(again.data, volume.data)
    assert np.allclose(again.affine, volume.affine, atol=1e-4)


def test_constant_results_and_long_numbers_are_written(tmp_path: Path) -> None:
    def long_numbers(k: int, header: Dataset) -> None:
        with pydicom.config.disable_value_validation():
            header.ImagePositionPatient = ["-31.400000000000006", "22.25000000000000000", f"{10.125 + 2.5 * k:.17f}"]

    make_series(tmp_path / "in", edit=long_numbers)
    volume, source = read_series(tmp_path / "in")
    files = write_series(tmp_path / "out", np.full(volume.data.shape, 1 / 3), source, description="t2 from t1")
    made = pydicom.dcmread(files[-1])
    values = made.pixel_array * float(made.RescaleSlope) + float(made.RescaleIntercept)
    assert np.allclose(values, 1 / 3)
    assert [float(value) for value in made.ImagePositionPatient] == pytest.approx([-31.4, 22.25, 20.125])


def test_other_files_in_the_folder_are_passed_over(tmp_path: Path) -> None:
    make_series(tmp_path / "in")
    (tmp_path / "in" / "README.txt").write_text("notes")
    shutil.copy(tmp_path / "in" / "IM0.dcm", tmp_path / "in" / "DICOMDIR")
    (tmp_path / "in" / "sub").mkdir()
    shutil.copy(tmp_path / "in" / "IM0.dcm", tmp_path / "in" / "sub" / "IM0.dcm")
    assert read_series(tmp_path / "in")[0].data.shape == SHAPE
    assert is_series_folder(tmp_path / "in")
    assert not is_series_folder(tmp_path)
    assert not is_series_folder(tmp_path / "in" / "IM0.dcm")


def _uids(header: Dataset) -> list[tuple[str, str]]:
    uids = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
    return [(keyword, str(header[keyword].value)) for keyword in uids]


@pytest.mark.parametrize(("edit", "message"), UNUSABLE)
def test_unusable_series(edit: Edit, message: str, tmp_path: Path) -> None:
    make_series(tmp_path / "in", edit=edit)
    with pytest.raises(UserError, match=message):
        read_series(tmp_path / "in")


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_headers_are_refused_and_nothing_in_them_is_told(
    name: str, tmp_path: Path, capfd, caplog, recwarn
) -> None:
    make_series(tmp_path / "in")
    path = tmp_path / "in" / "IM2.dcm"
    whole = path.read_bytes()
    damaged = DAMAGE[name](whole)
    assert damaged != whole
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="IM2") as caught:
        read_series(tmp_path / "in")
    said = (
        str(caught.value) + "".join(capfd.readouterr()) + caplog.text + "".join(str(each.message) for each in recwarn)
    )
    assert "Doe" not in said


def test_whatever_is_done_to_the_bytes_only_users_errors_come_of_it(tmp_path: Path, capfd) -> None:
    random = np.random.default_rng(20_261)
    make_series(tmp_path / "in")
    files = sorted((tmp_path / "in").iterdir())
    refused = 0
    for _ in range(100):
        path = files[random.integers(len(files))]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            place = int(random.integers(132, len(damaged)))
            kind = random.integers(4)
            if kind == 0:
                damaged[place] = random.integers(256)
            elif kind == 1:
                del damaged[place : place + int(random.integers(1, 6))]
            elif kind == 2:
                damaged[place:place] = random.bytes(int(random.integers(1, 6)))
            else:
                damaged[place] = damaged[place] ^ (1 << int(random.integers(8)))
        path.write_bytes(damaged)
        try:
            read_series(tmp_path / "in", max_voxels=10_000)
        except UserError:
            refused += 1
        path.write_bytes(whole)
    assert 20 < refused < 100
    assert "Doe" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(("moved_mm", "taken"), [(0.03, True), (0.12, False)])
def test_a_slice_out_of_step_is_refused_but_not_for_its_rounding(moved_mm: float, taken: bool, tmp_path: Path) -> None:
    """Of slices 2.5 mm apart one is moved: little, as by the rounding of its position, or more than that."""

    def move(k: int, header: Dataset) -> None:
        if k == 2:
            x, y, z = header.ImagePositionPatient
            header.ImagePositionPatient = [x, y, float(z) + moved_mm]

    make_series(tmp_path / "in", edit=move)
    if taken:
        assert read_series(tmp_path / "in")[0].spacing_mm[2] == pytest.approx(2.5, abs=0.02)
    else:
        with pytest.raises(UserError, match="wanted even spacing"):
            read_series(tmp_path / "in")


def test_a_missing_slice_is_named(tmp_path: Path) -> None:
    make_series(tmp_path / "in")
    (tmp_path / "in" / "IM1.dcm").unlink()  # slice 2 of 0 to 4
    with pytest.raises(UserError, match=r"5\.000 mm between IM3\.dcm and IM4\.dcm, 2\.500 mm .* 1 slice missing"):
        read_series(tmp_path / "in")


def _resize(side: int, header: Dataset, first: int) -> None:
    """Make a slice of side x side pixels, counting from `first`."""
    header.Rows = header.Columns = side
    header.PixelData = np.arange(first, first + side * side, dtype="<u2").tobytes()


@pytest.mark.parametrize("side", [6, 64])
def test_a_truncated_file(side: int, tmp_path: Path) -> None:
    make_series(tmp_path / "in", edit=lambda k, header: _resize(side, header, k))
    assert read_series(tmp_path / "in")[0].data.shape == (side, side, 5)
    path = tmp_path / "in" / "IM2.dcm"
    whole = path.read_bytes()
    for length in (140, 300, len(whole) - 10):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"IM2\.dcm: "):
            read_series(tmp_path / "in")


def test_compressed_voxels_are_read(tmp_path: Path) -> None:
    def compress(k: int, header: Dataset) -> None:
        _resize(64, header, 100 * k)
        header.compress(RLELossless, generate_instance_uid=False)

    make_series(tmp_path / "plain", edit=lambda k, header: _resize(64, header, 100 * k))
    make_series(tmp_path / "rle", edit=compress)
    assert pydicom.dcmread(tmp_path / "rle" / "IM0.dcm").file_meta.TransferSyntaxUID == RLELossless
    assert np.array_equal(read_series(tmp_path / "rle")[0].data, read_series(tmp_path / "plain")[0].data)


def test_deflated_files_are_read(tmp_path: Path) -> None:
    def deflate(k: int, header: Dataset) -> None:
        header.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian

    make_series(tmp_path / "plain")
    make_series(tmp_path / "deflated", edit=deflate)
    assert np.array_equal(read_series(tmp_path / "deflated")[0].data, read_series(tmp_path / "plain")[0].data)


def test_voxels_in_big_endian_are_read(tmp_path: Path) -> None:
    def swap(k: int, header: Dataset) -> None:
        header.PixelData = np.frombuffer(header.PixelData, "<u2").astype(">u2").tobytes()
        header.file_meta.TransferSyntaxUID = ExplicitVRBigEndian

    make_series(tmp_path / "plain")
    make_series(tmp_path / "big", edit=swap)
    assert np.array_equal(read_series(tmp_path / "big")[0].data, read_series(tmp_path / "plain")[0].data)


def test_folders_without_a_series(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wanted a folder"):
        read_series(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("not DICOM")
    with pytest.raises(UserError, match="no DICOM file"):
        read_series(tmp_path)
    make_series(tmp_path / "in")
    for name in ("IM0", "IM1", "IM2", "IM3"):
        (tmp_path / "in" / f"{name}.dcm").unlink()
    with pytest.raises(UserError, match="a single slice"):
        read_series(tmp_path / "in")


def test_too_many_voxels_and_no_contrast(tmp_path: Path) -> None:
    make_series(tmp_path / "in")
    with pytest.raises(UserError, match="7x6x5 voxels, the limit is 100"):
        read_series(tmp_path / "in", max_voxels=100)

    def flat(k: int, header: Dataset) -> None:
        header.PixelData, header.RescaleSlope, header.RescaleIntercept = bytes(84), 1, 3

    make_series(tmp_path / "flat", edit=flat)
    with pytest.raises(UserError, match="every voxel is 3"):
        read_series(tmp_path / "flat")


def test_only_a_series_of_ours_is_overwritten(tmp_path: Path) -> None:
    make_series(tmp_path / "in")
    volume, source = read_series(tmp_path / "in")
    with pytest.raises(UserError, match="not an earlier result"):
        write_series(tmp_path / "in", volume.data, source, description="t2 from t1", overwrite=True)
    write_series(tmp_path / "out", volume.data, source, description="t2 from t1")
    with pytest.raises(UserError, match="`overwrite`"):
        write_series(tmp_path / "out", volume.data, source, description="t2 from t1")
    write_series(tmp_path / "out", volume.data, source, description="pd from t1", overwrite=True)
    assert pydicom.dcmread(tmp_path / "out" / "SYNTHETIC_0001.dcm").SeriesDescription == "SYNTHETIC pd from t1"
    assert len(list((tmp_path / "in").iterdir())) == SHAPE[2]
