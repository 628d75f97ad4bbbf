"""The networks that several comparison methods share, in 2D and 3D.

U-Net and PatchGAN of pix2pix (Isola et al. 2017), ResNet-9 and image pool of CycleGAN (Zhu et al. 2017). Tensors are
B C X Y slices or B C X Y Z volumes, RAS+, in [-1, 1] with a background of -1. A generator maps one channel to one.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.models.blocks import run_blocks

BACKGROUND = -1.0
Norm = str
"""batch or instance."""


def layer_type(name: str, spatial_dims: int) -> Any:
    """Return torch's layer of that name and dimension, such as nn.Conv3d for "Conv" and 3."""
    return getattr(nn, f"{name}{spatial_dims}d")


def norm_layer(norm: Norm, spatial_dims: int, channels: int) -> nn.Module:
    """Return a batch norm with scale and shift, or an instance norm without."""
    layer: nn.Module = layer_type({"batch": "BatchNorm", "instance": "InstanceNorm"}[norm], spatial_dims)(channels)
    return layer


def full_precision(x: Tensor) -> Tensor:
    """Return x in fp32 where its type is a shorter one."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def pad_sides(x: Tensor, multiple: int, at_least: int = 1) -> Tensor:
    """Pad the ends of the sides with background up to a multiple of `multiple` and at least `at_least` voxels."""
    padding: list[int] = []
    for side in reversed(x.shape[2:]):
        longer = max(side, at_least)
        padding += [0, longer + -longer % multiple - side]
    return F.pad(x, padding, value=BACKGROUND) if any(padding) else x


def crop_sides(x: Tensor, sides: Sequence[int]) -> Tensor:
    """Undo `pad_sides`: keep the first voxels of each side."""
    for axis, side in enumerate(sides, start=2):
        x = x.narrow(axis, 0, side)
    return x


def initialise_normal(module: nn.Module, zero_bias: bool = True) -> None:
    """Draw weights as pix2pix and CycleGAN do: convolutions and linear layers N(0, 0.02), batch norms N(1, 0.02) and 0.

    Args:
        module: initialised in place, with torch's global generator.
        zero_bias: set the biases of convolutions and linear layers to 0; Ea-GAN leaves them at torch's default.
    """
    for layer in module.modules():
        if isinstance(layer, nn.modules.conv._ConvNd | nn.Linear):
            nn.init.normal_(layer.weight, 0.0, 0.02)
            if zero_bias and layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.affine:
            nn.init.normal_(layer.weight, 1.0, 0.02)
            nn.init.zeros_(layer.bias)


class UNetGenerator(nn.Module):
    """U-Net of stride-2 convolutions with skips: pix2pix's U-Net-256 at 8 levels in 2D; Ea-GAN's at 7 levels in 3D.

    Sides that are no multiple of 2^num_levels are padded with background and cropped back.

    Args:
        spatial_dims: 2 or 3.
        channels: width of the first level; doubles with each level up to 8 times as much.
        num_levels: stride-2 levels.
        norm: "batch" or "instance" (which gives every convolution a bias, as published).
        dropout: probability in the num_levels - 5 middle levels.
        all_biased: Ea-GAN's layout (Yu et al. 2019): every convolution has a bias, the innermost norm on the way up is
            a batch norm whatever `norm` says, and a skip follows what comes from below instead of preceding it.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int = 64,
        num_levels: int = 8,
        norm: Norm = "batch",
        dropout: float = 0.5,
        all_biased: bool = False,
    ) -> None:
        super().__init__()
        self.num_levels = num_levels
        self.skips_last = all_biased
        conv, transposed = layer_type("Conv", spatial_dims), layer_type("ConvTranspose", spatial_dims)
        biased = all_biased or norm == "instance"
        widths = [channels * min(2**level, 8) for level in range(num_levels)]
        innermost = num_levels - 1
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            before = widths[level - 1] if level else 1
            layers: list[nn.Module] = [nn.LeakyReLU(0.2)] if level else []
            layers.append(conv(before, width, 4, stride=2, padding=1, bias=biased))
            if 0 < level < innermost:
                layers.append(norm_layer(norm, spatial_dims, width))
            self.down.append(nn.Sequential(*layers))
        for level in reversed(range(num_levels)):
            before = widths[level] * (1 if level == innermost else 2)
            after = widths[level - 1] if level else 1
            layers = [nn.ReLU(), transposed(before, after, 4, stride=2, padding=1, bias=biased or level == 0)]
            if level:
                up_norm: Norm = "batch" if all_biased and level == innermost else norm
                layers.append(norm_layer(up_norm, spatial_dims, after))
            else:
                layers.append(nn.Tanh())
            if 4 <= level < innermost:
                layers.append(nn.Dropout(dropout))
            self.up.append(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 1, X, Y) or (B, 1, X, Y, Z) to the same shape."""
        sides = x.shape[2:]
        x = pad_sides(x, 2**self.num_levels)
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
        x = skips.pop()
        for up in self.up:
            x = up(x)
            if skips:  # the published code's skips went through a leaky ReLU in place; the ReLU that follows hides it
                skip = skips.pop()
                x = torch.cat((x, skip) if self.skips_last else (skip, x), dim=1)
        return crop_sides(x, sides)


class ResidualBlock(nn.Module):
    """x + norm(conv(ReLU(norm(conv(x))))) with reflected borders; nothing after the sum.

    Args:
        spatial_dims: 2 or 3.
        channels: width.
        norm: "batch" (convolutions without bias) or "instance" (with).
    """

    def __init__(self, spatial_dims: int, channels: int, norm: Norm) -> None:
        super().__init__()
        pad, conv = layer_type("ReflectionPad", spatial_dims), layer_type("Conv", spatial_dims)
        self.layers = nn.Sequential(
            pad(1),
            conv(channels, channels, 3, bias=norm == "instance"),
            norm_layer(norm, spatial_dims, channels),
            nn.ReLU(),
            pad(1),
            conv(channels, channels, 3, bias=norm == "instance"),
            norm_layer(norm, spatial_dims, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, ...) to the same shape; each side is at least 2."""
        return x + self.layers(x)


