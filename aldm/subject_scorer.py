"""The scores of one subject: its true volumes with their regions, and the rows that are filed."""

from collections.abc import Mapping
from dataclasses import asdict

import numpy as np

from aldm.data.store import SubjectRecord, VolumeStore
from aldm.metrics import Scores, Truth, edges, to_unit
from aldm.score_rows import MethodKey, ScoreRow


class SubjectScorer:
    """Scores images against a subject's volumes; each of these is filtered once, when it is first asked for."""

    def __init__(
        self, rows: list[ScoreRow], store: VolumeStore, record: SubjectRecord, volumes: Mapping[str, np.ndarray]
    ) -> None:
        """Read the subject's masks.

        Args:
            rows: where `file` appends.
            store: of the subject.
            record: the subject.
            volumes: modality -> true volume, (spatial_shape) in [-1, 1].
        """
        self.rows, self.subject_id, self._volumes = rows, record.subject_id, volumes
        self.mask, self._name = store.mask(record.subject_id), record.region
        labels = store.seg(record.subject_id)
        self._lesion = None if labels is None else labels > 0
        self._truths: dict[str, Truth] = {}

    def truth(self, name: str) -> Truth:
        """Return a volume of the subject with its regions; one without a voxel in the box is left out."""
        if name not in self._truths:
            x = to_unit(self._volumes[name])
            masks = {self._name: self.mask, "edges": edges(x, self.mask)}
            if self._lesion is not None:
                masks["lesion"] = self._lesion
            self._truths[name] = Truth(x, {"volume": None} | {name: mask for name, mask in masks.items() if mask.any()})
        return self._truths[name]

    def add(self, key: MethodKey, source: str, target: str, prediction: np.ndarray) -> None:
        """Score a prediction in [-1, 1] and file it."""
        self.file(key, source, target, self.scores(target, prediction))

    def scores(self, target: str, prediction: np.ndarray) -> dict[str, Scores]:
        """Return the scores of a prediction in [-1, 1] over each region."""
        return self.truth(target).score(to_unit(prediction))

    def file(
        self,
        key: MethodKey,
        source: str,
        target: str,
        scores: Mapping[str, Scores],
        rows: list[ScoreRow] | None = None,
    ) -> None:
        """Append a row per region, to `rows` in place of the subject's where they are given."""
        for region, values in scores.items():
            (self.rows if rows is None else rows).append(
                ScoreRow(
                    self.subject_id,
                    key.method,
                    source,
                    target,
                    key.sampler,
                    key.num_inference_steps,
                    region,
                    **asdict(values),
                )
            )
