"""Configuration: frozen keyword-only dataclasses, strict conversion from and to dictionaries, and the `--set` override.

A run is a named preset (presets.py) plus `dataclasses.replace`. Shapes are X, Y, Z of an RAS+ volume.
"""

import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from aldm.data.modalities import sort_modalities
from aldm.errors import UserError

Shape = tuple[int, int, int]
Spacing = tuple[float, float, float]
T = TypeVar("T")
MAX_GRID_VOXELS = 2**31 - 1
"""Voxels of the largest volume: kernels index with 32 bits."""


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} is {value!r}, wanted one of: {', '.join(allowed)}")


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        values = value if isinstance(value, tuple) else (value,)
        if any(v is not None and not 0 < v < math.inf for v in values):
            raise UserError(f"{type(owner).__name__}.{name} is {value!r}, wanted a finite value above 0")
        if not values:
            raise UserError(f"{type(owner).__name__}.{name} is empty, wanted at least one value")


def _within(owner: object, low: float, high: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        values = value if isinstance(value, tuple) else (value,)
        if any(v is not None and not (low <= v <= high and math.isfinite(v)) for v in values):
            wanted = f"{low:g} or more" if high == math.inf else f"{low:g} to {high:g}"
            raise UserError(f"{type(owner).__name__}.{name} is {value!r}, wanted {wanted}")


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How a volume becomes model input (method.md section 2)."""

    spacing_mm: Spacing = (1.0, 1.0, 1.0)
    """Voxel size of the model's grid, mm."""
    spatial_shape: Shape = (192, 192, 144)
    """Voxels of the model's grid after crop / pad."""
    lower_percentile: float = 0.5
    """Percentile of the whole volume that becomes -1."""
    upper_percentile: float = 99.5
    """Percentile of the whole volume that becomes +1; values outside are clipped."""
    register: str = "none"
    """Registration of a subject's volumes onto its first modality: none (affines only) or rigid."""

    def __post_init__(self) -> None:
        _positive(self, "spacing_mm", "spatial_shape")
        if math.prod(self.spatial_shape) > MAX_GRID_VOXELS:
            raise UserError(
                f"PreprocessConfig.spatial_shape is {self.spatial_shape}, {math.prod(self.spatial_shape):,} voxels, "
                f"wanted at most {MAX_GRID_VOXELS:,}"
            )
        _choice("preprocess.register", self.register, ("none", "rigid"))
        if not 0 <= self.lower_percentile < self.upper_percentile <= 100:
            raise UserError(
                f"preprocess percentiles are {self.lower_percentile} and {self.upper_percentile}, "
                "wanted 0 <= lower < upper <= 100"
            )


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Volume to latent and back (Table A)."""

    kind: str = "vqgan"
    """vqgan (Table A), haar-vqgan (the same between orthonormal Haar transforms) or haar (lossless, no training)."""
    channels: tuple[int, ...] = (256, 512, 512)
    """Width at each level; every step between two levels halves the grid."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder (the decoder has one more)."""
    embedding_dim: int = 3
    """Latent channels and dimension of a code."""
    codebook_size: int = 8192
    """Number of codes, K."""
    codebook_update: str = "ema"
    """How the codebook learns: ema (exponential moving average) or gradient."""
    codebook_decay: float = 0.99
    """Decay of the codebook's moving averages."""
    commitment_weight: float = 0.25
    """beta, the weight of the commitment term."""
    haar_levels: int = 1
    """Haar transforms in haar and haar-vqgan; each halves the grid and multiplies the channels by 8."""
    norm_groups: int = 32
    """Groups of the group normalisation."""

    def __post_init__(self) -> None:
        _choice("codec.kind", self.kind, ("vqgan", "haar-vqgan", "haar"))
        _choice("codec.codebook_update", self.codebook_update, ("ema", "gradient"))
        _positive(self, "channels", "num_res_blocks", "embedding_dim", "codebook_size", "haar_levels", "norm_groups")
        _within(self, 0, 1, "codebook_decay")
        _within(self, 0, math.inf, "commitment_weight")


@dataclass(frozen=True, kw_only=True)
class MSSpadeConfig:
    """Source latent to target-like latent (Table B)."""

    in_channels: int = 128
    """Width after the first 7^3 convolution."""
    res_channels: tuple[int, ...] = (256, 256)
    """Output widths of the residual blocks."""
    spade_channels: tuple[int, ...] = (256, 256, 256, 128)
    """Output widths of the SPADE residual blocks."""
    hidden_channels: int = 64
    """Width inside each SPADE layer."""
    kernel_size: int = 7
    """Kernel of the first and the last convolution."""
    source_skip: bool = False
    """Add the source latent through a learned gate per (source, target, channel); not in Table B."""

    def __post_init__(self) -> None:
        _positive(self, "in_channels", "res_channels", "spade_channels", "hidden_channels", "kernel_size")
        if self.kernel_size % 2 == 0:
            raise UserError(f"ms_spade.kernel_size is {self.kernel_size}, wanted an odd number")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The denoiser (Table C)."""

    channels: tuple[int, ...] = (128, 256, 512)
    """Width at each level; every step between two levels halves the grid."""
    num_res_blocks: int = 2
    """Residual blocks per level going down (going up has one more)."""
    attention_levels: tuple[int, ...] = (1, 2)
    """Levels with self-attention; level i works at 1 / 2^i of the latent grid."""
    head_channels: int = 32
    """Channels of one attention head."""
    conditioning: str = "add"
    """How the embedding reaches each residual block: add (the paper's) or scale-shift (modulates its features)."""
    lean: bool = False
    """One skip a level, as many blocks up as down, one in the middle, 2^3 convolutions between: half the operations."""
    embed_source: bool = False
    """Add a learned embedding of the (source, target) pair too; the paper embeds the target alone."""
    skip_gates: bool = False
    """Learn per pair and channel how much of the network, the source and the target-like latent enters the prediction;
    x0, bridge and regression only (the others ignore it). Not in the paper."""
    norm_groups: int = 32
    """Groups of the group normalisation."""

    def __post_init__(self) -> None:
        _positive(self, "channels", "num_res_blocks", "head_channels", "norm_groups")
        _choice("unet.conditioning", self.conditioning, ("add", "scale-shift"))


OBJECTIVES = ("epsilon", "v", "x0", "bridge", "regression")
SCHEDULES = ("linear", "scaled-linear", "cosine", "sigmoid")
SAMPLERS = ("ddpm", "ddim", "dpm-solver++", "unipc", "bridge", "one-step")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What is noised, how, and what the network predicts (Table C and method.md section 5)."""

    objective: str = "epsilon"
    """epsilon (the paper's), v, x0, bridge (the chain starts at the target-like latent) or regression (one step)."""
    schedule: str = "scaled-linear"
    """Noise schedule: linear, scaled-linear (the paper's), cosine or sigmoid."""
    num_train_timesteps: int = 1000
    """Length of the training chain."""
    beta_start: float = 0.0015
    """First beta of linear and scaled-linear."""
    beta_end: float = 0.0195
    """Last beta of linear and scaled-linear."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last step is pure noise; v and x0 only."""
    bridge_noise: float = 0.1
    """Standard deviation of the bridge's noise at its widest point, in standardised latent units."""
    bridge_start_fraction: float = 0.5
    """Share of the bridge's training samples at its start, where a one-step sampler evaluates; the rest is uniform."""

    def __post_init__(self) -> None:
        _choice("diffusion.objective", self.objective, OBJECTIVES)
        _choice("diffusion.schedule", self.schedule, SCHEDULES)
        _positive(self, "num_train_timesteps", "beta_start", "beta_end")
        _within(self, 0, 1, "beta_start", "beta_end", "bridge_start_fraction")
        _within(self, 0, math.inf, "bridge_noise")
        if self.zero_terminal_snr and self.objective == "epsilon":
            raise UserError(
                "diffusion.zero_terminal_snr is singular for objective 'epsilon' (nothing of the image is left at the "
                "last step, so noise says nothing about it); use objective v or x0"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the chain is integrated when the command line does not say."""

    sampler: str = "dpm-solver++"
    """ddpm, ddim, dpm-solver++ or unipc for epsilon, v, x0; bridge for bridge; one-step for all but epsilon and v."""
    num_inference_steps: int = 10
    """Network evaluations per sample."""
    num_samples: int = 1
    """Samples averaged into the result; above 1 their standard deviation is the uncertainty."""
    eta: float = 0.0
    """Stochasticity of ddim and bridge: 0 deterministic, 1 like ddpm or the bridge's posterior."""

    def __post_init__(self) -> None:
        _choice("sampling.sampler", self.sampler, SAMPLERS)
        _positive(self, "num_inference_steps", "num_samples")
        _within(self, 0, 1, "eta")


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
    """Learning rate after the warm-up: constant or cosine (to 0)."""
    gradient_clip: float = 1.0
    """Largest gradient norm of a player; larger ones are scaled down."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that validation and export use; 0 keeps none."""
    crop: Shape | None = None
    """Random crop of a training volume; None takes the whole volume. Stage 1 and the regression U-Net only."""
    flip_probability: float = 0.0
    """Probability of a flip along each axis."""
    adversarial_weight: float = 0.0
    """Weight of the adversarial term of the generator; 0 trains without a discriminator."""
    adversarial_start_step: int = 0
    """Step at which the discriminator and the adversarial term start."""
    adaptive_weight: bool = False
    """Scale the adversarial term by the ratio of gradient norms at the last layer (Esser et al. 2021, eq. 7)."""
    perceptual_weight: float = 0.0
    """Weight of the perceptual term of stage 1."""
    image_space_loss: bool = False
    """Weigh each latent channel's error by its share of the image's. Stages 2 and 3, isometric codecs (haar) only."""
    discriminator_channels: int = 64
    """Width of the first layer of the discriminator."""
    discriminator_layers: int = 3
    """Stride-2 layers of the discriminator."""
    same_modality_fraction: float | None = None
    """Share of training pairs with source = target; None leaves the 1 / M that pairs drawn evenly have."""
    validate_every: int = 1000
    """Steps between two validations."""
    num_validation_samples: int = 16
    """Validation samples looked at (spread over the split)."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        _choice("optimizer", self.optimizer, ("adam", "adamw"))
        _choice("decay", self.decay, ("constant", "cosine"))
        _positive(self, "batch_size", "epochs", "learning_rate", "crop", "max_steps", "max_minutes", "log_every")
        _positive(self, "validate_every", "num_validation_samples", "checkpoint_every", "gradient_clip")
        _positive(self, "discriminator_channels", "discriminator_layers")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"TrainingConfig.betas is {self.betas!r}, wanted 0 or more and below 1")
        _within(self, 0, 1, "ema_decay", "flip_probability", "same_modality_fraction")
        _within(self, 0, math.inf, "weight_decay", "warmup_steps", "adversarial_weight", "adversarial_start_step")
        _within(self, 0, math.inf, "perceptual_weight")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run depends on."""

    preset: str = "custom"
    """Name of the preset that this configuration started from."""
    modalities: tuple[str, ...] = ()
    """Modalities of the model, in the vocabulary's order; empty takes those of the store."""
    seed: int = 0
    """Seed of every random choice."""
    precision: str = "fp32"
    """fp32, or bf16: autocast with fp32 weights, norms and code search."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    ms_spade: MSSpadeConfig = field(default_factory=MSSpadeConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    regression_unet: UNetConfig = field(default_factory=UNetConfig)
    """The plain 3D regression U-Net that stands beside every model (no attention, no time)."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    train_vqgan: TrainingConfig = field(default_factory=TrainingConfig)
    train_ms_spade: TrainingConfig = field(default_factory=TrainingConfig)
    train_diffusion: TrainingConfig = field(default_factory=TrainingConfig)
    train_unet: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        _choice("precision", self.precision, ("fp32", "bf16"))
        if self.modalities != sort_modalities(self.modalities):
            raise UserError(f"modalities are {self.modalities}, wanted distinct and in the vocabulary's order")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries, lists, strings and numbers (JSON and YAML take it as it is)."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    return plain(dataclasses.asdict(config))


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Build a configuration from a dictionary, strictly.

    Args:
        cls: the dataclass to build.
        values: its fields; a missing field keeps its default.
        path: where in the whole configuration `values` stands, for messages.

    Raises:
        UserError: an unknown key (the known ones are listed), a value of a wrong type or out of range.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path.rstrip('.') or cls.__name__} is {values!r}, wanted a mapping of its keys")
    hints = get_type_hints(cls)
    unknown = sorted(str(key) for key in values if key not in hints)  # YAML's keys may be numbers, dates or null
    if unknown:
        known = ", ".join(path + key for key in hints)
        raise UserError(f"unknown key {', '.join(path + key for key in unknown)}: known are {known}")
    return cls(**{key: _convert(hints[key], value, path + key) for key, value in values.items()})


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Convert a plain value to the field's type, or say what was wanted."""
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, name + ".")
    if get_origin(hint) in (types.UnionType, typing.Union):
        options = [option for option in get_args(hint) if option is not type(None)]
        return None if value is None else _convert(options[0], value, name)
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"{name} is {value!r}, wanted a list")
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            raise UserError(f"{name} is {list(value)!r}, wanted {len(inner)} values, got {len(value)}")
        return tuple(_convert(inner[0], item, name) for item in value)
    if hint is float:
        return _convert_float(value, name)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{name} is {value!r} ({type(value).__name__}), wanted {hint.__name__}")
    return value


def _convert_float(value: Any, name: str) -> float:
    number = None
    if not isinstance(value, bool) and isinstance(value, int | float | str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-4 as a string
            number = float(value)
    if number is None or not math.isfinite(number):
        raise UserError(f"{name} is {value!r} ({type(value).__name__}), wanted a finite number")
    return number


def override(config: Config, assignments: Sequence[str]) -> Config:
    """Apply `key.path=value` assignments; values are YAML (`[64, 64, 64]`, `true`, `1e-4`, `null`).

    Raises:
        UserError: not an assignment, an unknown key or a bad value.
    """
    import yaml

    values = to_dict(config)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise UserError(f"--set {assignment!r} is not of the form key.path=value")
        *parents, last = path.strip().split(".")
        node = values
        for parent in parents:
            node = node.get(parent, {}) if isinstance(node, dict) else {}
            if not isinstance(node, dict) or not node:
                raise UserError(f"--set {assignment}: unknown key {path!r}; top-level keys are {', '.join(values)}")
        if last not in node:
            raise UserError(f"--set {assignment}: unknown key {path!r}; known there are {', '.join(node)}")
        try:
            node[last] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
            raise UserError(f"--set {assignment}: {text!r} is not YAML ({error})") from error
    return from_dict(Config, values)