def resnet_encoder(spatial_dims: int, channels: int, norm: Norm) -> nn.Sequential:
    """Return ResNet-9's first three stages: an image of one channel to 4 * channels at a quarter of each side."""
    pad, conv = layer_type("ReflectionPad", spatial_dims), layer_type("Conv", spatial_dims)
    biased = norm == "instance"
    stages = [nn.Sequential(pad(3), conv(1, channels, 7, bias=biased), norm_layer(norm, spatial_dims, channels))]
    for before in (channels, 2 * channels):
        strided = conv(before, 2 * before, 3, stride=2, padding=1, bias=biased)
        stages.append(nn.Sequential(strided, norm_layer(norm, spatial_dims, 2 * before)))
    for stage in stages:
        stage.append(nn.ReLU())
    return nn.Sequential(*stages)


def resnet_decoder(spatial_dims: int, channels: int, norm: Norm) -> nn.Sequential:
    """Return ResNet-9's last three stages: 4 * channels at a quarter of each side to an image of one channel."""
    pad, conv = layer_type("ReflectionPad", spatial_dims), layer_type("Conv", spatial_dims)
    transposed = layer_type("ConvTranspose", spatial_dims)
    stages = nn.Sequential()
    for after in (2 * channels, channels):
        up = transposed(2 * after, after, 3, stride=2, padding=1, output_padding=1, bias=norm == "instance")
        stages.append(nn.Sequential(up, norm_layer(norm, spatial_dims, after), nn.ReLU()))
    stages.append(nn.Sequential(pad(3), conv(channels, 1, 7), nn.Tanh()))
    return stages


