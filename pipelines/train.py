"""aldm train STAGE: one training, on the workers of a Ray cluster or in this process."""

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.config import Config, TrainingConfig, training_of, with_training
from aldm.config_baselines import METHODS, VOLUME_METHODS
from aldm.errors import UserError
from aldm.words import counted
from pipelines.arguments import JobParser, job_parser, resolve_config, select_device
from pipelines.ray_storage import Storage
from pipelines.ray_training import add_cluster_arguments, cluster_of, open_cluster, train_on_ray
from pipelines.training_logs import Logs, add_tracking_arguments, open_logs, tracking_of

if TYPE_CHECKING:
    import torch

    from aldm.data.store import VolumeStore
    from aldm.players import FitResult, Stage
    from aldm.run_folder import RunFolder

logger = logging.getLogger(__name__)

LEAST_SQUARED_ERROR = 1e-4
"""Added to what an intensity map leaves, intensities in [-1, 1], so that no source is believed alone."""
STAGES = {
    "vqgan": "stage 1: the codec, on the volumes of a store (not needed for the lossless haar codec)",
    "ms-spade": "stage 2: source latent to target-like latent, on cached latents",
    "diffusion": "stage 3: the denoiser, on cached latents and the result of stage 2",
    "unet": "a regression U-Net on Haar bands, the yardstick beside the model",
    "segmenter": "finds tissues and lesions in real volumes, to measure synthetic ones with (aldm evaluate)",
    "uncertainty": "how far off a trained model may be: --model, of any kind; aldm export puts the two together",
    **METHODS,
}
INPUTS = {
    "ms-spade": ("latents",),
    "diffusion": ("latents", "ms_spade"),
    "uncertainty": ("store", "model"),
    "resvit": ("store", "pretrained", "vit_weights"),
}
"""The flags that name what a stage is built from; those not named here are built from a store."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm train STAGE ARGUMENTS`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in STAGES:
        return _no_stage(arguments)
    stage, *rest = arguments
    args, config = parse(stage, rest)
    device = select_device(args)
    if args.resume_or_start:
        args.resume = _begun(args)
    _check_folder(stage, args)
    built, inputs = build_stage(stage, config, args)
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
            result = _train_here(built, training, run, logs, device, args.resume)
        else:
            workers = f"{args.num_workers or 1}{' with a GPU each' if cluster.use_gpu else ''}"
            logger.info("training %s in %s on Ray, workers: %s", stage, run.path, workers)
            result = train_on_ray(
                run,
                cluster,
                storage,
                stage=stage,
                config=config,
                inputs=_paths(stage, args),
                record=inputs,
                tracking=tracking,
                args=args,
            )
    best = "no validation subjects" if result.best is None else f"best {built.score} {result.best:.4g}"
    print(f"{stage}: {counted(result.step, 'step')}, {best}; checkpoints in {args.run_dir}")
    return 0


def parse(stage: str, words: Sequence[str]) -> tuple[argparse.Namespace, Config]:
    """Return the flags after `aldm train STAGE`, and the configuration with those among them that change it.

    Raises:
        UserError: as `resolve_config`, or a crop that is none.
    """
    args = _parser(stage).parse_args(words)
    return args, _config(stage, args)


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


def _train_here(
    built: "Stage", training: TrainingConfig, run: "RunFolder", logs: Logs, device: "torch.device", resume: bool
) -> "FitResult":
    """Train in this process."""
    from aldm.precision import usable_precision
    from aldm.training import PlainEngine, fit

    config = built.config
    return fit(
        built,
        PlainEngine(device, usable_precision(config.precision, device)),
        training,
        seed=config.seed,
        on_log=logs.on_log,
        on_checkpoint=lambda snapshot: run.save(snapshot.write, snapshot.is_best),
        on_panel=logs.on_panel,
        resume_from=run.resume_from() if resume else None,
    )


def build_stage(stage: str, config: Config, args: argparse.Namespace) -> tuple["Stage", dict[str, str]]:
    """Open what the stage reads and build it, its initial weights a function of the seed.

    Returns:
        The stage, and name -> path or hash of its inputs.

    Raises:
        UserError: an input that is missing, stale, or does not go with the others.
    """
    import torch

    from aldm.baselines.regression_unet import RegressionStage
    from aldm.data.labels import structures_of
    from aldm.data.store import VolumeStore
    from aldm.denoising import PREDICTS_NOISE
    from aldm.intensity_map_fit import fit_intensity_map
    from aldm.latents import LatentStore
    from aldm.randomness import derived_seed
    from aldm.segmenter_stage import SegmenterStage
    from aldm.stages import DiffusionStage, MSSpadeStage, VQGANStage, measured_residual_std

    built: Any
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "weights", stage))
        if stage not in ("ms-spade", "diffusion"):
            store = VolumeStore.open(args.store)
            inputs = {"store": str(args.store), "store_fingerprint": store.fingerprint}
            if stage in METHODS:
                return _method(stage, config, store, inputs, args), inputs
            if stage == "segmenter":
                return SegmenterStage(config, store, structures_of(store)), inputs
            if stage == "uncertainty":
                return _uncertainty(config, store, inputs, args.model), inputs
            return (VQGANStage if stage == "vqgan" else RegressionStage)(config, store), inputs
        latents = LatentStore.open(args.latents)
        inputs = {"latents": str(args.latents), "codec_hash": latents.codec_hash}
        inputs["store_fingerprint"] = latents.data["fingerprint"]
        if stage == "ms-spade":
            built = MSSpadeStage(config, latents)
            if built.ms_spade.intensity_map is not None:
                errors = fit_intensity_map(built.ms_spade.intensity_map, latents, built.config.modalities)
                if config.diffusion.any_sources:
                    built.ms_spade.precision.copy_(torch.from_numpy(1 / (errors + LEAST_SQUARED_ERROR)))
            return built, inputs
        ms_spade, ms_spade_hash, widths = load_ms_spade(args.ms_spade, latents)
        diffusion = config.diffusion
        if diffusion.any_sources != hasattr(ms_spade, "precision"):
            raise UserError(
                f"diffusion.any_sources is {str(diffusion.any_sources).lower()}, and {args.ms_spade} was trained with "
                "the other value: train ms-spade with this one too"
            )
        if diffusion.objective in PREDICTS_NOISE and diffusion.residual_std == ():
            measured = measured_residual_std(config, latents, ms_spade)
            config = replace(config, diffusion=replace(diffusion, residual_std=measured))
        built = DiffusionStage(replace(config, ms_spade=widths), latents, ms_spade, ms_spade_hash)
        return built, inputs | {"ms_spade": str(args.ms_spade), "ms_spade_hash": ms_spade_hash}


def _method(
    stage: str, config: Config, store: "VolumeStore", inputs: dict[str, str], args: argparse.Namespace
) -> "Stage":
    """Build a comparison method; the second training of ResViT goes on from the first, which the inputs then name."""
    from aldm.baselines.methods import method_stage
    from aldm.baselines.resvit import FIRST, SECOND, ResViTStage
    from aldm.checkpoint import load_checkpoint
    from aldm.run_folder import checkpoint_folder

    built = method_stage(config, store, stage)
    if stage == SECOND:
        assert isinstance(built, ResViTStage)
        first = load_checkpoint(checkpoint_folder(args.pretrained), FIRST)
        built.start_from(first, args.vit_weights)
        weights = "random" if args.vit_weights is None else str(args.vit_weights)
        inputs |= {"pretrained": str(args.pretrained), "pretrained_hash": first.hash, "vit_weights": weights}
        if args.vit_weights is None:
            logger.warning("no --vit-weights: the transformer starts from random weights, not from ImageNet's")
    return built


def _uncertainty(config: Config, store: "VolumeStore", inputs: dict[str, str], model: Path) -> "Stage":
    """Build the training of a model's uncertainty; the inputs then name the model."""
    from aldm.translate import Translator
    from aldm.uncertainty import FrozenModel, UncertaintyStage

    frozen = FrozenModel(Translator.load(model))
    inputs |= {"model": str(model), "model_hash": frozen.model_hash}
    return UncertaintyStage(config, store, frozen)


