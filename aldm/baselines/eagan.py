"""Ea-GAN (Yu et al. 2019): a 3D U-Net held to the target's edges, in the generator's loss (gEa-GAN and dEa-GAN) and as
a channel that the discriminator sees (dEa-GAN).

What differs from the published code, which its authors' options break: no image pool stands between generator and
discriminator (theirs cuts the adversarial gradient), and smoothed labels are redrawn at every use.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aldm.baselines.conditional import ConditionalStage
from aldm.baselines.edges import sobel_edges
from aldm.baselines.gan_losses import lsgan
from aldm.baselines.networks import UNetGenerator, initialise_normal, patch_discriminator
from aldm.config import Config
from aldm.config_baselines import EaGANConfig
from aldm.players import StepInfo, Values


class EaGANStage(ConditionalStage):
    """Least squares + 300 L1 + up to 100 L1 between edge maps."""

    spatial_dims = 3

    def build_networks(self) -> None:
        """Build both networks, drawn as the authors do."""
        own = _own(self.config, self.name)
        self.sees_edges = self.name == "dea-gan"
        self.l1_weight, self._own = own.l1_weight, own
        self.generator = build_network(self.config, self.name)
        self.discriminator = patch_discriminator(
            3, 3 if self.sees_edges else 2, own.discriminator_channels, own.norm, padding=2, all_biased=True
        )
        for network in (self.generator, self.discriminator):
            initialise_normal(network, zero_bias=False)

    def judged(self, source: Tensor, image: Tensor) -> Tensor:
        """Source, image, and dEa-GAN's edges of the image (with their graph)."""
        seen = [source, image]
        if self.sees_edges:
            seen.append(sobel_edges(image).to(image.dtype))
        return torch.cat(seen, dim=1)

    def adversarial(self, judgement: Tensor, is_real: bool, info: StepInfo) -> Tensor:
        """Least squares against smoothed labels, one a sample: 0.7 to 1.2 for real, 0 to 0.3 for fake."""
        drawn = torch.stack([torch.rand((), generator=generator) for generator in info.generators])
        drawn = drawn.to(judgement.device).view(-1, *[1] * (judgement.ndim - 1))
        return lsgan(judgement, 0.7 + 0.5 * drawn if is_real else 0.3 * drawn)

    def added_loss(self, fake: Tensor, target: Tensor, info: StepInfo) -> tuple[Tensor | float, Values]:
        """L1 between edge maps, its weight rising epoch by epoch."""
        edges = F.l1_loss(sobel_edges(fake), sobel_edges(target))
        weight = self.edge_weight(info.step)
        return weight * edges, {"edge_l1": edges.detach(), "edge_weight": weight}

    def edge_weight(self, step: int) -> float:
        """Return the weight of the edge term at a step: 0 in the first epoch, the whole after edge_warmup_epochs."""
        epoch = step * self.training.batch_size // self.epoch_length
        return self._own.edge_weight * min(epoch / self._own.edge_warmup_epochs, 1.0)


Training = EaGANStage


def build_network(config: Config, name: str) -> UNetGenerator:
    """Build what translates: the generator."""
    own = _own(config, name)
    return UNetGenerator(3, own.channels, own.num_levels, own.norm, all_biased=True)


def _own(config: Config, name: str) -> EaGANConfig:
    return config.baselines.dea_gan if name == "dea-gan" else config.baselines.gea_gan
