"""The network that says how far off a translation may be. Volumes are B 1 X Y Z in [-1, 1]."""

import math

import torch
from torch import Tensor

from aldm.models.haar_unet import BACKGROUND, BandsUNet

FIRST_GUESS = math.log(0.1)
"""What the network says before it has learnt anything: an error of 5 % of the intensity range."""
LEAST, LARGEST = math.log(1e-3), math.log(2.0)
"""What it says lies between these: intensities are 2 apart at most."""


class ErrorUNet(BandsUNet):
    """A residual U-Net on Haar bands: a prediction and what it was made from in, the size of its error out.

    Its first volume is the prediction, the others are the modalities, in order, background where one was not given. The
    embedding is the mean of those of the pairs of each source with the target.

    Args:
        num_modalities, channels, norm_groups: see BandsUNet.
    """

    def __init__(self, num_modalities: int, channels: tuple[int, ...], norm_groups: int) -> None:
        super().__init__(num_modalities, channels, norm_groups, num_volumes=1 + num_modalities)

    def forward(self, prediction: Tensor, sources: Tensor, given: Tensor, target: Tensor) -> Tensor:
        """Return the logarithm of the size of the error, (B, 1, X, Y, Z) fp32.

        Args:
            prediction: (B, 1, X, Y, Z).
            sources: (B, M, X, Y, Z); what is not given may hold anything.
            given: (B, M), 1 for each modality that the prediction was made from, else 0.
            target: (B,) int64 modality ids.
        """
        there = given.view(*given.shape, 1, 1, 1) > 0
        volumes = torch.cat([prediction, torch.where(there, sources, BACKGROUND)], dim=1)
        pairs = self.pair.weight.unflatten(0, (self.num_modalities, self.num_modalities))[:, target]  # M B E
        pair = (given.T[:, :, None] * pairs).sum(dim=0) / given.sum(dim=1, keepdim=True)
        return (FIRST_GUESS + self.change(volumes, pair)).clamp(LEAST, LARGEST)
