"""Simulated multi-contrast subjects, written as real BraTS 2021 and IXI trees: the data of the tests and of the demo.

Anatomy: the ICBM152 grey and white matter maps that nilearn ships (1 mm, non-linear symmetric 2009a), seen through a
random affine map and a smooth random warp. Signal: phantom_physics.py, with partial volumes, over tissue parameters
that vary between subjects and, slowly, inside one. World coordinates are RAS+ in mm, arrays X Y Z in the scanner's axes.
"""

import gzip
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from aldm.data.phantom_physics import CONTRAST_T1_FACTOR, SEQUENCES, TISSUES, Array, Tissue, rician
from aldm.errors import UserError

LAYOUTS = ("brats", "ixi")
HEALTHY = ("grey", "white", "csf")
SEG_LABELS = {"necrosis": 1, "edema": 2, "enhancing": 4}
MARKER = "phantom.json"
_LATTICE_MM = 8.0
_HALF_EXTENT_MM = 136.0


@dataclass(frozen=True)
class SimulatedVolume:
    """One acquired volume as a scanner would store it.

    data: int16 intensities, or uint8 labels for `seg`, in the scanner's axis order.
    affine: 4 x 4 float64, voxel to world (RAS+, mm).
    """

    data: Array
    affine: Array


@dataclass(frozen=True)
class _Grid:
    """Where one acquisition lies: voxels, affine, and the world position of the middle of the head, mm."""

    shape: tuple[int, int, int]
    affine: Array
    head_mm: Array

    @property
    def spacing_mm(self) -> Array:
        return np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))


