"""How long a training is and how its learning rate runs: steps, epochs, a time budget, warm-up and decay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aldm.config import TrainingConfig

MEASURED_STEPS = 10
"""Steps after which the speed of a training counts as known, and between two looks at it."""
RECENT_STEPS = 50
"""Steps that tell how fast the next ones will be."""


def planned_steps(config: TrainingConfig, num_samples: int) -> int:
    """Return the steps that epochs and max_steps ask for (max_steps wins)."""
    return config.max_steps or math.ceil(config.epochs * num_samples / config.batch_size)


def learning_rate(config: TrainingConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of a step (0 is the first): linear warm-up, then constant, cosine or linear to 0.

    A warm-up longer than a tenth of the training is cut to it.
    """
    warmup = min(config.warmup_steps, num_steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.decay == "constant":
        return config.learning_rate
    fraction = (step - warmup) / max(num_steps - warmup, 1)
    if config.decay == "linear":
        left = (1 - fraction) / max(1 - config.decay_start, 1e-9)
        return config.learning_rate * max(min(left, 1.0), 0.0)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))


@dataclass
class Pace:
    """The number of steps of a training, fitted to its time budget where there is one.

    With `max_minutes`, the number of steps is estimated from the mean duration of the last RECENT_STEPS steps, first
    after MEASURED_STEPS of them (the very first is slower and does not count) and then again every MEASURED_STEPS
    steps and after every validation; validations and checkpoints are counted at what they last took. When a player
    starts, the durations before it no longer count. A player's start moves with the first estimate: one that was to
    start after three quarters of the planned steps starts after three quarters of those that fit.

    Attributes:
        config: length, time budget and the steps between validations.
        num_steps: steps of the whole training; learning rates end there.
        starts: start step of every player, in the players' order.
        elapsed_s: time used so far, earlier starts of a resumed run included.
    """

    config: TrainingConfig
    num_steps: int
    starts: list[int]
    elapsed_s: float = 0.0
    _planned: int = 0
    _fitted: bool = False
    _durations: list[float] = field(default_factory=list)
    _warm: bool = False
    _validation_s: float | None = None
    _checkpoint_s: float = 0.0

    @classmethod
    def plan(cls, config: TrainingConfig, num_samples: int, starts: Sequence[int]) -> "Pace":
        """Return the pace of a training of `num_samples` samples an epoch, nothing measured yet."""
        steps = planned_steps(config, num_samples)
        return cls(config, steps, list(starts), _planned=steps, _fitted=config.max_minutes is None)

    def step_done(self, step: int, seconds: float) -> None:
        """Take note of a finished step (`step` steps are now done)."""
        self.elapsed_s += seconds
        if self._warm:
            self._durations = [*self._durations[-(RECENT_STEPS - 1) :], seconds]
        self._warm = True
        if step in self.starts:
            self._durations = []
        if step % MEASURED_STEPS == 0 and not self.wants_validation_time:
            self._fit(step)

    def validation_done(self, step: int, seconds: float) -> None:
        """Take note of a validation after `step` steps."""
        self.elapsed_s += seconds
        self._validation_s = seconds
        self._fit(step)

    def checkpoint_done(self, seconds: float) -> None:
        """Take note of a checkpoint."""
        self.elapsed_s += seconds
        self._checkpoint_s = seconds

    @property
    def wants_validation_time(self) -> bool:
        """Whether a validation has to be timed before the number of steps can be fitted."""
        return self.config.max_minutes is not None and self._validation_s is None

    def _fit(self, step: int) -> None:
        """Set the number of steps to what the rest of the time budget allows."""
        if self.config.max_minutes is None or len(self._durations) < MEASURED_STEPS - 1:
            return
        typical_s = sum(self._durations) / len(self._durations)
        validation_s = self._validation_s or 0.0
        extra_s = validation_s / self.config.validate_every + self._checkpoint_s / self.config.checkpoint_every
        left_s = self.config.max_minutes * 60 - self.elapsed_s - validation_s - self._checkpoint_s
        fitting = step + max(int(left_s / (typical_s + extra_s)), 0)
        self.num_steps = max(min(fitting, self._planned), 1)
        if not self._fitted:
            self._fitted = True
            self.starts = [round(start * self.num_steps / self._planned) for start in self.starts]

    def state(self) -> dict[str, Any]:
        """Return what a resumed training needs, as plain numbers."""
        return {
            "length": self._length(),
            "num_steps": self.num_steps,
            "starts": self.starts,
            "elapsed_s": self.elapsed_s,
            "fitted": self._fitted,
            "validation_s": self._validation_s,
            "checkpoint_s": self._checkpoint_s,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state; a length that was changed since (more steps, another time budget) is kept."""
        self.elapsed_s = state["elapsed_s"]
        self._validation_s, self._checkpoint_s = state["validation_s"], state["checkpoint_s"]
        self.starts = list(state["starts"])
        if state["length"] == self._length():
            self.num_steps, self._fitted = state["num_steps"], state["fitted"]

    def _length(self) -> list[float | None]:
        return [self.config.epochs, self.config.max_steps, self.config.max_minutes, self._planned]
