"""Simulated heads for training: five modalities of a whole head or of a skull-stripped brain, on the scanner's grids.

Anatomy: phantom_head.py. Signal: phantom_sequences.py. Here: the session, its grids, the coil, noise and ghosts. World
coordinates are RAS+ in mm, head coordinates the same less the middle of the head; arrays are X Y Z of a file's axes.
"""

from dataclasses import dataclass

import numpy as np

from aldm.data.modalities import MODALITIES
from aldm.data.phantom_anatomy import TEMPLATE_MIDDLE_MM, Array, Grid, SimulatedVolume, SmoothField, rotation
from aldm.data.phantom_head import Anatomy, draw_head
from aldm.data.phantom_lesions import Lesions
from aldm.data.phantom_physics import rician
from aldm.data.phantom_sequences import FIELDS_T, Contrast, Subject, derivatives
from aldm.data.phantom_shapes import LOW_MM, Canvas, between
from aldm.data.volume import Volume, resample

_STRIPPED_SHARE = 1 / 3
_SIZE = np.array([0.94, 0.93, 0.89])
_COARSE_MM = 6.0
"""Positions in the template and the coil are computed so far apart; between, they are interpolated."""
_AXES = {"axial": ("LPS", "LAS", "RAS"), "sagittal": ("PSR", "PIR", "PSL"), "coronal": ("LSP", "LIP", "RSA")}
"""Axes of a file by the orientation of its slices; the last one goes from slice to slice."""


@dataclass(frozen=True, eq=False)
class Pose:
    """Where a head lies and how it differs from the template: head coordinates to the template's world."""

    matrix: Array
    shift: Array
    warps: tuple[tuple[float, list[SmoothField]], ...]

    @classmethod
    def draw(cls, generator: np.random.Generator, tilt_deg: float) -> "Pose":
        """Draw a pose.

        Standard deviations: turned by `tilt_deg` an axis, size 5 % an axis and 4 % in all around 94, 93 and 89 % of the
        template (which is larger and taller than most heads), shear 0.03, and two warps, 3 mm with knots 60 mm and 1.2
        mm with knots 22 mm apart.
        """
        scale = _SIZE * np.exp(generator.normal(0, 0.05, 3) + generator.normal(0, 0.04))
        shear = np.eye(3)
        shear[np.triu_indices(3, 1)] = generator.normal(0, 0.03, 3)
        turned = rotation(np.deg2rad(np.clip(generator.normal(0, tilt_deg, 3), -15, 15)))
        warps = tuple((mm, [SmoothField(generator, knot) for _ in range(3)]) for mm, knot in ((3.0, 60.0), (1.2, 22.0)))
        return cls(np.diag(1 / scale) @ shear @ turned, TEMPLATE_MIDDLE_MM, warps)

    def to_template(self, head_mm: Array) -> Array:
        """Return the template's coordinates (3, N) of head coordinates (3, N)."""
        result = self.matrix @ head_mm + self.shift[:, None]
        for size_mm, fields in self.warps:
            result += size_mm * np.stack([field(head_mm) for field in fields])
        return np.asarray(result)


@dataclass(frozen=True, eq=False)
class Session:
    """What all volumes of a subject share."""

    stripped: bool
    field_t: float
    pose: Pose
    head_mm: Array
    """World position of the middle of the head."""
    axes: Array
    """(3, 3) the scanner's R, A, S as the slices are laid, in the world."""
    low_mm: Array
    high_mm: Array
    """Corners of the field of view around the middle of the head, along `axes`."""
    coil: "Coil"

    @classmethod
    def draw(cls, generator: np.random.Generator) -> "Session":
        """Draw a session; a third of them are skull-stripped."""
        stripped = generator.uniform() < _STRIPPED_SHARE
        u = generator.uniform
        pose = Pose.draw(generator, 3.0 if stripped else 7.0)
        axes = rotation(np.deg2rad(np.clip(generator.normal(0, 4, 3), -10, 10)))
        top = u(95, 120) if u() > 0.2 else u(50, 85)  # some lack their top
        bottom = -u(45, 95) if u() < 0.6 else -u(95, 135)  # to the skull base, or to the neck
        low = np.array([-u(95, 120), -u(118, 130), bottom])
        high = np.array([-low[0] + u(-8, 8), u(112, 130), top])
        if stripped:
            low, high = np.array([-90.0, -110.0, -90.0]), np.array([90.0, 110.0, 90.0])
        return cls(
            stripped=bool(stripped),
            field_t=float(generator.choice(FIELDS_T)),
            pose=pose,
            head_mm=generator.normal(0, 8, 3),
            axes=np.eye(3) if stripped else axes,
            low_mm=low,
            high_mm=high,
            coil=Coil.draw(generator, 0.3 if stripped else 1.0),
        )

    def grid(self, axes: str, spacing_mm: tuple[float, float, float]) -> Grid:
        """Return the grid with those axis codes and voxels that covers the field of view."""
        from nibabel.orientations import axcodes2ornt

        directions = np.zeros((3, 3))
        for column, (row, sign) in enumerate(axcodes2ornt(tuple(axes))):
            directions[int(row), column] = sign
        extent = np.abs(directions.T @ (self.high_mm - self.low_mm))
        x, y, z = (max(4, round(float(side))) for side in extent / spacing_mm)
        affine = np.eye(4)
        affine[:3, :3] = self.axes @ directions @ np.diag(spacing_mm)
        middle = self.head_mm + self.axes @ (self.low_mm + self.high_mm) / 2
        affine[:3, 3] = middle - affine[:3, :3] @ (np.array((x, y, z)) - 1) / 2
        return Grid((x, y, z), affine, self.head_mm)


