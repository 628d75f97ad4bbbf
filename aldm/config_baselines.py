"""The configuration of the comparison methods: their networks, the weights of their losses, and their trainings.

The defaults are the methods' own (the authors' papers and published settings); presets.py scales them to a CPU. The
supplement fixes what they are trained on: 2D methods on axial slices in batches of 32, 3D methods on whole volumes.
"""

import math
from dataclasses import dataclass, field

from aldm.config_training import TrainingConfig, choice, positive, within

NORMS = ("batch", "instance")
METHODS = {
    "pix2pix": "pix2pix on axial slices",
    "pix2pix-3d": "pix2pix on volumes",
    "cyclegan": "CycleGAN on axial slices, unpaired",
    "cyclegan-3d": "CycleGAN on volumes, unpaired",
    "nicegan": "NICE-GAN (light) on axial slices, unpaired",
    "reggan": "RegGAN on axial slices",
    "resvit-cnn": "the first training of ResViT: its network without the transformer, on axial slices",
    "resvit": "the second training of ResViT, from resvit-cnn on",
    "dea-gan": "dEa-GAN on volumes",
    "gea-gan": "gEa-GAN on volumes",
}
"""The comparison methods, and what each is."""
VOLUME_METHODS = ("pix2pix-3d", "cyclegan-3d", "dea-gan", "gea-gan")
"""Those that see volumes; the others see axial slices."""
BOTH_WAYS = ("cyclegan", "cyclegan-3d", "nicegan")
"""Those that learn the way back too, and need no pairs."""


def _training(batch_size: int, epochs: int, **values: object) -> TrainingConfig:
    """Return what nearly all of these trainings share: Adam, a rate that falls to 0 in the second half, no clipping."""
    defaults = {"learning_rate": 2e-4, "betas": (0.5, 0.999), "decay": "linear", "gradient_clip": None}
    return TrainingConfig(batch_size=batch_size, epochs=epochs, **{**defaults, **values})  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Pix2PixConfig:
    """pix2pix (Isola et al. 2017): a U-Net against a conditional patch discriminator."""

    channels: int = 64
    """Width of the generator's first level."""
    num_levels: int = 8
    """Stride-2 levels of the generator; sides are padded to multiples of 2 to this power."""
    norm: str = "batch"
    """batch or instance."""
    discriminator_channels: int = 64
    """Width of the discriminator's first layer."""
    l1_weight: float = 100.0
    """Weight of the L1 term."""
    training: TrainingConfig = field(default_factory=lambda: _training(32, 200))

    def __post_init__(self) -> None:
        choice("norm", self.norm, NORMS)
        positive(self, "channels", "num_levels", "discriminator_channels")
        within(self, 0, math.inf, "l1_weight")


@dataclass(frozen=True, kw_only=True)
class CycleGANConfig:
    """CycleGAN (Zhu et al. 2017): two residual generators and two patch discriminators, unpaired."""

    channels: int = 64
    """Width of a generator's first layer."""
    num_blocks: int = 9
    """Residual blocks of a generator."""
    discriminator_channels: int = 64
    """Width of a discriminator's first layer."""
    cycle_weight: float = 10.0
    """Weight of the way there and back."""
    identity_weight: float = 5.0
    """Weight of leaving a volume alone that is of the target modality already."""
    pool_size: int = 50
    """Earlier results that the discriminators also see; 0 keeps none."""
    training: TrainingConfig = field(default_factory=lambda: _training(32, 200))

    def __post_init__(self) -> None:
        positive(self, "channels", "num_blocks", "discriminator_channels")
        within(self, 0, math.inf, "cycle_weight", "identity_weight", "pool_size")


@dataclass(frozen=True, kw_only=True)
class NiceGANConfig:
    """NICE-GAN (Chen et al. 2020), the light one: the discriminators are the encoders too, unpaired."""

    channels: int = 64
    """Width of a generator's last layer."""
    num_blocks: int = 6
    """Residual blocks of a generator."""
    discriminator_channels: int = 64
    """Width of a discriminator's first layer."""
    cycle_weight: float = 10.0
    """Weight of the way there and back."""
    reconstruction_weight: float = 10.0
    """Weight of an image decoded back into its own modality."""
    training: TrainingConfig = field(
        default_factory=lambda: _training(32, 200, max_steps=300_000, learning_rate=1e-4, weight_decay=1e-4)
    )
    """Its length is published in steps, so the epochs do not count."""

    def __post_init__(self) -> None:
        positive(self, "channels", "num_blocks", "discriminator_channels")
        within(self, 0, math.inf, "cycle_weight", "reconstruction_weight")


