"""The engine of one process, and the moving average of weights, which no engine knows of."""

import contextlib
import copy
import math
import pickle
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aldm.checkpoint import load_weights
from aldm.errors import UserError
from aldm.players import Player
from aldm.precision import arithmetic
from aldm.records import check_record

_PARTS = ("weights", "optimizer")


class PlainEngine:
    """One process, one device, torch optimizers."""

    def __init__(self, device: torch.device | str = "cpu", precision: str = "fp32") -> None:
        self.device = torch.device(device)
        self.rank, self.world_size = 0, 1
        self._precision = precision
        self._optimizers: dict[str, torch.optim.Optimizer] = {}
        self._players: dict[str, Player] = {}

    def prepare(self, player: Player) -> nn.Module:
        """Move the module to the device and make its optimizer (fused)."""
        player.module.to(self.device).train()
        self._optimizers[player.name] = make_optimizer(player)
        self._players[player.name] = player
        return player.module

    def autocast(self) -> AbstractContextManager[Any]:
        """That of the precision: bf16 autocast, or nothing."""
        return arithmetic(self._precision, self.device)

    def backward(self, player: Player, loss: Tensor) -> None:
        """Plain backward."""
        loss.backward()

    def step(self, player: Player, learning_rate: float) -> Tensor:
        """Clip by the norm of the player's gradients and step.

        Raises:
            FloatingPointError: the norm is not finite; nothing was changed.
        """
        optimizer = self._optimizers[player.name]
        parameters = optimizer.param_groups[0]["params"]
        clip = player.config.gradient_clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, math.inf if clip is None else clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient of {player.name} has norm {float(norm)}")
        optimizer.param_groups[0]["lr"] = learning_rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def reduce(self, value: Tensor) -> Tensor:
        """The value itself: there is one rank."""
        return value

    def whole(self, parameters: Sequence[Tensor]) -> AbstractContextManager[Any]:
        """Nothing to do: parameters are whole."""
        return contextlib.nullcontext()

    def weights(self, player: Player) -> dict[str, Tensor]:
        """The module's own state."""
        return player.module.state_dict()

    def save(self, folder: Path) -> None:
        """Write engine.pt: weights and optimizer state of every player."""
        state = {
            name: {"weights": player.module.state_dict(), "optimizer": self._optimizers[name].state_dict()}
            for name, player in self._players.items()
        }
        torch.save(state, folder / "engine.pt")

    def load(self, folder: Path) -> None:
        """Read engine.pt, strictly.

        Raises:
            UserError: it is missing or damaged, or holds another network.
        """
        file = folder / "engine.pt"
        way_out = "resume from another checkpoint, or train again"
        try:
            state = torch.load(file, map_location=self.device, weights_only=True)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            # torch's own words advise to load it with weights_only=False, which runs whatever code the file holds
            foreign = isinstance(error, pickle.UnpicklingError)
            reason = "it is not a file of tensors" if foreign else str(error).partition("\n")[0]
            raise UserError(f"{file} cannot be read ({reason}): {way_out}") from error
        if not isinstance(state, dict):
            raise UserError(f"{file} is damaged: it holds no mapping; {way_out}")
        check_record(state, {f"{name}.{part}": dict for name in self._players for part in _PARTS}, file, way_out)
        for name, player in self._players.items():
            load_weights(player.module, state[name]["weights"], file)
            self._optimizers[name].load_state_dict(state[name]["optimizer"])


def make_optimizer(player: Player) -> torch.optim.Optimizer:
    """Return Adam or AdamW over the trainable parameters of a player's module (one fused kernel)."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[player.config.optimizer]
    return kind(
        [parameter for parameter in player.module.parameters() if parameter.requires_grad],
        lr=player.config.learning_rate,
        betas=player.config.betas,
        weight_decay=player.config.weight_decay,
        fused=True,
    )


class EMA:
    """Exponential moving average of a player's weights, in fp32, outside the engine; buffers are copied.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that a short training is not averaged with its start.
    """

    def __init__(self, module: nn.Module, decay: float, device: torch.device | str = "cpu") -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor], count: int) -> None:
        """Take in the weights after an update; `count` updates were made before."""
        decay = min(self.decay, (1 + count) / (10 + count))
        parameters = dict(self.module.named_parameters())
        averages, news = [], []
        for name, own in self.module.state_dict().items():
            if name in parameters:
                averages.append(own)
                news.append(weights[name].to(own))
            else:
                own.copy_(weights[name])
        torch._foreach_lerp_(averages, news, 1 - decay)
