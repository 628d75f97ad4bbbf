"""From the folders of a sweep to its results: the Pareto front, a table, a picture and a preset file."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aldm.config import Config, from_dict, to_dict
from aldm.errors import UserError
from aldm.files import atomic_path
from aldm.run_folder import CONFIG_FILE, METRICS_FILE
from aldm.words import counted
from tune.picture import save_pareto_picture
from tune.search_space import Point, Way
from tune.sweep import PICTURE, PRESET, RAY, STAGE, TABLE, TABLE_CSV, TRIALS, Outcome, Sweep, best_preset, state_of

POINT_FIELDS = ("objective", "schedule", "beta_start", "beta_end", "zero_terminal_snr")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of a point.

    Attributes:
        name: of its folder.
        point: what was trained.
        state: measured, stopped early (by the scheduler; not measured) or failed.
        step: optimizer steps done.
        best: best score while it trained, of as many steps as it was given.
        error: why it failed.
    """

    name: str
    point: Point
    state: str
    step: int
    best: float | None
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A dot of the picture: a trial's best checkpoint, sampled one way."""

    trial: Trial
    way: Way
    value: float

    def label(self) -> str:
        """Return objective, schedule and sampler."""
        point = self.trial.point
        zero = "zero-SNR" if point.get("zero_terminal_snr") else ""
        return " ".join(
            word for word in (point["objective"], point.get("schedule", ""), zero, self.way.sampler) if word
        )


def read_trials(sweep: Sweep, out: Path) -> tuple[list[Trial], list[Measurement]]:
    """Return what the folders of a sweep's trials say, in the order of their names."""
    trials, measurements = [], []
    for file in sorted((out / TRIALS).glob("*.json")):
        name, folder = file.stem, file.with_suffix("")
        outcome = Outcome.load(folder)
        if outcome is not None and outcome.error is None:
            step, best, error = outcome.step, outcome.best, None
        else:
            step, best = _best_of(folder, sweep)
            error = outcome.error if outcome else _crash(out, name)
        state = state_of(out, name, crashed=error is not None)
        trial = Trial(name=name, point=json.loads(file.read_text()), state=state, step=step, best=best, error=error)
        trials.append(trial)
        measurements += [
            Measurement(trial=trial, way=one.way, value=one.value)
            for one in (outcome.measured if outcome else ())
            if one.value is not None
        ]
    return trials, measurements


def pareto_front(measurements: Sequence[Measurement], higher_is_better: bool) -> list[Measurement]:
    """Return the measurements that no other one beats with as few evaluations, by rising evaluations.

    Of two that are equal in both, the first stays.
    """
    sign = 1 if higher_is_better else -1
    front: list[Measurement] = []
    for one in sorted(measurements, key=lambda one: (one.way.network_evaluations, -sign * one.value)):
        if not front or sign * one.value > sign * front[-1].value:
            front.append(one)
    return front


def write_sweep(sweep: Sweep, out: Path, trials: Sequence[Trial], measurements: Sequence[Measurement]) -> Measurement:
    """Write trials.csv, trials.md, pareto.png and best.yaml; return the best measurement.

    Args:
        sweep: what was asked for.
        out: its folder.
        trials, measurements: from `read_trials`.

    Raises:
        UserError: no trial was measured.
    """
    if not measurements:
        reasons = dict.fromkeys(trial.error for trial in trials if trial.error)
        raise UserError(
            f"no trial of {out} came to be measured: {'; '.join(list(reasons)[:3])}; fix that and say --resume, which "
            "tries again what crashed, or train otherwise in another --out"
        )
    front = pareto_front(measurements, sweep.higher_is_better)
    _write_csv(sweep, out / TABLE_CSV, trials, measurements, front)
    with atomic_path(out / TABLE, overwrite=True) as temporary:
        temporary.write_text(_tables(sweep, trials, measurements, front))
    save_pareto_picture(
        out / PICTURE,
        [(one.way.network_evaluations, one.value) for one in measurements],
        [(one.way.network_evaluations, one.value, one.label()) for one in front],
        score=score_label(sweep),
        title=f"{counted(len(trials), 'trial')}, {counted(len(measurements), 'measurement')}",
    )
    best = front[-1]
    _write_preset(sweep, out, best)
    return best


def score_label(sweep: Sweep) -> str:
    """Return what the score is, with its unit and direction."""
    return "PSNR, dB" if sweep.score == "psnr_db" else f"{sweep.score.replace('_', ' ')} (lower is better)"


