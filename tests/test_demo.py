"""The demo: every job of the tiny preset in order, then nothing left to do."""

import csv
import json
import re

import numpy as np
import pytest

from aldm.config import training_of
from aldm.errors import UserError
from aldm.presets import small
from pipelines import chain, demo
from pipelines.demo import main
from pipelines.demo_report import cost_verdict, scores_verdict
from pipelines.train import parse


@pytest.mark.slow
def test_the_demo_runs_every_step_and_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    out = tmp_path / "demo"
    arguments = ["--out", str(out), "--preset", "tiny", "--num-subjects", "11"]
    run = chain.run_step

    def stop_before_export(step):
        if step.command[0] == "export":
            raise KeyboardInterrupt
        return run(step)

    monkeypatch.setattr(chain, "run_step", stop_before_export)
    with pytest.raises(KeyboardInterrupt):
        main(arguments)
    monkeypatch.setattr(chain, "run_step", run)
    assert not (out / "report.html").exists()
    before = json.loads((out / "demo.json").read_text())["steps"]

    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("done before") == len(before) > 0
    after = json.loads((out / "demo.json").read_text())["steps"]
    assert after[: len(before)] == before
    assert "[12/12, about 0.1 min to go]" in printed
    page = (out / "report.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("data:image/png;base64,") >= 3
    for step in after:
        assert step["title"] in page
        assert 0.1 < step["peak_gb"] < 4
    verdict = printed.splitlines()[-1]
    assert verdict in page
    assert verdict == verdict_by_hand(out / "scores" / "scores.csv", after)
    for name in ("held_out", "icbm152"):
        assert (out / "translated" / f"{name}_t2.nii.gz").is_file()


def verdict_by_hand(scores, steps):
    """The line from scores.csv: means over the test subjects and all pairs of two modalities, inside the mask."""
    rows = [row for row in csv.DictReader(scores.open()) if row["source"] != row["target"]]
    (region,) = {row["region"] for row in rows} & {"brain", "foreground"}
    rows = [row for row in rows if row["region"] == region]
    assert len({(row["source"], row["target"]) for row in rows}) == 6

    def mean_of(method, *pair):
        chosen = [row for row in rows if row["method"] == method and pair in ((), (row["source"], row["target"]))]
        return np.mean([float(row["psnr_db"]) for row in chosen])

    methods = ("aldm", "identity", "training-mean", "intensity-map", "histogram-matching", "unet")
    db = {method: mean_of(method) for method in methods}
    gains = {method: db["aldm"] - value for method, value in db.items()}
    others = [f"{name.replace('-', ' ')} {db[name]:.2f} dB ({gains[name]:+.2f})" for name in list(db)[1:]]
    wanted = {"identity": 3, "training-mean": 3, "intensity-map": 3, "unet": 1}
    short = [f"{name.replace('-', ' ')} ({least} dB)" for name, least in wanted.items() if gains[name] < least]
    holds = f"The margin does NOT hold over {', '.join(short)}." if short else "All margins hold."
    minutes, peak = sum(step["seconds"] for step in steps) / 60, max(step["peak_gb"] for step in steps)
    within = "within" if minutes <= sum(step["budget_s"] for step in steps) / 60 else "NOT within"
    return (
        f"All pairs, inside the {region}: ALDM {db['aldm']:.2f} dB, {', '.join(others)}. "
        f"{holds} T1 to T2 alone: ALDM {mean_of('aldm', 't1', 't2'):.2f}, unet {mean_of('unet', 't1', 't2'):.2f}, "
        f"intensity map {mean_of('intensity-map', 't1', 't2'):.2f} dB. "
        f"{minutes:.1f} of {sum(step['budget_s'] for step in steps) / 60:.1f} minutes and at most {peak:.2f} of 4 GB: "
        f"{within} the budget."
    )


def test_the_verdict_says_whether_the_margin_and_the_budget_hold():
    every = {"aldm": (20.0,), "unet": (21.0,), "training-mean": (17.0,), "intensity-map": (18.5,), "identity": (15.5,)}
    every["histogram-matching"] = (16.25,)
    pair = {"identity": (3.0,), "aldm": (19.0,), "unet": (18.5,)}
    assert scores_verdict(every, pair, "brain", "t1", "t2") == (
        "All pairs, inside the brain: ALDM 20.00 dB, identity 15.50 dB (+4.50), training mean 17.00 dB (+3.00), "
        "intensity map 18.50 dB (+1.50), histogram matching 16.25 dB (+3.75), unet 21.00 dB (-1.00). "
        "The margin does NOT hold over intensity map (3 dB), unet (1 dB). T1 to T2 alone: ALDM 19.00, unet 18.50 dB."
    )
    of_before = {method: scores for method, scores in every.items() if method in ("aldm", "identity", "training-mean")}
    assert scores_verdict(of_before, pair, "brain", "t1", "t2").count("dB (") == 2
    best = every | {"aldm": (22.0,)}
    assert "unet 21.00 dB (+1.00). All margins hold. T1 to T2" in scores_verdict(best, pair, "brain", "t1", "t2")
    for method, least in (("identity", 19.01), ("training-mean", 19.01), ("intensity-map", 19.01), ("unet", 21.01)):
        verdict = scores_verdict(best | {method: (least,)}, pair, "brain", "t1", "t2")
        assert f"does NOT hold over {method.replace('-', ' ')} (" in verdict
    steps = [{"seconds": 90, "budget_s": 60, "peak_gb": 1.25}, {"seconds": 30, "budget_s": 60, "peak_gb": 0.5}]
    assert cost_verdict(steps) == "2.0 of 2.0 minutes and at most 1.25 of 4 GB: within the budget."
    assert "NOT within" in cost_verdict([*steps, {"seconds": 60, "budget_s": 30, "peak_gb": 0.1}])
    assert "NOT within" in cost_verdict([*steps, {"seconds": 0, "budget_s": 30, "peak_gb": 4.1}])


def test_the_trainings_count_steps_and_no_minutes(tmp_path):
    """So two runs on one machine end with the same weights; the adversary joins where it would, in proportion."""
    config = small()
    settings = {"preset": "small", "set": [], "precision": None, "num_subjects": 34, "seed": 0, "max_steps": demo.STEPS}
    trainings = [
        step.command for step in demo.plan_demo(tmp_path, settings, config, "cpu") if step.command[0] == "train"
    ]
    assert [command[1] for command in trainings] == list(demo.STEPS)
    for command in trainings:
        args, found = parse(command[1], command[2:])
        training, usual = (training_of(each, command[1]) for each in (found, config))
        assert (training.max_steps, training.max_minutes, args.max_minutes) == (demo.STEPS[command[1]], None, None)
        if training.adversarial_weight > 0:
            shares = [each.adversarial_start_step / each.max_steps for each in (training, usual)]
            assert shares[0] == pytest.approx(shares[1], abs=0.01)


def test_a_demo_made_with_other_settings_is_not_continued(tmp_path):
    out = tmp_path / "demo"
    settings = {"preset": "tiny", "set": [], "precision": None, "num_subjects": 11, "seed": 0}
    chain.Chain(out, demo.DEMO_FILE, "demo", settings).open(overwrite=False)
    with pytest.raises(UserError, match="--overwrite"):
        main(["--out", str(out), "--preset", "tiny", "--num-subjects", "12"])


def test_a_dry_run_lists_every_command_and_writes_nothing(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "demo"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.count("$ aldm ") == 12
    assert re.search(r"memory: 0\.\d\d GiB for the largest training", text)
    assert not (tmp_path / "demo").exists()


def test_a_dry_run_says_that_the_folder_is_taken(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        main(["--out", str(tmp_path), "--dry-run"])


def test_too_few_subjects_are_a_usage_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "demo"), "--num-subjects", "5"])
    assert stop.value.code == 2
    assert "--num-subjects" in capsys.readouterr().err
