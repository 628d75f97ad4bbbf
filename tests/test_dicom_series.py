"""DICOM as scanners and archives write it: spelling, rounding, missing preambles, mosaics, several series, padding."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, generate_uid
from series import SHAPE, add_other_object, make_series

from aldm.data.dicom import list_series, read_series, write_series
from aldm.errors import UserError


@pytest.fixture
def plain(tmp_path: Path) -> np.ndarray:
    """The voxels of the series as `make_series` writes it."""
    make_series(tmp_path / "plain")
    return read_series(tmp_path / "plain")[0].data


def raw(header: Dataset, keyword: str, text: str) -> None:
    """Write a decimal string as it is spelled here."""
    header[keyword] = pydicom.DataElement(pydicom.datadict.tag_for_keyword(keyword), "DS", text.split("\\"))


def test_numbers_are_compared_as_numbers(plain: np.ndarray, tmp_path: Path) -> None:
    def spelled(k: int, header: Dataset) -> None:
        raw(header, "ImageOrientationPatient", ["1\\0\\0\\0\\1\\0", "1.000000\\-0\\0.0\\1e-7\\1\\-0.0000001"][k % 2])
        raw(header, "PixelSpacing", ["1.1\\0.9", "1.100000\\0.90005"][k % 2])

    make_series(tmp_path / "in", edit=spelled)
    volume, _ = read_series(tmp_path / "in")
    assert np.array_equal(volume.data, plain)
    assert np.allclose(volume.spacing_mm, (0.9, 1.1, 2.5), atol=1e-3)


@pytest.mark.parametrize(("keyword", "text"), [("PixelSpacing", "1.1\\0.9003"), ("PixelSpacing", "1.1\\0.89")])
def test_other_numbers_are_refused(keyword: str, text: str, tmp_path: Path) -> None:
    make_series(tmp_path / "in", edit=lambda k, header: raw(header, keyword, text) if k == 2 else None)
    with pytest.raises(UserError, match=f"the slices differ in {keyword}"):
        read_series(tmp_path / "in")


def stacked(folder: Path, positions: list[float]) -> Path:
    """Make a series of slices of 2 x 2 pixels at these positions along the axis of the body, mm."""
    folder.mkdir()
    series = generate_uid()
    for k, z in enumerate(positions):
        header = Dataset()
        header.Modality, header.SeriesInstanceUID, header.SOPInstanceUID = "MR", series, generate_uid()
        header.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
        header.ImagePositionPatient, header.ImageOrientationPatient = [0, 0, f"{z:.6f}"], [1, 0, 0, 0, 1, 0]
        header.PixelSpacing, header.Rows, header.Columns = [1, 1], 2, 2
        header.SamplesPerPixel, header.PhotometricInterpretation, header.PixelRepresentation = 1, "MONOCHROME2", 0
        header.BitsAllocated, header.BitsStored, header.HighBit = 16, 16, 15
        header.PixelData = np.full(4, k + 1, "<u2").tobytes()
        header.file_meta = FileMetaDataset()
        header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        header.save_as(folder / f"{k:03d}.dcm", enforce_file_format=True)
    return folder


@pytest.mark.parametrize("spacing_mm", [0.6, 0.93, 1.25, 3.3])
@pytest.mark.parametrize("count", [3, 40])
def test_positions_rounded_to_a_tenth_of_a_millimetre_are_taken(count: int, spacing_mm: float, tmp_path: Path) -> None:
    exact = 0.33 + spacing_mm * np.arange(count)
    folder = stacked(tmp_path / "in", list(np.round(exact, 1)))
    volume, source = read_series(folder)
    assert volume.spacing_mm[2] == pytest.approx(spacing_mm, abs=0.1 / (count - 1) + 1e-9)
    places = source.affine[2, 3] + source.affine[2, 2] * np.arange(count)
    assert np.abs(places - exact).max() < 0.1  # no worse than the rounding itself, at any slice


@pytest.mark.parametrize("spacing_mm", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("count", [4, 5, 60])
def test_a_missing_slice_is_always_refused(count: int, spacing_mm: float, tmp_path: Path) -> None:
    for missing in sorted({1, count // 2, count - 2}):
        positions = [spacing_mm * k for k in range(count) if k != missing]
        folder = stacked(tmp_path / f"without-{missing}", positions)
        with pytest.raises(UserError, match=r"1 slice missing|wanted even spacing"):
            read_series(folder)


@pytest.mark.parametrize(("share", "taken"), [(0.015, True), (0.03, False)])
def test_how_far_a_slice_may_be_out_of_step(share: float, taken: bool, tmp_path: Path) -> None:
    positions = 2.5 * np.arange(12.0)
    positions[5] += share * 2.5
    folder = stacked(tmp_path / "in", list(positions))
    if taken:
        assert read_series(folder)[0].data.shape == (2, 2, 12)
    else:
        with pytest.raises(UserError, match=r"between 00(4\.dcm and 005|5\.dcm and 006)\.dcm"):
            read_series(folder)


@pytest.mark.parametrize(("drift_mm", "taken"), [(0.0, True), (0.01, True), (0.3, False)])
def test_how_far_a_stack_may_lean(drift_mm: float, taken: bool, tmp_path: Path) -> None:
    def leaning(k: int, header: Dataset) -> None:
        header.ImagePositionPatient = [-31.4 + drift_mm * k, 22.25, 10.125 + 2.5 * k]

    make_series(tmp_path / "in", edit=leaning)
    if taken:
        _, source = read_series(tmp_path / "in")
        assert source.affine[0, 2] == pytest.approx(-drift_mm, abs=1e-9)
    else:
        with pytest.raises(UserError, match="shifted against each other"):
            read_series(tmp_path / "in")


@pytest.mark.parametrize("cut", [128, 132])
def test_a_slice_without_its_preamble_is_read(cut: int, plain: np.ndarray, tmp_path: Path) -> None:
    make_series(tmp_path / "in")
    for name in ("IM0.dcm", "IM3.dcm"):  # the first slice and the second
        path = tmp_path / "in" / name
        path.write_bytes(path.read_bytes()[cut:])
    assert np.array_equal(read_series(tmp_path / "in")[0].data, plain)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_slice_that_is_its_data_set_alone_is_read(syntax: str, plain: np.ndarray, tmp_path: Path) -> None:
    make_series(tmp_path / "in")
    path = tmp_path / "in" / "IM4.dcm"
    header = pydicom.dcmread(path)
    is_implicit = syntax == ImplicitVRLittleEndian
    pydicom.dcmwrite(path, Dataset(header), implicit_vr=is_implicit, little_endian=True, enforce_file_format=False)
    assert path.read_bytes()[:2] == b"\x08\0"
    assert np.array_equal(read_series(tmp_path / "in")[0].data, plain)


def test_what_is_named_like_a_slice_and_is_none_stops_the_series(tmp_path: Path) -> None:
    make_series(tmp_path / "in")
    path = tmp_path / "in" / "IM2.dcm"
    path.write_bytes(b"\xff" * 512)
    with pytest.raises(UserError, match=r"IM2\.dcm: named like a DICOM file"):
        read_series(tmp_path / "in")
    path.rename(tmp_path / "in" / "._IM2.dcm")  # what a Mac leaves beside each file
    assert read_series(tmp_path / "in")[0].data.shape == (*SHAPE[:2], SHAPE[2] - 1)


def as_mosaic(k: int, header: Dataset) -> None:
    header.ImageType = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]


def as_private_mosaic(k: int, header: Dataset) -> None:
    header.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", 36)


@pytest.mark.parametrize("edit", [as_mosaic, as_private_mosaic])
@pytest.mark.parametrize("count", [1, 3])
def test_mosaics_are_recognised(count: int, edit: Callable[[int, Dataset], None], tmp_path: Path) -> None:
    make_series(tmp_path / "in", edit=edit)
    for path in sorted((tmp_path / "in").iterdir())[count:]:
        path.unlink()
    with pytest.raises(UserError, match=r"a mosaic .* convert it to NIfTI, for example with dcm2niix"):
        read_series(tmp_path / "in")


@pytest.mark.parametrize(
    ("sop_class", "said"),
    [
        ("1.2.840.10008.5.1.4.1.1.11.1", "Grayscale Softcopy Presentation State"),
        ("1.2.840.10008.5.1.4.1.1.88.33", "Comprehensive SR"),
        ("1.2.840.10008.5.1.4.1.1.88.59", "Key Object Selection Document"),
        ("1.2.840.10008.5.1.4.1.1.66", "Raw Data"),
        ("1.3.46.670589.11.0.0.12.2", "an object of its manufacturer"),
    ],
)
def test_objects_without_an_image_are_left_out_and_said(
    sop_class: str, said: str, plain: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_series(tmp_path / "in")
    add_other_object(tmp_path / "in", "AA.dcm", sop_class)
    with caplog.at_level(logging.WARNING):
        volume, source = read_series(tmp_path / "in")
    assert np.array_equal(volume.data, plain)
    assert source.notes == (f"left out what holds no image: 1 {said}",)
    assert source.notes[0] in caplog.text
    assert "Doe" not in caplog.text


def test_an_mr_image_without_its_image_is_damaged_and_not_left_out(tmp_path: Path) -> None:
    make_series(tmp_path / "in")
    add_other_object(tmp_path / "in", "AA.dcm", "1.2.840.10008.5.1.4.1.1.4")
    with pytest.raises(UserError, match=r"AA\.dcm: a DICOM file without an image"):
        read_series(tmp_path / "in")


def named(number: int | None, description: str, **values: object) -> Callable[[int, Dataset], None]:
    """Give a series its number and description."""

    def edit(k: int, header: Dataset) -> None:
        header.SeriesDescription = description
        if number is not None:
            header.SeriesNumber = number
        for keyword, value in values.items():
            setattr(header, keyword, value)

    return edit


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with two series, 5 and 11."""
    folder = tmp_path / "study"
    folder.mkdir()
    for number, description in ((11, "t2 tse tra"), (5, "T1 MPRAGE sag")):
        make_series(tmp_path / "one", edit=named(number, description, RescaleSlope=number))
        for path in (tmp_path / "one").iterdir():
            shutil.move(path, folder / f"{number}-{path.name}")
    return folder


