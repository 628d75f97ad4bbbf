"""PNG pictures: the panel of one translation and the quality / latency card of an evaluation.

Drawn through matplotlib's objects on an Agg canvas: no pyplot, no display, no global state. Volumes are X Y Z of RAS+,
intensities in [0, 1]. The planes are shown as seen by the subject: right of the picture is the subject's right
(axial, coronal) or front (sagittal), up is front (axial) or head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aldm.calibration import LEVEL
from aldm.data.modalities import sort_modalities
from aldm.errors import UserError
from aldm.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

DISCLAIMER = "synthetic, research use only"
PLANES = (("sagittal", 0, "A"), ("coronal", 1, "R"), ("axial", 2, "R"))  # name, normal axis, what lies to the right
_DPI = 110
_GALLERY_COLUMNS, _GALLERY_ERROR = 7, 0.3
_MARKERS = "osD^vP*X<>hp"


@dataclass(frozen=True)
class CardPoint:
    """One measured way to translate: a dot of the quality / latency card."""

    method: str
    """Model, for example aldm or unet."""
    sampler: str
    """Sampler, empty for a model without one."""
    num_inference_steps: int
    """Network evaluations per sample, 0 for a model without a sampler."""
    seconds: float
    """Mean wall time of one volume, s."""
    psnr_db: float
    """Mean PSNR, dB."""


@dataclass(frozen=True)
class RatePoint:
    """What the latent of one codec takes, and what it is worth."""

    codec: str
    family: str
    """Points of one family that are not quantised are joined by a line."""
    voxels_per_scalar: float
    bits_per_voxel: float | None
    """None for a latent that is not quantised."""
    psnr_db: float
    """Mean PSNR of the reconstructions, dB."""
    before_db: float | None
    """The same before quantisation; None where there is none."""


def planes_through(volume: np.ndarray) -> tuple[int, int, int]:
    """Return the voxel that the three planes go through: the middle of the foreground (above a tenth of the range)."""
    low, high = float(volume.min()), float(volume.max())
    above = np.argwhere(volume > low + 0.1 * (high - low))
    if len(above) == 0:
        above = np.array([[0, 0, 0], [side - 1 for side in volume.shape]])
    middle = (above.min(axis=0) + above.max(axis=0)) // 2
    return int(middle[0]), int(middle[1]), int(middle[2])


def save_translation_panel(
    path: Path,
    *,
    source: np.ndarray,
    prediction: np.ndarray,
    target: np.ndarray | None = None,
    uncertainty: np.ndarray | None = None,
    source_name: str,
    target_name: str,
    spacing_mm: tuple[float, float, float],
    title: str = "",
    center: tuple[int, int, int] | None = None,
) -> None:
    """Write a PNG: a row per plane, the columns source, true target, prediction, absolute error and uncertainty.

    Args:
        path: the file to write (replaced if it exists).
        source, prediction: X Y Z in [0, 1].
        target: the true target; None leaves its column and the error's out.
        uncertainty: half of the calibrated interval around the prediction; None leaves its column out.
        source_name, target_name: modalities.
        spacing_mm: voxel size, for the aspect of the planes.
        title: text above the panel.
        center: the voxel that the planes go through; None takes the middle of the source's foreground.

    Raises:
        UserError: volumes of different shapes.
    """
    volumes: list[tuple[str, np.ndarray, str]] = [(f"source {source_name}", source, "gray")]
    if target is not None:
        volumes.append((f"true {target_name}", target, "gray"))
    volumes.append((f"predicted {target_name}", prediction, "gray"))
    if target is not None:
        volumes.append(("absolute error", np.abs(target - prediction), "inferno"))
    if uncertainty is not None:
        volumes.append((f"{LEVEL:.0%} within ±", uncertainty, "viridis"))
    for name, data, _ in volumes:
        if data.shape != source.shape:
            raise UserError(f"panel: {name} has shape {data.shape}, the source {source.shape}")
    center = center or planes_through(source)

    shape_mm = [side * step for side, step in zip(source.shape, spacing_mm, strict=True)]
    heights = [shape_mm[1] if normal == 2 else shape_mm[2] for _, normal, _ in PLANES]
    width = 2.4
    unit = width / max(shape_mm[0], shape_mm[1])
    figure = _figure(width * len(volumes) + 0.4, sum(heights) * unit + 1.3, title)
    grid = figure.add_gridspec(3, len(volumes), height_ratios=heights, hspace=0.04, wspace=0.04)
    grid.update(left=0.05, right=0.99, top=1 - 0.75 / figure.get_figheight(), bottom=0.5 / figure.get_figheight())
    for column, (name, data, colours) in enumerate(volumes):
        # images share the scale [0, 1]; an error or a spread is shown up to its own 99.9th percentile
        high = 1.0 if colours == "gray" else max(float(np.percentile(data, 99.9)), 1e-6)
        axes = [figure.add_subplot(grid[row, column]) for row in range(3)]
        for row, (plane, normal, right) in enumerate(PLANES):
            picture = _draw_plane(axes[row], data, normal, center[normal], spacing_mm, colours, high)
            if column == 0:
                axes[row].set_ylabel(plane, fontsize=8)
                _write_on(axes[row], right)
        axes[0].set_title(name, fontsize=9)
        left, bottom, cell_width, _ = axes[2].get_position().bounds
        bar_axes = figure.add_axes(
            (
                left + 0.1 * cell_width,
                bottom - 0.13 / figure.get_figheight(),
                0.8 * cell_width,
                0.08 / figure.get_figheight(),
            )
        )
        bar = figure.colorbar(picture, cax=bar_axes, orientation="horizontal", ticks=[0, high])
        bar.ax.set_xticklabels(["0", f"{high:.2g}"], fontsize=7)
    _save(figure, path)


def save_training_panel(path: Path, volumes: Mapping[str, np.ndarray], title: str = "") -> None:
    """Write a PNG of what a training looks at: a row per plane, a column per volume, no colour bar.

    All columns share one grey scale, the first volume's 0.1st to 99.9th percentile, whatever its units are.

    Args:
        path: the file to write (replaced if it exists).
        volumes: name -> X Y Z of equal shape and cubic voxels, in the order of the columns; the first is data, not a
            prediction.
        title: text above the panel.

    Raises:
        UserError: no volumes, or volumes of different shapes.
    """
    shapes = {name: volume.shape for name, volume in volumes.items()}
    if len(set(shapes.values())) != 1:
        raise UserError(f"panel: volumes of shapes {shapes}, wanted one shape")
    first = next(iter(volumes.values()))
    shape, center = first.shape, planes_through(first)
    low, high = np.percentile(first, (0.1, 99.9))
    heights = [shape[1] if normal == 2 else shape[2] for _, normal, _ in PLANES]
    width = 2.4
    figure = _figure(width * len(volumes) + 0.4, sum(heights) * width / max(shape[0], shape[1]) + 1.0, title)
    grid = figure.add_gridspec(3, len(volumes), height_ratios=heights, hspace=0.04, wspace=0.04)
    grid.update(left=0.05, right=0.99, top=1 - 0.7 / figure.get_figheight(), bottom=0.25 / figure.get_figheight())
    for column, (name, volume) in enumerate(volumes.items()):
        data = (volume - low) / max(float(high - low), 1e-6)
        for row, (plane, normal, right) in enumerate(PLANES):
            axes = figure.add_subplot(grid[row, column])
            _draw_plane(axes, data, normal, center[normal], (1.0, 1.0, 1.0), "gray", 1.0)
            if row == 0:
                axes.set_title(name, fontsize=9)
            if column == 0:
                axes.set_ylabel(plane, fontsize=8)
                _write_on(axes, right)
    _save(figure, path)


def save_gallery(path: Path, target: np.ndarray, results: Mapping[str, np.ndarray], title: str = "") -> None:
    """Write a PNG of many predictions of one volume: an axial plane of each, its absolute error below it.

    Args:
        path: the file to write (replaced if it exists).
        target: the true volume, X Y Z in [0, 1] with cubic voxels; its own cell comes first.
        results: name, of two lines at most -> X Y Z in [0, 1], of the target's shape.
        title: text above the cells.

    Raises:
        UserError: volumes of different shapes.
    """
    for name, volume in results.items():
        if volume.shape != target.shape:
            raise UserError(f"gallery: {name} has shape {volume.shape}, the target {target.shape}")
    index = planes_through(target)[2]
    columns = min(_GALLERY_COLUMNS, len(results) + 1)
    blocks = -(-(len(results) + 1) // columns)
    width = 1.7
    height = width * target.shape[1] / target.shape[0]
    figure = _figure(columns * width + 0.2, blocks * (2 * height + 0.45) + 0.8, title)
    grid = figure.add_gridspec(blocks, columns, wspace=0.04, hspace=0.45 / (2 * height))
    grid.update(left=0.01, right=0.99, top=1 - 0.8 / figure.get_figheight(), bottom=0.2 / figure.get_figheight())
    for place, (name, volume) in enumerate({"true": target, **results}.items()):
        cell = grid[divmod(place, columns)].subgridspec(2, 1, hspace=0.02)
        upper, lower = figure.add_subplot(cell[0]), figure.add_subplot(cell[1])
        upper.set_title(name, fontsize=8, pad=2)
        _draw_plane(upper, volume, 2, index, (1.0, 1.0, 1.0), "gray", 1.0)
        _draw_plane(lower, np.abs(volume - target), 2, index, (1.0, 1.0, 1.0), "inferno", _GALLERY_ERROR)
        lower.text(
            0.5,
            0.02,
            "error, 0 to 0.3" if place == 0 else "",
            color="w",
            fontsize=6,
            ha="center",
            transform=lower.transAxes,
        )
    _save(figure, path)


def save_quality_card(path: Path, points: Sequence[CardPoint], *, title: str = "", region: str = "volume") -> None:
    """Write a PNG of mean PSNR (dB) against seconds per volume, one dot per model, sampler and number of steps.

    Args:
        path: the file to write (replaced if it exists).
        points: what was measured.
        title: text above the plot.
        region: what the PSNR was taken over.

    Raises:
        UserError: no points.
    """
    if not points:
        raise UserError("the quality / latency card has no point to draw")
    figure = _figure(7.0, 4.6, title)
    axes = figure.add_axes((0.1, 0.14, 0.86, 0.74))
    groups: dict[tuple[str, str], list[CardPoint]] = {}
    for point in points:
        groups.setdefault((point.method, point.sampler), []).append(point)
    for marker, ((method, sampler), members) in enumerate(groups.items()):
        members = sorted(members, key=lambda point: point.num_inference_steps)
        axes.plot(
            [point.seconds for point in members],
            [point.psnr_db for point in members],
            marker=_MARKERS[marker % len(_MARKERS)],
            label=f"{method} {sampler}".strip(),
        )
        for point in members:
            if point.num_inference_steps:
                axes.annotate(
                    str(point.num_inference_steps),
                    (point.seconds, point.psnr_db),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
    axes.set_xscale("log")
    axes.set_xlabel("seconds per volume (log scale); the numbers are network evaluations", fontsize=9)
    axes.set_ylabel(f"mean PSNR, {region} (dB)", fontsize=9)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def save_subsets(path: Path, means: Mapping[tuple[str, str], float], *, title: str = "") -> None:
    """Write a PNG of mean PSNR (dB) by sources (a row each, in their order) and target, as numbers on colour.

    Args:
        path: the file to write (replaced if it exists).
        means: (sources joined by +, target) -> dB, at least one.
        title: text above the table.
    """
    sources = list(dict.fromkeys(source for source, _ in means))
    targets = sort_modalities(target for _, target in means)
    values = np.array([[means.get((source, target), np.nan) for target in targets] for source in sources])
    figure = _figure(2.4 + 0.9 * len(targets), 1.3 + 0.3 * len(sources), title)
    height = 0.3 * len(sources) / (1.3 + 0.3 * len(sources))
    axes = figure.add_axes((0.34, 0.5 - height / 2 - 0.04, 0.62, height))
    axes.imshow(values, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(targets)), [f"to {target}" for target in targets], fontsize=8)
    axes.set_yticks(range(len(sources)), [source.replace("+", " + ") for source in sources], fontsize=8)
    axes.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    middle = np.nanmean([np.nanmin(values), np.nanmax(values)])
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "black" if value > middle else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)
    _save(figure, path)


def save_rates(path: Path, points: Sequence[RatePoint], *, title: str = "", region: str = "volume") -> None:
    """Write a PNG of mean PSNR (dB) against voxels per scalar (log scale) and against bits per voxel.

    Args:
        path: the file to write (replaced if it exists).
        points: what was measured, a quantised latent at least.
        title: text above the plots.
        region: what the PSNR was taken over.
    """
    figure = _figure(9.6, 4.6, title)
    left, right = figure.add_axes((0.07, 0.14, 0.42, 0.76)), figure.add_axes((0.56, 0.14, 0.42, 0.76))
    for number, family in enumerate(dict.fromkeys(point.family for point in points)):
        own = [point for point in points if point.family == family]
        look = {"color": f"C{number}", "marker": _MARKERS[number % len(_MARKERS)], "markersize": 5}
        _draw_rates(left, [(point.voxels_per_scalar, point) for point in own], look, family)
        _draw_rates(right, [(p.bits_per_voxel, p) for p in own if p.bits_per_voxel is not None], look, family)
    left.set_xlabel("voxels per scalar of the latent (log scale)", fontsize=9)
    right.set_xlabel("bits per voxel of the codes", fontsize=9)
    left.set_ylabel(f"mean PSNR of reconstructions, {region} (dB)", fontsize=9)
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter("{x:.4g}")
    right.set_xlim(left=0)
    right.set_ylim(left.get_ylim())
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.3)
    left.legend(fontsize=8, title="hollow: before quantisation", title_fontsize=8)
    _save(figure, path)


def _draw_rates(axes: "Axes", points: Sequence[tuple[float, RatePoint]], look: Mapping[str, Any], family: str) -> None:
    """Draw (rate, point) of one family: a line where nothing is quantised, else a hollow marker for before it."""
    joined = all(point.bits_per_voxel is None for _, point in points)
    rates, psnr_db = [rate for rate, _ in points], [point.psnr_db for _, point in points]
    axes.plot(rates, psnr_db, linestyle="-" if joined else "none", label=family, **look)
    for rate, point in points:
        if point.before_db is not None:
            axes.plot([rate] * 2, [point.psnr_db, point.before_db], ":", color=look["color"], linewidth=1)
            axes.plot(rate, point.before_db, fillstyle="none", **look)


def save_training_curves(path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], *, label: str) -> None:
    """Write a PNG of a validation score over the steps of several trainings, one line each.

    Args:
        path: the file to write (replaced if it exists).
        curves: name -> (step, score) in order.
        label: what the score is, with its unit.
    """
    figure = _figure(7.0, 3.6, "validation during training")
    axes = figure.add_axes((0.1, 0.17, 0.86, 0.7))
    for name, points in curves.items():
        axes.plot([step for step, _ in points], [score for _, score in points], marker=".", label=name)
    axes.set_xlabel("optimizer step", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def _draw_plane(
    axes: "Axes",
    data: np.ndarray,
    normal: int,
    index: int,
    spacing_mm: tuple[float, float, float],
    colours: str,
    high: float,
) -> "AxesImage":
    """Show one plane of a RAS+ volume, in mm, without ticks."""
    across, up = [axis for axis in range(3) if axis != normal]
    plane = np.take(data, index, axis=normal)
    picture = axes.imshow(
        plane.T,
        origin="lower",
        cmap=colours,
        vmin=0,
        vmax=high,
        aspect="equal",
        extent=(0, data.shape[across] * spacing_mm[across], 0, data.shape[up] * spacing_mm[up]),
        interpolation="nearest",
    )
    axes.set_facecolor("black")
    axes.set_xticks([])
    axes.set_yticks([])
    return picture


def _write_on(axes: "Axes", letter: str) -> None:
    """Say at the right edge what lies there, readable on black and on white."""
    from matplotlib.patheffects import withStroke

    axes.text(
        0.97,
        0.5,
        letter,
        color="w",
        fontsize=8,
        ha="right",
        transform=axes.transAxes,
        path_effects=[withStroke(linewidth=2, foreground="k")],
    )


def _figure(width_in: float, height_in: float, title: str) -> "Figure":
    """Return an empty figure with an Agg canvas, a title and the disclaimer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=_DPI)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    figure.text(0.995, 0.008, DISCLAIMER, ha="right", va="bottom", fontsize=8, color="firebrick")
    return figure


def _save(figure: "Figure", path: Path) -> None:
    """Write the figure; no version or date inside, so that equal data is equal bytes."""
    with atomic_path(path, overwrite=True) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
