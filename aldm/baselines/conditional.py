"""What pix2pix, ResViT and Ea-GAN share: one generator, and a discriminator that sees the source beside the image.

A step runs the discriminator first, then the generator, both on the same generated image: each turn makes it again,
because a turn's graph belongs to its own engine. Tensors are as in pairs.py.
"""

import contextlib
from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aldm.baselines.pairs import PairStage, ends, restart_layers
from aldm.players import Batch, Player, StepInfo, Values


class ConditionalStage(PairStage):
    """Discriminator: (real + fake) / 2. Generator: adversarial + l1_weight L1 + what a method adds."""

    generator: nn.Module
    discriminator: nn.Module
    l1_weight: float

    def build(self) -> list[Player]:
        """Build generator and discriminator."""
        self.build_networks()
        return [
            Player("discriminator", self.discriminator, self.training, self._discriminator_loss),
            Player("generator", self.generator, self.training, self._generator_loss),
        ]

    def build_networks(self) -> None:
        """Set generator, discriminator and l1_weight."""
        raise NotImplementedError

    def adversarial(self, judgement: Tensor, is_real: bool, info: StepInfo) -> Tensor:
        """Return the adversarial loss of a map of judgements."""
        raise NotImplementedError

    def judged(self, source: Tensor, image: Tensor) -> Tensor:
        """Return what the discriminator sees: source and image, channel by channel."""
        return torch.cat([source, image], dim=1)

    def added_loss(self, fake: Tensor, target: Tensor, info: StepInfo) -> tuple[Tensor | float, Values]:
        """Return what the method adds to the generator's loss."""
        return 0.0, {}

    def translate(self, modules: Mapping[str, nn.Module], x: Tensor) -> Tensor:
        """The generator alone."""
        result: Tensor = modules["generator"](x)
        return result

    def _discriminator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        source, target = ends(batch)
        with torch.no_grad(), _without_statistics(self.generator):
            restart_layers()
            fake = self.generator(source)
        real = self.adversarial(model(self.judged(source, target)).float(), True, info)
        fake = self.adversarial(model(self.judged(source, fake)).float(), False, info)
        return 0.5 * (real + fake), {"loss_real": real.detach(), "loss_fake": fake.detach()}

    def _generator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        source, target = ends(batch)
        restart_layers()
        fake = model(source)
        adversarial = self.adversarial(self.discriminator(self.judged(source, fake)).float(), True, info)
        l1 = F.l1_loss(fake.float(), target)
        added, values = self.added_loss(fake.float(), target, info)
        loss = adversarial + self.l1_weight * l1 + added
        return loss, {"adversarial_loss": adversarial.detach(), "l1": l1.detach(), **values}


@contextlib.contextmanager
def _without_statistics(network: nn.Module) -> Iterator[None]:
    """Let batch norms leave their running statistics as they are: they count an image once, in the generator's turn."""
    norms = [part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
