"""A translator folder, written by `aldm export`, is read: the trained model and what it has to know to translate."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from aldm.calibration import Calibration
from aldm.checkpoint import CONFIG, Checkpoint, load_checkpoint, load_weights
from aldm.config import Config, SamplingConfig
from aldm.denoising import check_regression_weights
from aldm.errors import UserError
from aldm.likeness import Statistics
from aldm.precision import usable_precision
from aldm.predictors import KINDS, UNCERTAINTY, MemoryLimit, Predictor, build_predictor, check_limit
from aldm.records import Kinds

META: Mapping[str, Kinds] = {"aldm": {"latents.mean": list, "latents.std": list, "data": dict}, "unet": {"data": dict}}
"""What the meta of a translator folder of each kind holds, to be read here."""


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """What a translator folder holds."""

    predictor: Predictor
    config: Config
    kind: str
    """aldm, unet or a comparison method."""
    median_percentiles: dict[str, tuple[float, float]]
    """Modality -> the training set's median lower and upper percentile, in its own units."""
    backgrounds: dict[str, float | None]
    """Modality -> background of the training set's masked volumes, None where they are not masked."""
    model_hash: str
    """Identifies the weights."""
    statistics: Statistics | None
    """What tells how unlike the training volumes another one is; None in models of before that was kept."""
    calibration: Calibration | None
    """Of the intervals around its translations; None where its errors were not learnt, or those of other sampling."""


def load_model(
    folder: str | Path,
    device: torch.device | str,
    *,
    sampling: SamplingConfig | None,
    precision: str | None,
    max_memory_gb: float | None,
    scratch_dir: Path | None,
) -> TrainedModel:
    """Read a translator folder; arguments and errors as `Translator.load`."""
    checkpoint = load_checkpoint(folder, *KINDS)
    config, kind = checkpoint.config, checkpoint.kind
    if sampling is not None:
        config = replace(config, sampling=sampling)
    if precision is not None:
        config = replace(config, precision=precision)
    config = replace(config, precision=usable_precision(config.precision, device))
    checkpoint.check_meta(META["aldm" if kind == "aldm" else "unet"])
    if kind == "unet":
        check_regression_weights(checkpoint.weights, "unet.", checkpoint.path)
    predictor = build_predictor(kind, config, checkpoint.meta)
    load_weights(predictor, checkpoint.weights, folder)
    percentiles = _percentiles(checkpoint)
    checkpoint.check_meta({"data.backgrounds": dict})
    backgrounds = checkpoint.meta["data"]["backgrounds"]
    model = TrainedModel(
        predictor,
        config,
        kind,
        percentiles,
        backgrounds,
        checkpoint.hash,
        _statistics(checkpoint),
        _calibration(checkpoint, config),
    )
    del checkpoint  # its copy of the weights
    if max_memory_gb is not None:
        if torch.device(device).type != "cpu":
            raise UserError("`max_memory_gb` bounds the memory of a CPU: leave it out on a GPU, or give `device` cpu")
        predictor.limit = MemoryLimit(int(max_memory_gb * 1e9), scratch_dir)
        check_limit(predictor, predictor.limit)
    return model


def _statistics(checkpoint: Checkpoint) -> Statistics | None:
    """Return the statistics of the training volumes, where the folder has them."""
    if checkpoint.meta["data"].get("likeness") is None:
        return None
    checkpoint.check_meta({"data.likeness": dict})
    return Statistics.from_dict(checkpoint.meta["data"]["likeness"], checkpoint.path / CONFIG)


def _calibration(checkpoint: Checkpoint, used: Config) -> Calibration | None:
    """Return how the model's intervals are scaled, where the folder says so and it is sampled as the folder says."""
    if UNCERTAINTY not in checkpoint.meta:
        return None
    checkpoint.check_meta({UNCERTAINTY: dict})
    modalities, file = checkpoint.config.modalities, checkpoint.path / CONFIG
    calibration = Calibration.from_dict(checkpoint.meta[UNCERTAINTY], modalities, file)
    has_sampler = checkpoint.kind == "aldm"
    return None if has_sampler and used.sampling != checkpoint.config.sampling else calibration


def _percentiles(checkpoint: Checkpoint) -> dict[str, tuple[float, float]]:
    """Return the training set's median percentiles of every modality of the model."""
    found = {}
    for name in checkpoint.config.modalities:
        key = f"data.median_percentiles.{name}"
        checkpoint.check_meta({key: list})
        pair = checkpoint.meta["data"]["median_percentiles"][name]
        if len(pair) != 2 or not all(isinstance(value, int | float) for value in pair):
            raise UserError(f"{checkpoint.path} is damaged: {key} is {pair!r:.60}, wanted two numbers; export it again")
        found[name] = float(pair[0]), float(pair[1])
    return found
