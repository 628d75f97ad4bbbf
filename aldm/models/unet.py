"""The U-Net of Table C. Tensors are B C X Y Z of RAS+ volumes.

That of Ho et al. 2020 as latent diffusion uses it (Rombach et al. 2022), in 3D, with a learned embedding of the target
modality added to the embedding of the time.
"""

from typing import cast

import torch
from torch import Tensor, nn

from aldm.config import DiffusionConfig, UNetConfig
from aldm.models.blocks import Attention, Downsample, OutputBlock, ResBlock, Upsample, conv3, run_checkpointed, zero_
from aldm.models.denoiser import Denoiser


class ConditionedBlock(nn.Module):
    """A residual block and, at the levels that have it, self-attention.

    Args:
        config: of the U-Net.
        in_channels, out_channels: widths.
        attention: whether it has that.
        starts_as_shortcut: see ResBlock.
    """

    def __init__(
        self, config: UNetConfig, in_channels: int, out_channels: int, attention: bool, starts_as_shortcut: bool = True
    ) -> None:
        super().__init__()
        embedding, groups = 4 * config.channels[0], norm_groups(config)
        self.block = ResBlock(
            in_channels, out_channels, groups, embedding, config.conditioning, starts_as_shortcut=starts_as_shortcut
        )
        self.attention = Attention(out_channels, config.head_channels, groups) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) and (B, E)."""
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x)


class UNet(Denoiser):
    """Table C: every residual block is conditioned on time and target, and each one down has a skip to one up.

    | part   | at each level                                                             | width of level i |
    |--------|---------------------------------------------------------------------------|------------------|
    | in     | conv 3^3, at the first                                                    | channels[0]      |
    | down   | num_res_blocks blocks; a stride-2 conv 3^3 to the next                    | channels[i]      |
    | middle | two blocks, at the last                                                   | channels[-1]     |
    | up     | num_res_blocks + 1 blocks; nearest neighbour and conv 3^3 to the one above | channels[i]     |
    | out    | norm, SiLU, conv 3^3, at the first                                        | out_channels     |

    Blocks of attention_levels, and the first of the middle if the last level is one, attend to all voxels. A skip
    carries the output of the first convolution, of each block down and of each step down.

    Args:
        config, diffusion, num_modalities, latent_channels: see Denoiser.
    """

    def __init__(
        self, config: UNetConfig, diffusion: DiffusionConfig, num_modalities: int, latent_channels: int
    ) -> None:
        super().__init__(config, diffusion, num_modalities, latent_channels)
        channels, last = config.channels, len(config.channels) - 1
        width = channels[0]
        self.conv_in = conv3(self.in_channels, width)
        skips = [width]
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        for level in range(last + 1):
            if level > 0:
                self.downsample.append(Downsample(width))
                skips.append(width)
            blocks = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                blocks.append(ConditionedBlock(config, width, channels[level], level in config.attention_levels))
                width = channels[level]
                skips.append(width)
            self.down.append(blocks)
        attends = (last in config.attention_levels, False)
        self.middle = nn.ModuleList(ConditionedBlock(config, width, width, attention) for attention in attends)
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(last + 1)):
            blocks = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                attention = level in config.attention_levels
                blocks.append(ConditionedBlock(config, width + skips.pop(), channels[level], attention))
                width = channels[level]
            self.up.append(blocks)
            if level > 0:
                self.upsample.append(Upsample(width))
        self.out = OutputBlock(width, self.out_channels, norm_groups(config))
        zero_(self.out.conv)  # starts by predicting 0: the mean of what every objective asks for
        nn.utils.convert_conv3d_weight_memory_format(self, torch.channels_last_3d)

    def network(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, in_channels, X, Y, Z) and (B, E) to (B, out_channels, X, Y, Z)."""
        recompute = self.activation_checkpointing
        h = self.conv_in(x)
        skips = [h]
        for level, blocks in enumerate(levels(self.down)):
            if level > 0:
                h = self.downsample[level - 1](h)
                skips.append(h)
            for block in blocks:
                h = run_checkpointed(recompute, block, h, embedding)
                skips.append(h)
        for block in self.middle:
            h = run_checkpointed(recompute, block, h, embedding)
        for level, blocks in enumerate(levels(self.up)):
            for block in blocks:
                h = run_checkpointed(recompute, block, torch.cat((h, skips.pop()), dim=1), embedding)
            if level < len(self.upsample):
                h = self.upsample[level](h)
        output: Tensor = run_checkpointed(recompute, self.out, h)
        return output


def levels(blocks: nn.ModuleList) -> list[nn.ModuleList]:
    """Return the blocks level by level, with their type."""
    return cast(list[nn.ModuleList], list(blocks))


def norm_groups(config: UNetConfig) -> int:
    """Return the groups of a U-Net's norms; 0 stands for norms over each voxel's channels."""
    return 0 if config.voxel_norm else config.norm_groups
