"""Simulated multi-contrast subjects: real BraTS 2021 and IXI trees for the tests and the demo, and heads to train on.

Anatomy: phantom_anatomy.py. Signal: phantom_physics.py. Heads: phantom_heads.py. Here: the scanners' grids, and the
files.
World coordinates are RAS+ in mm; arrays are X Y Z in the scanner's own axes.
"""

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from aldm.data.modalities import MODALITIES
from aldm.data.parallel import ProcessWorkers
from aldm.data.phantom_anatomy import Array, Grid, Head, SimulatedVolume, SmoothField, Tissues, rotation
from aldm.data.phantom_heads import canvas_step_mm, simulate_head
from aldm.data.phantom_physics import Tissue, coil_profile, magnitude, rician, tissues_of_subject
from aldm.errors import UserError
from aldm.files import atomic_folder, check_folder

PHANTOM_LAYOUTS = ("brats", "ixi", "heads")
MODALITIES_OF_LAYOUT = {"brats": ("t1", "t1ce", "t2", "flair"), "ixi": ("t1", "t2", "pd"), "heads": MODALITIES}
MARKER = "phantom.json"
_IXI_SITES = ("Guys", "HH", "IOP")


# ------------------------------------------------------------------------------------------------------------ scans


def simulate_subject(seed: int, index: int, layout: str, spacing_mm: float) -> dict[str, SimulatedVolume]:
    """Simulate one subject: its modalities, `seg` for brats and for heads with a lesion, and for brats `tissue`.

    Args:
        seed, index: together they fix the subject; index counts from 0.
        layout: brats (one L P S grid of 240 x 240 x 155 mm, exactly zero outside the brain, a lesion) or ixi (T1 on a
            sagittal P S R grid of 240 x 240 x 180 mm, T2 and PD on an axial L A S grid of 240 x 240 x 162.5 mm, both
            turned by up to 5 degrees an axis, noise in the background, no lesion), or heads (whole or skull-stripped,
            all modalities, grids and sequences at random: phantom_heads.py).
        spacing_mm: voxel size, 0.5 to 16 mm. For ixi that is the size in the slice, and slices are thicker by IXI's
            own ratios, 1.28 (T1) and 1.333 (T2, PD): 0.9375 gives IXI's 256 x 256 x 150 and 256 x 256 x 130 voxels. For
            heads it is the smallest side that a voxel may have.

    Raises:
        UserError: an argument out of range.
    """
    check_arguments(layout, index + 1, seed, spacing_mm)
    if layout == "heads":
        return simulate_head(seed, index, spacing_mm)
    streams = np.random.SeedSequence([seed, index, PHANTOM_LAYOUTS.index(layout)]).spawn(4)
    shape, lesion, chemistry, scanner = (np.random.default_rng(stream) for stream in streams)
    head = Head(shape, lesion if layout == "brats" else None)
    subject = _Scanned(head, tissues_of_subject(chemistry), [SmoothField(chemistry, 20.0) for _ in range(3)], scanner)
    return _brats_session(subject, spacing_mm) if layout == "brats" else _ixi_session(subject, spacing_mm)


@dataclass(frozen=True, eq=False)
class _Scanned:
    """A subject in a scanner."""

    head: Head
    tissues: dict[str, Tissue]
    texture: list[SmoothField]
    scanner: np.random.Generator


def _brats_session(subject: _Scanned, spacing_mm: float) -> dict[str, SimulatedVolume]:
    noise = subject.scanner.uniform(0.012, 0.025)
    grid = brats_grid(spacing_mm)
    tissues = subject.head.tissues_on(grid)
    brain = tissues.voxels[tissues.fractions.sum(axis=0) >= 0.5]
    result = {}
    for modality, signal in _signals(subject, tissues, MODALITIES_OF_LAYOUT["brats"]).items():
        bright = float(np.percentile(signal, 99))
        scan = np.zeros(grid.shape, np.float32)
        scan.reshape(-1)[tissues.voxels] = rician(signal, noise * bright, subject.scanner)
        scan *= subject.scanner.uniform(600, 1200) / bright
        stripped = np.zeros(grid.shape, np.int16)
        stripped.reshape(-1)[brain] = np.maximum(np.rint(scan.reshape(-1)[brain]), 1)  # zero means outside
        result[modality] = SimulatedVolume(stripped, grid.affine)
    seg = np.zeros(grid.shape, np.uint8)
    seg.reshape(-1)[tissues.voxels] = tissues.labels
    return {
        **result,
        "seg": SimulatedVolume(seg, grid.affine),
        "tissue": SimulatedVolume(_tissue_map(tissues, grid), grid.affine),
    }


