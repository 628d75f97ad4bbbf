"""An evaluation from its settings to the folder of its results, as `aldm evaluate` makes one."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from aldm.data.labels import has_structure
from aldm.data.parallel import Workers, remove_leftovers
from aldm.data.store import SubjectRecord, VolumeStore
from aldm.errors import UserError
from aldm.evaluation import Candidate, Evaluation, check_candidates, count_translations, evaluate
from aldm.evaluation_files import draw_panel, write_evaluation, write_record
from aldm.evaluation_settings import EVALUATION_FILE, SCORES_FILE, EvaluationSettings
from aldm.files import atomic_folder, check_folder
from aldm.models.segmenter import Segmenter
from aldm.progress import progress
from aldm.segmenter_stage import load_segmenter

logger = logging.getLogger(__name__)


def evaluate_models(
    settings: EvaluationSettings, candidates: Sequence[Candidate], out: str | Path, *, overwrite: bool = False
) -> Evaluation:
    """Measure models in this process and write scores, tables, pictures and record into a folder.

    Args:
        settings: what is measured.
        candidates: at least one; the first is the model, the others stand beside it.
        out: the folder; it appears when everything is measured.
        overwrite: replace an earlier evaluation there.

    Raises:
        UserError: as `EvaluationPlan.check`, or the folder is there.
    """
    check_folder(out, overwrite, marker=SCORES_FILE)
    return EvaluationPlan.check(settings, candidates).run(Path(out), overwrite=overwrite)


@dataclass(frozen=True, eq=False, kw_only=True)
class EvaluationPlan:
    """Subjects and models that go together."""

    settings: EvaluationSettings
    store: VolumeStore
    training_store: VolumeStore | None
    subjects: Sequence[SubjectRecord]
    candidates: Sequence[Candidate]
    modalities: tuple[str, ...]
    """Those that the store and all models know."""
    total: int
    """How many volumes will be translated."""
    segmenter: Segmenter | None
    segmenter_hash: str | None

    @classmethod
    def check(cls, settings: EvaluationSettings, candidates: Sequence[Candidate]) -> "EvaluationPlan":
        """Open the stores and check that everything goes together.

        Raises:
            UserError: no such store or segmenter, no subject in the split, or models and volumes that do not fit.
        """
        store = VolumeStore.open(settings.store.absolute())  # workers elsewhere have another working folder
        subjects = store.subjects(settings.split)[: settings.max_subjects]
        modalities = check_candidates(store, candidates)
        if not subjects:
            own = " and ".join(dict.fromkeys(record.split for record in store.subjects()))
            raise UserError(
                f"the store {settings.store} has no subject in the split {settings.split}, only in {own}: give another "
                "`split`"
            )
        left_out = [name for name in store.modalities if name not in modalities]
        if left_out:
            logger.warning("not every model knows %s: left out", ", ".join(left_out))
        if settings.pair is not None:
            for candidate in candidates:
                candidate.translator.check_pair(*settings.pair)
        segmenter, segmenter_hash = _segmenter(settings, store, subjects)
        total = count_translations(store, subjects, candidates, settings.pair)
        if not total:
            raise UserError("no subject of the split has a pair of modalities that a model was trained for")
        training = settings.training_store
        return cls(
            settings=settings,
            store=store,
            training_store=None if training is None else VolumeStore.open(training.absolute()),
            subjects=subjects,
            candidates=candidates,
            modalities=modalities,
            total=total,
            segmenter=segmenter,
            segmenter_hash=segmenter_hash,
        )

    def run(
        self,
        out: Path,
        *,
        overwrite: bool = False,
        workers: Workers | None = None,
        load: Callable[[], Sequence[Candidate]] | None = None,
    ) -> Evaluation:
        """Measure, and write the folder.

        Args:
            out: the folder; it appears when everything is measured.
            overwrite: replace an earlier evaluation there.
            workers: measure a subject each; None measures in this process, with a progress bar.
            load: returns the candidates again, in a worker; see `evaluate`.
        """
        with atomic_folder(out, overwrite, marker=SCORES_FILE) as folder, self._progress(workers) as bar:
            pictured = {record.subject_id for record in self.subjects[: self.settings.pictures]}
            result = evaluate(
                self.store,
                self.subjects,
                self.candidates,
                seed=self.settings.seed,
                on_example=partial(draw_panel, pictured=pictured, store=self.store, folder=folder.absolute()),
                on_volume=None if bar is None else bar.update,
                pair=self.settings.pair,
                workers=workers,
                load=load,
                segmenter=self.segmenter,
                training_store=self.training_store,
            )
            remove_leftovers(folder)
            write_evaluation(folder, result, self.store, self.settings.split)
            write_record(folder / EVALUATION_FILE, self.candidates, self.store, self.settings, self.segmenter_hash)
        return result

    def _progress(self, workers: Workers | None) -> Any:
        """Return the progress bar of the volumes; workers show one of their own."""
        if workers is not None:
            return nullcontext()
        return progress(total=self.total, description="evaluate", unit="volume")


def _segmenter(
    settings: EvaluationSettings, store: VolumeStore, subjects: Sequence[SubjectRecord]
) -> tuple[Segmenter | None, str | None]:
    """Return the segmenter and its hash, if one is wanted.

    Raises:
        UserError: as `load_segmenter`, or no subject has labels to hold it against.
    """
    if settings.segmenter is None:
        return None, None
    segmenter, digest = load_segmenter(settings.segmenter, store)
    names = segmenter.structures
    if not any(all(has_structure(record, name) for name in names) for record in subjects):
        raise UserError(
            f"no subject of the split {settings.split} of {settings.store} has labels of {', '.join(names)}: leave "
            "`segmenter` out, or give another `split`"
        )
    return segmenter, digest
