"""`aldm evaluate`: score a translator, and what stands beside it, over all pairs of modalities of a store."""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from aldm.config import SAMPLERS, Config, SamplingConfig
from aldm.errors import UserError
from aldm.evaluation_settings import (
    PARQUET,
    PICTURES,
    QUALITY_PICTURE,
    SCORES_FILE,
    SUBSETS,
    SUBSETS_PICTURE,
    TABLES,
    TIMES,
    EvaluationSettings,
)
from aldm.files import check_folder
from aldm.words import counted
from pipelines.arguments import ConfigChanges, JobParser, job_parser
from pipelines.ray_pool import WantedWorkers, add_worker_arguments, open_workers
from pipelines.translator_arguments import (
    TranslatorOptions,
    add_translator_arguments,
    check_seed,
    load_translator,
    model_config,
)

if TYPE_CHECKING:
    from aldm.evaluation import Candidate
    from aldm.evaluation_plan import EvaluationPlan
    from aldm.score_rows import ScoreRow
    from aldm.translate import Translator
    from pipelines.champion import Champion
    from pipelines.ray_pool import RayWorkers

logger = logging.getLogger(__name__)

DESCRIPTION = f"""Score a translator over every ordered pair of modalities of a store's split that it was trained for:
PSNR, NMSE, SSIM, MAE, MS-SSIM, NMI and sharpness over the whole volume, the brain, its edges and, where there is a
segmentation, the lesion. Beside it stand the source itself (identity), the training set's mean volume, the source with
its intensities mapped (intensity-map, histogram-matching), the codec alone (reconstruction) and other translators
(--baseline). A store of test subjects alone, such as those of another site, has no rows made of training subjects,
unless --training-store names another store that has some.
--segmenter adds how well a fixed segmenter does on all of these. Writes {SCORES_FILE}, the same table as {PARQUET},
{TABLES}, {TIMES}, {QUALITY_PICTURE} and {PICTURES}/. A model that takes any sources is scored over every subset of
them too ({SUBSETS}, {SUBSETS_PICTURE})."""
ALL = "all"
STEPS_OF_ALL = {"ddpm": (), "one-step": (1,)}
"""Steps that --samplers all measures; () is the whole training chain, and samplers not named here take (4, 10, 50)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm evaluate ARGUMENTS`.

    Raises:
        UserError: everything that the user can fix.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.model is None and not args.self_test:
        parser.error("the following arguments are required: --model")
    check_seed(args.seed)
    settings = _settings(args)
    check_folder(args.out, args.overwrite, marker=SCORES_FILE)
    if args.self_test:
        from pipelines.evaluation_self_test import run_self_test

        _check_no_model(args)
        return run_self_test(settings, args.out, overwrite=args.overwrite, dry_run=args.dry_run)
    if args.group is not None:
        from pipelines.tracking_server import check_server, tracking_uri

        check_server(tracking_uri(args.out))
    from pipelines.champion import measured_champion

    with measured_champion(args.champion, args.out) as champion:
        return _run(args, settings, champion)


def _check_no_model(args: argparse.Namespace) -> None:
    """Refuse flags that --self-test has no use for."""
    names = ("model", "baseline", "champion", "source", "target", "segmenter", "group")
    given = [name for name in names if getattr(args, name)]
    if given:
        raise UserError(f"--self-test measures the scores and no model: leave out --{', --'.join(given)}")


def _run(args: argparse.Namespace, settings: EvaluationSettings, champion: "Champion | None") -> int:
    """Measure what the flags name, the champion among it."""
    if (args.source is None) != (args.target is None):
        raise UserError("--source and --target go together: give both for one pair, or none for all")
    from aldm.evaluation_plan import EvaluationPlan
    from aldm.score_rows import of_images
    from aldm.score_table import overview

    models = _models(args, champion)
    if champion is not None:
        settings = replace(settings, champion=asdict(champion.model))
    plan = EvaluationPlan.check(settings, [model.candidate for model in models])
    with open_workers(WantedWorkers.of(args), use_gpus=True) as workers:
        load = None if workers is None else _loader(models, workers.device, args)
        if args.dry_run:
            return _dry_run(plan, workers)
        result = plan.run(args.out, overwrite=args.overwrite, workers=workers, load=load)
    rows = of_images(result.rows)
    print("\n\n".join(overview(rows, region) for region in dict.fromkeys(row.region for row in rows)))
    if plan.segmenter is not None:
        _print_usefulness(result.rows)
    print(f"\nall tables: {args.out / TABLES}")
    if args.group is not None:
        from pipelines.evaluation_tracking import log_evaluation

        log_evaluation(args.out, group=args.group)
    return 0


def _settings(args: argparse.Namespace) -> EvaluationSettings:
    """Return what the flags say that is measured.

    Raises:
        UserError: a number out of range.
    """
    return EvaluationSettings(
        store=args.store,
        split=args.split,
        max_subjects=args.max_subjects,
        pair=None if args.source is None or args.target is None else (args.source, args.target),
        seed=args.seed,
        pictures=args.pictures,
        training_store=args.training_store,
        segmenter=args.segmenter,
    )


def _print_usefulness(rows: Sequence["ScoreRow"]) -> None:
    """Print what the segmenter found, its Dice on real volumes first; warn where that is poor."""
    from aldm import usefulness

    poor = [name for name, dice in usefulness.real_dice(rows).items() if not dice >= usefulness.LEAST_DICE]
    if poor:
        logger.warning("the segmenter is too poor to judge anything by it: %s", ", ".join(poor))
    print(f"\n{usefulness.verdict(rows)}\n\n{usefulness.usefulness_table(rows)}")


@dataclass(frozen=True, eq=False)
class _Model:
    """A candidate and the folder that it was read from."""

    folder: Path
    candidate: "Candidate"


def _models(args: argparse.Namespace, champion: "Champion | None") -> list[_Model]:
    """Load --model, every --baseline and the champion; where workers measure, on the CPU, to know what there is."""
    from aldm.default_model import default_model
    from aldm.evaluation import Candidate
    from aldm.starting_model import DEFAULT
    from pipelines.champion import METHOD

    options = TranslatorOptions.of(args)
    if args.num_workers is not None:
        options = replace(options, device="cpu")
    model = load_translator(args.model, model_config(args.model, ConfigChanges.of(args)), options)
    models = [_Model(args.model, Candidate(model.kind, model, _samplings(model, args)))]
    beside = [*args.baseline, *([] if champion is None else [f"{METHOD}={champion.folder}"])]
    for text in beside:
        name, separator, folder = text.partition("=")
        word = folder if separator else text
        path = default_model() if word == DEFAULT else Path(word)
        only_precision = ConfigChanges(precision=args.precision)  # --preset and --set are for --model
        other = load_translator(path, model_config(path, only_precision), options)
        models.append(_Model(path, Candidate.of(other, name if separator else None)))
    return models


def _loader(models: Sequence[_Model], device: str, args: argparse.Namespace) -> Callable[[], list["Candidate"]]:
    """Return what loads the candidates in a worker.

    Raises:
        UserError: a memory limit for workers on GPUs.
    """
    if device == "cuda" and args.max_memory_gb is not None:
        raise UserError("--max-memory-gb bounds the memory of a CPU: leave it out, or give --device cpu")
    scratch = None if args.scratch_dir is None else args.scratch_dir.absolute()
    options = replace(TranslatorOptions.of(args), device=device, scratch_dir=scratch)
    known = [
        (model.candidate.method, model.folder.absolute(), model.candidate.translator.config, model.candidate.samplings)
        for model in models
    ]
    return partial(_load, known, options)


def _load(
    known: Sequence[tuple[str, Path, Config, tuple[SamplingConfig, ...]]], options: TranslatorOptions
) -> list["Candidate"]:
    """Load candidates from their folders."""
    from aldm.evaluation import Candidate

    return [
        Candidate(method, load_translator(folder, config, options), samplings)
        for method, folder, config, samplings in known
    ]


def _samplings(model: "Translator", args: argparse.Namespace) -> tuple[SamplingConfig, ...]:
    """Return the ways of sampling that are measured, the model's own first.

    Raises:
        UserError: a sampler that does not go with the model, or something that is not SAMPLER:STEPS.
    """
    from aldm.sampling import allowed_samplers

    own = model.sampling(num_samples=args.num_samples)
    wanted: list[SamplingConfig] = [own]
    texts = list(args.samplers)
    if model.kind != "aldm" and texts:
        raise UserError(f"--samplers: a {model.kind} model has no sampler")
    if texts == [ALL]:
        length = model.config.diffusion.num_train_timesteps
        texts = []
        for name in allowed_samplers(model.config.diffusion.objective):
            steps = STEPS_OF_ALL.get(name, (4, 10, 50)) or (length,)
            texts += [f"{name}:{count}" for count in steps if count <= length]
    for text in texts:
        name, separator, count = text.partition(":")
        if separator and not count.isdigit():
            raise UserError(f"--samplers {text!r} is not of the form SAMPLER:STEPS, such as ddim:10")
        wanted.append(model.sampling(name, int(count) if separator else None, args.num_samples))
    return tuple(dict.fromkeys(wanted))


def _dry_run(plan: "EvaluationPlan", workers: "RayWorkers | None") -> int:
    """Say what would be measured and how much memory that takes."""
    from aldm.memory import gigabytes, resident_bytes

    subjects, translations = counted(len(plan.subjects), "subject"), counted(plan.total, "translation")
    print(f"{subjects}, modalities {', '.join(plan.modalities)}: {translations}")
    for candidate in plan.candidates:
        ways = ", ".join(candidate.key(sampling).label() for sampling in candidate.samplings)
        needed = resident_bytes() + candidate.translator.predictor.needed_bytes()
        print(f"{candidate.method}: {ways}; at least {gigabytes(needed)} GB of memory")
    if workers is not None:
        print(workers.describe())
    return 0


def _parser() -> JobParser:
    parser = job_parser("evaluate", DESCRIPTION, default_preset="the model's own configuration")
    add_translator_arguments(parser, without_model="none; needed but for --self-test")
    parser.add_argument("--store", type=Path, required=True, help="store of volumes, from aldm prepare")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="which subjects")
    parser.add_argument(
        "--training-store",
        type=Path,
        metavar="STORE",
        help="make the rows training-mean, intensity-map and histogram-matching from the training subjects of this "
        "store, such as the model's own (default: from --store's)",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--source", metavar="MODALITY", help="score translations of this one alone (default: of all)")
    parser.add_argument(
        "--target", metavar="MODALITY", help="score translations into this one alone (default: into all)"
    )
    parser.add_argument(
        "--samplers",
        nargs="+",
        default=[],
        metavar="SAMPLER[:STEPS]",
        help=f"measure these as well, such as ddim:10 ({', '.join(SAMPLERS)}), or {ALL} that go with the model, "
        "each at several numbers of steps (default: the model's own alone)",
    )
    parser.add_argument(
        "--baseline",
        action="append",
        default=[],
        metavar="[NAME=]DIR",
        help="another translator folder to measure beside the model, such as a plain unet, or the word default for the "
        "built-in model; repeatable (default: none)",
    )
    parser.add_argument(
        "--champion",
        metavar="NAME[@ALIAS]",
        help="measure the version of this registered model with that alias as well, as the row champion, if there is "
        "one yet; the registry is at MLFLOW_TRACKING_URI, or in the file mlflow.db beside --out (default: none; the "
        "alias: champion)",
    )
    parser.add_argument(
        "--segmenter",
        type=Path,
        metavar="RUN",
        help="run folder of aldm train segmenter: measure also how well it finds tissues and lesions in the synthetic "
        "volumes, beside the real ones, copied sources and empty volumes (default: not measured)",
    )
    parser.add_argument("--num-samples", type=int, metavar="K", help="samples averaged (default: the model's)")
    parser.add_argument("--max-subjects", type=int, metavar="N", help="the first N subjects only (default: all)")
    parser.add_argument("--pictures", type=int, default=1, metavar="N", help="subjects that panels are drawn of")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples")
    parser.add_argument(
        "--group",
        metavar="NAME",
        help="log tables, card and pictures to MLflow as a run nested in this one, such as that of the model's "
        "trainings: its name, or the full path of the folder around their run folders (default: not logged)",
    )
    parser.add_argument(
        "--self-test",
        action="store_true",
        help="measure the scores instead of a model: the split's own volumes with blur, noise, a gain, a shift and "
        f"ghosting of two strengths each, against the unchanged ones; {TABLES} then shows how much each score reacts "
        "to which fault",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier evaluation in --out")
    add_worker_arguments(parser, "a subject")
    return parser