def _tissue_map(tissues: Tissues, grid: Grid) -> Array:
    """Return the largest healthy part of every voxel of the brain, 1 CSF, 2 grey, 3 white matter; 0 in the lesion."""
    numbers = np.array([2, 3, 1], np.uint8)[tissues.fractions[:3].argmax(axis=0)]
    healthy = (tissues.fractions.sum(axis=0) >= 0.5) & (tissues.labels == 0)
    result = np.zeros(grid.shape, np.uint8)
    result.reshape(-1)[tissues.voxels] = np.where(healthy, numbers, 0)
    return result


def _ixi_session(subject: _Scanned, spacing_mm: float) -> dict[str, SimulatedVolume]:
    noise = subject.scanner.uniform(0.012, 0.025)
    head_mm = subject.scanner.normal(0, 8, 3)
    result = {}
    for modalities, axes, extent_mm, thickness in (
        (("t1",), "PSR", (240, 240, 180), 1.28),
        (("t2", "pd"), "LAS", (240, 240, 162.5), 4 / 3),
    ):
        spacing = spacing_mm * np.array([1, 1, thickness])
        grid = oblique_grid(axes, extent_mm, spacing, head_mm, subject.scanner)
        tissues = subject.head.tissues_on(grid)
        for modality, signal in _signals(subject, tissues, modalities).items():
            bright = float(np.percentile(signal, 99))
            scan = np.zeros(grid.shape, np.float32)
            scan.reshape(-1)[tissues.voxels] = signal
            scan = rician(scan, noise * bright, subject.scanner)
            scan *= subject.scanner.uniform(600, 1200) / bright
            result[modality] = SimulatedVolume(np.rint(scan).astype(np.int16), grid.affine)
    return result


def _signals(subject: _Scanned, tissues: Tissues, modalities: tuple[str, ...]) -> dict[str, Array]:
    """Return the noise-free signal (N,) of each modality, coil included."""
    factors = [field(tissues.head_mm) for field in subject.texture]
    density, t1, t2 = (np.exp(s * factor) for s, factor in zip((0.02, 0.05, 0.05), factors, strict=True))
    result = {}
    for modality in modalities:
        signal = magnitude(modality, tissues.fractions, subject.tissues, (density, t1, t2))
        result[modality] = signal * coil_profile(tissues.head_mm, subject.scanner).astype(np.float32)
    return result


# ------------------------------------------------------------------------------------------------------------ grids


def brats_grid(spacing_mm: float) -> Grid:
    """BraTS's grid: 240 x 240 x 155 mm, axes L P S, the head in the middle; 1 mm gives its 240 x 240 x 155 voxels."""
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = 0.5 - spacing_mm / 2, 239.5 - spacing_mm / 2, spacing_mm / 2 - 0.5
    return Grid(_voxels((240, 240, 155), np.full(3, spacing_mm)), affine, np.array([-119.5, 119.5, 77.0]))


def oblique_grid(
    axes: str, extent_mm: tuple[float, float, float], spacing_mm: Array, head_mm: Array, generator: np.random.Generator
) -> Grid:
    """A grid with those axis codes, turned by up to 5 degrees an axis, its middle within millimetres of the head's."""
    from nibabel.orientations import axcodes2ornt

    shape = _voxels(extent_mm, spacing_mm)
    directions = np.zeros((3, 3))
    for column, (row, sign) in enumerate(axcodes2ornt(tuple(axes))):
        directions[int(row), column] = sign
    affine = np.eye(4)
    affine[:3, :3] = rotation(np.deg2rad(generator.uniform(-5, 5, 3))) @ directions @ np.diag(spacing_mm)
    affine[:3, 3] = head_mm + generator.normal(0, 2, 3) - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return Grid(shape, affine, head_mm)


def _voxels(extent_mm: tuple[float, float, float], spacing_mm: Array) -> tuple[int, int, int]:
    x, y, z = (max(1, round(float(n))) for n in np.array(extent_mm) / spacing_mm)
    return x, y, z


# ------------------------------------------------------------------------------------------------------------ files


def subject_name(layout: str, index: int) -> str:
    """Name of a subject as the data set writes it: BraTS2021_00000, IXI002-Guys-0828; of a head: Head_00000."""
    if layout != "ixi":
        return f"{'BraTS2021' if layout == 'brats' else 'Head'}_{index:05d}"
    return f"IXI{index + 2:03d}-{_IXI_SITES[index % 3]}-{(828 + 471 * index) % 10000:04d}"


