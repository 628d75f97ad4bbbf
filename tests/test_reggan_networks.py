"""RegGAN's registration: published sizes, identity at the start, warps by known flows, known misalignments."""

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, gaussian_filter
from torch import Tensor, nn

from aldm.baselines.reggan_networks import RegistrationNet, flow_smoothness, random_affine, warp


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_the_published_network() -> None:
    with torch.device("meta"):
        network = RegistrationNet()
        assert num_parameters(network) == 2_058_018
        assert [num_parameters(stage) for stage in network.down] == [19_104, 92_352, *[110_784] * 5]
        assert [num_parameters(stage) for stage in network.up] == [*[73_792] * 6, 27_680]
        assert num_parameters(network.bottleneck) == 8_320 + 885_504 + 8_256
        assert num_parameters(network.refine) == 19_552
        assert num_parameters(network.flow) == 578
        assert num_parameters(RegistrationNet(num_levels=6)) == 1_873_442


@pytest.mark.parametrize("num_levels", [6, 7])
@pytest.mark.parametrize("sides", [(240, 240), (160, 256), (256, 256)])
def test_slices_of_the_paper(num_levels: int, sides: tuple[int, int]) -> None:
    with torch.device("meta"):
        image = torch.empty(2, 1, *sides)
        assert RegistrationNet(num_levels=num_levels)(image, image).shape == (2, 2, *sides)


def smooth_images(*shape: int) -> Tensor:
    noise = torch.randn(shape)
    kernel = torch.ones(1, 1, *[5] * (len(shape) - 2)) / 5 ** (len(shape) - 2)
    conv = nn.functional.conv2d if len(shape) == 4 else nn.functional.conv3d
    return conv(noise, kernel, padding=2).clamp(-1, 1)


@pytest.mark.parametrize("shape", [(2, 1, 64, 50), (1, 1, 17, 16, 12)])
def test_it_starts_as_the_identity(shape: tuple[int, ...]) -> None:
    network = RegistrationNet(len(shape) - 2, channels=16, num_levels=3)
    moving, fixed = smooth_images(*shape), smooth_images(*shape)
    flow = network(moving, fixed)
    assert flow.shape == (shape[0], len(shape) - 2, *shape[2:])
    assert 0 < flow.abs().max() < 0.01
    torch.testing.assert_close(warp(moving, flow), moving, atol=0.01, rtol=0)
    warp(moving, flow).sub(fixed).abs().mean().backward()
    assert network.flow.weight.grad.any()


def test_it_learns_to_find_a_known_shift() -> None:
    """With the weights of RegGAN's loss; that this is what makes its results sharp is in test_misalignment.py."""
    network, shift = RegistrationNet(channels=8, num_levels=3), (2, -3)
    noise = np.random.default_rng(0).normal(size=(4, 48, 48))
    moving = torch.from_numpy(gaussian_filter(noise, (0, 3, 3)))[:, None].float()
    moving /= moving.abs().max()
    fixed = torch.roll(moving, [-pixels for pixels in shift], (2, 3))
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(40):
        flow = network(moving, fixed)
        loss = 20 * nn.functional.l1_loss(warp(moving, flow), fixed) + 10 * flow_smoothness(flow)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inside = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    found = flow.detach()[inside].mean(dim=(0, 2, 3))
    torch.testing.assert_close(found, torch.tensor(shift, dtype=torch.float32), atol=0.4, rtol=0)
    before, after = ((image - fixed)[inside].abs().mean() for image in (moving, warp(moving, flow.detach())))
    assert after < 0.4 * before


def test_short_sides_are_padded_with_background() -> None:
    network = RegistrationNet(channels=4, num_levels=4)
    moving, fixed = smooth_images(2, 1, 20, 40)[:, None]
    padded = [nn.functional.pad(image, (0, 0, 0, 12), value=-1.0) for image in (moving, fixed)]
    torch.testing.assert_close(network(moving, fixed), network(*padded)[:, :, :20])


