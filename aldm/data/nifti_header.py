"""NIfTI files read with suspicion: everything that the header claims is checked before anything is allocated."""

import gzip
import math
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from aldm.errors import UserError

MAX_VOXELS = 512**3
"""Largest volume that is read unless the caller says otherwise."""

_MAX_VOXEL_OFFSET = 64 * 2**20  # bytes of header extensions that are skipped to reach the voxels
_MAX_TRAILING = 2**20  # bytes after the voxels that are tolerated in a compressed file
_DEFLATE_LIMIT = 1032  # no deflate stream grows more than this
_MM_PER_UNIT = {0: ("unknown", 1.0), 1: ("metre", 1000.0), 2: ("mm", 1.0), 3: ("micron", 0.001)}
"""Lowest three bits of xyzt_units -> the spatial unit and its mm; the other bits are about time."""
_SMALLEST_MM, _LARGEST_MM = 2.0, 5000.0
"""Longest side of a field of view: a unit that is wrong by a factor of 1000 lies outside."""


@dataclass(frozen=True, eq=False)
class NiftiSource:
    """What is needed to write a result on exactly the grid of a file, in the file's own axis order."""

    path: Path
    shape: tuple[int, int, int]
    """Voxels along the file's own axes."""
    affine: np.ndarray
    """(4, 4) voxel -> world RAS, mm, of the file's own axes."""
    header: bytes
    """The file's header as it is, in this machine's byte order: qform, sform, codes, units and pixdim live there."""
    byte_order: str = "="
    """Byte order of the file's voxels as NumPy writes it."""
    notes: tuple[str, ...] = ()
    """What was wrong in the header and could be fixed; `header` is the fixed one."""

    @property
    def orientation(self) -> str:
        """Anatomical direction of each of the file's axes, such as LPS."""
        return "".join(nibabel.aff2axcodes(self.affine))

    def parsed_header(self) -> Any:
        """Return the header as nibabel's Nifti1Header or Nifti2Header."""
        kind = nibabel.Nifti1Header if len(self.header) == 348 else nibabel.Nifti2Header
        return kind(self.header, check=False)

    def words(self) -> str:
        """Return what the header says in words, which programs fill in as they like."""
        header = self.parsed_header()
        words = (bytes(header[name].tobytes()).decode("latin-1") for name in ("descrip", "intent_name"))
        return " ".join(words).replace("\0", " ")


def source_of(affine: np.ndarray, shape: Sequence[int], path: Path) -> NiftiSource:
    """Return the source of a file that does not exist yet: `affine` in mm as qform and sform, code 1 (scanner)."""
    header = nibabel.Nifti1Header()
    header.set_data_shape(tuple(shape))
    header.set_sform(affine, code=1)
    header.set_qform(affine, code=1)
    header.set_xyzt_units("mm")
    x, y, z = shape
    return NiftiSource(Path(path), (int(x), int(y), int(z)), np.asarray(affine, np.float64), bytes(header.binaryblock))


def is_nifti_name(path: str | Path) -> bool:
    """Tell whether a file name ends like a NIfTI file's."""
    return str(path).lower().endswith((".nii", ".nii.gz"))


def is_input_name(name: str) -> bool:
    """Tell whether a file that lies in a folder is a NIfTI file by its name, and not a hidden one.

    macOS leaves a `._scan.nii.gz`, which holds no volume, beside every scan.nii.gz on file systems of others.
    """
    return is_nifti_name(name) and not name.startswith(".")


def open_nifti(path: Path) -> IO[bytes]:
    """Open a .nii or .nii.gz file for reading, decompressed."""
    if not is_nifti_name(path):
        raise UserError(f"{path}: not a NIfTI file by its name, wanted .nii or .nii.gz")
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path}: the file is empty")
        stream = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    zipped = stream.read(2) == b"\x1f\x8b"
    stream.seek(0)
    if zipped != path.name.lower().endswith(".gz"):
        stream.close()
        found = "gzip-compressed" if zipped else "not gzip-compressed"
        raise UserError(f"{path}: the content is {found}, unlike the name; rename the file or get it again")
    if not zipped:
        return stream
    stream.close()
    return gzip.open(path, "rb")  # type: ignore[return-value]


