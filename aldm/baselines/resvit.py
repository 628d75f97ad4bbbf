"""ResViT (Dalmaz et al. 2022), one to one, on axial slices. Its two trainings are two methods here.

resvit-cnn trains the network without its transformer. resvit goes on from there with the transformer in it, whose own
start is a file of ImageNet weights, or random where none is given; its discriminator starts from scratch.
"""

from pathlib import Path

from torch import Tensor

from aldm.baselines.conditional import ConditionalStage
from aldm.baselines.gan_losses import lsgan
from aldm.baselines.networks import initialise_normal, patch_discriminator
from aldm.baselines.pairs import slice_shape
from aldm.baselines.resvit_networks import ResViTGenerator, load_pretrained, load_vit_weights
from aldm.checkpoint import Checkpoint
from aldm.config import Config
from aldm.errors import UserError
from aldm.players import StepInfo

FIRST, SECOND = "resvit-cnn", "resvit"


class ResViTStage(ConditionalStage):
    """Least squares + 100 L1."""

    spatial_dims = 2

    def build_networks(self) -> None:
        """Build both networks: the generator with torch's own initial weights, as the authors do."""
        own = self.config.baselines.resvit
        self.generator: ResViTGenerator = build_network(self.config, self.name)
        self.discriminator = patch_discriminator(2, 2, own.discriminator_channels)
        initialise_normal(self.discriminator)
        self.l1_weight = own.l1_weight

    def adversarial(self, judgement: Tensor, is_real: bool, info: StepInfo) -> Tensor:
        """Least squares."""
        return lsgan(judgement, is_real)

    def start_from(self, pretrained: Checkpoint, vit_weights: Path | None) -> None:
        """Take the weights that the second training starts from.

        Args:
            pretrained: of resvit-cnn.
            vit_weights: ImageNet weights of the transformer; None leaves it random.

        Raises:
            UserError: the checkpoint is of another pair or data set, or weights do not fit.
        """
        if pretrained.config.pair != self.pair or pretrained.config.preprocess != self.config.preprocess:
            raise UserError(
                f"{pretrained.path} was trained for {pretrained.config.pair} with {pretrained.config.preprocess}, this "
                f"is for {self.pair} with {self.config.preprocess}: train {FIRST} on the same pair and data"
            )
        load_pretrained(self.generator, pretrained.weights)
        if vit_weights is not None:
            load_vit_weights(self.generator, vit_weights)


Training = ResViTStage


def build_network(config: Config, name: str) -> ResViTGenerator:
    """Build what translates: the generator."""
    own = config.baselines.resvit
    return ResViTGenerator(
        slice_shape(config),
        own.channels,
        own.num_blocks,
        own.hidden_channels,
        own.num_heads,
        own.mlp_channels,
        own.num_layers,
        with_transformer=name == SECOND,
    )
