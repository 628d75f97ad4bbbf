"""Enhanced (multi-frame) MR images: every frame where its functional groups say, scaled as they say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import UID, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, generate_uid

from aldm.data.dicom import list_series, read_series, write_series
from aldm.data.phantom_anatomy import rotation
from aldm.errors import UserError

SHAPE = (7, 6, 5)  # columns, rows, frames
SPACING_MM = (0.9, 1.1, 2.5)
POSITION = np.array([-31.4, 22.25, 10.125])
ENHANCED, LEGACY = "1.2.840.10008.5.1.4.1.1.4.1", "1.2.840.10008.5.1.4.1.1.4.4"
Edit = Callable[[Dataset], None]


def item(**values: Any) -> Dataset:
    made = Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def frame_groups(k: int, directions: np.ndarray, slope: float, intercept: float, **content: Any) -> Dataset:
    """The functional groups of the frame at place k of the volume."""
    position = POSITION + directions[:, 2] * SPACING_MM[2] * k
    return item(
        PlanePositionSequence=[item(ImagePositionPatient=[f"{value:.8g}" for value in position])],
        FrameContentSequence=[item(**{"StackID": "1", "InStackPositionNumber": k + 1, **content})],
        PixelValueTransformationSequence=[item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="US")],
    )


def make_enhanced(
    path: Path,
    *,
    angles: tuple[float, float, float] = (0, 0, 0),
    sop_class: str = ENHANCED,
    syntax: str = ExplicitVRLittleEndian,
    shape: tuple[int, int, int] = SHAPE,
    edit: Edit | None = None,
) -> np.ndarray:
    """Write an enhanced MR image with its frames in shuffled order; return its values (columns, rows, places)."""
    random = np.random.default_rng(0)
    values = random.integers(0, 4000, shape)
    directions = rotation(np.deg2rad(angles))
    made = Dataset()
    made.PatientName, made.PatientID, made.StudyDate = "Doe^Jane", "ID-4711", "20200202"
    made.SOPClassUID, made.SOPInstanceUID, made.Modality = sop_class, generate_uid(), "MR"
    made.SeriesInstanceUID, made.StudyInstanceUID = generate_uid(), generate_uid()
    made.FrameOfReferenceUID, made.PatientPosition = generate_uid(), "HFS"
    made.SeriesNumber, made.SeriesDescription = 5, "t1 mprage"
    made.Columns, made.Rows, made.NumberOfFrames = shape
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 0
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, 12, 11
    made.SharedFunctionalGroupsSequence = [
        item(
            PlaneOrientationSequence=[
                item(ImageOrientationPatient=[f"{one:.8g}" for one in (*directions[:, 0], *directions[:, 1])])
            ],
            PixelMeasuresSequence=[item(PixelSpacing=[SPACING_MM[1], SPACING_MM[0]], SliceThickness="2.4")],
        )
    ]
    order = random.permutation(shape[2])
    scales = [(1 + k / 4, -10.0 * k) for k in range(shape[2])]
    made.PerFrameFunctionalGroupsSequence = [frame_groups(int(k), directions, *scales[k]) for k in order]
    made.PixelData = b"".join(np.ascontiguousarray(values[:, :, k].T).astype("<u2").tobytes() for k in order)
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    if edit is not None:
        edit(made)
    if UID(syntax).is_encapsulated:
        encode(made, syntax, path)
    else:
        made.file_meta.TransferSyntaxUID = syntax
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    return values * np.array([slope for slope, _ in scales]) + np.array([intercept for _, intercept in scales])


_COMPRESSORS = {"1.2.840.10008.1.2.4.70": "JPEG", "1.2.840.10008.1.2.4.90": "JPEG2000"}


def encode(made: Dataset, syntax: str, path: Path) -> None:
    """Encode the frames: RLE by pydicom, others by SimpleITK."""
    if syntax == RLELossless:
        made.compress(RLELossless, generate_instance_uid=False)
        return
    frames = np.frombuffer(made.PixelData, "<u2").reshape(-1, made.Rows, made.Columns)
    writer = sitk.ImageFileWriter()
    writer.UseCompressionOn()
    writer.SetCompressor(_COMPRESSORS[syntax])
    other = path.with_name("encoded.dcm")
    other.parent.mkdir(parents=True, exist_ok=True)
    writer.SetFileName(str(other))
    writer.Execute(sitk.GetImageFromArray(frames))
    encoded = pydicom.dcmread(other)
    other.unlink()
    assert encoded.file_meta.TransferSyntaxUID == syntax
    made.PixelData = encapsulate(list(generate_frames(encoded.PixelData, number_of_frames=len(frames))))
    made["PixelData"].is_undefined_length = True
    made.file_meta.TransferSyntaxUID = syntax


def check(volume: Any, values: np.ndarray, angles: tuple[float, float, float]) -> None:
    """See every voxel where DICOM's own equation puts it (PS3.3, C.7.6.2.1.1)."""
    directions = rotation(np.deg2rad(angles))
    columns, rows, places = np.meshgrid(*map(np.arange, values.shape), indexing="ij")
    steps = np.stack([columns * SPACING_MM[0], rows * SPACING_MM[1], places * SPACING_MM[2]]).reshape(3, -1)
    world = (POSITION[:, None] + directions @ steps) * np.array([-1, -1, 1])[:, None]
    inverse = np.linalg.inv(volume.affine)
    index = inverse[:3, :3] @ world + inverse[:3, 3:]
    assert np.abs(index - np.rint(index)).max() < 1e-4
    found = volume.data[tuple(np.rint(index).astype(int))]
    assert np.abs(found - values.reshape(-1)).max() < 1e-2
    assert volume.data.size == values.size