def _paths(stage: str, args: argparse.Namespace) -> dict[str, str]:
    """Return the paths that a stage is built from, by flag name."""
    given = {name: getattr(args, name) for name in INPUTS.get(stage, ("store",))}
    return {name: str(path) for name, path in given.items() if path is not None}


def load_ms_spade(folder: Path, latents: Any) -> tuple[Any, str, Any]:
    """Return the trained MS-SPADE, its hash and its MSSpadeConfig, checked against the latents.

    Raises:
        UserError: no such checkpoint, or it was trained on latents of another codec or data set.
    """
    from aldm.checkpoint import load_checkpoint, load_weights
    from aldm.denoising import build_ms_spade
    from aldm.run_folder import checkpoint_folder
    from aldm.stage_data import LATENTS

    checkpoint = load_checkpoint(checkpoint_folder(folder), "ms-spade")
    checkpoint.check_meta(LATENTS)
    trained_on = checkpoint.meta["latents"]
    wanted = (latents.codec_hash, latents.data["fingerprint"], latents.mean.tolist(), latents.std.tolist())
    got = (trained_on["codec_hash"], trained_on["data"]["fingerprint"], trained_on["mean"], trained_on["std"])
    if got != wanted:
        raise UserError(
            f"{folder} was trained on other latents (codec {got[0][:12]}, data {got[1][:12]}) than {latents.path} "
            f"(codec {wanted[0][:12]}, data {wanted[1][:12]}): train ms-spade on these, or give its own --latents"
        )
    module = build_ms_spade(checkpoint.config, latents.latent_channels)
    load_weights(module, checkpoint.weights, checkpoint.path)
    return module, checkpoint.hash, checkpoint.config.ms_spade


