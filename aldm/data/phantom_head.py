"""The whole head of a simulated subject: which tissue fills every voxel of a canvas.

Around a drawn brain (phantom_brain.py) come fluid, skull, marrow, scalp, eyes, air, face and neck, as shells and shapes
whose places and sizes vary from subject to subject. Positions are in the template's world, RAS+ in mm. The shapes were
laid by eye and are ours; the thicknesses are common ones of adults (skull 4 to 9 mm, scalp 4 to 9 mm).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from aldm.data.phantom_brain import BrainTraits, distance_on_canvas, draw_brain, template_on
from aldm.data.phantom_lesions import Lesions
from aldm.data.phantom_shapes import (
    HIGH_MM,
    LOW_MM,
    Arch,
    Array,
    Box,
    Canvas,
    Ellipsoid,
    Shape,
    Tube,
    Vector,
    inside,
    smooth_union,
)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What fills a canvas.

    tissues: name -> (voxels in the flattened canvas, share of each, 0 to 1); what is left of a voxel is air.
    stripping: distance from the brain's surface on the canvas, mm, negative inside.
    labels: uint8 of the lesions on the canvas.
    """

    tissues: dict[str, list[tuple[Array, Array]]]
    stripping: Array
    labels: Array


class _Painter:
    """Fills a canvas, first come first served: what is painted later takes what is left of a voxel."""

    def __init__(self, canvas: Canvas, generator: np.random.Generator) -> None:
        self.canvas, self.generator = canvas, generator
        self.left = np.ones(canvas.shape, np.float32)
        self.tissues: dict[str, list[tuple[Array, Array]]] = {}

    def paint(self, tissue: str, share: Array, box: Box | None = None) -> None:
        """Give a tissue its share (as the box of the canvas) of what is left."""
        if box is None:
            box = self.canvas.box(LOW_MM, HIGH_MM)
        left = self.left[box]
        share = (share * left).astype(np.float32)
        left -= share
        some = np.flatnonzero(share > 2e-3)
        starts = [part.start for part in box]
        places = [at + start for at, start in zip(np.unravel_index(some, share.shape), starts, strict=True)]
        voxels = np.ravel_multi_index(tuple(places), self.canvas.shape).astype(np.int32)
        self.tissues.setdefault(tissue, []).append((voxels, share.ravel()[some]))

    def shapes(self, tissue: str, *shapes: Shape, shrunk: float = 0.0, mix: Array | None = None) -> None:
        """Paint shapes, less a rim, with a share that varies where `mix` is given (on the canvas)."""
        for shape in shapes:
            box = self.canvas.box(*shape.bounds())
            share = inside(shape.distance(*self.canvas.positions(box)) + shrunk, self.canvas.step_mm)
            self.paint(tissue, share if mix is None else share * mix[box], box)

    def pair(self, shape: Shape) -> tuple[Shape, Shape]:
        """Return a shape of the right side and one of the left, each a little off."""
        return self.moved(shape), self.moved(_mirrored(shape))

    def moved(self, shape: Shape, by_mm: float = 0.8, size: float = 0.07) -> Shape:
        """Return a shape a little elsewhere and of another size."""
        shift, factor = self.generator.normal(0, by_mm, 3), float(np.exp(self.generator.normal(0, size)))
        if isinstance(shape, Tube):
            end_radius = None if shape.end_radius is None else shape.end_radius * factor
            return Tube(_at(shape.start, shift), _at(shape.end, shift), shape.radius * factor, end_radius)
        if isinstance(shape, Arch):
            return replace(shape, centre=_at(shape.centre, shift * (0, 1, 1)), thickness=shape.thickness * factor)
        a, b, c = (float(r) for r in np.array(shape.radii) * factor)
        return Ellipsoid(_at(shape.centre, shift), (a, b, c))


def _at(point: Vector | Array, shift: Array) -> Vector:
    x, y, z = (float(value) for value in np.asarray(point) + shift)
    return x, y, z


