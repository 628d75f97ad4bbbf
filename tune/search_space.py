"""What a sweep may draw: noise schedules and objectives to train, samplers and numbers of evaluations to measure.

The space is written once, as a function of a `Draw`; a seeded random draw and an Optuna trial are two of them. It is
conditional: a field is drawn only where it means something, so every point builds.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from aldm.config import OBJECTIVES, SAMPLERS, SCHEDULES, Config
from aldm.diffusion import VARIANCE_PRESERVING
from aldm.errors import UserError
from aldm.sampling import allowed_samplers

Point = dict[str, Any]
"""Field of DiffusionConfig -> drawn value; fields that mean nothing for the objective are left out."""

BETA_START, BETA_END = (1e-4, 3e-3), (5e-3, 4e-2)
"""Ranges of the betas for a chain of 1000 steps; a shorter chain needs proportionally larger ones."""
LARGEST_BETA = 0.95
SCORED_EVALUATIONS = 5
"""A trial is scored while it trains by at most this many network evaluations: few favour PSNR, epsilon needs some."""


class Draw(Protocol):
    """Where values come from; a name stands for the same options or range in every draw of a sweep."""

    def choice(self, name: str, options: Sequence[Any]) -> Any:
        """Return one of the options."""

    def log_uniform(self, name: str, low: float, high: float) -> float:
        """Return a value of the range, its logarithm uniform."""


@dataclass(frozen=True)
class Way:
    """One way to integrate the chain of a trained model."""

    sampler: str
    network_evaluations: int


@dataclass(frozen=True, kw_only=True)
class Space:
    """The space of one sweep.

    Attributes:
        objectives: those to draw from.
        samplers: those to measure.
        evaluations: numbers of network evaluations to measure, rising.
        num_train_timesteps: length of the chain, the same for all points.

    Raises:
        UserError: a name or number that does not fit, or an objective that none of the samplers can integrate.
    """

    objectives: tuple[str, ...]
    samplers: tuple[str, ...]
    evaluations: tuple[int, ...]
    num_train_timesteps: int

    def __post_init__(self) -> None:
        for flag, names, known in (
            ("--objectives", self.objectives, OBJECTIVES),
            ("--samplers", self.samplers, SAMPLERS),
        ):
            unknown = [name for name in names if name not in known]
            if unknown or len(set(names)) < len(names):
                what = f"{', '.join(unknown)} unknown" if unknown else "a name twice"
                raise UserError(f"{flag} {' '.join(names)}: {what}, wanted some of {', '.join(known)}")
        for number in self.evaluations:
            if not 1 <= number <= self.num_train_timesteps:
                raise UserError(
                    f"--steps {number} is out of range: wanted 1 to diffusion.num_train_timesteps, "
                    f"{self.num_train_timesteps}"
                )
        for objective in self.objectives:
            if not self.ways(objective):
                raise UserError(
                    f"nothing can be measured of objective {objective}: it takes the samplers "
                    f"{', '.join(allowed_samplers(objective))}, got --samplers {' '.join(self.samplers)} with --steps "
                    f"{' '.join(map(str, self.evaluations))}; change them, or name other --objectives"
                )

    def ways(self, objective: str) -> list[Way]:
        """Return the ways to measure a model of an objective: every sampler that it takes, every number of evaluations.

        One evaluation is the same whoever makes it, a prediction at the chain's start, and is measured once; one-step
        makes one whatever --steps says.
        """
        samplers = [name for name in allowed_samplers(objective) if name in self.samplers]
        several = [name for name in samplers if name != "one-step"]
        found = [Way(name, number) for name in several for number in self.evaluations if number > 1]
        if "one-step" in samplers:
            return [Way("one-step", 1), *found]
        return [Way(samplers[0], 1), *found] if several and 1 in self.evaluations else found

    def scored_way(self, objective: str) -> Way:
        """Return the way that a trial is scored by while it trains.

        It is the first of its samplers with as many evaluations as are measured, up to SCORED_EVALUATIONS.
        """
        ways = self.ways(objective)
        affordable = [way for way in ways if way.network_evaluations <= SCORED_EVALUATIONS] or ways[:1]
        most = max(way.network_evaluations for way in affordable)
        return next(way for way in affordable if way.network_evaluations == most)

    def draw(self, draw: Draw) -> Point:
        """Return one point; betas are rounded to three digits."""
        objective = draw.choice("objective", self.objectives)
        point: Point = {"objective": objective}
        if objective in VARIANCE_PRESERVING:
            point["schedule"] = draw.choice("schedule", SCHEDULES)
            if point["schedule"] != "cosine":
                for name, (low, high) in (("beta_start", BETA_START), ("beta_end", BETA_END)):
                    scale = 1000 / self.num_train_timesteps
                    bounds = min(low * scale, LARGEST_BETA), min(high * scale, LARGEST_BETA)
                    point[name] = _rounded(draw.log_uniform(name, *bounds))
            if objective != "epsilon":
                point["zero_terminal_snr"] = draw.choice("zero_terminal_snr", (False, True))
        return point

    def describe(self) -> list[str]:
        """Return the space as lines of text."""
        lines = []
        for objective in self.objectives:
            if objective == "regression":
                what = "one point"
            else:
                scale = 1000 / self.num_train_timesteps
                ranges = [[min(bound * scale, LARGEST_BETA) for bound in pair] for pair in (BETA_START, BETA_END)]
                what = f"schedule {', '.join(SCHEDULES)}; beta_start {_range(ranges[0])}, beta_end {_range(ranges[1])}"
                what += "" if objective == "epsilon" else "; zero_terminal_snr or not"
            ways = self.ways(objective)
            total = sum(way.network_evaluations for way in ways)
            samplers = dict.fromkeys(way.sampler for way in ways)
            lines.append(
                f"{objective}: {what}; measured with {', '.join(samplers)}, {total} network evaluations a validation "
                "pair"
            )
        return lines


def random_points(space: Space, num_trials: int, seed: int) -> list[Point]:
    """Return `num_trials` distinct points, a function of the seed; fewer where the space has no more."""
    draw = _RandomDraw(seed)
    points: list[Point] = []
    for _ in range(50 * num_trials):
        point = space.draw(draw)
        if point not in points:
            points.append(point)
        if len(points) == num_trials:
            break
    return points


def optuna_space(space: Space) -> Callable[[Any], Point]:
    """Return the space as the define-by-run function that OptunaSearch takes."""
    return partial(_optuna_point, space)  # not a lambda: Ray Tune writes it down


def point_name(point: Mapping[str, Any]) -> str:
    """Return the name of a point's trial: what it is, and a digest, so that equal points have one name."""
    digest = hashlib.sha256(json.dumps(dict(point), sort_keys=True).encode()).hexdigest()[:8]
    return "-".join([point["objective"], *([point["schedule"]] if "schedule" in point else []), digest])