# ---------------------------------------------------------------------------------------------------------- anatomy
@lru_cache(maxsize=1)
def _template() -> tuple[Array, Array]:
    """Return (fractions (3, X, Y, Z) of grey, white, csf in [0, 1]; world coordinates of voxel 0) of ICBM152 at 1 mm.

    The maps are averages over many heads; squaring and renormalising sharpens them towards one head's.
    """
    import nibabel

    spec = importlib.util.find_spec("nilearn")
    assert spec is not None, "nilearn is a dependency"
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "datasets" / "data"
    images = {
        key: nibabel.load(folder / f"mni_icbm152_{key}_tal_nlin_sym_09a_converted.nii.gz") for key in ("gm", "wm", "t1")
    }
    grey, white = (np.asanyarray(images[key].dataobj).astype(np.float32) / 255 for key in ("gm", "wm"))
    brain = np.asanyarray(images["t1"].dataobj) > 0
    fractions = np.stack([grey, white, np.clip(1 - grey - white, 0, 1)]) ** 2
    fractions *= brain / np.maximum(fractions.sum(axis=0), 1e-6)
    keep = [np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    low = [max(int(k[0]) - 4, 0) for k in keep]
    high = [int(k[-1]) + 5 for k in keep]
    box = tuple(slice(start, stop) for start, stop in zip(low, high, strict=True))
    origin = images["gm"].affine[:3, 3] + np.array(low)
    return np.ascontiguousarray(fractions[(slice(None), *box)]), origin


@lru_cache(maxsize=4)
def _antialiased(spacing_ras_mm: tuple[float, float, float]) -> tuple[Array, Array]:
    """Return the template blurred to what a voxel of that size sees (full width at half maximum = the voxel)."""
    from scipy.ndimage import gaussian_filter

    fractions, origin = _template()
    sigma = [0.425 * spacing if spacing > 1.25 else 0.0 for spacing in spacing_ras_mm]
    return np.stack([gaussian_filter(channel, sigma) for channel in fractions]), origin


class _SmoothField:
    """A smooth random function of the position in the head, of unit variance: cubic through Gaussian knots."""

    def __init__(self, generator: np.random.Generator, knot_mm: float) -> None:
        from scipy.ndimage import map_coordinates

        knots = generator.standard_normal((int(2 * _HALF_EXTENT_MM / knot_mm) + 4,) * 3)
        steps = np.arange(-_HALF_EXTENT_MM, _HALF_EXTENT_MM + 1, _LATTICE_MM)
        axis = (steps + _HALF_EXTENT_MM) / knot_mm + 1
        lattice = map_coordinates(knots, np.meshgrid(axis, axis, axis, indexing="ij"), order=3)
        self._lattice = (lattice / lattice.std()).astype(np.float32)

    def __call__(self, head: Array) -> Array:
        """Value at positions `head` (3, ...), mm from the middle of the head."""
        from scipy.ndimage import map_coordinates

        coordinates = (head + _HALF_EXTENT_MM) / _LATTICE_MM
        return map_coordinates(self._lattice, coordinates, order=1, mode="nearest")


def _rotation(angles: Array) -> Array:
    """Rotation by `angles` (radians) about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        first, second = [k for k in range(3) if k != axis]
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


class _Lesion:
    """A ring-enhancing lesion: necrotic core, enhancing rim, edema in the white matter around it."""

    def __init__(self, generator: np.random.Generator) -> None:
        side = generator.choice([-1.0, 1.0])
        self._centre = np.array([side * generator.uniform(20, 42), generator.uniform(-50, 38), generator.uniform(-8, 38)])
        radii = generator.uniform(10, 19) * np.exp(generator.normal(0, 0.12, 3))
        self._to_unit = np.diag(1 / radii) @ _rotation(generator.uniform(-np.pi, np.pi, 3))
        self._radius = float(radii.mean())
        self._rim = generator.uniform(0.45, 0.7)
        self._edema = generator.uniform(1.6, 2.3)
        self._wobble = _SmoothField(generator, 18.0)

    def fractions(self, template_mm: Array, healthy: Array, blur_mm: float) -> tuple[Array, Array]:
        """Return (fractions (6, N) of all tissues, labels (N,) as BraTS numbers them).

        Args:
            template_mm: (3, N) positions in the template's world, mm.
            healthy: (3, N) fractions of grey, white and csf without the lesion.
            blur_mm: width over which a border is mixed, mm.
        """
        offset = template_mm - self._centre[:, None]
        distance = np.sqrt(((self._to_unit @ offset) ** 2).sum(axis=0)) + 0.12 * self._wobble(template_mm)
        width = 0.5 * blur_mm / self._radius

        def inside(limit: float) -> Array:
            return 1 / (1 + np.exp(np.clip((distance - limit) / width, -30, 30)))

        brain = healthy.sum(axis=0)
        core, necrosis = inside(1.0) * brain, inside(self._rim) * brain
        edema = np.clip(inside(self._edema) * (healthy[1] + 0.35 * healthy[0]) - core, 0, None)
        rest = healthy.copy()
        rest[1] = np.clip(rest[1] - edema * 0.85, 0, None)
        rest *= np.clip(brain - core - edema, 0, None) / np.maximum(rest.sum(axis=0), 1e-6)
        parts = np.stack([*rest, necrosis, edema, core - necrosis])
        labels = np.zeros(brain.shape, np.uint8)
        labels[parts[4] > 0.5 * brain] = SEG_LABELS["edema"]
        labels[core > 0.5 * brain] = SEG_LABELS["enhancing"]
        labels[necrosis > 0.5 * brain] = SEG_LABELS["necrosis"]
        labels[brain < 0.5] = 0
        return parts, labels


class _Subject:
    """One head: its shape, its tissues, and what fills every voxel of a grid. The same at every spacing."""

    def __init__(self, seed: int, index: int, layout: str) -> None:
        streams = np.random.SeedSequence([seed, index, LAYOUTS.index(layout)]).spawn(4)
        shape, tissue, lesion, scanner = (np.random.default_rng(stream) for stream in streams)
        scale = np.exp(shape.normal(0, 0.04, 3)) * np.exp(shape.normal(0, 0.03))
        shear = np.eye(3)
        shear[np.triu_indices(3, 1)] = shape.normal(0, 0.03, 3)
        self._matrix = _rotation(np.deg2rad(shape.normal(0, 4, 3))) @ np.diag(1 / scale) @ shear
        self._shift = np.array([0.0, -19.0, 6.0]) + shape.normal(0, 3, 3)
        self._warp = [(_SmoothField(shape, 34.0), 3.2), (_SmoothField(shape, 34.0), 3.2), (_SmoothField(shape, 34.0), 3.2)]
        self._proportions = np.exp(shape.normal(0, 0.22, 3))
        self._tissues = {name: _varied(value, tissue) for name, value in TISSUES.items()}
        self._texture = [_SmoothField(tissue, 20.0) for _ in range(3)]
        self._lesion = _Lesion(lesion) if layout == "brats" else None
        self.scanner = scanner

    def tissues_at(self, grid: _Grid) -> tuple[Array, Array, Array, Array]:
        """Return (flat voxel numbers (N,), positions (3, N) mm from the head's middle, fractions (T, N), labels (N,)).

        Only voxels with some brain in them are listed.
        """
        from scipy.ndimage import map_coordinates

        to_ras = np.abs(grid.affine[:3, :3]) @ np.ones(3)
        maps, origin = _antialiased(tuple(float(round(value, 3)) for value in to_ras))
        voxels, head = _head_voxels(grid)
        template = self._matrix @ head + self._shift[:, None]
        for axis, (field, amplitude_mm) in enumerate(self._warp):
            template[axis] += amplitude_mm * field(head)
        coordinates = (template - origin[:, None]).astype(np.float32)
        healthy = np.stack([map_coordinates(channel, coordinates, order=1, output=np.float32) for channel in maps])
        kept = healthy.sum(axis=0) > 0.02
        voxels, head, template, healthy = voxels[kept], head[:, kept], template[:, kept], healthy[:, kept]
        brain = healthy.sum(axis=0)
        healthy *= self._proportions[:, None]
        healthy *= brain / healthy.sum(axis=0)
        if self._lesion is None:
            return voxels, head, healthy, np.zeros(len(voxels), np.uint8)
        parts, labels = self._lesion.fractions(template, healthy, max(1.5, float(grid.spacing_mm.max())))
        return voxels, head, parts, labels

    def signal(self, modality: str, head: Array, fractions: Array) -> Array:
        """Noise-free magnitude at the voxels (N,): partial volumes add up before the magnitude is taken."""
        texture = [np.exp(0.05 * field(head)) for field in self._texture]
        total = np.zeros(head.shape[1])
        for (name, tissue), fraction in zip(self._tissues.items(), fractions, strict=False):
            t1 = tissue.t1_ms * (CONTRAST_T1_FACTOR.get(name, 1.0) if modality == "t1ce" else 1.0)
            local = Tissue(tissue.proton_density * texture[0] ** 0.5, t1 * texture[1], tissue.t2_ms * texture[2])
            total += fraction * SEQUENCES[modality].signal(local)
        return np.abs(total)


def _varied(tissue: Tissue, generator: np.random.Generator) -> Tissue:
    """The tissue as one subject has it: proton density within 2 %, T1 and T2 within 5 % (standard deviations)."""
    density, t1, t2 = np.exp(generator.normal(0, (0.02, 0.05, 0.05)))
    return Tissue(tissue.proton_density * density, tissue.t1_ms * t1, tissue.t2_ms * t2)


def _head_voxels(grid: _Grid) -> tuple[Array, Array]:
    """Return (flat voxel numbers, positions (3, N) mm from the head's middle) within reach of a brain."""
    reach = np.array([90.0, 112.0, 92.0])
    index = np.indices(grid.shape, dtype=np.float32).reshape(3, -1)
    head = (grid.affine[:3, :3] @ index) + (grid.affine[:3, 3] - grid.head_mm)[:, None]
    near = np.flatnonzero((np.abs(head) < reach[:, None]).all(axis=0))
    return near, head[:, near]


# ------------------------------------------------------------------------------------------------------------ scans
def _brats_grid(spacing_mm: float) -> _Grid:
    """BraTS's grid: 240 x 240 x 155 mm, axes L P S, the brain in the middle."""
    extent = np.array([240.0, 240.0, 155.0])
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])
    affine[:3, 3] = 0.5 - spacing_mm / 2, 239.5 - spacing_mm / 2, spacing_mm / 2 - 0.5
    shape = tuple(int(n) for n in np.maximum(np.round(extent / spacing_mm), 1))
    return _Grid(shape, affine, np.array([-119.5, 119.5, 77.0]))  # type: ignore[arg-type]


def _ixi_grid(codes: str, extent_mm: tuple[float, ...], spacing_mm: Array, scanner: np.random.Generator) -> _Grid:
    """A grid with those axis codes, turned by a few degrees, whose middle lies near the head's."""
    from nibabel.orientations import axcodes2ornt

    shape = np.maximum(np.round(np.array(extent_mm) / spacing_mm), 1)
    axes = np.zeros((3, 3))
    for column, (row, flip) in enumerate(axcodes2ornt(tuple(codes))):
        axes[int(row), column] = flip
    matrix = _rotation(np.deg2rad(scanner.uniform(-5, 5, 3))) @ axes @ np.diag(spacing_mm)
    head = scanner.normal(0, 8, 3)
    affine = np.eye(4)
    affine[:3, :3] = matrix
    affine[:3, 3] = head + scanner.normal(0, 2, 3) - matrix @ (shape - 1) / 2
    return _Grid(tuple(int(n) for n in shape), affine, head)  # type: ignore[arg-type]


def _scan(subject: _Subject, modality: str, grid: _Grid, anatomy: tuple[Array, ...], noise: float) -> Array:
    """Return the whole scan (float32, arbitrary units): signal, coil, noise."""
    voxels, head, fractions, _ = anatomy
    scanner = subject.scanner
    coil = scanner.normal(0, 1, 9)
    signal = subject.signal(modality, head, fractions)
    x, y, z = head / 100
    bias = np.stack([x, y, z, x * y, x * z, y * z, x * x, y * y, z * z])
    signal *= np.exp(0.10 * coil @ bias)
    bright = float(np.percentile(signal, 99))
    scan = np.zeros(grid.shape, np.float32)
    scan.reshape(-1)[voxels] = signal
    gain = scanner.uniform(600, 1200) / bright
    return rician(scan, noise * bright, scanner) * gain


def simulate_subject(seed: int, index: int, layout: str, spacing_mm: float) -> dict[str, SimulatedVolume]:
    """Simulate one subject: its modalities and, for brats, `seg`.

    Args:
        seed: seed of the whole set.
        index: number of the subject, from 0; the pair (seed, index) fixes the subject.
        layout: brats (one grid, zero outside the brain, lesion) or ixi (two grids, noisy background).
        spacing_mm: voxel size; for ixi the size in the slice, slices are 1.28 (T1) and 1.33 (T2, PD) times as thick.

    Raises:
        UserError: unknown layout, a voxel size out of [0.5, 16] mm, a negative seed.
    """
    _check(layout, spacing_mm, seed)
    subject = _Subject(seed, index, layout)
    noise = subject.scanner.uniform(0.012, 0.025)
    if layout == "ixi":
        sagittal = _ixi_grid("PSR", (240, 240, 180), spacing_mm * np.array([1, 1, 1.28]), subject.scanner)
        axial = replace(
            _ixi_grid("LAS", (240, 240, 162.5), spacing_mm * np.array([1, 1, 4 / 3]), subject.scanner),
        )
        axial = _recentred(axial, sagittal.head_mm)
        result = {}
        for grid, names in ((sagittal, ("t1",)), (axial, ("t2", "pd"))):
            anatomy = subject.tissues_at(grid)
            for name in names:
                scan = _scan(subject, name, grid, anatomy, noise)
                result[name] = SimulatedVolume(np.round(scan).astype(np.int16), grid.affine)
        return result
    grid = _brats_grid(spacing_mm)
    anatomy = subject.tissues_at(grid)
    outside = np.ones(grid.shape, bool)
    outside.reshape(-1)[anatomy[0][anatomy[2].sum(axis=0) >= 0.5]] = False
    result = {}
    for name in ("t1", "t1ce", "t2", "flair"):
        scan = np.maximum(np.round(_scan(subject, name, grid, anatomy, noise)), 1)
        scan[outside] = 0
        result[name] = SimulatedVolume(scan.astype(np.int16), grid.affine)
    seg = np.zeros(grid.shape, np.uint8)
    seg.reshape(-1)[anatomy[0]] = anatomy[3]
    result["seg"] = SimulatedVolume(seg, grid.affine)
    return result


def _recentred(grid: _Grid, head_mm: Array) -> _Grid:
    """The same grid moved so that it sees the head at `head_mm`."""
    affine = grid.affine.copy()
    affine[:3, 3] += head_mm - grid.head_mm
    return _Grid(grid.shape, affine, head_mm)


def _check(layout: str, spacing_mm: float, seed: int) -> None:
    if layout not in LAYOUTS:
        raise UserError(f"layout is {layout!r}, wanted one of: {', '.join(LAYOUTS)}")
    if not 0.5 <= spacing_mm <= 16:
        raise UserError(f"spacing is {spacing_mm} mm, wanted 0.5 to 16")
    if seed < 0:
        raise UserError(f"seed is {seed}, wanted 0 or more")


# ------------------------------------------------------------------------------------------------------------ files
def subject_name(layout: str, index: int) -> str:
    """Name of a subject as the data set writes it: BraTS2021_00000, IXI002-Guys-0828."""
    if layout == "brats":
        return f"BraTS2021_{index:05d}"
    return f"IXI{index + 2:03d}-{('Guys', 'HH', 'IOP')[index % 3]}-{(828 + 613 * index) % 10000:04d}"


def volume_path(layout: str, subject_id: str, modality: str) -> Path:
    """Where the data set's tree keeps a volume, relative to its root."""
    if layout == "brats":
        return Path(subject_id) / f"{subject_id}_{modality}.nii.gz"
    return Path(f"IXI-{modality.upper()}") / f"{subject_id}-{modality.upper()}.nii.gz"


def _write_nifti(path: Path, volume: SimulatedVolume) -> None:
    """Write .nii.gz whose bytes depend on the volume alone (no time stamp, no file name)."""
    import nibabel

    image = nibabel.Nifti1Image(volume.data, volume.affine)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(volume.affine, 1)
    image.set_sform(volume.affine, 1)
    image.header["descrip"] = b"simulated by aldm phantom"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=4, fileobj=raw, mtime=0) as stream:
        stream.write(image.to_bytes())


