"""The anatomy of the simulated subjects: what tissue fills every voxel of a scan.

The ICBM152 grey and white matter maps that nilearn ships (1 mm, non-linear symmetric 2009a), seen through a random
affine map and a smooth random warp, with a ring-enhancing lesion. World coordinates are RAS+ in mm; head coordinates
are the same less the middle of the head.
"""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

Array = np.ndarray

SEG_LABELS = {"necrosis": 1, "edema": 2, "enhancing": 4}
"""BraTS's label of each part of a lesion."""
TEMPLATE_MIDDLE_MM = np.array([0.0, -19.0, 6.0])
_REACH_MM = np.array([100.0, 126.0, 100.0])
"""Semi-axes of an ellipsoid around the head's middle that holds every brain."""
_LATTICE_MM = 8.0
_HALF_EXTENT_MM = 136.0


@dataclass(frozen=True, eq=False)
class SimulatedVolume:
    """A volume as the scanner stores it: int16 (uint8 for labels) in its own axes, affine voxel -> world RAS in mm."""

    data: Array
    affine: Array


@dataclass(frozen=True)
class Grid:
    """Where a scan lies: voxels, affine (voxel to world), and the world position of the middle of the head, mm."""

    shape: tuple[int, int, int]
    affine: Array
    head_mm: Array

    @property
    def spacing_ras_mm(self) -> tuple[float, float, float]:
        """Voxel size along the array axis nearest to each of the world axes R, A, S."""
        steps = np.linalg.norm(self.affine[:3, :3], axis=0)
        nearest = np.abs(self.affine[:3, :3] / steps).argmax(axis=1)
        r, a, s = (round(float(steps[axis]), 3) for axis in nearest)
        return r, a, s


@dataclass(frozen=True)
class Tissues:
    """What fills the voxels of one grid that hold some brain; N of them.

    voxels: (N,) positions in the flattened grid.
    head_mm: (3, N) head coordinates.
    fractions: (3 or 6, N) of grey, white, csf and then necrosis, edema, enhancing; their sum is the brain's share.
    labels: (N,) uint8 as BraTS numbers the lesion, 0 elsewhere.
    """

    voxels: Array
    head_mm: Array
    fractions: Array
    labels: Array


def icbm152_file(kind: str) -> Path:
    """Return the path of an ICBM152 map (1 mm, uint8) inside the installed nilearn: kind is gm, wm or t1."""
    spec = importlib.util.find_spec("nilearn")  # importing it would take seconds
    assert spec is not None, "nilearn is a dependency"
    assert spec.origin is not None, "nilearn is installed as files"
    return Path(spec.origin).parent / "datasets" / "data" / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"


