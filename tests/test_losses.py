"""Losses against what their definitions say, written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.config import CodecConfig
from aldm.losses import (
    adaptive_weight,
    class_loss,
    edge_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    image_space_weights,
    latent_discriminator_loss,
    latent_generator_loss,
    weighted_l1,
    weighted_mse,
)
from aldm.models.codecs import build_codec


def test_hinge_losses() -> None:
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 1.5])
    assert float(hinge_generator_loss(fake)) == pytest.approx(0.75)
    assert float(hinge_discriminator_loss(real, fake)) == pytest.approx(0.5 * (0.25 + 1.25))


def test_class_loss_is_the_mean_over_samples_and_patches() -> None:
    logits, classes = torch.randn(2, 4, 2, 3, 1), torch.tensor([3, 1])
    naive = [
        -torch.log_softmax(logits[b, :, x, y, 0], dim=0)[classes[b]]
        for b in range(2)
        for x in range(2)
        for y in range(3)
    ]
    assert torch.allclose(class_loss(logits, classes), torch.stack(naive).mean())


def sure(sample_classes: list[int], number: int) -> Tensor:
    """Logits of a discriminator that is sure of a class for each sample."""
    return 50 * F.one_hot(torch.tensor(sample_classes), number).float().view(-1, number, 1, 1, 1)


def test_fake_is_a_class_of_its_own() -> None:
    target = torch.tensor([0, 2])  # of M = 3 modalities; class 3 is fake
    assert float(latent_discriminator_loss(sure([0, 2], 4), sure([3, 3], 4), target)) < 1e-6
    assert float(latent_discriminator_loss(sure([0, 2], 4), sure([0, 0], 4), target)) > 10  # class 0 is t1, not fake
    assert float(latent_generator_loss(sure([0, 2], 4), target)) < 1e-6
    assert float(latent_generator_loss(sure([3, 2], 4), target)) > 10


def test_the_latent_discriminator_s_loss_is_the_mean_of_its_two_halves() -> None:
    real, fake, target = torch.randn(2, 4, 2, 3, 1), torch.randn(2, 4, 2, 3, 1), torch.tensor([0, 2])
    halves = class_loss(real, target), class_loss(fake, torch.tensor([3, 3]))
    assert torch.allclose(latent_discriminator_loss(real, fake, target), sum(halves) / 2)


def test_the_edge_loss_sees_blur_and_no_offset() -> None:
    x = torch.rand(1, 1, 16, 12, 8)
    assert float(edge_loss(x, x + 0.3)) < 1e-6
    blurred = F.avg_pool3d(F.pad(x, (1, 1, 1, 1, 1, 1), mode="replicate"), 3, 1)
    assert float(edge_loss(x, blurred)) > float(edge_loss(x, 0.5 * (x + blurred))) > 0.01


@pytest.mark.parametrize(
    ("shape", "scales"),
    [((16, 12, 8), 3), ((9, 10, 11), 3), ((8, 8, 6), 2), ((8, 3, 8), 1), ((6, 8, 9), 2), ((16, 17, 18), 3)],
)
def test_the_edge_loss_is_the_sum_over_scales_of_the_mean_difference(shape: tuple[int, int, int], scales: int) -> None:
    """Written out in numpy: means of 2 x 2 x 2 voxels, neighbours' differences along each axis."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, *shape))
    wanted, d = 0.0, x - y
    for _ in range(scales):
        wanted += sum(np.abs(np.diff(d, axis=axis)).mean() for axis in range(3)) / 3
        half = d[tuple(slice(0, n // 2 * 2) for n in d.shape)]
        d = sum(half[i::2, j::2, k::2] for i in (0, 1) for j in (0, 1) for k in (0, 1)) / 8
    got = edge_loss(*(torch.from_numpy(a)[None, None] for a in (x, y)))
    assert float(got) == pytest.approx(wanted, rel=1e-5)


def test_the_adaptive_weight_is_the_ratio_at_the_last_layer_and_leaves_no_gradient() -> None:
    torch.manual_seed(0)
    body, last, critic = nn.Conv3d(1, 3, 3), nn.Conv3d(3, 1, 1), nn.Conv3d(1, 1, 3)
    x, y = torch.randn(1, 1, 8, 8, 8), torch.randn(1, 1, 6, 6, 6)
    hidden = body(x)
    out = last(hidden)
    (plain,) = torch.autograd.grad(F.l1_loss(out, y), last.weight, retain_graph=True)
    (adversarial,) = torch.autograd.grad(hinge_generator_loss(critic(out)), last.weight)
    wanted = plain.norm() / (adversarial.norm() + 1e-4)

    got = adaptive_weight(
        last.weight,
        lambda weight: F.conv3d(hidden.detach(), weight, last.bias.detach()),
        lambda out: F.l1_loss(out, y),
        lambda out: hinge_generator_loss(critic(out)),
    )
    assert torch.allclose(got, wanted)
    assert not got.requires_grad
    assert all(parameter.grad is None for module in (body, last, critic) for parameter in module.parameters())


@pytest.mark.parametrize(("adversarial", "wanted"), [(0.0, 1e4), (1e-4, 4.0 / 2e-4 / 2), (1.0, 4 / 1.0001)])
def test_the_adaptive_weight_has_an_upper_limit(adversarial: float, wanted: float) -> None:
    """Where the adversarial gradient is nearly zero: |4| / (|adversarial| + 1e-4), at most 1e4."""
    got = adaptive_weight(torch.ones(1), lambda weight: weight, lambda x: 4 * x.sum(), lambda x: adversarial * x.sum())
    assert float(got) == pytest.approx(min(wanted, 1e4), rel=1e-4)


def test_the_image_space_loss_is_the_images_error_up_to_one_factor() -> None:
    torch.manual_seed(0)
    codec = build_codec(CodecConfig(kind="haar", haar_levels=2))
    std = torch.rand(codec.latent_channels) + 0.1
    weights = image_space_weights(std)
    ratios = []
    for _ in range(3):
        a, b = torch.randn(2, 1, 8, 8, 4), torch.randn(2, 1, 8, 8, 4)
        za, zb = (codec.encode(x) / std.view(1, -1, 1, 1, 1) for x in (a, b))
        ratios.append(float(weighted_mse(za, zb, weights) / F.mse_loss(a, b)))
    assert ratios == pytest.approx([float(1 / std.square().mean())] * 3, rel=1e-4)
    assert float(weights.mean()) == pytest.approx(1, rel=1e-6)


def test_without_weights_it_is_the_mean_squared_error() -> None:
    a, b = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4)
    assert torch.allclose(weighted_mse(a, b), F.mse_loss(a, b))
    assert torch.allclose(weighted_mse(a, b, torch.ones(3)), F.mse_loss(a, b))


def test_weights_multiply_channels_before_the_mean() -> None:
    a, b, weights = torch.randn(2, 3, 4, 4, 4), torch.randn(2, 3, 4, 4, 4), torch.tensor([0.5, 0.0, 3.0])
    errors = [float((a - b)[:, channel].abs().mean()) for channel in range(3)]
    assert float(weighted_l1(a, b, weights)) == pytest.approx((0.5 * errors[0] + 3 * errors[2]) / 3, rel=1e-5)
    assert torch.allclose(weighted_l1(a, b), F.l1_loss(a, b))
    each = torch.rand(2, 3)  # of every sample its own
    squares = [[float((a - b)[i, channel].square().mean()) for channel in range(3)] for i in range(2)]
    assert float(weighted_mse(a, b, each)) == pytest.approx(float((each * torch.tensor(squares)).mean()), rel=1e-5)
