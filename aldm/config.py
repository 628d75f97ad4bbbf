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
from functools import partial
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from aldm.config_baselines import METHODS, BaselinesConfig
from aldm.config_training import RENAMED_KEYS, choice, positive, within
from aldm.config_training import Shape as Shape
from aldm.config_training import TrainingConfig as TrainingConfig
from aldm.data.modalities import sort_modalities
from aldm.errors import UserError

Spacing = tuple[float, float, float]
T = TypeVar("T")
MAX_GRID_VOXELS = 2**31 - 1
"""Voxels of the largest volume: kernels index with 32 bits."""
MAX_CODES = 2**20
"""Codes of the largest quantiser without a codebook."""
GONE = {
    "codec.codebook_update": "ema",
    "regression_unet": None,
    "diffusion.bridge_noise": None,
    "diffusion.bridge_start_fraction": None,
}
"""Keys of earlier configurations, and the one value that is left of each: with it they are still read. None passes over
any value: nothing that is left reads it."""
RENAMED_VALUES: dict[tuple[str, str], dict[str, Any]] = {
    ("diffusion.objective", "bridge"): {"objective": "regression"},
    ("sampling.sampler", "bridge"): {"sampler": "one-step", "num_inference_steps": 1, "num_samples": 1, "eta": 0.0},
}
"""Values of earlier configurations, by their key, and what stands in that section now, whatever stood beside them. The
bridge went from the target-like latent to the target in steps, of which the first is regression and the best."""


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """How a volume becomes model input (method.md section 2)."""

    spacing_mm: Spacing = (1.0, 1.0, 1.0)
    """Voxel size of the model's grid, mm."""
    spatial_shape: Shape = (192, 192, 144)
    """Voxels of the model's grid after crop / pad."""
    intensity: str = "tissue"
    """What becomes -1 and +1: tissue (air, and twice as far as the 95th percentile of the patient's voxels), foreground
    (1.25 times as far as their 99.9th; models of before have it) or paper (0.5 and 99.5 percentile of the model's box,
    as in the supplement); values outside are clipped."""
    bias_correction: str = "none"
    """Correction of the slow shading that a coil leaves, before the percentiles: none or n4."""
    register: str = "none"
    """Registration of a subject's volumes onto its first modality: none (affines only) or rigid."""

    def __post_init__(self) -> None:
        positive(self, "spacing_mm", "spatial_shape")
        if math.prod(self.spatial_shape) > MAX_GRID_VOXELS:
            raise UserError(
                f"PreprocessConfig.spatial_shape is {self.spatial_shape}, {math.prod(self.spatial_shape):,} voxels, "
                f"wanted at most {MAX_GRID_VOXELS:,}"
            )
        choice("preprocess.intensity", self.intensity, ("tissue", "foreground", "paper"))
        choice("preprocess.bias_correction", self.bias_correction, ("none", "n4"))
        choice("preprocess.register", self.register, ("none", "rigid"))


