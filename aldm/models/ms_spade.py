"""MS-SPADE: source latent to target-like latent (Table B). Tensors are B C X Y Z latents of RAS+ volumes.

SPADE (Park et al. 2019, eq. 1) modulates normalised features with maps computed from a conditioning image. Here the
features modulate themselves, and one set of modulation weights per target modality is switched by the target's id.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.models.blocks import conv3, instance_norm_fp32, run_checkpointed, voxel_norm_fp32, zero_
from aldm.models.intensity_map import IntensityMap


class SwitchedConv(nn.Module):
    """A 3^3 convolution with one set of weights per modality, picked per sample by index.

    The weights of all modalities lie in one tensor and are picked on the device, so nothing waits for the host and
    every weight takes part in every step (those of absent modalities with a gradient of zero), as DDP and ZeRO need.
    """

    def __init__(self, num_modalities: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        convs = [conv3(in_channels, out_channels) for _ in range(num_modalities)]
        self.weight = nn.Parameter(torch.stack([conv.weight.detach() for conv in convs]))
        self.bias = nn.Parameter(torch.stack([conv.bias.detach() for conv in convs if conv.bias is not None]))

    def forward(self, x: Tensor, modality: Tensor) -> Tensor:
        """Convolve sample b of (B, in_channels, X, Y, Z) with the weights of modality[b]; modality is (B,) int64."""
        weight, bias = self.weight.index_select(0, modality), self.bias.index_select(0, modality)
        outs = [F.conv3d(x[b : b + 1], weight[b], bias[b], padding=1) for b in range(x.shape[0])]
        return outs[0] if len(outs) == 1 else torch.cat(outs)


Norm = Callable[[Tensor], Tensor]


class Spade(nn.Module):
    """normalised * (1 + gamma) + beta, with gamma and beta computed from the features by the target's weights."""

    def __init__(
        self, num_modalities: int, channels: int, hidden_channels: int, norm: Norm = instance_norm_fp32
    ) -> None:
        super().__init__()
        self.norm = norm
        self.shared = SwitchedConv(num_modalities, channels, hidden_channels)
        self.gamma_beta = SwitchedConv(num_modalities, hidden_channels, 2 * channels)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Map (B, channels, X, Y, Z) and target ids (B,) to the same shape."""
        gamma, beta = self.gamma_beta(F.relu(self.shared(x, target)), target).chunk(2, dim=1)
        return torch.addcmul(beta, self.norm(x).to(gamma.dtype), 1 + gamma)


class InstanceResBlock(nn.Module):
    """Conv 3^3, ReLU, instance norm, twice, plus the input (1^3 convolution where widths differ)."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm = instance_norm_fp32) -> None:
        super().__init__()
        self.norm = norm
        self.conv1 = conv3(in_channels, out_channels)
        self.conv2 = conv3(out_channels, out_channels)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, X, Y, Z) to (B, out_channels, X, Y, Z)."""
        h = self.norm(F.relu(self.conv1(x)))
        h = self.norm(F.relu(self.conv2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class SpadeResBlock(nn.Module):
    """Conv 3^3, ReLU, MS-SPADE, twice, plus the input (1^3 convolution where widths differ)."""

    def __init__(
        self,
        num_modalities: int,
        in_channels: int,
        out_channels: int,
        hidden_channels: int,
        norm: Norm = instance_norm_fp32,
    ) -> None:
        super().__init__()
        self.conv1 = conv3(in_channels, out_channels)
        self.spade1 = Spade(num_modalities, out_channels, hidden_channels, norm)
        self.conv2 = conv3(out_channels, out_channels)
        self.spade2 = Spade(num_modalities, out_channels, hidden_channels, norm)
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        """Map (B, in_channels, X, Y, Z) and target ids (B,) to (B, out_channels, X, Y, Z)."""
        h = self.spade1(F.relu(self.conv1(x)), target)
        h = self.spade2(F.relu(self.conv2(h)), target)
        return h + (x if self.shortcut is None else self.shortcut(x))


class MSSpade(nn.Module):
    """The whole of Table B.

    Args:
        latent_channels: channels of the latent.
        num_modalities: M, the modalities that ids count through.
        in_channels, res_channels, spade_channels, hidden_channels, kernel_size: see MSSpadeConfig.
        source_skip: return `skip * z_source + net * network(z_source)` with a learned gate of each kind per (source,
            target, channel). It starts as the identity where source = target, which is the exact answer there. Not in
            Table B.
        intensity_map: return `map(z_source) + network(z_source)` with the best function of intensity for each pair
            (fit_intensity_map); the network starts at 0 and has no say where source = target. Not in Table B.
        voxel_norm: normalise over each voxel's channels instead of over the latent, see MSSpadeConfig.
        haar_levels: of the codec; an intensity map needs it.
        several_sources: keep how well each source tells each target, `precision` (M, M): of the intensity map, all 1
            without one. What is made of several sources is weighted by it.

    Attributes:
        activation_checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self,
        latent_channels: int,
        num_modalities: int,
        in_channels: int,
        res_channels: tuple[int, ...],
        spade_channels: tuple[int, ...],
        hidden_channels: int,
        kernel_size: int,
        source_skip: bool = False,
        intensity_map: bool = False,
        voxel_norm: bool = False,
        haar_levels: int = 0,
        several_sources: bool = False,
    ) -> None:
        super().__init__()
        self.num_modalities = num_modalities
        self.activation_checkpointing = False
        padding = kernel_size // 2
        self.norm: Norm = voxel_norm_fp32 if voxel_norm else instance_norm_fp32
        self.conv_in = nn.Conv3d(latent_channels, in_channels, kernel_size, padding=padding)
        self.res_blocks = nn.ModuleList(
            InstanceResBlock(before, after, self.norm) for before, after in pairwise((in_channels, *res_channels))
        )
        before_spade = (in_channels, *res_channels)[-1]
        self.spade_blocks = nn.ModuleList(
            SpadeResBlock(num_modalities, before, after, hidden_channels, self.norm)
            for before, after in pairwise((before_spade, *spade_channels))
        )
        self.conv_out = nn.Conv3d(spade_channels[-1], latent_channels, kernel_size, padding=padding)
        self.gates: nn.Parameter | None = None
        if source_skip:
            same = torch.eye(num_modalities)[:, :, None, None].expand(-1, -1, 1, latent_channels)
            self.gates = nn.Parameter(torch.cat((0.5 + 0.5 * same, 1 - same), dim=2))  # M M 2 C
        self.intensity_map: IntensityMap | None = None
        if intensity_map:
            self.intensity_map = IntensityMap(latent_channels, num_modalities, haar_levels)
            zero_(self.conv_out)
        if several_sources:
            self.register_buffer("precision", torch.ones(num_modalities, num_modalities))
        self.precision: Tensor

    def forward(self, z_source: Tensor, target: Tensor, source: Tensor | None = None) -> Tensor:
        """Return z_target_like, shaped like z_source (B, C, X, Y, Z).

        Args:
            z_source: standardised latent of the source volume.
            target: (B,) int64 ids of the wanted modalities.
            source: (B,) int64 ids of z_source's modalities; `source_skip` and `intensity_map` need them.
        """
        h = run_checkpointed(self.activation_checkpointing, self._stem, z_source)
        for block in self.res_blocks:
            h = run_checkpointed(self.activation_checkpointing, block, h)
        for block in self.spade_blocks:
            h = run_checkpointed(self.activation_checkpointing, block, h, target)
        h = self.conv_out(h)
        if self.intensity_map is not None:
            assert source is not None, "intensity_map needs the source's modality"
            return self.intensity_map(z_source, target, source) + h * (source != target).view(-1, 1, 1, 1, 1)
        if self.gates is None:
            return h
        assert source is not None, "source_skip needs the source's modality"
        gates = self.gates.flatten(0, 1).index_select(0, source * self.num_modalities + target)
        skip, net = gates[:, :, :, None, None, None].unbind(1)
        return skip * z_source + net * h

    def _stem(self, z: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv_in(z)))