def _mirrored(shape: Shape) -> Shape:
    flip, still = np.array([-1, 1, 1]), np.zeros(3)
    if isinstance(shape, Tube):
        return replace(
            shape, start=_at(np.array(shape.start) * flip, still), end=_at(np.array(shape.end) * flip, still)
        )
    return replace(shape, centre=_at(np.array(shape.centre) * flip, still))


# ------------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True, eq=False)
class _Layers:
    """Surfaces of a head on the canvas' lattice, as distances in mm, negative inside."""

    inner: Array
    """The inner side of the skull."""
    skull_mm: Array
    """How thick the skull is."""
    muscle_mm: Array
    """How thick the muscle on the skull is."""
    outer: Array
    """The skin."""
    fat_mm: Array
    """How thick the fat under the skin is."""


def _layers(canvas: Canvas, generator: np.random.Generator) -> _Layers:
    x, y, z = canvas.coarse
    cavity = template_on(canvas.step_mm).cavity

    def wavy(size_mm: float) -> Array:
        return canvas.coarse_noise(generator, size_mm)

    base = inside(z + 28, 20.0)  # 1 below the brain's middle
    fluid_mm = np.maximum(generator.uniform(0.0, 1.8) + 0.6 * wavy(30.0), 0.0) * (1 - 0.7 * base)
    inner = cavity - fluid_mm
    temporal = np.exp(-(((y - 10) / 30) ** 2) - ((z + 12) / 28) ** 2) * inside(45 - np.abs(x), 15.0)
    occiput = np.exp(-(((y + 95) / 30) ** 2) - ((z + 10) / 30) ** 2)
    skull_mm = generator.uniform(4.5, 8.0) * (1 + 0.12 * wavy(30.0)) * (1 - 0.5 * temporal + 0.3 * occiput)
    muscle_mm = generator.uniform(4.0, 12.0) * temporal * (1 + 0.15 * wavy(25.0))
    fat_mm = generator.uniform(1.5, 6.0) * (1 + 0.2 * wavy(30.0))
    cheeks = np.exp(-(((np.abs(x) - 48) / 18) ** 2) - ((y - 42) / 22) ** 2 - ((z + 72) / 25) ** 2)
    nape = inside(y + 55, 20.0) * inside(z + 50, 30.0)
    fat_mm = fat_mm * (1 + generator.uniform(0.3, 1.5) * nape) + generator.uniform(2, 9) * cheeks
    scalp_mm = np.maximum(muscle_mm + np.maximum(fat_mm, 1) + 1.5 + generator.uniform(0, 1.5), 3.0)
    vault = inner - np.maximum(skull_mm, 2.0) - scalp_mm
    outer = smooth_union([vault, *(shape.distance(x, y, z) for shape in _face(generator))], 12.0)
    outer = np.minimum(outer, smooth_union([shape.distance(x, y, z) for shape in _ears(generator)], 1.0))
    return _Layers(inner, np.maximum(skull_mm, 2.0), muscle_mm, outer, np.maximum(fat_mm, 0.5))


def _face(generator: np.random.Generator) -> Iterator[Shape]:
    """Yield the outer shape of the face, nose and neck."""
    wide, long, deep = np.exp(generator.normal(0, 0.04, 3))
    front = float(generator.normal(0, 3))
    yield Ellipsoid((0, 26 + front, -66), (64 * wide, 64 * deep, 60 * long))
    yield Ellipsoid((0, 42 + front, -98), (46 * wide, 46 * deep, 33 * long))
    tip = float(generator.uniform(105, 114)) + front
    yield Tube((0, 84 + front, -30), (0, tip - 8, -58), 6.0, 8.0)
    yield Ellipsoid((0, tip - 14, -62), (16, 12, 8))
    girth = float(np.exp(generator.normal(0, 0.09)))
    yield Tube((0, -44, -50), (0, -50 + float(generator.normal(0, 8)), -190), 54 * girth)


