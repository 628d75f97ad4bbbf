"""`aldm translate` on this machine: a translator folder, loaded once, makes one task after another."""

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aldm.cli import with_flags
from aldm.config import SamplingConfig
from aldm.default_model import DESCRIPTION as DEFAULT_MODEL
from aldm.default_model import default_model
from aldm.errors import UserError
from aldm.likeness import Likeness
from aldm.pairs import check_pair, check_sources, pair_is_known
from aldm.progress import progress
from aldm.provenance import likeness_of
from aldm.words import counted
from pipelines.arguments import ConfigChanges
from pipelines.translate_files import (
    NO_SPREAD,
    NO_UNCERTAINTY,
    Task,
    read_input,
    read_others,
    writing,
)
from pipelines.translator_arguments import TranslatorOptions, load_translator, model_config

if TYPE_CHECKING:
    from aldm.data.volume import Volume
    from aldm.translate import Translator

logger = logging.getLogger(__name__)


class LocalModel:
    """A translator folder, loaded when it is first used."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Read what the model is.

        Raises:
            UserError: not a translator folder, or flags that do not go with it.
        """
        self._args = args
        if args.token_file is not None:
            raise UserError("--token-file is for --server: leave it out")
        if args.model is None:
            logger.info("no --model: %s", DEFAULT_MODEL)
        self._folder = default_model() if args.model is None else args.model
        self._config = model_config(self._folder, ConfigChanges.of(args))
        from aldm.checkpoint import read_checkpoint_record

        self._kind = read_checkpoint_record(self._folder)["kind"]
        self._loaded: tuple[Translator, SamplingConfig]

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that the model knows."""
        return self._config.modalities

    def translates(self, source: str, target: str) -> bool:
        """Whether the model was trained for that."""
        return pair_is_known(self._config, self._kind, source, target)

    def check_pair(self, source: str, target: str) -> None:
        """Refuse what the model was not trained for."""
        check_pair(self._config, self._kind, source, target)

    def check_sources(self, sources: Sequence[str], target: str) -> None:
        """Refuse several sources that the model was not trained for."""
        check_sources(self._config, self._kind, sources, target)

    def load(self) -> None:
        """Load the model.

        Raises:
            UserError: a damaged folder, a sampler that does not go with it, or too little memory.
        """
        args = self._args
        translator = load_translator(self._folder, self._config, TranslatorOptions.of(args))
        sampling = translator.sampling(args.sampler, args.num_inference_steps, args.num_samples, args.eta)
        if args.spread is not None and sampling.num_samples < 2:
            raise UserError(NO_SPREAD)
        if args.uncertainty is not None and not translator.has_uncertainty(sampling):
            raise UserError(NO_UNCERTAINTY)
        self._loaded = translator, sampling

    def make(self, task: Task) -> Likeness | None:
        """Translate one input into every target; all results appear, or none. Return how unlike the training it is."""
        args = self._args
        likeness = None
        translator, sampling = self._loaded
        with writing(task, format=args.format, overwrite=args.overwrite, keep_patient=args.keep_patient) as writer:
            volume, source = read_input(task, args.max_voxels, args.series)
            others = read_others(task, args.max_voxels, args.series)
            for note in () if task.is_series else source.notes:  # of a series it is said already
                logger.warning("%s: %s", task.path, note)
            targets = [output.target for output in task.outputs]
            with progress(description=task.path.name, unit="step") as bar:

                def step(done: int, total: int) -> None:  # the first one says how many there are, over all boxes
                    bar.update()
                    bar.set_remaining(total * len(targets) - bar.done)

                results = translator.translate_each(
                    volume,
                    task.source,
                    targets,
                    sampling=sampling,
                    seed=args.seed,
                    intensity=args.intensity,
                    others={name: other for name, (other, _) in others.items()},
                    on_step=step,
                )
                for output, result in zip(task.outputs, results, strict=True):
                    result.provenance["input"] = task.path.name
                    likeness = likeness_of(result.provenance)
                    result.provenance.update(task.inputs)
                    if source.notes:
                        result.provenance["notes"] = list(source.notes)
                    writer.write(output, result, source, [other for _, other in others.values()])
        if likeness is not None and likeness.is_unlike and not args.accept_unlike:
            logger.warning("%s: %s", task.path, with_flags(likeness.words()))
        return likeness

    def count_boxes(self, volume: "Volume") -> int:
        """Return how many boxes of the model's shape a volume takes."""
        return self._loaded[0].count_boxes(volume)

    def describe(self) -> list[str]:
        """Return how it would sample and how much memory that takes."""
        from aldm.memory import gigabytes, resident_bytes

        translator, sampling = self._loaded
        held, needed = resident_bytes(), translator.predictor.needed_bytes()
        lines = [
            f"memory: program and weights {gigabytes(held)} GB, a translation at least {gigabytes(needed)} GB more"
        ]
        if translator.kind == "aldm":
            steps, samples = counted(sampling.num_inference_steps, "step"), counted(sampling.num_samples, "sample")
            how = f"{steps}, {samples}, eta {sampling.eta:g}"
            lines.insert(0, f"sampler {sampling.sampler}, {how}, seed {self._args.seed}")
        return lines