@pytest.mark.parametrize("angles", [(0, 0, 0), (4, -7, 12), (90, 3, 0), (80, 85, 10)])
@pytest.mark.parametrize("sop_class", [ENHANCED, LEGACY])
def test_every_voxel_is_where_its_frame_says(
    sop_class: str, angles: tuple[float, float, float], tmp_path: Path
) -> None:
    values = make_enhanced(tmp_path / "in" / "IM0", angles=angles, sop_class=sop_class)
    for place in (tmp_path / "in", tmp_path / "in" / "IM0"):
        volume, source = read_series(place)
        assert source.shape == SHAPE
        check(volume, values, angles)


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, RLELossless, "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.90"]
)
def test_other_transfer_syntaxes_are_read(syntax: str, tmp_path: Path) -> None:
    values = make_enhanced(tmp_path / "in" / "IM0", syntax=syntax, shape=(33, 32, 5))
    check(read_series(tmp_path / "in")[0], values, (0, 0, 0))


def test_what_is_shared_may_stand_in_each_frame_and_the_other_way_round(tmp_path: Path) -> None:
    def move(made: Dataset) -> None:
        shared, frames = made.SharedFunctionalGroupsSequence[0], made.PerFrameFunctionalGroupsSequence
        for keyword in ("PlaneOrientationSequence", "PixelMeasuresSequence"):
            for frame in frames:
                frame[keyword] = shared[keyword]
            del shared[keyword]
        for frame in frames:
            del frame.PixelValueTransformationSequence
        shared.PixelValueTransformationSequence = [item(RescaleSlope=3, RescaleIntercept=-4)]

    plain = make_enhanced(tmp_path / "plain" / "IM0")
    make_enhanced(tmp_path / "in" / "IM0", edit=move)
    stored = (plain + 10.0 * np.arange(5)) / (1 + np.arange(5) / 4)
    check(read_series(tmp_path / "in")[0], stored * 3 - 4, (0, 0, 0))


def test_a_volume_may_lie_in_several_files_of_a_series(tmp_path: Path) -> None:
    """The parts of a concatenation, or one frame a file."""
    values = make_enhanced(tmp_path / "IM0")
    whole = pydicom.dcmread(tmp_path / "IM0")
    size = SHAPE[0] * SHAPE[1] * 2
    (tmp_path / "in").mkdir()
    for name, frames in (("a", range(2)), ("b", range(2, 3)), ("c", range(3, 5))):
        part = pydicom.dcmread(tmp_path / "IM0")
        part.PerFrameFunctionalGroupsSequence = [whole.PerFrameFunctionalGroupsSequence[k] for k in frames]
        part.PixelData = b"".join(whole.PixelData[k * size : (k + 1) * size] for k in frames)
        part.NumberOfFrames, part.SOPInstanceUID = len(frames), generate_uid()
        part.file_meta.MediaStorageSOPInstanceUID = part.SOPInstanceUID
        part.save_as(tmp_path / "in" / name)
    check(read_series(tmp_path / "in")[0], values, (0, 0, 0))


