"""What is wrong with a simulated brain: a tumour, multiple sclerosis, a stroke old or new, or nothing.

Lesions take their place from the brain's grey and white matter. Positions are in the template's world, RAS+ in mm.
"""

from dataclasses import dataclass

import numpy as np

from aldm.data.phantom_anatomy import SEG_LABELS, Lesion, SmoothField
from aldm.data.phantom_brain import template_on
from aldm.data.phantom_shapes import Array, Canvas, Ellipsoid, inside

KINDS = ("none", "tumour", "plaques", "stroke")
LABELS = {**SEG_LABELS, "plaque": 5, "stroke": 6}
"""Label of each kind of tissue: BraTS's of a tumour, then ours."""
HEALTHY = ("grey", "white", "csf")
_SHARES = (0.35, 0.25, 0.25, 0.15)
_VESSEL_TREES = ((24.0, 0.0, -4.0), (22.0, -60.0, 4.0), (10.0, 30.0, 10.0))
"""Where the territories of the middle, posterior and anterior cerebral arteries come together, right side."""


@dataclass(frozen=True, eq=False)
class Lesions:
    """What a subject has."""

    kind: str
    generator: np.random.Generator

    @classmethod
    def draw(cls, generator: np.random.Generator) -> "Lesions":
        """Draw nothing (35 %), a tumour (25 %), plaques (25 %) or a stroke (15 %)."""
        return cls(str(generator.choice(KINDS, p=_SHARES)), generator)

    def in_brain(self, canvas: Canvas, brain: Array) -> tuple[dict[str, Array], Array]:
        """Return the shares (X, Y, Z) of every tissue, and the labels, in the template's box.

        Args:
            canvas: it is painted on.
            brain: (3, X, Y, Z) shares of grey, white and csf.
        """
        shares = dict(zip(HEALTHY, brain, strict=True))
        found = {
            "none": lambda *_: shares,
            "tumour": _tumour,
            "plaques": _plaques,
            "stroke": _stroke,
        }[self.kind](canvas, shares, self.generator)
        labels = np.zeros(brain.shape[1:], np.uint8)
        total = np.maximum(brain.sum(axis=0), 1e-3)
        for tissue, limit in (("edema", 0.3), ("enhancing", 0.5), ("necrosis", 0.5), ("plaque", 0.5), ("stroke", 0.4)):
            if tissue in found:
                labels[(found[tissue] > limit * total) & (total > 0.5)] = LABELS[tissue]
        return found, labels


Shares = dict[str, Array]


def _tumour(canvas: Canvas, shares: Shares, generator: np.random.Generator) -> Shares:
    """A necrotic core in an enhancing rim, and edema: the tumour of the layout brats."""
    places = np.meshgrid(
        *(axis[part] for axis, part in zip(canvas.axes, template_on(canvas.step_mm).box, strict=True)), indexing="ij"
    )
    positions = np.stack([place.ravel() for place in places])
    brain = np.stack([shares[name] for name in HEALTHY])
    near = np.flatnonzero(brain.sum(axis=0) > 0.02)
    parts, _ = Lesion(generator)(
        positions[:, near], brain.reshape(3, -1)[:, near].astype(np.float64), max(1.5, canvas.step_mm)
    )
    result = {}
    for name, part in zip((*HEALTHY, "necrosis", "edema", "enhancing"), parts, strict=True):
        whole = np.zeros(brain[0].size, np.float32)
        whole[near] = part
        result[name] = whole.reshape(brain.shape[1:])
    return result


def _plaques(canvas: Canvas, shares: Shares, generator: np.random.Generator) -> Shares:
    """Many small ovals in the white matter, most of them at the ventricles and standing away from them."""
    template = template_on(canvas.step_mm)
    origin = [part.start for part in template.box]
    white = shares["white"] > 0.6
    close = np.argwhere(white & (template.ventricles < 9))
    anywhere = np.argwhere(white)
    taken = np.zeros(shares["white"].shape, np.float32)
    for _ in range(int(generator.integers(5, 45))):
        among = close if generator.uniform() < 0.7 else anywhere
        voxel = among[generator.integers(len(among))]
        centre = [float(axis[v + o]) for axis, v, o in zip(canvas.axes, voxel, origin, strict=True)]
        size = float(np.exp(generator.normal(np.log(2.6), 0.35)))
        out, along, up = size * np.exp(generator.normal((0.35, 0, 0), 0.15))
        plaque = Ellipsoid((centre[0], centre[1], centre[2]), (float(out), float(along), float(up)))
        box = canvas.box(*plaque.bounds())
        part = tuple(slice(max(b.start - o, 0), max(b.stop - o, 0)) for b, o in zip(box, origin, strict=True))
        view = taken[part]
        x, y, z = (slice(o + p.start, o + p.start + n) for o, p, n in zip(origin, part, view.shape, strict=True))
        np.maximum(view, inside(plaque.distance(*canvas.positions((x, y, z))), 1.5 * canvas.step_mm), out=view)
    return _taken(shares, {"plaque": taken}, grey=0.5)


def _stroke(canvas: Canvas, shares: Shares, generator: np.random.Generator) -> Shares:
    """A wedge of one artery's territory: a hole with a rim of scar where it is old, swollen tissue where it is new."""
    box = template_on(canvas.step_mm).box
    x, y, z = canvas.positions(box)
    side = float(generator.choice([-1, 1]))
    root = np.array(_VESSEL_TREES[generator.integers(3)]) * (side, 1, 1)
    course = root * (2.2, 0.3, 0) + generator.normal(0, 18, 3) + (0, 0, 20)
    course /= np.linalg.norm(course)
    u, v, w = x - root[0], y - root[1], z - root[2]
    along = u * course[0] + v * course[1] + w * course[2]
    across = np.sqrt(np.maximum(u * u + v * v + w * w - along**2, 0))
    places = np.stack(np.broadcast_arrays(x, y, z)).reshape(3, -1)
    wobble = SmoothField(generator, 18.0)(places).reshape(along.shape)
    width = np.tan(np.deg2rad(generator.uniform(12, 32)))
    start = float(generator.uniform(5, 25))
    depth = np.maximum(across - width * np.maximum(along, 0), start - along) + 3 * wobble
    depth = np.where(x * side > 2, depth, 50.0)
    core = inside(depth, 2 * canvas.step_mm)
    if generator.uniform() < 0.5:
        return _taken(shares, {"stroke": core}, grey=1.0)
    rim = inside(depth - 3, 2 * canvas.step_mm) - core
    return _taken(shares, {"cavity": core * 0.9, "stroke": rim * 0.6}, grey=1.0)


def _taken(shares: Shares, parts: dict[str, Array], grey: float) -> Shares:
    """Return the shares with parts that take all white and so much of the grey matter; a cavity is fluid."""
    result, matter = dict(shares), {"grey": grey, "white": 1.0}
    for name, part in parts.items():
        lost = {tissue: shares[tissue] * part * weight for tissue, weight in matter.items()}
        for tissue, amount in lost.items():
            result[tissue] = result[tissue] - amount
        gained = lost["grey"] + lost["white"]
        name = "csf" if name == "cavity" else name
        result[name] = result.get(name, 0) + gained
    return result
