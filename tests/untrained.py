"""Translator folders with fresh weights, for tests of what reads them."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aldm.checkpoint import save_checkpoint
from aldm.config import Config
from aldm.likeness import GROUPS, NUM_FEATURES, Statistics
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
    limits: Mapping[str, float] | None = None,
    **changes: Any,
) -> Path:
    """Write a translator folder of tiny() (or `config`) with `changes`, its weights a function of a fixed seed.

    `limits` are of its likeness: modality -> distance from features of 0 that counts as 1; None: it does not measure.
    """
    config = replace(config or tiny(), modalities=modalities, **changes)
    channels = build_codec(config.codec).latent_channels
    meta = {
        "modalities": list(modalities),
        "training": [],
        "latents": {"mean": [0.0] * channels, "std": [1.0] * channels},
        "data": {
            "layout": "ixi",
            "fingerprint": "0" * 64,
            "num_subjects": {"train": 1},
            "median_percentiles": {name: PERCENTILES[name] for name in modalities},
            "backgrounds": dict.fromkeys(modalities),
        },
    }
    if limits is not None:
        meta["data"]["likeness"] = statistics(limits).to_dict()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = build_predictor(kind, config, meta).state_dict()
    save_checkpoint(folder, kind=kind, config=config, weights=weights, meta=meta)
    return folder


def statistics(limits: Mapping[str, float]) -> Statistics:
    """Return statistics of features with mean 0 and deviation 1 that do not go together."""
    return Statistics(
        means={name: np.zeros(NUM_FEATURES) for name in limits},
        stds={name: np.ones(NUM_FEATURES) for name in limits},
        limits={name: np.full(len(GROUPS), limit) for name, limit in limits.items()},
        correlations=[np.eye(len(names)) for names in GROUPS.values()],
    )
