"""What tells a faithful comparison method from a toy that bears its name: whole sizes, and who learns from what."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from baseline_stages import PAIR, batch_of, config_of, gradient, info_of, play
from torch import Tensor, nn

from aldm.baselines.eagan import EaGANStage
from aldm.baselines.methods import method_stage
from aldm.baselines.nicegan import NiceGANStage
from aldm.baselines.nicegan_networks import NiceGenerator
from aldm.config import training_of
from aldm.config_baselines import METHODS
from aldm.data.store import VolumeStore
from aldm.engine import make_optimizer
from aldm.models.codecs import build_codec
from aldm.planner import StandIn
from aldm.presets import brats


@pytest.fixture
def store(ixi_store: VolumeStore) -> VolumeStore:
    return ixi_store


@pytest.mark.parametrize(
    ("method", "millions", "changes"),
    [
        ("pix2pix", 57.17, {}),
        ("pix2pix-3d", 77.65, {"norm": "batch"}),
        ("cyclegan", 28.26, {}),
        ("cyclegan-3d", 90.32, {}),
        ("nicegan", 109.94, {}),
        ("reggan", 16.19, {"registration_levels": 7}),
        ("resvit", 126.21, {}),
        ("dea-gan", 77.66, {}),
        ("dea-gan", 178.33, {"num_levels": 7}),
    ],
)
def test_parameters_of_whole_systems(method: str, millions: float, changes: dict[str, Any]) -> None:
    """All players of a training at the published widths; ResViT's at its published 256 x 256."""
    config = replace(brats(), pair=PAIR)
    own = method.replace("-", "_")
    section = replace(getattr(config.baselines, own), **changes)
    slices = (256, 256) if method == "resvit" else config.baselines.slice_shape
    config = replace(config, baselines=replace(config.baselines, slice_shape=slices, **{own: section}))
    with torch.device("meta"):
        data: Any = StandIn(config, build_codec(config.codec))
        stage = method_stage(config, data, method)
    number = sum(parameter.numel() for player in stage.players for parameter in player.module.parameters())
    assert round(number / 1e6, 2) == millions


def test_the_published_schedules() -> None:
    """Batch sizes of the paper's supplement, rates and lengths of the methods' authors."""
    trainings = {method: training_of(brats(), method) for method in METHODS}
    published = {
        "pix2pix": (32, 2e-4, 200, "linear", 0.5),
        "pix2pix-3d": (1, 2e-4, 200, "linear", 0.5),
        "cyclegan": (32, 2e-4, 200, "linear", 0.5),
        "cyclegan-3d": (1, 2e-4, 200, "linear", 0.5),
        "nicegan": (32, 1e-4, 200, "linear", 0.5),
        "reggan": (32, 1e-4, 80, "constant", 0.5),
        "resvit-cnn": (32, 2e-4, 100, "linear", 0.5),
        "resvit": (32, 1e-3, 50, "linear", 0.5),
        "dea-gan": (1, 2e-4, 150, "linear", 2 / 3),
        "gea-gan": (1, 2e-4, 150, "linear", 2 / 3),
    }
    for method, training in trainings.items():
        found = (training.batch_size, training.learning_rate, training.epochs, training.decay, training.decay_start)
        assert found == published[method], method
        assert (training.betas, training.gradient_clip) == ((0.5, 0.999), None)
        assert training.weight_decay == (1e-4 if method == "nicegan" else 0)
        assert training.max_steps == (300_000 if method == "nicegan" else None)


def test_pix2pix_learns_from_pairs(store: VolumeStore) -> None:
    """Its loss is no sum of what concerns the source and what concerns the target, as CycleGAN's is."""
    stage = method_stage(config_of("pix2pix"), store, "pix2pix")
    generator = torch.Generator().manual_seed(0)
    a1, a2, b1, b2 = (torch.rand(1, 1, 16, 32, generator=generator) * 2 - 1 for _ in range(4))
    player = stage.players[1]
    assert player.name == "generator"

    def loss(a: Tensor, b: Tensor) -> float:
        batch = {"source_volume": a, "target_volume": b}
        return float(player.loss(player.module, batch, info_of(stage, 1))[0].detach())

    assert loss(a1, b1) + loss(a2, b2) != pytest.approx(loss(a1, b2) + loss(a2, b1), abs=1e-3)


