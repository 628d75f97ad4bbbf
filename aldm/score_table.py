"""What is said of rows of scores: mean and spread, Table D's shape, and who beats whom with what confidence."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from aldm import usefulness
from aldm.calibration import LEVEL
from aldm.score_rows import MethodKey, ScoreRow, mean_scores, of_images, translations
from aldm.significance import holm_texts, signed_rank_p
from aldm.words import counted

# Supplement, Table D (IXI test set, 115 subjects): (source, target) -> (PSNR dB, NMSE, SSIM) as mean and std
TABLE_D: dict[tuple[str, str], tuple[tuple[float, float], ...]] = {
    ("t1", "t1"): ((29.487, 0.522), (0.047, 0.020), (0.941, 0.024)),
    ("t1", "t2"): ((27.265, 0.629), (0.071, 0.022), (0.921, 0.015)),
    ("t1", "pd"): ((27.729, 0.685), (0.072, 0.025), (0.922, 0.018)),
    ("t2", "t1"): ((27.368, 0.624), (0.074, 0.031), (0.929, 0.027)),
    ("t2", "t2"): ((29.259, 0.582), (0.045, 0.017), (0.937, 0.015)),
    ("t2", "pd"): ((27.913, 0.659), (0.067, 0.023), (0.927, 0.019)),
    ("pd", "t1"): ((27.968, 0.521), (0.070, 0.028), (0.931, 0.028)),
    ("pd", "t2"): ((27.834, 0.627), (0.067, 0.024), (0.925, 0.025)),
    ("pd", "pd"): ((29.396, 0.488), (0.042, 0.019), (0.939, 0.027)),
}
TABLE_D_NOTE = (
    "Table D of the paper's supplement: its own model on the 115 test subjects of IXI, other subjects and another "
    "split than here; the region of its scores is not stated."
)
COMPARISON_NOTE = (
    "Difference of mean PSNR over translations (source and target differ), one number per subject; the interval is the "
    "paired t interval over subjects. `not certain`: it holds 0. p: two-sided Wilcoxon signed-rank test on the same "
    "numbers, of the method with the highest mean PSNR against each other one, corrected by Holm's method for the "
    "number of these comparisons."
)
CARD_NOTE = (
    "Means over the translations (source and target differ). Lower is better: NMSE, MAE. Higher is better: PSNR, SSIM, "
    "MS-SSIM (as many of five scales as have 11 voxels along every axis), NMI (1 to 2). Sharpness: gradient energy by "
    "the target's, 1 is right, below 1 is blurred, above 1 may be noise or ringing. Coverage: share of the voxels "
    f"whose true value lies in the model's interval, which is to hold {LEVEL:.0%}; error ratio: RMS error by the RMS "
    "standard deviation that the interval stands for, 1 is right. After gain: once the smooth gain (second order in "
    "the position) is known that fits the image best to the target; what is left is contrast and anatomy."
)
CARD_COLUMNS: dict[str, tuple[str, int]] = {
    "psnr_db": ("PSNR (dB)", 2),
    "nmse": ("NMSE", 3),
    "ssim": ("SSIM", 3),
    "mae": ("MAE", 4),
    "ms_ssim": ("MS-SSIM", 3),
    "nmi": ("NMI", 3),
    "sharpness": ("sharpness", 2),
    "coverage": ("coverage", 3),
    "error_ratio": ("error ratio", 2),
    "gain_psnr_db": ("PSNR after gain (dB)", 2),
    "gain_ssim": ("SSIM after gain", 3),
}
"""Score -> its heading and digits in `card`."""
SOMETIMES = ("coverage", "error_ratio", "gain_psnr_db", "gain_ssim")
"""Scores of a model's interval, and of the mask alone: shown where any method has them."""
ONE_VALUE_PER_TARGET = (
    "training-mean",
    "reconstruction",
)  # these do not depend on the source: the overview says it all


@dataclass(frozen=True)
class Summary:
    """Mean and standard deviation over subjects of the three scores."""

    count: int
    """Number of rows behind it."""
    mean: tuple[float, float, float]
    """PSNR (dB), NMSE, SSIM."""
    std: tuple[float, float, float]
    """Sample standard deviation (n - 1); NaN for a single row."""

    def text(self) -> str:
        """Return `PSNR / NMSE / SSIM`, each as mean ± std, for a table cell."""
        return " / ".join(
            f"{_number(mean, digits)}" + (f" ± {std:.{digits}f}" if math.isfinite(std) else "")
            for mean, std, digits in zip(self.mean, self.std, (2, 3, 3), strict=True)
        )