def _ears(generator: np.random.Generator) -> Iterator[Shape]:
    out = float(generator.uniform(80, 90))
    for side in (-1, 1):
        yield Ellipsoid((side * out, -26, -26), (5, 14, 28))
        yield Tube((side * (out - 14), -20, -32), (side * out, -24, -30), 9.0)


# --------------------------------------------------------------------------------------------------------------- head


def draw_head(canvas: Canvas, generator: np.random.Generator, lesions: Lesions) -> Anatomy:
    """Draw a subject's head.

    Args:
        canvas: where it is painted.
        generator: fixes the subject.
        lesions: what is wrong with the brain; they take their place from it.
    """
    painter = _Painter(canvas, generator)
    template = template_on(canvas.step_mm)
    brain = draw_brain(canvas, BrainTraits.draw(generator), generator)
    shares, labels_in_box = lesions.in_brain(canvas, brain)
    labels = np.zeros(canvas.shape, np.uint8)
    labels[template.box] = labels_in_box
    layers = _layers(canvas, generator)
    grain = canvas.noise(generator, 3.5)
    for tissue in [name for name in shares if name != "csf"]:
        painter.paint(tissue, shares[tissue], template.box)
    _vessels(painter)
    painter.paint("csf", _of_left(shares["csf"], painter.left[template.box]), template.box)
    inner = canvas.fine(layers.inner)
    painter.paint("csf", inside(inner, canvas.step_mm))
    _spine(painter)
    _eyes(painter)
    _air(painter, grain)
    _bones(painter, layers, inner, grain)
    _flesh(painter, layers, inner, grain)
    return Anatomy(painter.tissues, canvas.fine(template.surface), labels)


def _of_left(share: Array, left: Array) -> Array:
    """Return what share of what is left a share of the whole is."""
    return np.clip(share / np.maximum(left, 1e-3), 0, 1)


def _vessels(painter: _Painter) -> None:
    """Venous sinuses along the inside of the skull, and the large arteries at the base."""
    canvas = painter.canvas
    box = canvas.box(np.array([-6.0, -130.0, -20.0]), np.array([6.0, 90.0, 95.0]))
    surface = distance_on_canvas(canvas, box, template_on(canvas.step_mm).surface)
    x, _, z = canvas.positions(box)
    width = float(painter.generator.uniform(2.5, 4.5))
    share = inside(np.abs(x) - width, 1.5) * inside(np.abs(surface - 2.5) - 3.5, 1.5) * inside(-z - 8, 4.0)
    painter.paint("blood", share, box)
    pair, shapes = painter.pair, painter.shapes
    shapes("blood", *pair(Tube((4, -104, -12), (50, -72, -24), 3.0)), *pair(Tube((52, -70, -26), (44, -42, -50), 3.0)))
    shapes("blood", *pair(Tube((13, 4, -34), (16, -6, -52), 2.0)), *pair(Tube((12, 2, -20), (40, 2, -18), 1.1)))
    shapes("blood", painter.moved(Tube((0, -16, -36), (0, -24, -58), 1.5)))


def _spine(painter: _Painter) -> None:
    """The cord in its fluid, below the brain."""
    painter.shapes("grey", Tube((0, -44, -76), (0, -49, -175), 2.2))
    painter.shapes("white", Tube((0, -43, -72), (0, -49, -175), 5.0))
    painter.shapes("csf", Tube((0, -43, -64), (0, -49, -175), float(painter.generator.uniform(7.5, 10.0))))
    painter.shapes("blood", *painter.pair(Tube((27, -26, -58), (30, -28, -175), 2.6)))