@dataclass(frozen=True, kw_only=True)
class CodecConfig:
    """Volume to latent and back (Table A)."""

    kind: str = "vqgan"
    """vqgan (Table A), haar-vqgan (the same between orthonormal Haar transforms) or haar (lossless, no training)."""
    channels: tuple[int, ...] = (256, 512, 512)
    """Width at each level; every step between two levels halves the grid."""
    num_res_blocks: int = 2
    """Residual blocks per level of the encoder (the decoder has one more)."""
    quantizer: str = "codebook"
    """What makes the latent of vqgan and haar-vqgan discrete: codebook (learnt vectors) or fsq (each channel is rounded
    to a fixed grid)."""
    fsq_levels: tuple[int, ...] = (8, 8, 8, 8)
    """fsq: values that each latent channel can take; a number for each channel, and embedding_dim is not read."""
    embedding_dim: int = 3
    """codebook: latent channels and dimension of a code."""
    codebook_size: int = 8192
    """codebook: number of codes, K."""
    codebook_decay: float = 0.99
    """Decay of the moving averages: the codes of a codebook, and how often each code is used."""
    commitment_weight: float = 0.25
    """beta, the weight of the commitment term."""
    haar_levels: int = 1
    """Haar transforms in haar and haar-vqgan; each halves the grid and multiplies the channels by 8."""
    norm_groups: int = 32
    """Groups of the group normalisation."""
    voxel_norm: bool = False
    """Normalise each voxel over its channels instead of groups of channels over all that is in view, which is another
    amount in a crop than in a volume. Not in Table A."""

    def __post_init__(self) -> None:
        choice("codec.kind", self.kind, ("vqgan", "haar-vqgan", "haar"))
        positive(self, "channels", "num_res_blocks", "embedding_dim", "codebook_size", "haar_levels", "norm_groups")
        positive(self, "fsq_levels")
        within(self, 0, 1, "codebook_decay")
        within(self, 0, math.inf, "commitment_weight")
        choice("codec.quantizer", self.quantizer, ("codebook", "fsq"))
        within(self, 2, MAX_CODES, "fsq_levels")
        if math.prod(self.fsq_levels) > MAX_CODES:
            raise UserError(
                f"codec.fsq_levels is {self.fsq_levels}, {math.prod(self.fsq_levels):,} codes, wanted at most "
                f"{MAX_CODES:,}: how often each is used is counted"
            )

    @property
    def code_dim(self) -> int:
        """Channels of a quantised latent."""
        return len(self.fsq_levels) if self.quantizer == "fsq" else self.embedding_dim


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
    intensity_map: bool = False
    """Start from the best function of the source's intensity for each pair, fitted on the training subjects; for the
    lossless codec (haar), not with source_skip. Not in Table B."""
    voxel_norm: bool = False
    """Normalise each voxel over its channels instead of each channel over the latent: what else is in view, such as
    air or the border of a box, then has no say. Not in the paper."""

    def __post_init__(self) -> None:
        positive(self, "in_channels", "res_channels", "spade_channels", "hidden_channels", "kernel_size")
        if self.kernel_size % 2 == 0:
            raise UserError(f"ms_spade.kernel_size is {self.kernel_size}, wanted an odd number")
        if self.intensity_map and self.source_skip:
            raise UserError("ms_spade.intensity_map and ms_spade.source_skip are two starts: set one of them to false")


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
    for epsilon and v per time step, pair and channel how much of the noisy input enters it. Not in the paper."""
    norm_groups: int = 32
    """Groups of the group normalisation."""
    voxel_norm: bool = False
    """Normalise each voxel over its channels instead of groups of channels over the latent: what else is in view, such
    as air or the border of a box, then has no say. Not in the paper."""

    def __post_init__(self) -> None:
        positive(self, "channels", "num_res_blocks", "head_channels", "norm_groups")
        choice("unet.conditioning", self.conditioning, ("add", "scale-shift"))


@dataclass(frozen=True, kw_only=True)
class HaarUNetConfig:
    """A U-Net on Haar bands: the plain one beside every model, one that knows a model's errors, or a segmenter's."""

    channels: tuple[int, ...] = (32, 64, 128)
    """Width at each level; the first works at half the volume's resolution, every step to the next halves it again."""
    norm_groups: int = 8
    """Groups of the group normalisation."""

    def __post_init__(self) -> None:
        positive(self, "channels", "norm_groups")