@dataclass(frozen=True, eq=False)
class Coil:
    """Smooth gain of the receive coil, shared by a session: brighter near its elements, around the head."""

    weights: Array
    field: SmoothField

    @classmethod
    def draw(cls, generator: np.random.Generator, strength: float) -> "Coil":
        """Draw a coil: the logarithm is a quadratic, mostly of the distance from the middle, and a smooth field."""
        weights = generator.normal(0, 0.1, 9)
        weights[6:] += abs(generator.normal(0, 0.3))
        return cls(strength * weights, SmoothField(generator, 60.0))

    def gain(self, head_mm: Array, strength: float) -> Array:
        """Return the gain (N,) at head coordinates (3, N)."""
        x, y, z = np.clip(head_mm / 100, -1.3, 1.3)
        terms = np.stack([x, y, z, x * y, x * z, y * z, x * x, y * y, z * z])
        return np.asarray(np.exp(np.einsum("t,tn->n", self.weights, terms) + 0.06 * strength * self.field(head_mm)))


def canvas_step_mm(spacing_mm: float) -> float:
    """Return how finely a head is painted for files of voxels of `spacing_mm`: at least the template's own 1 mm."""
    return max(1.0, 0.625 * spacing_mm)


def simulate_head(seed: int, index: int, spacing_mm: float) -> dict[str, SimulatedVolume]:
    """Simulate one subject: t1, t1ce, t2, flair, pd, and `seg` where there is a lesion.

    Args:
        seed, index: together they fix the subject; index counts from 0.
        spacing_mm: no voxel is smaller.
    """
    scans = scan_head(seed, index, spacing_mm)
    gains = np.random.default_rng([seed, index, 3]).uniform(300, 1500, len(scans.volumes))
    result = {}
    for (modality, volume), gain in zip(scans.volumes.items(), gains, strict=True):
        result[modality] = SimulatedVolume(_as_stored(volume.data * gain, scans.mask), volume.affine)
    if scans.labels is not None:
        result["seg"] = SimulatedVolume(scans.labels, result["t1"].affine)
    return result


@dataclass(frozen=True, eq=False)
class Scans:
    """A subject's volumes before they are stored."""

    volumes: dict[str, Volume]
    """Whole heads, also of a skull-stripped session."""
    mask: Volume | None
    """0 or 1, of a skull-stripped session; its volumes are on the same grid."""
    labels: Array | None
    """uint8 on the grid of t1, where there is a lesion."""


def scan_head(seed: int, index: int, spacing_mm: float) -> Scans:
    """Draw a subject and scan it; arguments as `simulate_head`."""
    streams = np.random.SeedSequence([seed, index, 2]).spawn(5)
    shape, lesion, chemistry, scanner, noise = (np.random.default_rng(stream) for stream in streams)
    session = Session.draw(scanner)
    canvas = Canvas(canvas_step_mm(spacing_mm))
    lesions = Lesions.draw(lesion)
    anatomy = draw_head(canvas, shape, lesions)
    subject = Subject.draw(session.field_t, chemistry)
    texture = _texture(canvas, chemistry)
    volumes = {}
    mask = _stripping_mask(session, canvas, anatomy, spacing_mm, scanner) if session.stripped else None
    for modality in MODALITIES:
        contrast = Contrast.draw(modality, session.field_t, chemistry)
        seen = subject.with_contrast() if modality == "t1ce" else subject
        signal = signal_on(canvas, anatomy, seen, contrast, texture)
        volumes[modality] = acquire(session, canvas, signal, modality, spacing_mm, noise)
        if mask is not None:
            volumes[modality] = resample(volumes[modality], mask.affine, mask.data.shape)
    labels = _labels(session, canvas, anatomy, volumes["t1"], mask) if lesions.kind != "none" else None
    return Scans(volumes, mask, labels)