def _eyes(painter: _Painter) -> None:
    for side in (-1, 1):
        shift = painter.generator.normal(0, 1.0, 3)
        eye = _at((side * 32, 60, -38), shift)
        radius = float(painter.generator.normal(12.2, 0.5))
        apex = (side * 15.0, 24.0, -34.0)
        painter.shapes("lens", Ellipsoid(_at(eye, np.array([0, radius - 3.2, 0])), (4.6, 2.1, 4.6)))
        painter.shapes("vitreous", Ellipsoid(eye, (radius - 1, radius - 1, radius - 1)))
        painter.shapes("skin", Ellipsoid(eye, (radius, radius, radius)))
        painter.shapes("white", Tube(_at(eye, np.array([0, -radius, 0])), apex, 1.8))
        for up, out in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            end = _at(eye, np.array([out * radius, -3, up * radius]))
            painter.shapes("muscle", Tube(apex, end, 1.8))
        painter.shapes("fat", Tube(_at(eye, np.array([0, -2, 0])), apex, radius + 3.5, 6.0))


def _air(painter: _Painter, grain: Array) -> None:
    """Sinuses with their lining, the nose, the throat, the mouth and the ear canals."""
    generator, pair = painter.generator, painter.pair
    sinuses: list[Shape] = [painter.moved(Ellipsoid((0, 20, -44), (12, 11, 9)), size=0.2)]
    sinuses += pair(Ellipsoid((27, 44, -62), (12, 15, 15)))
    if generator.uniform() < 0.8:
        sinuses += pair(Ellipsoid((11, 77, -10), (10, 5, 10)))
    lining = float(generator.choice([0.7, 0.7, 1.5, 3.5]))
    cells = np.clip(0.6 + 2 * grain, 0, 1)
    for sinus in sinuses:
        painter.shapes("air", sinus, shrunk=lining)
        painter.shapes("mucosa", sinus)
    septum = Ellipsoid((0, 56, -52), (1.0, 34, 20))
    painter.shapes("mucosa", septum)
    for shape in (Ellipsoid((0, 50, -36), (12, 22, 9)), Ellipsoid((0, 58, -55), (14, 32, 18))):
        painter.shapes("air", shape, mix=cells)
        painter.shapes("mucosa", shape)
    throat = float(generator.uniform(5, 9))
    painter.shapes("air", Tube((0, 10, -62), (0, 6, -105), throat), Tube((0, 6, -105), (0, 8, -190), throat))
    if generator.uniform() < 0.6:
        painter.shapes("air", Ellipsoid((0, 52, -79), (20, 26, float(generator.uniform(1, 5)))))
    painter.shapes("air", *pair(Tube((88, -24, -32), (56, -26, -36), 3.2)))
    mastoid = np.clip(0.5 + 1.5 * grain, 0, 1) * float(generator.uniform(0.3, 1))
    for cells_of_side in pair(Ellipsoid((56, -40, -46), (9, 13, 15))):
        painter.shapes("air", cells_of_side, mix=mastoid)
        painter.shapes("bone", cells_of_side)


