"""aldm tune: the space of a sweep, its trials on a Ray cluster, its results, and going on after a kill."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from ray_runs import wait_for_end

from aldm import cli
from aldm.config import OBJECTIVES, SAMPLERS, Config, from_dict
from aldm.diffusion import make_schedule
from aldm.engine import PlainEngine
from aldm.errors import UserError
from aldm.presets import load_preset, tiny
from aldm.run_folder import RunFolder, checkpoint_folder
from aldm.sampling import allowed_samplers, check_sampling
from aldm.stage_inputs import StageInputs
from aldm.training import fit
from aldm.training_build import build_stage
from tune.main import main
from tune.picture import save_pareto_picture
from tune.results import Measurement, Trial, pareto_front
from tune.search_space import (
    SCORED_EVALUATIONS,
    Space,
    Way,
    optuna_space,
    point_name,
    random_points,
    with_point,
    with_way,
)
from tune.sweep import Outcome, Sweep
from tune.trial import measure

TINY = ("--preset", "tiny", "--device", "cpu", "--log-level", "warning")
Inputs = tuple[str, ...]


def run(*words: object) -> int:
    return main([str(word) for word in words])


# The space.


def space(
    objectives: Sequence[str] = OBJECTIVES,
    samplers: Sequence[str] = SAMPLERS,
    evaluations: Sequence[int] = (1, 2, 5),
    length: int = 50,
) -> Space:
    return Space(
        objectives=tuple(objectives),
        samplers=tuple(samplers),
        evaluations=tuple(evaluations),
        num_train_timesteps=length,
    )


def optuna_points(own: Space, number: int) -> list[dict[str, Any]]:
    """Points of a study that is told of scores, so that its later ones are not random."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    points = []
    for i in range(number):
        trial = study.ask()
        points.append(optuna_space(own)(trial))
        study.tell(trial, float(i % 7))
    return points


@pytest.mark.parametrize("length", [20, 50, 1000])
@pytest.mark.parametrize("drawn", [optuna_points, lambda own, number: random_points(own, number, 0)])
def test_every_drawn_point_builds_and_can_be_sampled_every_way(drawn: Callable[..., Any], length: int) -> None:
    own = space(length=length)
    config = replace(tiny(), diffusion=replace(tiny().diffusion, num_train_timesteps=length, zero_terminal_snr=True))
    points = drawn(own, 60)
    assert {point["objective"] for point in points} == set(OBJECTIVES)
    assert any(point.get("zero_terminal_snr") for point in points)
    for point in points:
        diffusion = with_point(config, point).diffusion
        kept = make_schedule(diffusion).alphas_cumprod
        assert ((kept >= 0) & (kept < 1)).all()
        assert (kept[-1] == 0) == point.get("zero_terminal_snr", False)
        for way in [own.scored_way(point["objective"]), *own.ways(point["objective"])]:
            check_sampling(diffusion, way.sampler, way.network_evaluations)


def test_a_field_is_drawn_only_where_it_means_something() -> None:
    points = random_points(space(), 80, seed=1)
    by_objective = {name: [set(point) for point in points if point["objective"] == name] for name in OBJECTIVES}
    assert by_objective["regression"] == [{"objective"}]
    assert not any("zero_terminal_snr" in fields for fields in by_objective["epsilon"])
    for point in points:
        assert ("beta_start" in point) == (point.get("schedule", "cosine") != "cosine")


def test_points_are_distinct_and_follow_from_the_seed() -> None:
    points = random_points(space(), 50, seed=3)
    assert len({point_name(point) for point in points}) == 50
    assert random_points(space(), 20, seed=3) == points[:20]
    assert random_points(space(), 20, seed=4) != points[:20]


@given(
    objective=st.sampled_from(OBJECTIVES),
    samplers=st.lists(st.sampled_from(SAMPLERS), min_size=1, unique=True),
    evaluations=st.lists(st.integers(1, 30), min_size=1, unique=True).map(sorted),
)
@settings(max_examples=80, deadline=None)
def test_what_an_objective_allows_is_measured_once(objective: str, samplers: list[str], evaluations: list[int]) -> None:
    allowed = set(allowed_samplers(objective)) & set(samplers)
    chains = allowed - {"one-step"}
    several = {Way(name, number) for name in chains for number in evaluations if number > 1}
    once = "one-step" in allowed or (chains and 1 in evaluations)
    if not several and not once:
        with pytest.raises(UserError, match=f"nothing can be measured of objective {objective}"):
            space([objective], samplers, evaluations)
        return
    own = space([objective], samplers, evaluations)
    ways = own.ways(objective)
    assert {way for way in ways if way.network_evaluations > 1} == several
    assert [way.sampler in allowed for way in ways if way.network_evaluations == 1] == ([True] if once else [])
    scored = own.scored_way(objective).network_evaluations
    assert scored == max(
        [way.network_evaluations for way in ways if way.network_evaluations <= SCORED_EVALUATIONS], default=scored
    )


