"""An upload is accepted or refused: every check before anything is queued, and nothing kept of who the patient is."""

import contextlib
import io
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from aldm.data.dicom_files import SUFFIXES, damage_of, is_dicom, open_dicom
from aldm.errors import UserError
from serve.files import keep_nifti, keep_series
from serve.problems import Problem, without_paths
from serve.settings import Settings

NIFTI_SUFFIXES = (".nii.gz", ".nii")
MAX_ENTRIES = 4096
"""Files of a zipped series."""
MAX_RATIO = 100
"""What grows more than this when it is unpacked, a large file of a zip or the zip as a whole, is no image."""
JUDGED_BYTES = 2**22
"""Size from which a file's growth is looked at: a slice that is empty or mostly padding shrinks 100 to 200 times."""
FREE_BYTES = 2**26
"""What any zip may unpack to, whatever its growth."""
MAX_NAME = 255
MAX_DIRECTORY = 2**21
"""Bytes of a zip's directory: 500 for each of the files it may have."""
_BLOCK = 2**20
_PREAMBLE = 132
"""Bytes before the first element of a DICOM file."""
_HEADER = 2**16
"""Bytes beside its voxels that a file of a series may have."""


def accept(stream: BinaryIO, name: str, folder: Path, settings: Settings, series: str | None = None) -> tuple[str, int]:
    """Check an upload and keep it in the folder of its job.

    Returns the words of its header, for `choose_source`, and its voxels.

    Args:
        stream: the upload, at its beginning.
        name: what the client calls the file; only its ending is used.
        folder: of the job, empty.
        settings: the limits.
        series: which one of a zip that holds several, as `read_series` takes it.

    Raises:
        Problem: 415 for another kind of file, 422 for what `aldm translate` refuses, 413 for a zip that grows too much;
            the message names no path of the server.
    """
    suffix = next((one for one in (*NIFTI_SUFFIXES, ".zip") if name.lower().endswith(one)), None)
    if suffix is None:
        raise Problem(415, "volume: wanted a file named .nii, .nii.gz, or .zip (of one DICOM series)")
    if series is not None and suffix != ".zip":
        raise Problem(422, "series chooses among the DICOM series of a zip: leave it out with a NIfTI file")
    try:
        return (
            _accept_series(stream, folder, settings, series)
            if suffix == ".zip"
            else _accept_nifti(stream, suffix, folder, settings)
        )
    except UserError as error:
        text = re.sub(rf"({re.escape(str(folder))}/series/)?\b(\d{{5}})\.(dcm|file)\b", _entry, str(error))
        raise Problem(422, without_paths(text, folder.parent)) from error


def _entry(match: re.Match[str]) -> str:
    """Name a file of a zip as the client can find it: files have names of our own here."""
    return f"{'volume, ' if match[1] else ''}file {int(match[2]) + 1} of the zip"


def _accept_nifti(stream: BinaryIO, suffix: str, folder: Path, settings: Settings) -> tuple[str, int]:
    from aldm.data.volume import load_nifti

    upload = folder / f"upload{suffix}"
    try:
        with upload.open("wb") as target:
            shutil.copyfileobj(stream, target, _BLOCK)
        volume, source = load_nifti(upload, max_voxels=settings.max_voxels)
        keep_nifti(folder, volume, source)
        return source.words(), volume.data.size
    finally:
        upload.unlink(missing_ok=True)


def _accept_series(stream: BinaryIO, folder: Path, settings: Settings, wanted: str | None) -> tuple[str, int]:
    from aldm.data.dicom import read_series

    series = folder / "series"
    series.mkdir()
    try:
        _unpack(stream, series, settings)
        for path in sorted(series.iterdir()):
            _refuse_deflated(path)
        volume, source = read_series(series, series=wanted, max_voxels=settings.max_voxels, patient=False)
        keep_series(folder, volume, source)
        return source.description, volume.data.size
    finally:
        shutil.rmtree(series, ignore_errors=True)


