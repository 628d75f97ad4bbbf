"""What an evaluation measures, and the names of the files that it leaves. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aldm.errors import UserError

SUBSETS, SUBSETS_PICTURE = "subsets.csv", "subsets.png"
SCORES_FILE, PARQUET, TABLES, TIMES, QUALITY_PICTURE, EVALUATION_FILE, PICTURES = (
    "scores.csv",
    "scores.parquet",
    "scores.md",
    "times.csv",
    "quality.png",
    "evaluation.json",
    "pictures",
)


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The volumes that models are measured on, and what is measured beside the models.

    Attributes:
        store: folder of prepared volumes.
        split: train, validation or test.
        max_subjects: the first so many of the split; None takes all.
        pair: score this (source, target) alone; None scores every pair that a model was trained for.
        seed: of the samples.
        pictures: subjects that panels are drawn of.
        training_store: whose training split the rows are made of that need one; None takes the store's own.
        segmenter: run folder of a segmenter that shows how useful the volumes are; None measures without one.
        champion: name, version and hash of the registered model that is among the models, for the record.

    Raises:
        UserError: a number out of range.
    """

    store: Path
    split: str = "test"
    max_subjects: int | None = None
    pair: tuple[str, str] | None = None
    seed: int = 0
    pictures: int = 1
    training_store: Path | None = None
    segmenter: Path | None = None
    champion: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.pictures < 0:
            raise UserError(f"`pictures` is {self.pictures}, wanted at least 0")
        if self.max_subjects is not None and self.max_subjects < 1:
            raise UserError(f"`max_subjects` is {self.max_subjects}, wanted at least 1")
