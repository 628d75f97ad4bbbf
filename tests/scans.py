"""NIfTI scans that many tests use: made, damaged, and compared."""

import gzip
from pathlib import Path

import nibabel
import numpy as np

SHAPE = (7, 9, 11)
"""Of the volumes of noise, voxels."""


def noise(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def oblique(spacing=(0.9, 1.1, 2.5), angles=(0.2, -0.15, 0.1), origin=(-3.0, 5.0, 7.0)):
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) @ np.diag(spacing)
    affine[:3, 3] = origin
    return affine


def rotation(angles):
    turned = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = [k for k in range(3) if k != axis]
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        turned = turned @ step
    return turned


def blob(shape=(14, 12, 10)) -> np.ndarray:
    """A bright ellipsoid off the centre, different along every axis, on black."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    inside = (((grid - np.array([0.1, -0.05, 0.08])[:, None, None, None]) * 1.3) ** 2).sum(axis=0) < 1
    return inside * (600 + 200 * grid[0] - 150 * grid[1] + 100 * grid[2])


def write(path: Path, data: np.ndarray | None = None, affine: np.ndarray | None = None, **header: object) -> Path:
    image = nibabel.Nifti1Image(
        blob().astype(np.float32) if data is None else data, np.eye(4) if affine is None else affine
    )
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def image_of(content: bytes) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(content))


def same_image(first: nibabel.Nifti1Image, second: nibabel.Nifti1Image) -> None:
    assert first.shape == second.shape
    np.testing.assert_array_equal(first.affine, second.affine)
    for name in ("qform_code", "sform_code", "xyzt_units", "pixdim", "descrip"):
        np.testing.assert_array_equal(first.header[name], second.header[name], err_msg=name)
    a, b = first.get_fdata(), second.get_fdata()
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4 * np.ptp(b))


def nifti_bytes(data, affine=None, change=lambda header: None):
    image = nibabel.Nifti1Image(data, np.eye(4) if affine is None else affine)
    raw = bytearray(image.to_bytes())
    header = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
    change(header)
    raw[:348] = header.binaryblock
    return bytes(raw)


def with_voxel(value):
    data = noise()
    data[1, 2, 3] = value
    return nifti_bytes(data)


def with_header(**fields):
    def change(header):
        for name, value in fields.items():
            header[name] = value

    return nifti_bytes(noise(), change=change)


RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
BAD = {
    "empty": (b"", "empty"),
    "text": (b"patient,age\n" * 100, "not a NIfTI"),
    "short": (b"abc", "not a NIfTI"),
    "pair": (with_header(magic=b"ni1"), "single-file"),
    "truncated": (nifti_bytes(noise())[:-1], "truncated"),
    "header-only": (nifti_bytes(noise())[:348], "truncated"),
    "2d": (nifti_bytes(noise((8, 9))), "2D"),
    "one-slice": (nifti_bytes(noise((8, 9, 1))), "2D"),
    "4d": (nifti_bytes(noise((4, 5, 6, 3))), "4D"),
    "5d": (nifti_bytes(noise((4, 5, 6, 1, 3))), "5x6x1x3"),
    "negative-size": (with_header(dim=[3, -7, 9, 11, 1, 1, 1, 1]), "makes no sense"),
    "too-many-axes": (with_header(dim=[9, 7, 9, 11, 1, 1, 1, 1]), "makes no sense"),
    "too-large": (with_header(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]), "limit"),
    "complex": (nifti_bytes(noise().astype(np.complex64)), "complex"),
    "rgb": (nifti_bytes(np.zeros(SHAPE, RGB)), "RGB"),
    "unknown-type": (with_header(datatype=12345), "voxel type"),
    "zero": (nifti_bytes(np.zeros(SHAPE, np.int16)), "zero"),
    "constant": (nifti_bytes(np.full(SHAPE, 7, np.int16)), "constant"),
    "nan": (with_voxel(np.nan), "1 of 693 voxels are NaN inside the patient, wanted finite numbers there"),
    "inf": (with_voxel(-np.inf), "1 of 693 voxels are infinite"),
    "overflow": (nifti_bytes(noise().astype(np.float64) * 1e300), "voxels are infinite"),
    "bad-slope": (with_header(scl_slope=2, scl_inter=np.inf), "scale factors"),
    "singular": (nifti_bytes(noise(), change=lambda h: h.set_sform(np.diag([1, 1, 0, 1]), code=1)), "singular"),
    "flat": (
        nifti_bytes(noise(), change=lambda h: h.set_sform([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], 1)),
        "singular",
    ),
    "nan-affine": (with_header(sform_code=1, srow_x=[np.nan, 0, 0, 0]), "singular"),
    "voxels-inside-header": (with_header(vox_offset=10), "damaged"),
    "voxels-far-away": (with_header(vox_offset=1e9), "damaged"),
}
"""Name -> the bytes of a file that is refused, and words of the reason."""
