"""What a sweep is, as its folder keeps it.

sweep.json       what was asked for; a resumed sweep asks for the same
trials/<name>/   one run folder a point (aldm/run_folder.py), and outcome.json when the point is measured or has failed
trials/<name>.json   the point; locked while a process trains it
ray/             what Ray Tune goes on from
trials.csv, trials.md, pareto.png, best.yaml   the results
"""

import datetime
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aldm.config import Config, TrainingConfig, from_dict, to_dict
from aldm.errors import UserError
from aldm.files import atomic_path
from tune.search_space import Point, Space, Way, with_point, with_way

SWEEP_FILE, OUTCOME_FILE = "sweep.json", "outcome.json"
TRIALS, RAY, LOCK_FILE = "trials", "ray", "sweep.lock"
TABLE_CSV, TABLE, PICTURE, PRESET = RESULTS = ("trials.csv", "trials.md", "pareto.png", "best.yaml")
STAGE = "diffusion"
HALTS = (1 / 4, 1 / 2)
"""Shares of a training after which ASHA stops a trial that is not in the better half there."""
MEASURED, STOPPED, FAILED = "measured", "stopped early", "failed"
"""What becomes of a trial; what the scheduler stops is not measured."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Everything that the result of a sweep depends on.

    Attributes:
        config: of all trials but for diffusion and sampling; resolved.
        preset_training: train_diffusion as the preset has it, for the preset file that comes out.
        latents, ms_spade: absolute paths.
        codec_hash, ms_spade_hash: of what lies there.
        space: what is drawn and measured.
        num_steps: optimizer steps of a trial (the most, where it has minutes).
        num_trials: trials to run.
        searcher: random or optuna.
        scheduler: asha or none.
        max_concurrent: trials at a time; None takes what the cluster has.
        device: auto, cpu or cuda.
        score: what a validation is judged by, psnr_db or latent_rmse.
        higher_is_better: its direction.
        started: date and time, UTC.
    """

    config: Config
    preset_training: TrainingConfig
    latents: str
    ms_spade: str
    codec_hash: str
    ms_spade_hash: str
    space: Space
    num_steps: int
    num_trials: int
    searcher: str
    scheduler: str
    max_concurrent: int | None
    device: str
    score: str
    higher_is_better: bool
    started: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))

    def group(self, out: Path) -> str:
        """Return the name of the run that stands for the whole sweep."""
        return f"{out.name} {self.started}"

    def config_of(self, point: Mapping[str, Any]) -> Config:
        """Return the configuration that a point is trained with, scored by its objective's own sampler."""
        return with_way(with_point(self.config, point), self.space.scored_way(point["objective"]))

    def save(self, folder: Path) -> None:
        """Write sweep.json."""
        with atomic_path(folder / SWEEP_FILE, overwrite=True) as temporary:
            temporary.write_text(json.dumps(to_dict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Sweep":
        """Read sweep.json.

        Raises:
            UserError: it cannot be read, or another version of this program wrote it.
        """
        try:
            return from_dict(cls, json.loads((folder / SWEEP_FILE).read_text()))
        except (OSError, ValueError, TypeError) as error:  # UserError is a ValueError
            raise UserError(
                f"{folder / SWEEP_FILE} cannot be read: {error}; start the sweep again in another --out"
            ) from error

    def check_same(self, folder: Path) -> None:
        """Refuse to go on with a sweep that was asked for in other words.

        Raises:
            UserError: the first five differences.
        """
        before, now = (dict(_flat(to_dict(replace(one, started="")))) for one in (Sweep.load(folder), self))
        names = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
        different = [f"{name} was {before.get(name)}, now {now.get(name)}" for name in names]
        if different:
            raise UserError(
                f"{folder} was started with other flags ({'; '.join(different[:5])}): --resume continues with the same "
                "ones, another --out starts another sweep"
            )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a trial's best checkpoint scores when it is sampled one way."""

    way: Way
    value: float | None
    """Mean score over the validation pairs; None where it is not finite."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended that was not stopped early.

    Attributes:
        step: optimizer steps done.
        elapsed_s: time of its training.
        best: best score while it trained; None where it failed or is not finite.
        measured: its best checkpoint, way by way; empty where it failed.
        error: why it failed.
    """

    step: int
    elapsed_s: float
    best: float | None
    measured: tuple[Measured, ...] = ()
    error: str | None = None

    def save(self, folder: Path) -> None:
        """Write outcome.json."""
        with atomic_path(folder / OUTCOME_FILE, overwrite=True) as temporary:
            temporary.write_text(json.dumps(to_dict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Outcome | None":
        """Read outcome.json; None where the trial has not ended by itself."""
        file = folder / OUTCOME_FILE
        return from_dict(cls, json.loads(file.read_text())) if file.is_file() else None


def best_preset(sweep: Sweep, point: Point, way: Way, resolved: Config) -> Config:
    """Return the preset of a measured point: the preset's own training with the point's diffusion and sampling.

    Args:
        sweep: what was asked for.
        point: the trial's.
        way: the sampler and evaluations to use.
        resolved: the trial's configuration, completed with what the data were made with.
    """
    chosen = with_way(with_point(resolved, point), way)
    return replace(chosen, train_diffusion=sweep.preset_training)


def state_of(out: Path, name: str, *, crashed: bool) -> str:
    """Return what became of a trial that has ended.

    Args:
        out: the sweep's folder.
        name: the trial's.
        crashed: whether its process died, or raised what it does not know to write down.
    """
    outcome = Outcome.load(out / TRIALS / name)
    if outcome is None:
        return FAILED if crashed else STOPPED
    return FAILED if outcome.error else MEASURED


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
