"""What a training consists of: players, the stage that names them, and the engine that steps them.

Each player is a module, an optimizer and a loss; a step runs the players in the stage's order. `training.fit` knows
only what stands here. One player: MS-SPADE, diffusion, regression. Two: the VQGAN and its discriminator. More:
CycleGAN.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aldm.config import Config, TrainingConfig
from aldm.data.dataset import Samples

Batch = dict[str, Any]
Values = dict[str, float | Tensor]
Panel = dict[str, Tensor]
"""Volumes (X, Y, Z) to look at beside each other, by name."""


@dataclass
class StepInfo:
    """What a loss may know about the step it is computed in.

    Attributes:
        step: number of the step, 0 first.
        generators: one CPU generator per sample of the batch; every random choice of the losses comes from them.
        playing: names of the players that play in this step.
        shared: what a player hands on to the players after it in the same step, such as a generated volume (detached).
    """

    step: int
    generators: list[torch.Generator]
    playing: frozenset[str]
    shared: dict[str, Any] = field(default_factory=dict)


Loss = Callable[[nn.Module, Batch, StepInfo], tuple[Tensor, Values]]


@dataclass
class Player:
    """A module, how it is optimised, and its loss.

    The loss is called as loss(model, batch, info): `model` is this player's own module as its engine wants it called.
    Other players' modules are called directly, never through an engine: their parameters are frozen meanwhile.

    Attributes:
        name: unique within the stage; stands in metric and file names.
        module: what is trained.
        config: learning rate, optimizer, gradient clipping and EMA of this player.
        loss: returns a scalar and the values to log (tensors are not read until they are logged).
        start_step: the player is left out of earlier steps.
    """

    name: str
    module: nn.Module
    config: TrainingConfig
    loss: Loss
    start_step: int = 0


@dataclass(frozen=True)
class Export:
    """What of a stage goes into a checkpoint: see aldm/checkpoint.py."""

    kind: str
    config: Config
    weights: Mapping[str, Tensor]
    meta: Mapping[str, Any]


class Engine(Protocol):
    """How gradients become optimizer steps: in one process (PlainEngine) or over many."""

    device: torch.device
    rank: int
    world_size: int

    def prepare(self, player: Player) -> nn.Module:
        """Place the player's module, make its optimizer, and return the module that its own loss is to call."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that losses and validation are computed in (bf16 or nothing)."""

    def backward(self, player: Player, loss: Tensor) -> None:
        """Add the loss's gradient to the player's."""

    def step(self, player: Player, learning_rate: float) -> Tensor:
        """Clip, step, clear the gradients; return their norm before clipping. FloatingPointError before a bad step."""

    def reduce(self, value: Tensor) -> Tensor:
        """Return the mean of a tensor over all ranks."""

    def whole(self, parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Return a context in which these parameters are whole, where the engine shards them."""

    def weights(self, player: Player) -> dict[str, Tensor]:
        """Return the player's whole weights (every rank calls it)."""

    def save(self, folder: Path) -> None:
        """Write this rank's share of weights and optimizer states."""

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote."""


class Stage(Protocol):
    """What one training optimises.

    Attributes:
        name: the stage's name.
        config: resolved: what the data were made with is filled in.
        players: in the order in which a step runs them.
        score: name of the validation value that chooses the best checkpoint.
        higher_is_better: the direction of that value.
    """

    name: str
    config: Config
    players: list[Player]
    score: str
    higher_is_better: bool

    def connect(self, engine: Engine) -> None:
        """Move frozen modules to the engine's device and take what the losses need of it."""

    def samples(self, split: str) -> Samples:
        """Return the samples of a split."""

    def validate(self, modules: Mapping[str, nn.Module], batch: Batch, info: StepInfo) -> Values:
        """Return means over a validation batch; `modules` hold the averaged weights where they are kept.

        What is worth a picture goes to info.shared["panel"], a Panel.
        """

    def export(self, weights: Mapping[str, Mapping[str, Tensor]]) -> Export:
        """Return what a checkpoint holds, given the weights of every player (averaged where an average is kept)."""


@dataclass(frozen=True)
class Snapshot:
    """The state of a training between two steps, handed to `on_checkpoint` on every rank.

    Attributes:
        step: steps done.
        is_best: whether the last validation was the best so far.
        values: the last validation.
        write: writes this rank's share of all that resuming needs into a folder; rank 0 adds the checkpoint itself.
    """

    step: int
    is_best: bool
    values: dict[str, float]
    write: Callable[[Path], None]


@dataclass(frozen=True)
class FitResult:
    """How a training ended: steps done, the last validation, and the best score so far (None without validation)."""

    step: int
    values: dict[str, float]
    best: float | None


@contextlib.contextmanager
def only_trainable(player: Player, players: Sequence[Player]) -> Iterator[None]:
    """Freeze the parameters of all other players inside the block; what was frozen before stays so.

    Without this, a loss that runs through another player's module would leave gradients there.
    """
    others = [
        parameter
        for other in players
        if other is not player
        for parameter in other.module.parameters()
        if parameter.requires_grad
    ]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
