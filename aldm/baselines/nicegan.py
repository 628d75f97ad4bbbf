"""NICE-GAN (Chen et al. 2020), the light version, on axial slices: a discriminator's first layers encode its domain.

A is the pair's source, B its target; they need not be of one subject. The discriminators play first; an encoder learns
from its own discriminator's turn alone.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.baselines.gan_losses import lsgan
from aldm.baselines.networks import crop_sides, pad_sides
from aldm.baselines.nicegan_networks import SHORTEST, NiceDiscriminator, NiceGenerator
from aldm.baselines.pairs import PairStage, ends
from aldm.config import Config
from aldm.players import Batch, Player, StepInfo, Values

Heads = tuple[Tensor, Tensor, Tensor]
"""Local map, global map and attention logit."""


class Made(NamedTuple):
    """What both generators make of A and B."""

    fake_a: Tensor
    fake_b: Tensor
    cycle_a: Tensor
    cycle_b: Tensor
    same_a: Tensor
    same_b: Tensor


class NiceDiscriminators(nn.Module):
    """One discriminator, encoder included, for each end."""

    def __init__(self, channels: int, with_heads: bool = True) -> None:
        super().__init__()
        self.of_a = NiceDiscriminator(channels, with_heads)
        self.of_b = NiceDiscriminator(channels, with_heads)

    def forward(self, a: Tensor, b: Tensor, fake_a: Tensor, fake_b: Tensor) -> tuple[Heads, Heads, Heads, Heads]:
        """Return the judgements of all four."""
        return self.of_a(a)[:3], self.of_b(b)[:3], self.of_a(fake_a)[:3], self.of_b(fake_b)[:3]


class NiceGenerators(nn.Module):
    """Latent of B to A and latent of A to B."""

    def __init__(self, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.to_a = NiceGenerator(channels, num_blocks)
        self.to_b = NiceGenerator(channels, num_blocks)

    def forward(self, a: Tensor, b: Tensor, encoders: NiceDiscriminators) -> Made:
        """Go there and back from both ends, and decode each end into itself."""
        z_a, z_b = encoders.of_a.encode(a), encoders.of_b.encode(b)
        fake_b, fake_a = self.to_b(z_a), self.to_a(z_b)
        cycle_a, cycle_b = self.to_a(encoders.of_b.encode(fake_b)), self.to_b(encoders.of_a.encode(fake_a))
        return Made(fake_a, fake_b, cycle_a, cycle_b, self.to_a(z_a), self.to_b(z_b))


class NiceTranslator(nn.Module):
    """What is kept of a training: both encoders and both generators."""

    def __init__(self, discriminators: NiceDiscriminators, generators: NiceGenerators) -> None:
        super().__init__()
        self.discriminators, self.generators = discriminators, generators

    def translate(self, x: Tensor, reverse: bool) -> Tensor:
        """Return B of A, or in reverse A of B, on any sides."""
        padded = _padded(x)
        if reverse:
            result = self.generators.to_a(self.discriminators.of_b.encode(padded))
        else:
            result = self.generators.to_b(self.discriminators.of_a.encode(padded))
        return crop_sides(result, x.shape[2:])


class NiceGANStage(PairStage):
    """Least squares over three heads + 10 cycle L1 + 10 reconstruction L1."""

    spatial_dims = 2
    paired = False

    def build(self) -> list[Player]:
        """Build both discriminators and both generators; torch's own initial weights, as the authors do."""
        own = self._own = self.config.baselines.nicegan
        self.discriminators = NiceDiscriminators(own.discriminator_channels)
        self.generators = NiceGenerators(own.channels, own.num_blocks)
        return [
            Player("discriminator", self.discriminators, self.training, self._discriminator_loss),
            Player("generator", self.generators, self.training, self._generator_loss),
        ]

    def translate(self, modules: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        """A to B."""
        discriminators, generators = modules["discriminator"], modules["generator"]
        assert isinstance(discriminators, NiceDiscriminators)
        assert isinstance(generators, NiceGenerators)
        return NiceTranslator(discriminators, generators).translate(x, reverse=False)

    def exported(self, weights: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """Both encoders and both generators; what only judges is left out."""
        kept = set(build_network(self.config, self.name).state_dict())
        named = {
            f"{part}.{name}": tensor
            for part, player in (("discriminators", "discriminator"), ("generators", "generator"))
            for name, tensor in weights[player].items()
        }
        return {name: tensor for name, tensor in named.items() if name in kept}

    def _discriminator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        a, b = (_padded(end) for end in ends(batch))
        with torch.no_grad():
            fake_b = self.generators.to_b(self.discriminators.of_a.encode(a))
            fake_a = self.generators.to_a(self.discriminators.of_b.encode(b))
        real_a, real_b, fake_a, fake_b = model(a, b, fake_a, fake_b)
        real = _adversarial(real_a, True) + _adversarial(real_b, True)
        fake = _adversarial(fake_a, False) + _adversarial(fake_b, False)
        return real + fake, {"loss_real": real.detach(), "loss_fake": fake.detach()}

    def _generator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        a, b = (_padded(end) for end in ends(batch))
        made: Made = model(a, b, self.discriminators)
        adversarial = _adversarial(self.discriminators.of_a(made.fake_a)[:3], True)
        adversarial = adversarial + _adversarial(self.discriminators.of_b(made.fake_b)[:3], True)
        cycle = F.l1_loss(made.cycle_a.float(), a) + F.l1_loss(made.cycle_b.float(), b)
        same = F.l1_loss(made.same_a.float(), a) + F.l1_loss(made.same_b.float(), b)
        loss = adversarial + self._own.cycle_weight * cycle + self._own.reconstruction_weight * same
        return loss, {
            "adversarial_loss": adversarial.detach(),
            "cycle_l1": cycle.detach(),
            "reconstruction_l1": same.detach(),
        }


Training = NiceGANStage


def build_network(config: Config, name: str) -> NiceTranslator:
    """Build what translates: both encoders and both generators."""
    own = config.baselines.nicegan
    discriminators = NiceDiscriminators(own.discriminator_channels, with_heads=False)
    return NiceTranslator(discriminators, NiceGenerators(own.channels, own.num_blocks))


def _adversarial(heads: Heads, is_real: bool) -> Tensor:
    return torch.stack([lsgan(head.float(), is_real) for head in heads]).sum()


def _padded(x: Tensor) -> Tensor:
    """Pad with background to sides that the encoder's strides divide and the global judgement needs."""
    return pad_sides(x, 4, at_least=SHORTEST)
