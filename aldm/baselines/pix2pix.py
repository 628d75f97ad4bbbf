"""pix2pix (Isola et al. 2017), on axial slices, and in 3D on whole volumes (which has no canonical source)."""

from torch import Tensor

from aldm.baselines.conditional import ConditionalStage
from aldm.baselines.gan_losses import vanilla
from aldm.baselines.networks import UNetGenerator, initialise_normal, patch_discriminator
from aldm.baselines.pairs import spatial_dims_of
from aldm.config import Config
from aldm.config_baselines import Pix2PixConfig
from aldm.players import StepInfo


class Pix2PixStage(ConditionalStage):
    """U-Net against a conditional patch discriminator: binary cross-entropy + 100 L1."""

    def build_networks(self) -> None:
        """Build both networks, drawn as the authors do."""
        own = _own(self.config, self.name)
        self.spatial_dims = spatial_dims_of(self.name)
        self.generator = build_network(self.config, self.name)
        self.discriminator = patch_discriminator(self.spatial_dims, 2, own.discriminator_channels, own.norm)
        self.l1_weight = own.l1_weight
        for network in (self.generator, self.discriminator):
            initialise_normal(network)

    def adversarial(self, judgement: Tensor, is_real: bool, info: StepInfo) -> Tensor:
        """Binary cross-entropy of logits."""
        return vanilla(judgement, is_real)


Training = Pix2PixStage


def build_network(config: Config, name: str) -> UNetGenerator:
    """Build what translates: the generator."""
    own = _own(config, name)
    return UNetGenerator(spatial_dims_of(name), own.channels, own.num_levels, own.norm)


def _own(config: Config, name: str) -> Pix2PixConfig:
    return config.baselines.pix2pix if name == "pix2pix" else config.baselines.pix2pix_3d
