"""RegGAN (Kong et al. 2021), mode NC+R, on axial slices: a result is registered onto its target, then compared.

The registration network takes what is misaligned in the training pairs upon itself; it is not needed afterwards.
Generator and registration play first, as one player: Adam treats every weight by itself, so this is what two optimizers
with one learning rate do.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.baselines.networks import ResNetGenerator, patch_discriminator
from aldm.baselines.pairs import PairStage, ends
from aldm.baselines.reggan_networks import RegistrationNet, flow_smoothness, random_affine, warp
from aldm.config import Config
from aldm.players import Batch, Player, StepInfo, Values

GENERATOR = "generator."


class RegisteredGenerator(nn.Module):
    """The generator, and the network that registers its result."""

    def __init__(self, generator: ResNetGenerator, registration: RegistrationNet) -> None:
        super().__init__()
        self.generator, self.registration = generator, registration

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result (B, 1, X, Y) and the flow that brings it onto the target (B, 2, X, Y)."""
        fake = self.generator(source)
        return fake, self.registration(fake, target)


class RegGANStage(PairStage):
    """20 L1 after registration + 10 smoothness of the flow + least squares of one judgement per image."""

    spatial_dims = 2

    def build(self) -> list[Player]:
        """Build generator, registration and discriminator."""
        own = self._own = self.config.baselines.reggan
        self.generator = RegisteredGenerator(
            build_network(self.config, self.name),
            RegistrationNet(2, own.registration_channels, own.registration_levels),
        )
        self.discriminator = patch_discriminator(2, 1, own.discriminator_channels, "instance")
        return [
            Player("generator", self.generator, self.training, self._generator_loss),
            Player("discriminator", self.discriminator, self.training, self._discriminator_loss),
        ]

    def translate(self, modules: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        """The generator alone."""
        module = modules["generator"]
        assert isinstance(module, RegisteredGenerator)
        result: Tensor = module.generator(x)
        return result

    def exported(self, weights: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The generator alone."""
        return {
            name.removeprefix(GENERATOR): tensor
            for name, tensor in weights["generator"].items()
            if name.startswith(GENERATOR)
        }

    def _generator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        source, target = info.shared["ends"] = self._moved(batch, info)
        fake, flow = model(source, target)
        own = self._own
        correction = F.l1_loss(warp(fake.float(), flow.float()), target)
        smoothness = flow_smoothness(flow.float())
        adversarial = (_judgement(self.discriminator, fake) - 1).square().mean()
        loss = own.correction_weight * correction + own.smoothness_weight * smoothness
        return loss + own.adversarial_weight * adversarial, {
            "correction_l1": correction.detach(),
            "smoothness": smoothness.detach(),
            "adversarial_loss": adversarial.detach(),
        }

    def _discriminator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        source, target = info.shared["ends"]
        with torch.no_grad():
            fake = self.generator.generator(source)
        loss_fake = _judgement(model, fake).square().mean()
        loss_real = (_judgement(model, target) - 1).square().mean()
        return loss_fake + loss_real, {"loss_real": loss_real.detach(), "loss_fake": loss_fake.detach()}

    def _moved(self, batch: Batch, info: StepInfo) -> tuple[Tensor, Tensor]:
        """Return the ends of the pairs, moved each by itself where they are to be misaligned, else alike."""
        source, target = ends(batch)
        level = self._own.misalignment
        if level > 0:
            return random_affine(source, info.generators, level), random_affine(target, info.generators, level)
        source, target = random_affine(torch.cat([source, target], dim=1), info.generators).split(1, dim=1)
        return source, target


Training = RegGANStage


def build_network(config: Config, name: str) -> ResNetGenerator:
    """Build what translates: the generator."""
    own = config.baselines.reggan
    generator = ResNetGenerator(2, own.channels, own.num_blocks)
    generator.activation_checkpointing = config.activation_checkpointing
    return generator


def _judgement(discriminator: nn.Module, image: Tensor) -> Tensor:
    """Return one judgement per image (B,): the mean over its map."""
    return discriminator(image).float().mean(dim=(1, 2, 3))
