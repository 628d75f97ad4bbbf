"""What is said of how well a fixed segmenter, trained on real volumes, segments synthetic ones."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aldm.score_rows import SEGMENTED, MethodKey, ScoreRow, mean_scores

if TYPE_CHECKING:
    import pandas

REAL, EMPTY = "real", "empty"
"""Methods of the rows of true volumes, and of volumes without anything in them."""
LEAST_DICE = 0.5
"""Mean Dice on real volumes below which a segmenter is too poor to judge anything."""
NOTE = (
    "Dice / 95th percentile of the surface distances (HD95, mm) / error of the volume (ml), of what the segmenter of "
    "the target's modality finds: means over the translations (source and target differ); of real, empty and "
    "reconstruction over the volumes. Dice: higher is better, the others: lower is better. Where a structure is "
    "neither there nor found, Dice and HD95 are left out; where it is one of the two, Dice is 0 and HD95 the diagonal "
    "of the box."
)


def structures_of(rows: Sequence[ScoreRow]) -> list[str]:
    """Return the structures that were segmented, in the order of their first row."""
    return list(dict.fromkeys(row.region.removeprefix(SEGMENTED) for row in rows if row.region.startswith(SEGMENTED)))


def real_dice(rows: Sequence[ScoreRow]) -> dict[str, float]:
    """Return structure -> mean Dice on real volumes; empty where nothing was segmented."""
    dice = mean_scores(rows, with_codec=True)["dice"]
    return {name: float(dice[REAL, "", 0, SEGMENTED + name]) for name in structures_of(rows)}


def verdict(rows: Sequence[ScoreRow]) -> str:
    """Say how good the segmenter is on real volumes, and whether that is enough to judge others by it."""
    dice = real_dice(rows)
    words = f"The segmenter's Dice on real volumes: {', '.join(f'{name} {value:.3f}' for name, value in dice.items())}."
    poor = [name for name, value in dice.items() if not value >= LEAST_DICE]
    if poor:
        words += (
            f" That of {', '.join(poor)} is below {LEAST_DICE:g}: too poor to judge anything, so what follows says "
            "nothing of it. Train the segmenter for longer, or on more subjects."
        )
    return words


def usefulness_table(rows: Sequence[ScoreRow]) -> str:
    """Return a table with a line per method, real volumes first, and a column per structure; empty where there is none.

    Means are those of `mean_scores`.
    """
    structures = structures_of(rows)
    if not structures:
        return ""
    means = mean_scores([row for row in rows if row.region.startswith(SEGMENTED)], with_codec=True)
    keys = list(dict.fromkeys(MethodKey(*key) for *key, _ in means.index))
    keys.sort(key=lambda key: (key.method != REAL, key.method == EMPTY))
    lines = [f"| | {' | '.join(structures)} | volumes |", "|---" * (len(structures) + 2) + "|"]
    for key in keys:
        places = [(*key, SEGMENTED + name) for name in structures]
        found = [means.loc[place] if place in means.index else None for place in places]
        cells = ["" if line is None else _cell(line) for line in found]
        number = max(int(line.volumes) for line in found if line is not None)
        lines.append(f"| {key.label()} | {' | '.join(cells)} | {number} |")
    return "\n".join(lines)


def _cell(line: "pandas.Series") -> str:
    """Return Dice / HD95 / error of the volume."""
    return f"{_number(line.dice, 3)} / {_number(line.hd95_mm, 1)} / {_number(line.volume_error_ml, 1)}"


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
