"""The yardstick's network: a residual U-Net on the bands of a Haar transform. Volumes are B 1 X Y Z in [-1, 1]."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.models.blocks import (
    HaarTransform,
    InverseHaarTransform,
    OutputBlock,
    ResBlock,
    conv3,
    run_checkpointed,
    without_autocast,
    zero_,
)

BANDS = 8
"""Of one Haar transform in 3D: an eighth of the voxels each."""
BACKGROUND = -1.0


class BandsUNet(nn.Module):
    """Haar transform, residual U-Net, inverse transform.

    The transform loses nothing and costs next to nothing, and no convolution runs at full resolution. As the last
    convolution is zero, the network says 0 at first. The (source, target) pair is embedded and modulates every block
    (Perez et al. 2018). Weights and inputs of the convolutions lie channels last, which spares a copy of each.

    Args:
        num_modalities: M, the modalities that ids count through.
        channels, norm_groups: see HaarUNetConfig.
        num_volumes: volumes that go in together.
        out_channels: channels of what `change` returns.

    Attributes:
        activation_checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self,
        num_modalities: int,
        channels: tuple[int, ...],
        norm_groups: int,
        num_volumes: int = 1,
        out_channels: int = 1,
    ) -> None:
        super().__init__()
        self.num_modalities = num_modalities
        self.stride = 2 ** len(channels)
        self.activation_checkpointing = False
        embedding_channels = 2 * channels[0]

        def block(before: int, after: int) -> ResBlock:
            return ResBlock(before, after, norm_groups, embedding_channels, "scale-shift", starts_as_shortcut=False)

        steps = list(pairwise(channels))
        self.haar, self.inverse = HaarTransform(), InverseHaarTransform()
        self.pair = nn.Embedding(num_modalities**2, embedding_channels)
        self.mix = nn.Linear(embedding_channels, embedding_channels)
        self.conv_in = conv3(num_volumes * BANDS, channels[0])
        self.down = nn.ModuleList(block(width, width) for width in channels[:-1])
        self.coarser = nn.ModuleList(nn.Conv3d(fine, coarse, 2, stride=2) for fine, coarse in steps)
        self.middle = nn.ModuleList(block(channels[-1], channels[-1]) for _ in range(2))
        self.finer = nn.ModuleList(nn.ConvTranspose3d(coarse, fine, 2, stride=2) for fine, coarse in reversed(steps))
        self.up = nn.ModuleList(block(2 * width, width) for width in reversed(channels[:-1]))
        self.out = OutputBlock(channels[0], BANDS * out_channels, norm_groups)
        zero_(self.out.conv)
        nn.utils.convert_conv3d_weight_memory_format(self, torch.channels_last_3d)

    def change(self, volumes: Tensor, pair: Tensor) -> Tensor:
        """Return what the network says of volumes, (B, out_channels, X, Y, Z), fp32.

        Sides that the strides do not divide get background at their ends, which is cropped off again.

        Args:
            volumes: (B, num_volumes, X, Y, Z).
            pair: (B, E) embeddings of the pair, of `pair`.
        """
        sides = volumes.shape[2:]
        x, y, z = (-side % self.stride for side in sides)
        whole = F.pad(volumes, (0, z, 0, y, 0, x), value=BACKGROUND) if x or y or z else volumes
        bands = self.bands(self.haar(whole), self.mix(pair))
        with without_autocast(volumes):
            result: Tensor = self.inverse(bands.float())[:, :, : sides[0], : sides[1], : sides[2]]
            return result

    def bands(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, 8 num_volumes, x, y, z) bands and (B, E) embeddings of the pair to the bands of `change`."""

        def run(block: nn.Module, h: Tensor) -> Tensor:
            result: Tensor = run_checkpointed(self.activation_checkpointing, block, h, embedding)
            return result

        h = self.conv_in(x.contiguous(memory_format=torch.channels_last_3d))
        skips = []
        for level, block in enumerate(self.down):
            skips.append(run(block, h))
            h = self.coarser[level](skips[-1])
        for block in self.middle:
            h = run(block, h)
        for level, block in enumerate(self.up):
            h = run(block, torch.cat((self.finer[level](h), skips.pop()), dim=1))
        result: Tensor = run_checkpointed(self.activation_checkpointing, self.out, h)
        return result


class HaarUNet(BandsUNet):
    """The regression U-Net: what the network says is added to an empty volume.

    A volume of the target's modality is returned as it is.

    Args:
        num_modalities, channels, norm_groups: see BandsUNet.
    """

    def forward(self, volume: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Return the prediction (B, 1, X, Y, Z), fp32.

        Args:
            volume: (B, 1, X, Y, Z), the source.
            source, target: (B,) int64 modality ids.
        """
        change = self.change(volume, self.pair(source * self.num_modalities + target))
        return torch.where((source == target).view(-1, 1, 1, 1, 1), volume, BACKGROUND + change)
