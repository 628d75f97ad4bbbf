"""The losses of the comparison methods, against the published formulas written out from what the networks say.

Everything is in evaluation mode, where a network says the same twice: no dropout, no batch statistics, no pools.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from baseline_stages import batch_of, config_of, info_of
from torch import Tensor, nn

from aldm.baselines.edges import sobel_edges
from aldm.baselines.methods import method_stage
from aldm.baselines.reggan_networks import warp
from aldm.data.store import VolumeStore
from aldm.presets import brats

EPOCHS = 7
"""Of Ea-GAN's edge term: 7 / 20 of its weight."""


@pytest.fixture
def store(ixi_store: VolumeStore) -> VolumeStore:
    return ixi_store


def built(method: str, store: VolumeStore, training: bool = False) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    stage: Any = method_stage(config_of(method), store, method)
    batch = batch_of(stage)
    for player in stage.players:
        player.module.train(training)
    return stage, batch


def turn(stage: Any, name: str, batch: dict[str, Any], info: Any) -> Tensor:
    (player,) = (player for player in stage.players if player.name == name)
    loss, _ = player.loss(player.module, batch, info)
    return loss.detach()


def cross_entropy(logits: Tensor, label: float) -> Tensor:
    chance = torch.sigmoid(logits)
    return -(label * chance.log() + (1 - label) * (1 - chance).log()).mean()


def squares(map_: Tensor, label: float | Tensor) -> Tensor:
    return ((map_ - label) ** 2).mean()