PRECISIONS = ("fp32", "tf32", "bf16")
OBJECTIVES = ("epsilon", "v", "x0", "regression")
SCHEDULES = ("linear", "scaled-linear", "cosine", "sigmoid")
ALDM_TRAININGS = ("vqgan", "ms-spade", "diffusion")
"""Those of the method, in their order."""
SAMPLERS = ("ddpm", "ddim", "dpm-solver++", "one-step")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What is noised, how, and what the network predicts (Table C and method.md section 5)."""

    objective: str = "epsilon"
    """epsilon (the paper's), v, x0 or regression (one evaluation, at the target-like latent, without noise)."""
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
    all_targets: bool = False
    """With the objective regression, predict all modalities from a source in one evaluation, so that a step learns from
    all that the subject has. Not in the paper."""
    any_sources: bool = False
    """With all_targets, train on random subsets of a subject's modalities as sources: a translation may then start from
    several. Not in the paper."""
    residual_std: tuple[float, ...] | None = None
    """How far target and target-like latent are apart (RMS per channel, standardised); epsilon and v then start from
    what that implies (method.md section 5). [] measures it when the training begins; null leaves it out, as the paper
    does."""

    def __post_init__(self) -> None:
        choice("diffusion.objective", self.objective, OBJECTIVES)
        choice("diffusion.schedule", self.schedule, SCHEDULES)
        positive(self, "num_train_timesteps", "beta_start", "beta_end")
        within(self, 0, 1, "beta_start", "beta_end")
        if self.residual_std:
            positive(self, "residual_std")
        if self.any_sources and not self.together:
            raise UserError(
                "diffusion.any_sources needs diffusion.all_targets and the objective regression: one evaluation then "
                "predicts all that is missing"
            )
        if self.zero_terminal_snr and self.objective == "epsilon":
            raise UserError(
                "diffusion.zero_terminal_snr is singular for objective 'epsilon' (nothing of the image is left at the "
                "last step, so noise says nothing about it); use objective v or x0"
            )

    @property
    def together(self) -> bool:
        """Whether one evaluation predicts all modalities."""
        return self.all_targets and self.objective == "regression"


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the chain is integrated when the command line does not say."""

    sampler: str = "dpm-solver++"
    """ddpm, ddim or dpm-solver++ for epsilon, v, x0; one-step for x0 and regression."""
    num_inference_steps: int = 10
    """Network evaluations per sample."""
    num_samples: int = 1
    """Samples averaged into the result; above 1 they have a spread, their standard deviation. 1 for regression."""
    eta: float = 0.0
    """Stochasticity of ddim: 0 deterministic, 1 like ddpm."""

    def __post_init__(self) -> None:
        choice("sampling.sampler", self.sampler, SAMPLERS)
        positive(self, "num_inference_steps", "num_samples")
        within(self, 0, 1, "eta")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run depends on."""

    preset: str = "custom"
    """Name of the preset that this configuration started from."""
    modalities: tuple[str, ...] = ()
    """Modalities of the model, in the vocabulary's order; empty takes those of the store."""
    pair: tuple[str, str] | None = None
    """The one (source, target) that is trained; None trains every ordered pair. Comparison methods need one."""
    seed: int = 0
    """Seed of every random choice."""
    precision: str = "fp32"
    """fp32, tf32 (fp32 whose convolutions and products round their inputs to 10 bits of fraction on a GPU) or bf16
    (autocast with fp32 weights, norms and code search)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    init_from: str = ""
    """The model that the weights of the training began as, NAME@HASH: `aldm train --init-from` says it, nobody else.
    Empty where they began at random."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    ms_spade: MSSpadeConfig = field(default_factory=MSSpadeConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    haar_unet: HaarUNetConfig = field(default_factory=HaarUNetConfig)
    segmenter: HaarUNetConfig = field(default_factory=partial(HaarUNetConfig, channels=(16, 32, 64)))
    error_unet: HaarUNetConfig = field(default_factory=partial(HaarUNetConfig, channels=(16, 32, 64)))
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    train_vqgan: TrainingConfig = field(default_factory=TrainingConfig)
    train_ms_spade: TrainingConfig = field(default_factory=TrainingConfig)
    train_diffusion: TrainingConfig = field(default_factory=TrainingConfig)
    train_unet: TrainingConfig = field(default_factory=TrainingConfig)
    train_segmenter: TrainingConfig = field(default_factory=TrainingConfig)
    train_uncertainty: TrainingConfig = field(default_factory=TrainingConfig)
    baselines: BaselinesConfig = field(default_factory=BaselinesConfig)

    def __post_init__(self) -> None:
        choice("precision", self.precision, PRECISIONS)
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}, wanted 0 or more")
        if self.modalities != sort_modalities(self.modalities):
            raise UserError(f"modalities are {self.modalities}, wanted distinct and in the vocabulary's order")
        if self.pair is not None:
            if self.pair[0] == self.pair[1]:
                raise UserError(f"pair is {self.pair[0]} to {self.pair[1]}, wanted two different modalities")
            sort_modalities(self.pair)


