"""The factory of the trainings: opens the data, builds the networks and returns the `Stage` that `fit` optimises."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from aldm.baselines.methods import method_stage
from aldm.baselines.regression_unet import RegressionStage
from aldm.baselines.resvit import FIRST, SECOND, ResViTStage
from aldm.checkpoint import load_checkpoint, load_weights
from aldm.config import Config, MSSpadeConfig
from aldm.config_baselines import METHODS
from aldm.data.labels import structures_of
from aldm.data.store import VolumeStore
from aldm.denoising import build_ms_spade
from aldm.diffusion import PREDICTS_NOISE
from aldm.errors import UserError
from aldm.latents import LatentStore
from aldm.models.ms_spade import MSSpade
from aldm.players import Stage
from aldm.randomness import derived_seed
from aldm.run_folder import checkpoint_folder
from aldm.segmenter_stage import SegmenterStage
from aldm.stage_data import LATENTS
from aldm.stage_inputs import WITHOUT_STARTING_MODEL, StageInputs
from aldm.stages import DiffusionStage, MSSpadeStage, VQGANStage, measured_residual_std
from aldm.starting_model import StartingModel
from aldm.translate import Translator
from aldm.uncertainty import FrozenModel, UncertaintyStage

logger = logging.getLogger(__name__)


def build_stage(stage: str, config: Config, paths: StageInputs) -> tuple[Stage, dict[str, str]]:
    """Open what the stage reads and build it, its initial weights a function of the seed, or those of `init_from`.

    Args:
        stage: vqgan, ms-spade, diffusion, unet, segmenter, uncertainty or a comparison method.
        config: the configuration of the whole model.
        paths: what the stage is built from.

    Returns:
        The stage, and name -> path or hash of its inputs.

    Raises:
        UserError: an input that is missing, stale, or does not go with the others.
    """
    start = _starting_model(stage, config, paths.init_from)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(config.seed, "weights", stage))
        built, inputs = _fresh_stage(stage, config, paths, start)
        if start is not None:
            start.start(built)
            inputs |= {"init_from": str(start.checkpoint.path), "init_from_hash": start.checkpoint.hash}
        if isinstance(built, MSSpadeStage):
            built.fit_intensity_map()
        return built, inputs


def _starting_model(stage: str, config: Config, folder: Path | None) -> StartingModel | None:
    """Return the model to start from, if there is one.

    Raises:
        UserError: the configuration says that the weights began as a model's, and none is named.
    """
    if folder is not None:
        return StartingModel.open(folder, stage)
    if config.init_from and stage not in WITHOUT_STARTING_MODEL:
        raise UserError(
            f"the configuration is of a training that started from {config.init_from}: name that model, `init_from`, "
            "or take another `preset`"
        )
    return None


def _fresh_stage(
    stage: str, config: Config, paths: StageInputs, start: StartingModel | None
) -> tuple[Stage, dict[str, str]]:
    """Build a stage with random weights, on data that go with the model that it is to start from."""
    if stage in ("ms-spade", "diffusion"):
        return _latent_stage(stage, config, paths, start)
    store = VolumeStore.open(paths.needed("store", stage))
    if start is not None:
        start.check_store(store)
    inputs = {"store": str(paths.store), "store_fingerprint": store.fingerprint}
    if stage in METHODS:
        return _method(stage, config, store, inputs, paths), inputs
    if stage == "segmenter":
        return SegmenterStage(config, store, structures_of(store)), inputs
    if stage == "uncertainty":
        return _uncertainty(config, store, inputs, paths.needed("model", stage)), inputs
    return (VQGANStage if stage == "vqgan" else RegressionStage)(config, store), inputs


def _latent_stage(
    stage: str, config: Config, paths: StageInputs, start: StartingModel | None
) -> tuple[Stage, dict[str, str]]:
    """Build ms-spade or diffusion."""
    latents = LatentStore.open(paths.needed("latents", stage))
    if start is not None:
        start.check_latents(latents)
    inputs = {"latents": str(paths.latents), "codec_hash": latents.codec_hash}
    inputs["store_fingerprint"] = latents.data["fingerprint"]
    if stage == "ms-spade":
        return MSSpadeStage(config, latents), inputs
    return _diffusion(config, latents, inputs, paths.needed("ms_spade", stage)), inputs


def _diffusion(config: Config, latents: LatentStore, inputs: dict[str, str], run: Path) -> Stage:
    """Build stage 3 on the result of stage 2, which the inputs then name."""
    ms_spade, ms_spade_hash, widths = load_ms_spade(run, latents)
    diffusion = config.diffusion
    if diffusion.any_sources != hasattr(ms_spade, "precision"):
        raise UserError(
            f"diffusion.any_sources is {str(diffusion.any_sources).lower()}, and {run} was trained with "
            "the other value: train ms-spade with this one too"
        )
    if diffusion.objective in PREDICTS_NOISE and diffusion.residual_std == ():
        measured = measured_residual_std(config, latents, ms_spade)
        config = replace(config, diffusion=replace(diffusion, residual_std=measured))
    inputs |= {"ms_spade": str(run), "ms_spade_hash": ms_spade_hash}
    return DiffusionStage(replace(config, ms_spade=widths), latents, ms_spade, ms_spade_hash)


def _method(stage: str, config: Config, store: VolumeStore, inputs: dict[str, str], paths: StageInputs) -> Stage:
    """Build a comparison method; the second training of ResViT goes on from the first, which the inputs then name."""
    built = method_stage(config, store, stage)
    if stage == SECOND and paths.pretrained is not None:
        assert isinstance(built, ResViTStage)
        first = load_checkpoint(checkpoint_folder(paths.pretrained), FIRST)
        built.start_from(first, paths.vit_weights)
        weights = "random" if paths.vit_weights is None else str(paths.vit_weights)
        inputs |= {"pretrained": str(paths.pretrained), "pretrained_hash": first.hash, "vit_weights": weights}
        if paths.vit_weights is None:
            logger.warning("no `vit_weights`: the transformer starts from random weights, not from ImageNet's")
    return built


def _uncertainty(config: Config, store: VolumeStore, inputs: dict[str, str], model: Path) -> Stage:
    """Build the training of a model's uncertainty; the inputs then name the model."""
    frozen = FrozenModel(Translator.load(model))
    inputs |= {"model": str(model), "model_hash": frozen.model_hash}
    return UncertaintyStage(config, store, frozen)


def load_ms_spade(folder: Path, latents: LatentStore) -> tuple[MSSpade, str, MSSpadeConfig]:
    """Return the trained MS-SPADE, its hash and its MSSpadeConfig, checked against the latents.

    Raises:
        UserError: no such checkpoint, or it was trained on latents of another codec or data set.
    """
    checkpoint = load_checkpoint(checkpoint_folder(folder), "ms-spade")
    checkpoint.check_meta(LATENTS)
    trained_on = checkpoint.meta["latents"]
    wanted = (latents.codec_hash, latents.data["fingerprint"], latents.mean.tolist(), latents.std.tolist())
    got = (trained_on["codec_hash"], trained_on["data"]["fingerprint"], trained_on["mean"], trained_on["std"])
    if got != wanted:
        raise UserError(
            f"{folder} was trained on other latents (codec {got[0][:12]}, data {got[1][:12]}) than {latents.path} "
            f"(codec {wanted[0][:12]}, data {wanted[1][:12]}): train ms-spade on these, or give its own `latents`"
        )
    module = build_ms_spade(checkpoint.config, latents.latent_channels)
    load_weights(module, checkpoint.weights, checkpoint.path)
    return module, checkpoint.hash, checkpoint.config.ms_spade
