"""Translator folders with fresh weights, for tests of what reads them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aldm.checkpoint import save_checkpoint
from aldm.config import Config
from aldm.models.codecs import build_codec
from aldm.predictors import build_predictor
from aldm.presets import tiny

MODALITIES = ("t1", "t2", "pd")
PERCENTILES = {"t1": [0.0, 100.0], "t1ce": [0.0, 1.0], "t2": [10.0, 210.0], "flair": [5.0, 6.0], "pd": [0.0, 1.0]}


def save_untrained(
    folder: Path,
    *,
    kind: str = "aldm",
    modalities: tuple[str, ...] = MODALITIES,
    config: Config | None = None,
    **changes: Any,
) -> Path:
    """Write a translator folder of tiny() (or `config`) with `changes`, its weights a function of a fixed seed."""
    config = replace(config or tiny(), modalities=modalities, **changes)
    channels = build_codec(config.codec).latent_channels
    meta = {
        "latents": {"mean": [0.0] * channels, "std": [1.0] * channels},
        "data": {
            "median_percentiles": {name: PERCENTILES[name] for name in modalities},
            "backgrounds": dict.fromkeys(modalities),
        },
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = build_predictor(kind, config, meta).state_dict()
    save_checkpoint(folder, kind=kind, config=config, weights=weights, meta=meta)
    return folder