def signal_on(canvas: Canvas, anatomy: Anatomy, subject: Subject, contrast: Contrast, texture: list[Array]) -> Array:
    """Return the signed signal on the canvas, float32.

    Args:
        canvas, anatomy: where and what.
        subject: its tissues.
        contrast: how it is scanned.
        texture: (N,) logarithms of proton density, T1 and T2 on the flattened canvas: how they vary inside a tissue. To
            first order, so that a tissue's equation is evaluated once.
    """
    density, t1, t2 = texture
    total = np.zeros(int(np.prod(canvas.shape)), np.float32)
    for name, parts in anatomy.tissues.items():
        if name == "air":
            continue
        value, by_t1, by_t2 = (np.float32(v) for v in derivatives(contrast, name, subject.tissues[name]))
        for voxels, share in parts:
            total[voxels] += share * (value * (1 + density[voxels]) + by_t1 * t1[voxels] + by_t2 * t2[voxels])
    return total.reshape(canvas.shape)


def _texture(canvas: Canvas, generator: np.random.Generator) -> list[Array]:
    """Return how the logarithms of proton density, T1 and T2 vary inside a tissue: 1 to 5 % slowly, 0.5 to 3 % fast."""
    slow = (0.02, 0.035, 0.035) * generator.uniform(0.6, 1.4, 3)
    fast = (0.015, 0.02, 0.02) * generator.uniform(0.3, 1.5, 3)
    fields = []
    for a, b in zip(slow, fast, strict=True):
        field = np.float32(a) * canvas.fine(canvas.coarse_noise(generator, 18.0))
        fields.append((field + np.float32(b) * canvas.noise(generator, 2.5)).ravel())
    return fields


# ---------------------------------------------------------------------------------------------------------- the scanner


def acquire(
    session: Session, canvas: Canvas, signal: Array, modality: str, spacing_mm: float, generator: np.random.Generator
) -> Volume:
    """Scan a signal: slices, coil, ghosts and noise; magnitude, float32, in the file's axes."""
    u = generator.uniform
    volumetric = u() < {"t1": 0.6, "t1ce": 0.6, "t2": 0.35, "flair": 0.45, "pd": 0.35}[modality]
    in_plane = max(spacing_mm, u(0.5, 1.5))
    thickness = max(spacing_mm, u(1, 1.6) if volumetric else u(2, 6))
    gap = 0.0 if volumetric else min(float(generator.choice([0, 0.1, 0.2, 0.3])) * thickness, 6.5 - thickness)
    gap = max(gap, 0.0)
    orientation = str(generator.choice(list(_AXES), p=(0.3, 0.55, 0.15) if volumetric else (0.75, 0.12, 0.13)))
    axes = str(generator.choice(_AXES[orientation]))
    grid = session.grid(axes, (in_plane, in_plane, thickness + gap))
    offsets = _slice_profile(thickness / (thickness + gap), thickness / canvas.step_mm)
    data = np.mean([_sampled(session, canvas, signal, grid, offset) for offset in offsets], axis=0, dtype=np.float32)
    data = np.abs(data) * _gain(session, grid, generator)
    bright = float(np.percentile(data[data > 0.02 * data.max()], 90)) if data.max() > 0 else 1.0
    data = _with_ghost(data, generator)
    sigma = float(np.exp(u(np.log(0.003), np.log(0.012)) if u() < 0.5 else u(np.log(0.01), np.log(0.04))))
    return Volume(rician(data / np.float32(bright), sigma, generator), grid.affine)


def _slice_profile(share: float, steps: float) -> list[float]:
    """Return where a slice is sampled, in its spacing: evenly through its thickness."""
    number = max(1, round(steps))
    return [share * ((k + 0.5) / number - 0.5) for k in range(number)]