@pytest.mark.parametrize("method", ["pix2pix", "pix2pix-3d", "resvit-cnn", "resvit"])
def test_conditional_losses(method: str, store: VolumeStore) -> None:
    """D: (real + fake) / 2. G: adversarial + 100 L1; cross-entropy of pix2pix, least squares of ResViT."""
    stage, batch = built(method, store)
    adversarial = cross_entropy if method.startswith("pix2pix") else squares
    source, target = batch["source_volume"], batch["target_volume"]
    with torch.no_grad():
        fake = stage.generator(source)
        real_map, fake_map = (stage.discriminator(torch.cat([source, image], 1)) for image in (target, fake))
    wanted = {
        "discriminator": 0.5 * (adversarial(real_map, 1.0) + adversarial(fake_map, 0.0)),
        "generator": adversarial(fake_map, 1.0) + 100 * (fake - target).abs().mean(),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(turn(stage, name, batch, info_of(stage)), value)


@pytest.mark.parametrize("method", ["dea-gan", "gea-gan"])
def test_ea_gan_losses(method: str, store: VolumeStore) -> None:
    """Labels of real in 0.7 to 1.2, of fake in 0 to 0.3; edges as a channel of dEa-GAN's discriminator alone, and as a
    term of both generators: gEa-GAN's discriminator hears nothing of them."""
    stage, batch = built(method, store)
    stage.epoch_length = 10
    step = EPOCHS * 10 // stage.training.batch_size
    source, target = batch["source_volume"], batch["target_volume"]

    def judged(image: Tensor) -> Tensor:
        edges = [sobel_edges(image)] if method == "dea-gan" else []
        judgement: Tensor = stage.discriminator(torch.cat([source, image, *edges], 1))
        return judgement

    with torch.no_grad():
        fake = stage.generator(source)
        real_map, fake_map = judged(target), judged(fake)
    drawn = torch.stack([torch.rand(2, generator=torch.Generator().manual_seed(index)) for index in range(2)])
    first, second = (drawn[:, number].view(-1, 1, 1, 1, 1) for number in range(2))
    real, false = squares(real_map, 0.7 + 0.5 * first), squares(fake_map, 0.3 * second)
    torch.testing.assert_close(turn(stage, "discriminator", batch, info_of(stage, step=step)), 0.5 * (real + false))
    edges = (sobel_edges(fake) - sobel_edges(target)).abs().mean()
    wanted = squares(fake_map, 0.7 + 0.5 * first) + 300 * (fake - target).abs().mean() + 100 * EPOCHS / 20 * edges
    torch.testing.assert_close(turn(stage, "generator", batch, info_of(stage, step=step)), wanted)


@pytest.mark.parametrize("method", ["cyclegan", "cyclegan-3d"])
def test_cyclegan_losses(method: str, store: VolumeStore) -> None:
    """G: both adversarial terms + 10 cycle + 5 identity. D: (real + fake) / 2 of both ends."""
    stage, batch = built(method, store)
    a, b = batch["source_volume"], batch["target_volume"]
    to_a, to_b, of_a, of_b = (
        *(stage.generators.to_a, stage.generators.to_b),
        *(stage.discriminators.of_a, stage.discriminators.of_b),
    )
    with torch.no_grad():
        fake_a, fake_b = to_a(b), to_b(a)
        cycle = (to_a(fake_b) - a).abs().mean() + (to_b(fake_a) - b).abs().mean()
        identity = (to_a(a) - a).abs().mean() + (to_b(b) - b).abs().mean()
        adversarial = squares(of_a(fake_a), 1.0) + squares(of_b(fake_b), 1.0)
        real, fake = (squares(of_a(x), label) + squares(of_b(y), label) for x, y, label in _ends(a, b, fake_a, fake_b))
    info = info_of(stage)
    torch.testing.assert_close(turn(stage, "generator", batch, info), adversarial + 10 * cycle + 5 * identity)
    torch.testing.assert_close(turn(stage, "discriminator", batch, info), 0.5 * (real + fake))


def _ends(a: Tensor, b: Tensor, fake_a: Tensor, fake_b: Tensor) -> list[tuple[Tensor, Tensor, float]]:
    return [(a, b, 1.0), (fake_a, fake_b, 0.0)]


def test_nicegan_losses(store: VolumeStore) -> None:
    """G: adversarial + 10 cycle + 10 reconstruction. D: real + fake, not halved; three heads each."""
    stage, batch = built("nicegan", store)
    a, b = (F.pad(end, (0, 96 - end.shape[3], 0, 96 - end.shape[2]), value=-1.0) for end in _of(batch))
    generators, discriminators = stage.generators, stage.discriminators

    def heads(of: nn.Module, image: Tensor, label: float) -> Tensor:
        return sum((squares(head, label) for head in of(image)[:3]), torch.zeros(()))

    with torch.no_grad():
        z_a, z_b = discriminators.of_a.encode(a), discriminators.of_b.encode(b)
        fake_a, fake_b = generators.to_a(z_b), generators.to_b(z_a)
        cycle_a = generators.to_a(discriminators.of_b.encode(fake_b))
        cycle_b = generators.to_b(discriminators.of_a.encode(fake_a))
        cycle = (cycle_a - a).abs().mean() + (cycle_b - b).abs().mean()
        same = (generators.to_a(z_a) - a).abs().mean() + (generators.to_b(z_b) - b).abs().mean()
        both = (discriminators.of_a, discriminators.of_b)
        adversarial = sum(heads(of, fake, 1.0) for of, fake in zip(both, (fake_a, fake_b), strict=True))
        real = sum(heads(of, end, 1.0) for of, end in zip(both, (a, b), strict=True))
        fake = sum(heads(of, end, 0.0) for of, end in zip(both, (fake_a, fake_b), strict=True))
    info = info_of(stage)
    torch.testing.assert_close(turn(stage, "generator", batch, info), adversarial + 10 * cycle + 10 * same)
    torch.testing.assert_close(turn(stage, "discriminator", batch, info), real + fake)


def _of(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return batch["source_volume"], batch["target_volume"]


def test_reggan_losses(store: VolumeStore) -> None:
    """G and R: 20 L1 after registration + 10 smoothness + the square of one mean judgement an image; D not halved."""
    stage, batch = built("reggan", store)
    with torch.no_grad():  # a registration begins with next to no displacement
        for parameter in stage.generator.registration.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    info = info_of(stage)
    found = turn(stage, "generator", batch, info)
    source, target = info.shared["ends"]
    with torch.no_grad():
        fake = stage.generator.generator(source)
        flow = stage.generator.registration(fake, target)
        judged = {
            name: stage.discriminator(image).flatten(1).mean(1) for name, image in (("real", target), ("fake", fake))
        }
    smoothness = sum((flow.diff(dim=axis) ** 2).mean() for axis in (2, 3))
    assert smoothness > 0.01
    correction = (warp(fake, flow) - target).abs().mean()
    torch.testing.assert_close(found, 20 * correction + 10 * smoothness + ((judged["fake"] - 1) ** 2).mean())
    wanted = ((judged["real"] - 1) ** 2).mean() + (judged["fake"] ** 2).mean()
    torch.testing.assert_close(turn(stage, "discriminator", batch, info), wanted)


@pytest.mark.parametrize("method", ["cyclegan", "cyclegan-3d"])
def test_cyclegan_s_discriminators_see_both_pools(method: str, store: VolumeStore) -> None:
    stage, batch = built(method, store, training=True)
    info = info_of(stage)
    turn(stage, "generator", batch, info)
    turn(stage, "discriminator", batch, info)
    for pool, fakes in zip(
        (stage.discriminators.pool_a, stage.discriminators.pool_b), info.shared["fakes"], strict=True
    ):
        assert int(pool.num_images) == len(fakes)
        torch.testing.assert_close(pool.images[: len(fakes)], fakes)
    baselines = brats().baselines
    assert (baselines.cyclegan.pool_size, baselines.cyclegan_3d.pool_size) == (50, 50)


@pytest.mark.parametrize("method", ["pix2pix", "resvit", "dea-gan"])
def test_an_image_counts_once_in_the_statistics_of_batch_norms(method: str, store: VolumeStore) -> None:
    """It is made in both players' turns."""
    stage, batch = built(method, store, training=True)
    info = info_of(stage)
    for player in stage.players:
        turn(stage, player.name, batch, info)
    norms = [part for part in stage.generator.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert {int(norm.num_batches_tracked) for norm in norms} == {1}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "networks"),
    [
        *((method, ("generator", "discriminator")) for method in ("pix2pix", "pix2pix-3d", "dea-gan", "gea-gan")),
        *((method, ("generators", "discriminators")) for method in ("cyclegan", "cyclegan-3d")),
        ("resvit-cnn", ("discriminator",)),
    ],
)
def test_weights_are_drawn_as_the_authors_draw_them(method: str, networks: tuple[str, ...], store: VolumeStore) -> None:
    stage, _ = built(method, store)
    for network in networks:
        layers = [part for part in getattr(stage, network).modules() if isinstance(part, nn.modules.conv._ConvNd)]
        weights = torch.cat([layer.weight.detach().flatten() for layer in layers])
        assert abs(float(weights.std()) / 0.02 - 1) < 0.1, network
        assert abs(float(weights.mean())) < 0.002