def _parser(stage: str) -> JobParser:
    parser = job_parser(f"train {stage}", f"Train {STAGES[stage]}.")
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
        parser.add_argument("--pretrained", type=Path, required=True, metavar="RUN", help="run folder of resvit-cnn")
        parser.add_argument(
            "--vit-weights",
            type=Path,
            metavar="FILE",
            help="ImageNet weights of R50+ViT-B/16, .npz or .safetensors, for the transformer to start from (default: "
            "random weights)",
        )
    if stage == "diffusion":
        parser.add_argument("--ms-spade", type=Path, required=True, metavar="RUN", help="run folder of stage 2")
    parser.add_argument("--run-dir", type=Path, required=True, help="folder of this run")
    parser.add_argument("--max-steps", type=int, help="optimizer steps (default: the configuration's)")
    parser.add_argument(
        "--max-minutes",
        type=float,
        help="fit the number of steps to this many minutes, validation included (default: the configuration's)",
    )
    parser.add_argument("--seed", type=int, help="seed of every random choice (default: the configuration's)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in --run-dir and start anew")
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
    config = resolve_config(args)
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
    if source is not None:
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
    from aldm.planner import plan
    from aldm.precision import usable_precision

    train, validation = built.samples("train"), built.samples("validation")
    lines = [
        f"would train {stage} in {args.run_dir} on {place}",
        f"  samples: {len(train)} in an epoch of training, {len(validation)} of validation",
        f"  steps: {planned_steps(training, len(train))} of batch {training.batch_size}",
    ]
    for player in built.players:
        number = sum(parameter.numel() for parameter in player.module.parameters())
        lines.append(f"  {player.name}: {number:,} parameters, from step {player.start_step}")
    config = built.config
    if args.engine == "plain":
        config = replace(config, precision=usable_precision(config.precision, device))
    return "\n".join([*lines, plan(config, stage).describe()])


def _no_stage(arguments: list[str]) -> int:
    wanted = "\n".join(f"  {name:<11} {text}" for name, text in STAGES.items())
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    if arguments and not asked:
        print(f"aldm train: there is no stage {arguments[0]!r}", file=sys.stderr)
    print(
        f"usage: aldm train STAGE [ARGUMENTS]\n\nstages:\n{wanted}\n\naldm train STAGE --help explains the arguments.",
        file=sys.stdout if asked else sys.stderr,
    )
    return 0 if asked else 2
