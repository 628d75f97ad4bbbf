"""The Pareto picture of a sweep: score against network evaluations."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from aldm.files import atomic_path
from aldm.pictures import DISCLAIMER
from aldm.words import counted

_FRONT_COLOUR, _OTHERS_COLOUR = "tab:blue", "0.65"


def save_pareto_picture(
    path: Path,
    points: Sequence[tuple[int, float]],
    front: Sequence[tuple[int, float, str]],
    *,
    score: str,
    title: str = "",
) -> None:
    """Write a PNG of every measured point in grey, and the Pareto front as numbered steps whose labels stand below.

    Points that are far worse than most stand as triangles at the edge.

    Args:
        path: the file to write (replaced if it exists).
        points: (network evaluations, score) of everything measured, at least one.
        front: (network evaluations, score, label) by rising evaluations.
        score: what the score is, with its unit.
        title: text above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    height_in = 4.2 + 0.19 * len(front)
    figure = Figure(figsize=(7.0, height_in), dpi=110)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    figure.text(0.995, 0.008, DISCLAIMER, ha="right", va="bottom", fontsize=8, color="firebrick")
    bottom = (0.85 + 0.19 * len(front)) / height_in
    axes = figure.add_axes((0.11, bottom, 0.86, 1 - bottom - 0.4 / height_in))
    numbers, scores, labels = zip(*front, strict=True)
    most = max(number for number, _ in points)
    edge = _edge([value for _, value in points], scores[-1])
    shown = [(number, value) for number, value in points if (value - edge) * (scores[-1] - edge) >= 0]
    x, y = zip(*shown, strict=True)
    axes.scatter(x, y, 16, color=_OTHERS_COLOUR, label="measured", zorder=2)
    beyond = [number for number, value in points if (number, value) not in shown]
    if beyond:
        marker = "v" if edge < scores[-1] else "^"
        axes.scatter(beyond, [edge] * len(beyond), 24, color=_OTHERS_COLOUR, marker=marker, label="beyond the frame")
    axes.step(
        [*numbers, most], [*scores, scores[-1]], where="post", color=_FRONT_COLOUR, label="Pareto front", zorder=3
    )
    axes.plot(numbers, scores, "o", color=_FRONT_COLOUR, zorder=3)
    for place, (number, value, label) in enumerate(zip(numbers, scores, labels, strict=True), start=1):
        axes.annotate(
            str(place),
            (number, value),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            weight="bold",
        )
        line = (0.2 + 0.19 * (len(front) - place)) / height_in
        figure.text(0.11, line, f"{place}   {counted(number, 'evaluation')}, {value:.4g}: {label}", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({number for number, _ in points})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("network evaluations (log scale)", fontsize=9)
    axes.set_ylabel(f"validation {score}", fontsize=9)
    axes.margins(y=0.12)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8)
    with atomic_path(path, overwrite=True) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _edge(values: Sequence[float], best: float) -> float:
    """Return the worst score that the frame shows: twice as far behind the median as the best is before it.

    A model that diverges when it is sampled is off by so much that nothing else could be told apart beside it.
    """
    middle = statistics.median(values)
    edge = middle - 2 * (best - middle)
    return max(edge, min(values)) if best >= middle else min(edge, max(values))