def test_several_series_are_listed(study: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_series(study)
    assert "2 series in one folder (5: T1 MPRAGE sag, MR, 7x6x5; 11: t2 tse tra, MR, 7x6x5)" in str(caught.value)
    assert "choose one with `series`" in str(caught.value)
    assert [one.address for one in list_series(study)] == ["5", "11"]
    with pytest.raises(UserError, match=r"\(5: MR, 7x6x5; 11: MR, 7x6x5\)"):  # descriptions may name anybody
        read_series(study, patient=False)


def test_one_of_several_series_is_chosen(study: Path) -> None:
    first, second = list_series(study)
    means = [read_series(study, series=wanted)[0].data.mean() for wanted in ("5", " 05 ", first.uid, "mprage")]
    assert len(set(means)) == 1
    others = [read_series(study, series=wanted)[0].data.mean() for wanted in ("11", second.uid, "T2 TSE")]
    assert len(set(others)) == 1
    assert others[0] == pytest.approx(means[0] * 11 / 5, rel=0.05)
    assert read_series(study, series="11")[1].description == "t2 tse tra"


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("7", "no volume is meant by `series` '7'; there are 5:"),
        ("t", "2 volumes are meant"),
        ("1", "no volume is meant"),
    ],
)
def test_a_choice_that_is_none_lists_what_there_is(wanted: str, said: str, study: Path) -> None:
    with pytest.raises(UserError, match="11: t2 tse tra") as caught:
        read_series(study, series=wanted)
    assert said in str(caught.value)


