"""NICE-GAN's networks: published sizes, receptive fields of the judgements, what a gradient and a step may touch."""

import pytest
import torch
from torch import Tensor, nn

from aldm.baselines.nicegan_networks import ILN, AdaILN, NiceDiscriminator, NiceGenerator
from aldm.errors import UserError


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_parameters_of_the_published_networks() -> None:
    with torch.device("meta"):
        discriminator = NiceDiscriminator()
        assert num_parameters(discriminator) == 46_872_385
        assert num_parameters(discriminator.encoder, discriminator.attention) == 165_441
        assert num_parameters(NiceGenerator()) == 8_098_368
        assert num_parameters(NiceGenerator(num_blocks=4)) == 5_737_024


@pytest.mark.parametrize(
    ("sides", "local", "whole"),
    [((256, 256), (30, 30), (6, 6)), ((240, 240), (28, 28), (5, 5)), ((256, 160), (30, 18), (6, 3))],
)
def test_maps_of_the_discriminator(sides: tuple[int, int], local: tuple[int, int], whole: tuple[int, int]) -> None:
    with torch.device("meta"):
        discriminator, generator = NiceDiscriminator(8), NiceGenerator(8)
        local_map, global_map, logit, z = discriminator(torch.empty(2, 1, *sides))
        assert local_map.shape == (2, 1, *local)
        assert global_map.shape == (2, 1, *whole)
        assert logit.shape == (2, 1)
        assert z.shape == (2, 16, sides[0] // 4, sides[1] // 4)
        assert generator(z).shape == (2, 1, *sides)


def test_the_full_width_runs_at_the_papers_sizes() -> None:
    """One set of weights for both: nothing in the generator depends on the size."""
    with torch.device("meta"):
        discriminator, generator = NiceDiscriminator(), NiceGenerator()
        for sides in ((240, 240), (160, 256)):
            assert generator(discriminator(torch.empty(1, 1, *sides))[3]).shape == (1, 1, *sides)


def test_one_set_of_weights_runs_at_two_sizes() -> None:
    discriminator, generator = NiceDiscriminator(2), NiceGenerator(2, num_blocks=1)
    for sides in ((48, 48), (64, 40)):
        out = generator(discriminator.encode(torch.randn(1, 1, *sides)))
        assert out.shape == (1, 1, *sides)
        assert out.abs().max() <= 1


def support(out: Tensor, x: Tensor) -> tuple[int, int]:
    """Rows and columns of x that an output pixel depends on."""
    (gradient,) = torch.autograd.grad(out, x, retain_graph=True)
    rows, columns = gradient[0, 0].nonzero().unbind(1)
    return int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)


def test_receptive_fields_are_10_70_and_286_pixels() -> None:
    discriminator = NiceDiscriminator(2).double()
    x = torch.randn(1, 1, 640, 640, dtype=torch.float64, requires_grad=True)
    local_map, global_map, _, z = discriminator(x)
    assert support(z[0, :, 80, 80].sum(), x) == (10, 10)
    assert support(local_map[0, 0, 39, 39], x) == (70, 70)
    middle = global_map.shape[-1] // 2
    assert support(global_map[0, 0, middle, middle], x) == (286, 286)


def test_the_latent_starts_as_the_features_and_the_attention_can_enter() -> None:
    discriminator = NiceDiscriminator(2)
    x = torch.randn(1, 1, 96, 96)
    assert discriminator.attention.strength.item() == 0
    discriminator.eval()  # spectral norms stand still
    features = discriminator.encoder(x)
    torch.testing.assert_close(discriminator.encode(x), torch.where(features > 0, features, 0.2 * features))
    with torch.no_grad():
        discriminator.attention.strength.fill_(0.5)
    weight = discriminator.attention.weight[0, :, None, None]
    attended = discriminator.attention.mix(torch.cat((features, features), dim=1) * weight)
    torch.testing.assert_close(discriminator.encode(x), nn.functional.leaky_relu(0.5 * attended + features, 0.2))