def _unpack(stream: BinaryIO, folder: Path, settings: Settings) -> None:
    """Unpack a zip under names of our own, counting what comes out."""
    with _opened(stream) as archive:
        entries = [entry for entry in archive.infolist() if not entry.is_dir() and not _is_twin(entry)]
        if not entries:
            raise Problem(422, "volume: the zip is empty, wanted the files of one DICOM series")
        if len(entries) > MAX_ENTRIES:
            raise Problem(413, f"volume: the zip holds {len(entries):,} files, the limit is {MAX_ENTRIES:,}")
        left = 8 * settings.max_voxels + len(entries) * _HEADER  # 64-bit voxels and a generous header each
        left = min(left, FREE_BYTES + MAX_RATIO * stream.seek(0, io.SEEK_END))
        for index, entry in enumerate(entries):
            _check_entry(entry)
            promised = entry.filename.lower().endswith(SUFFIXES)
            path = folder / f"{index:05d}.{'dcm' if promised else 'file'}"
            left -= _unpack_entry(archive, entry, path, left)


def _is_twin(entry: zipfile.ZipInfo) -> bool:
    """Whether it is one of the files that macOS puts into a zip beside every file."""
    return re.split(r"[/\\]", entry.filename)[-1].startswith("._")


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    parts = re.split(r"[/\\]", name)
    if len(name) > MAX_NAME or name.startswith(("/", "\\")) or ".." in parts or ":" in name or "\0" in name:
        raise Problem(422, "volume: the zip holds a file whose name leaves the zip's folder or is too long")
    if entry.flag_bits & 1:
        raise Problem(422, "volume: the zip is encrypted; send it without a password")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise Problem(422, "volume: the zip holds a link, wanted files only")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise Problem(422, "volume: the zip is compressed in an unusual way; make it again")
    if entry.file_size > JUDGED_BYTES and entry.file_size > MAX_RATIO * max(entry.compress_size, 1):
        raise Problem(413, f"volume: a file of the zip grows more than {MAX_RATIO} times when unpacked; not unpacked")


def _refuse_deflated(path: Path) -> None:
    """Refuse a file that is deflated as a whole: it would be inflated at once, to whatever it becomes.

    Raises:
        UserError: so, or damage that makes it impossible to tell.
    """
    from pydicom.filereader import _read_file_meta_info  # the public function does not take a stream
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    if not is_dicom(path):
        return
    with damage_of(path), open_dicom(path) as stream:
        stream.seek(_PREAMBLE)
        syntax = _read_file_meta_info(stream).get("TransferSyntaxUID")
    if syntax == DeflatedExplicitVRLittleEndian:
        raise UserError(
            f"{path}: deflated DICOM is not taken; write the series uncompressed (Explicit VR Little Endian)"
        )


def _unpack_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, limit: int) -> int:
    """Unpack one file of at most `limit` bytes and return how many there were."""
    done = 0
    try:
        with archive.open(entry) as source, path.open("wb") as target:
            while block := source.read(_BLOCK):
                done += len(block)
                if done > limit or (done > JUDGED_BYTES and done > MAX_RATIO * max(entry.compress_size, 1)):
                    raise Problem(413, "volume: the zip unpacks to more than the largest volume; not unpacked further")
                target.write(block)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise Problem(422, "volume: the zip is damaged or compressed in an unusual way; make it again") from error
    except Exception as error:
        if type(error).__module__ in ("zlib", "lzma", "_lzma"):
            raise Problem(422, "volume: the zip is damaged; make it again") from error
        raise
    return done


class _InSmallParts:
    """A stream that is never read in one large part: `ZipFile` reads a zip's directory, of whatever size, at once."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, count: int = -1) -> bytes:
        """Return at most `count` bytes; raises Problem 413 for more than a directory may have."""
        content = self._stream.read(min(count, MAX_DIRECTORY + 1) if count >= 0 else MAX_DIRECTORY + 1)
        if len(content) > MAX_DIRECTORY:
            raise Problem(
                413, f"volume: the zip holds far more than {MAX_ENTRIES:,} files, the limit; not read further"
            )
        return content


@contextlib.contextmanager
def _opened(stream: BinaryIO) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(_InSmallParts(stream))
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise Problem(422, "volume: not a zip file, or cut off") from error
    with archive:
        yield archive
