"""3D building blocks shared by the codecs, MS-SPADE and the U-Net. Tensors are B C X Y Z of RAS+ volumes.

The codecs are plain sequences of these blocks, so that `slabs.py` can walk the same blocks piece by piece.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class VoxelNorm(nn.Module):
    """Each voxel's features over their root mean square, times a learned gain per channel.

    Pixel normalisation (Karras et al. 2018, section 4.2) with the gain of Zhang and Sennrich 2019. Unlike a group
    norm's, its result at a voxel does not depend on what else is in view: air, a neck, or the border of a box.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to the same shape and type."""
        return voxel_norm_fp32(x, self.weight)


Norm = nn.GroupNorm | VoxelNorm


def make_norm(num_groups: int, channels: int) -> Norm:
    """Return a group norm of at most `num_groups` groups: the largest number that divides both it and `channels`.

    0 groups make a VoxelNorm.
    """
    if num_groups == 0:
        return VoxelNorm(channels)
    return nn.GroupNorm(math.gcd(num_groups, channels), channels, eps=1e-6)


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which operations on x's device keep their inputs' precision."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def norm_fp32(norm: Norm, x: Tensor) -> Tensor:
    """Apply a norm with fp32 statistics; the result has x's dtype, whatever autocast says.

    The CPU kernel of the group norm reads bf16 and sums in fp32, so casting first would only cost two passes over
    memory.
    """
    if isinstance(norm, VoxelNorm):
        normed: Tensor = norm(x)
        return normed
    with without_autocast(x):
        if x.device.type == "cpu" or x.dtype == torch.float32:
            return norm(x)
        return F.group_norm(x.float(), norm.num_groups, norm.weight, norm.bias, norm.eps).to(x.dtype)