@dataclass(frozen=True, kw_only=True)
class RegGANConfig:
    """RegGAN (Kong et al. 2021), mode NC+R: one direction, with a registration of the result onto the target."""

    channels: int = 64
    """Width of the generator's first layer."""
    num_blocks: int = 9
    """Residual blocks of the generator."""
    discriminator_channels: int = 64
    """Width of the discriminator's first layer."""
    registration_channels: int = 32
    """Width of the registration network's first level."""
    registration_levels: int = 6
    """Levels of the registration network: 7 as published need sides of 256, 6 run at 240 x 240 and 160 x 256."""
    correction_weight: float = 20.0
    """Weight of the L1 term after registration."""
    smoothness_weight: float = 10.0
    """Weight of the displacements' squared differences."""
    adversarial_weight: float = 1.0
    """Weight of the adversarial term."""
    misalignment: float = 0.0
    """Source and target of a training pair are rotated by up to so many degrees (shifted by twice as many percent),
    each by itself; 0 moves both alike, by at most 1 degree and 2 percent."""
    training: TrainingConfig = field(default_factory=lambda: _training(32, 80, learning_rate=1e-4, decay="constant"))

    def __post_init__(self) -> None:
        positive(self, "channels", "num_blocks", "discriminator_channels", "registration_channels")
        positive(self, "registration_levels")
        within(self, 0, math.inf, "correction_weight", "smoothness_weight", "adversarial_weight")
        within(self, 0, 45, "misalignment")


@dataclass(frozen=True, kw_only=True)
class ResViTConfig:
    """ResViT (Dalmaz et al. 2022), one to one: residual blocks, two of them with a shared vision transformer.

    Two trainings: `resvit-cnn` trains it without the transformer, `resvit` goes on from there.
    """

    channels: int = 64
    """Width of the generator's first layer."""
    num_blocks: int = 9
    """Residual blocks; the first and the sixth have the transformer."""
    hidden_channels: int = 768
    """Width of the transformer."""
    num_layers: int = 12
    """Layers of the transformer."""
    num_heads: int = 12
    """Heads of its attention."""
    mlp_channels: int = 3072
    """Width inside its perceptrons."""
    discriminator_channels: int = 64
    """Width of the discriminator's first layer."""
    l1_weight: float = 100.0
    """Weight of the L1 term."""
    pretraining: TrainingConfig = field(default_factory=lambda: _training(32, 100))
    """Of resvit-cnn."""
    training: TrainingConfig = field(default_factory=lambda: _training(32, 50, learning_rate=1e-3))
    """Of resvit."""

    def __post_init__(self) -> None:
        positive(self, "channels", "num_blocks", "hidden_channels", "num_layers", "num_heads", "mlp_channels")
        positive(self, "discriminator_channels")
        within(self, 0, math.inf, "l1_weight")


@dataclass(frozen=True, kw_only=True)
class EaGANConfig:
    """Ea-GAN (Yu et al. 2019): a 3D U-Net that is also held to the target's edges."""

    channels: int = 64
    """Width of the generator's first level."""
    num_levels: int = 5
    """Stride-2 levels of the generator; 7 as published, for crops of 128^3."""
    norm: str = "batch"
    """batch (published, at batch size 6) or instance."""
    discriminator_channels: int = 64
    """Width of the discriminator's first layer."""
    l1_weight: float = 300.0
    """Weight of the L1 term."""
    edge_weight: float = 100.0
    """Weight of the L1 term between edge maps once it is at its full."""
    edge_warmup_epochs: int = 20
    """Epochs over which the edge term rises from 0."""
    training: TrainingConfig = field(default_factory=lambda: _training(1, 150, decay_start=2 / 3))

    def __post_init__(self) -> None:
        choice("norm", self.norm, NORMS)
        positive(self, "channels", "num_levels", "discriminator_channels", "edge_warmup_epochs")
        within(self, 0, math.inf, "l1_weight", "edge_weight")


def _pix2pix_3d() -> Pix2PixConfig:
    return Pix2PixConfig(num_levels=5, norm="instance", training=_training(1, 200))


def _cyclegan_3d() -> CycleGANConfig:
    return CycleGANConfig(training=_training(1, 200))


@dataclass(frozen=True, kw_only=True)
class BaselinesConfig:
    """The comparison methods. Each is trained for the one pair of `pair`."""

    slice_shape: tuple[int, int] | None = None
    """Voxels X, Y of the axial slices that 2D methods see; None takes those of the model's grid."""
    pix2pix: Pix2PixConfig = field(default_factory=Pix2PixConfig)
    pix2pix_3d: Pix2PixConfig = field(default_factory=_pix2pix_3d)
    cyclegan: CycleGANConfig = field(default_factory=CycleGANConfig)
    cyclegan_3d: CycleGANConfig = field(default_factory=_cyclegan_3d)
    nicegan: NiceGANConfig = field(default_factory=NiceGANConfig)
    reggan: RegGANConfig = field(default_factory=RegGANConfig)
    resvit: ResViTConfig = field(default_factory=ResViTConfig)
    dea_gan: EaGANConfig = field(default_factory=EaGANConfig)
    gea_gan: EaGANConfig = field(default_factory=EaGANConfig)

    def __post_init__(self) -> None:
        positive(self, "slice_shape")
