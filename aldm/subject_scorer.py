"""The scores of one subject: its true volumes with their regions, and the rows that are filed."""

from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np

from aldm.data.labels import has_structure, label_map
from aldm.data.store import SubjectRecord, VolumeStore
from aldm.metrics import Scores, Truth, edges, to_unit
from aldm.models.segmenter import Segmenter
from aldm.score_rows import SEGMENTED, MethodKey, ScoreRow
from aldm.segmentation import Overlap, TrueStructure


class SubjectScorer:
    """Scores images against a subject's volumes; each of these is filtered once, when it is first asked for."""

    def __init__(
        self,
        rows: list[ScoreRow],
        store: VolumeStore,
        record: SubjectRecord,
        volumes: Mapping[str, np.ndarray],
        segmenter: Segmenter | None = None,
    ) -> None:
        """Read the subject's masks.

        Args:
            rows: where `file` appends.
            store: of the subject.
            record: the subject.
            volumes: modality -> true volume, (spatial_shape) in [-1, 1].
            segmenter: trained on real volumes; it segments whatever is scored. None segments nothing.
        """
        self.rows, self.subject_id, self._volumes = rows, record.subject_id, volumes
        self.mask, self._name = store.mask(record.subject_id), record.region
        labels = store.seg(record.subject_id)
        self._lesion = None if labels is None else labels > 0
        self._truths: dict[str, Truth] = {}
        self._segmenter = segmenter
        known = () if segmenter is None else segmenter.structures
        self._structures: dict[int, TrueStructure] = {}
        """Label -> where the structure truly is; empty where the subject has not all files that say so."""
        if known and all(has_structure(record, name) for name in known):
            true = label_map(store, record.subject_id, known)
            spacing_mm = store.preprocess.spacing_mm
            self._structures = {i: TrueStructure(true == i, spacing_mm) for i in range(1, len(known) + 1)}

    @property
    def segments(self) -> bool:
        """Whether what is scored is segmented."""
        return bool(self._structures)

    def truth(self, name: str) -> Truth:
        """Return a volume of the subject with its regions; one without a voxel in the box is left out."""
        if name not in self._truths:
            x = to_unit(self._volumes[name])
            masks = {self._name: self.mask, "edges": edges(x, self.mask)}
            if self._lesion is not None:
                masks["lesion"] = self._lesion
            self._truths[name] = Truth(x, {"volume": None} | {name: mask for name, mask in masks.items() if mask.any()})
        return self._truths[name]

    def add(
        self, key: MethodKey, source: str, target: str, prediction: np.ndarray, half_width: np.ndarray | None = None
    ) -> None:
        """Score a prediction in [-1, 1] and file it; see `scores`."""
        self.file(key, source, target, self.scores(target, prediction, half_width))

    def scores(
        self, target: str, prediction: np.ndarray, half_width: np.ndarray | None = None
    ) -> dict[str, Scores | Overlap]:
        """Return the scores of a prediction in [-1, 1] over each region, and of each structure that is found in it.

        Args:
            target: its modality.
            prediction: (spatial_shape).
            half_width: half of the interval around it, on the same scale, where the model gives one.
        """
        truth, image = self.truth(target), to_unit(prediction)
        scores = truth.score(image, None if half_width is None else half_width / 2)
        if self._name in scores:
            scores[self._name] = replace(scores[self._name], **truth.after_gain(image, self._name))
        return {**scores, **self.overlaps(target, prediction)}

    def overlaps(self, target: str, prediction: np.ndarray) -> dict[str, Overlap]:
        """Return how well the target's segmenter finds each structure in a prediction in [-1, 1]."""
        if self._segmenter is None or not self._structures:
            return {}
        names = self._segmenter.structures
        found = self._segmenter.segment(np.clip(prediction, -1, 1), target)
        return {SEGMENTED + names[i - 1]: true.score(found == i) for i, true in self._structures.items()}

    def file(
        self,
        key: MethodKey,
        source: str,
        target: str,
        scores: Mapping[str, Scores | Overlap],
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