def test_derived_results_are_a_classic_series(tmp_path: Path) -> None:
    values = make_enhanced(tmp_path / "in" / "IM0", angles=(4, -7, 12))
    volume, source = read_series(tmp_path / "in")
    files = write_series(tmp_path / "out", volume.data, source, description="t2 from t1")
    made = [pydicom.dcmread(file) for file in files]
    assert len(made) == SHAPE[2]
    assert {header.SOPClassUID for header in made} == {"1.2.840.10008.5.1.4.1.1.4"}
    assert len({header.SOPInstanceUID for header in made}) == SHAPE[2]
    original = pydicom.dcmread(tmp_path / "in" / "IM0")
    for header in made:
        assert header.SeriesDescription == "SYNTHETIC t2 from t1"
        assert header.SyntheticData == "YES"
        assert header.SeriesInstanceUID != original.SeriesInstanceUID
        assert "PerFrameFunctionalGroupsSequence" not in header
        assert "NumberOfFrames" not in header
        assert "Doe" not in str(header)
    written, _ = read_series(tmp_path / "out")
    assert np.array_equal(written.affine, volume.affine)
    assert np.abs(written.data - volume.data).max() < 0.51 * np.ptp(values) / 65535


def repeated(count: int, **names: Callable[[int], Any]) -> Edit:
    """Make the image hold its volume `count` times, one brighter than the other."""

    def edit(made: Dataset) -> None:
        frames = list(made.PerFrameFunctionalGroupsSequence)
        everything = []
        for number in range(count):
            for frame in frames:
                again = Dataset.from_json(frame.to_json())
                again.PixelValueTransformationSequence[0].RescaleSlope *= 10**number
                for name, value in names.items():
                    put(again, name, value(number))
                everything.append(again)
        made.PerFrameFunctionalGroupsSequence = everything
        made.NumberOfFrames = len(everything)
        made.PixelData *= count

    return edit


def put(frame: Dataset, name: str, value: Any) -> None:
    """Set group__attribute of a frame."""
    group, keyword = name.split("__")
    if group not in frame:
        setattr(frame, group, [Dataset()])
    setattr(frame[group].value[0], keyword, value)