def write_phantom(
    out: str | Path,
    layout: str,
    num_subjects: int,
    seed: int,
    spacing_mm: float,
    on_progress: Callable[[int, int], None] | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write simulated subjects as a tree of the data set's own layout; return their names.

    The tree appears whole or not at all. (seed, index) fixes the bytes of a subject, so a larger set holds a smaller one.

    Args:
        out: folder to create.
        layout, seed, spacing_mm: as in `simulate_subject`.
        num_subjects: how many, from index 0.
        on_progress: called with (subjects done, subjects in all).
        overwrite: replace `out` if an earlier call wrote it.

    Raises:
        UserError: bad arguments, or `out` exists and may not be replaced.
    """
    _check(layout, spacing_mm, seed)
    if num_subjects < 1:
        raise UserError(f"num_subjects is {num_subjects}, wanted 1 or more")
    out = Path(out)
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already: choose another folder or pass --overwrite")
    if out.exists() and not (out / MARKER).is_file():
        raise UserError(f"{out} was not written by this command (no {MARKER} in it), so it is not replaced")
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        names = []
        for index in range(num_subjects):
            names.append(subject_name(layout, index))
            for modality, volume in simulate_subject(seed, index, layout, spacing_mm).items():
                _write_nifti(work / volume_path(layout, names[-1], modality), volume)
            if on_progress is not None:
                on_progress(index + 1, num_subjects)
        about = {"layout": layout, "num_subjects": num_subjects, "seed": seed, "spacing_mm": spacing_mm, "simulated": True}
        (work / MARKER).write_text(json.dumps(about, indent=2) + "\n")
        work.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return names
