"""Exact encode and decode in bounded memory.

The passes of passes.py run on whole tensors that are kept in memory while the limit allows and in a scratch file
otherwise, read and written slab by slab with plain file access: a memory map would count towards the process. Each
group norm's statistics are gathered, in float64, while its input is written. Tensors are B C X Y Z of RAS+ volumes.
"""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from aldm.errors import UserError
from aldm.memory import release_freed_memory
from aldm.models.blocks import VoxelNorm
from aldm.models.codecs import Codec, check_sides
from aldm.models.passes import Pieces, PlannedPass, Sides, merge_moments, moments_of, plan_passes, rows_within, run_pass

FLOAT_BYTES = 4
MARGIN_BYTES = 48 * 2**20
"""What the convolution library and the allocator keep for themselves."""
UNFOLD_BELOW = 20480
"""PyTorch's CPU convolution unfolds an fp32 input with B C X Y up to this (aten/native/Convolution.cpp, use_mkldnn)."""
WORKING_ROWS = 8
"""Output rows that a slab should have before memory goes to whole tensors: fewer read their neighbours too often."""


def slab_bytes(each: PlannedPass, batch: int, rows: int) -> int:
    """Return the memory that a slab of that many output rows takes.

    Twice the input (a normalised or padded copy, then the convolution's own layout), twice the output (the
    convolution's layout, then the sum), the residual and twice the weights; interleaving what an upsampling computed,
    the Haar transforms and a norm over a voxel's channels take one copy more. PyTorch's CPU convolution of a small fp32
    input unfolds it: that is counted up to where it stops doing so.
    """
    layer = each.step.layer
    inputs, outputs = batch * each.input_elements(rows), batch * each.output_elements(rows)
    if not isinstance(layer, nn.Conv3d):
        return FLOAT_BYTES * 3 * (inputs + outputs)
    depth = each.out_sides[2]
    unfolded = layer.weight[0, 0].numel() * depth * min(UNFOLD_BELOW, batch * each.channels * rows * each.out_sides[1])
    weights = (3 if each.step.upsample else 1) * layer.weight.numel()
    residual = outputs if each.step.adds_residual or each.step.upsample else 0
    normed = inputs if isinstance(each.step.norm, VoxelNorm) else 0
    return FLOAT_BYTES * (2 * inputs + normed + 2 * outputs + residual + unfolded + 2 * weights)


class Store:
    """A whole float32 tensor in memory or in a scratch file, with each channel's statistics.

    Args:
        batch, channels, sides: shape.
        folder: where the scratch file goes; None keeps the tensor in memory.
        device: where rows are returned.
    """

    def __init__(self, batch: int, channels: int, sides: Sides, folder: Path | None, device: torch.device) -> None:
        self.batch = batch
        self.channels = channels
        self.sides = sides
        self.device = device
        self._written = 0
        self._moments: list[tuple[int, Tensor, Tensor]] = []
        self._tensor = torch.empty(batch, channels, *sides) if folder is None else None
        # the file has no name, so nothing stays behind however the process ends
        self._file = None if folder is None else tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of memory that the whole tensor takes."""
        return 0 if self._tensor is None else FLOAT_BYTES * self._tensor.numel()

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) along X on the device."""
        if self._tensor is not None:
            return self._tensor[:, :, start:stop].to(self.device)
        slab = torch.empty(self.batch, self.channels, stop - start, *self.sides[1:])
        self._transfer(slab, start, write=False)
        return slab.to(self.device)

    def append(self, rows: Tensor) -> None:
        """Write the next rows."""
        self._moments.append(moments_of(rows))
        slab = rows.to("cpu", torch.float32).contiguous()
        if self._tensor is not None:
            self._tensor[:, :, self._written : self._written + slab.shape[2]] = slab
        else:
            self._transfer(slab, self._written, write=True)
        self._written += slab.shape[2]
        release_freed_memory()

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each channel, (B, C) in float64."""
        return merge_moments(self._moments)

    def close(self) -> None:
        """Give memory and file back."""
        self._tensor = None
        if self._file is not None:
            self._file.close()

    def _transfer(self, slab: Tensor, start: int, *, write: bool) -> None:
        """Copy between a slab and the file; in the file each channel's rows lie together."""
        assert self._file is not None
        file = self._file.fileno()
        row_bytes = FLOAT_BYTES * self.sides[1] * self.sides[2]
        for index, channel in enumerate(slab.flatten(0, 1)):
            view = memoryview(channel.numpy()).cast("B")
            position = (index * self.sides[0] + start) * row_bytes
            while view:
                done = os.pwrite(file, view, position) if write else os.preadv(file, [view], position)
                assert done > 0, "the scratch file ended early"
                view, position = view[done:], position + done


