"""Measure translators over a split of a store: every ordered pair of modalities, several samplers, reference rows.

Beside every model stand the rows that keep it honest:

* identity: the source taken for the target (source and target differ). A model below it has learnt nothing.
* training-mean: the mean training volume of the target, whatever the source.
* intensity-map, histogram-matching: the source with other intensities, voxel by voxel (references.py).
* reconstruction: the target through the codec alone, which is the ceiling of everything that decodes with it.

training-mean, intensity-map and histogram-matching are made of the training split, the store's own or another one's:
those of a modality that no training subject has are left out, all of them where there is no training subject.

With a segmenter that was trained on real volumes all of these are segmented as well (usefulness.py), and beside them:

* real: the target itself, which says how good the segmenter is.
* empty: a volume without anything in it.

Scores are taken on the model's box, on images in [0, 1] (metrics.py), over `volume` (the whole box), the store's mask
(`brain`, or `foreground` where none is marked off), `edges` (the tenth of the mask's inner voxels where the target has
the largest gradients) and `lesion` (the segmentation's voxels, where there is one).
"""

import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from aldm.config import SamplingConfig
from aldm.data.parallel import Workers, map_in_order
from aldm.data.store import SubjectRecord, VolumeStore
from aldm.errors import UserError
from aldm.metrics import to_unit
from aldm.models.segmenter import Segmenter
from aldm.references import References, fit_references
from aldm.score_rows import MethodKey, ScoreRow
from aldm.subject_scorer import SubjectScorer
from aldm.subsets import several
from aldm.translate import Translator
from aldm.translation import Request
from aldm.usefulness import EMPTY, REAL


@dataclass(frozen=True, eq=False)
class Candidate:
    """A translator and the ways of sampling it that are measured."""

    method: str
    """Its name in the scores."""
    translator: Translator
    samplings: tuple[SamplingConfig, ...]
    """At least one; the first one is the one that pictures show."""

    @classmethod
    def of(cls, translator: Translator, method: str | None = None) -> "Candidate":
        """Return a model with its own way of sampling; its name is its kind if none is given."""
        return cls(method or translator.kind, translator, (translator.sampling(),))

    def key(self, sampling: SamplingConfig) -> MethodKey:
        """Return what the scores are filed under."""
        if self.translator.kind != "aldm":
            return MethodKey(self.method, "", 0)
        return MethodKey(self.method, sampling.sampler, sampling.num_inference_steps)


@dataclass(frozen=True, eq=False)
class Example:
    """One translation, for a picture; volumes are (spatial_shape) in [0, 1]."""

    subject_id: str
    key: MethodKey
    source_name: str
    target_name: str
    source: np.ndarray
    target: np.ndarray
    prediction: np.ndarray
    uncertainty: np.ndarray | None