def _write_preset(sweep: Sweep, out: Path, best: Measurement) -> None:
    import yaml

    file = out / TRIALS / best.trial.name / CONFIG_FILE
    resolved = from_dict(Config, yaml.safe_load(file.read_text()))
    preset = best_preset(sweep, best.trial.point, best.way, resolved)
    with atomic_path(out / PRESET, overwrite=True) as temporary:
        temporary.write_text(
            f"# for aldm train {STAGE} --preset: trial {best.trial.name} of the sweep {sweep.group(out)}\n"
            + yaml.safe_dump(to_dict(preset), sort_keys=False)
        )


def _write_csv(
    sweep: Sweep, path: Path, trials: Sequence[Trial], measurements: Sequence[Measurement], front: Sequence[Measurement]
) -> None:
    """Write a row per measurement, and one for each trial without any."""
    head = [
        "trial",
        "state",
        "step",
        *POINT_FIELDS,
        f"best_{sweep.score}",
        "sampler",
        "network_evaluations",
        sweep.score,
        "on_front",
        "error",
    ]
    rows: list[list[Any]] = []
    for trial in trials:
        known = [
            trial.name,
            trial.state,
            trial.step,
            *(trial.point.get(name, "") for name in POINT_FIELDS),
            _cell(trial.best),
        ]
        own = [one for one in measurements if one.trial is trial]
        rows += [
            [*known, one.way.sampler, one.way.network_evaluations, one.value, one in front, ""] for one in own
        ] or [[*known, "", "", "", "", trial.error or ""]]
    with atomic_path(path, overwrite=True) as temporary, temporary.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def _tables(
    sweep: Sweep, trials: Sequence[Trial], measurements: Sequence[Measurement], front: Sequence[Measurement]
) -> str:
    """Return the front and all trials, best first, as Markdown."""
    sign = 1 if sweep.higher_is_better else -1
    best = {one.trial.name: one for one in sorted(measurements, key=lambda one: sign * one.value)}
    order = sorted(trials, key=lambda trial: -sign * best[trial.name].value if trial.name in best else math.inf)
    fronts = [
        (str(one.way.network_evaluations), f"{one.value:.4g}", one.way.sampler, *_words(one.trial), one.trial.name)
        for one in front
    ]
    rows = []
    for trial in order:
        one = best.get(trial.name)
        way = (f"{one.value:.4g}", one.way.sampler, str(one.way.network_evaluations)) if one else ("", "", "")
        rows.append((trial.name, *_words(trial), trial.state, str(trial.step), _cell(trial.best), *way))
    score = score_label(sweep)
    pairs = counted(sweep.config.train_diffusion.num_validation_samples, "validation pair")
    failures = [f"- {trial.name}: {trial.error}" for trial in trials if trial.error]
    return "\n".join(
        [
            f"# Sweep of {counted(len(trials), 'trial')}",
            "",
            f"Scores are means over {pairs}: {score}.",
            "",
            "## Pareto front",
            "",
            *_markdown(("evaluations", score, "sampler", "objective", "schedule", "trial"), fronts),
            "",
            "## Trials",
            "",
            "Sampled the best way of each; what was stopped early or failed was not measured.",
            "",
            *_markdown(
                (
                    "trial",
                    "objective",
                    "schedule",
                    "state",
                    "steps",
                    "best in training",
                    score,
                    "sampler",
                    "evaluations",
                ),
                rows,
            ),
            *(["", "## Failures", "", *failures] if failures else []),
            "",
        ]
    )


def _words(trial: Trial) -> tuple[str, str]:
    """Return the objective, and the rest of the point in words."""
    point = dict(trial.point)
    objective = point.pop("objective")
    zero = ["zero terminal SNR"] if point.pop("zero_terminal_snr", False) else []
    schedule = [point.pop("schedule")] if "schedule" in point else []
    return objective, ", ".join([*schedule, *(f"{name} {value:g}" for name, value in point.items()), *zero])


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _best_of(folder: Path, sweep: Sweep) -> tuple[int, float | None]:
    """Return the last step and the best score that a run folder knows of."""
    file = folder / METRICS_FILE
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    scores = [record.get(f"validation/{sweep.score}") for record in records]
    known = [score for score in scores if score is not None]
    best = (max if sweep.higher_is_better else min)(known) if known else None
    return max((record["step"] for record in records), default=0), best


def _crash(out: Path, name: str) -> str | None:
    """Return the last line of what Ray Tune wrote of a trial whose process died or raised."""
    texts = [file.read_text().strip() for file in (out / RAY).glob(f"{name}*/error.txt")]
    return texts[-1].splitlines()[-1][:200] if texts and texts[-1] else None


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
