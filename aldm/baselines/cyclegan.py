"""CycleGAN (Zhu et al. 2017), on axial slices, and in 3D on whole volumes (which has no canonical source).

A is the pair's source, B its target; they need not be of one subject. The generators play first, then both
discriminators, which see earlier results too.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from aldm.baselines.gan_losses import lsgan
from aldm.baselines.networks import ImagePool, ResNetGenerator, initialise_normal, patch_discriminator
from aldm.baselines.pairs import PairStage, ends, image_shape, spatial_dims_of
from aldm.config import Config
from aldm.config_baselines import CycleGANConfig
from aldm.players import Batch, Player, StepInfo, Values


class Cycle(NamedTuple):
    """What both generators make of A and B."""

    fake_a: Tensor
    fake_b: Tensor
    cycle_a: Tensor
    cycle_b: Tensor
    same_a: Tensor | None
    same_b: Tensor | None


class CycleGenerators(nn.Module):
    """A to B and B to A."""

    def __init__(self, spatial_dims: int, channels: int, num_blocks: int) -> None:
        super().__init__()
        self.to_b = ResNetGenerator(spatial_dims, channels, num_blocks)
        self.to_a = ResNetGenerator(spatial_dims, channels, num_blocks)

    def forward(self, a: Tensor, b: Tensor, with_identity: bool) -> Cycle:
        """Go there and back from both ends; with_identity also hands each generator its own target."""
        fake_b, fake_a = self.to_b(a), self.to_a(b)
        same = (self.to_a(a), self.to_b(b)) if with_identity else (None, None)
        return Cycle(fake_a, fake_b, self.to_a(fake_b), self.to_b(fake_a), *same)

    def translate(self, x: Tensor, reverse: bool) -> Tensor:
        """Return B of A, or in reverse A of B."""
        result: Tensor = (self.to_a if reverse else self.to_b)(x)
        return result


class CycleDiscriminators(nn.Module):
    """One discriminator for each end, and the results of the past that it sees."""

    def __init__(self, spatial_dims: int, channels: int, pool_size: int, sides: tuple[int, ...]) -> None:
        super().__init__()
        self.of_a = patch_discriminator(spatial_dims, 1, channels, "instance")
        self.of_b = patch_discriminator(spatial_dims, 1, channels, "instance")
        self.pool_a, self.pool_b = ImagePool(pool_size, (1, *sides)), ImagePool(pool_size, (1, *sides))

    def forward(self, a: Tensor, b: Tensor, fake_a: Tensor, fake_b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the judgements of all four."""
        return self.of_a(a), self.of_b(b), self.of_a(fake_a), self.of_b(fake_b)


class CycleGANStage(PairStage):
    """Least squares + 10 cycle L1 + 5 identity L1."""

    paired = False

    def build(self) -> list[Player]:
        """Build generators and discriminators, drawn as the authors do."""
        self._own = own = _own(self.config, self.name)
        self.spatial_dims = spatial_dims_of(self.name)
        self.generators = build_network(self.config, self.name)
        sides = image_shape(self.config, self.name, self.spatial_dims)
        self.discriminators = CycleDiscriminators(self.spatial_dims, own.discriminator_channels, own.pool_size, sides)
        for network in (self.generators, self.discriminators):
            initialise_normal(network)
        return [
            Player("generator", self.generators, self.training, self._generator_loss),
            Player("discriminator", self.discriminators, self.training, self._discriminator_loss),
        ]

    def translate(self, modules: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        """A to B."""
        generators = modules["generator"]
        assert isinstance(generators, CycleGenerators)
        return generators.translate(x, reverse=False)

    def _generator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        a, b = ends(batch)
        own = self._own
        made: Cycle = model(a, b, own.identity_weight > 0)
        info.shared["fakes"] = made.fake_a.detach(), made.fake_b.detach()
        adversarial = lsgan(self.discriminators.of_b(made.fake_b).float(), True)
        adversarial = adversarial + lsgan(self.discriminators.of_a(made.fake_a).float(), True)
        cycle = F.l1_loss(made.cycle_a.float(), a) + F.l1_loss(made.cycle_b.float(), b)
        values: Values = {"adversarial_loss": adversarial.detach(), "cycle_l1": cycle.detach()}
        loss = adversarial + own.cycle_weight * cycle
        if made.same_a is not None and made.same_b is not None:
            identity = F.l1_loss(made.same_a.float(), a) + F.l1_loss(made.same_b.float(), b)
            values["identity_l1"] = identity.detach()
            loss = loss + own.identity_weight * identity
        return loss, values

    def _discriminator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        a, b = ends(batch)
        fake_a, fake_b = info.shared["fakes"]
        generator = info.generators[0]
        fake_a = self.discriminators.pool_a(fake_a.float(), generator)
        fake_b = self.discriminators.pool_b(fake_b.float(), generator)
        real_a, real_b, fake_a, fake_b = (map_.float() for map_ in model(a, b, fake_a, fake_b))
        real = lsgan(real_a, True) + lsgan(real_b, True)
        fake = lsgan(fake_a, False) + lsgan(fake_b, False)
        return 0.5 * (real + fake), {"loss_real": real.detach(), "loss_fake": fake.detach()}


Training = CycleGANStage


def build_network(config: Config, name: str) -> CycleGenerators:
    """Build what translates: both generators."""
    own = _own(config, name)
    generators = CycleGenerators(spatial_dims_of(name), own.channels, own.num_blocks)
    for generator in (generators.to_a, generators.to_b):
        generator.activation_checkpointing = config.activation_checkpointing
    return generators


def _own(config: Config, name: str) -> CycleGANConfig:
    return config.baselines.cyclegan if name == "cyclegan" else config.baselines.cyclegan_3d
