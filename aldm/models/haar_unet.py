"""The yardstick's network: a U-Net on the bands of a Haar transform. Volumes are B 1 X Y Z in [-1, 1], RAS+."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.models.blocks import HaarTransform, InverseHaarTransform, without_autocast
from aldm.models.unet import UNet

BANDS = 8
"""Of one Haar transform in 3D: an eighth of the voxels each."""
BACKGROUND = -1.0


class HaarUNet(nn.Module):
    """Haar transform, U-Net, inverse transform; what comes out is added to the source.

    The transform loses nothing and costs next to nothing, and no convolution runs at full resolution. A network whose
    last convolution is zero, as it starts, returns the source to the last bit. The (source, target) pair is embedded in
    every residual block. A volume that is of the target's modality already is returned as it is.

    Weights and inputs of the convolutions lie channels last, which spares CPUs and GPUs a copy of each.

    Args:
        unet: without time, 8 channels in and out, its pair embedded.
    """

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet
        self.haar, self.inverse = HaarTransform(), InverseHaarTransform()
        nn.utils.convert_conv3d_weight_memory_format(self.unet, torch.channels_last_3d)

    def forward(self, volume: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Return the prediction (B, 1, X, Y, Z), fp32; odd sides get a layer of background, which is cropped off again.

        Args:
            volume: (B, 1, X, Y, Z), the source.
            source, target: (B,) int64 modality ids.
        """
        sides = volume.shape[2:]
        odd = [side % 2 for side in sides]
        even = F.pad(volume, (0, odd[2], 0, odd[1], 0, odd[0]), value=BACKGROUND) if any(odd) else volume
        bands = self.haar(even).contiguous(memory_format=torch.channels_last_3d)
        change = self.unet(bands, None, target, source).float()
        with without_autocast(volume):
            change = self.inverse(change)[:, :, : sides[0], : sides[1], : sides[2]]
        return torch.where((source == target).view(-1, 1, 1, 1, 1), volume, volume + change)
