"""The comparison methods by name: the training of each, and the network that translates."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from aldm.baselines import cyclegan, eagan, nicegan, pix2pix, reggan, resvit
from aldm.baselines.pairs import PairStage
from aldm.config import Config
from aldm.config_baselines import METHODS
from aldm.data.store import VolumeStore

_STAGES: dict[str, type[PairStage]] = {
    "pix2pix": pix2pix.Pix2PixStage,
    "pix2pix-3d": pix2pix.Pix2PixStage,
    "cyclegan": cyclegan.CycleGANStage,
    "cyclegan-3d": cyclegan.CycleGANStage,
    "nicegan": nicegan.NiceGANStage,
    "reggan": reggan.RegGANStage,
    "resvit-cnn": resvit.ResViTStage,
    "resvit": resvit.ResViTStage,
    "dea-gan": eagan.EaGANStage,
    "gea-gan": eagan.EaGANStage,
}
_FILES: dict[type[PairStage], ModuleType] = {
    pix2pix.Pix2PixStage: pix2pix,
    cyclegan.CycleGANStage: cyclegan,
    nicegan.NiceGANStage: nicegan,
    reggan.RegGANStage: reggan,
    resvit.ResViTStage: resvit,
    eagan.EaGANStage: eagan,
}
assert _STAGES.keys() == METHODS.keys()


def method_stage(config: Config, store: VolumeStore, name: str) -> PairStage:
    """Build the training of a method.

    Raises:
        UserError: as PairStage.
    """
    return _STAGES[name](config, store, name)


def method_network(config: Config, name: str) -> nn.Module:
    """Build the network of a method that translates, with fresh weights; see `translate`."""
    network: nn.Module = _FILES[_STAGES[name]].build_network(config, name)
    return network


def translate(network: nn.Module, x: Tensor, reverse: bool) -> Tensor:
    """Run a network that `method_network` built on (B, 1, X, Y[, Z]): source to target, or the other way round."""
    both_ways: Any = getattr(network, "translate", None)
    result: Tensor = network(x) if both_ways is None else both_ways(x, reverse)
    return result