def _bones(painter: _Painter, layers: _Layers, inner: Array, grain: Array) -> None:
    """The skull with its marrow, the jaws and the vertebrae."""
    canvas, generator, pair = painter.canvas, painter.generator, painter.pair
    thick = canvas.fine(layers.skull_mm)
    tables = generator.uniform(1.2, 2.2, 2)
    amount, patches = generator.uniform(0, 1), canvas.fine(canvas.coarse_noise(generator, 18.0))
    filled = np.clip(0.5 + amount + 0.4 * patches + 0.15 * grain, 0, 1) * generator.uniform(0.3, 1)
    marrow = inside(tables[0] - inner, canvas.step_mm) * inside(inner - thick + tables[1], canvas.step_mm)
    canal = Tube((0, -43, -60), (0, -49, -175), 10.0)
    painter.shapes("muscle", canal)  # nothing of the skull closes the foramen magnum
    painter.paint("marrow", marrow * filled)
    painter.paint("bone", inside(inner - thick, canvas.step_mm))
    petrous = pair(Tube((56, -34, -40), (16, -8, -40), 9.0, 6.0))
    painter.shapes("csf", *pair(Tube((24, -26, -36), (32, -30, -36), 1.8)))
    painter.shapes("bone", *petrous)

    def bone(*shapes: Shape, table_mm: float = 1.6) -> None:
        painter.shapes("marrow", *shapes, shrunk=table_mm)
        painter.shapes("bone", *shapes)

    bone(painter.moved(Tube((0, 4, -50), (0, -22, -64), 6.5, 4.5)))  # clivus
    teeth = Arch((0, 40, -92), 24, 40, 4, 8, 42)
    painter.shapes("bone", Ellipsoid((0, 48, -74), (24, 34, 1.6)))
    bone(painter.moved(Arch((0, 40, -82), 26, 42, 5, 6, 36)))
    painter.shapes("bone", painter.moved(teeth))
    bone(painter.moved(Arch((0, 26, -112), 40, 54, 5.5, 11, 0)))
    for side in pair(Tube((47, 6, -104), (52, 0, -48), 5.5)):
        bone(side)
    for side in pair(Tube((46, 62, -52), (56, 38, -50), 6.5, 5)):
        bone(side)
    for side in pair(Tube((57, 38, -50), (66, 0, -44), 3.2)):
        bone(side, table_mm=1.2)
    bone(painter.moved(Tube((0, -24, -70), (0, -23, -92), 5.0)))  # dens
    for level in range(5):
        low = -88.0 - 17 * level
        y = -25.0 - 1.3 * level
        body = painter.moved(Ellipsoid((0, y, low), (11, 9, 8)), 0.5)
        bone(body)
        for side in pair(Ellipsoid((19, y - 12, low), (7, 8, 6))):
            bone(side)
        bone(Tube((0, y - 32, low - 2), (0, y - 48 - 4 * (level == 0), low - 6), 3.5))
        painter.shapes("cartilage", Ellipsoid((0, y, low - 8.5), (10, 8, 4)))


def _flesh(painter: _Painter, layers: _Layers, inner: Array, grain: Array) -> None:
    """Glands, muscles, fat and skin: what is left of the head."""
    canvas, generator = painter.canvas, painter.generator
    outer, fat = canvas.fine(layers.outer), canvas.fine(layers.fat_mm)
    skull, muscle = canvas.fine(layers.skull_mm), canvas.fine(layers.muscle_mm)
    step = canvas.step_mm
    within = inside(outer, step)
    skin_mm = float(generator.uniform(1.2, 2.2))
    painter.paint("skin", within * inside(-outer - skin_mm, step))
    strands = np.clip(0.15 + 0.25 * grain, 0, 0.5)
    on_skull = within * inside(inner - skull - muscle, step) * inside(-muscle + 1.5, 1.0)
    painter.paint("muscle", on_skull)
    painter.paint("fat", within * inside(-outer - skin_mm - fat, step) * (1 - 0.6 * strands))
    for side in painter.pair(Ellipsoid((60, -8, -72), (10, 13, 20))):
        painter.shapes("gland", side)
    painter.shapes("gland", *painter.pair(Ellipsoid((24, 20, -118), (9, 15, 9))))
    tongue = painter.moved(Ellipsoid((0, 42, -96), (23, 30, 19)))
    painter.shapes("muscle", tongue, mix=np.clip(0.9 - 0.3 * np.abs(grain), 0, 1))
    lumps = np.clip(1.6 * (canvas.noise(generator, 9.0) - generator.uniform(0.7, 1.3)), 0, 1)
    planes = np.clip(1 - np.abs(canvas.noise(generator, 13.0)) / generator.uniform(0.06, 0.2), 0, 1)
    painter.paint("fat", within * np.maximum(lumps, planes))
    painter.paint("muscle", within)
