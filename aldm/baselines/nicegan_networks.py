"""The networks of NICE-GAN (Chen et al. 2020), light version: each discriminator's first layers encode its domain.

A to B is `generator_to_B(discriminator_A.encode(a))`, so a discriminator belongs to the translation and is saved with
it. Tensors are B C X Y slices of RAS+ volumes in [-1, 1]; sides are multiples of 4.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from aldm.baselines.networks import full_precision
from aldm.errors import UserError
from aldm.models.blocks import without_autocast

EPS = 1e-5
SHORTEST = 96
"""Shortest side, pixels, that the global judgement needs."""


def _conv(before: int, after: int, stride: int, bias: bool = True) -> list[nn.Module]:
    """Return a 4^2 convolution with spectral norm behind one reflected pixel."""
    return [nn.ReflectionPad2d(1), spectral_norm(nn.Conv2d(before, after, 4, stride, bias=bias))]


def _stage(before: int, after: int, stride: int) -> list[nn.Module]:
    return [*_conv(before, after, stride), nn.LeakyReLU(0.2)]


class Attention(nn.Module):
    """Class activation map: weighs the features by what tells real from fake, and makes the latent of them.

    A module of its own, its parameters used in its own forward only: where they are sharded they are whole there.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, 2 * channels))
        nn.init.uniform_(self.weight, -((2 * channels) ** -0.5), (2 * channels) ** -0.5)  # as a linear layer
        self.mix = nn.Conv2d(2 * channels, channels, 1)
        self.strength = nn.Parameter(torch.zeros(1))  # lambda: the latent starts as the bare features

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent, shaped as the features (B, C, X, Y), and the attention logit (B, 1).

        The logit's weight is divided by its spectral norm, which of a single row is its length; the features are
        weighed, as in the published code, with the weight as it is stored.
        """
        pooled = torch.cat((features.mean((2, 3)), features.amax((2, 3))), dim=1)
        logit = F.linear(pooled, F.normalize(self.weight, dim=1))
        attended = self.mix(torch.cat((features, features), dim=1) * self.weight.view(1, -1, 1, 1))
        return F.leaky_relu(self.strength * attended + features, 0.2), logit


class NiceDiscriminator(nn.Module):
    """Encoder of one domain and three judgements: of patches of 70 and of 286 pixels, and of the attention features.

    Args:
        channels: width of the first layer; the latent has 2 * channels.
        with_heads: False leaves out what judges patches: an encoder to translate with.
    """

    def __init__(self, channels: int = 64, with_heads: bool = True) -> None:
        super().__init__()
        width = 2 * channels
        self.encoder = nn.Sequential(*_stage(1, channels, 2), *_stage(channels, width, 2))
        self.attention = Attention(width)
        if not with_heads:
            return
        self.trunk = nn.Sequential(*_stage(width, 2 * width, 2))
        self.local_head = nn.Sequential(*_stage(2 * width, 4 * width, 1), *_conv(4 * width, 1, 1, bias=False))
        self.global_head = nn.Sequential(
            *_stage(2 * width, 4 * width, 2),
            *_stage(4 * width, 8 * width, 2),
            *_stage(8 * width, 16 * width, 1),
            *_conv(16 * width, 1, 1, bias=False),
        )

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent (B, 2 * channels, X / 4, Y / 4) and the attention logit (B, 1)."""
        if any(side % 4 for side in x.shape[2:]):
            raise UserError(f"NICE-GAN needs sides that are multiples of 4, got {_sides(x)}; pad or crop the slices")
        latent: tuple[Tensor, Tensor] = self.attention(self.encoder(x))
        return latent

    def encode(self, x: Tensor) -> Tensor:
        """Return the latent z (B, 2 * channels, X / 4, Y / 4) of (B, 1, X, Y), the generator's input.

        Raises:
            UserError: a side is no multiple of 4.
        """
        return self._encode(x)[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return local map (B, 1, x, y), global map (B, 1, x', y'), attention logit (B, 1) and z of (B, 1, X, Y).

        Raises:
            UserError: a side is no multiple of 4 or too short for the global judgement.
        """
        if min(x.shape[2:]) < SHORTEST:
            raise UserError(
                f"NICE-GAN's discriminator needs sides of at least {SHORTEST} pixels, got {_sides(x)}; pad the slices"
            )
        z, logit = self._encode(x)
        trunk = self.trunk(z)
        return self.local_head(trunk), self.global_head(trunk), logit, z


def _sides(x: Tensor) -> str:
    return " x ".join(map(str, x.shape[2:]))


class _InstanceLayerNorm(nn.Module):
    """A learned mixture, channel by channel, of instance norm and layer norm (over C, X, Y); no scale, no shift.

    Variances are unbiased, and statistics at least fp32.
    """

    def __init__(self, channels: int, instance_logit: float, layer_logit: float) -> None:
        super().__init__()
        self.mixture = nn.Parameter(torch.tensor([[instance_logit], [layer_logit]]).repeat(1, channels))

    def _normalise(self, x: Tensor) -> Tensor:
        instance, layer = self.mixture.softmax(dim=0)[:, None, :, None, None].unbind(0)
        normalised = []
        for axes in ((2, 3), (1, 2, 3)):
            variance, mean = torch.var_mean(x, axes, keepdim=True)
            normalised.append((x - mean) * torch.rsqrt(variance + EPS))
        return instance * normalised[0] + layer * normalised[1]


class ILN(_InstanceLayerNorm):
    """Instance-layer norm with a scale and a shift of its own; starts as 0.9 layer norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, instance_logit=1.0, layer_logit=3.2)
        self.weight = nn.Parameter(torch.ones(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, X, Y) to the same shape and type."""
        with without_autocast(x):
            return (self._normalise(full_precision(x)) * self.weight + self.bias).to(x.dtype)


class AdaILN(_InstanceLayerNorm):
    """Instance-layer norm whose scale and shift are given; starts as 0.9 instance norm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, instance_logit=3.2, layer_logit=1.0)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Map (B, C, X, Y) to the same shape and type, with gamma and beta (B, C)."""
        with without_autocast(x):
            gamma, beta = (full_precision(each)[:, :, None, None] for each in (gamma, beta))
            return (self._normalise(full_precision(x)) * gamma + beta).to(x.dtype)


class _AdaptiveBlock(nn.Module):
    """x + AdaILN(conv(ReLU(AdaILN(conv(x)))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pad = nn.ReflectionPad2d(1)
        self.conv1 = nn.Conv2d(channels, channels, 3, bias=False)
        self.norm1 = AdaILN(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, bias=False)
        self.norm2 = AdaILN(channels)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Map (B, C, X, Y) to the same shape, with gamma and beta (B, C)."""
        h = F.relu(self.norm1(self.conv1(self.pad(x)), gamma, beta))
        return x + self.norm2(self.conv2(self.pad(h)), gamma, beta)


class NiceGenerator(nn.Module):
    """Latent of one domain to image of the other: residual blocks modulated by the latent's mean, then two upsamplings.

    Args:
        channels: width at full resolution; the latent has 2 * channels.
        num_blocks: residual blocks.
    """

    def __init__(self, channels: int = 64, num_blocks: int = 6) -> None:
        super().__init__()
        width = 4 * channels
        self.conv_in = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(2 * channels, width, 3), ILN(width), nn.ReLU())
        self.modulation = nn.Sequential(
            nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.ReLU()
        )
        self.gamma = nn.Linear(width, width, bias=False)
        self.beta = nn.Linear(width, width, bias=False)
        self.blocks = nn.ModuleList(_AdaptiveBlock(width) for _ in range(num_blocks))
        up: list[nn.Module] = []
        for after in (2 * channels, channels):
            up += [nn.ReflectionPad2d(1), nn.Conv2d(2 * after, after, 3, bias=False), ILN(after), nn.ReLU()]
            up += [nn.Conv2d(after, 4 * after, 1), nn.PixelShuffle(2), ILN(after), nn.ReLU()]
        self.up = nn.Sequential(*up)
        self.conv_out = nn.Sequential(nn.ReflectionPad2d(3), nn.Conv2d(channels, 1, 7, bias=False), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        """Map (B, 2 * channels, X / 4, Y / 4) to (B, 1, X, Y)."""
        h = self.conv_in(z)
        modulation = self.modulation(h.mean((2, 3)))
        gamma, beta = self.gamma(modulation), self.beta(modulation)
        for block in self.blocks:
            h = block(h, gamma, beta)
        out: Tensor = self.conv_out(self.up(h))
        return out