VOLUMES = {
    "temporal positions": (
        {"FrameContentSequence__TemporalPositionIndex": lambda n: n + 1},
        ["temporal position 1", "temporal position 2", "temporal position 3"],
    ),
    "echoes": (
        {"MREchoSequence__EffectiveEchoTime": lambda n: [12.0, 80.5, 120.0][n]},
        ["echo time 12", "echo time 80.5", "echo time 120"],
    ),
    "b-values": (
        {"MRDiffusionSequence__DiffusionBValue": lambda n: [0.0, 500.0, 1000.0][n]},
        ["b-value 0", "b-value 500", "b-value 1000"],
    ),
    "components": (
        {"MRImageFrameTypeSequence__ComplexImageComponent": lambda n: ["MAGNITUDE", "PHASE", "REAL"][n]},
        ["component MAGNITUDE", "component PHASE", "component REAL"],
    ),
    "stacks": (
        {"FrameContentSequence__StackID": lambda n: str(n + 1)},
        ["stack 1", "stack 2", "stack 3"],
    ),
    "a dimension of its own": (
        {"FrameContentSequence__DimensionIndexValues": lambda n: [1, n + 1]},
        ["dimension 2 1", "dimension 2 2", "dimension 2 3"],
    ),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_several_volumes_in_an_image_are_listed_and_chosen(name: str, tmp_path: Path) -> None:
    names, labels = VOLUMES[name]
    values = make_enhanced(tmp_path / "in" / "IM0", edit=repeated(3, **names))
    volumes = list_series(tmp_path / "in")
    assert [(one.address, one.part, one.size) for one in volumes] == [
        (f"5.{number + 1}", label, SHAPE) for number, label in enumerate(labels)
    ]
    with pytest.raises(UserError, match=rf"3 volumes in one series \(5\.1: t1 mprage, {labels[0]}, MR, 7x6x5; 5\.2: "):
        read_series(tmp_path / "in")
    intercept = -10.0 * np.arange(5)
    for number in range(3):
        wanted = (values - intercept) * 10**number + intercept
        volume, _ = read_series(tmp_path / "in", series=f"5.{number + 1}")
        assert volume.data.mean() == pytest.approx(wanted.mean(), rel=1e-4)
        assert volume.data.max() == pytest.approx(wanted.max(), rel=1e-4)


def test_one_volume_of_a_compressed_image_is_chosen(tmp_path: Path) -> None:
    edit = repeated(2, FrameContentSequence__TemporalPositionIndex=lambda n: n + 1)
    values = make_enhanced(tmp_path / "in" / "IM0", syntax=RLELossless, edit=edit)
    check(read_series(tmp_path / "in", series="5.1")[0], values, (0, 0, 0))


def test_values_that_differ_from_place_to_place_make_no_volumes(tmp_path: Path) -> None:
    """Each frame of its own time and trigger delay: one volume all the same."""

    def edit(made: Dataset) -> None:
        for number, frame in enumerate(made.PerFrameFunctionalGroupsSequence):
            frame.FrameContentSequence[0].TemporalPositionIndex = number + 1
            frame.FrameContentSequence[0].DimensionIndexValues = [1, number + 1]

    values = make_enhanced(tmp_path / "in" / "IM0", edit=edit)
    check(read_series(tmp_path / "in")[0], values, (0, 0, 0))


def _frame(made: Dataset, number: int) -> Dataset:
    return made.PerFrameFunctionalGroupsSequence[number]  # type: ignore[no-any-return]


UNUSABLE: dict[str, tuple[Edit, str]] = {
    "a frame without a position": (
        lambda made: delattr(_frame(made, 1), "PlanePositionSequence"),
        "ImagePositionPatient is missing",
    ),
    "no orientation": (
        lambda made: delattr(made.SharedFunctionalGroupsSequence[0], "PlaneOrientationSequence"),
        "ImageOrientationPatient is missing",
    ),
    "too few functional groups": (
        lambda made: made.PerFrameFunctionalGroupsSequence.pop(),
        "5 frames, functional groups for 4",
    ),
    "too many frames": (
        lambda made: setattr(made, "NumberOfFrames", 2**14 + 1),
        "16,385 frames, the limit is 16,384",
    ),
    "voxels cut off": (
        lambda made: setattr(made, "PixelData", made.PixelData[:-2]),
        "truncated, 420 bytes of voxels wanted, 418 there",
    ),
    "a slope that is no number": (
        lambda made: setattr(_frame(made, 2).PixelValueTransformationSequence[0], "RescaleSlope", [1, 2]),
        "RescaleSlope is 2 values",
    ),
    "another modality": (lambda made: setattr(made, "Modality", "CT"), "modality is CT, wanted MR"),
    "colour": (lambda made: setattr(made, "SamplesPerPixel", 3), "colour"),
    "two frames at one place": (
        lambda made: setattr(_frame(made, 1), "PlanePositionSequence", _frame(made, 0).PlanePositionSequence),
        "frame 1 of IM0 and frame 2 of IM0 lie at the same place|wanted even spacing",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_images(name: str, tmp_path: Path) -> None:
    edit, words = UNUSABLE[name]
    make_enhanced(tmp_path / "in" / "IM0", edit=edit)
    with pytest.raises(UserError, match=words):
        read_series(tmp_path / "in")


def test_too_many_voxels_are_refused_before_the_frames_are_looked_at(tmp_path: Path) -> None:
    make_enhanced(tmp_path / "in" / "IM0")
    with pytest.raises(UserError, match=r"IM0: 7x6x5 voxels, the limit is 209"):
        read_series(tmp_path / "in", max_voxels=209)
    assert read_series(tmp_path / "in", max_voxels=210)[0].data.size == 210


def test_whatever_is_done_to_the_bytes_only_users_errors_come_of_it(tmp_path: Path, capfd: Any) -> None:
    random = np.random.default_rng(7)
    make_enhanced(tmp_path / "in" / "IM0")
    path = tmp_path / "in" / "IM0"
    whole = path.read_bytes()
    refused = 0
    for _ in range(80):
        damaged = bytearray(whole)
        place = int(random.integers(132, len(damaged) - 420))
        damaged[place : place + int(random.integers(1, 4))] = random.bytes(int(random.integers(0, 5)))
        path.write_bytes(damaged)
        try:
            read_series(tmp_path / "in", max_voxels=10_000)
        except UserError:
            refused += 1
    assert 20 < refused < 80
    assert "Doe" not in "".join(capfd.readouterr())