def training_of(config: Config, stage: str) -> TrainingConfig:
    """Return the section of a training: vqgan, ms-spade, diffusion, unet, uncertainty, segmenter, or a method's."""
    owner, name = _training_place(config, stage)
    training: TrainingConfig = getattr(owner, name)
    return training


def with_training(config: Config, stage: str, **changes: Any) -> Config:
    """Return the configuration with values of a training's section changed."""
    owner, name = _training_place(config, stage)
    changed = dataclasses.replace(owner, **{name: dataclasses.replace(training_of(config, stage), **changes)})
    if isinstance(changed, Config):
        return changed
    section = {method_section(stage): changed}
    return dataclasses.replace(config, baselines=dataclasses.replace(config.baselines, **section))


def training_name(stage: str) -> str:
    """Return where a training's section stands in the configuration, for --set."""
    if stage not in METHODS:
        return f"train_{stage.replace('-', '_')}"
    return f"baselines.{method_section(stage)}.{'pretraining' if stage == 'resvit-cnn' else 'training'}"


def method_section(method: str) -> str:
    """Return the section of `baselines` that configures a comparison method."""
    return "resvit" if method == "resvit-cnn" else method.replace("-", "_")


def _training_place(config: Config, stage: str) -> tuple[Any, str]:
    """Return the section that holds a training's own, and its name there."""
    *path, name = training_name(stage).split(".")
    return (getattr(config.baselines, path[1]) if path else config), name


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
        values: its fields; a missing field keeps its default. Keys and values of before (RENAMED_KEYS, RENAMED_VALUES)
            are read as those of now.
        path: where in the whole configuration `values` stands, for messages.

    Raises:
        UserError: an unknown key (the known ones are listed), a value of a wrong type or out of range, or a key that
            is gone with a value that is gone too.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{path.rstrip('.') or cls.__name__} is {values!r}, wanted a mapping of its keys")
    values = {key: value for key, value in values.items() if not _gone(f"{path}{key}", value)}
    hints = get_type_hints(cls)
    values = _with_present_values(with_present_names(values), path)
    unknown = sorted(str(key) for key in values if key not in hints)  # YAML's keys may be numbers, dates or null
    if unknown:
        known = ", ".join(path + key for key in hints)
        raise UserError(f"unknown key {', '.join(path + key for key in unknown)}: known are {known}")
    return cls(**{key: _convert(hints[key], value, path + key) for key, value in values.items()})


def _gone(name: str, value: Any) -> bool:
    """Return whether a key is gone and may be passed over."""
    if GONE.get(name) is not None and value != GONE[name]:
        raise UserError(
            f"{name} is {value!r}, but only {GONE[name]!r} is left of it: leave the key out and train again"
        )
    return name in GONE


def with_present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a section with keys of before under their names of now, unless both are there."""
    now = {key: new for key, new in RENAMED_KEYS.items() if new not in values}
    return {now.get(key, key): value for key, value in values.items()}


def _with_present_values(values: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the values of the section at `path` with those of before as what stands for them now."""
    present = dict(values)
    for (name, before), now in RENAMED_VALUES.items():
        if values.get(name.removeprefix(path)) == before:
            present |= now
    return present


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

    Keys and values of before are read as `from_dict` reads them.

    Raises:
        UserError: not an assignment, an unknown key or a bad value.
    """
    import yaml

    values = to_dict(config)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise UserError(f"assignment {assignment!r} is not of the form key.path=value")
        *parents, last = path.strip().split(".")
        last = RENAMED_KEYS.get(last, last)
        node = values
        for parent in parents:
            node = node.get(parent, {}) if isinstance(node, dict) else {}
            if not isinstance(node, dict) or not node:
                raise UserError(f"`{assignment}`: unknown key {path!r}; top-level keys are {', '.join(values)}")
        if last not in node and path.strip() not in GONE:
            raise UserError(f"`{assignment}`: unknown key {path!r}; known there are {', '.join(node)}")
        try:
            node[last] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
            raise UserError(f"`{assignment}`: {text!r} is not YAML ({error})") from error
    return from_dict(Config, values)
