"""aldm train STAGE: one training, on the workers of a Ray cluster or in this process."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.config import Config, TrainingConfig, training_of, with_training
from aldm.config_baselines import METHODS, VOLUME_METHODS
from aldm.errors import UserError
from aldm.stage_inputs import WITHOUT_STARTING_MODEL, StageInputs
from aldm.words import counted
from pipelines.arguments import ConfigChanges, JobParser, job_parser, resolve_config
from pipelines.init_from import add_starting_model, config_of_model, folder_of
from pipelines.ray_storage import Storage
from pipelines.ray_training import Cluster, add_cluster_arguments, cluster_of, open_cluster, train_on_ray
from pipelines.training_logs import Tracking, add_tracking_arguments, open_logs, tracking_of

if TYPE_CHECKING:
    import torch

    from aldm.players import Stage
    from aldm.run_folder import RunFolder
    from pipelines.ray_worker import WorkerSettings

logger = logging.getLogger(__name__)

SUBCOMMANDS = {
    "vqgan": "stage 1: the codec, on the volumes of a store (not needed for the lossless haar codec)",
    "ms-spade": "stage 2: source latent to target-like latent, on cached latents",
    "diffusion": "stage 3: the denoiser, on cached latents and the result of stage 2",
    "unet": "a regression U-Net on Haar bands, the yardstick beside the model",
    "segmenter": "finds tissues and lesions in real volumes, to measure synthetic ones with (aldm evaluate)",
    "uncertainty": "how far off a trained model may be: --model, of any kind; aldm export puts the two together",
    **METHODS,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm train STAGE ARGUMENTS`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in SUBCOMMANDS:
        return _no_stage(arguments)
    stage, *rest = arguments
    args, config = parse(stage, rest)
    from aldm.device import select_device
    from aldm.training_build import build_stage
    from aldm.training_run import train_in

    device = select_device(args.device)
    if args.resume_or_start:
        args.resume = _begun(args)
    _check_folder(stage, args)
    built, inputs = build_stage(stage, config, _inputs(args))
    built.samples("train")  # data that it cannot learn from are refused before anything is written
    config = built.config
    training = training_of(config, stage)
    cluster = cluster_of(args, config, stage)
    tracking = tracking_of(args)
    storage = Storage.of(args.run_dir, args.storage_path)
    if args.resume:
        from aldm.run_folder import check_same_run

        check_same_run(args.run_dir, stage, config, args.engine, storage.record)
    if args.dry_run:
        place = str(device) if args.engine == "plain" else cluster.describe()
        print(_plan(stage, built, training, args, place, device))
        return 0
    with contextlib.ExitStack() as stack:
        if args.engine != "plain":
            opened = open_cluster(cluster, storage, args.run_dir, resume=args.resume, overwrite=args.overwrite)
            cluster = stack.enter_context(opened)
        run = stack.enter_context(_open_run(stage, config, inputs, storage.record, args))
        if not args.resume:
            from pipelines.tracking import discard

            discard(run.path)
        if args.engine == "plain":
            logger.info("training %s in %s on %s", stage, run.path, device)
            logs = stack.enter_context(open_logs(run, stage, config, inputs, tracking))
            result = train_in(run, stage, built, device, resume=args.resume, on_log=logs.on_log, on_panel=logs.on_panel)
        else:
            workers = f"{args.num_workers or 1}{' with a GPU each' if cluster.use_gpu else ''}"
            logger.info("training %s in %s on Ray, workers: %s", stage, run.path, workers)
            settings = _worker_settings(stage, config, args, cluster, inputs, tracking)
            result = train_on_ray(cluster, storage, settings, overwrite=args.overwrite)
    best = "no validation subjects" if result.best is None else f"best {built.score} {result.best:.4g}"
    print(f"{stage}: {counted(result.step, 'step')}, {best}; checkpoints in {args.run_dir}")
    return 0


def parse(stage: str, words: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Return the flags after `aldm train STAGE`, and the configuration with those among them that change it.

    Raises:
        UserError: as `resolve_config`, or a crop that is none.
    """
    args = _parser(stage).parse_args(words)
    config = _config(stage, args)
    if getattr(args, "init_from", None) is not None:
        args.init_from = folder_of(args.init_from)
    elif stage == "resvit" and args.pretrained is None:
        raise UserError("resvit goes on from resvit-cnn: give its run folder, --pretrained, or a model, --init-from")
    return args, config


