"""The brain of a simulated head: one subject's grey matter, white matter and fluid, drawn from ICBM152's maps.

The maps say how often a tissue lies somewhere in 152 heads. A subject is a draw of them: the logarithms of the shares
get random fields with grains of the size of a gyrus, and the largest wins where there is no partial volume. Wide
ventricles and sulci (atrophy) shift the borders.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from aldm.data.phantom_anatomy import template_fractions
from aldm.data.phantom_shapes import LOW_MM, Array, Box, Canvas, between, inside

_CLOSED_MM = 9.0


@dataclass(frozen=True, eq=False)
class Template:
    """What a canvas shows of the template; kept, as every subject needs it."""

    box: Box
    """Part of the canvas that holds the brain."""
    log_shares: Array
    """(3, X, Y, Z) of grey, white, fluid in the box; their exponentials add up to 1."""
    brain: Array
    """(X, Y, Z) share of a voxel that is brain, in the box."""
    ventricles: Array
    """(X, Y, Z) distance from the ventricles, mm, in the box; negative inside."""
    surface: Array
    """Distance from the brain's surface on the lattice, mm; negative inside."""
    cavity: Array
    """The same of the brain with its fissures closed: the inside of the skull, less some fluid."""


@lru_cache(maxsize=2)
def template_on(step_mm: float) -> Template:
    """Return the template on a canvas of that step."""
    from scipy.ndimage import gaussian_filter

    canvas = Canvas(step_mm)
    fractions, origin = template_fractions()
    high = origin + np.array(fractions.shape[1:]) - 1
    box = canvas.box(origin + step_mm, high - step_mm)
    positions = [axis[part] - low for axis, part, low in zip(canvas.axes, box, origin, strict=True)]
    sigma = 0.425 * np.sqrt(max(step_mm**2 - 1, 0.0))
    shares = np.stack([between(gaussian_filter(one, sigma) if sigma else one, positions) for one in fractions])
    brain = shares.sum(axis=0)
    log_shares = np.log(np.maximum(shares / np.maximum(brain, 1e-3), 1e-4))
    surface, cavity = _surfaces(canvas, fractions, origin)
    return Template(box, log_shares, brain, _ventricles(canvas, box, fractions[2], origin), surface, cavity)


def _surfaces(canvas: Canvas, fractions: Array, origin: Array) -> tuple[Array, Array]:
    """Return the distances from the brain and from the closed brain, on the lattice."""
    from scipy.ndimage import distance_transform_edt, gaussian_filter

    step = 3.0
    brain = gaussian_filter(fractions.sum(axis=0), 1.2)
    places = [np.ravel(axis) - low for axis, low in zip(canvas.coarse, origin, strict=True)]
    outside = [(at < 0) | (at > side - 1) for at, side in zip(places, brain.shape, strict=True)]
    mask = between(brain, places)
    for axis, beyond in enumerate(outside):
        np.moveaxis(mask, axis, 0)[beyond] = 0

    def distance(mask: Array) -> Array:
        signed = distance_transform_edt(mask < 0.5, sampling=step) - distance_transform_edt(mask >= 0.5, sampling=step)
        return np.asarray(gaussian_filter(signed, 0.7), np.float32)

    surface = distance(mask)
    grown = surface < _CLOSED_MM
    closed = distance_transform_edt(grown, sampling=step) > _CLOSED_MM
    return surface, gaussian_filter(distance(closed | (mask >= 0.5)), 0.8)


def _ventricles(canvas: Canvas, box: Box, fluid: Array, origin: Array) -> Array:
    """Return the distance from the lateral ventricles on a part of the canvas.

    They are the largest body of fluid inside a box, without the cisterns behind them and the fissure above.
    """
    from scipy.ndimage import distance_transform_edt, label

    x, y, z = np.meshgrid(
        *(np.arange(n) + low for n, low in zip(fluid.shape, origin, strict=True)), indexing="ij", sparse=True
    )
    near = (np.abs(x) < 45) & (y > -58) & (y < 36) & (z > -24) & (z < 32)
    near = near & ~((np.abs(x) < 14) & (y < -24) & (z < 12)) & ~((np.abs(x) < 3) & (z > 14))
    labels, _ = label((fluid > 0.5) & near)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    inner = labels == sizes.argmax()
    signed = distance_transform_edt(~inner) - distance_transform_edt(inner)
    positions = [axis[part] - low for axis, part, low in zip(canvas.axes, box, origin, strict=True)]
    return between(signed.astype(np.float32), positions)


@dataclass(frozen=True)
class BrainTraits:
    """How one subject's brain differs from the template's."""

    sulci: float
    """Added to the logarithm of the fluid's share: about 0 young, 1.5 shrunken."""
    ventricles_mm: float
    """By how much the ventricles' walls are moved outwards."""
    sharpness: float
    folding: float

    @classmethod
    def draw(cls, generator: np.random.Generator) -> "BrainTraits":
        """Draw a subject; a third of them have some atrophy."""
        atrophy = generator.uniform(0.2, 1) if generator.uniform() < 0.35 else generator.uniform(0, 0.2)
        return cls(
            sulci=float(generator.normal(0.3, 0.4) + 1.0 * atrophy),
            ventricles_mm=float(generator.normal(-0.6, 0.6) + 5 * atrophy),
            sharpness=float(generator.uniform(2.0, 5.0)),
            folding=float(generator.uniform(0.6, 1.1)),
        )


def draw_brain(canvas: Canvas, traits: BrainTraits, generator: np.random.Generator) -> Array:
    """Return the shares (3, X, Y, Z) of grey, white and fluid in the template's box; they add up to `brain`."""
    template = template_on(canvas.step_mm)
    box = template.box
    depth = np.clip(-canvas.fine(template.surface)[box] / 12, 0, 1)
    strength = traits.folding * (1 - 0.75 * depth)
    logs = 0.5 * template.log_shares
    for tissue in range(3):
        logs[tissue] += strength * (0.8 * canvas.noise(generator, 6.0)[box] + 0.6 * canvas.noise(generator, 3.0)[box])
    logs[2] += traits.sulci * (1.5 - depth)
    logs *= traits.sharpness
    logs -= logs.max(axis=0)
    shares = np.exp(logs, out=logs)
    shares *= template.brain / shares.sum(axis=0)
    wobble = canvas.fine(canvas.coarse_noise(generator, 25.0))[box]
    wet = inside(template.ventricles - traits.ventricles_mm * (1 + 0.25 * wobble), 1.5 * canvas.step_mm)
    wet *= template.ventricles < 15
    shares *= 1 - wet
    shares[2] += wet * template.brain
    return shares


def distance_on_canvas(canvas: Canvas, box: Box, coarse: Array) -> Array:
    """Return a field of the lattice on a part of the canvas."""
    positions = [(axis[part] - low) / 3.0 for axis, part, low in zip(canvas.axes, box, LOW_MM, strict=True)]
    return between(coarse, positions)
