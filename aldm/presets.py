"""The named presets: functions that return a whole configuration.

brats() and ixi() are Tables A, B and C of the paper's supplement; released() is what the authors' public code trains;
brats_haar() trains the same volumes on one GPU, the project's own way; small() and tiny() train on a CPU.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aldm.config import (
    CodecConfig,
    Config,
    DiffusionConfig,
    HaarUNetConfig,
    MSSpadeConfig,
    PreprocessConfig,
    SamplingConfig,
    TrainingConfig,
    UNetConfig,
    from_dict,
    with_present_names,
)
from aldm.config_baselines import BaselinesConfig
from aldm.errors import UserError
from aldm.presets_baselines import small_baselines, tiny_baselines


def brats() -> Config:
    """BraTS 2021 as in the supplement: 192 x 192 x 144 at 1 mm, Tables A, B and C."""
    gan = TrainingConfig(
        learning_rate=1e-5,
        betas=(0.5, 0.9),
        crop=(96, 96, 96),
        flip_probability=0.1,
        adversarial_weight=0.8,
        adversarial_start_step=10_000,
        adaptive_weight=True,
    )
    return Config(
        preset="brats",
        modalities=("t1", "t1ce", "t2", "flair"),
        precision="bf16",
        preprocess=PreprocessConfig(spacing_mm=(1.0, 1.0, 1.0), spatial_shape=(192, 192, 144)),
        baselines=BaselinesConfig(slice_shape=(240, 240)),
        train_vqgan=gan,
        train_ms_spade=TrainingConfig(
            learning_rate=2e-5,
            betas=(0.5, 0.9),
            adversarial_weight=0.1,
            adversarial_start_step=10_000,
            ema_decay=0.999,
        ),
        train_diffusion=TrainingConfig(
            epochs=800, learning_rate=1e-5, optimizer="adamw", weight_decay=0.01, ema_decay=0.9999, warmup_steps=1000
        ),
        train_unet=TrainingConfig(
            learning_rate=1e-3, optimizer="adamw", ema_decay=0.999, warmup_steps=1000, decay="cosine"
        ),
        train_segmenter=TrainingConfig(
            epochs=100,
            learning_rate=1e-3,
            optimizer="adamw",
            ema_decay=0.999,
            warmup_steps=1000,
            decay="cosine",
            flip_probability=0.1,
        ),
        train_uncertainty=TrainingConfig(
            epochs=20, learning_rate=1e-3, optimizer="adamw", ema_decay=0.999, warmup_steps=1000, decay="cosine"
        ),
    )


def ixi() -> Config:
    """IXI as in the supplement, in RAS+ order: 160 x 256 x 224 at 1.2 x 0.9375 x 0.9375 mm."""
    return replace(
        brats(),
        preset="ixi",
        modalities=("t1", "t2", "pd"),
        preprocess=PreprocessConfig(spacing_mm=(1.2, 0.9375, 0.9375), spatial_shape=(160, 256, 224)),
        baselines=BaselinesConfig(slice_shape=(160, 256)),
    )


def released() -> Config:
    """The widths of the authors' public configuration; its zero codebook and adversarial weights are not inherited."""
    base = brats()
    return replace(
        base,
        preset="released",
        codec=CodecConfig(channels=(64, 64, 128), num_res_blocks=1, embedding_dim=4),
        unet=UNetConfig(channels=(128, 128, 256), num_res_blocks=1),
        train_vqgan=replace(base.train_vqgan, batch_size=4, adversarial_start_step=0),
        train_ms_spade=replace(base.train_ms_spade, batch_size=4, adversarial_start_step=0),
        train_diffusion=replace(base.train_diffusion, batch_size=4, epochs=200),
    )


def brats_haar() -> Config:
    """BraTS 2021 at 1 mm on one GPU: no codec to train, one network evaluation a volume, 1.2 TFLOP in place of 375.

    The networks of small(), wider. The latent of one Haar level is half the volume's size, where the paper's is a
    quarter: so the U-Net has a level more, and attention at the lowest alone, which is as coarse as in brats(). Widths
    are chosen by cost and learning rates by habit: neither was measured on patients.
    """
    base, like = brats(), small()
    training = TrainingConfig(
        batch_size=4,
        epochs=100,
        learning_rate=2e-4,
        optimizer="adamw",
        warmup_steps=1000,
        decay="cosine",
        ema_decay=0.999,
        same_modality_fraction=0.0,
        image_space_loss=True,
    )
    return replace(
        base,
        preset="brats-haar",
        codec=CodecConfig(kind="haar"),
        ms_spade=like.ms_spade,
        unet=replace(like.unet, channels=(48, 96, 192, 384), attention_levels=(3,)),
        diffusion=like.diffusion,
        sampling=like.sampling,
        train_ms_spade=training,
        train_diffusion=replace(training, epochs=200),
    )


