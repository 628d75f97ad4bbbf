"""Whether one method beats another by more than chance: paired signed-rank tests, corrected for their number."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from scipy import stats

from aldm.words import counted

K = TypeVar("K")

MIN_SUBJECTS = 6
"""With fewer the smallest two-sided p is 2 / 2^5 = 0.0625: never below 0.05."""


def signed_rank_p(differences: Sequence[float] | np.ndarray) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test (Biometrics Bulletin 1945); zeros are left out.

    Args:
        differences: one number per subject, finite.

    Returns:
        p in (0, 1]; 1 where all differences are 0; NaN for fewer than MIN_SUBJECTS.
    """
    values = np.asarray(differences)
    if len(values) < MIN_SUBJECTS:
        return math.nan
    values = values[values != 0]
    return float(stats.wilcoxon(values).pvalue) if values.size else 1.0


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return p-values adjusted by Holm's step-down method (Scandinavian Journal of Statistics 1979), in their order.

    The smallest of m is multiplied by m, the next by m - 1, ...; none comes below a smaller one's, none above 1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)), 1)
    return adjusted


def holm_texts(p_values: Mapping[K, float]) -> tuple[dict[K, str], str]:
    """Return a table's cell for every comparison, and the heading, which says for how many they are corrected.

    Args:
        p_values: of `signed_rank_p`; NaN was not tested.
    """
    tested = {key: p for key, p in p_values.items() if not math.isnan(p)}
    adjusted = dict(zip(tested, holm(list(tested.values())), strict=True))
    never = f"cannot be significant (fewer than {MIN_SUBJECTS} subjects)"
    texts = {key: _text(adjusted[key]) if key in adjusted else never for key in p_values}
    return texts, f"p (Holm, {counted(len(tested), 'comparison')})" if tested else "p"


def _text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
