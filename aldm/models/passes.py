"""A codec's blocks as passes over slabs along X, exact at the seams.

Each block is one or two passes: normalise, SiLU, (upsample,) one convolution, (add the block's input). A pass reads
overlapping slabs of its whole input and writes its whole output, so nothing is approximated at the seams; a group
norm's statistics come from every slab of its input before any slab is normalised.

Here the whole tensors are lists of slabs with gradients (`Pieces`), so that no kernel meets more elements than it can
index; slabs.py runs the same passes on tensors that lie in a file. Tensors are B C X Y Z of RAS+ volumes.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.errors import UserError
from aldm.models.blocks import (
    Conv3,
    Downsample,
    HaarTransform,
    InverseHaarTransform,
    Norm,
    OutputBlock,
    ResBlock,
    Upsample,
    run_checkpointed,
)

Sides = tuple[int, int, int]


@dataclass(frozen=True)
class Pass:
    """Normalise, SiLU, upsample (each where given), `layer`, add the residual through `shortcut`."""

    layer: nn.Module
    norm: Norm | None = None
    upsample: bool = False
    adds_residual: bool = False
    shortcut: nn.Module | None = None

    def channels(self, before: int) -> int:
        """Return the number of output channels for that many input channels."""
        if isinstance(self.layer, HaarTransform):
            return 8 * before
        return before // 8 if isinstance(self.layer, InverseHaarTransform) else _conv(self.layer).out_channels

    def side(self, before: int) -> int:
        """Return the output's length along an axis."""
        if isinstance(self.layer, HaarTransform):
            return before // 2
        if isinstance(self.layer, InverseHaarTransform):
            return 2 * before
        conv, length = _conv(self.layer), before * (2 if self.upsample else 1)
        return (length + 2 * int(conv.padding[0]) - conv.kernel_size[0]) // conv.stride[0] + 1

    @property
    def granularity(self) -> int:
        """Output rows come in multiples of this."""
        return 2 if self.upsample or isinstance(self.layer, InverseHaarTransform) else 1


@dataclass(frozen=True)
class Window:
    """The input rows [start, stop) of a slab of output, and the rows of zeros before and after them."""

    start: int
    stop: int
    pad: tuple[int, int] = (0, 0)


def passes_of(block: nn.Module) -> list[Pass]:
    """Return the passes that make up a block of a codec; of two, the second one adds the first one's input."""
    if isinstance(block, ResBlock):
        assert block.embedding is None, "codecs have no conditioned blocks"
        second = Pass(block.conv2, norm=block.norm2, adds_residual=True, shortcut=block.shortcut)
        return [Pass(block.conv1, norm=block.norm1), second]
    if isinstance(block, OutputBlock):
        return [Pass(block.conv, norm=block.norm)]
    if isinstance(block, Upsample):
        return [Pass(block.conv, upsample=True)]
    return [Pass(block.conv if isinstance(block, Downsample) else block)]


def window(step: Pass, start: int, stop: int, length: int) -> Window:
    """Return the rows of an input of that length along X that the output rows [start, stop) need."""
    if isinstance(step.layer, HaarTransform):
        return Window(2 * start, 2 * stop)
    if isinstance(step.layer, InverseHaarTransform):
        return Window(start // 2, stop // 2)
    conv = _conv(step.layer)
    stride, padding = conv.stride[0], int(conv.padding[0])
    low, high = start * stride - padding, (stop - 1) * stride - padding + conv.kernel_size[0]
    if step.upsample:
        low, high = start // 2 - 1, stop // 2 + 1
    return Window(max(0, low), min(length, high), pad=(max(0, -low), max(0, high - length)))


class Whole(Protocol):
    """A whole tensor that is read and written along X."""

    channels: int
    sides: Sides

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) as one tensor."""

    def append(self, rows: Tensor) -> None:
        """Add the next rows."""

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each channel, (B, C) in float64."""


class Pieces:
    """A whole tensor as a list of slabs that may carry gradients."""

    def __init__(self, channels: int, sides: Sides, tensors: Iterable[Tensor] = ()) -> None:
        self.channels = channels
        self.sides = sides
        self.tensors = list(tensors)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop): a view where one slab holds them."""
        found, first = [], 0
        for piece in self.tensors:
            low, high = max(start, first), min(stop, first + piece.shape[2])
            if low < high:
                found.append(piece[:, :, low - first : high - first])
            first += piece.shape[2]
        return found[0] if len(found) == 1 else torch.cat(found, dim=2)

    def append(self, rows: Tensor) -> None:
        """Add the next rows."""
        self.tensors.append(rows)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each channel, (B, C) in float64, with gradients."""
        return merge_moments([moments_of(piece) for piece in self.tensors])


