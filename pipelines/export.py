"""aldm export: put trained stages together into a translator folder, which is all that using the model needs."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.config import Config, override
from aldm.config_baselines import METHODS
from aldm.errors import UserError
from aldm.pairs import pairs_in_words
from aldm.presets import load_preset
from pipelines.arguments import JobParser, job_parser
from pipelines.model_card import CARD, SCORES_CARD, model_card, read_scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor


TRAINING = {"training.stage": str, "training.step": int, "training.validation": dict}
"""What a training leaves in the meta of its checkpoint."""


@dataclass(frozen=True)
class Model:
    """What a translator folder holds: kind aldm, unet or a comparison method, and every training's record."""

    kind: str
    config: Config
    weights: Mapping[str, "Tensor"]
    meta: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm export ARGUMENTS`."""
    parser = _parser()
    args = parser.parse_args(argv)
    _check_parts(parser, args)
    if args.alias is not None and args.register is None:
        parser.error("--alias names a version of a registered model: give --register NAME as well")
    from aldm.checkpoint import CONFIG, write_checkpoint
    from aldm.device import select_device
    from aldm.files import atomic_folder, check_folder
    from aldm.memory import gigabytes, resident_bytes

    if args.preset is not None:
        load_preset(args.preset)  # a model's configuration is its own, but a wrong name is said so
    check_folder(args.out, args.overwrite, marker=CONFIG)
    if args.register is not None:
        _check_registry(args)
    if args.model is not None:
        changes = args.set, args.precision
        model = with_uncertainty(args.model, args.uncertainty, args.store, select_device(args.device), changes)
    elif args.baseline is not None:
        model = baseline_model(args.baseline)
    else:
        model = aldm_model(args.codec, args.ms_spade, args.diffusion)
    model = replace(model, config=used_config(model.kind, model.config, args.set, args.precision))
    if args.half:
        model = replace(model, weights=halved(model.weights))
    number = sum(tensor.numel() for tensor in model.weights.values())
    if args.dry_run:
        print(f"would write {args.out}: a model of kind {model.kind}, {number:,} numbers")
        if args.register is not None:
            print(f"would register it as {args.register}")
        held, copy = resident_bytes(), sum(tensor.nbytes for tensor in model.weights.values())
        print(f"memory: program and weights {gigabytes(held)} GB, writing them {gigabytes(copy)} GB more")
        return 0
    with atomic_folder(args.out, args.overwrite, marker=CONFIG) as temporary:
        digest = write_checkpoint(
            temporary, kind=model.kind, config=model.config, weights=model.weights, meta=model.meta
        )
        scores = None if args.scores is None else read_scores(args.scores, digest)
        (temporary / CARD).write_text(model_card(model, digest, scores))
        if scores is not None:
            (temporary / SCORES_CARD).write_text(json.dumps(scores, indent=1) + "\n")
    print(f"{args.out}: {model.kind} model for {pairs_in_words(model.config, model.kind)}, hash {digest[:12]}")
    if args.register is not None:
        _register(args)
    return 0


def aldm_model(codec: str, ms_spade: Path, diffusion: Path) -> Model:
    """Put codec, MS-SPADE and U-Net together.

    Args:
        codec: run folder of stage 1, a translator folder, or "haar".
        ms_spade, diffusion: run folders of stages 2 and 3.

    Raises:
        UserError: a run without checkpoint, or stages that were not trained on each other's results.
    """
    from aldm.checkpoint import load_checkpoint
    from aldm.encoding import load_codec
    from aldm.latents import codec_hash
    from aldm.run_folder import checkpoint_folder
    from aldm.stage_data import LATENTS

    stage_3 = load_checkpoint(checkpoint_folder(diffusion), "diffusion")
    stage_2 = load_checkpoint(checkpoint_folder(ms_spade), "ms-spade")
    stage_2.check_meta({**LATENTS, **TRAINING})
    stage_3.check_meta({**LATENTS, **TRAINING, **_data("latents.data"), "modalities": list, "ms_spade_hash": str})
    latents = stage_3.meta["latents"]
    module, codec_config = load_codec(codec, stage_3.config)
    own_hash = codec_hash(codec_config, module.state_dict())
    for name, run in ((diffusion, stage_3), (ms_spade, stage_2)):
        trained_with = run.meta["latents"]["codec_hash"]
        if trained_with != own_hash:
            raise UserError(
                f"{name} was trained on latents of codec {trained_with[:12]}, --codec {codec} is {own_hash[:12]}: give "
                "the codec that the latents were encoded with"
            )
    if stage_3.meta["ms_spade_hash"] != stage_2.hash:
        raise UserError(
            f"{diffusion} was trained with MS-SPADE {stage_3.meta['ms_spade_hash'][:12]}, {ms_spade} holds "
            f"{stage_2.hash[:12]}: give the run that it was trained with, or train diffusion again"
        )
    parts = {"codec": module.state_dict(), "ms_spade": stage_2.weights, "unet": stage_3.weights}
    return Model(
        kind="aldm",
        config=replace(stage_3.config, ms_spade=stage_2.config.ms_spade),
        weights={f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()},
        meta={
            "modalities": stage_3.meta["modalities"],
            "latents": {name: value for name, value in latents.items() if name != "data"},
            "data": latents["data"],
            "median_percentiles": latents["data"]["median_percentiles"],
            "training": [*_codec_training(codec), stage_2.meta["training"], stage_3.meta["training"]],
        },
    )


def baseline_model(run: Path) -> Model:
    """Take the one network of a run: the regression U-Net or a comparison method.

    Raises:
        UserError: the run holds no checkpoint of one of these, or one of an earlier version's U-Net.
    """
    from aldm.checkpoint import load_checkpoint
    from aldm.denoising import check_regression_weights
    from aldm.run_folder import checkpoint_folder

    checkpoint = load_checkpoint(checkpoint_folder(run), "unet", *METHODS)
    part = "network"
    if checkpoint.kind == "unet":
        check_regression_weights(checkpoint.weights, "", checkpoint.path)
        part = "unet"
    checkpoint.check_meta({**TRAINING, **_data("data"), "modalities": list})
    return Model(
        kind=checkpoint.kind,
        config=checkpoint.config,
        weights={f"{part}.{name}": tensor for name, tensor in checkpoint.weights.items()},
        meta={
            "modalities": checkpoint.meta["modalities"],
            "data": checkpoint.meta["data"],
            "median_percentiles": checkpoint.meta["data"]["median_percentiles"],
            "training": [checkpoint.meta["training"]],
        },
    )


def with_uncertainty(
    model: Path, run: Path, store: Path, device: "torch.device", changes: tuple[Sequence[str], str | None] = ((), None)
) -> Model:
    """Add to a model the network that knows its errors, calibrated on the validation subjects of a store.

    Args:
        model: translator folder.
        run: run folder of `aldm train uncertainty` on that model.
        store: prepared volumes.
        device: where to compute.
        changes: what `used_config` takes: the interval is that of the model as it is to be used by default.

    Raises:
        UserError: a run on another model, or what `used_config` and `calibrate` refuse.
    """
    from aldm.checkpoint import load_checkpoint, load_weights
    from aldm.data.store import VolumeStore
    from aldm.denoising import build_error_unet
    from aldm.predictors import KINDS, UNCERTAINTY
    from aldm.run_folder import checkpoint_folder
    from aldm.translate import Translator
    from aldm.uncertainty import calibrate

    before, learnt = load_checkpoint(model, *KINDS), load_checkpoint(checkpoint_folder(run), "uncertainty")
    learnt.check_meta({**TRAINING, "model_hash": str})
    before.check_meta({**_data("data"), "modalities": list, "training": list})
    if learnt.meta["model_hash"] != before.hash:
        raise UserError(
            f"{run} learnt the errors of model {learnt.meta['model_hash'][:12]}, {model} is {before.hash[:12]}: give "
            "the model that it was trained on, or train uncertainty again"
        )
    config = replace(used_config(before.kind, before.config, *changes), error_unet=learnt.config.error_unet)
    error_unet = build_error_unet(config)
    load_weights(error_unet, learnt.weights, learnt.path)
    translator = Translator.load(model, device, sampling=config.sampling, precision=config.precision)
    calibration = calibrate(translator, error_unet, VolumeStore.open(store))
    weights = {name: tensor for name, tensor in before.weights.items() if not name.startswith("error_unet.")}
    return Model(
        kind=before.kind,
        config=config,
        weights=weights | {f"error_unet.{name}": tensor for name, tensor in learnt.weights.items()},
        meta={
            **before.meta,
            UNCERTAINTY: calibration.to_dict(),
            "training": [*before.meta["training"], learnt.meta["training"]],
        },
    )


def halved(weights: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Return weights with the 32-bit floating-point ones in 16 bits: half the file; whoever loads them computes in 32.

    Raises:
        UserError: a weight that 16 bits do not hold.
    """
    import torch

    smaller = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in weights.items()}
    lost = [name for name, tensor in smaller.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if lost:
        raise UserError(f"--half: {lost[0]} holds numbers beyond 16 bits: export without it")
    return smaller


def used_config(kind: str, config: Config, assignments: Sequence[str], precision: str | None) -> Config:
    """Return a model's configuration with the way that it is used by default changed: sampling and precision.

    Raises:
        UserError: something else is to be changed, or the sampler does not go with the model.
    """
    from aldm.sampling import check_sampling

    foreign = [assignment for assignment in assignments if not assignment.startswith("sampling.")]
    if foreign:
        raise UserError(f"--set {foreign[0]}: a trained model is exported as it is; only sampling.* can be set here")
    config = override(config, assignments)
    if kind == "aldm":
        sampling = config.sampling
        check_sampling(
            config.diffusion, sampling.sampler, sampling.num_inference_steps, sampling.num_samples, sampling.eta
        )
    return config if precision is None else replace(config, precision=precision)


def _check_parts(parser: JobParser, args: argparse.Namespace) -> None:
    """Refuse flags of two of the three ways to name a model."""
    ways = {
        "--codec, --ms-spade and --diffusion": (args.codec, args.ms_spade, args.diffusion),
        "--baseline": (args.baseline,),
        "--model, --uncertainty and --store": (args.model, args.uncertainty, args.store),
    }
    begun = [name for name, parts in ways.items() if any(part is not None for part in parts)]
    if len(begun) != 1 or None in ways[begun[0]]:
        wanted = "; or ".join(ways)
        raise UserError(
            f"--out needs what it is made of, all of one kind: {wanted}; got {' with '.join(begun) or 'none'}"
        )


def _codec_training(codec: str) -> list[dict[str, Any]]:
    from aldm.checkpoint import CONFIG, WAY_OUT, read_checkpoint_record
    from aldm.records import check_record
    from aldm.starting_model import model_folder

    if codec == "haar":
        return []
    folder = model_folder(codec)
    record = read_checkpoint_record(folder)
    meta = record["meta"]
    if record["kind"] == "aldm":
        check_record(meta, {"training": list}, f"the meta of {folder / CONFIG}", WAY_OUT)
        return [training for training in meta["training"] if training["stage"] == "vqgan"]
    check_record(meta, TRAINING, f"the meta of {folder / CONFIG}", WAY_OUT)
    return [meta["training"]]


def _data(place: str) -> dict[str, type]:
    """Return what the model card and the translator read of the record of the data."""
    kinds = {"layout": str, "fingerprint": str, "num_subjects": dict, "median_percentiles": dict, "backgrounds": dict}
    return {f"{place}.{key}": kind for key, kind in kinds.items()}


def _check_registry(args: argparse.Namespace) -> None:
    """Refuse names and a server that MLflow will not take, before anything is written."""
    from pipelines.registry import check_names
    from pipelines.tracking_server import check_server, tracking_uri

    check_names(args.register, args.alias)
    check_server(tracking_uri(args.out))


def _register(args: argparse.Namespace) -> None:
    from pipelines.registry import register
    from pipelines.tracking_server import tracking_uri

    uri = tracking_uri(args.out)
    try:
        version = register(args.out, args.register, args.alias, uri)
    except UserError as error:
        raise UserError(f"{args.out} is written, but not registered as {args.register}: {error}") from error
    address = f"models:/{args.register}@{args.alias}" if args.alias else f"models:/{args.register}/{version}"
    print(f"registered as {args.register} version {version}: MLFLOW_TRACKING_URI={uri}, {address}")


def _parser() -> JobParser:
    parser = job_parser("export", "Put trained stages together into a translator folder.")
    parser.add_argument("--codec", metavar="RUN|haar", help="run folder of stage 1, a translator folder, or haar")
    parser.add_argument("--ms-spade", type=Path, metavar="RUN", help="run folder of stage 2")
    parser.add_argument("--diffusion", type=Path, metavar="RUN", help="run folder of stage 3")
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RUN",
        help="run folder of the regression U-Net or of a comparison method, instead of the three",
    )
    parser.add_argument(
        "--model",
        type=Path,
        metavar="DIR",
        help="a translator folder, to which --uncertainty is added, instead of all that",
    )
    parser.add_argument(
        "--uncertainty",
        type=Path,
        metavar="RUN",
        help="with --model: run folder of aldm train uncertainty on it; its factors are fitted on the validation "
        "subjects of --store",
    )
    parser.add_argument("--store", type=Path, help="with --uncertainty: store of volumes, from aldm prepare")
    parser.add_argument("--out", type=Path, required=True, help="the translator folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in --out")
    parser.add_argument(
        "--half",
        action="store_true",
        help="keep the weights as 16-bit numbers: half the size; measure what that costs with aldm evaluate",
    )
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="DIR",
        help="evaluation of this very model (aldm evaluate --out DIR), to be kept in its card, which the service shows "
        "(default: the card has the trainings' own validation scores alone)",
    )
    parser.add_argument(
        "--register",
        metavar="NAME",
        help="register the model with MLflow as a new version of NAME: at MLFLOW_TRACKING_URI, or in the file "
        "mlflow.db beside --out (default: not registered)",
    )
    parser.add_argument(
        "--alias",
        help="with --register: let this alias, such as champion, point to the new version (default: no alias)",
    )
    return parser