class ResNetGenerator(nn.Module):
    """ResNet-9 of CycleGAN (Zhu et al. 2017, after Johnson et al. 2016), without dropout.

    Sides that are no multiple of 4, or shorter than 8, are padded with background and cropped back.

    Args:
        spatial_dims: 2 or 3.
        channels: width at full resolution; 4 times as much in the residual blocks.
        num_blocks: residual blocks.
        norm: "instance" or "batch".

    Attributes:
        activation_checkpointing: recompute activations in the backward pass. For "instance": a batch norm would move
            its running statistics twice a step.
    """

    def __init__(self, spatial_dims: int, channels: int = 64, num_blocks: int = 9, norm: Norm = "instance") -> None:
        super().__init__()
        self.activation_checkpointing = False
        self.encoder = resnet_encoder(spatial_dims, channels, norm)
        self.blocks = nn.Sequential(*(ResidualBlock(spatial_dims, 4 * channels, norm) for _ in range(num_blocks)))
        self.decoder = resnet_decoder(spatial_dims, channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 1, X, Y) or (B, 1, X, Y, Z) to the same shape."""
        sides = x.shape[2:]
        x = pad_sides(x, 4, at_least=8)  # so that the residual blocks have two voxels to reflect
        for stages in (self.encoder, self.blocks, self.decoder):
            x = run_blocks(stages, x, self.activation_checkpointing)
        return crop_sides(x, sides)


class PatchGAN(nn.Sequential):
    """The layers of a PatchGAN; see `patch_discriminator`."""

    def forward(self, x: Tensor) -> Tensor:
        """Return one judgement per patch, (B, 1, ...), no activation, of (B, in_channels, ...).

        Sides too short for one patch are padded with background.
        """
        first = self[0]
        assert isinstance(first, nn.Conv2d | nn.Conv3d)
        shortest = 24 if first.padding[0] == 1 else 1
        judgement: Tensor = super().forward(pad_sides(x, 1, at_least=shortest))
        return judgement


def patch_discriminator(
    spatial_dims: int,
    in_channels: int,
    channels: int = 64,
    norm: Norm = "batch",
    padding: int = 1,
    all_biased: bool = False,
) -> PatchGAN:
    """Return a PatchGAN whose every judgement sees 70 voxels along each side.

    The same as MONAI's, whose last convolution cannot have Ea-GAN's padding and whose import takes seconds.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the input: image, and what the judgement depends on.
        channels: width of the first layer.
        norm: "batch" or "instance" (which gives every convolution a bias).
        padding: zeros at each end of the sides before each convolution: 1, or Ea-GAN's 2.
        all_biased: every convolution has a bias, as in Ea-GAN.
    """
    conv, biased = layer_type("Conv", spatial_dims), all_biased or norm == "instance"
    layers: list[nn.Module] = [conv(in_channels, channels, 4, stride=2, padding=padding), nn.LeakyReLU(0.2)]
    for before, stride in ((channels, 2), (2 * channels, 2), (4 * channels, 1)):
        layers.append(conv(before, 2 * before, 4, stride=stride, padding=padding, bias=biased))
        layers += [norm_layer(norm, spatial_dims, 2 * before), nn.LeakyReLU(0.2)]
    return PatchGAN(*layers, conv(8 * channels, 1, 4, padding=padding))


class ImagePool(nn.Module):
    """The last fakes that a discriminator trains on (Shrivastava et al. 2017), one image at a time.

    Until it is full, it keeps and returns each image. Then every second image, by chance, changes places with a random
    one of the past. What it returns carries no graph: it may feed a discriminator's step only, never a generator's.
    The images are buffers: a checkpoint holds them, and they lie where the discriminator does.

    Args:
        size: images that it holds; 0 returns what comes in, with its graph.
        image_shape: channels and sides of one image.
    """

    images: Tensor
    num_images: Tensor

    def __init__(self, size: int, image_shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("images", torch.full((size, *image_shape), BACKGROUND))
        self.register_buffer("num_images", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def _exchange(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """Return what stands for one image (C, ...): itself or one of the past."""
        size, num_images = len(self.images), int(self.num_images)
        if num_images < size:
            self.images[num_images] = image
            self.num_images += 1
            return image
        if torch.rand((), generator=generator) >= 0.5:
            return image
        place = int(torch.randint(size, (), generator=generator))
        past = self.images[place].to(image, copy=True)
        self.images[place] = image
        return past

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return images of the same shape (B, C, ...), some of them from the past.

        Args:
            images: what the generator made.
            generator: on the CPU; decides.
        """
        if not len(self.images) or not self.training:
            return images
        assert images.shape[1:] == self.images.shape[1:], (images.shape, self.images.shape)
        return torch.stack([self._exchange(image, generator) for image in images.detach()])
