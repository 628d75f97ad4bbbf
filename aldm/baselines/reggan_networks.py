"""RegGAN's registration network, its warp, and the misalignment it is made for (Kong et al. 2021).

Tensors are B C X Y slices (B C X Y Z volumes) of RAS+ volumes in [-1, 1] with a background of -1. A flow is in voxels,
one channel per axis in the order of the axes: the warped image at p is the image at p + flow(p).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.baselines.networks import BACKGROUND, ResidualBlock, crop_sides, full_precision, layer_type, pad_sides
from aldm.models.blocks import without_autocast

LEAK = 0.2


def _conv(spatial_dims: int, before: int, after: int, kernel_size: int) -> nn.Sequential:
    """Return a convolution that keeps the sides, and a leaky ReLU."""
    conv = layer_type("Conv", spatial_dims)(before, after, kernel_size, padding=kernel_size // 2)
    nn.init.kaiming_normal_(conv.weight, a=LEAK)
    return nn.Sequential(conv, nn.LeakyReLU(LEAK))


def _residual_block(spatial_dims: int, channels: int) -> ResidualBlock:
    block = ResidualBlock(spatial_dims, channels, "instance")
    for layer in block.layers:
        if isinstance(layer, nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return block


class RegistrationNet(nn.Module):
    """U-Net from a moving and a fixed image to the flow that aligns them; starts with a flow of about 0.

    Sides shorter than 2^(num_levels + 1), where the deepest level could not reflect, are padded with background and the
    flow is cropped: 7 levels are published, at 256 pixels; 6 run at 240 and at 160 pixels without padding.

    Args:
        spatial_dims: 2 or 3.
        channels: width of the first level; the others have twice as much.
        num_levels: times that the sides are halved.
    """

    def __init__(self, spatial_dims: int = 2, channels: int = 32, num_levels: int = 7) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.pool = layer_type("MaxPool", spatial_dims)(2)
        self.mode = {2: "bilinear", 3: "trilinear"}[spatial_dims]
        widths = [channels] + [2 * channels] * (num_levels - 1)
        deepest = widths[-1]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        before = 2
        for width in widths:
            stage = nn.Sequential(_conv(spatial_dims, before, width, 3), _residual_block(spatial_dims, width))
            self.down.append(stage)
            before = width
        self.bottleneck = nn.Sequential(
            _conv(spatial_dims, deepest, 2 * deepest, 1),
            *(_residual_block(spatial_dims, 2 * deepest) for _ in range(3)),
            _conv(spatial_dims, 2 * deepest, deepest, 1),
        )
        for width in reversed(widths):
            self.up.append(_conv(spatial_dims, before + width, width, 3))
            before = width
        self.refine = nn.Sequential(_residual_block(spatial_dims, channels), _conv(spatial_dims, channels, channels, 1))
        self.flow = layer_type("Conv", spatial_dims)(channels, spatial_dims, 3, padding=1)
        nn.init.normal_(self.flow.weight, 0.0, 1e-5)
        for layer in self.modules():
            if isinstance(layer, nn.modules.conv._ConvNd) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        """Return the flow (B, spatial_dims, ...) in voxels that warps `moving` onto `fixed`, both (B, 1, ...)."""
        sides = moving.shape[2:]
        x = pad_sides(torch.cat((moving, fixed), dim=1), 1, at_least=2 ** (self.num_levels + 1))
        skips = []
        for down in self.down:
            skips.append(down(x))
            x = self.pool(skips[-1])
        x = self.bottleneck(x)
        for up in self.up:
            skip = skips.pop()
            x = F.interpolate(x, skip.shape[2:], mode=self.mode)
            x = up(torch.cat((x, skip), dim=1))
        return crop_sides(self.flow(self.refine(x)), sides)


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """Return image(p + flow(p)), linearly interpolated; beyond its borders the image goes on as at them.

    Args:
        image: (B, C, ...).
        flow: (B, 2 or 3, ...) in voxels, of the image's sides.
    """
    sides = image.shape[2:]
    with without_autocast(image):  # bf16 cannot tell place 240 from place 241
        image, flow = full_precision(image), full_precision(flow)
        places = [torch.arange(side, device=flow.device, dtype=flow.dtype) for side in sides]
        sampled = torch.stack(torch.meshgrid(*places, indexing="ij")) + flow
        scaled = [sampled[:, axis] * (2 / max(side - 1, 1)) - 1 for axis, side in enumerate(sides)]
        grid = torch.stack(scaled[::-1], dim=-1)  # grid_sample counts axes from the last
        return F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=True)


def flow_smoothness(flow: Tensor) -> Tensor:
    """Return the mean squared forward difference of (B, 2 or 3, ...), summed over the axes of space.

    Forward, as central differences would not see a checkerboard.
    """
    axes = range(2, flow.ndim)
    return torch.stack([flow.diff(dim=axis).square().mean() for axis in axes]).sum()


def random_affine(images: Tensor, generators: Sequence[torch.Generator], noise_level: float = 1.0) -> Tensor:
    """Return slices rotated, scaled and shifted about their centre, each by chance: RegGAN's misalignment.

    Angles are uniform within +-noise_level degrees, shifts along each axis within +-2 noise_level % of its length,
    scales within 1 +- 0.02 noise_level. What comes in from outside is background. The channels of a sample move
    together: concatenate a pair to misalign it as one (the published noise level 0, which is level 1 for both).

    Args:
        images: (B, C, X, Y).
        generators: on the CPU, one per sample.
        noise_level: k of the paper's data; 0 changes nothing.
    """
    sides = torch.tensor(images.shape[2:], dtype=torch.float64)
    matrices = []
    for generator in generators:
        drawn = torch.rand(4, generator=generator, dtype=torch.float64) * 2 - 1
        angle, scale = math.radians(noise_level) * drawn[0], 1 + 0.02 * noise_level * drawn[1]
        cosine, sine = angle.cos() / scale, angle.sin() / scale
        back = torch.stack((cosine, sine, -sine, cosine)).view(2, 2)  # from a place to where it was
        shift = 0.02 * noise_level * drawn[2:] * sides  # pixels
        # affine_grid's places run from -1 to 1 over a side, last axis first
        matrix = torch.cat((back * sides / sides[:, None], (-(back @ shift) * 2 / sides)[:, None]), dim=1)
        matrices.append(torch.cat((matrix[:, :2].flip(0, 1), matrix[:, 2:].flip(0)), dim=1))
    with without_autocast(images):
        theta = torch.stack(matrices).to(images)
        grid = F.affine_grid(theta, list(images.shape), align_corners=False)
        moved = F.grid_sample(images - BACKGROUND, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved + BACKGROUND