def _open_run(
    stage: str, config: Config, inputs: dict[str, str], storage: str | None, args: argparse.Namespace
) -> "RunFolder":
    from aldm.run_folder import RunFolder

    return RunFolder.open(
        args.run_dir,
        stage=stage,
        config=config,
        inputs=inputs,
        engine=args.engine,
        storage=storage,
        resume=args.resume,
        overwrite=args.overwrite,
    )


def _worker_settings(
    stage: str,
    config: Config,
    args: argparse.Namespace,
    cluster: Cluster,
    record: dict[str, str],
    tracking: Tracking | None,
) -> "WorkerSettings":
    """Return what the workers of a Ray cluster are told."""
    from pipelines.ray_worker import WorkerSettings

    return WorkerSettings(
        stage=stage,
        config=config,
        inputs=_inputs(args).resolved(),
        record=record,
        run_dir=args.run_dir.resolve(),
        resumes=args.resume,
        engine=cluster.engine,
        zero_stage=cluster.zero_stage,
        tracking=tracking,
        log_level=args.log_level,
    )


def _inputs(args: argparse.Namespace) -> StageInputs:
    """Return what the flags say that the stage is built from; no training has them all."""
    return StageInputs(**{field.name: getattr(args, field.name, None) for field in fields(StageInputs)})


def _parser(stage: str) -> JobParser:
    parser = job_parser(f"train {stage}", f"Train {SUBCOMMANDS[stage]}.")
    if stage in ("ms-spade", "diffusion"):
        parser.add_argument("--latents", type=Path, required=True, help="store of latents, from aldm encode")
    else:
        parser.add_argument("--store", type=Path, required=True, help="store of volumes, from aldm prepare")
    if stage in ("vqgan", "unet", "segmenter", *VOLUME_METHODS):
        parser.add_argument(
            "--crop",
            nargs="+",
            metavar="N",
            help="voxels X Y Z of the random crop that a step trains on, or full (default: the configuration's)",
        )
    if stage == "uncertainty":
        parser.add_argument(
            "--model", type=Path, required=True, metavar="DIR", help="translator folder, of aldm export"
        )
    elif stage not in ("vqgan", "segmenter"):
        _add_pair(parser, needed=stage in METHODS)
    if stage == "resvit":
        parser.add_argument(
            "--pretrained", type=Path, metavar="RUN", help="run folder of resvit-cnn; needed without --init-from"
        )
        parser.add_argument(
            "--vit-weights",
            type=Path,
            metavar="FILE",
            help="ImageNet weights of R50+ViT-B/16, .npz or .safetensors, for the transformer to start from (default: "
            "random weights)",
        )
    if stage == "diffusion":
        parser.add_argument("--ms-spade", type=Path, required=True, metavar="RUN", help="run folder of stage 2")
    if stage not in WITHOUT_STARTING_MODEL:
        add_starting_model(parser)
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of this run")
    parser.add_argument("--max-steps", type=int, help="optimizer steps (default: the configuration's)")
    parser.add_argument(
        "--max-minutes",
        type=float,
        help="fit the number of steps to this many minutes, validation included (default: the configuration's)",
    )
    parser.add_argument("--seed", type=int, help="seed of every random choice (default: the configuration's)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in --run-dir and start again")
    parser.add_argument(
        "--resume-or-start",
        action="store_true",
        help="go on with the run in --run-dir if there is one, else start it: for what is run again as it stands",
    )
    parser.add_argument(
        "--activation-checkpointing",
        action="store_true",
        help="recompute activations in the backward pass: less memory, about a third more time",
    )
    add_cluster_arguments(parser)
    add_tracking_arguments(parser)
    return parser


