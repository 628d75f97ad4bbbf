"""How large the picture of a compressed frame is, from the first bytes of its stream: a decoder believes it.

A stream of a few kB may claim gigabytes, whatever Rows and Columns say. Sources: ITU-T T.81 (JPEG) B.2, T.87 (JPEG-LS)
C.2, T.800 (JPEG 2000) A.5.1 and I.4; DICOM PS3.5 A.4.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydicom.uid import UID

_SOI, _SOC_SIZ = b"\xff\xd8", b"\xff\x4f\xff\x51"
_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_JPEG_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Markers that begin a frame's header: SOF of JPEG and of JPEG-LS."""
_ALONE = {0x01, *range(0xD0, 0xD8)}
"""Markers that no length follows."""


def is_self_describing(syntax: "UID") -> bool:
    """Whether a transfer syntax is one whose streams say their own size: JPEG, JPEG-LS, JPEG 2000; not RLE."""
    return str(syntax).startswith("1.2.840.10008.1.2.4.")


def picture_size(stream: bytes) -> tuple[int, int, int] | None:
    """Return (components, rows, columns) that a stream of JPEG, JPEG-LS or JPEG 2000 claims; None where it is none."""
    if stream[:12] == _JP2:
        stream = _inside(stream)
    if stream[:4] == _SOC_SIZ and len(stream) >= 42:
        right, bottom, left, top = (int.from_bytes(stream[at : at + 4], "big") for at in range(8, 24, 4))
        return int.from_bytes(stream[40:42], "big"), bottom - top, right - left
    if stream[:2] != _SOI:
        return None
    at = 2
    while at + 10 <= len(stream) and stream[at] == 0xFF:
        marker = stream[at + 1]
        if marker in _JPEG_FRAMES:
            rows, columns = (int.from_bytes(stream[begin : begin + 2], "big") for begin in (at + 5, at + 7))
            return stream[at + 9], rows, columns
        if marker == 0xFF:  # fill
            at += 1
        elif marker in _ALONE:
            at += 2
        else:
            at += 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
    return None


def _inside(file: bytes) -> bytes:
    """Return the codestream of a JP2 file (T.800, I.4), which some writers put where the stream alone should be."""
    at = 0
    while at + 16 <= len(file):
        length, kind, header = int.from_bytes(file[at : at + 4], "big"), file[at + 4 : at + 8], 8
        if length == 1:
            length, header = int.from_bytes(file[at + 8 : at + 16], "big"), 16
        if kind == b"jp2c":
            return file[at + header :]
        if length < header:
            break
        at += length
    return b""
