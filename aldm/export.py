"""Trained stages put together into one model, and the folder that holds it: all that using the model needs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aldm.checkpoint import (
    CONFIG,
    WAY_OUT,
    load_checkpoint,
    load_weights,
    read_checkpoint_record,
    write_checkpoint,
)
from aldm.config import Config, override
from aldm.config_baselines import METHODS
from aldm.data.store import VolumeStore
from aldm.denoising import build_error_unet, check_regression_weights
from aldm.encoding import load_codec
from aldm.errors import UserError
from aldm.files import atomic_folder
from aldm.latents import codec_hash
from aldm.model_card import CARD_FILE, README_FILE, ExportedModel, model_card, read_card_scores
from aldm.predictors import KINDS, UNCERTAINTY
from aldm.records import check_record
from aldm.run_folder import checkpoint_folder
from aldm.sampling import check_sampling
from aldm.stage_data import LATENTS
from aldm.starting_model import model_folder
from aldm.translate import Translator
from aldm.uncertainty import calibrate

TRAINING = {"training.stage": str, "training.step": int, "training.validation": dict}
"""What a training leaves in the meta of its checkpoint."""


def write_model(
    model: ExportedModel, out: str | Path, *, scores: str | Path | None = None, overwrite: bool = False
) -> str:
    """Write the folder of a model: its weights, its configuration and its card.

    Args:
        model: from `aldm_model`, `baseline_model` or `with_uncertainty`.
        out: the folder; it appears when it is whole.
        scores: folder of an evaluation of this very model, for the card.
        overwrite: replace a model that is there.

    Returns:
        The hash of the weights.

    Raises:
        UserError: the folder is there, or the evaluation is of another model.
    """
    with atomic_folder(out, overwrite, marker=CONFIG) as temporary:
        digest = write_checkpoint(
            temporary, kind=model.kind, config=model.config, weights=model.weights, meta=model.meta
        )
        found = None if scores is None else read_card_scores(Path(scores), digest)
        (temporary / README_FILE).write_text(model_card(model, digest, found))
        if found is not None:
            (temporary / CARD_FILE).write_text(json.dumps(found, indent=1) + "\n")
    return digest


def aldm_model(codec: str | Path, ms_spade: str | Path, diffusion: str | Path) -> ExportedModel:
    """Put codec, MS-SPADE and U-Net together.

    Args:
        codec: run folder of stage 1, an exported model, or "haar".
        ms_spade, diffusion: run folders of stages 2 and 3.

    Raises:
        UserError: a run without checkpoint, or stages that were not trained on each other's results.
    """
    stage_3 = load_checkpoint(checkpoint_folder(diffusion), "diffusion")
    stage_2 = load_checkpoint(checkpoint_folder(ms_spade), "ms-spade")
    stage_2.check_meta({**LATENTS, **TRAINING})
    stage_3.check_meta({**LATENTS, **TRAINING, **_data("latents.data"), "modalities": list, "ms_spade_hash": str})
    latents = stage_3.meta["latents"]
    module, codec_config = load_codec(str(codec), stage_3.config)
    own_hash = codec_hash(codec_config, module.state_dict())
    for name, run in ((diffusion, stage_3), (ms_spade, stage_2)):
        trained_with = run.meta["latents"]["codec_hash"]
        if trained_with != own_hash:
            raise UserError(
                f"{name} was trained on latents of codec {trained_with[:12]}, `codec` {codec} is {own_hash[:12]}: give "
                "the codec that the latents were encoded with"
            )
    if stage_3.meta["ms_spade_hash"] != stage_2.hash:
        raise UserError(
            f"{diffusion} was trained with MS-SPADE {stage_3.meta['ms_spade_hash'][:12]}, {ms_spade} holds "
            f"{stage_2.hash[:12]}: give the run that it was trained with, or train diffusion again"
        )
    parts = {"codec": module.state_dict(), "ms_spade": stage_2.weights, "unet": stage_3.weights}
    return ExportedModel(
        kind="aldm",
        config=replace(stage_3.config, ms_spade=stage_2.config.ms_spade),
        weights={f"{part}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()},
        meta={
            "modalities": stage_3.meta["modalities"],
            "latents": {name: value for name, value in latents.items() if name != "data"},
            "data": latents["data"],
            "median_percentiles": latents["data"]["median_percentiles"],
            "training": [*_codec_training(str(codec)), stage_2.meta["training"], stage_3.meta["training"]],
        },
    )


def baseline_model(run: str | Path) -> ExportedModel:
    """Take the one network of a run: the regression U-Net or a comparison method.

    Raises:
        UserError: the run holds no checkpoint of one of these, or one of an earlier version's U-Net.
    """
    checkpoint = load_checkpoint(checkpoint_folder(run), "unet", *METHODS)
    part = "network"
    if checkpoint.kind == "unet":
        check_regression_weights(checkpoint.weights, "", checkpoint.path)
        part = "unet"
    checkpoint.check_meta({**TRAINING, **_data("data"), "modalities": list})
    return ExportedModel(
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
    model: Path, run: Path, store: Path, device: torch.device, changes: tuple[Sequence[str], str | None] = ((), None)
) -> ExportedModel:
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
    return ExportedModel(
        kind=before.kind,
        config=config,
        weights=weights | {f"error_unet.{name}": tensor for name, tensor in learnt.weights.items()},
        meta={
            **before.meta,
            UNCERTAINTY: calibration.to_dict(),
            "training": [*before.meta["training"], learnt.meta["training"]],
        },
    )


def halved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with the 32-bit floating-point ones in 16 bits: half the file; whoever loads them computes in 32.

    Raises:
        UserError: a weight that 16 bits do not hold.
    """
    smaller = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in weights.items()}
    lost = [name for name, tensor in smaller.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if lost:
        raise UserError(f"`half`: {lost[0]} holds numbers beyond 16 bits: export without it")
    return smaller


def used_config(kind: str, config: Config, assignments: Sequence[str], precision: str | None) -> Config:
    """Return a model's configuration with the way that it is used by default changed: sampling and precision.

    Raises:
        UserError: something else is to be changed, or the sampler does not go with the model.
    """
    foreign = [assignment for assignment in assignments if not assignment.startswith("sampling.")]
    if foreign:
        raise UserError(f"`set` {foreign[0]}: a trained model is exported as it is; only sampling.* can be set here")
    config = override(config, assignments)
    if kind == "aldm":
        sampling = config.sampling
        check_sampling(
            config.diffusion, sampling.sampler, sampling.num_inference_steps, sampling.num_samples, sampling.eta
        )
    return config if precision is None else replace(config, precision=precision)


def _codec_training(codec: str) -> list[dict[str, Any]]:
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
