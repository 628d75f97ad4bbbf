"""The U-Net of the preset small: half the operations of Table C's. Tensors are B C X Y Z of RAS+ volumes."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from aldm.config import DiffusionConfig, UNetConfig
from aldm.models.blocks import OutputBlock, conv3, run_checkpointed, zero_
from aldm.models.denoiser import Denoiser
from aldm.models.unet import ConditionedBlock, levels, norm_groups


class LeanUNet(Denoiser):
    """One skip a level, as many blocks up as down, one in the middle, 2^3 convolutions between the levels.

    Its blocks do not start as shortcuts: a shallow network whose last convolution starts at 0 as well learns nothing at
    first. Going up it narrows before it doubles the sides: the first level is where the work is.

    Args:
        config, diffusion, num_modalities, latent_channels: see Denoiser.
    """

    def __init__(
        self, config: UNetConfig, diffusion: DiffusionConfig, num_modalities: int, latent_channels: int
    ) -> None:
        super().__init__(config, diffusion, num_modalities, latent_channels)
        channels, last = config.channels, len(config.channels) - 1
        embedding = 4 * channels[0]
        self.mix = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.conv_in = conv3(self.in_channels, channels[0])
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for level, before in enumerate((channels[0], *channels[:-1])):
            if level > 0:
                self.downsample.append(nn.Conv3d(before, before, 2, stride=2))
            self.down.append(_blocks(config, level, before))
        self.middle = _blocks(config, last, channels[-1], number=1)
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(last + 1)):
            self.up.append(_blocks(config, level, 2 * channels[level]))
            if level > 0:
                self.upsample.append(nn.ConvTranspose3d(channels[level], channels[level - 1], 2, stride=2))
        self.out = OutputBlock(channels[0], self.out_channels, norm_groups(config))
        zero_(self.out.conv)  # starts by predicting 0: the mean of what every objective asks for
        nn.utils.convert_conv3d_weight_memory_format(self, torch.channels_last_3d)

    def embed(self, t: Tensor, target: Tensor, source: Tensor | None) -> Tensor:
        """Return the conditioning vector (B, E), its parts mixed."""
        mixed: Tensor = self.mix(super().embed(t, target, source))
        return mixed

    def network(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, in_channels, X, Y, Z) and (B, E) to (B, out_channels, X, Y, Z)."""
        h = self.conv_in(x)
        skips = []
        for level, blocks in enumerate(levels(self.down)):
            if level > 0:
                h = self.downsample[level - 1](h)
            h = self._run(blocks, h, embedding)
            skips.append(h)
        h = self._run(self.middle, h, embedding)
        for level, blocks in enumerate(levels(self.up)):
            h = self._run(blocks, torch.cat((h, skips.pop()), dim=1), embedding)
            if level < len(self.upsample):
                h = self.upsample[level](h)
        output: Tensor = run_checkpointed(self.activation_checkpointing, self.out, h)
        return output

    def _run(self, blocks: nn.ModuleList, h: Tensor, embedding: Tensor) -> Tensor:
        for block in blocks:
            h = run_checkpointed(self.activation_checkpointing, block, h, embedding)
        return h


def _blocks(config: UNetConfig, level: int, before: int, number: int | None = None) -> nn.ModuleList:
    """Return the blocks of a level, num_res_blocks of them or `number`; the first takes `before` channels."""
    width, attention = config.channels[level], level in config.attention_levels
    widths = [before] + [width] * (config.num_res_blocks if number is None else number)
    return nn.ModuleList(
        ConditionedBlock(config, i, o, attention, starts_as_shortcut=False) for i, o in pairwise(widths)
    )
