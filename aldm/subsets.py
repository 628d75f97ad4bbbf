"""Scores of a model that takes any sources: every subset of a subject's modalities, every target that is not in it.

Each added contrast should help and none should hurt: `added_source` and `two_against_one` say by how much, with the
interval over subjects.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from aldm.data.modalities import MODALITIES, sort_modalities
from aldm.score_rows import MethodKey, ScoreRow
from aldm.translation import SEVERAL


@dataclass(frozen=True)
class Difference:
    """How much better one thing is than another, dB, over subjects."""

    mean_db: float
    half_db: float
    """Half of the 95 % interval of the mean (t, n - 1 degrees of freedom); NaN below two subjects."""
    num_subjects: int

    def text(self) -> str:
        """Return the words for a table."""
        interval = f" ± {self.half_db:.2f}" if math.isfinite(self.half_db) else ""
        return f"{self.mean_db:+.2f}{interval}"


def subsets_of(names: Sequence[str], least: int = 1) -> list[tuple[str, ...]]:
    """Return the subsets of at least `least` names, fewest first, in their order; the last one holds all."""
    sizes = range(least, len(names) + 1)
    return [subset for size in sizes for subset in itertools.combinations(names, size)]


def several(names: Sequence[str]) -> list[tuple[tuple[str, ...], str]]:
    """Return (sources, target) of all translations from two or more of some modalities."""
    return [(subset, target) for subset in subsets_of(names, 2) for target in names if target not in subset]


def subsets_table(rows: Sequence[ScoreRow], key: MethodKey, region: str) -> str:
    """Return PSNR by sources (a row each, fewest first) and target: mean and half of its 95 % interval over subjects.

    Args:
        rows: of a model that takes any sources, sources of several joined by `+`.
        key: the model.
        region: where.
    """
    cells = psnr_of(rows, key, region)
    targets = sort_modalities(target for _, target in cells)
    sources = list(dict.fromkeys(source for source, _ in cells))
    lines = [f"| PSNR (dB) | {' | '.join(f'-> {target}' for target in targets)} |", "|---" * (len(targets) + 1) + "|"]
    for source in sources:
        texts = [_mean_text(cells[source, target]) if (source, target) in cells else "" for target in targets]
        lines.append(f"| {source.replace(SEVERAL, ' + ')} | {' | '.join(texts)} |")
    return "\n".join(lines)


def psnr_of(rows: Sequence[ScoreRow], key: MethodKey, region: str) -> dict[tuple[str, str], dict[str, float]]:
    """Return (source, target) -> subject -> PSNR, dB, of the translations (the target is not among the sources).

    Few sources come first, then the vocabulary's order.
    """
    cells: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row.key == key and row.region == region and row.target not in row.source.split(SEVERAL):
            cells[row.source, row.target][row.subject_id] = row.psnr_db
    return {place: cells[place] for place in sorted(cells, key=_rank)}


def _rank(place: tuple[str, str]) -> tuple[int, list[int], int]:
    """Return what sorts (source, target): few sources first, then the vocabulary's order."""
    names = place[0].split(SEVERAL)
    return len(names), [MODALITIES.index(name) for name in names], MODALITIES.index(place[1])


def added_source(cells: Mapping[tuple[str, str], Mapping[str, float]]) -> dict[tuple[str, str, str], Difference]:
    """Return (sources, added source, target) -> what the added one brings, over the subjects that have both.

    Args:
        cells: of `psnr_of`.
    """
    found = {}
    for (source, target), psnr in cells.items():
        names = source.split(SEVERAL)
        for added in names if len(names) > 1 else ():
            before = SEVERAL.join(name for name in names if name != added)
            if (before, target) in cells:
                found[before, added, target] = _difference(psnr, cells[before, target])
    return found


def two_against_one(cells: Mapping[tuple[str, str], Mapping[str, float]]) -> Difference | None:
    """Return how much the best two sources are above the best single one, a number a subject: the mean over targets.

    Best is what has the highest mean PSNR over the subjects, for each target. None where nothing has two sources.

    Args:
        cells: of `psnr_of`.
    """
    by_subject: dict[str, list[float]] = defaultdict(list)
    for target in dict.fromkeys(end for _, end in cells):
        best = []
        for number in (2, 1):
            found = [p for (s, end), p in cells.items() if end == target and len(s.split(SEVERAL)) == number]
            best.append(max(found, key=lambda psnr: np.mean(list(psnr.values())), default=None))
        two, one = best
        if two is not None and one is not None:
            for subject in two.keys() & one.keys():
                by_subject[subject].append(two[subject] - one[subject])
    if not by_subject:
        return None
    means = {subject: float(np.mean(values)) for subject, values in by_subject.items()}
    return _difference(means, dict.fromkeys(means, 0.0))


def document(rows: Sequence[ScoreRow], key: MethodKey, regions: Sequence[str]) -> str:
    """Return the tables of all regions as Markdown, and what an added source brings."""
    parts = [f"## Any sources: {key.label()}", NOTE]
    for region in regions:
        cells = psnr_of(rows, key, region)
        if not cells:
            continue
        parts += [f"### Any sources, {region}", subsets_table(rows, key, region)]
        added, gain = added_source(cells), two_against_one(cells)
        if added and gain is not None:
            (before, name, target), least = min(added.items(), key=lambda item: item[1].mean_db)
            parts.append(
                f"The best two sources against the best single one: {gain.text()} dB ({gain.num_subjects} subjects, "
                f"mean over targets). The least that an added source brings: {least.text()} dB ({name} beside "
                f"{before.replace(SEVERAL, ' + ')}, for {target})."
            )
    return "\n\n".join(parts) + "\n"


NOTE = (
    "Every subset of a subject's modalities as sources, every target that is not in it; mean over subjects and half of "
    "its 95 % interval."
)


def _difference(one: Mapping[str, float], other: Mapping[str, float]) -> Difference:
    """Return the mean of one - other over the subjects of both."""
    values = np.array([one[subject] - other[subject] for subject in sorted(one.keys() & other.keys())])
    return Difference(float(values.mean()), _half(values), len(values))


def _half(values: np.ndarray) -> float:
    if len(values) < 2:
        return math.nan
    return float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))


def _mean_text(psnr: Mapping[str, float]) -> str:
    values = np.array(list(psnr.values()))
    half = _half(values)
    return f"{values.mean():.2f}" + (f" ± {half:.2f}" if math.isfinite(half) else "")