def instance_norm_fp32(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise each channel of each sample to mean 0 and variance 1 (no parameters), with fp32 statistics."""
    with without_autocast(x):
        if x.device.type == "cpu" or x.dtype == torch.float32:
            return F.group_norm(x, x.shape[1], eps=eps)
        return F.group_norm(x.float(), x.shape[1], eps=eps).to(x.dtype)


def voxel_norm_fp32(x: Tensor, weight: Tensor | None = None, eps: float = 1e-4) -> Tensor:
    """Divide the channels of each voxel by their root mean square, in fp32 or better; the result has x's dtype."""
    with without_autocast(x):
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        last = wide.permute(0, 2, 3, 4, 1)
        return F.rms_norm(last, last.shape[-1:], weight, eps).permute(0, 4, 1, 2, 3).to(x.dtype)


def run_checkpointed(enabled: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function; where enabled and gradients are wanted, recompute its activations in the backward pass."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # nothing here is random
    return function(*arguments)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, activation_checkpointing: bool = False) -> Tensor:
    """Run x through the blocks in order, keeping only the blocks' inputs when activations are recomputed."""
    for block in blocks:
        x = run_checkpointed(activation_checkpointing, block, x)
    return x


class Conv3(nn.Conv3d):
    """A 3^3 convolution with zero padding of one voxel.

    A slab is convolved by calling this module too, so that hooks see every use of the weights: engines that shard
    parameters gather them there.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)

    def forward(self, x: Tensor, padding_x: int = 1, upsample: bool = False) -> Tensor:
        """Map (B, in_channels, X, Y, Z) to (B, out_channels, X / stride, Y / stride, Z / stride).

        Args:
            x: the input.
            padding_x: 1, or 0 where x already holds a neighbouring row at both ends of X.
            upsample: double the sides of x first (nearest neighbour).
        """
        if upsample:
            return upsample_conv(x, self, padding_x)
        return F.conv3d(x, self.weight, self.bias, self.stride, (padding_x, 1, 1))


def conv3(in_channels: int, out_channels: int, *, stride: int = 1) -> Conv3:
    """Return a 3^3 convolution with zero padding of one voxel."""
    return Conv3(in_channels, out_channels, stride)


def zero_(layer: nn.Conv3d | nn.Linear) -> None:
    """Set a layer to 0 in place, so that it starts without a say."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class ResBlock(nn.Module):
    """Norm, SiLU, conv, (embedding,) norm, SiLU, conv, plus the input (through a 1^3 convolution where widths differ).

    Args:
        in_channels, out_channels: widths.
        norm_groups: groups of the group norms; 0 for norms over each voxel's channels.
        embedding_channels: length of the conditioning vector; 0 for none.
        conditioning: "add" adds the projected embedding after the first convolution (Ho et al. 2020), "scale-shift"
            modulates the second norm's output with it (Dhariwal & Nichol 2021, adaptive group norm).
        starts_as_shortcut: start with a second convolution and modulation of 0, so that a deep stack trains from the
            first step. A shallow network whose last convolution starts at 0 as well learns nothing at first, and then
            slowly (docs/experiments.md).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm_groups: int,
        embedding_channels: int = 0,
        conditioning: str = "add",
        starts_as_shortcut: bool = True,
    ) -> None:
        super().__init__()
        self.scale_shift = conditioning == "scale-shift"
        self.norm1 = make_norm(norm_groups, in_channels)
        self.conv1 = conv3(in_channels, out_channels)
        self.embedding: nn.Linear | None = None
        if embedding_channels:
            self.embedding = nn.Linear(embedding_channels, out_channels * (2 if self.scale_shift else 1))
            if self.scale_shift and starts_as_shortcut:
                zero_(self.embedding)
        self.norm2 = make_norm(norm_groups, out_channels)
        self.conv2 = conv3(out_channels, out_channels)
        if starts_as_shortcut:
            zero_(self.conv2)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map (B, in_channels, X, Y, Z) and, where the block is conditioned, (B, embedding_channels)."""
        h = self.conv1(F.silu(norm_fp32(self.norm1, x)))
        if self.embedding is None:
            h = norm_fp32(self.norm2, h)
        else:
            assert embedding is not None, "a conditioned block needs its embedding"
            modulation = self.embedding(F.silu(embedding))[:, :, None, None, None].to(h.dtype)
            if self.scale_shift:
                scale, shift = modulation.chunk(2, dim=1)
                h = torch.addcmul(shift, norm_fp32(self.norm2, h), 1 + scale)
            else:
                h = norm_fp32(self.norm2, h + modulation)
        h = self.conv2(F.silu(h))
        return h + (x if self.shortcut is None else self.shortcut(x))


class Downsample(nn.Module):
    """Halve each side with a stride-2 3^3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to (B, C, X / 2, Y / 2, Z / 2)."""
        return self.conv(x)


def upsample_conv(x: Tensor, conv: nn.Conv3d, padding_x: int = 1) -> Tensor:
    """Return conv(nearest-neighbour upsampling of x by 2), a 3^3 convolution, for 8 / 27 of its multiplications.

    Each output voxel sees 2^3 distinct input voxels, so the 3 taps of an axis collapse into 2: (w0, w1 + w2) at even
    places and (w0 + w1, w2) at odd ones. All 8 kinds of places are one 2^3 convolution at the input's resolution.

    Args:
        x: (B, C, X, Y, Z).
        conv: kernel 3, stride 1, padding 1.
        padding_x: 1, or 0 where x already holds a neighbouring row at both ends of X.
    """
    with without_autocast(x):
        weight = conv.weight  # O I 3 3 3
        for axis in (2, 4, 6):  # an axis of taps becomes two: place, tap
            w0, w1, w2 = weight.unbind(axis)
            weight = torch.stack((torch.stack((w0, w1 + w2), axis), torch.stack((w0 + w1, w2), axis)), axis)
        weight = weight.permute(2, 4, 6, 0, 1, 3, 5, 7).flatten(0, 3)  # 8 O, I 2 2 2
    bias = None if conv.bias is None else conv.bias.repeat(8)
    y = F.conv3d(x, weight, bias, padding=(padding_x, 1, 1)).unflatten(1, (2, 2, 2, -1))  # B 2 2 2 O X+1 Y+1 Z+1
    even, odd = y.unbind(3)  # the odd places see one input voxel further on
    y = torch.stack((even[..., :-1], odd[..., 1:]), dim=-1).flatten(-2)  # B 2 2 O X+1 Y+1 2Z
    even, odd = y.unbind(2)
    y = torch.stack((even[..., :-1, :], odd[..., 1:, :]), dim=-2).flatten(-3, -2)  # B 2 O X+1 2Y 2Z
    even, odd = y.unbind(1)
    return torch.stack((even[:, :, :-1], odd[:, :, 1:]), dim=3).flatten(2, 3)  # B O 2X 2Y 2Z


class Upsample(nn.Module):
    """Double each side: nearest neighbour, then a 3^3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to (B, C, 2 X, 2 Y, 2 Z)."""
        return self.conv(x, upsample=True)


class OutputBlock(nn.Module):
    """Norm, SiLU, 3^3 convolution: the last step of an encoder, a decoder or a U-Net."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = make_norm(norm_groups, in_channels)
        self.conv = conv3(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, X, Y, Z) to (B, out_channels, X, Y, Z)."""
        return self.conv(F.silu(norm_fp32(self.norm, x)))


class Attention(nn.Module):
    """Self-attention over all voxels, added to the input; never holds the token x token matrix.

    Args:
        channels: width.
        head_channels: channels of one head; a width that it does not divide uses the largest common divisor.
        norm_groups: groups of the group norm; 0 for a norm over each voxel's channels.
    """

    def __init__(self, channels: int, head_channels: int, norm_groups: int) -> None:
        super().__init__()
        self.num_heads = channels // math.gcd(channels, head_channels)
        self.norm = make_norm(norm_groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) to the same shape."""
        b, c = x.shape[:2]
        tokens = norm_fp32(self.norm, x).flatten(2).transpose(1, 2)  # B T C
        q, k, v = self.qkv(tokens).view(b, -1, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(attended).transpose(1, 2).reshape(x.shape)


class HaarTransform(nn.Module):
    """Orthonormal 3D Haar transform: (B, C, X, Y, Z) to (B, 8 C, X / 2, Y / 2, Z / 2), without loss.

    Channel 8 c + 4 i + 2 j + k of the result holds sums (0) or differences (1) along X (i), Y (j) and Z (k) of
    channel c: 8 c is the low-pass. Written as sums so that autocast leaves it in its input's precision.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Transform; the sides of x are even."""
        b, c = x.shape[:2]
        x = x.unsqueeze(2)  # B C 1 X Y Z: the third axis collects sums and differences
        for axis in (3, 4, 5):
            even, odd = x.unflatten(axis, (-1, 2)).unbind(axis + 1)
            x = torch.stack((even + odd, even - odd), dim=3).flatten(2, 3)
        return x.reshape(b, 8 * c, *x.shape[3:]) * (0.5**1.5)


class InverseHaarTransform(nn.Module):
    """The inverse (and transpose) of HaarTransform: (B, 8 C, X, Y, Z) to (B, C, 2 X, 2 Y, 2 Z)."""

    def forward(self, x: Tensor) -> Tensor:
        """Transform back; the number of channels is a multiple of 8."""
        b, c = x.shape[0], x.shape[1] // 8
        x = x.view(b, c, 8, *x.shape[2:]) if x.is_contiguous() else x.reshape(b, c, 8, *x.shape[2:])
        for axis in (5, 4, 3):
            low, high = x.unflatten(2, (-1, 2)).unbind(3)
            x = torch.stack((low + high, low - high), dim=axis + 1).flatten(axis, axis + 1)
        return x.squeeze(2) * (0.5**1.5)