def _add_pair(parser: JobParser, *, needed: bool) -> None:
    """Add the flags that name the one pair that is trained."""
    default = "" if needed else " (default: every pair is trained)"
    parser.add_argument("--source", required=needed, metavar="MODALITY", help=f"translate from this one{default}")
    parser.add_argument("--target", required=needed, metavar="MODALITY", help=f"into this one{default}")


def _config(stage: str, args: argparse.Namespace) -> Config:
    """Return the configuration with the job's own flags laid over it."""
    word = getattr(args, "init_from", None)
    config = resolve_config(args) if word is None else config_of_model(stage, word, ConfigChanges.of(args))
    changes: dict[str, Any] = {}
    for field in ("max_steps", "max_minutes"):
        if getattr(args, field) is not None:
            changes[field] = getattr(args, field)
    if getattr(args, "crop", None) is not None:
        changes["crop"] = _crop(args.crop)
    config = with_training(config, stage, **changes)
    source, target = getattr(args, "source", None), getattr(args, "target", None)
    if (source is None) != (target is None):
        raise UserError("--source and --target go together: give both for one pair, or none for every pair")
    if source is not None and target is not None:
        if word is not None and config.pair not in (None, (source, target)):
            raise UserError(f"--init-from {word} translates {' to '.join(config.pair or ())}: give that pair, or none")
        config = replace(config, pair=(source, target))
    if args.activation_checkpointing:
        config = replace(config, activation_checkpointing=True)
    return config if args.seed is None else replace(config, seed=args.seed)


def _crop(words: list[str]) -> tuple[int, int, int] | None:
    if words == ["full"]:
        return None
    try:
        x, y, z = (int(word) for word in words)
    except ValueError as error:
        raise UserError(f"--crop is {' '.join(words)!r}, wanted three whole numbers X Y Z, or full") from error
    return x, y, z


def _begun(args: argparse.Namespace) -> bool:
    """Whether the run folder holds a run.

    Raises:
        UserError: --resume or --overwrite was given as well.
    """
    from aldm.run_folder import CONFIG_FILE

    if args.resume or args.overwrite:
        raise UserError("--resume-or-start decides by itself: leave --resume and --overwrite out")
    return Path(args.run_dir, CONFIG_FILE).is_file()


def _check_folder(stage: str, args: argparse.Namespace) -> None:
    from aldm.run_folder import check_run_folder

    check_run_folder(args.run_dir, args.resume, args.overwrite, stage)


def _plan(
    stage: str,
    built: "Stage",
    training: TrainingConfig,
    args: argparse.Namespace,
    place: str,
    device: "torch.device",
) -> str:
    """Say what the training would do."""
    from aldm.pace import planned_steps
    from aldm.planner import plan_memory
    from aldm.precision import usable_precision

    train, validation = built.samples("train"), built.samples("validation")
    lines = [
        f"would train {stage} in {args.run_dir} on {place}",
        *([f"  weights: those of {built.config.init_from}"] if built.config.init_from else []),
        f"  samples: {len(train)} in an epoch of training, {len(validation)} of validation",
        f"  steps: {planned_steps(training, len(train))} of batch {training.batch_size}",
    ]
    for player in built.players:
        number = sum(parameter.numel() for parameter in player.module.parameters())
        lines.append(f"  {player.name}: {number:,} parameters, from step {player.start_step}")
    config = built.config
    if args.engine == "plain":
        config = replace(config, precision=usable_precision(config.precision, device))
    return "\n".join([*lines, plan_memory(config, stage).describe()])


def _no_stage(arguments: list[str]) -> int:
    wanted = "\n".join(f"  {name:<11} {text}" for name, text in SUBCOMMANDS.items())
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    if arguments and not asked:
        print(f"aldm train: there is no stage {arguments[0]!r}", file=sys.stderr)
    print(
        f"usage: aldm train STAGE [ARGUMENTS]\n\nstages:\n{wanted}\n\naldm train STAGE --help explains the arguments.",
        file=sys.stdout if asked else sys.stderr,
    )
    return 0 if asked else 2
