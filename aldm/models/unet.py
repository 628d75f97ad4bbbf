"""The denoiser (Table C). Tensors are B C X Y Z of RAS+ volumes.

The U-Net of Ho et al. 2020 as latent diffusion uses it (Rombach et al. 2022), in 3D, with a learned embedding of the
target modality added to the embedding of the time.
"""

import math
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.models.blocks import Attention, Downsample, OutputBlock, ResBlock, Upsample, conv3, run_checkpointed, zero_


def time_embedding(t: Tensor, channels: int, max_period: float = 10_000.0) -> Tensor:
    """Return the sinusoidal embedding (B, channels) in fp32 of times (B,), integer or not (Vaswani et al. 2017)."""
    half = channels // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat((angles.cos(), angles.sin()), dim=1), (0, channels - 2 * half))


class ConditionedBlock(nn.Module):
    """A residual block and, at the levels that have it, self-attention."""

    def __init__(self, block: ResBlock, attention: Attention | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map (B, C, X, Y, Z) and (B, E)."""
        x = self.block(x, embedding)
        return x if self.attention is None else self.attention(x)


class UNet(nn.Module):
    """U-Net whose every residual block is conditioned on time and target (and pair).

    Args:
        in_channels, out_channels: channels of the concatenated inputs and of the prediction.
        num_modalities: M, the modalities that ids count through.
        channels, num_res_blocks, attention_levels, head_channels, conditioning, lean, embed_source, skip_gates,
            norm_groups, voxel_norm: see UNetConfig.
        noise_gain: add the first out_channels of the input times a learned gain per channel, time and target (and
            pair). To predict noise is to pass most of it through voxel by voxel, which the blocks learn slowly.

    Attributes:
        activation_checkpointing: recompute activations in the backward pass.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_modalities: int,
        channels: tuple[int, ...],
        num_res_blocks: int,
        attention_levels: tuple[int, ...],
        head_channels: int,
        conditioning: str,
        lean: bool,
        embed_source: bool,
        skip_gates: bool,
        norm_groups: int,
        voxel_norm: bool = False,
        noise_gain: bool = False,
    ) -> None:
        super().__init__()
        norm_groups = 0 if voxel_norm else norm_groups
        self.channels = tuple(channels)
        self.num_modalities = num_modalities
        self.lean = lean
        self.activation_checkpointing = False
        embedding_channels = 4 * channels[0]

        def stage(before: int, after: int, attention: bool) -> ConditionedBlock:
            block = ResBlock(before, after, norm_groups, embedding_channels, conditioning, starts_as_shortcut=not lean)
            return ConditionedBlock(block, Attention(after, head_channels, norm_groups) if attention else None)

        self.time = nn.Sequential(
            nn.Linear(channels[0], embedding_channels),
            nn.SiLU(),
            nn.Linear(embedding_channels, embedding_channels),
        )
        self.target = nn.Embedding(num_modalities, embedding_channels)
        self.pair = nn.Embedding(num_modalities**2, embedding_channels) if embed_source else None
        self.gates: nn.Parameter | None = None
        if skip_gates:  # M M 3 C: of the network, of the source, of the target-like latent beside the 1 of `denoise`
            same = torch.eye(num_modalities)[:, :, None, None].expand(-1, -1, 1, out_channels)
            self.gates = nn.Parameter(torch.cat((1 - same, same, -same), dim=2))
        self.noise_gain: nn.Linear | None = None
        if noise_gain:
            self.noise_gain = nn.Linear(embedding_channels, out_channels)
            zero_(self.noise_gain)
        self.mix: nn.Sequential | None = None
        if lean:
            self.mix = nn.Sequential(
                nn.Linear(embedding_channels, embedding_channels),
                nn.SiLU(),
                nn.Linear(embedding_channels, embedding_channels),
            )
        self.conv_in = conv3(in_channels, channels[0])
        self.down, self.downsample = nn.ModuleList(), nn.ModuleList()
        skips = [] if lean else [channels[0]]
        for level, (before, width) in enumerate(pairwise((channels[0], *channels))):
            if level:
                self.downsample.append(nn.Conv3d(before, before, 2, stride=2) if lean else Downsample(before))
                if not lean:
                    skips.append(before)
            widths = [before] + [width] * num_res_blocks
            self.down.append(nn.ModuleList(stage(i, o, level in attention_levels) for i, o in pairwise(widths)))
            skips += [width] if lean else [width] * num_res_blocks
        deepest = len(channels) - 1
        self.middle = nn.ModuleList([stage(channels[-1], channels[-1], deepest in attention_levels)])
        if not lean:
            self.middle.append(stage(channels[-1], channels[-1], False))
        self.up, self.upsample = nn.ModuleList(), nn.ModuleList()
        before = channels[-1]
        for level in reversed(range(len(channels))):
            stages = nn.ModuleList()
            for block in range(num_res_blocks if lean else num_res_blocks + 1):
                skip = skips.pop() if block == 0 or not lean else 0
                stages.append(stage(before + skip, channels[level], level in attention_levels))
                before = channels[level]
            self.up.append(stages)
            if level and lean:  # narrows first: the finest level is where the work is
                self.upsample.append(nn.ConvTranspose3d(before, channels[level - 1], 2, stride=2))
                before = channels[level - 1]
            elif level:
                self.upsample.append(Upsample(before))
        self.out = OutputBlock(channels[0], out_channels, norm_groups)
        zero_(self.out.conv)  # starts by predicting 0: the mean of what every objective asks for
        nn.utils.convert_conv3d_weight_memory_format(self, torch.channels_last_3d)

    def embed(self, t: Tensor, target: Tensor, source: Tensor | None) -> Tensor:
        """Return the conditioning vector (B, 4 * channels[0]) of time, target (or what is given) and pair."""
        if target.dim() == 2:  # the modalities that are there, in their order
            embedding = target.to(self.target.weight.dtype) @ self.target.weight
        else:
            embedding = self.target(target)
        if self.pair is not None:
            assert source is not None, "embed_source needs the source's modality"
            embedding = embedding + self.pair(source * self.num_modalities + target)
        embedding = embedding + self.time(time_embedding(t, self.channels[0]).to(embedding.dtype))
        return embedding if self.mix is None else self.mix(embedding)

    def forward(self, x: Tensor, t: Tensor, target: Tensor, source: Tensor | None = None) -> Tensor:
        """Return the prediction (B, out_channels, X, Y, Z).

        Sides that the strides do not divide are padded with zeros at their ends and cropped back.

        Args:
            x: (B, in_channels, X, Y, Z), the noised latent and its conditions, concatenated.
            t: (B,) times, integer or float.
            target: (B,) int64 ids of the wanted modalities, or (B, M) 1 for each modality that is given, else 0.
            source: (B,) int64 ids of the source modalities; only `embed_source` needs them.
        """
        sides = x.shape[2:]
        factor = 2 ** (len(self.channels) - 1)
        padding = [-side % factor for side in sides]
        if any(padding):
            x = F.pad(x, (0, padding[2], 0, padding[1], 0, padding[0]))
        embedding = self.embed(t, target, source)
        h = self.conv_in(x.contiguous(memory_format=torch.channels_last_3d))
        skips = [h]
        for level, stages in enumerate(_levels(self.down)):
            if level:
                h = self.downsample[level - 1](h)
                skips.append(h)
            for stage in stages:
                h = run_checkpointed(self.activation_checkpointing, stage, h, embedding)
                skips.append(h)
            if self.lean:
                skips = [*skips[:level], h]
        for stage in self.middle:
            h = run_checkpointed(self.activation_checkpointing, stage, h, embedding)
        for level, stages in enumerate(_levels(self.up)):
            for block, stage in enumerate(stages):
                if block == 0 or not self.lean:
                    h = torch.cat((h, skips.pop()), dim=1)
                h = run_checkpointed(self.activation_checkpointing, stage, h, embedding)
            if level < len(self.upsample):
                h = self.upsample[level](h)
        h = run_checkpointed(self.activation_checkpointing, self.out, h)
        if self.noise_gain is not None:
            h = h + self.noise_gain(embedding)[:, :, None, None, None] * x[:, : h.shape[1]]
        if self.gates is not None:
            assert source is not None, "skip_gates needs the source's modality"
            pair = self.gates.flatten(0, 1).index_select(0, source * self.num_modalities + target)
            gate_net, gate_source, gate_like = pair[:, :, :, None, None, None].unbind(1)
            _, z_source, z_target_like = x.chunk(3, dim=1)
            h = gate_net * h + gate_source * z_source + gate_like * z_target_like
        return h[:, :, : sides[0], : sides[1], : sides[2]]


def _levels(stages: nn.ModuleList) -> list[nn.ModuleList]:
    """Return the stages level by level, with their type."""
    return cast(list[nn.ModuleList], list(stages))
