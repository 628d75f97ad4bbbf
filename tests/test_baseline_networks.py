"""The networks that the comparison methods share: published sizes (meta device), what an output sees, the pool."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from aldm.baselines.gan_losses import lsgan, vanilla
from aldm.baselines.networks import (
    ImagePool,
    Norm,
    PatchGAN,
    ResNetGenerator,
    UNetGenerator,
    initialise_normal,
    pad_sides,
    patch_discriminator,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("build", "published"),
    [
        (lambda: UNetGenerator(2), 54_407_809),
        (lambda: UNetGenerator(2, norm="instance"), 54_403_457),
        (lambda: UNetGenerator(3, num_levels=5), 66_600_577),
        # the sheet's count for this one leaves out the 2,432 biases that its rule for instance norm asks for
        (lambda: UNetGenerator(3, num_levels=5, norm="instance"), 66_596_865 + 2_432),
        (lambda: UNetGenerator(3, num_levels=6), 116_934_273),
        (lambda: UNetGenerator(3, num_levels=7), 167_267_969),
        (lambda: UNetGenerator(3, num_levels=5, all_biased=True), 66_603_009),
        (lambda: UNetGenerator(3, num_levels=6, all_biased=True), 116_937_729),
        (lambda: UNetGenerator(3, num_levels=7, all_biased=True), 167_272_449),
        (lambda: ResNetGenerator(2), 11_365_633),
        (lambda: ResNetGenerator(2, norm="batch"), 11_370_881),
        (lambda: ResNetGenerator(3), 34_111_489),
        (lambda: ResNetGenerator(3, channels=32), 8_540_161),
        (lambda: patch_discriminator(2, 2), 2_764_609),
        (lambda: patch_discriminator(2, 2, norm="instance"), 2_763_713),
        (lambda: patch_discriminator(2, 1, norm="instance"), 2_762_689),
        (lambda: patch_discriminator(3, 2), 11_052_865),
        (lambda: patch_discriminator(3, 2, norm="instance"), 11_051_969),
        (lambda: patch_discriminator(3, 1, norm="instance"), 11_047_873),
        (lambda: patch_discriminator(3, 3, padding=2, all_biased=True), 11_057_857),
        (lambda: patch_discriminator(3, 2, padding=2, all_biased=True), 11_053_761),
    ],
)
def test_parameters_of_the_published_networks(build: Callable[[], nn.Module], published: int) -> None:
    with torch.device("meta"):
        assert num_parameters(build()) == published


@pytest.mark.parametrize("sides", [(240, 240), (160, 256), (256, 256)])
@pytest.mark.parametrize("build", [UNetGenerator, ResNetGenerator])
def test_slices_of_the_paper_keep_their_shape(build: type[nn.Module], sides: tuple[int, int]) -> None:
    with torch.device("meta"):
        assert build(2)(torch.empty(2, 1, *sides)).shape == (2, 1, *sides)


@pytest.mark.parametrize("sides", [(192, 192, 144), (160, 256, 224)])
def test_volumes_of_the_paper_keep_their_shape(sides: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        generators = [UNetGenerator(3, num_levels=5), UNetGenerator(3, num_levels=7, all_biased=True)]
        for generator in [*generators, ResNetGenerator(3)]:
            assert generator(torch.empty(1, 1, *sides)).shape == (1, 1, *sides)


@pytest.mark.parametrize(
    ("discriminator", "sides", "expected"),
    [
        ({"spatial_dims": 2}, (240, 240), (28, 28)),
        ({"spatial_dims": 2}, (256, 160), (30, 18)),
        ({"spatial_dims": 2}, (256, 256), (30, 30)),
        ({"spatial_dims": 3}, (192, 192, 144), (22, 22, 16)),
        ({"spatial_dims": 3}, (256, 160, 224), (30, 18, 26)),
        ({"spatial_dims": 3, "padding": 2}, (128, 128, 128), (19, 19, 19)),
        ({"spatial_dims": 3, "padding": 2}, (192, 192, 144), (27, 27, 21)),
        ({"spatial_dims": 3, "padding": 2}, (256, 160, 224), (35, 23, 31)),
    ],
)
def test_maps_of_the_patch_discriminator(
    discriminator: dict[str, int], sides: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        assert patch_discriminator(in_channels=2, **discriminator)(torch.empty(1, 2, *sides)).shape == (1, 1, *expected)


def without_norms(discriminator: PatchGAN) -> PatchGAN:
    return PatchGAN(*(nn.Identity() if isinstance(layer, nn.BatchNorm2d) else layer for layer in discriminator))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_the_patch_discriminator_is_monais(spatial_dims: int, norm: Norm) -> None:
    from monai.networks.nets import PatchDiscriminator  # takes seconds to import

    ours = patch_discriminator(spatial_dims, 2, channels=4, norm=norm)
    monais_norm = "BATCH" if norm == "batch" else ("INSTANCE", {"affine": False})
    monai = PatchDiscriminator(spatial_dims, 4, 2, 1, num_layers_d=3, norm=monais_norm, bias=norm == "instance")
    monai.load_state_dict(dict(zip(monai.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(2, 2, *(40, 33, 36)[:spatial_dims])
    torch.testing.assert_close(ours(x), monai(x)[-1], rtol=0, atol=0)


def test_a_judgement_sees_70_voxels() -> None:
    discriminator = without_norms(patch_discriminator(2, 1, channels=4))
    x = torch.randn(1, 1, 128, 128, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator(x)[0, 0, 7, 7], x)
    rows, columns = gradient[0, 0].nonzero().unbind(1)
    assert rows.max() - rows.min() + 1 == 70
    assert columns.max() - columns.min() + 1 == 70


def test_images_too_small_for_a_patch_get_background_around_them() -> None:
    discriminator = patch_discriminator(2, 1, channels=2)
    assert discriminator(torch.randn(2, 1, 24, 24)).shape == (2, 1, 1, 1)
    small = torch.randn(2, 1, 23, 20)
    padded = torch.nn.functional.pad(small, (0, 4, 0, 1), value=-1.0)
    torch.testing.assert_close(discriminator(small), discriminator(padded))


@pytest.mark.parametrize(("num_levels", "spatial_dims", "expected"), [(8, 2, [6, 5, 4]), (7, 3, [5, 4]), (5, 3, [])])
def test_dropout_stands_in_the_middle_levels(num_levels: int, spatial_dims: int, expected: list[int]) -> None:
    with torch.device("meta"):
        unet = UNetGenerator(spatial_dims, channels=8, num_levels=num_levels)
    levels = [num_levels - 1 - index for index, up in enumerate(unet.up) if isinstance(up[-1], nn.Dropout)]
    assert levels == expected


def test_the_innermost_norm_of_ea_gan_is_a_batch_norm() -> None:
    unet = UNetGenerator(3, channels=2, num_levels=4, norm="instance", all_biased=True)
    norms = [type(layer) for up in unet.up for layer in up if isinstance(layer, nn.BatchNorm3d | nn.InstanceNorm3d)]
    assert norms == [nn.BatchNorm3d, nn.InstanceNorm3d, nn.InstanceNorm3d]


@pytest.mark.parametrize(
    ("generator", "multiple"),
    [
        (UNetGenerator(2, channels=4, num_levels=3, norm="instance"), 8),
        (UNetGenerator(3, channels=2, num_levels=3, all_biased=True), 8),
        (ResNetGenerator(2, channels=4, num_blocks=1), 4),
        (ResNetGenerator(3, channels=2, num_blocks=1), 4),
    ],
)
def test_odd_sides_are_padded_with_background(generator: nn.Module, multiple: int) -> None:
    generator.eval()
    sides = (13, 21, 18)[: next(generator.parameters()).ndim - 2]
    x = torch.rand(1, 1, *sides) * 2 - 1
    padded = torch.full((1, 1, *(side + -side % multiple for side in sides)), -1.0)
    padded[(..., *map(slice, sides))] = x
    out = generator(x)
    assert out.shape == x.shape
    assert out.abs().max() <= 1
    torch.testing.assert_close(out, generator(padded)[(..., *map(slice, sides))])


def test_slices_shorter_than_eight_voxels_pass_a_resnet() -> None:
    assert ResNetGenerator(2, channels=2, num_blocks=1)(torch.zeros(1, 1, 3, 5)).shape == (1, 1, 3, 5)
    assert pad_sides(torch.zeros(1, 1, 3, 5), 4, at_least=8).shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    "network",
    [
        UNetGenerator(3, channels=2, num_levels=2),
        ResNetGenerator(3, channels=2, num_blocks=1),
        patch_discriminator(3, 1, channels=2, norm="instance"),
    ],
)
def test_a_3d_network_sees_the_slices_beside(network: nn.Module) -> None:
    """A stack of 2D networks would not."""
    x = torch.randn(1, 1, 32, 32, 32, requires_grad=True)
    out = network(x)
    middle = out[..., out.shape[-1] // 2]
    (gradient,) = torch.autograd.grad(middle.square().sum(), x)
    centre = 16
    assert all(gradient[..., centre + distance].any() for distance in (-3, 0, 3))


def test_activation_checkpointing_changes_no_gradient() -> None:
    generator = ResNetGenerator(3, channels=2, num_blocks=2).double()
    x = torch.randn(1, 1, 8, 12, 8, dtype=torch.float64)
    gradients = []
    for flag in (False, True):
        generator.activation_checkpointing = flag
        gradients.append(torch.autograd.grad(generator(x).square().sum(), list(generator.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_the_conditional_discriminator_sees_its_condition() -> None:
    discriminator = patch_discriminator(2, 2, channels=4)
    source, other, image = torch.randn(3, 1, 1, 40, 40)
    fixed = discriminator(torch.cat((source, image), dim=1))
    assert not torch.allclose(fixed, discriminator(torch.cat((other, image), dim=1)))


def test_initialise_normal() -> None:
    network = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(4096), nn.ConvTranspose3d(32, 64, 3))
    bias = network[2].bias.detach().clone()
    initialise_normal(network, zero_bias=False)
    assert torch.equal(network[2].bias, bias)
    assert network[0].bias.any()
    initialise_normal(network)
    assert not network[0].bias.any()
    assert not network[2].bias.any()
    assert not network[1].bias.any()
    for weight, mean in ((network[0].weight, 0), (network[1].weight, 1), (network[2].weight, 0)):
        assert weight.mean().item() == pytest.approx(mean, abs=2e-3)
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_losses_are_their_definitions() -> None:
    judgement = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    for is_real in (0, 1, 0.8):
        torch.testing.assert_close(lsgan(judgement, is_real), (judgement - is_real).square().mean())
        probability = judgement.sigmoid()
        entropy = -(is_real * probability.log() + (1 - is_real) * (1 - probability).log()).mean()
        torch.testing.assert_close(vanilla(judgement, is_real), entropy)
    assert torch.equal(lsgan(judgement, True), lsgan(judgement, 1))


def numbered(start: int, stop: int) -> Tensor:
    return torch.arange(start, stop, dtype=torch.float32)[:, None, None, None].expand(-1, 1, 2, 3)


def test_a_pool_of_zero_images_returns_the_input_with_its_graph() -> None:
    images = torch.randn(2, 1, 2, 3, requires_grad=True)
    assert ImagePool(0, (1, 2, 3))(images, torch.Generator()) is images


def test_the_pool_fills_up_and_then_mixes() -> None:
    pool, generator = ImagePool(50, (1, 2, 3)), torch.Generator().manual_seed(0)
    assert torch.equal(pool(numbered(0, 32), generator), numbered(0, 32))
    second = pool(numbered(32, 64), generator)
    assert torch.equal(second[:18], numbered(32, 50))  # 18 more fill it
    assert (second[18:] != numbered(50, 64)).any()
    returned = torch.cat([pool(numbered(start, start + 50), generator) for start in range(64, 1064, 50)])[:, 0, 0, 0]
    historical = returned != torch.arange(64, 1064)
    assert 0.4 < historical.float().mean() < 0.6
    assert (returned <= torch.arange(64, 1064)).all()  # nothing from the future
    # every image is either handed out or still held, and none twice
    everything = torch.cat((second[18:, 0, 0, 0], returned, pool.images[:, 0, 0, 0])).sort().values
    assert torch.equal(everything, torch.arange(everything.numel(), dtype=torch.float32))


def test_the_pool_keeps_no_graph_and_copies() -> None:
    pool, generator = ImagePool(2, (1, 2, 3)), torch.Generator().manual_seed(0)
    images = torch.zeros(2, 1, 2, 3, requires_grad=True)
    out = pool(images * 1, generator)
    assert not out.requires_grad
    assert not pool.images.requires_grad
    before = pool.images.clone()
    out.add_(1)
    assert torch.equal(pool.images, before)


def test_a_restored_pool_goes_on_as_if_never_stopped() -> None:
    generator = torch.Generator().manual_seed(0)
    pool = ImagePool(5, (1, 2, 3))
    pool(numbered(0, 12), generator)
    restored, state = ImagePool(5, (1, 2, 3)), generator.get_state()
    restored.load_state_dict(pool.state_dict())
    expected = pool(numbered(12, 40), generator)
    assert torch.equal(restored(numbered(12, 40), _at(state)), expected)
    assert all(torch.equal(a, b) for a, b in zip(pool.buffers(), restored.buffers(), strict=True))


def _at(state: Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator
