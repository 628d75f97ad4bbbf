"""Rows of scores: one translated volume over one region each, their files, and the one place where means are taken.

A method is a model with its sampler and number of network evaluations, or one of the rows that keep a model honest
(evaluation.py): REFERENCES, and the codec's reconstruction. A row is of an image's scores over a region, or of what a
segmenter finds in the image of one structure; the other's scores are NaN in it.
"""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from aldm.files import atomic_path
from aldm.metrics import Scores
from aldm.segmentation import Overlap

if TYPE_CHECKING:
    import pandas

REFERENCES = ("identity", "training-mean", "intensity-map", "histogram-matching")
"""Methods that need no network; every evaluation of a store has the same rows of them."""
SCORE_COLUMNS = tuple(field.name for field in fields(Scores))
"""Columns of an image's scores, in their order."""
OVERLAPS = tuple(field.name for field in fields(Overlap))
"""Columns of the scores of a segmentation, in their order."""
SEGMENTED = "segmented "
"""What stands before a structure's name in the region of a row with the scores of a segmentation."""
GROUP = ("method", "sampler", "num_inference_steps", "region")
"""What `mean_scores` takes means for."""


class MethodKey(NamedTuple):
    """What a score belongs to, besides the subject and the pair."""

    method: str
    sampler: str
    num_inference_steps: int

    def label(self) -> str:
        """Return the words for a table."""
        steps = f" {self.num_inference_steps}" if self.num_inference_steps else ""
        return f"{self.method} ({self.sampler}{steps})" if self.sampler else self.method


@dataclass(frozen=True)
class ScoreRow:
    """One line of scores.csv."""

    subject_id: str
    method: str
    """aldm, unet, one of REFERENCES, reconstruction, or where a segmenter is measured real or empty."""
    source: str
    target: str
    sampler: str
    """Empty where there is none."""
    num_inference_steps: int
    """Network evaluations per sample; 0 where there is no sampler."""
    region: str
    """volume, brain (or foreground), edges, lesion; or SEGMENTED and a structure."""
    psnr_db: float = math.nan
    nmse: float = math.nan
    ssim: float = math.nan
    mae: float = math.nan
    """Like the scores below NaN in what earlier versions wrote."""
    ms_ssim: float = math.nan
    nmi: float = math.nan
    sharpness: float = math.nan
    dice: float = math.nan
    hd95_mm: float = math.nan
    volume_ml: float = math.nan
    volume_error_ml: float = math.nan
    coverage: float = math.nan
    error_ratio: float = math.nan
    gain_psnr_db: float = math.nan
    gain_ssim: float = math.nan

    @property
    def key(self) -> MethodKey:
        """What the score belongs to."""
        return MethodKey(self.method, self.sampler, self.num_inference_steps)


def write_csv(path: Path, rows: Sequence[ScoreRow], *, overwrite: bool = False) -> None:
    """Write scores.csv: a header with ScoreRow's field names and a line per row."""
    with atomic_path(path, overwrite=overwrite) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([field.name for field in fields(ScoreRow)])
        writer.writerows(astuple(row) for row in rows)


def read_csv(path: Path) -> list[ScoreRow]:
    """Read what `write_csv` wrote."""
    kinds = {
        field.name: {"int": int, "float": float}.get(str(getattr(field.type, "__name__", "")), str)
        for field in fields(ScoreRow)
    }
    with path.open(newline="") as stream:
        return [
            ScoreRow(**{name: kind(line[name]) for name, kind in kinds.items() if name in line})
            for line in csv.DictReader(stream)
        ]


def frame(rows: Iterable[ScoreRow]) -> "pandas.DataFrame":
    """Return the rows as one table: a line per row, ScoreRow's fields as columns."""
    import pandas

    names = [field.name for field in fields(ScoreRow)]
    table = pandas.DataFrame([astuple(row) for row in rows], columns=names)
    return table.astype(dict.fromkeys(SCORE_COLUMNS + OVERLAPS, float) | {"num_inference_steps": int})


def write_parquet(path: Path, rows: Iterable[ScoreRow], *, overwrite: bool = False) -> None:
    """Write the table of `frame` as Parquet; what is not defined is null."""
    with atomic_path(path, overwrite=overwrite) as temporary:
        frame(rows).to_parquet(temporary, engine="pyarrow", index=False)


def of_images(rows: Iterable[ScoreRow]) -> list[ScoreRow]:
    """Return the rows of images' scores, without those of segmentations."""
    return [row for row in rows if not row.region.startswith(SEGMENTED)]


def translations(rows: Iterable[ScoreRow]) -> list[ScoreRow]:
    """Return the rows whose source and target differ: means and comparisons of methods are over these alone."""
    return [row for row in rows if row.source != row.target]


def mean_scores(rows: Sequence[ScoreRow], *, with_codec: bool = False) -> "pandas.DataFrame":
    """Return the mean of every score over the translations of each method in each region.

    Args:
        rows: all scores.
        with_codec: whether a method that translates nothing (reconstruction) gets its mean over its own volumes; it has
            no line otherwise.

    Returns:
        a line per (method, sampler, num_inference_steps, region), the index, in the order of their first rows; the
        columns are SCORE_COLUMNS and OVERLAPS, whose means leave NaN out, and `volumes`, their number.
    """
    counted = translations(rows)
    if with_codec:
        translate = {(row.key, row.region) for row in counted}
        counted = [row for row in rows if row.source != row.target or (row.key, row.region) not in translate]
    groups = frame(counted).groupby(list(GROUP), sort=False)
    means = groups[[*SCORE_COLUMNS, *OVERLAPS]].mean()
    means["volumes"] = groups.size()
    return means
