"""What the driver of a sweep does while Ray Tune runs: it says what the trials reach, and has their runs logged."""

import logging
import time
from pathlib import Path
from typing import Any, ClassVar

from ray import tune
from tqdm import tqdm

from tune.runs import SweepRuns
from tune.search_space import point_name
from tune.sweep import Sweep, state_of
from tune.trial import ENDED, SCORE, STEP, point_of

logger = logging.getLogger(__name__)


class Watcher(tune.Callback):
    """Logs what every trial reaches and the time that is left, and has the trials' MLflow runs follow.

    A resumed sweep goes on with a copy of this that Ray Tune wrote down, so what lives in this process stands on the
    class.
    """

    sweep: ClassVar[Sweep]
    out: ClassVar[Path]
    runs: ClassVar[SweepRuns]
    begin: ClassVar[float]
    done_here: ClassVar[int]

    @classmethod
    def attach(cls, sweep: Sweep, out: Path, runs: SweepRuns) -> None:
        """Watch this sweep in its folder; its time counts from now."""
        cls.sweep, cls.out, cls.runs, cls.begin, cls.done_here = sweep, out, runs, time.monotonic(), 0

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Log a validation."""
        if not result[ENDED]:
            name = point_name(point_of(trial.config))
            logger.info("%s: step %d, %s %.4g", name, result[STEP], self.sweep.score, result[SCORE])
            self.runs.follow(name)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log the count and the time that is left."""
        self._ended(trials, trial, crashed=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log the count and the time that is left."""
        self._ended(trials, trial, crashed=True)

    def _ended(self, trials: list[Any], trial: Any, *, crashed: bool) -> None:
        cls = type(self)
        cls.done_here += 1
        name = point_name(point_of(trial.config))
        state = state_of(self.out, name, crashed=crashed)
        self.runs.end(name, state)
        done = 1 + sum(other.is_finished() for other in trials if other is not trial)
        number = self.sweep.num_trials
        left_s = (time.monotonic() - cls.begin) * (number - done) / cls.done_here
        remaining = f", about {tqdm.format_interval(left_s)} remaining" if done < number else ""
        logger.info("%s: %s; %d of %d trials%s", name, state, done, number, remaining)