def with_point(config: Config, point: Mapping[str, Any]) -> Config:
    """Return the configuration with a point's diffusion section."""
    return replace(config, diffusion=replace(config.diffusion, **{"zero_terminal_snr": False, **point}))


def with_way(config: Config, way: Way) -> Config:
    """Return the configuration with a sampler and its network evaluations."""
    sampling = replace(config.sampling, sampler=way.sampler, num_inference_steps=way.network_evaluations)
    return replace(config, sampling=sampling)


class _RandomDraw:
    """Draws from a seeded generator."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def choice(self, name: str, options: Sequence[Any]) -> Any:
        return options[int(self._generator.integers(len(options)))]

    def log_uniform(self, name: str, low: float, high: float) -> float:
        return float(np.exp(self._generator.uniform(np.log(low), np.log(high))))


def _optuna_point(space: Space, trial: Any) -> Point:
    return space.draw(_OptunaDraw(trial))


class _OptunaDraw:
    """Asks an Optuna trial."""

    def __init__(self, trial: Any) -> None:
        self._trial = trial

    def choice(self, name: str, options: Sequence[Any]) -> Any:
        return self._trial.suggest_categorical(name, list(options))

    def log_uniform(self, name: str, low: float, high: float) -> float:
        return float(self._trial.suggest_float(name, low, high, log=True))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _range(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.3g} to {bounds[1]:.3g} (log)"
