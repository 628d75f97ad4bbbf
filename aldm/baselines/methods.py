"""The comparison methods by name: the training of each, and the network that translates."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from aldm.baselines import cyclegan, eagan, nicegan, pix2pix, reggan, resvit
from aldm.baselines.pairs import PairStage
from aldm.config import Config
from aldm.data.store import VolumeStore

_FILES: dict[str, ModuleType] = {
    "pix2pix": pix2pix,
    "pix2pix-3d": pix2pix,
    "cyclegan": cyclegan,
    "cyclegan-3d": cyclegan,
    "nicegan": nicegan,
    "reggan": reggan,
    "resvit-cnn": resvit,
    "resvit": resvit,
    "dea-gan": eagan,
    "gea-gan": eagan,
}
"""The file of each method: `Training` is its PairStage, build_network(config, name) builds what translates."""


def method_stage(config: Config, store: VolumeStore, name: str) -> PairStage:
    """Build the training of a method.

    Raises:
        UserError: as PairStage.
    """
    stage: PairStage = _FILES[name].Training(config, store, name)
    return stage


def method_network(config: Config, name: str) -> nn.Module:
    """Build the network of a method that translates, with fresh weights; see `translate`."""
    network: nn.Module = _FILES[name].build_network(config, name)
    return network


def translate(network: nn.Module, x: Tensor, reverse: bool) -> Tensor:
    """Run a network that `method_network` built on (B, 1, X, Y[, Z]): source to target, or the other way round."""
    both_ways: Any = getattr(network, "translate", None)
    result: Tensor = network(x) if both_ways is None else both_ways(x, reverse)
    return result