def moments_of(piece: Tensor) -> tuple[int, Tensor, Tensor]:
    """Return voxels, mean and variance of each channel of a slab."""
    wide = piece.float() if piece.dtype in (torch.bfloat16, torch.float16) else piece
    variance, mean = torch.var_mean(wide.flatten(2), dim=2, correction=0)
    return wide[0, 0].numel(), mean, variance


def merge_moments(parts: Sequence[tuple[int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge (voxels, mean, variance) of parts into mean and variance of the whole, in float64 (Chan et al. 1983)."""
    counts = [part[0] for part in parts]
    means = torch.stack([part[1].double() for part in parts], dim=-1)
    variances = torch.stack([part[2].double() for part in parts], dim=-1)
    weights = means.new_tensor(counts) / sum(counts)
    mean = (means * weights).sum(dim=-1)
    return mean, ((variances + (means - mean[..., None]).square()) * weights).sum(dim=-1)


def scale_and_shift(norm: nn.GroupNorm, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the group norm as a scale and a shift of each channel, (B, C, 1, 1, 1), from the channels' moments."""
    grouped = [x.unflatten(1, (norm.num_groups, -1)) for x in (mean, variance)]
    group_mean = grouped[0].mean(dim=2, keepdim=True)
    group_variance = (grouped[1] + (grouped[0] - group_mean).square()).mean(dim=2, keepdim=True)
    rstd = (group_variance + norm.eps).rsqrt().expand_as(grouped[0]).flatten(1)
    scale = rstd * norm.weight.double()
    shift = norm.bias.double() - group_mean.expand_as(grouped[0]).flatten(1) * scale
    dtype = norm.weight.dtype
    return scale.to(dtype)[:, :, None, None, None], shift.to(dtype)[:, :, None, None, None]


def run_pass(
    step: Pass, source: Whole, sink: Whole, slab_rows: int, residual: Whole | None = None, recompute: bool = False
) -> None:
    """Write the whole output of a pass into the sink, `slab_rows` rows at a time (a multiple of the granularity).

    Args:
        residual: what is added at the end, through the shortcut, where the pass adds anything.
        recompute: keep none of a slab's activations for the backward pass.
    """
    affine = None
    if isinstance(norm := step.norm, nn.GroupNorm):
        affine = run_checkpointed(recompute, lambda: scale_and_shift(norm, *source.moments()))
    for start in range(0, sink.sides[0], slab_rows):
        stop = min(start + slab_rows, sink.sides[0])
        compute = partial(_compute_slab, step, source, affine, residual if step.adds_residual else None, start, stop)
        sink.append(run_checkpointed(recompute, compute))


def _compute_slab(
    step: Pass, source: Whole, affine: tuple[Tensor, Tensor] | None, residual: Whole | None, start: int, stop: int
) -> Tensor:
    """Return rows [start, stop) of a pass's output."""
    need = window(step, start, stop, source.sides[0])
    x = source.rows(need.start, need.stop)
    if affine is not None:
        x = F.silu(torch.addcmul(affine[1], x, affine[0]).to(x.dtype), inplace=not torch.is_grad_enabled())
    elif step.norm is not None:  # knows nothing beyond its voxel
        x = F.silu(step.norm(x), inplace=not torch.is_grad_enabled())
    if any(need.pad):
        x = F.pad(x, (0, 0, 0, 0, *need.pad))
    if isinstance(step.layer, Conv3):
        x = step.layer(x, padding_x=0, upsample=step.upsample)
    else:
        x = step.layer(x)
    if residual is None:
        return x
    rest = residual.rows(start, stop)
    return x + (rest if step.shortcut is None else step.shortcut(rest))


def _conv(layer: nn.Module) -> Conv3:
    assert isinstance(layer, Conv3), f"no pass is known for {type(layer).__name__}"
    return layer


@dataclass(frozen=True)
class PlannedPass:
    """A pass with the shapes that it meets."""

    step: Pass
    channels: int
    """Channels of its input."""
    sides: Sides
    """Sides of its input."""
    residual_channels: int
    """Channels of the residual that it adds, 0 for none."""

    @property
    def out_channels(self) -> int:
        """Channels of its output."""
        return self.step.channels(self.channels)

    @property
    def out_sides(self) -> Sides:
        """Sides of its output."""
        x, y, z = (self.step.side(side) for side in self.sides)
        return x, y, z

    def input_elements(self, rows: int) -> int:
        """Return the most elements of one sample's input, padded, that a slab of that many output rows needs."""
        layer = self.step.layer
        if self.step.upsample:
            needed = rows // 2 + 2
        elif isinstance(layer, nn.Conv3d):
            needed = (rows - 1) * layer.stride[0] + layer.kernel_size[0]
        else:
            needed = 2 * rows if isinstance(layer, HaarTransform) else rows // 2
        return self.channels * needed * self.sides[1] * self.sides[2]

    def output_elements(self, rows: int) -> int:
        """Return the elements of one sample's slab of output, or of the residual where that is wider."""
        channels, (_, y, z) = max(self.out_channels, self.residual_channels), self.out_sides
        if self.step.upsample:
            return channels * (rows + 2) * (y + 2) * (z + 2)
        return channels * rows * y * z

    def largest_tensor(self, rows: int) -> int:
        """Return the elements of one sample in the largest tensor that a slab of that many output rows meets."""
        return max(self.input_elements(rows), self.output_elements(rows))


def plan_passes(blocks: Iterable[nn.Module], channels: int, sides: Sides) -> list[list[PlannedPass]]:
    """Return the passes of each block for an input of that many channels and those sides."""
    planned = []
    for block in blocks:
        block_channels, passes = channels, []
        for step in passes_of(block):
            passes.append(PlannedPass(step, channels, sides, block_channels if step.adds_residual else 0))
            channels, sides = passes[-1].out_channels, passes[-1].out_sides
        planned.append(passes)
    return planned


def largest_tensor(planned: list[list[PlannedPass]]) -> int:
    """Return the elements of one sample in the largest tensor that any kernel meets when nothing is cut."""
    return max(each.largest_tensor(each.out_sides[0]) for passes in planned for each in passes)


def rows_within(each: PlannedPass, fits: Callable[[int], bool]) -> int | None:
    """Return the most output rows for which `fits` holds, None where it holds for none."""
    unit = each.step.granularity
    candidates = range(unit, each.out_sides[0] + unit, unit)
    number = bisect_left(candidates, True, key=lambda rows: not fits(rows))
    return candidates[number - 1] if number else None


def run_in_slabs(blocks: nn.Sequential, x: Tensor, max_elements: int, activation_checkpointing: bool = False) -> Tensor:
    """Run x through a codec's blocks so that no tensor has more than `max_elements` elements; gradients flow.

    Args:
        x: (B, C, X, Y, Z).
        max_elements: largest tensor; neither x nor the result is cut, so both must be within it.
        activation_checkpointing: keep only the blocks' inputs for the backward pass, and recompute slab by slab.

    Raises:
        UserError: one row of some layer is larger.
    """
    batch, channels = x.shape[:2]
    pieces: tuple[Tensor, ...] = (x,)
    sides: Sides = (x.shape[2], x.shape[3], x.shape[4])
    for passes in plan_passes(blocks, channels, sides):
        cut = []
        for each in passes:
            rows = rows_within(each, lambda rows, each=each: batch * each.largest_tensor(rows) <= max_elements)  # type: ignore[misc]
            if rows is None:
                raise UserError(
                    f"one row of a layer with {each.channels} channels on {each.sides} voxels has more than "
                    f"{max_elements} elements; use a smaller crop or batch"
                )
            cut.append((each, rows))
        run = partial(_run_block, cut, activation_checkpointing)
        pieces = run_checkpointed(activation_checkpointing, run, *pieces)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _run_block(cut: list[tuple[PlannedPass, int]], recompute: bool, *pieces: Tensor) -> tuple[Tensor, ...]:
    """Run the passes of one block, each with its number of rows."""
    first = cut[0][0]
    block_input = source = Pieces(first.channels, first.sides, pieces)
    for each, rows in cut:
        sink = Pieces(each.out_channels, each.out_sides)
        run_pass(each.step, source, sink, rows, block_input, recompute)
        source = sink
    return tuple(source.tensors)