def _coarse_positions(grid: Grid, offset: float) -> tuple[Array, list[Array], tuple[int, ...]]:
    """Return head coordinates (3, N) on a coarsened grid, and for each axis the fine voxels as indices into it."""
    steps = np.linalg.norm(grid.affine[:3, :3], axis=0)
    every = [max(1, int(_COARSE_MM / step)) for step in steps]
    index = [np.arange(0, n + k, k, dtype=float) for n, k in zip(grid.shape, every, strict=True)]
    at = np.stack(np.meshgrid(*index, indexing="ij")).reshape(3, -1)
    at[2] += offset
    head = grid.affine[:3, :3] @ at + (grid.affine[:3, 3] - grid.head_mm)[:, None]
    fine = [np.arange(n) / k for n, k in zip(grid.shape, every, strict=True)]
    return head, fine, tuple(len(one) for one in index)


def _template_positions(session: Session, grid: Grid, offset: float = 0.0) -> list[Array]:
    """Return x, y and z in the template (each with the grid's shape) of slices moved by a part of their spacing."""
    head, fine, shape = _coarse_positions(grid, offset)
    return [between(one.reshape(shape).astype(np.float32), fine) for one in session.pose.to_template(head)]


def _sampled(session: Session, canvas: Canvas, field: Array, grid: Grid, offset: float = 0.0, order: int = 1) -> Array:
    """Return a field of the canvas on a grid; beyond the canvas its edge goes on (the neck)."""
    from scipy.ndimage import map_coordinates

    places = [
        (at - low) / canvas.step_mm for at, low in zip(_template_positions(session, grid, offset), LOW_MM, strict=True)
    ]
    return np.asarray(map_coordinates(field, places, order=order, mode="nearest", output=field.dtype, prefilter=False))


def _gain(session: Session, grid: Grid, generator: np.random.Generator) -> Array:
    """Return the session's gain on a grid, with a small one of this volume: 0.04 (standard deviation)."""
    head, fine, shape = _coarse_positions(grid, 0.0)
    own = 0.04 * SmoothField(generator, 70.0)(head)
    strength = 0.3 if session.stripped else 1.0
    gain = session.coil.gain(head, strength) * np.exp(strength * own)
    return between(gain.reshape(shape).astype(np.float32), fine)


def _with_ghost(data: Array, generator: np.random.Generator) -> Array:
    """Add, in a quarter of the volumes, a weak copy that is shifted by a part of the field of view in the slice."""
    strength, phase = generator.uniform(), int(generator.integers(2))
    share = int(generator.choice([2, 2, 3, 4]))
    if strength > 0.25:
        return data
    return data + np.float32(0.16 * strength) * np.roll(data, data.shape[phase] // share, axis=phase)


# ------------------------------------------------------------------------------------------------------ skull-stripping


def _stripping_mask(
    session: Session, canvas: Canvas, anatomy: Anatomy, spacing_mm: float, generator: np.random.Generator
) -> Volume:
    """Return a brain mask, 0 or 1, on the common grid of a skull-stripped session; a third of them are a bit wrong."""
    spacing = max(1.0, spacing_mm)
    grid = session.grid(str(generator.choice(["RAS", "LAS", "LPS"])), (spacing, spacing, spacing))
    distance = _sampled(session, canvas, anatomy.stripping, grid)
    wrong_mm = 2.5 if generator.uniform() < 1 / 3 else 0.5
    head, fine, shape = _coarse_positions(grid, 0.0)
    wobble = between(SmoothField(generator, 24.0)(head).reshape(shape), fine)
    mask = distance < float(generator.normal(0.5, 0.7)) + wrong_mm * wobble
    return Volume(mask.astype(np.float32), grid.affine)


def _as_stored(data: Array, mask: Volume | None) -> Array:
    """Return int16; where there is a mask, zero means outside it."""
    whole = np.clip(np.rint(data), 0 if mask is None else 1, 32767).astype(np.int16)
    return whole if mask is None else np.where(mask.data > 0, whole, np.int16(0))


def _labels(session: Session, canvas: Canvas, anatomy: Anatomy, reference: Volume, mask: Volume | None) -> Array:
    """Return the labels on the grid of a volume."""
    x, y, z = reference.data.shape
    labels = _sampled(session, canvas, anatomy.labels, Grid((x, y, z), reference.affine, session.head_mm), order=0)
    return labels if mask is None else labels * (mask.data > 0).astype(np.uint8)
