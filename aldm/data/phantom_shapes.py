"""Shapes that a simulated head is put together from, and the canvas that they are painted on.

A shape is a distance: negative inside, mm, exact enough near its surface. All positions are in the template's world,
RAS+ in mm; arrays are X Y Z.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
Vector = tuple[float, float, float]
Box = tuple[slice, slice, slice]
"""Part of a canvas."""

LOW_MM, HIGH_MM = np.array([-105.0, -138.0, -156.0]), np.array([105.0, 126.0, 108.0])
"""What the canvas covers: a head with its nose and some of its neck."""
_LATTICE_MM = 3.0


@dataclass(frozen=True)
class Ellipsoid:
    """An ellipsoid whose axes are those of the template."""

    centre: Vector
    radii: Vector

    def bounds(self) -> tuple[Array, Array]:
        """Return the corners of the box that holds it."""
        return np.array(self.centre) - self.radii, np.array(self.centre) + self.radii

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """Distance at positions that broadcast; Quilez's estimate k (k - 1) / |grad k|, right at the surface."""
        a, b, c = self.radii
        u, v, w = ((x - self.centre[0]) / a, (y - self.centre[1]) / b, (z - self.centre[2]) / c)
        k = np.sqrt(u * u + v * v + w * w)
        slope = np.sqrt((u / a) ** 2 + (v / b) ** 2 + (w / c) ** 2)
        return np.asarray(k * (k - 1) / np.maximum(slope, 1e-6))


@dataclass(frozen=True)
class Tube:
    """All that is within a radius of a straight line; the radius may change along it."""

    start: Vector
    end: Vector
    radius: float
    end_radius: float | None = None

    def bounds(self) -> tuple[Array, Array]:
        """Return the corners of the box that holds it."""
        most = max(self.radius, self.end_radius or 0.0)
        ends = np.array([self.start, self.end])
        return ends.min(axis=0) - most, ends.max(axis=0) + most

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """Distance at positions that broadcast."""
        a, along = np.array(self.start), np.array(self.end) - np.array(self.start)
        u, v, w = x - a[0], y - a[1], z - a[2]
        t = np.clip((u * along[0] + v * along[1] + w * along[2]) / float(along @ along), 0, 1)
        gap = np.sqrt((u - t * along[0]) ** 2 + (v - t * along[1]) ** 2 + (w - t * along[2]) ** 2)
        last = self.radius if self.end_radius is None else self.end_radius
        return np.asarray(gap - (self.radius + t * (last - self.radius)))


@dataclass(frozen=True)
class Arch:
    """The front part of a ring with an elliptic course that lies level, such as a jaw."""

    centre: Vector
    half_width: float
    depth: float
    thickness: float
    half_height: float
    back: float
    """It goes back to this y."""

    def bounds(self) -> tuple[Array, Array]:
        """Return the corners of the box that holds it."""
        x, y, z = self.centre
        t, h = self.thickness, self.half_height
        return (
            np.array([x - self.half_width - t, self.back, z - h]),
            np.array([x + self.half_width + t, y + self.depth + t, z + h]),
        )

    def distance(self, x: Array, y: Array, z: Array) -> Array:
        """Distance at positions that broadcast."""
        x0, y0, z0 = self.centre
        ring = Ellipsoid((x0, y0, 0.0), (self.half_width, self.depth, 1e6)).distance(x, y, np.zeros(1))
        across = np.abs(ring) - self.thickness
        return np.maximum(np.maximum(across, np.abs(z - z0) - self.half_height), self.back - y)


Shape = Ellipsoid | Tube | Arch


def smooth_union(distances: list[Array], blend_mm: float) -> Array:
    """Union of shapes whose seams are rounded: the polynomial smooth minimum, one after another."""
    result = distances[0]
    for other in distances[1:]:
        mix = np.clip(0.5 + 0.5 * (other - result) / blend_mm, 0, 1)
        result = other + (result - other) * mix - blend_mm * mix * (1 - mix)
    return result


def inside(distance: Array, border_mm: float) -> Array:
    """Share of a voxel inside: 1 to 0 over a border of that width."""
    return np.clip(0.5 - distance / border_mm, 0, 1)


def between(values: Array, positions: list[Array]) -> Array:
    """Interpolate an array linearly at fractional indices, axis by axis; beyond its ends its edge goes on.

    Args:
        values: (X, Y, Z).
        positions: for each axis (N,) indices into it.

    Returns:
        (N of x, N of y, N of z), float32.
    """
    for axis, at in enumerate(positions):
        last = values.shape[axis] - 1
        at = np.clip(at, 0, last)
        low = np.minimum(at.astype(np.intp), max(last - 1, 0))
        share = (at - low).astype(np.float32).reshape([-1 if k == axis else 1 for k in range(3)])
        first = values.take(low, axis=axis)
        values = first + share * (values.take(np.minimum(low + 1, last), axis=axis) - first)
    return values.astype(np.float32, copy=False)


class Canvas:
    """A regular grid over the template's world, and a coarse lattice for what is smooth."""

    def __init__(self, step_mm: float) -> None:
        self.step_mm = step_mm
        self.axes = [np.arange(low, high + step_mm / 2, step_mm) for low, high in zip(LOW_MM, HIGH_MM, strict=True)]
        self.shape = tuple(len(axis) for axis in self.axes)
        lattice = [
            np.arange(low, high + _LATTICE_MM / 2, _LATTICE_MM) for low, high in zip(LOW_MM, HIGH_MM, strict=True)
        ]
        self.coarse = np.meshgrid(*lattice, indexing="ij", sparse=True)
        self.coarse_shape = tuple(len(axis) for axis in lattice)

    def fine(self, coarse: Array) -> Array:
        """Return what a field on the lattice is on the canvas, float32."""
        positions = [(axis - low) / _LATTICE_MM for axis, low in zip(self.axes, LOW_MM, strict=True)]
        return between(coarse, positions)

    def box(self, low: Array, high: Array) -> Box:
        """Return the part of the canvas between two corners."""
        x, y, z = (
            slice(*np.searchsorted(axis, (a - self.step_mm, b + self.step_mm)).tolist())
            for axis, a, b in zip(self.axes, low, high, strict=True)
        )
        return x, y, z

    def positions(self, box: Box) -> list[Array]:
        """Return x, y and z of a part of the canvas, as arrays that broadcast to it, float32."""
        parts = [axis[part].astype(np.float32) for axis, part in zip(self.axes, box, strict=True)]
        return list(np.meshgrid(*parts, indexing="ij", sparse=True))

    def noise(self, generator: np.random.Generator, size_mm: float) -> Array:
        """Return a random field on the canvas of about unit variance whose grains have that size."""
        from scipy.ndimage import gaussian_filter

        number = [int((high - low) / size_mm) + 3 for low, high in zip(LOW_MM, HIGH_MM, strict=True)]
        white = gaussian_filter(generator.standard_normal(number, dtype=np.float32), 0.7)
        white /= white.std()
        return between(white, [(axis - low) / size_mm for axis, low in zip(self.axes, LOW_MM, strict=True)])

    def coarse_noise(self, generator: np.random.Generator, size_mm: float) -> Array:
        """Return a smooth random field of about unit variance on the lattice."""
        from scipy.ndimage import gaussian_filter

        number = [int((high - low) / size_mm) + 4 for low, high in zip(LOW_MM, HIGH_MM, strict=True)]
        white = gaussian_filter(generator.standard_normal(number, dtype=np.float32), 0.8)
        white /= white.std()
        return between(white, [np.arange(n) * _LATTICE_MM / size_mm for n in self.coarse_shape])
