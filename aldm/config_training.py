"""The configuration of one training, and the checks that every section of the configuration shares."""

import math
from dataclasses import dataclass

from aldm.errors import UserError

Shape = tuple[int, int, int]
RENAMED_KEYS = {"perceptual_weight": "edge_weight"}
"""Keys as files of before have them, and their names now."""


def choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of those allowed."""
    if value not in allowed:
        raise UserError(f"{name} is {value!r}, wanted one of: {', '.join(allowed)}")


def positive(owner: object, *names: str) -> None:
    """Refuse fields (or members of them) that are 0 or less; None passes."""
    for name in names:
        value = getattr(owner, name)
        values = value if isinstance(value, tuple) else (value,)
        if any(v is not None and not 0 < v < math.inf for v in values):
            raise UserError(f"{type(owner).__name__}.{name} is {value!r}, wanted a finite value above 0")
        if not values:
            raise UserError(f"{type(owner).__name__}.{name} is empty, wanted at least one value")


def within(owner: object, low: float, high: float, *names: str) -> None:
    """Refuse fields (or members of them) outside low to high; None passes."""
    for name in names:
        value = getattr(owner, name)
        values = value if isinstance(value, tuple) else (value,)
        if any(v is not None and not (low <= v <= high and math.isfinite(v)) for v in values):
            wanted = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise UserError(f"{type(owner).__name__}.{name} is {value!r}, wanted {wanted}")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training."""

    batch_size: int = 1
    """Samples per optimizer step, over all workers."""
    epochs: int = 500
    """Passes over the training split."""
    max_steps: int | None = None
    """Stop after this many steps (wins over epochs)."""
    max_minutes: float | None = None
    """Fit the steps to this much time, from the speed of the first ones (never above max_steps or epochs)."""
    learning_rate: float = 1e-5
    """Peak learning rate."""
    optimizer: str = "adam"
    """adam or adamw."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moving-average decays."""
    weight_decay: float = 0.0
    """Weight decay."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    decay: str = "constant"
    """Learning rate after the warm-up: constant, cosine (to 0) or linear (to 0 from decay_start on)."""
    decay_start: float = 0.5
    """Share of the training after which decay linear begins."""
    gradient_clip: float | None = 1.0
    """Largest gradient norm of a player; larger ones are scaled down. None clips nothing."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that validation and export use; 0 keeps none."""
    crop: Shape | None = None
    """Random crop of a training volume; None takes the whole volume. Stage 1, the regression U-Net and 3D methods."""
    flip_probability: float = 0.0
    """Probability of a flip along each axis."""
    adversarial_weight: float = 0.0
    """Weight of the adversarial term of the generator; 0 trains without a discriminator."""
    adversarial_start_step: int = 0
    """Step at which the discriminator and the adversarial term start."""
    adaptive_weight: bool = False
    """Scale the adversarial term by the ratio of gradient norms at the last layer (Esser et al. 2021, eq. 7)."""
    edge_weight: float = 0.0
    """Weight of the edge term of stage 1: L1 of spatial differences, where other VQGANs have a perceptual distance."""
    image_space_loss: bool = False
    """Weigh each latent channel's error by its share of the image's. Stages 2 and 3, isometric codecs (haar) only."""
    discriminator_channels: int = 64
    """Width of the first layer of the discriminator."""
    discriminator_layers: int = 3
    """Stride-2 layers of the discriminator."""
    same_modality_fraction: float | None = None
    """Share of training pairs with source = target; None leaves the 1 / M of pairs drawn evenly. Stages 2 and 3."""
    validate_every: int = 1000
    """Steps between two validations."""
    num_validation_samples: int = 16
    """Validation samples looked at (spread over the split)."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        choice("optimizer", self.optimizer, ("adam", "adamw"))
        choice("decay", self.decay, ("constant", "cosine", "linear"))
        positive(self, "batch_size", "epochs", "learning_rate", "crop", "max_steps", "max_minutes", "log_every")
        positive(self, "validate_every", "num_validation_samples", "checkpoint_every", "gradient_clip")
        positive(self, "discriminator_channels", "discriminator_layers")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"TrainingConfig.betas is {self.betas!r}, wanted 0 or more and below 1")
        within(self, 0, 1, "decay_start", "ema_decay", "flip_probability", "same_modality_fraction")
        within(self, 0, math.inf, "weight_decay", "warmup_steps", "adversarial_weight", "adversarial_start_step")
        within(self, 0, math.inf, "edge_weight")
