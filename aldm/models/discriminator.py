"""3D PatchGAN (Isola et al. 2017): one judgement per patch. Tensors are B C X Y Z of RAS+ volumes or latents."""

import torch.nn.functional as F
from torch import Tensor, nn

from aldm.errors import UserError
from aldm.models.blocks import conv3, make_norm, norm_fp32


class PatchDiscriminator(nn.Module):
    """Stride-2 convolutions, then one judgement (or one per class) for every patch that is left.

    Group norm stands where the 2D original has batch norm: with one volume a batch there is nothing to average over.

    Args:
        in_channels: channels of the input.
        channels: width of the first layer; doubles with each layer up to 8 times as much.
        num_layers: stride-2 layers.
        num_classes: 1 for real / fake; stage 2's judges M modalities and "fake", which is class M.
    """

    def __init__(self, in_channels: int, channels: int, num_layers: int, num_classes: int = 1) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        before = in_channels
        for layer in range(num_layers):
            width = channels * min(2**layer, 8)
            self.convs.append(nn.Conv3d(before, width, kernel_size=4, stride=2, padding=1))
            self.norms.append(nn.Identity() if layer == 0 else make_norm(8, width))
            before = width
        width = channels * min(2**num_layers, 8)
        self.convs.append(conv3(before, width))  # 3^3 keeps the size, so that small latents are not used up
        self.norms.append(make_norm(8, width))
        self.conv_out = conv3(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes, x, y, z) of (B, in_channels, X, Y, Z), x = X // 2^num_layers.

        Raises:
            UserError: a side of x is shorter than 2^num_layers.
        """
        shortest = 2**self.num_layers
        if min(x.shape[2:]) < shortest:
            raise UserError(
                f"the discriminator's {self.num_layers} stride-2 layers need sides of at least {shortest} voxels, got "
                f"{' x '.join(map(str, x.shape[2:]))}; use fewer discriminator_layers or a larger crop"
            )
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = conv(x)
            if isinstance(norm, nn.GroupNorm):
                x = norm_fp32(norm, x)
            x = F.leaky_relu(x, 0.2)
        return self.conv_out(x)