# The results.


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1), st.booleans())
def test_the_front_is_what_nothing_else_beats(values: list[tuple[int, int]], higher: bool) -> None:
    trial = Trial(name="a", point={"objective": "v"}, state="measured", step=1, best=None)
    points = [Measurement(trial=trial, way=Way("ddim", number), value=float(value)) for number, value in values]
    sign = 1 if higher else -1
    wanted = {
        (number, value)
        for number, value in values
        if not any(
            other <= number and sign * better >= sign * value and (other, better) != (number, value)
            for other, better in values
        )
    }
    front = [(one.way.network_evaluations, int(one.value)) for one in pareto_front(points, higher)]
    assert set(front) == wanted
    assert front == sorted(wanted)


def test_equal_points_draw_equal_pictures(tmp_path: Path) -> None:
    points = [(1, 20.0), (2, 21.0), (2, -300.0), (20, 24.0)]
    front = [(1, 20.0, "regression one-step"), (2, 21.0, "v cosine dpm-solver++"), (20, 24.0, "v cosine ddim")]
    for name in "ab":
        save_pareto_picture(tmp_path / f"{name}.png", points, front, score="PSNR, dB")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert imread(tmp_path / "a.png").std() > 0.05


# Sweeps, on a small simulated data set.


@pytest.fixture(scope="module")
def inputs(haar_latents: Path, stage_2: Path) -> Inputs:
    """--latents and --ms-spade."""
    return ("--latents", str(haar_latents), "--ms-spade", str(stage_2))


