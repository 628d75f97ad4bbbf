"""Codecs: volume (B, 1, X, Y, Z) in [-1, 1] to latent and back, behind one interface.

`vqgan` is the 3D VQGAN of Table A (Esser et al. 2021 without attention and with one middle block: what its 237 M
parameters leave); `haar-vqgan` is the same between orthonormal Haar transforms, so that no convolution runs at full
resolution; `haar` is the transform alone: lossless, isometric, nothing to train. The first two quantise their latent,
with a codebook or channel by channel.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from aldm.config import CodecConfig
from aldm.errors import UserError
from aldm.models.blocks import (
    Downsample,
    HaarTransform,
    InverseHaarTransform,
    OutputBlock,
    ResBlock,
    Upsample,
    conv3,
    run_blocks,
)
from aldm.models.passes import largest_tensor, plan_passes, run_in_slabs
from aldm.models.quantizer import Codebook, FiniteScalars, Quantized, Quantizer

MAX_TENSOR_ELEMENTS = 2**31 - 1
"""Kernels index with 32 bits: layers whose tensors are larger run in slabs."""


class CodecOutput(NamedTuple):
    """What a training step of stage 1 sees; see Quantized for the commitment and the codes' numbers."""

    reconstruction: Tensor
    z: Tensor
    commitment_loss: Tensor
    codebook_usage: Tensor
    perplexity: Tensor