def volume_path(layout: str, subject_id: str, modality: str) -> Path:
    """Where the data set's tree keeps a volume, relative to its root."""
    if layout != "ixi":
        return Path(subject_id) / f"{subject_id}_{modality}.nii.gz"
    return Path(f"IXI-{modality.upper()}") / f"{subject_id}-{modality.upper()}.nii.gz"


def write_phantom(
    out: str | Path,
    layout: str,
    num_subjects: int,
    seed: int,
    spacing_mm: float,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    overwrite: bool = False,
    num_processes: int = 1,
) -> list[str]:
    """Write simulated subjects as a tree of the data set's own layout and return their names.

    The tree appears whole or not at all. (seed, index) fixes a subject's bytes, so a larger set contains a smaller one,
    and the number of processes does not matter. Heads are named like BraTS, and `prepare` takes them as layout brats.

    Args:
        out: folder to make.
        layout, seed, spacing_mm: as in `simulate_subject`.
        num_subjects: how many, from index 0.
        on_progress: called with (subjects done, subjects in all).
        overwrite: replace a tree that an earlier call wrote.
        num_processes: how many subjects are made at a time.

    Raises:
        UserError: an argument out of range, or `out` cannot be written or holds something else.
    """
    check_arguments(layout, num_subjects, seed, spacing_mm)
    names = [subject_name(layout, index) for index in range(num_subjects)]
    if num_processes < 1:
        raise UserError(f"`num_processes` is {num_processes}, wanted at least 1")
    with atomic_folder(out, overwrite, marker=MARKER) as folder, ProcessWorkers(num_processes) as workers:
        write = partial(_write_subject, folder=folder, layout=layout, seed=seed, spacing_mm=spacing_mm)
        written = workers.map(write, range(num_subjects), description="phantom", unit="subject")
        for done, _ in enumerate(written, 1):
            if on_progress is not None:
                on_progress(done, num_subjects)
        about = {
            "simulated": True,
            "layout": layout,
            "num_subjects": num_subjects,
            "seed": seed,
            "spacing_mm": spacing_mm,
        }
        (folder / MARKER).write_text(json.dumps(about, indent=2) + "\n")
    return names


def _write_subject(index: int, *, folder: Path, layout: str, seed: int, spacing_mm: float) -> int:
    """Write a subject's files below a folder and return its index."""
    name = subject_name(layout, index)
    for modality, volume in simulate_subject(seed, index, layout, spacing_mm).items():
        _write_nifti(folder / volume_path(layout, name, modality), volume)
    return index


def check_arguments(layout: str, num_subjects: int, seed: int, spacing_mm: float) -> None:
    """Raise UserError unless `write_phantom` takes these."""
    if layout not in PHANTOM_LAYOUTS:
        raise UserError(f"layout is {layout!r}, wanted one of: {', '.join(PHANTOM_LAYOUTS)}")
    most = 99_999 if layout == "heads" else 998  # IXI numbers its subjects with three digits, from 002
    if not 1 <= num_subjects <= most:
        raise UserError(f"number of subjects is {num_subjects}, wanted 1 to {most}")
    if seed < 0:
        raise UserError(f"seed is {seed}, wanted 0 or more")
    if not 0.5 <= spacing_mm <= 16:
        raise UserError(f"spacing is {spacing_mm} mm, wanted 0.5 to 16")


def expected_memory_gib(layout: str, spacing_mm: float) -> float:
    """Peak memory of `aldm phantom`, GiB: the program with the template, and bytes a voxel.

    Measured at 2 and 1 mm, GB resident: 0.53 and 1.08 with the layout brats, 0.53 and 1.13 with ixi, 0.88 and 1.46
    with heads.
    """
    if layout == "heads":
        return 0.36 + 76 * 210 * 264 * 264 / canvas_step_mm(spacing_mm) ** 3 / 2**30
    slab_mm = 155 if layout == "brats" else 180 / 1.28
    return 0.43 + 84 * 240 * 240 * slab_mm / spacing_mm**3 / 2**30


def check_output(out: str | Path, *, overwrite: bool) -> None:
    """Raise UserError unless `write_phantom` could write there."""
    check_folder(out, overwrite, marker=MARKER)


def _write_nifti(path: Path, volume: SimulatedVolume) -> None:
    """Write .nii.gz bytes that depend on the volume alone (gzip's time stamp is 0, its file name empty)."""
    import nibabel

    image = nibabel.Nifti1Image(volume.data, volume.affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(volume.affine, 1)
    image.set_sform(volume.affine, 1)
    image.header["descrip"] = b"simulated by aldm phantom"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=4, mtime=0))