def _read_fully(stream: IO[bytes], target: memoryview, path: Path, *, to_the_end: bool = False) -> int:
    """Fill `target` from the stream and return how many bytes there were; `to_the_end`: the stream must end well."""
    done = 0
    try:
        while done < len(target):
            count = stream.readinto(target[done : done + 2**22])  # type: ignore[attr-defined]
            if not count:
                break
            done += count
    except EOFError as error:
        if to_the_end:
            raise UserError(f"{path}: truncated: {error}") from error
    except (OSError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read, the file is damaged: {error}") from error
    return done


def read_header(stream: IO[bytes], path: Path, max_voxels: int) -> NiftiSource:
    """Read and check everything that the header says, leaving the stream at the end of the header."""
    block = bytearray(540)
    count = _read_fully(stream, memoryview(block)[:348], path)
    size = min(int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big"))
    if count == 348 and size == 540:
        count += _read_fully(stream, memoryview(block)[348:], path)
    if count < 348 or size not in (348, 540) or (size == 540 and count < 540):
        raise UserError(f"{path}: not a NIfTI file (no NIfTI header in its first {count} bytes)")
    magic = bytes(block[344:347] if size == 348 else block[4:7])
    if magic != (b"n+1" if size == 348 else b"n+2"):
        raise UserError(f"{path}: not a single-file NIfTI (magic {magic!r}, wanted n+1 or n+2); convert it to .nii")
    kind = nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header
    header = kind(bytes(block[:size]), check=False).as_byteswapped("native")
    shape = _checked_shape(path, header, max_voxels)
    _checked_dtype(path, header)
    swapped = int.from_bytes(block[:4], sys.byteorder) != size
    order = {"little": "<>", "big": "><"}[sys.byteorder][swapped]
    notes = _mended_forms(header)
    affine = _checked_affine(path, header)
    _check_size(path, affine, shape, header)
    return NiftiSource(path, shape, affine, bytes(header.binaryblock), order, notes)


def _checked_shape(path: Path, header: Any, max_voxels: int) -> tuple[int, int, int]:
    """Return the three spatial sizes that the header claims, trailing axes of length 1 dropped."""
    dim = [int(n) for n in header["dim"]]
    if not 1 <= dim[0] <= 7 or any(n < 1 for n in dim[1 : dim[0] + 1]):
        raise UserError(f"{path}: the header's shape {dim} makes no sense: the file is damaged or not NIfTI")
    shape = dim[1 : dim[0] + 1]
    while len(shape) > 3 and shape[-1] == 1:
        shape.pop()
    if len(shape) != 3 or min(shape) < 2:
        got = "x".join(map(str, shape))
        raise UserError(
            f"{path}: {sum(n > 1 for n in shape)}D data of shape {got}, wanted one 3D volume (X, Y, Z all above 1); "
            "extract the volume that you mean"
        )
    if math.prod(shape) > max_voxels:
        raise UserError(
            f"{path}: the header claims {'x'.join(map(str, shape))} = {math.prod(shape):,} voxels, the limit is "
            f"{max_voxels:,}: resample it, or raise the limit if it is real"
        )
    return shape[0], shape[1], shape[2]


def _checked_dtype(path: Path, header: Any) -> None:
    """Refuse voxels that are not real scalars."""
    code = int(header["datatype"])
    try:
        dtype = header.get_data_dtype()
    except (KeyError, HeaderDataError) as error:
        raise UserError(f"{path}: unknown voxel type (datatype code {code})") from error
    if dtype.fields is not None:
        raise UserError(f"{path}: RGB voxels, wanted one intensity per voxel; convert it to grey values")
    if dtype.kind == "c":
        raise UserError(f"{path}: complex voxels, wanted real ones; write the magnitude image")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise UserError(f"{path}: voxel type {dtype} is not read, wanted integers or floats of at most 64 bits")


def _mended_forms(header: Any) -> tuple[str, ...]:
    """Set the code of an sform that maps no volume to 0 where the qform does map one; return what was done."""
    try:
        if header["sform_code"] <= 0 or header["qform_code"] <= 0 or not _is_singular(header.get_sform()):
            return ()
        if _is_singular(header.get_qform()):
            return ()
    except (HeaderDataError, ValueError):
        return ()
    code = int(header["sform_code"])
    header["sform_code"] = 0
    return (f"the sform (code {code}) is empty or singular, so the qform was used",)


def _checked_affine(path: Path, header: Any) -> np.ndarray:
    """Return the best affine (sform, else qform, else pixdim) in mm, or say why it maps no volume."""
    try:
        affine = np.array(header.get_best_affine(), np.float64)
    except (HeaderDataError, ValueError) as error:
        raise UserError(f"{path}: the header's orientation makes no sense: {error}") from error
    affine[:3] *= _unit(header)[1]
    if _is_singular(affine):
        raise UserError(
            f"{path}: singular affine (voxel axes {affine[:3, :3].tolist()} mm), so the volume has no geometry"
        )
    return affine


def _unit(header: Any) -> tuple[str, float]:
    """Return the name of the header's spatial unit and its mm."""
    return _MM_PER_UNIT.get(int(header["xyzt_units"]) & 7, _MM_PER_UNIT[0])


def _is_singular(affine: np.ndarray) -> bool:
    """Whether an affine maps no volume, whatever its unit."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or lengths.min() < 1e-6:
        return True
    return bool(abs(np.linalg.det(affine[:3, :3] / lengths)) < 1e-3)


def _check_size(path: Path, affine: np.ndarray, shape: Sequence[int], header: Any) -> None:
    """Refuse a field of view that is no head's: then the header's unit is another than that of its numbers."""
    sides = np.linalg.norm(affine[:3, :3], axis=0) * shape
    if _SMALLEST_MM <= sides.max() <= _LARGEST_MM:
        return
    unit, mm = _unit(header)
    found = " x ".join(f"{side:.4g}" for side in sides)
    in_mm = " x ".join(f"{side:.4g}" for side in sides / mm)
    way_out = "fix its voxel size"
    if mm != 1:
        way_out = f"if its numbers are mm ({in_mm} mm), set the unit to mm (nibabel: header.set_xyzt_units('mm'))"
    raise UserError(
        f"{path}: a field of view of {found} mm, wanted a longest side of {_SMALLEST_MM:g} to {_LARGEST_MM:,.0f} mm; "
        f"the header's unit is {unit}: {way_out}"
    )


def read_voxels(stream: IO[bytes], source: NiftiSource) -> np.ndarray:
    """Read the voxels that follow the header, unscaled, as an (X, Y, Z) array in the file's axis order and voxel type.

    Raises:
        UserError: fewer bytes than the header says (found before allocation where the file's size tells), a compressed
            file that goes on long after its voxels, a checksum that does not fit.
    """
    path, header = source.path, source.parsed_header()
    dtype = header.get_data_dtype().newbyteorder(source.byte_order)
    offset = float(header["vox_offset"])
    wanted = math.prod(source.shape) * dtype.itemsize
    if not len(source.header) <= offset <= _MAX_VOXEL_OFFSET:
        raise UserError(f"{path}: the header says that the voxels begin at byte {offset:g}: it is damaged")
    skip = int(offset) - len(source.header)
    zipped = isinstance(stream, gzip.GzipFile)
    size = path.stat().st_size
    available = (size * _DEFLATE_LIMIT if zipped else size) - len(source.header) - skip
    if available < wanted:
        raise UserError(f"{path}: truncated, {wanted:,} bytes of voxels wanted, at most {max(0, available):,} there")
    _read_fully(stream, memoryview(bytearray(skip)), path)
    voxels = np.empty(wanted // dtype.itemsize, dtype)
    count = _read_fully(stream, voxels.view(np.uint8).data, path)
    if count < wanted:
        raise UserError(f"{path}: truncated, {wanted:,} bytes of voxels wanted, {count:,} there")
    if zipped:  # to the end: there is the checksum
        trailing = _read_fully(stream, memoryview(bytearray(_MAX_TRAILING + 1)), path, to_the_end=True)
        if trailing > _MAX_TRAILING:
            raise UserError(
                f"{path}: decompresses to far more than the {wanted:,} bytes of voxels that its header says; "
                "not read any further"
            )
    return voxels.reshape(source.shape, order="F")
