"""The best function of the source's intensity for every pair: what contrast alone says of the target.

A latent of a lossless codec can be looked at as the volume that it is. Each voxel's intensity is looked up in a table
for its pair of modalities, and the result is transformed again. Tensors are B C X Y Z latents, standardised.
"""

import torch
from torch import Tensor, nn

from aldm.models.blocks import HaarTransform, InverseHaarTransform, without_autocast

BINS = 256
"""Of equal width over [-1, 1]."""
AIR = -1 + 1 / BINS
"""What lies below, half of the first bin, is as dark as air."""


class IntensityMap(nn.Module):
    """A table of intensities per (source, target), read with linear interpolation between the middles of its bins.

    Between a modality and itself, and before it was fitted, it is the identity. What is as dark as air stays so.

    Args:
        latent_channels: channels of the latent, 8^haar_levels.
        num_modalities: M, the modalities that ids count through.
        haar_levels: Haar transforms of the codec.
    """

    def __init__(self, latent_channels: int, num_modalities: int, haar_levels: int) -> None:
        super().__init__()
        self.num_modalities = num_modalities
        self.transform = nn.Sequential(*(HaarTransform() for _ in range(haar_levels)))
        self.inverse = nn.Sequential(*(InverseHaarTransform() for _ in range(haar_levels)))
        middles = (torch.arange(BINS) + 0.5) * (2 / BINS) - 1
        self.register_buffer("tables", middles.repeat(num_modalities, num_modalities, 1))  # M M BINS
        self.register_buffer("mean", torch.zeros(latent_channels))
        self.register_buffer("std", torch.ones(latent_channels))
        self.tables: Tensor
        self.mean: Tensor
        self.std: Tensor

    def forward(self, z_source: Tensor, target: Tensor, source: Tensor) -> Tensor:
        """Return the latent, fp32, of the source volume with every intensity looked up.

        Args:
            z_source: (B, C, x, y, z), standardised.
            target, source: (B,) int64 modality ids.
        """
        mean, std = (value.view(1, -1, 1, 1, 1) for value in (self.mean, self.std))
        with without_autocast(z_source):
            x = self.inverse(z_source.float() * std + mean)
            tables = self.tables.flatten(0, 1).index_select(0, source * self.num_modalities + target)
            y = torch.stack([look_up(volume, table) for volume, table in zip(x, tables, strict=True)])
            mapped = (self.transform(y) - mean) / std
        return torch.where((source == target).view(-1, 1, 1, 1, 1), z_source.float(), mapped)


def look_up(x: Tensor, table: Tensor) -> Tensor:
    """Return the table's value at every intensity of x, any shape, in [-1, 1]; x itself where it is below AIR.

    Args:
        x: intensities; beyond the middle of the last bin the last value holds.
        table: (BINS,) at the middles of the bins.
    """
    place = ((x + 1) * (BINS / 2) - 0.5).clamp(0, BINS - 1)
    below = place.floor().clamp(max=BINS - 2)
    index = below.long()
    return torch.where(x < AIR, x, torch.lerp(table[index], table[index + 1], place - below))
