"""What is taken of an upload and what is refused, without a service around it."""

import io
import shutil
import stat
import struct
import zipfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from series import make_series

from serve.problems import Problem
from serve.settings import Settings
from serve.uploads import MAX_ENTRIES, MAX_NAME, accept

SHAPE = (14, 12, 10)
VOXELS = 14 * 12 * 10


def scan() -> bytes:
    data = np.random.default_rng(0).normal(100, 20, SHAPE).astype(np.float32)
    image = nibabel.Nifti1Image(data, np.diag([8.0, 8, 8, 1]))
    image.header["descrip"] = b"a T2 scan"
    return bytes(image.to_bytes())


def zipped(entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def no_such_block(content: bytes) -> bytes:
    """A zip whose first file, named x.dcm, begins with a kind of block that deflate does not have (RFC 1951, 3.2.3)."""
    start = content.index(b"x.dcm") + len("x.dcm")
    return content[:start] + b"\xff" + content[start + 1 :]


def series(folder: Path) -> dict[str, bytes]:
    """The files of a DICOM series of 7 x 6 x 5 voxels."""
    make_series(folder)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def upload(content: bytes, name: str, folder: Path, **limits: Any) -> tuple[str, int]:
    folder.mkdir(exist_ok=True)
    return accept(io.BytesIO(content), name, folder, Settings(model="unused", **limits))


def refuses(content: bytes, name: str, folder: Path, status: int, words: str, **limits: Any) -> None:
    """See that an upload is refused with that status and those words, and that nothing of it is left."""
    with pytest.raises(Problem, match=words) as caught:
        upload(content, name, folder, **limits)
    assert caught.value.status == status
    assert list(folder.iterdir()) == []


def test_one_series_of_a_zip_is_chosen(tmp_path: Path) -> None:
    both: dict[str, bytes] = {}
    for number in (3, 4):

        def named(k: int, header: Any, number: int = number) -> None:
            header.SeriesNumber, header.SeriesDescription = number, f"t{number - 2} Doe"

        make_series(tmp_path / "series", edit=named)
        both |= {f"{number}/{path.name}": path.read_bytes() for path in sorted((tmp_path / "series").iterdir())}
    content = zipped({**both, "notes.txt": b"no DICOM"})
    with pytest.raises(Problem, match=r"2 series in one folder \(3: MR, 7x6x5; 4: MR, 7x6x5\)") as caught:
        upload(content, "x.zip", tmp_path / "none")
    assert "choose one with series" in caught.value.detail
    for wanted in ("4", "t2 d"):
        folder = tmp_path / wanted
        folder.mkdir()
        words, voxels = accept(io.BytesIO(content), "x.zip", folder, Settings(model="unused"), wanted)
        assert (words, voxels) == ("t2 Doe", 210)
        assert "Doe" not in (folder / "series.json").read_text()
    refuses(zipped({**both, "4/z.dcm": b"no DICOM"}), "x.zip", tmp_path / "bad", 422, "file 11 of the zip: named like")
    with pytest.raises(Problem, match="leave it out with a NIfTI file"):
        accept(io.BytesIO(scan()), "t1.nii", tmp_path / "nifti", Settings(model="unused"), "4")


def test_a_volume_of_as_many_voxels_as_allowed_is_taken_and_none_of_more(tmp_path: Path) -> None:
    """The limit is that of the settings, far below the library's own."""
    words, voxels = upload(scan(), "t1.nii", tmp_path / "taken", max_voxels=VOXELS)
    assert voxels == VOXELS
    assert "a T2 scan" in words
    refuses(scan(), "t1.nii", tmp_path / "nifti", 422, "1,680 voxels|limit", max_voxels=VOXELS - 1)
    files = series(tmp_path / "series")
    assert upload(zipped(files), "t1.zip", tmp_path / "zip", max_voxels=210)[1] == 210
    refuses(zipped(files), "t1.zip", tmp_path / "dicom", 422, "voxels|limit", max_voxels=209)


@pytest.mark.parametrize(
    ("name", "status"), [("t1.NII", None), ("t1.nii.gz", 422), ("t1.img", 415), ("nii", 415), ("t1.nii.zip.exe", 415)]
)
def test_the_ending_says_what_it_is(name: str, status: int | None, tmp_path: Path) -> None:
    if status is None:
        assert upload(scan(), name, tmp_path / "x")[1] == VOXELS
    else:
        refuses(scan(), name, tmp_path / "x", status, "wanted a file named|gzip|compress|damaged|NIfTI")


def test_an_upload_that_vanishes_while_it_is_read_is_missing(tmp_path: Path) -> None:
    """Its job may be cleared meanwhile."""

    class Vanishes(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if not (block := super().read(size)):
                shutil.rmtree(tmp_path / "x")
            return block

    (tmp_path / "x").mkdir()
    with pytest.raises(Problem, match="No such file") as caught:
        accept(Vanishes(scan()), "t1.nii", tmp_path / "x", Settings(model="unused"))
    assert caught.value.status == 422


@pytest.mark.parametrize(("more", "status", "words"), [(0, 422, "DICOM"), (1, 413, "more than the largest volume")])
def test_the_files_of_a_zip_count_together(more: int, status: int, words: str, tmp_path: Path) -> None:
    """Three files, each below what a volume may have: 8 bytes a voxel and a header each, not one more."""
    limit = 8 * 50_000 + 3 * 2**16
    sizes = [int(0.4 * limit), int(0.4 * limit)]
    sizes.append(limit + more - sum(sizes))
    part = {f"{number}.dcm": np.random.default_rng(number).bytes(size) for number, size in enumerate(sizes)}
    refuses(zipped(part), "x.zip", tmp_path / "x", status, words, max_voxels=50_000)


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        link = zipfile.ZipInfo("a.dcm")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, "/etc/hostname")
    refuses(stream.getvalue(), "x.zip", tmp_path / "x", 422, "holds a link, wanted files only")


def test_an_encrypted_zip_is_refused_as_one(tmp_path: Path) -> None:
    content = bytearray(zipped({"a.dcm": b"x" * 100}))
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        start = content.index(mark) + place
        struct.pack_into("<H", content, start, struct.unpack_from("<H", content, start)[0] | 1)
    refuses(bytes(content), "x.zip", tmp_path / "x", 422, "encrypted; send it without a password")


@pytest.mark.parametrize(
    "name", ["../x.dcm", "a/../x.dcm", "a\\..\\x.dcm", "/x.dcm", "\\x.dcm", "c:x.dcm", "x" * (MAX_NAME + 1)]
)
def test_names_that_leave_the_zip_are_refused(name: str, tmp_path: Path) -> None:
    refuses(zipped({name: b"x"}), "x.zip", tmp_path / "x", 422, "leaves the zip's folder or is too long")


def test_names_of_any_other_kind_are_taken(tmp_path: Path) -> None:
    files = series(tmp_path / "series")
    renamed = dict(zip([f"a/..b/{'y' * (MAX_NAME - 6)}", "b..", "...", "d", "e"], files.values(), strict=True))
    assert max(map(len, renamed)) == MAX_NAME
    assert upload(zipped(renamed), "t1.zip", tmp_path / "x")[1] == 210


def test_what_macos_adds_to_a_zip_is_left_there(tmp_path: Path) -> None:
    files = series(tmp_path / "series")
    twins = {f"__MACOSX/._{name}": content for name, content in files.items()}  # doubled slices, were they read
    assert upload(zipped(files | twins), "t1.zip", tmp_path / "x")[1] == 210


def test_as_many_files_as_allowed_are_looked_at(tmp_path: Path) -> None:
    small = {f"{number}.dcm": b"x" for number in range(MAX_ENTRIES + 1)}
    refuses(zipped(small), "x.zip", tmp_path / "x", 413, "4,097 files, the limit is 4,096")
    small.pop("0.dcm")
    refuses(zipped({"folder/": b"", **small}), "x.zip", tmp_path / "y", 422, "DICOM")


@pytest.mark.parametrize(
    ("size", "status", "words"), [(2**22 + 1, 413, "grows more than 100 times"), (2**22, 422, "DICOM")]
)
def test_what_grows_too_much_is_not_unpacked(size: int, status: int, words: str, tmp_path: Path) -> None:
    """Up to 4 MiB any file may grow: a slice may be empty."""
    refuses(zipped({"x.dcm": bytes(size)}, zipfile.ZIP_DEFLATED), "x.zip", tmp_path / "x", status, words)


def test_a_large_file_that_does_not_grow_is_unpacked(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).bytes(2**22 + 1)
    refuses(zipped({"x.dcm": noise}, zipfile.ZIP_DEFLATED), "x.zip", tmp_path / "x", 422, "DICOM")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zipped({}), "the zip is empty"),
        (zipped({"folder/": b""}), "the zip is empty"),
        (b"PK nothing", "not a zip file, or cut off"),
        (zipped({"x.dcm": b"x" * 1000})[:-40], "not a zip file, or cut off"),
        (zipped({"x.dcm": b"x" * 1000}).replace(b"x" * 1000, b"y" * 1000), "the zip is damaged"),
        (no_such_block(zipped({"x.dcm": b"x" * 1000}, zipfile.ZIP_DEFLATED)), "the zip is damaged; make it again"),
    ],
)
def test_what_is_no_whole_zip_is_refused(content: bytes, words: str, tmp_path: Path) -> None:
    refuses(content, "x.zip", tmp_path / "x", 422, words)


def test_messages_count_the_files_of_the_zip_and_name_no_folder(tmp_path: Path) -> None:
    files = series(tmp_path / "series")
    third = list(files)[2]
    with pytest.raises(Problem, match=r"^volume, file 3 of the zip: ") as caught:
        upload(zipped(files | {third: files[third][:300]}), "x.zip", tmp_path / "x")
    assert str(tmp_path) not in str(caught.value)