@pytest.mark.parametrize("axis", [0, 1])
def test_a_constant_flow_shifts_by_whole_pixels(axis: int) -> None:
    image, flow = torch.randn(2, 3, 7, 9), torch.zeros(2, 2, 7, 9)
    flow[:, axis] = 1
    length = image.shape[axis + 2]
    shifted = warp(image, flow)
    torch.testing.assert_close(shifted.narrow(axis + 2, 0, length - 1), image.narrow(axis + 2, 1, length - 1))
    torch.testing.assert_close(  # the border goes on
        shifted.narrow(axis + 2, length - 1, 1), image.narrow(axis + 2, length - 1, 1)
    )


@pytest.mark.parametrize("sides", [(7, 9), (6, 4, 5)])
@pytest.mark.filterwarnings("ignore:.*native grid_sample")
def test_the_warp_is_monais(sides: tuple[int, ...]) -> None:
    from monai.networks.blocks import Warp

    image = torch.randn(2, 3, *sides, dtype=torch.float64)
    flow = (3 * torch.randn(2, len(sides), *sides, dtype=torch.float64)).requires_grad_()
    expected = Warp("bilinear", "border")(image, flow)
    torch.testing.assert_close(warp(image, flow), expected)
    ours, theirs = (torch.autograd.grad(out.square().sum(), flow)[0] for out in (warp(image, flow), expected))
    torch.testing.assert_close(ours, theirs)


def test_the_warp_keeps_its_places_under_autocast() -> None:
    image, flow = torch.randn(1, 1, 300, 4), torch.zeros(1, 2, 300, 4)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(warp(image, flow.bfloat16()), image, atol=1e-3, rtol=0)


def test_smoothness_sees_what_central_differences_do_not() -> None:
    assert flow_smoothness(torch.full((2, 2, 6, 6), 3.0)) == 0
    checkerboard = (torch.arange(6)[:, None] + torch.arange(8)) % 2
    assert flow_smoothness(checkerboard.float().expand(1, 2, 6, 8)) == 2  # 1 along each axis
    rows = torch.arange(6.0)[:, None].expand(1, 2, 6, 8)
    assert flow_smoothness(rows) == 1
    assert flow_smoothness(torch.arange(5.0)[:, None, None].expand(1, 3, 5, 4, 3)) == 1


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_misalignment_is_its_affine() -> None:
    """Against scipy: output pixel p shows R^-1 (p - centre - shift) / scale + centre."""
    image = smooth_images(1, 1, 40, 24).double()
    moved = random_affine(image, generators(3), noise_level=5.0)
    angle, scale, *shift = (torch.rand(4, generator=generators(3)[0], dtype=torch.float64) * 2 - 1).numpy()
    angle, scale = torch.deg2rad(torch.tensor(5.0 * angle, dtype=torch.float64)), 1 + 0.1 * scale
    rotation = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]], dtype=torch.float64)
    sides = torch.tensor([40.0, 24.0], dtype=torch.float64)
    centre, matrix = (sides - 1) / 2, rotation.T / scale
    offset = centre - matrix @ (centre + 0.1 * torch.tensor(shift) * sides)
    expected = affine_transform(image[0, 0].numpy(), matrix.numpy(), offset.numpy(), order=1, cval=-1.0)
    inner = (slice(6, -6), slice(6, -6))
    torch.testing.assert_close(moved[0, 0][inner], torch.from_numpy(expected)[inner], atol=1e-6, rtol=0)


def test_each_sample_has_its_own_generator_and_level_zero_moves_nothing() -> None:
    images = smooth_images(1, 1, 32, 32).expand(3, 2, 32, 32)
    moved = random_affine(images, generators(0, 1, 0))
    assert torch.equal(moved[0], moved[2])
    assert not torch.allclose(moved[0], moved[1], atol=1e-3)
    assert torch.equal(moved[:, 0], moved[:, 1])  # channels move together
    assert torch.equal(random_affine(images[:1], generators(0)), moved[:1])
    torch.testing.assert_close(random_affine(images, generators(0, 1, 2), noise_level=0.0), images, atol=1e-5, rtol=0)


def test_what_comes_in_from_outside_is_background() -> None:
    moved = random_affine(torch.ones(20, 1, 50, 50), generators(*range(20)), noise_level=5.0)
    assert moved.min() == -1
    assert moved.max() == pytest.approx(1.0)
    background = random_affine(torch.full((2, 1, 16, 16), -1.0), generators(0, 1), noise_level=5.0)
    assert torch.equal(background, torch.full((2, 1, 16, 16), -1.0))