def test_series_without_numbers_have_places_in_the_list(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    for name in ("a", "b"):
        make_series(tmp_path / "one", edit=named(None, name))
        for path in (tmp_path / "one").iterdir():
            shutil.move(path, folder / f"{name}-{path.name}")
    volumes = list_series(folder)
    assert [one.address for one in volumes] == ["#1", "#2"]
    for one in volumes:
        assert read_series(folder, series=one.address)[1].description == one.description


def test_two_echoes_in_one_series_are_listed_and_chosen(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    series = generate_uid()
    for echo_time in ("12", "80.0"):
        edit = named(3, "pd t2", SeriesInstanceUID=series, EchoTime=echo_time, RescaleSlope=echo_time)
        make_series(tmp_path / "one", edit=edit)
        for path in (tmp_path / "one").iterdir():
            shutil.move(path, folder / f"{echo_time}-{path.name}")
    listed = r"2 volumes in one series \(3\.1: pd t2, echo time 12, MR, 7x6x5; 3\.2: pd t2, echo time 80, MR, 7x6x5\)"
    with pytest.raises(UserError, match=listed):
        read_series(folder)
    with pytest.raises(UserError, match="2 volumes are meant by `series` '3'"):
        read_series(folder, series="3")
    low, high = (read_series(folder, series=wanted)[0].data.mean() for wanted in ("3.1", "echo time 80"))
    assert high > 3 * low


def test_padding_is_background(tmp_path: Path) -> None:
    def padded(k: int, header: Dataset, value: int = 3000, limit: int | None = None) -> None:
        stored = np.frombuffer(header.PixelData, "<u2").reshape(SHAPE[1::-1]).copy()
        stored[:, 0], stored[0, 1] = 3000, 3010
        header.PixelData = stored.tobytes()
        header.RescaleSlope, header.RescaleIntercept = 2, 0
        header.PixelPaddingValue = value
        if limit is not None:
            header.PixelPaddingRangeLimit = limit

    make_series(tmp_path / "value", edit=padded)
    data = to_source(read_series(tmp_path / "value"))
    assert (data[0] == 0).all()
    assert (data[1, 0] == 6020).all()
    for ends in ((2990, 3010), (3010, 2990)):
        make_series(tmp_path / "range", edit=lambda k, header, ends=ends: padded(k, header, *ends))
        data = to_source(read_series(tmp_path / "range"))
        assert (data[0] == 0).all()
        assert (data[1, 0] == 0).all()


def to_source(read: tuple) -> np.ndarray:
    """Voxels in the series' own axes."""
    from aldm.data.volume import to_source_orientation

    volume, source = read
    return to_source_orientation(volume.data, source.as_nifti())


def test_padding_below_zero_becomes_the_lowest_real_value(tmp_path: Path) -> None:
    def padded(k: int, header: Dataset) -> None:
        stored = np.frombuffer(header.PixelData, "<u2").reshape(SHAPE[1::-1]).astype("<i2") - 100
        stored[:, 0] = -2000
        header.PixelRepresentation, header.BitsStored, header.HighBit = 1, 16, 15
        header.RescaleSlope, header.RescaleIntercept = 1, 0
        header.PixelData = stored.tobytes()
        header.PixelPaddingValue = -2000

    make_series(tmp_path / "in", edit=padded)
    data = to_source(read_series(tmp_path / "in"))
    assert data.min() >= -100
    assert (data[0] == data.min()).all()


@pytest.mark.parametrize("has_padding", [False, True])
def test_monochrome1_is_the_same_picture_and_written_as_monochrome2(has_padding: bool, tmp_path: Path) -> None:
    def either(k: int, header: Dataset, turned: bool) -> None:
        stored = np.frombuffer(header.PixelData, "<u2").copy()
        stored[:7] = 4095 if turned else 0
        header.RescaleSlope, header.RescaleIntercept = 0.5, 3
        if turned:
            stored[7:] = 4095 - stored[7:]
            header.PhotometricInterpretation = "MONOCHROME1"
        if has_padding:
            header.PixelPaddingValue = int(stored[0])
        header.PixelData = stored.tobytes()

    make_series(tmp_path / "two", edit=lambda k, header: either(k, header, False))
    make_series(tmp_path / "one", edit=lambda k, header: either(k, header, True))
    wanted, (volume, source) = read_series(tmp_path / "two")[0], read_series(tmp_path / "one")
    assert np.allclose(volume.data, wanted.data)
    files = write_series(tmp_path / "out", volume.data, source, description="t2 from t1")
    assert pydicom.dcmread(files[0]).PhotometricInterpretation == "MONOCHROME2"
    assert "PixelPaddingValue" not in pydicom.dcmread(files[0])
    assert np.abs(read_series(tmp_path / "out")[0].data - wanted.data).max() < 0.1


def test_monochrome1_with_a_slope_for_each_slice_keeps_their_order(tmp_path: Path) -> None:
    """One level of brightness in the file is one level in the volume, whatever a slice's slope."""

    def edit(k: int, header: Dataset) -> None:
        header.PhotometricInterpretation = "MONOCHROME1"
        header.RescaleSlope, header.RescaleIntercept = [(1, 0), (2, 0)][k % 2]
        stored = np.full(SHAPE[:2], [1000, 500][k % 2], "<u2")
        stored[0, 0] = [2000, 1000][k % 2]
        header.PixelData = stored.T.tobytes()

    make_series(tmp_path / "in", edit=edit)
    data = to_source(read_series(tmp_path / "in"))
    assert np.ptp(data[1:, 1:]) == 0
    assert np.ptp(data[0, 0]) == 0
    assert data[0, 0, 0] < data[1, 1, 0]