@dataclass
class Evaluation:
    """All that was measured."""

    rows: list[ScoreRow] = field(default_factory=list)
    several: list[ScoreRow] = field(default_factory=list)
    """Translations from several sources, joined by `+` (subsets.py), of candidates that take any."""
    seconds: dict[MethodKey, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Wall time of every translated volume, encoding and decoding included, s."""

    def extend(self, other: "Evaluation") -> None:
        """Append what was measured elsewhere."""
        self.rows += other.rows
        self.several += other.several
        for key, values in other.seconds.items():
            self.seconds[key] += values


def evaluate(
    store: VolumeStore,
    subjects: Sequence[SubjectRecord],
    candidates: Sequence[Candidate],
    *,
    seed: int = 0,
    on_example: Callable[[Example], None] | None = None,
    on_volume: Callable[[], None] | None = None,
    pair: tuple[str, str] | None = None,
    workers: Workers | None = None,
    load: Callable[[], Sequence[Candidate]] | None = None,
    segmenter: Segmenter | None = None,
    training_store: VolumeStore | None = None,
) -> Evaluation:
    """Score every candidate and the honest rows over every pair of modalities that a subject has.

    A candidate that takes any sources is scored over every two or more of them as well, with its first sampling.

    Args:
        store: prepared with the candidates' own preprocessing.
        subjects: of the store.
        candidates: at least one; the rows that keep them honest are made once.
        seed: of the samples; every (subject, source, target) has its own, the same for all candidates.
        on_example: given every translation made with a candidate's first sampling, where it was made: with `workers`
            it is sent to them, pickled.
        pair: score this (source, target) alone; None scores all, each candidate over those that it was trained for.
        on_volume: called after each translation (see `count_translations`); not called with `workers`.
        workers: measure a subject each, the rows being the same; the store's path, which must be absolute, is one that
            all of them reach. None measures in this process.
        load: returns new candidates; every worker calls it once. None sends them to the workers, pickled.
        segmenter: of the store's modalities, on the CPU; segments whatever is scored of the subjects that have labels.
        training_store: whose training split the rows are made of that need one, such as that which the model was
            trained on; None takes the store's own.

    Raises:
        UserError: no subjects, a candidate whose modalities or preprocessing are not the store's, or a training store
            that was prepared otherwise or has no training subject.
    """
    modalities = check_candidates(store, candidates)
    training = store if training_store is None else training_store
    _check_training(store, training)
    if not subjects:
        raise UserError(f"the store {store.path} has no subject to evaluate in this split")
    pairs = [(source, target) for source, target in wanted_pairs(modalities, candidates, pair) if source != target]
    references = fit_references(training, pairs)
    load = load or partial(tuple, candidates)
    measure = _SubjectTask(store, training, load, modalities, references, seed, on_example or _ignore, pair, segmenter)
    result = Evaluation()
    if workers is None:
        measure.candidates, measure.on_volume = candidates, on_volume or _ignore
        for record in subjects:
            result.extend(measure(record))
    else:
        for part in map_in_order(workers, measure, subjects, description="evaluate", unit="subject"):
            result.extend(part)
    return result


def _check_training(store: VolumeStore, training: VolumeStore) -> None:
    """Refuse another store to train on that does not fit.

    Raises:
        UserError: it was prepared otherwise, or has no training subject.
    """
    if training.preprocess != store.preprocess:
        raise UserError(
            f"the `training_store` {training.path} was prepared with {training.preprocess}, the store {store.path} "
            f"with {store.preprocess}: prepare both in the same way"
        )
    if training is not store and not training.subjects("train"):
        raise UserError(f"the `training_store` {training.path} has no training subject")


def check_candidates(store: VolumeStore, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Return the modalities that the store and all candidates know.

    Raises:
        UserError: none is shared, two candidates go by one name, or a candidate was trained on another grid.
    """
    shared = store.modalities
    for candidate in candidates:
        config = candidate.translator.config
        shared = tuple(name for name in shared if name in config.modalities)
        if config.preprocess != store.preprocess:
            raise UserError(
                f"the model {candidate.method!r} was trained with {config.preprocess}, the store {store.path} was "
                f"prepared with {store.preprocess}: prepare the data with the model's preprocessing"
            )
    if not shared:
        raise UserError(f"the store {store.path} ({', '.join(store.modalities)}) and the models share no modality")
    names = [candidate.method for candidate in candidates]
    if len(set(names)) < len(names):
        raise UserError(f"two models go by one name ({', '.join(names)}): name one, `baseline` NAME=DIR")
    return shared


def count_translations(
    store: VolumeStore,
    subjects: Sequence[SubjectRecord],
    candidates: Sequence[Candidate],
    pair: tuple[str, str] | None = None,
) -> int:
    """Return how many volumes `evaluate` will translate."""
    modalities = check_candidates(store, candidates)
    total = 0
    for record in subjects:
        pairs = wanted_pairs([name for name in record.modalities if name in modalities], candidates, pair)
        for candidate in candidates:
            own = sum(candidate.translator.translates(source, target) for source, target in pairs)
            total += own * len(candidate.samplings)
            if pair is None and candidate.translator.takes_several:
                total += len(several([name for name in record.modalities if name in modalities]))
    return total


def wanted_pairs(
    names: Sequence[str], candidates: Sequence[Candidate], pair: tuple[str, str] | None
) -> list[tuple[str, str]]:
    """Return the ordered pairs of a subject's modalities that are scored: those that any candidate translates."""
    return [
        (source, target)
        for source in names
        for target in names
        if pair in (None, (source, target))
        and any(candidate.translator.translates(source, target) for candidate in candidates)
    ]


def pair_seed(seed: int, subject_id: str, source: str, target: str) -> int:
    """Return the seed of one translation: other noise for every subject and pair, the same on every machine."""
    return seed + zlib.crc32(f"{subject_id}/{source}/{target}".encode())


def _ignore(*_: object) -> None:
    """Stand in for a callback that nobody gave."""


@dataclass(eq=False)
class _SubjectTask:
    """Measures one subject after another; the candidates are loaded for the first one and kept."""

    store: VolumeStore
    training: VolumeStore
    load: Callable[[], Sequence[Candidate]]
    modalities: tuple[str, ...]
    references: References
    seed: int
    on_example: Callable[[Example], None]
    pair: tuple[str, str] | None
    segmenter: Segmenter | None
    on_volume: Callable[[], None] = _ignore
    candidates: Sequence[Candidate] | None = None

    def __call__(self, record: SubjectRecord) -> Evaluation:
        if self.candidates is None:
            self.candidates = self.load()
        result = Evaluation()
        names = tuple(name for name in record.modalities if name in self.modalities)
        volumes = {name: self.store.volume(record.subject_id, name) for name in names}
        scorer = SubjectScorer(result.rows, self.store, record, volumes, self.segmenter)
        pairs = wanted_pairs(names, self.candidates, self.pair)
        _score_references(scorer, self.training, self.references, pairs, self.candidates)
        for candidate in self.candidates:
            for source in names:
                targets = [
                    end for begin, end in pairs if begin == source and candidate.translator.translates(begin, end)
                ]
                if not targets:
                    continue
                _score_candidate(
                    candidate,
                    source,
                    targets,
                    volumes,
                    scorer,
                    result.seconds,
                    self.seed,
                    self.on_example,
                    self.on_volume,
                )
            if self.pair is None and candidate.translator.takes_several:
                _score_several(candidate, volumes, scorer, result, self.on_volume)
        return result


def _score_several(
    candidate: Candidate,
    volumes: Mapping[str, np.ndarray],
    scorer: SubjectScorer,
    result: Evaluation,
    on_volume: Callable[[], None],
) -> None:
    """Score translations from every two or more of a subject's modalities. Each is encoded once."""
    translator, sampling = candidate.translator, candidate.samplings[0]
    codes = {name: translator.encode(volume) for name, volume in volumes.items()}
    for sources, target in several(tuple(volumes)):
        request = Request({name: codes[name] for name in sources}, target, 0)
        (made,) = translator.translate_batch([request], sampling=sampling)
        scores = scorer.scores(target, made.mean, made.half_width)
        scorer.file(candidate.key(sampling), request.source, target, scores, result.several)
        on_volume()


def _score_references(
    scorer: SubjectScorer,
    training: VolumeStore,
    references: References,
    pairs: Sequence[tuple[str, str]],
    candidates: Sequence[Candidate],
) -> None:
    """Score the reference rows: training mean, identity, the references fitted to training subjects, the codec."""
    codec_of = next((c.translator for c in candidates if c.translator.kind == "aldm"), None)
    for target in dict.fromkeys(end for _, end in pairs):
        mean = scorer.scores(target, training.training_mean(target)) if target in training.trained_modalities else None
        for source in [begin for begin, end in pairs if end == target]:
            if mean is not None:
                scorer.file(MethodKey("training-mean", "", 0), source, target, mean)
            if source == target:
                continue
            x = scorer.truth(source).image * 2 - 1
            scorer.add(MethodKey("identity", "", 0), source, target, x)
            for method, prediction in references.predictions(x, scorer.mask, source, target):
                scorer.add(MethodKey(method, "", 0), source, target, prediction)
        if codec_of is not None:
            truth = (scorer.truth(target).image * 2 - 1).astype(np.float32)
            scorer.add(MethodKey("reconstruction", "", 0), target, target, codec_of.reconstruct(truth))
        if scorer.segments:
            real = scorer.truth(target).image * 2 - 1
            for method, x in ((REAL, real), (EMPTY, np.full_like(real, -1))):
                scorer.file(MethodKey(method, "", 0), target, target, scorer.overlaps(target, x))


def _score_candidate(
    candidate: Candidate,
    source: str,
    targets: Sequence[str],
    volumes: Mapping[str, np.ndarray],
    scorer: SubjectScorer,
    seconds: dict[MethodKey, list[float]],
    seed: int,
    on_example: Callable[[Example], None],
    on_volume: Callable[[], None],
) -> None:
    """Translate one source into some targets in every way, and score it. The source is encoded once."""
    translator = candidate.translator
    start = time.perf_counter()
    code = translator.encode(volumes[source])
    encoding_s = time.perf_counter() - start
    for target in targets:
        for sampling in candidate.samplings:
            start = time.perf_counter()
            made = translator.translate_encoded(
                code, source, target, sampling=sampling, seed=pair_seed(seed, scorer.subject_id, source, target)
            )
            key = candidate.key(sampling)
            seconds[key].append(encoding_s + time.perf_counter() - start)
            scorer.add(key, source, target, made.mean, made.half_width)
            if sampling is candidate.samplings[0]:
                on_example(
                    Example(
                        scorer.subject_id,
                        key,
                        source,
                        target,
                        scorer.truth(source).image,
                        scorer.truth(target).image,
                        to_unit(made.mean),
                        None if made.half_width is None else made.half_width / 2,
                    )
                )
            on_volume()