def test_the_attention_logit_is_bounded_by_spectral_norm() -> None:
    discriminator = NiceDiscriminator(2).eval()
    x = torch.randn(1, 1, 96, 96)
    features = discriminator.encoder(x)
    pooled = torch.cat((features.mean((2, 3)), features.amax((2, 3))), dim=1)
    layer = nn.Linear(4 * 2, 1, bias=False)
    layer.weight = discriminator.attention.weight
    layer = torch.nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=20).eval()
    torch.testing.assert_close(discriminator(x)[2], layer(pooled))


def test_the_generator_reaches_the_frozen_encoder_and_leaves_its_parameters() -> None:
    """The cycle: the fake is encoded again by the other discriminator, whose parameters stand still."""
    first, second = NiceDiscriminator(2), NiceDiscriminator(2)
    generator, back = NiceGenerator(2, num_blocks=1), NiceGenerator(2, num_blocks=1)
    before = [parameter.detach().clone() for parameter in second.parameters()]
    optimizer = torch.optim.Adam([*generator.parameters(), *back.parameters()])
    x = torch.randn(1, 1, 96, 96)
    fake = generator(first.encode(x).detach())
    local_map, global_map, logit, z = second(fake)
    (cycle,) = torch.autograd.grad((back(z) - x).abs().mean(), generator.conv_in[1].weight, retain_graph=True)
    assert cycle.any()
    loss = sum((judgement - 1).square().mean() for judgement in (local_map, global_map, logit))
    loss.backward()
    optimizer.step()
    assert second.encoder[1].parametrizations.weight.original.grad.any()
    assert all(torch.equal(a, b) for a, b in zip(before, second.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in first.parameters())  # its latent was cut off


def test_several_calls_in_one_step_and_calls_without_gradients() -> None:
    """Spectral norm moves its vectors in place at every call in training."""
    discriminator = NiceDiscriminator(2)
    real, fake = torch.randn(2, 1, 1, 96, 96)
    with torch.no_grad():
        assert not discriminator.encode(real).requires_grad
    loss = sum(judgement.square().mean() for x in (real, fake) for judgement in discriminator(x)[:3])
    with torch.no_grad():
        discriminator.encode(fake)
    loss.backward()
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_a_checkpoint_restores_the_spectral_norms() -> None:
    discriminator, other = NiceDiscriminator(2), NiceDiscriminator(2)
    x = torch.randn(1, 1, 96, 96)
    discriminator(x)
    other.load_state_dict(discriminator.state_dict())
    for mine, restored in zip(discriminator(x), other(x), strict=True):
        assert torch.equal(mine, restored)


@pytest.mark.parametrize("sides", [(98, 96), (96, 97)])
def test_sides_are_multiples_of_four(sides: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="multiples of 4, got"):
        NiceDiscriminator(2)(torch.zeros(1, 1, *sides))


def test_the_discriminator_says_which_sides_it_needs() -> None:
    discriminator = NiceDiscriminator(2)
    assert discriminator(torch.zeros(1, 1, 96, 96))[1].shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match="at least 96 pixels, got 92 x 96"):
        discriminator(torch.zeros(1, 1, 92, 96))


def test_the_norms_are_mixtures_of_instance_and_layer_norm() -> None:
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    unbiased = {"instance": (19 / 20) ** 0.5, "layer": (59 / 60) ** 0.5}
    instance = nn.functional.instance_norm(x, eps=0) * unbiased["instance"]
    layer = nn.functional.group_norm(x, 1, eps=0) * unbiased["layer"]
    share = torch.tensor([3.2, 1.0], dtype=torch.float64).softmax(0)
    assert share[0] == pytest.approx(0.90, abs=0.005)
    gamma, beta = torch.randn(2, 2, 3, dtype=torch.float64)
    expected = (share[0] * instance + share[1] * layer) * gamma[..., None, None] + beta[..., None, None]
    torch.testing.assert_close(AdaILN(3).double()(x, gamma, beta), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ILN(3).double()(x), share[1] * instance + share[0] * layer, atol=1e-4, rtol=1e-4)
    assert ILN(3)(x.bfloat16()).dtype == torch.bfloat16