@dataclass(frozen=True)
class Comparison:
    """How much better one method's PSNR is than another's on the same subjects and pairs."""

    better: MethodKey
    than: MethodKey
    region: str
    num_subjects: int
    difference_db: float
    """Mean over subjects of the difference of their mean PSNR, dB."""
    low_db: float
    high_db: float
    """95 % interval of the mean difference (paired t, n - 1 degrees of freedom); NaN below two subjects."""
    p_value: float
    """Of the signed-rank test over subjects, not corrected; NaN for too few of them (significance.py)."""

    @property
    def certain(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low_db > 0 or self.high_db < 0


def summarize(rows: Iterable[ScoreRow]) -> Summary:
    """Return mean and sample standard deviation of the rows' scores (at least one row)."""
    values = np.array([(row.psnr_db, row.nmse, row.ssim) for row in rows])
    with np.errstate(invalid="ignore"):  # an exact match has an infinite PSNR: its mean is infinite, its spread NaN
        mean = values.mean(axis=0)
        std = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(3, math.nan)
    return Summary(
        len(values), (float(mean[0]), float(mean[1]), float(mean[2])), (float(std[0]), float(std[1]), float(std[2]))
    )


def methods_of(rows: Iterable[ScoreRow]) -> list[MethodKey]:
    """Return the methods in the order of their first row."""
    return list(dict.fromkeys(row.key for row in rows))


def compare(
    rows: Sequence[ScoreRow], one: MethodKey, other: MethodKey, region: str, *, target: str | None = None
) -> Comparison | None:
    """Compare two methods' PSNR over the translations (source and target differ) that both have.

    Subjects are the independent samples: each gives one number, its mean difference over the common pairs.

    Args:
        rows: all scores.
        one, other: the methods.
        region: the region that counts.
        target: only translations into this modality; None takes all.

    Returns:
        the comparison with the better method first, or None where they share no finite row.
    """
    psnr: dict[MethodKey, dict[tuple[str, str, str], float]] = {one: {}, other: {}}
    for row in translations(rows):
        wanted = row.region == region and target in (None, row.target)
        if wanted and row.key in psnr and math.isfinite(row.psnr_db):
            psnr[row.key][row.subject_id, row.source, row.target] = row.psnr_db
    by_subject: dict[str, list[float]] = defaultdict(list)
    for place in psnr[one].keys() & psnr[other].keys():
        by_subject[place[0]].append(psnr[one][place] - psnr[other][place])
    if not by_subject:
        return None
    differences = np.array([np.mean(values) for _, values in sorted(by_subject.items())])
    if differences.mean() < 0:
        one, other, differences = other, one, -differences
    mean, count = float(differences.mean()), len(differences)
    half = math.nan
    if count > 1:
        half = float(stats.t.ppf(0.975, count - 1) * differences.std(ddof=1) / math.sqrt(count))
    return Comparison(one, other, region, count, mean, mean - half, mean + half, signed_rank_p(differences))


def pairs_table(rows: Sequence[ScoreRow], key: MethodKey, region: str) -> str:
    """Return one method's scores over one region in Table D's shape: a row per source, a column per target."""
    cells: dict[tuple[str, str], list[ScoreRow]] = defaultdict(list)
    for row in rows:
        if row.key == key and row.region == region:
            cells[row.source, row.target].append(row)
    sources, targets = _in_order(source for source, _ in cells), _in_order(target for _, target in cells)
    lines = [
        "| PSNR (dB) / NMSE / SSIM | " + " | ".join(f"-> {target}" for target in targets) + " |",
        "|---" * (len(targets) + 1) + "|",
    ]
    for source in sources:
        texts = [summarize(cells[source, target]).text() if (source, target) in cells else "" for target in targets]
        lines.append(f"| {source} -> | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def table_d() -> str:
    """Return the paper's Table D in the same shape."""
    names = ("t1", "t2", "pd")
    lines = ["| PSNR (dB) / NMSE / SSIM | " + " | ".join(f"-> {name}" for name in names) + " |", "|---" * 4 + "|"]
    for source in names:
        texts = [" / ".join(f"{mean:.3f} ± {std:.3f}" for mean, std in TABLE_D[source, target]) for target in names]
        lines.append(f"| {source} -> | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def overview(rows: Sequence[ScoreRow], region: str) -> str:
    """Return a table with a line per method: its translations (source and target differ) and its diagonal.

    Mean and spread are over volumes: all subjects and pairs together.
    """
    lines = [
        f"| {region}: PSNR (dB) / NMSE / SSIM | translations | volumes | source = target | volumes |",
        "|---|---|---|---|---|",
    ]
    for key in methods_of(rows):
        mine = [row for row in rows if row.key == key and row.region == region]
        parts = (translations(mine), [row for row in mine if row.source == row.target])
        if mine:
            texts = [f"{summarize(part).text()} | {len(part)}" if part else " | 0" for part in parts]
            lines.append(f"| {key.label()} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def card(rows: Sequence[ScoreRow], region: str) -> str:
    """Return a table with a line per method: the mean of every score over its translations in a region."""
    means = mean_scores(rows)
    means = means[means.index.get_level_values("region") == region]
    shown = {
        name: heading for name, heading in CARD_COLUMNS.items() if name not in SOMETIMES or means[name].notna().any()
    }
    headings = [heading for heading, _ in shown.values()]
    lines = [f"| {' | '.join(['', *headings, 'volumes'])} |", "|---" * (len(headings) + 2) + "|"]
    for key, line in means.iterrows():
        method, sampler, steps, _ = key
        cells = [_number(line[name], digits) for name, (_, digits) in shown.items()]
        lines.append(f"| {MethodKey(method, sampler, steps).label()} | {' | '.join(cells)} | {line['volumes']:.0f} |")
    return "\n".join(lines)


def comparisons(rows: Sequence[ScoreRow], region: str) -> str:
    """Return a table of every two methods that translate, the better one first, largest difference first.

    Those with the method of the highest mean PSNR have a p-value, corrected for their number.
    """
    own = translations(row for row in rows if row.region == region)
    keys = methods_of(own)
    found = [compare(own, one, other, region) for i, one in enumerate(keys) for other in keys[i + 1 :]]
    known = sorted((c for c in found if c is not None), key=lambda c: -c.difference_db)
    best_db = mean_scores(own)["psnr_db"]
    best = max(keys, key=lambda key: best_db[*key, region], default=None)
    texts, heading = holm_texts({c: c.p_value for c in known if best in (c.better, c.than)})
    lines = [f"| better | than | by PSNR (dB) | 95 % interval | subjects | | {heading} |"]
    lines.append("|---|---|---|---|---|---|---|")
    for item in known:
        interval = f"{item.low_db:+.2f} to {item.high_db:+.2f}" if math.isfinite(item.low_db) else "one subject: none"
        verdict = "" if item.certain else "not certain"
        lines.append(
            f"| {item.better.label()} | {item.than.label()} | {item.difference_db:+.2f} | {interval} | "
            f"{item.num_subjects} | {verdict} | {texts.get(item, '')} |"
        )
    return "\n".join(lines)


def timings(seconds: Mapping[MethodKey, Sequence[float]]) -> str:
    """Return a table of the wall time of one volume (from model input to model output), per method."""
    lines = ["| | seconds per volume, median | slowest | volumes |", "|---|---|---|---|"]
    for key, values in seconds.items():
        lines.append(f"| {key.label()} | {np.median(values):.3f} | {max(values):.3f} | {len(values)} |")
    return "\n".join(lines)


def document(rows: Sequence[ScoreRow], *, title: str, layout: str, seconds: Mapping[MethodKey, Sequence[float]]) -> str:
    """Return the whole report as Markdown: per region an overview, who beats whom, and Table D's shape per method.

    Args:
        rows: all scores.
        title: the first heading.
        layout: of the store; with ixi the paper's Table D is printed next to ours.
        seconds: wall times of the methods that were timed.
    """
    subjects = {row.subject_id for row in rows}
    parts = [
        f"# {title}",
        f"{counted(len(subjects), 'subject')}. Mean ± standard deviation (n - 1) over subjects, in each region's first "
        "table over all its volumes. PSNR (dB) and SSIM: higher is better; NMSE: lower is better. Images in [0, 1], "
        "range 1; SSIM in 3D, Gaussian window of 11 voxels, sigma 1.5; a region's SSIM is the mean of the map over it. "
        "`volume` is "
        "the model's whole box. Synthetic images, for research use only.",
    ]
    segmented = usefulness.usefulness_table(rows)
    parts += ["## Usefulness", usefulness.verdict(rows), segmented, usefulness.NOTE] if segmented else []
    rows = of_images(rows)
    for region in dict.fromkeys(row.region for row in rows):
        parts += [f"## Region: {region}", overview(rows, region), "### All scores", CARD_NOTE, card(rows, region)]
        parts += ["### Who beats whom", COMPARISON_NOTE]
        parts += [comparisons(rows, region)]
        for key in methods_of(rows):
            if key.method in ONE_VALUE_PER_TARGET:
                continue
            parts += [f"### {key.label()}, {region}", pairs_table(rows, key, region)]
        if layout == "ixi" and region != "lesion":
            parts += ["### The paper", TABLE_D_NOTE, table_d()]
    if seconds:
        parts += ["## Time", timings(seconds)]
    return "\n\n".join(parts) + "\n"


def _in_order(names: Iterable[str]) -> list[str]:
    from aldm.data.modalities import sort_modalities

    return list(sort_modalities(names))


def _number(value: float, digits: int) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if math.isfinite(value) else "exact"
