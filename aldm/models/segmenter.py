"""The fixed segmenter: a small network for each modality, which has seen real volumes of that modality alone.

Volumes are B 1 X Y Z in [-1, 1], logits B K X Y Z: class 0 is everything that is no structure.
"""

import numpy as np
import torch
from torch import Tensor, nn

from aldm.models.haar_unet import BandsUNet
from aldm.precision import arithmetic


class Segmenter(nn.Module):
    """A U-Net on Haar bands (haar_unet.py) for each modality, side by side.

    One network for all modalities, told which one it sees, need not listen: it would segment a copied source as well
    as the source. A network that has only ever seen T2 finds in a T1 what a T2 would show there.

    Args:
        modalities: whose volumes are segmented.
        structures: K - 1 names.
        channels, norm_groups: of each network, see HaarUNetConfig.
        activation_checkpointing: recompute activations in the backward pass.

    Attributes:
        precision: of `segment`: fp32, tf32 or bf16.
    """

    def __init__(
        self,
        modalities: tuple[str, ...],
        structures: tuple[str, ...],
        channels: tuple[int, ...],
        norm_groups: int,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.modalities, self.structures, self.precision = modalities, structures, "fp32"
        self.networks = nn.ModuleList()
        for _ in modalities:
            network = BandsUNet(1, channels, norm_groups, out_channels=1 + len(structures))
            network.activation_checkpointing = activation_checkpointing
            self.networks.append(network)

    def forward(self, volumes: Tensor) -> Tensor:
        """Map (B, M, X, Y, Z), a volume of each modality, to logits (B, M, K, X, Y, Z), fp32."""
        return torch.stack([self.logits(volumes[:, m : m + 1], m) for m in range(len(self.modalities))], dim=1)

    def logits(self, volume: Tensor, modality: int) -> Tensor:
        """Map (B, 1, X, Y, Z) of one modality, by its place, to logits (B, K, X, Y, Z), fp32."""
        network = self.networks[modality]
        assert isinstance(network, BandsUNet)
        return network.change(volume, network.pair(torch.zeros(len(volume), dtype=torch.long, device=volume.device)))

    @torch.no_grad()
    def segment(self, volume: np.ndarray, modality: str) -> np.ndarray:
        """Return the label of every voxel, (X, Y, Z) uint8: 0, or 1 + the place of its structure.

        Args:
            volume: (X, Y, Z) in [-1, 1].
            modality: whose network segments it.
        """
        device = next(self.parameters()).device
        x = torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32))[None, None]
        with arithmetic(self.precision, device):
            logits = self.logits(x.to(device), self.modalities.index(modality))
        return logits[0].argmax(dim=0).to(torch.uint8).cpu().numpy()