@lru_cache(maxsize=1)
def template_fractions() -> tuple[Array, Array]:
    """Return (fractions (3, X, Y, Z) of grey, white, csf; world coordinates of voxel 0) of ICBM152 at 1 mm.

    The maps are averages over many heads; squaring and renormalising sharpens them towards one head's. What the maps
    leave of the brain is csf.
    """
    import nibabel

    images = {kind: nibabel.load(icbm152_file(kind)) for kind in ("gm", "wm", "t1")}
    grey, white = (np.asanyarray(images[key].dataobj).astype(np.float32) / 255 for key in ("gm", "wm"))
    brain = np.asanyarray(images["t1"].dataobj) > 0
    fractions = np.stack([grey, white, np.clip(1 - grey - white, 0, 1)]) ** 2
    fractions *= brain / np.maximum(fractions.sum(axis=0), 1e-6)
    occupied = [np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    low = [max(int(index[0]) - 4, 0) for index in occupied]
    box = tuple(slice(start, int(index[-1]) + 5) for start, index in zip(low, occupied, strict=True))
    return np.ascontiguousarray(fractions[(slice(None), *box)]), images["gm"].affine[:3, 3] + np.array(low)


@lru_cache(maxsize=8)
def _antialiased(spacing_ras_mm: tuple[float, float, float]) -> tuple[Array, Array, int]:
    """Return the template blurred to what a voxel of that size sees (full width at half maximum = the voxel).

    As (fractions (3, X, Y, Z), world coordinates of voxel 0, voxel size in mm): what is smooth is kept more coarsely.
    """
    from scipy.ndimage import gaussian_filter

    fractions, origin = template_fractions()
    sigma = [0.425 * spacing if spacing > 1.25 else 0.0 for spacing in spacing_ras_mm]
    step = max(1, int(min(spacing_ras_mm) / 2))
    blurred = [gaussian_filter(channel, sigma, truncate=3.0)[::step, ::step, ::step] for channel in fractions]
    return np.stack(blurred), origin, step


class SmoothField:
    """A smooth random function of head coordinates, of unit variance: cubic B-splines with Gaussian weights."""

    def __init__(self, generator: np.random.Generator, knot_mm: float) -> None:
        number = int(2 * _HALF_EXTENT_MM / knot_mm) + 4
        steps = np.arange(-_HALF_EXTENT_MM, _HALF_EXTENT_MM + 1, _LATTICE_MM)
        distance = np.abs((steps[:, None] + _HALF_EXTENT_MM) / knot_mm + 1 - np.arange(number))
        near, far = 2 / 3 - distance**2 + distance**3 / 2, np.clip(2 - distance, 0, None) ** 3 / 6
        basis = np.where(distance < 1, near, far)
        lattice = generator.standard_normal((number,) * 3)
        for _ in range(3):  # one axis at a time; einsum, unlike BLAS, adds in the same order with any number of threads
            lattice = np.einsum("xi,ijk->jkx", basis, lattice)
        self._lattice = (lattice / lattice.std()).astype(np.float32)

    def __call__(self, head_mm: Array) -> Array:
        """Values (N,) at positions (3, N), float32."""
        from scipy.ndimage import map_coordinates

        coordinates = (head_mm + _HALF_EXTENT_MM) / _LATTICE_MM
        return np.asarray(map_coordinates(self._lattice, coordinates, order=1, mode="nearest"))


def rotation(angles: Array) -> Array:
    """Rotation matrix by `angles` (radians) about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = (k for k in range(3) if k != axis)
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


class Lesion:
    """Necrotic core, enhancing rim, edema that spreads through the white matter; in template coordinates."""

    def __init__(self, generator: np.random.Generator) -> None:
        side = generator.choice([-1.0, 1.0])
        self._centre = np.array(
            [side * generator.uniform(20, 42), generator.uniform(-60, 38), generator.uniform(-8, 40)]
        )
        radii = generator.uniform(9, 18) * np.exp(generator.normal(0, 0.12, 3))
        self._to_unit = np.diag(1 / radii) @ rotation(generator.uniform(-np.pi, np.pi, 3))
        self._radius_mm = float(radii.mean())
        self._rim = generator.uniform(0.5, 0.75)
        self._edema = generator.uniform(1.5, 2.2)
        self._wobble = SmoothField(generator, 16.0)

    def __call__(self, template_mm: Array, healthy: Array, border_mm: float) -> tuple[Array, Array]:
        """Return (fractions (6, N), labels (N,)) with the lesion in.

        Args:
            template_mm: (3, N) positions in the template's world.
            healthy: (3, N) fractions of grey, white and csf without the lesion.
            border_mm: width over which a border is mixed.
        """
        wobble = self._wobble(template_mm)
        distance = np.sqrt(((self._to_unit @ (template_mm - self._centre[:, None])) ** 2).sum(axis=0))
        softness = 0.35 * border_mm / self._radius_mm

        def inside(limit: float, roughness: float) -> Array:
            return 1 / (1 + np.exp(np.clip((distance + roughness * wobble - limit) / softness, -30, 30)))

        core, necrosis = inside(1.0, 0.1), inside(self._rim, 0.15)
        swollen = inside(self._edema, 0.3) * (1 - core)
        taken = healthy * np.array([0.2, 0.9, 0.0])[:, None] * swollen  # edema follows the white matter
        brain = healthy.sum(axis=0)
        edema = taken.sum(axis=0)
        necrosis *= core
        parts = np.stack([*((healthy * (1 - core)) - taken), necrosis * brain, edema, (core - necrosis) * brain])
        np.maximum(parts, 0, out=parts)
        labels = np.zeros(brain.shape, np.uint8)
        labels[edema > 0.3 * brain] = SEG_LABELS["edema"]
        labels[core > 0.5] = SEG_LABELS["enhancing"]
        labels[necrosis > 0.5] = SEG_LABELS["necrosis"]
        labels[brain < 0.5] = 0
        return parts, labels


class Head:
    """One subject's anatomy, the same whatever grid looks at it.

    Standard deviations: rotation 4 degrees an axis, size 4 % an axis and 3 % in all, shear 0.03, shift 3 mm, warp
    3.2 mm with knots 34 mm apart, and 20 % in the proportions of grey, white and csf where they meet (thin cortex, wide
    sulci).
    """

    def __init__(self, shape: np.random.Generator, lesion: np.random.Generator | None) -> None:
        scale = np.exp(shape.normal(0, 0.04, 3)) * np.exp(shape.normal(0, 0.03))
        shear = np.eye(3)
        shear[np.triu_indices(3, 1)] = shape.normal(0, 0.03, 3)
        self._to_template = rotation(np.deg2rad(shape.normal(0, 4, 3))) @ np.diag(1 / scale) @ shear
        self._shift = TEMPLATE_MIDDLE_MM + shape.normal(0, 3, 3)
        self._warp = [SmoothField(shape, 34.0) for _ in range(3)]
        self._proportions = np.exp(shape.normal(0, 0.2, 3))
        self._lesion = None if lesion is None else Lesion(lesion)

    def tissues_on(self, grid: Grid) -> Tissues:
        """Return what fills the voxels of a grid."""
        from scipy.ndimage import map_coordinates

        spacing = grid.spacing_ras_mm
        maps, origin, step = _antialiased(spacing)
        voxels, head = _voxels_near_head(grid)
        template = self._to_template @ head + self._shift[:, None]
        for axis, field in enumerate(self._warp):
            template[axis] += 3.2 * field(head)
        coordinates = ((template - origin[:, None]) / step).astype(np.float32)
        healthy = np.stack([map_coordinates(channel, coordinates, order=1, output=np.float32) for channel in maps])
        kept = np.flatnonzero(healthy.sum(axis=0) > 0.02)
        voxels, head, healthy = voxels[kept], head[:, kept], healthy[:, kept].astype(np.float64)
        brain = healthy.sum(axis=0)
        healthy *= self._proportions[:, None]
        healthy *= brain / healthy.sum(axis=0)
        if self._lesion is None:
            return Tissues(voxels, head, healthy, np.zeros(len(voxels), np.uint8))
        return Tissues(voxels, head, *self._lesion(template[:, kept], healthy, max(1.5, *spacing)))


def _voxels_near_head(grid: Grid) -> tuple[Array, Array]:
    """Return (flat voxel numbers (N,), head coordinates (3, N) mm) of the voxels that a brain may reach."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) * _REACH_MM + grid.head_mm
    index = (corners - grid.affine[:3, 3]) @ np.linalg.inv(grid.affine[:3, :3]).T
    low = np.clip(np.floor(index.min(axis=0)), 0, grid.shape).astype(int)
    high = np.clip(np.ceil(index.max(axis=0)) + 1, 0, grid.shape).astype(int)
    ranges = np.meshgrid(*(np.arange(lo, hi) for lo, hi in zip(low, high, strict=True)), indexing="ij", sparse=True)
    voxels = np.ravel_multi_index(tuple(np.broadcast_arrays(*ranges)), grid.shape).ravel()
    head = np.empty((3, voxels.size))
    for row in range(3):
        position = sum(grid.affine[row, axis] * ranges[axis] for axis in range(3))
        head[row] = np.ravel(position + (grid.affine[row, 3] - grid.head_mm[row]))
    near = np.flatnonzero(((head / _REACH_MM[:, None]) ** 2).sum(axis=0) < 1)
    return voxels[near], head[:, near]