def floor_bytes(codec: Codec, shape: Sides) -> int:
    """Return the least limit, in bytes, that encode_bounded and decode_bounded can hold for one volume.

    Args:
        shape: X, Y, Z of the volume.
    """
    x, y, z = (side // codec.downsampling for side in shape)
    return max(
        _floor(codec, codec.encoder, 1, 1, shape), _floor(codec, codec.decoder, 1, codec.latent_channels, (x, y, z))
    )


@torch.no_grad()
def encode_bounded(codec: Codec, x: Tensor, max_bytes: int, scratch_dir: Path | None = None) -> Tensor:
    """Return codec.encode(x), to rounding, within a limit of memory.

    Args:
        codec: on any device.
        x: (B, 1, X, Y, Z) in [-1, 1].
        max_bytes: memory to use beyond the codec's weights and x; the result counts.
        scratch_dir: an existing folder on a disk (not in memory) for what does not fit; None takes the system's folder
            for temporary files.

    Raises:
        UserError: the codec does not take these sides, the limit is below what one row of the widest layer needs (the
            message says the least limit), or the scratch folder cannot be used or is full.
    """
    check_sides(x.shape[2:], codec.downsampling)
    _check_limit(codec, codec.encoder, x, max_bytes)
    return codec.bound(_run_bounded(codec.encoder, x, max_bytes, scratch_dir))


@torch.no_grad()
def decode_bounded(codec: Codec, z: Tensor, max_bytes: int, scratch_dir: Path | None = None) -> Tensor:
    """Return codec.decode(z), to rounding, within a limit of memory: see encode_bounded.

    z is (B, latent_channels, x, y, z) and is quantised first where the codec has a quantiser.
    """
    _check_limit(codec, codec.decoder, z, max_bytes)
    if codec.quantizer is not None:
        z = codec.quantizer.lookup(z)
    return _run_bounded(codec.decoder, z, max_bytes, scratch_dir)


def _floor(codec: Codec, blocks: nn.Sequential, batch: int, channels: int, sides: Sides) -> int:
    """Return the least limit: one row of the widest pass, or the code search, and the result."""
    passes = [each for block in plan_passes(blocks, channels, sides) for each in block]
    working = max(slab_bytes(each, batch, each.step.granularity) for each in passes)
    if blocks is codec.decoder and codec.quantizer is not None:
        voxels = batch * sides[0] * sides[1] * sides[2]
        working = max(working, codec.quantizer.search_bytes(voxels) + 4 * FLOAT_BYTES * voxels * (channels + 2))
    return MARGIN_BYTES + working + _output_bytes(passes[-1], batch)


def _check_limit(codec: Codec, blocks: nn.Sequential, x: Tensor, max_bytes: int) -> None:
    sides = (x.shape[2], x.shape[3], x.shape[4])
    floor = _floor(codec, blocks, x.shape[0], x.shape[1], sides)
    if max_bytes < floor:
        raise UserError(
            f"a memory limit of {max_bytes / 2**30:.3f} GiB is too small for this codec on {sides} voxels: the least "
            f"is {floor / 2**30:.3f} GiB; raise the limit, or use a codec with fewer channels"
        )


def _output_bytes(each: PlannedPass, batch: int) -> int:
    x, y, z = each.out_sides
    return FLOAT_BYTES * batch * each.out_channels * x * y * z


def _run_bounded(blocks: nn.Sequential, x: Tensor, max_bytes: int, scratch_dir: Path | None) -> Tensor:
    """Run the blocks; whole tensors stay in memory while slabs of WORKING_ROWS rows still fit beside them."""
    folder = Path(tempfile.gettempdir()) if scratch_dir is None else scratch_dir
    device = next((parameter.device for parameter in blocks.parameters()), x.device)
    batch, sides = x.shape[0], (x.shape[2], x.shape[3], x.shape[4])
    planned = plan_passes(blocks, x.shape[1], sides)
    passes = [each for block in planned for each in block]
    free = max_bytes - MARGIN_BYTES - _output_bytes(passes[-1], batch)
    working = min(free, max(slab_bytes(each, batch, min(WORKING_ROWS, each.out_sides[0])) for each in passes))
    block_input: Pieces | Store = Pieces(x.shape[1], sides, [x.to(device)])
    stores: list[Store] = []
    try:
        for block in planned:
            source = block_input
            for each in block:
                kept = sum(store.bytes_in_memory for store in stores)
                fits = each is passes[-1] or kept + _output_bytes(each, batch) <= free - working
                sink = Store(batch, each.out_channels, each.out_sides, None if fits else folder, device)
                stores.append(sink)
                if fits and each is not passes[-1]:
                    kept += sink.bytes_in_memory
                rows = rows_within(each, lambda rows: slab_bytes(each, batch, rows) <= free - kept)  # noqa: B023
                assert rows is not None, "the floor is one row of every pass"
                run_pass(each.step, source, sink, rows, block_input)
                source = sink
            for store in stores[:-1]:
                store.close()
            stores = stores[-1:]
            block_input = stores[0]
        return stores[0].rows(0, stores[0].sides[0]).to(x.device)
    except OSError as error:
        needed = max(_output_bytes(each, batch) for each in passes)
        raise UserError(
            f"scratch folder {folder}: {error.strerror}; wanted an existing, writable folder on a disk with three "
            f"times {needed / 2**30:.3f} GiB free, or a memory limit that needs no scratch file"
        ) from error
    finally:
        for store in stores:
            store.close()