def test_a_discriminator_of_nicegan_learns_nothing_from_the_other_domain(store: VolumeStore) -> None:
    """Its encoder makes the fakes of the other domain, which are judged without a way back to it."""
    stage = method_stage(config_of("nicegan"), store, "nicegan")
    assert isinstance(stage, NiceGANStage)
    batch, player = batch_of(stage), stage.players[0]
    assert player.name == "discriminator"

    def gradients() -> list[Tensor]:
        stage.discriminators.zero_grad(set_to_none=True)
        state = {name: value.clone() for name, value in stage.discriminators.named_buffers()}
        play(stage, player, batch, info_of(stage))
        for name, value in stage.discriminators.named_buffers():  # spectral norms move at every use
            value.copy_(state[name])
        return [parameter.grad.clone() for parameter in stage.discriminators.of_a.encoder.parameters()]  # type: ignore[union-attr]

    before = gradients()
    assert all(each.any() for each in before)
    other = stage.discriminators.of_b
    with torch.no_grad():
        for head in (other.trunk, other.local_head, other.global_head):
            for parameter in head.parameters():
                parameter.add_(torch.randn_like(parameter))
    for one, again in zip(before, gradients(), strict=True):
        assert torch.equal(one, again)


def test_the_generator_of_nicegan_has_no_encoder_of_its_own() -> None:
    generator = NiceGenerator(4, num_blocks=1)
    with pytest.raises(RuntimeError):
        generator(torch.randn(1, 1, 96, 96))


def test_a_turn_of_nicegan_s_generators_leaves_the_discriminators_parameters_alone(store: VolumeStore) -> None:
    """Although gradients flow through them, as here where nobody freezes them."""
    stage = method_stage(config_of("nicegan"), store, "nicegan")
    assert isinstance(stage, NiceGANStage)
    frozen, moving = stage.discriminators, stage.generators
    before = [[p.detach().clone() for p in module.parameters()] for module in (frozen, moving)]
    player = stage.players[1]
    optimizer = make_optimizer(player)
    player.loss(player.module, batch_of(stage), info_of(stage))[0].backward()
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    optimizer.step()
    assert gradient(frozen) > 0
    assert all(torch.equal(a, b) for a, b in zip(before[0], frozen.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before[1], moving.parameters(), strict=True))


def test_the_registration_of_reggan_is_not_exported(store: VolumeStore) -> None:
    stage = method_stage(config_of("reggan"), store, "reggan")
    export = stage.export({player.name: player.module.state_dict() for player in stage.players})
    assert export.weights.keys() == stage.generator.generator.state_dict().keys()  # type: ignore[attr-defined]


def test_the_generator_of_dea_gan_hears_what_its_edges_are_judged_as(store: VolumeStore) -> None:
    """The gradient that comes through the edge channel alone."""
    stage = method_stage(config_of("dea-gan"), store, "dea-gan")
    assert isinstance(stage, EaGANStage)
    first = next(layer for layer in stage.discriminator.modules() if isinstance(layer, nn.Conv3d))
    assert first.in_channels == 3
    with torch.no_grad():
        first.weight[:, 1].zero_()  # the image itself
    batch = batch_of(stage, 1)
    fake = stage.generator(batch["source_volume"])
    stage.discriminator(stage.judged(batch["source_volume"], fake)).square().mean().backward()
    assert gradient(stage.generator) > 0
    stage.generator.zero_grad()
    with torch.no_grad():
        first.weight[:, 2].zero_()
    fake = stage.generator(batch["source_volume"])
    stage.discriminator(stage.judged(batch["source_volume"], fake)).square().mean().backward()
    assert gradient(stage.generator) == 0


def test_smoothed_labels_of_ea_gan_are_drawn_anew_for_every_sample(store: VolumeStore) -> None:
    stage = method_stage(config_of("gea-gan"), store, "gea-gan")
    judgement = torch.zeros(64, 1, 2, 2, 2)
    info = info_of(stage, 64)
    real = [float(stage.adversarial(judgement[:1], True, replace(info, generators=[g]))) for g in info.generators]
    fake = [float(stage.adversarial(judgement[:1], False, replace(info, generators=[g]))) for g in info.generators]
    for squares, low, high in ((real, 0.7, 1.2), (fake, 0.0, 0.3)):
        labels = np.sqrt(squares)  # of a judgement of 0
        assert low <= labels.min() < low + 0.1 < high - 0.1 < labels.max() <= high
    whole = stage.adversarial(judgement, True, info_of(stage, 64))
    assert float(whole) == pytest.approx(np.mean(real), rel=1e-5)
