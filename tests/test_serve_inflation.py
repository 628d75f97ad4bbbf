"""Small uploads that would become large: refused before they do; and series with empty slices, which are taken."""

import io
import tracemalloc
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian
from test_dicom import make_series
from test_serve_uploads import refuses, series, upload, zipped

from aldm.data.dicom_codestream import picture_size

MB = 10**6
JPEG, JPEG_2000 = UID("1.2.840.10008.1.2.4.50"), UID("1.2.840.10008.1.2.4.90")


def deflated_bomb(size: int) -> bytes:
    """A DICOM file that inflates to `size` bytes of voxels and is a thousandth of that."""
    made = Dataset()
    made.file_meta = pydicom.dataset.FileMetaDataset()
    made.file_meta.MediaStorageSOPClassUID = made.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    stream = io.BytesIO()
    made.save_as(stream, enforce_file_format=True)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    body = packer.compress(b"\xe0\x7f\x10\x00OW\0\0" + size.to_bytes(4, "little"))
    body += b"".join(packer.compress(bytes(MB)) for _ in range(size // MB))
    empty = len(zlib.compress(b"", wbits=-zlib.MAX_WBITS))  # of the empty data set
    return stream.getvalue()[:-empty] + body + packer.flush()


def test_a_deflated_file_is_refused_and_not_inflated(tmp_path: Path) -> None:
    bomb = deflated_bomb(50 * MB)
    assert len(bomb) < 0.1 * MB
    assert len(pydicom.dcmread(io.BytesIO(bomb)).PixelData) == 50 * MB  # a reader would do it
    files = series(tmp_path / "series")
    for name, content in (("x.dcm", bomb), ("x", bomb), ("x", bomb[128:]), ("x", bomb[132:])):
        tracemalloc.start()
        refuses(zipped({**files, name: content}), "t1.zip", tmp_path / "x", 422, "file 6 of the zip: deflated DICOM")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 * MB


def encoded(size: tuple[int, int], kind: str, **options: Any) -> bytes:
    """A picture of (columns, rows) as Pillow writes it."""
    stream = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 255, size[::-1], dtype=np.uint8)
    Image.fromarray(values).save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (8, 300), (257, 33)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"comment": b"x" * 1000, "dpi": (72, 72), "exif": b"Exif\0\0" + b"\xff\xc0" * 50}),
        ("JPEG2000", {"no_jp2": True}),
        ("JPEG2000", {"no_jp2": False, "comment": "jp2c"}),
        ("JPEG2000", {"no_jp2": True, "offset": (3, 2), "tile_size": (128, 128)}),
    ],
    ids=str,
)
def test_a_stream_tells_its_size(size: tuple[int, int], kind: str, options: dict[str, Any]) -> None:
    stream = encoded(size, kind, **options)
    assert picture_size(stream) == (1, size[1], size[0])
    assert picture_size(b"\xff" + stream) is None
    assert all(picture_size(stream[:length]) in (None, (1, size[1], size[0])) for length in range(0, len(stream), 3))


def test_a_stream_of_jpeg_ls_tells_its_size() -> None:
    """After ITU-T T.87, C.2.2: SOI, SOF55 with length, precision, rows, columns, and the components."""
    stream = bytes.fromhex("ffd8 fff7 000b 08 0102 0304 01 01 11 00 ffda")
    assert picture_size(stream) == (1, 0x0102, 0x0304)
    assert picture_size(b"\xff\xd8\xff\xff" + stream[3:]) == (1, 0x0102, 0x0304)  # with a byte of fill


@pytest.mark.parametrize(
    ("syntax", "stream", "words"),
    [
        (JPEG, encoded((3000, 2000), "JPEG"), "claim 3000x2000 of 1 "),
        (JPEG_2000, encoded((3000, 2000), "JPEG2000", no_jp2=True), "claim 3000x2000 of 1 "),
        (JPEG_2000, encoded((3000, 2000), "JPEG2000", no_jp2=False), "claim 3000x2000 of 1 "),
        (JPEG, b"nothing that is a picture", "claim no size"),
    ],
    ids=["JPEG", "JPEG 2000", "in a JP2 file", "nothing"],
)
def test_a_compressed_slice_that_claims_another_size_is_not_decoded(
    syntax: UID, stream: bytes, words: str, tmp_path: Path
) -> None:
    def edit(_: int, header: Dataset) -> None:
        header.file_meta.TransferSyntaxUID = syntax
        header.BitsAllocated, header.BitsStored, header.HighBit = 8, 8, 7
        header.PixelData = encapsulate([stream])
        header["PixelData"].VR, header["PixelData"].is_undefined_length = "OB", True

    make_series(tmp_path / "in", edit=edit)
    files = {path.name: path.read_bytes() for path in sorted((tmp_path / "in").iterdir())}
    refuses(zipped(files), "t1.zip", tmp_path / "x", 422, f"its compressed voxels {words}")


def test_a_series_with_empty_slices_is_taken(tmp_path: Path) -> None:
    """Of 300 x 300 voxels; the empty ones are 0 and shrink more than 100 times."""
    noise = np.random.default_rng(0).integers(0, 4000, (300, 300)).astype("<u2").tobytes()

    def edit(index: int, header: Dataset) -> None:
        header.Rows = header.Columns = 300
        header.PixelData = bytes(len(noise)) if index in (0, 4) else noise

    make_series(tmp_path / "in", edit=edit)
    files = {path.name: path.read_bytes() for path in sorted((tmp_path / "in").iterdir())}
    content = zipped(files, zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert max(entry.file_size / entry.compress_size for entry in archive.infolist()) > 100
    assert upload(content, "t1.zip", tmp_path / "x")[1] == 5 * 300 * 300


def test_a_zip_of_many_files_that_each_grow_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.uploads.FREE_BYTES", 10 * MB)
    for count, status, words in ((3, 422, "named like a DICOM file"), (8, 413, "unpacks to more than")):
        files = {f"{number}.dcm": bytes(3 * MB) for number in range(count)}
        refuses(zipped(files, zipfile.ZIP_DEFLATED), "x.zip", tmp_path / "x", status, words)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_is_packed_in_an_unusual_way_is_refused(compression: int, tmp_path: Path) -> None:
    refuses(zipped({"x.dcm": b"x" * 100}, compression), "x.zip", tmp_path / "x", 422, "compressed in an unusual way")