def test_measuring_repeats_the_validation_of_the_training(inputs: Inputs, tmp_path: Path) -> None:
    config, way = with_point(tiny(), {"objective": "v", "schedule": "cosine"}), Way("ddim", 4)
    paths = StageInputs(latents=Path(inputs[1]), ms_spade=Path(inputs[3]))
    stage, sources = build_stage("diffusion", with_way(config, way), paths)
    engine = PlainEngine("cpu", "fp32")
    with RunFolder.open(tmp_path / "r", stage="diffusion", config=stage.config, inputs=sources) as folder:
        result = fit(
            stage,
            engine,
            stage.config.train_diffusion,
            seed=stage.config.seed,
            on_log=folder.log,
            on_checkpoint=lambda snapshot: folder.save(snapshot.write, snapshot.is_best),
        )
    calls: list[int] = []
    stage.unet.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[attr-defined]
    first, other = measure(stage, engine, checkpoint_folder(tmp_path / "r"), [way, Way("dpm-solver++", 2)])
    assert (first.way, first.value) == (way, result.best)
    assert other.value != pytest.approx(result.best, abs=1e-3)
    assert len(calls) == (4 + 2) * stage.config.train_diffusion.num_validation_samples


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sweeps lie, with one MLflow store beside them."""
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def swept(inputs: Inputs, place: Path, ray_cluster: None) -> tuple[Path, tuple[object, ...]]:
    """A sweep of three trials that all finish, and its flags."""
    words = (*inputs, *TINY, "--out", place / "random", "--num-trials", 3, "--objectives", "x0", "epsilon", "v")
    words = (*words, "--steps", 1, 3, "--max-steps", 5, "--scheduler", "none", "--max-concurrent", 2)
    assert run(*words) == 0
    return place / "random", words


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def starts(out: Path) -> dict[str, int]:
    return {
        file.parent.name: len(json.loads(file.read_text())["starts"]) for file in (out / "trials").glob("*/run.json")
    }


@pytest.mark.slow
def test_a_sweep_measures_every_way_of_every_trial(swept: tuple[Path, tuple[object, ...]]) -> None:
    out, _ = swept
    sweep = Sweep.load(out)
    points = random_points(sweep.space, 3, sweep.config.seed)
    wanted = {(point_name(point), way) for point in points for way in sweep.space.ways(point["objective"])}
    assert {(row["trial"], Way(row["sampler"], int(row["network_evaluations"]))) for row in rows(out)} == wanted
    assert {row["state"] for row in rows(out)} == {"measured"}
    table = (out / "trials.md").read_text()
    assert all(point_name(point) in table for point in points)
    assert imread(out / "pareto.png").std() > 0.05
    best = max(rows(out), key=lambda row: float(row["psnr_db"]))
    assert best["on_front"] == "True"
    left = {file.name for file in out.rglob("*") if file.is_file()}
    assert not [name for name in left if "tfevents" in name or name in ("result.json", "progress.csv", "params.json")]


@pytest.mark.slow
def test_the_way_that_a_trial_was_scored_by_gives_its_score_again(swept: tuple[Path, tuple[object, ...]]) -> None:
    out, _ = swept
    sweep = Sweep.load(out)
    for point in random_points(sweep.space, 3, sweep.config.seed):
        folder = out / "trials" / point_name(point)
        outcome = Outcome.load(folder)
        assert outcome is not None
        values = {measured.way: measured.value for measured in outcome.measured}
        assert values[sweep.space.scored_way(point["objective"])] == pytest.approx(outcome.best, abs=1e-4)
        scores = [json.loads(line).get("validation/psnr_db") for line in (folder / "metrics.jsonl").open()]
        assert outcome.best == max(score for score in scores if score is not None)


@pytest.mark.slow
def test_the_preset_file_trains(swept: tuple[Path, tuple[object, ...]], inputs: Inputs, tmp_path: Path) -> None:
    out, _ = swept
    best = max(rows(out), key=lambda row: float(row["psnr_db"]))
    preset = load_preset(str(out / "best.yaml"))
    assert preset.sampling.sampler == best["sampler"]
    assert preset.sampling.num_inference_steps == int(best["network_evaluations"])
    assert preset.train_diffusion == tiny().train_diffusion
    point = json.loads((out / "trials" / f"{best['trial']}.json").read_text())
    assert {name: getattr(preset.diffusion, name) for name in point} == point
    words = ["--preset", str(out / "best.yaml"), "--run-dir", str(tmp_path / "r"), "--engine", "plain"]
    assert cli.main(["train", "diffusion", *inputs, *words, "--device", "cpu", "--log-level", "warning"]) == 0
    trained = from_dict(Config, yaml.safe_load((tmp_path / "r" / "config.yaml").read_text()))
    assert (trained.diffusion, trained.sampling) == (preset.diffusion, preset.sampling)


@pytest.mark.slow
def test_every_trial_is_a_nested_run(swept: tuple[Path, tuple[object, ...]], place: Path) -> None:
    from mlflow import MlflowClient

    out, _ = swept
    client = MlflowClient(f"sqlite:///{place / 'mlflow.db'}")
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    names = {file.stem for file in (out / "trials").glob("*.json")}
    children = [one for one in found if one.info.run_name in names]
    assert {one.info.run_name for one in children} == names
    (parent_id,) = {one.data.tags["mlflow.parentRunId"] for one in children}
    for one in children:
        assert one.info.status == "FINISHED"
        assert one.data.tags["tune.state"] == "measured"
        last = client.get_metric_history(one.info.run_id, "validation/psnr_db")[-1]
        assert last.step == 5
    measured = {row["network_evaluations"]: row for row in rows(out) if row["trial"] == children[0].info.run_name}
    sampler = measured["3"]["sampler"].replace("+", "p")
    (logged,) = client.get_metric_history(children[0].info.run_id, f"sampled/{sampler}")
    assert logged.step == 3
    parent = client.get_run(parent_id)
    assert parent.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(parent_id)} == {
        "best.yaml",
        "pareto.png",
        "trials.csv",
        "trials.md",
    }


@pytest.mark.slow
def test_a_finished_sweep_is_not_run_again(
    swept: tuple[Path, tuple[object, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = swept
    before = (out / "trials.csv").read_bytes()
    with pytest.raises(UserError, match="--resume continues it, --overwrite deletes it"):
        run(*words)
    with pytest.raises(UserError, match="num_trials was 3, now 2"):
        run(*words, "--resume", "--num-trials", 2)
    assert run(*words, "--resume-or-start") == 0
    assert "3 trials (3 measured)" in capsys.readouterr().out
    assert set(starts(out).values()) == {1}
    assert (out / "trials.csv").read_bytes() == before


@pytest.mark.slow
def test_asha_stops_the_worse_and_optuna_draws(inputs: Inputs, place: Path, ray_cluster: None) -> None:
    out = place / "optuna"
    words = (*inputs, *TINY, "--out", out, "--num-trials", 4, "--searcher", "optuna", "--objectives", "v", "x0")
    assert run(*words, "--steps", 10, "--max-concurrent", 1, "--max-steps", 4) == 0
    files = sorted((out / "trials").glob("*.json"), key=lambda file: file.stat().st_mtime)
    states = {row["trial"]: row["state"] for row in rows(out)}
    before: dict[int, list[float]] = {1: [], 2: []}  # scores at a quarter and at a half of the training
    for file in files:
        records = [json.loads(line) for line in (file.with_suffix("") / "metrics.jsonl").open()]
        scores = {record["step"]: record["validation/psnr_db"] for record in records if "validation/psnr_db" in record}
        last = 4
        for step in (1, 2):
            worse = bool(before[step]) and scores[step] < np.median(before[step])
            before[step].append(scores[step])
            if worse:
                last = step
                break
        assert max(scores) == last
        assert states[file.stem] == ("measured" if last == 4 else "stopped early")
    assert set(states.values()) == {"measured", "stopped early"}


@pytest.mark.slow
def test_a_training_that_diverges_is_a_failed_trial(inputs: Inputs, place: Path, ray_cluster: None) -> None:
    words = (*inputs, *TINY, "--num-trials", 1, "--objectives", "regression", "--out", place / "diverged")
    with pytest.raises(UserError, match=r"came to be measured: the (loss|gradient) of unet"):
        run(*words, "--set", "train_diffusion.learning_rate=1e30")
    (file,) = (place / "diverged" / "trials").glob("*/outcome.json")
    assert "not taken" in json.loads(file.read_text())["error"]


@pytest.mark.slow
def test_more_trials_at_a_time_than_cpus_are_refused(inputs: Inputs, place: Path, ray_cluster: None) -> None:
    words = (*inputs, "--preset", "tiny", "--log-level", "warning", "--out", place / "none")
    with pytest.raises(UserError, match="--max-concurrent 5 is more than the 4 CPUs"):
        run(*words, "--max-concurrent", 5)
    with pytest.raises(UserError, match="--device cuda: this Ray cluster has no GPU"):
        run(*words, "--device", "cuda")
    assert not (place / "none").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--latents", "nowhere"), "is not a store of latents"),
        (("--ms-spade", "nowhere"), "holds no checkpoint"),
        (("--num-trials", 0), "--num-trials is 0, wanted at least 1"),
        (("--max-concurrent", 0), "--max-concurrent is 0, wanted at least 1"),
        (("--max-steps", 0), "max_steps is 0"),
        (("--samplers", "euler"), "--samplers euler: euler unknown, wanted some of ddpm"),
        (("--objectives", "v", "v"), "--objectives v v: a name twice"),
        (("--steps", 1, 51), "--steps 51 is out of range: wanted 1 to diffusion.num_train_timesteps, 50"),
        (("--objectives", "epsilon", "--samplers", "one-step"), "nothing can be measured of objective epsilon"),
        (("--objectives", "regression", "--num-trials", 2), "regression has no more than 1 points"),
        (("--resume",), "holds no sweep to resume"),
        (("--resume", "--overwrite"), "give one of them"),
        (("--resume", "--resume-or-start"), "decides by itself"),
        (("--out", "nowhere/sweep"), "there is no folder"),
        (("--set", "train_diffusion.colour=red"), "unknown key"),
    ],
)
def test_what_cannot_be_swept_is_refused_and_nothing_is_written(
    words: tuple[object, ...], message: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        run(*inputs, *TINY, "--out", "sweep", *words)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_sweep_is_not_deleted(inputs: Inputs, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        run(*inputs, *TINY, "--out", tmp_path, "--overwrite")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_dry_run_says_what_it_would_do(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--samplers", "ddim", "one-step", "--steps", 1, 4, "--dry-run")
    assert run(*inputs, *TINY, "--out", tmp_path / "sweep", *words) == 0
    text = capsys.readouterr().out
    assert "would sweep 16 trials" in text
    assert "epsilon: schedule linear, scaled-linear, cosine, sigmoid; beta_start 0.002 to 0.06" in text
    assert "measured with ddim, 5 network evaluations" in text
    assert "expected peak memory" in text
    assert list(tmp_path.iterdir()) == []


# Going on after a kill.


@pytest.mark.slow
def test_a_killed_sweep_goes_on(inputs: Inputs, place: Path, ray_cluster: None) -> None:
    """SIGKILL to the driver in the middle: finished trials are kept, the one at work goes on from its checkpoint.

    The driver has a Ray session of its own, what goes on runs here.
    """
    out = place / "killed"
    words = [*inputs, *TINY, "--out", out, "--num-trials", 3, "--objectives", "x0", "--steps", 1]
    words = [*words, "--max-steps", 40, "--max-concurrent", 1, "--scheduler", "none"]
    program = [sys.executable, "-c", "import sys; from tune.main import main; sys.exit(main(sys.argv[1:]))"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [*program, *map(str, words)]
    driver = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 300
    try:
        while sum(folder.is_dir() for folder in (out / "trials").glob("*/last")) < 2:
            assert driver.poll() is None, "the sweep ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        wait_for_end(started, killed=True)
    measured = {file: file.stat().st_mtime_ns for file in (out / "trials").glob("*/outcome.json")}
    assert len(measured) == 1
    assert not (out / "trials.csv").exists()

    assert run(*words, "--resume") == 0
    assert {row["state"] for row in rows(out)} == {"measured"}
    assert sorted(starts(out).values()) == [1, 1, 2]
    assert all(file.stat().st_mtime_ns == before for file, before in measured.items())
    for file in (out / "trials").glob("*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in file.open() if "num_steps" in line]
        assert steps == list(range(1, 41))
