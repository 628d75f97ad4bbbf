"""What the stages optimise and measure, against the volumes and networks behind them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aldm.baselines.regression_unet import RegressionStage
from aldm.checkpoint import load_weights
from aldm.config import Config, DiffusionConfig, SamplingConfig, TrainingConfig
from aldm.data.dataset import collate
from aldm.data.store import SPLITS, VolumeStore
from aldm.denoising import build_denoiser, build_ms_spade, build_regression_unet
from aldm.errors import UserError
from aldm.latents import LatentStore, encode_store, unstandardise
from aldm.models.codecs import build_codec
from aldm.players import Batch, StepInfo
from aldm.presets import brats, small, tiny
from aldm.randomness import derived_generator
from aldm.stages import DiffusionStage, MSSpadeStage, VQGANStage, measured_residual_std
from aldm.training import PlainEngine, fit

HAAR = replace(tiny().codec, kind="haar")


@pytest.fixture(scope="module")
def latents(brats_store: VolumeStore, tmp_path_factory: pytest.TempPathFactory) -> LatentStore:
    return encode_store(brats_store, build_codec(HAAR), HAAR, tmp_path_factory.mktemp("latents") / "haar")


def batch_of(stage: Any, number: int = 2, split: str = "train") -> Batch:
    samples = stage.samples(split)
    return collate([samples.sample(i % len(samples), derived_generator(0, i)) for i in range(number)])


def step(number: int, stage: Any, batch: Batch, *, playing: bool = True) -> StepInfo:
    generators = [derived_generator(1, i) for i in range(len(batch["subject_id"]))]
    return StepInfo(number, generators, frozenset(player.name for player in stage.players if playing))


def connected(stage: Any, engine: PlainEngine | None = None) -> Any:
    engine = engine or PlainEngine()
    for player in stage.players:
        engine.prepare(player)
    stage.connect(engine)
    return stage


def volume_psnr(latents: LatentStore, z: torch.Tensor, wanted: torch.Tensor) -> float:
    """PSNR, dB, on [0, 1] of the decoded volumes."""
    mean, std = torch.from_numpy(latents.mean), torch.from_numpy(latents.std)
    a, b = ((build_codec(HAAR).decode(unstandardise(x, mean, std)) + 1) / 2 for x in (z, wanted))
    return float(-10 * torch.log10((a - b).square().mean()))


def test_the_codebook_moves_from_the_first_step(brats_store: VolumeStore) -> None:
    stage = connected(VQGANStage(tiny(), brats_store))
    batch = batch_of(stage)
    for number in range(2):  # the first step puts the codes on its own vectors
        before = stage.codec.quantizer.codebook.clone()
        stage.players[0].loss(stage.codec, batch, step(number, stage, batch, playing=False))
        assert not torch.equal(before, stage.codec.quantizer.codebook)


def test_finite_scalars_train_without_a_commitment(brats_store: VolumeStore) -> None:
    """Encoder, decoder and the counts of the codes go into the checkpoint, and another codec takes them."""
    config = replace(tiny(), codec=replace(tiny().codec, quantizer="fsq", fsq_levels=(5, 4)))
    stage = connected(VQGANStage(config, brats_store))
    batch = batch_of(stage)
    loss, values = stage.players[0].loss(stage.codec, batch, step(0, stage, batch, playing=False))
    assert loss == values["reconstruction_loss"]
    assert values["commitment_loss"] == 0
    codes_used = values["codebook_usage"] * 20
    assert 1 <= values["perplexity"] <= codes_used <= 20
    exported = stage.export({"codec": stage.codec.state_dict()})
    other = build_codec(exported.config.codec)
    load_weights(other, exported.weights, "here")
    assert other.quantizer is not None
    assert other.quantizer.usage() == values["codebook_usage"]
    torch.testing.assert_close(
        other.eval()(batch["volume"]).reconstruction, stage.codec(batch["volume"]).reconstruction
    )


def test_the_vqgan_loss_is_the_sum_of_its_terms(brats_store: VolumeStore) -> None:
    stage = connected(VQGANStage(tiny(), brats_store))
    batch = batch_of(stage)
    info = step(5, stage, batch)
    loss, values = stage.players[0].loss(stage.codec, batch, info)
    weight = tiny().train_vqgan.adversarial_weight * values["adaptive_weight"]
    terms = values["reconstruction_loss"] + values["commitment_loss"]
    assert torch.allclose(loss, terms + weight * values["adversarial_loss"])
    assert float(values["adaptive_weight"]) > 0

    alone, plain = stage.players[0].loss(stage.codec, batch, step(5, stage, batch, playing=False))
    assert "adversarial_loss" not in plain
    assert torch.allclose(alone, plain["reconstruction_loss"] + plain["commitment_loss"])


def test_the_adaptive_weight_is_that_of_the_training_graph(brats_store: VolumeStore) -> None:
    for kind in ("vqgan", "haar-vqgan"):
        config = replace(tiny(), codec=replace(tiny().codec, kind=kind))
        stage = connected(VQGANStage(config, brats_store))
        stage.codec.eval()  # the codebook stands still between the passes
        batch = batch_of(stage)
        _, values = stage.players[0].loss(stage.codec, batch, step(5, stage, batch))
        assert_same_in_slabs(stage, batch, values)
        last = stage.codec.last_layer.weight
        reconstruction = stage.codec(batch["volume"]).reconstruction
        (plain,) = torch.autograd.grad(F.l1_loss(reconstruction, batch["volume"]), last, retain_graph=True)
        (adversarial,) = torch.autograd.grad(-stage.discriminator(reconstruction).mean(), last)
        assert torch.allclose(values["adaptive_weight"], plain.norm() / (adversarial.norm() + 1e-4), rtol=1e-4)


def assert_same_in_slabs(stage: VQGANStage, batch: dict, whole: dict) -> None:
    """A codec whose tensors are too large for a kernel runs in slabs: the same losses and the same gradients."""
    parameters = list(stage.codec.parameters())
    gradients = []
    small = {"vqgan": 30_000, "haar-vqgan": 9_000}[stage.config.codec.kind]
    for limit, recompute in ((2**31 - 1, False), (small, False), (small, True)):
        stage.codec.max_tensor_elements, stage.codec.activation_checkpointing = limit, recompute
        loss, values = stage.players[0].loss(stage.codec, batch, step(5, stage, batch))
        with stage._last_calls() as calls, torch.no_grad():
            stage.codec(batch["volume"])
        assert (len(calls) > 1) == (limit == small)
        for name in ("reconstruction_loss", "adversarial_loss", "adaptive_weight"):
            assert torch.allclose(values[name], whole[name], rtol=1e-4), name
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    for got in gradients[1:]:
        for a, b in zip(got, gradients[0], strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.allclose(a, b, rtol=1e-3, atol=1e-6)
    stage.codec.max_tensor_elements, stage.codec.activation_checkpointing = 2**31 - 1, False


def test_the_edge_term_is_added(brats_store: VolumeStore) -> None:
    without, with_ = (
        connected(VQGANStage(replace(tiny(), train_vqgan=replace(tiny().train_vqgan, edge_weight=w)), brats_store))
        for w in (0.0, 1.0)
    )
    load_weights(with_.codec, without.codec.state_dict(), "the other")
    batch = batch_of(without)
    losses = [
        stage.players[0].loss(stage.codec.eval(), batch, step(0, stage, batch, playing=False))[0].item()
        for stage in (without, with_)
    ]
    assert losses[1] > losses[0]


def test_the_discriminator_learns_to_tell_and_the_generator_gets_its_gradient(brats_store: VolumeStore) -> None:
    stage = VQGANStage(tiny(), brats_store)
    engine = PlainEngine()
    connected(stage, engine)
    batch = batch_of(stage)
    generator, discriminator = stage.players
    losses = []
    for number in range(15):
        info = step(number, stage, batch)
        info.shared["reconstruction"] = torch.zeros_like(batch["volume"])
        loss, _ = discriminator.loss(stage.discriminator, batch, info)
        engine.backward(discriminator, loss)
        engine.step(discriminator, 0.01)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    with_, without = [], []
    for gradients, playing in ((with_, True), (without, False)):
        stage.codec.zero_grad()
        generator.loss(stage.codec.eval(), batch, step(0, stage, batch, playing=playing))[0].backward()
        gradients += [parameter.grad.clone() for parameter in stage.codec.decoder.parameters()]
    assert any(not torch.allclose(a, b) for a, b in zip(with_, without, strict=True))


def test_a_codec_without_weights_is_not_trained(brats_store: VolumeStore) -> None:
    with pytest.raises(UserError, match="nothing to train"):
        VQGANStage(replace(tiny(), codec=HAAR), brats_store)


def test_a_crop_that_the_codec_does_not_take_is_refused(brats_store: VolumeStore) -> None:
    config = replace(tiny(), train_vqgan=replace(tiny().train_vqgan, crop=(16, 10, 16)))
    with pytest.raises(UserError, match="16 x 10 x 16 voxels, which the codec's downsampling of 4 does not divide"):
        VQGANStage(config, brats_store)


def test_a_discriminator_with_too_many_layers_is_refused(brats_store: VolumeStore, latents: LatentStore) -> None:
    config = replace(
        tiny(),
        train_vqgan=replace(tiny().train_vqgan, discriminator_layers=4),
        train_ms_spade=replace(tiny().train_ms_spade, discriminator_layers=3),
    )
    with pytest.raises(UserError, match="discriminator_layers is 4, on 16 x 16 x 16 voxels at most 3 leave 2 patches"):
        VQGANStage(config, brats_store)
    with pytest.raises(UserError, match="discriminator_layers is 3, on 8 x 12 x 8 voxels at most 2 leave 2 patches"):
        MSSpadeStage(config, latents)


def test_data_without_a_modality_of_the_preset_are_refused(ixi_store: VolumeStore) -> None:
    with pytest.raises(UserError, match="preset brats is for t1, t1ce, t2, flair, the data have t1, t2, pd"):
        RegressionStage(brats(), ixi_store)


def test_the_configuration_takes_on_what_the_data_were_made_with(latents: LatentStore) -> None:
    stage = MSSpadeStage(replace(tiny(), preprocess=small().preprocess), latents)
    assert stage.config.modalities == ("t1", "t1ce", "t2", "flair")
    assert stage.config.preprocess == tiny().preprocess
    assert stage.config.codec == HAAR


def test_ms_spades_discriminator_has_a_class_for_fake(latents: LatentStore) -> None:
    stage = connected(MSSpadeStage(tiny(), latents))
    batch = batch_of(stage)
    assert stage.discriminator(batch["z_target"]).shape[1] == 5
    info = step(9, stage, batch)
    loss, values = stage.players[0].loss(stage.ms_spade, batch, info)
    assert torch.allclose(loss, values["l1"] + tiny().train_ms_spade.adversarial_weight * values["adversarial_loss"])
    assert not info.shared["z_target_like"].requires_grad
    loss, _ = stage.players[1].loss(stage.discriminator, batch, info)
    loss.backward()
    assert all(parameter.grad is None for parameter in stage.ms_spade.parameters())


def test_stage_2_scores_in_volumes_where_the_codec_is_isometric(latents: LatentStore) -> None:
    stage = connected(MSSpadeStage(tiny(), latents))
    batch = batch_of(stage, 1)
    with torch.no_grad():
        values = stage.validate({"ms-spade": stage.ms_spade}, batch, step(0, stage, batch))
        z = stage.ms_spade(batch["z_source"], batch["target"], batch["source"])
    assert float(values["psnr_db"]) == pytest.approx(volume_psnr(latents, z, batch["z_target"]), abs=0.01)


def diffusion_stage(latents: LatentStore, config: Config | None = None) -> DiffusionStage:
    torch.manual_seed(0)
    config = config or tiny()
    ms_spade = MSSpadeStage(config, latents).ms_spade
    return connected(DiffusionStage(config, latents, ms_spade, "0" * 64))


def test_the_target_like_latent_is_ms_spades_whatever_batch_it_is_in(latents: LatentStore) -> None:
    stage = diffusion_stage(latents)
    batch = batch_of(stage, 3)
    first = stage._z_target_like(batch, batch["target"].tolist())
    again = stage._z_target_like(batch, batch["target"].tolist())  # from memory
    assert torch.equal(first, again)
    fresh = diffusion_stage(latents)
    fresh._ms_spade.load_state_dict(stage._ms_spade.state_dict())
    single = {key: value[1:2] for key, value in batch.items()}
    assert torch.equal(fresh._z_target_like(single, single["target"].tolist()), first[1:2])
    with torch.no_grad():
        wanted = stage._ms_spade(batch["z_source"], batch["target"], batch["source"])
    assert torch.allclose(first, wanted, atol=2e-3)


def test_the_memory_of_target_like_latents_is_bounded(latents: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = diffusion_stage(latents)
    batch = batch_of(stage, 3)
    one = 2 * batch["z_source"][0].numel()
    monkeypatch.setattr("aldm.stages.TARGET_LIKE_CACHE_BYTES", one)
    first = stage._z_target_like(batch, batch["target"].tolist())
    assert sum(z.nbytes for z in stage._target_like.values()) == one
    assert torch.equal(stage._z_target_like(batch, batch["target"].tolist()), first)


def test_how_far_stage_2_is_from_the_target_is_measured(latents: LatentStore) -> None:
    config = replace(tiny(), modalities=latents.modalities, pair=latents.modalities[:2])
    squares = []

    def halved(z_source: Tensor, *_: Tensor) -> Tensor:
        return z_source / 2

    for subject in latents.subjects("validation"):
        source, target = (latents.latent(subject.subject_id, name) for name in latents.modalities[:2])
        squares.append(((target - source / 2) ** 2).mean(axis=(1, 2, 3)))
    measured = measured_residual_std(config, latents, halved)
    np.testing.assert_allclose(measured, np.sqrt(np.mean(squares, axis=0)), rtol=6e-3)


def test_stage_3_samples_its_score_in_volumes(latents: LatentStore) -> None:
    sampling = SamplingConfig(sampler="one-step", num_inference_steps=1)
    config = replace(tiny(), diffusion=DiffusionConfig(objective="regression"), sampling=sampling)
    stage = diffusion_stage(latents, config)
    batch = batch_of(stage, 1, "validation")
    with torch.no_grad():
        values = stage.validate({"unet": stage.unet}, batch, step(0, stage, batch))
    z_target_like = stage._z_target_like(batch, batch["target"].tolist())
    # an untrained regression repeats the target-like latent
    wanted = volume_psnr(latents, z_target_like, batch["z_target"])
    assert float(values["psnr_db"]) == pytest.approx(wanted, abs=0.01)
    assert float(values["ms_spade_psnr_db"]) == pytest.approx(wanted, abs=0.01)


def test_the_noise_of_a_sample_does_not_depend_on_the_batch(latents: LatentStore) -> None:
    stage = diffusion_stage(latents)
    batch = batch_of(stage, 3)
    whole, _ = stage.players[0].loss(stage.unet, batch, step(0, stage, batch))
    singles = []
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in batch.items()}
        info = StepInfo(0, [derived_generator(1, i)], frozenset())
        singles.append(stage.players[0].loss(stage.unet, one, info)[0])
    assert torch.allclose(whole, torch.stack(singles).mean(), atol=1e-5)


def test_a_sampler_that_does_not_go_with_the_objective_is_refused_before_training(latents: LatentStore) -> None:
    config = replace(tiny(), sampling=SamplingConfig(sampler="one-step", num_inference_steps=1))
    with pytest.raises(UserError, match="sampler 'one-step' cannot be used with a model of objective 'v'"):
        diffusion_stage(latents, config)


def test_the_image_space_loss_needs_an_isometric_codec(latents: LatentStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ms_spade = MSSpadeStage(tiny(), latents).ms_spade
    monkeypatch.setattr(latents, "isometric", False)
    training = replace(tiny().train_diffusion, image_space_loss=True)
    with pytest.raises(UserError, match=r"train_diffusion\.image_space_loss needs latents of an isometric codec"):
        DiffusionStage(replace(tiny(), train_diffusion=training), latents, ms_spade, "hash")
    with pytest.raises(UserError, match=r"train_ms_spade\.image_space_loss needs latents of an isometric codec"):
        MSSpadeStage(replace(tiny(), train_ms_spade=training), latents)


def test_the_image_space_loss_weighs_channels(latents: LatentStore) -> None:
    training = replace(tiny().train_diffusion, image_space_loss=True)
    one_step = SamplingConfig(sampler="one-step", num_inference_steps=1)
    config = replace(
        tiny(),
        codec=HAAR,
        diffusion=DiffusionConfig(objective="regression"),
        train_diffusion=training,
        sampling=one_step,
    )
    stage = diffusion_stage(latents, config)
    batch = batch_of(stage, 2)
    loss, _ = stage.players[0].loss(stage.unet, batch, step(0, stage, batch))
    mean, std = torch.from_numpy(latents.mean), torch.from_numpy(latents.std)
    decode = build_codec(HAAR).decode
    predicted = decode(
        unstandardise(stage._z_target_like(batch, batch["target"].tolist()), mean, std)
    )  # of an untrained network
    wanted = decode(unstandardise(batch["z_target"], mean, std))
    assert torch.allclose(loss, F.mse_loss(predicted, wanted) / std.square().mean(), rtol=1e-4)


def test_the_regression_loss_is_four_times_the_squared_error_and_the_absolute_one(brats_store: VolumeStore) -> None:
    stage = RegressionStage(tiny(), brats_store)
    pairs = stage.samples("train")
    batch = collate([pairs.sample(i, torch.Generator().manual_seed(i)) for i in range(2)])
    loss, values = stage.players[0].loss(stage.unet, batch, StepInfo(0, [], frozenset(["unet"])))
    errors = -1 - batch["target_volume"]  # a network that is new says that nothing is there
    assert torch.allclose(loss, 4 * errors.square().mean() + errors.abs().mean())
    assert torch.allclose(values["mse"], errors.square().mean())


def test_a_regression_that_trains_on_crops_is_judged_on_whole_volumes(brats_store: VolumeStore) -> None:
    stage = RegressionStage(replace(tiny(), train_unet=replace(tiny().train_unet, crop=(8, 8, 8))), brats_store)
    sides = [stage.samples(split).sample(0, torch.Generator())["target_volume"].shape[1:] for split in SPLITS[:2]]
    assert sides == [(8, 8, 8), brats_store.preprocess.spatial_shape]


@pytest.mark.parametrize("name", ["codec", "ms-spade", "diffusion", "unet"])
def test_what_is_exported_loads_strictly_into_a_fresh_network(
    name: str, brats_store: VolumeStore, latents: LatentStore
) -> None:
    config = replace(tiny(), modalities=latents.modalities)
    stage: Any = {
        "codec": lambda: VQGANStage(config, brats_store),
        "ms-spade": lambda: MSSpadeStage(config, latents),
        "diffusion": lambda: diffusion_stage(latents, config),
        "unet": lambda: RegressionStage(config, brats_store),
    }[name]()
    export = stage.export({player.name: player.module.state_dict() for player in stage.players})
    fresh = {
        "codec": lambda: build_codec(config.codec),
        "ms-spade": lambda: build_ms_spade(config, latents.latent_channels),
        "diffusion": lambda: build_denoiser(config, latents.latent_channels),
        "unet": lambda: build_regression_unet(config),
    }[name]()
    assert export.kind == name
    load_weights(fresh, export.weights, "the stage")


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param("ms-spade", 150, marks=pytest.mark.slow),
        ("diffusion", 150),
        ("unet", 60),
    ],
)
def test_tiny_overfits_one_subject(
    name: str, steps: int, brats_store: VolumeStore, latents: LatentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TrainingConfig(
        max_steps=steps,
        learning_rate=5e-3,
        optimizer="adamw",
        decay="cosine",
        validate_every=1000,
        checkpoint_every=1000,
        log_every=10,
        same_modality_fraction=0.0,
    )
    config = replace(
        tiny(),
        modalities=("t1", "t2"),
        diffusion=DiffusionConfig(objective="regression"),
        sampling=SamplingConfig(sampler="one-step", num_inference_steps=1),
        train_ms_spade=training,
        train_diffusion=training,
        train_unet=training,
    )
    for store in (brats_store, latents):
        subjects = {split: store.subjects(split)[:1] for split in ("train", "validation")}
        monkeypatch.setattr(store, "subjects", lambda split=None, subjects=subjects: subjects[split])
    stage: Any = {
        "ms-spade": lambda: MSSpadeStage(config, latents),
        "diffusion": lambda: diffusion_stage(latents, config),
        "unet": lambda: RegressionStage(config, brats_store),
    }[name]()
    records: list[dict[str, Any]] = []
    fit(stage, PlainEngine(), training, seed=0, on_log=records.append, on_checkpoint=lambda snapshot: None)
    losses = [record[f"{stage.players[0].name}/loss"] for record in records if "learning_rate" in record]
    assert losses[-1] < 0.5 * losses[0]


def test_the_run_folder_is_not_needed(tmp_path: Path, brats_store: VolumeStore) -> None:
    config = replace(tiny().train_unet, max_steps=2, validate_every=1)
    stage = RegressionStage(replace(tiny(), train_unet=config), brats_store)
    result = fit(stage, PlainEngine(), config, seed=0, on_log=lambda r: None, on_checkpoint=lambda s: s.write(tmp_path))
    assert result.step == 2
    assert (tmp_path / "weights.safetensors").is_file()