def small() -> Config:
    """Trains in minutes on a CPU: the lossless Haar codec, one network evaluation a volume for all targets."""
    return Config(
        preset="small",
        precision="bf16",
        preprocess=PreprocessConfig(spacing_mm=(3.0, 3.0, 3.0), spatial_shape=(56, 72, 56)),
        codec=CodecConfig(
            kind="haar",
            channels=(16, 32, 32),
            num_res_blocks=1,
            embedding_dim=4,
            codebook_size=256,
            haar_levels=1,
            norm_groups=8,
        ),
        ms_spade=MSSpadeConfig(
            in_channels=16,
            res_channels=(16,),
            spade_channels=(16,),
            hidden_channels=8,
            kernel_size=3,
            intensity_map=True,
            voxel_norm=True,
        ),
        unet=UNetConfig(
            channels=(24, 64, 128),
            num_res_blocks=1,
            attention_levels=(),
            conditioning="scale-shift",
            lean=True,
            embed_source=True,
            skip_gates=True,
            norm_groups=8,
            voxel_norm=True,
        ),
        diffusion=DiffusionConfig(objective="regression", all_targets=True, residual_std=()),
        sampling=SamplingConfig(sampler="one-step", num_inference_steps=1),
        train_vqgan=_cpu_training(
            batch_size=2,
            crop=(32, 32, 32),
            flip_probability=0.1,
            max_steps=400,
            adversarial_weight=0.1,
            adversarial_start_step=300,
            adaptive_weight=True,
            discriminator_channels=16,
            discriminator_layers=2,
        ),
        train_ms_spade=_cpu_training(
            batch_size=2,
            learning_rate=2e-3,
            max_steps=300,
            discriminator_channels=16,
            discriminator_layers=2,
            same_modality_fraction=0.0,
            image_space_loss=True,
        ),
        train_diffusion=_cpu_training(
            batch_size=2,
            learning_rate=2e-3,
            betas=(0.9, 0.99),
            warmup_steps=50,
            max_steps=3000,
            same_modality_fraction=0.0,
            image_space_loss=True,
        ),
        train_unet=_cpu_training(batch_size=2, learning_rate=2e-3, betas=(0.9, 0.99), warmup_steps=50, max_steps=3000),
        train_segmenter=_cpu_training(learning_rate=2e-3, betas=(0.9, 0.99), max_steps=300, flip_probability=0.1),
        train_uncertainty=_cpu_training(learning_rate=2e-3, betas=(0.9, 0.99), warmup_steps=50, max_steps=600),
        baselines=small_baselines(),
    )


def tiny() -> Config:
    """Runs every line of every stage in seconds, for tests; its results mean nothing."""
    base = small()
    pairs = _cpu_training(learning_rate=2e-3, same_modality_fraction=0.1)
    quick: dict[str, Any] = {
        "max_steps": 4,
        "validate_every": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "num_validation_samples": 2,
    }
    return replace(
        base,
        preset="tiny",
        precision="fp32",
        preprocess=PreprocessConfig(spacing_mm=(8.0, 8.0, 8.0), spatial_shape=(16, 24, 16)),
        codec=replace(base.codec, kind="vqgan", channels=(8, 8, 8), codebook_size=16, norm_groups=4),
        ms_spade=replace(
            base.ms_spade,
            in_channels=8,
            res_channels=(8, 8),
            spade_channels=(8, 8),
            hidden_channels=4,
            intensity_map=False,
            voxel_norm=False,
        ),
        unet=replace(
            base.unet,
            channels=(8, 16),
            attention_levels=(1,),
            head_channels=8,
            norm_groups=4,
            lean=False,
            skip_gates=False,
            voxel_norm=False,
        ),
        haar_unet=HaarUNetConfig(channels=(8, 8), norm_groups=4),
        segmenter=HaarUNetConfig(channels=(8, 8), norm_groups=4),
        error_unet=HaarUNetConfig(channels=(8, 8), norm_groups=4),
        diffusion=DiffusionConfig(num_train_timesteps=50, objective="v"),
        sampling=SamplingConfig(num_inference_steps=3),
        train_vqgan=replace(
            base.train_vqgan, crop=(16, 16, 16), adversarial_start_step=2, discriminator_channels=4, **quick
        ),
        train_ms_spade=replace(
            pairs,
            adversarial_weight=0.001,
            adversarial_start_step=2,
            discriminator_channels=4,
            discriminator_layers=1,
            **quick,
        ),
        train_diffusion=replace(pairs, **quick),
        train_unet=replace(base.train_unet, **quick),
        train_segmenter=replace(base.train_segmenter, **quick),
        train_uncertainty=replace(base.train_uncertainty, **quick),
        baselines=tiny_baselines(base.baselines, quick),
    )


def _cpu_training(**values: object) -> TrainingConfig:
    """Defaults of a short training on a CPU."""
    base = TrainingConfig(
        batch_size=1,
        learning_rate=1e-3,
        optimizer="adamw",
        warmup_steps=20,
        decay="cosine",
        ema_decay=0.99,
        validate_every=200,
        checkpoint_every=200,
    )
    return replace(base, **values)  # type: ignore[arg-type]


PRESETS: dict[str, Callable[[], Config]] = {
    "tiny": tiny,
    "small": small,
    "brats": brats,
    "ixi": ixi,
    "released": released,
    "brats-haar": brats_haar,
}


def load_preset(name_or_file: str) -> Config:
    """Return the preset of that name, or the configuration in a YAML file.

    A file may name a preset to start from under `preset`; its other keys replace that preset's, key by key.

    Raises:
        UserError: no such preset or file, or a key or value that is not known.
    """
    import yaml

    from aldm.config import Config, to_dict

    if name_or_file in PRESETS:
        return PRESETS[name_or_file]()
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
        raise UserError(f"no preset {name_or_file!r}: wanted one of {', '.join(PRESETS)}, or an existing .yaml file")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text in UTF-8: {error}; give another file, or fix it") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, wanted a mapping of configuration keys")
    base = values.get("preset", "custom")
    start = to_dict(PRESETS[base]() if isinstance(base, str) and base in PRESETS else Config())
    try:
        return from_dict(Config, _merged(start, values))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _merged(base: dict, changes: dict) -> dict:
    """Return base with the changes laid over it, nested mappings key by key."""
    result = dict(base)
    for key, value in with_present_names(changes).items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result