class Codec(nn.Module):
    """Encoder blocks, an optional quantiser, decoder blocks.

    Attributes:
        latent_channels: channels of the latent.
        downsampling: voxels of the volume per latent voxel, along each axis.
        isometric: distances between latents are distances between volumes.
        last_layer: the decoder's last layer with parameters, for the adaptive adversarial weight; None without one.
        activation_checkpointing: recompute activations in the backward pass.
        max_tensor_elements: an encoder or a decoder that holds a larger tensor runs in slabs, with the same result.
    """

    def __init__(
        self,
        encoder: nn.Sequential,
        decoder: nn.Sequential,
        quantizer: Quantizer | None,
        *,
        latent_channels: int,
        downsampling: int,
        isometric: bool = False,
        last_layer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.quantizer = quantizer
        self.latent_channels = latent_channels
        self.downsampling = downsampling
        self.isometric = isometric
        self.activation_checkpointing = False
        self.max_tensor_elements = MAX_TENSOR_ELEMENTS
        self._last_layer = (last_layer,)  # in a tuple, so that its parameters are not registered twice

    @property
    def last_layer(self) -> nn.Module | None:
        """The decoder's last layer with parameters."""
        return self._last_layer[0]

    def encode(self, x: Tensor) -> Tensor:
        """Return the latent before quantisation, (B, latent_channels, X / d, Y / d, Z / d).

        Raises:
            UserError: the downsampling d does not divide a side of x.
        """
        check_sides(x.shape[2:], self.downsampling)
        return self.bound(self._run(self.encoder, x))

    def bound(self, z: Tensor) -> Tensor:
        """Return what the encoder's blocks give in the range of the codes; without a quantiser as it is."""
        return z if self.quantizer is None else self.quantizer.bound(z)

    def quantize(self, z: Tensor) -> Quantized:
        """Return the nearest codes with their losses; without a quantiser z itself and zero losses."""
        if self.quantizer is not None:
            return self.quantizer(z)
        zero = torch.zeros((), device=z.device)
        return Quantized(z, zero, zero + torch.nan, zero + torch.nan, None)

    def decode(self, z: Tensor) -> Tensor:
        """Return the volume of a latent, which is quantised first where there is a quantiser."""
        return self.decode_codes(z if self.quantizer is None else self.quantizer.lookup(z))

    def decode_codes(self, z_q: Tensor) -> Tensor:
        """Return the volume of a latent as it is."""
        return self._run(self.decoder, z_q)

    def forward(self, x: Tensor) -> CodecOutput:
        """Encode, quantise (a codebook learns in training mode) and decode."""
        z = self.encode(x)
        quantized = self.quantize(z)
        reconstruction = self.decode_codes(quantized.z_q)
        return CodecOutput(reconstruction, z, *quantized[1:4])

    def _run(self, blocks: nn.Sequential, x: Tensor) -> Tensor:
        largest = x.shape[0] * largest_tensor(plan_passes(blocks, x.shape[1], (x.shape[2], x.shape[3], x.shape[4])))
        if largest > self.max_tensor_elements:
            return run_in_slabs(blocks, x, self.max_tensor_elements, self.activation_checkpointing)
        return run_blocks(blocks, x, self.activation_checkpointing)


def check_sides(sides: torch.Size | tuple[int, ...], divisor: int) -> None:
    """Raise a UserError unless the divisor divides every side."""
    if any(side % divisor or side < divisor for side in sides):
        fitting = " x ".join(str(max(divisor, -(-side // divisor) * divisor)) for side in sides)
        raise UserError(
            f"a volume of {' x '.join(map(str, sides))} voxels does not fit the codec, which takes sides that are "
            f"multiples of {divisor}; pad it to {fitting} (or set preprocess.spatial_shape to that)"
        )


def build_codec(config: CodecConfig) -> Codec:
    """Build the codec that the configuration names.

    In haar-vqgan each Haar transform stands for one of the VQGAN's halvings together with the level above it: of
    `channels` the first `haar_levels` widths are left out, and the total downsampling stays 2^(len(channels) - 1).

    Raises:
        UserError: haar-vqgan with as many Haar levels as channels, or more.
    """
    if config.kind == "haar":
        return Codec(
            nn.Sequential(*(HaarTransform() for _ in range(config.haar_levels))),
            nn.Sequential(*(InverseHaarTransform() for _ in range(config.haar_levels))),
            None,
            latent_channels=8**config.haar_levels,
            downsampling=2**config.haar_levels,
            isometric=True,
        )
    haar_levels = config.haar_levels if config.kind == "haar-vqgan" else 0
    if haar_levels >= len(config.channels):
        raise UserError(
            f"codec.haar_levels is {haar_levels} with codec.channels {config.channels}: each Haar level replaces one "
            f"of the widths and one must be left; use at most {len(config.channels) - 1} Haar levels"
        )
    channels = config.channels[haar_levels:]
    volume_channels = 8**haar_levels
    encoder = _encoder_blocks(volume_channels, channels, config)
    decoder = _decoder_blocks(volume_channels, channels, config)
    output = decoder[-1]
    assert isinstance(output, OutputBlock)
    return Codec(
        nn.Sequential(*(HaarTransform() for _ in range(haar_levels)), *encoder),
        nn.Sequential(*decoder, *(InverseHaarTransform() for _ in range(haar_levels))),
        build_quantizer(config),
        latent_channels=config.code_dim,
        downsampling=2 ** (len(config.channels) - 1),
        last_layer=output.conv,
    )


def build_quantizer(config: CodecConfig) -> Quantizer:
    """Build the quantiser that the configuration names."""
    if config.quantizer == "fsq":
        return FiniteScalars(config.fsq_levels, config.codebook_decay)
    return Codebook(config.codebook_size, config.embedding_dim, config.codebook_decay, config.commitment_weight)


def _encoder_blocks(in_channels: int, channels: tuple[int, ...], config: CodecConfig) -> list[nn.Module]:
    """Per level `num_res_blocks` residual blocks, a halving between levels, one middle block, the latent's conv."""
    blocks: list[nn.Module] = [conv3(in_channels, channels[0])]
    for level, (before, width) in enumerate(pairwise((channels[0], *channels))):
        if level:
            blocks.append(Downsample(before))
        blocks += _res_blocks(before, width, config.num_res_blocks, _norm_groups(config))
    blocks += _res_blocks(channels[-1], channels[-1], 1, _norm_groups(config))
    return [*blocks, OutputBlock(channels[-1], config.code_dim, _norm_groups(config))]


def _decoder_blocks(out_channels: int, channels: tuple[int, ...], config: CodecConfig) -> list[nn.Module]:
    """The encoder's mirror image with one residual block more per level."""
    blocks: list[nn.Module] = [conv3(config.code_dim, channels[-1])]
    blocks += _res_blocks(channels[-1], channels[-1], 1, _norm_groups(config))
    for level, (before, width) in enumerate(pairwise((channels[-1], *reversed(channels)))):
        if level:
            blocks.append(Upsample(before))
        blocks += _res_blocks(before, width, config.num_res_blocks + 1, _norm_groups(config))
    return [*blocks, OutputBlock(channels[0], out_channels, _norm_groups(config))]


def _norm_groups(config: CodecConfig) -> int:
    """Return the groups of each norm, 0 for norms over each voxel's channels."""
    return 0 if config.voxel_norm else config.norm_groups


def _res_blocks(in_channels: int, out_channels: int, number: int, norm_groups: int) -> list[nn.Module]:
    widths = [in_channels] + [out_channels] * number
    return [ResBlock(before, after, norm_groups) for before, after in pairwise(widths)]
