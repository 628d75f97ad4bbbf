"""Stages of the comparison methods at tiny widths, and turns of their players; for the tests of the methods."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from aldm.config import Config, with_training
from aldm.data.dataset import collate
from aldm.players import Player, StepInfo, only_trainable
from aldm.presets import tiny

PAIR = ("t1", "t2")


def config_of(method: str, **changes: Any) -> Config:
    return with_training(replace(tiny(), pair=PAIR), method, **changes)


def batch_of(stage: Any, number: int = 2) -> dict[str, Any]:
    samples = stage.samples("train")
    generator = torch.Generator().manual_seed(1)
    return collate([samples.sample(index, generator) for index in range(number)])


def info_of(stage: Any, number: int = 2, step: int = 0) -> StepInfo:
    generators = [torch.Generator().manual_seed(index) for index in range(number)]
    return StepInfo(step, generators, frozenset(player.name for player in stage.players))


def play(stage: Any, player: Player, batch: dict[str, Any], info: StepInfo) -> None:
    with only_trainable(player, stage.players):
        loss, _ = player.loss(player.module, batch, info)
        loss.backward()


def gradient(module: nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)
