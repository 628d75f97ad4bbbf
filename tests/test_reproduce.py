"""`aldm reproduce ixi`: the paper's splits, the verdict before anything runs, a chain that goes on where it stopped."""

import csv
import hashlib
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from aldm.cli import main as aldm
from aldm.config import training_of, with_training
from aldm.errors import UserError
from aldm.planner import GIB, plan_memory
from aldm.presets import ixi, small, tiny
from aldm.run_folder import RunFolder
from aldm.score_table import TABLE_D
from pipelines import reproduce, reproduce_verdict
from pipelines.chain import span
from pipelines.reproduce import main
from pipelines.reproduce_data import Data, paper_splits, splits_csv, splits_text
from pipelines.reproduce_report import caveats, cells_of, verdict_text
from pipelines.reproduce_verdict import Machine, judge, ways_out

LARGE = Machine("cpu", 64 * GIB, 1e12, 1000 * GIB)
FIRST = "ixi --preset tiny --device cpu --data"


def subjects(complete, incomplete=0):
    names = [f"IXI{number:03d}-Guys-{700 + number:04d}" for number in range(complete + incomplete)]
    counts = {"t1": complete + incomplete, "t2": complete, "pd": complete}
    return Data(counts, tuple(names[:complete]), tuple(names[complete:]))


def words(tree, out, *more):
    return [*FIRST.split(), str(tree), "--out", str(out), *more]


# --------------------------------------------------------------------------------------------------------------- splits


def test_the_papers_sizes_come_out_by_the_hash_of_the_names():
    data = subjects(577, 5)
    splits = paper_splits(data)
    assert set(splits) == {*data.complete, *data.incomplete}
    ranked = sorted(data.complete, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert {name for name in splits if splits[name] == "test"} == set(ranked[:115])
    assert {name for name in splits if splits[name] == "train"} == set(ranked[115:574])
    text = splits_text(data, splits)
    assert text.startswith("459 train, 8 validation, 115 test: the paper's sizes, 459 and 115")
    assert "3 beyond the paper's 574 and 5 that lack a modality" in text
    assert "NOT" not in text
    shuffled = replace(data, complete=data.complete[::-1])
    assert paper_splits(shuffled) == splits
    lines = csv.DictReader(splits_csv(splits).splitlines())
    assert {line["subject_id"]: line["split"] for line in lines} == splits


@pytest.mark.parametrize(("complete", "test"), [(574, 115), (573, 115), (287, 58), (9, 2), (3, 1)])
def test_fewer_subjects_keep_the_papers_share_and_the_text_says_why(complete, test):
    data = subjects(complete)
    splits = paper_splits(data)
    found = [list(splits.values()).count(name) for name in ("train", "validation", "test")]
    assert found == [complete - test, 0, test]
    text = splits_text(data, splits)
    assert ("NOT the paper's 459 and 115" in text) == (complete != 574)
    assert (f"here are {complete} complete ones" in text) == (complete != 574)
    assert "the last checkpoint of each training counts" in text


# --------------------------------------------------------------------------------------------------------------- folder


def test_a_bad_folder_is_one_message_and_nothing_is_written(tmp_path, ixi_tree):
    cases = {"missing": "is not there", "file": "is a file", "empty": "no file has a name of layout ixi"}
    cases |= {"packed": "unpack IXI-PD.tar", "no_pd": "has no pd", "two": "too few subjects"}
    for name in ("empty", "packed"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "packed" / "IXI-PD.tar").touch()
    for name, left_out in (("no_pd", "*-PD.nii.gz"), ("two", "IXI00[4-9]*")):
        shutil.copytree(ixi_tree, tmp_path / name, ignore=shutil.ignore_patterns(left_out))
    for path in (tmp_path / "two").rglob("IXI01*"):
        path.unlink()
    for name, wanted in cases.items():
        with pytest.raises(UserError, match=wanted) as found:
            main(words(tmp_path / name, tmp_path / "out"))
        assert "https://brain-development.org/ixi-dataset" in str(found.value), name
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------- verdict


@pytest.fixture(scope="module")
def verdict():
    """Of the tiny preset, stage 1 in epochs, on a machine that is large enough."""
    config = with_training(tiny(), "vqgan", max_steps=None, epochs=4)
    return judge(config, LARGE, 27, {"train": 6, "validation": 1, "test": 2})


def test_the_verdict_multiplies_the_planners_steps(verdict):
    needs = {need.name: need for need in verdict.needs}
    assert list(needs) == ["vqgan", "encode", "ms-spade", "diffusion", "evaluate"]
    assert not verdict.reasons()
    planned = replace(tiny(), modalities=("t1", "t2", "pd"))
    assert training_of(planned, "vqgan").batch_size == 2
    assert needs["vqgan"].work == "36 steps"  # 6 subjects of 3 volumes in twos, 4 times
    step = plan_memory(planned, "vqgan")
    assert needs["vqgan"].minutes == pytest.approx(36 * step.flops / 1e12 / 60)
    assert needs["vqgan"].plan.peak_bytes == step.peak_bytes
    assert (needs["diffusion"].work, needs["evaluate"].work) == ("4 steps", "18 translations")
    translation = plan_memory(planned, "inference")
    once = translation.flops_of["encode"] + translation.flops_of["decode"]
    assert needs["evaluate"].minutes == pytest.approx(2 * (9 * translation.flops + 3 * once) / 1e12 / 60)
    assert needs["encode"].minutes == pytest.approx(27 * translation.flops_of["encode"] / 1e12 / 60)


def test_what_is_done_and_what_a_lossless_codec_has_not_to_train_is_left_out(verdict):
    rest = frozenset({need.name for need in verdict.needs} - {"vqgan"})
    shared = judge(tiny(), replace(LARGE, num_workers=2), 27, {"train": 6, "test": 2}, rest)
    assert [need.name for need in shared.needs] == ["vqgan"]
    assert shared.needs[0].plan.batch_size == 1
    haar = replace(tiny(), codec=replace(tiny().codec, kind="haar"))
    assert judge(haar, LARGE, 27, {"train": 6, "test": 2}, rest).needs == ()


def short_of(verdict, **values):
    """The same needs on another machine."""
    machine = replace(verdict.machine, **values)
    slower = verdict.machine.flops_per_second / machine.flops_per_second
    needs = tuple(replace(need, minutes=need.minutes * slower) for need in verdict.needs)
    return replace(verdict, machine=machine, needs=needs)


@pytest.mark.parametrize(
    ("short", "reason", "recomputes"),
    [
        ({"memory_bytes": 1e6}, "train diffusion needs 0.", True),
        ({"flops_per_second": 1.0}, "years, wanted 60 days at the most", False),
        ({"disk_bytes": 1e3}, "GiB of disk needed", False),
    ],
)
def test_what_cannot_fit_has_its_reason_and_the_ways_out_that_help(verdict, short, reason, recomputes):
    found = short_of(verdict, **short)
    (text,) = [one for one in found.reasons() if reason in one]
    assert text in found.describe().splitlines()[-1]
    assert "does NOT fit" in found.describe()
    ways = ways_out(tiny(), found)
    assert ("activation_checkpointing=true (train vqgan then needs 0." in ways) == recomputes
    assert "activation_checkpointing" not in ways_out(replace(tiny(), activation_checkpointing=True), found)
    for way in ("--preset small", "a machine with a GPU", "several GPUs", "a cluster", "--anyway"):
        assert way in ways
    assert "a machine with a GPU" not in ways_out(tiny(), short_of(verdict, **short, name="cuda"))


def test_what_cannot_fit_is_refused_before_anything_is_written_unless_anyway(
    tmp_path, ixi_tree, monkeypatch, verdict, capsys
):
    monkeypatch.setattr(reproduce_verdict, "judge", lambda *_: short_of(verdict, disk_bytes=1e3))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"it does not fit here: .* of disk needed, .* Ways out: "):
        main(words(ixi_tree, out))
    assert not out.exists()
    assert "does NOT fit" in capsys.readouterr().out
    assert main(words(ixi_tree, out, "--anyway", "--dry-run")) == 0


def test_a_dry_run_says_everything_and_writes_nothing(tmp_path, ixi_tree, capsys):
    before = sorted(ixi_tree.rglob("*"))
    assert main(words(ixi_tree, tmp_path / "out", "--dry-run")) == 0
    text = capsys.readouterr().out
    assert "9 subjects with t1, t2 and pd" in text
    assert "7 train, 0 validation, 2 test: NOT the paper's 459 and 115" in text
    assert "verdict: it fits" in text
    assert [line.split()[2] for line in text.splitlines() if "$ aldm" in line] == [
        *("prepare", "train", "encode", "train", "train", "export", "evaluate")
    ]
    assert list(tmp_path.iterdir()) == []
    assert sorted(ixi_tree.rglob("*")) == before


# -------------------------------------------------------------------------------------------------------------- command


def test_the_job_wants_a_table_that_it_knows(capsys):
    assert aldm(["reproduce"]) == 2
    assert aldm(["reproduce", "brats"]) == 2
    assert "there is no table 'brats'" in capsys.readouterr().err
    assert aldm(["reproduce", "--help"]) == 0
    assert "ixi" in capsys.readouterr().out


def test_where_it_runs_is_no_part_of_what_a_step_makes(tmp_path):
    parse = reproduce._parser("ixi").parse_args
    common = ["--data", str(tmp_path), "--out", str(tmp_path / "out")]
    here = reproduce.plan_reproduction(parse([*common, "--device", "cpu"]), ixi())
    more = ["--engine", "deepspeed", "--zero-stage", "2", "--num-workers", "1", "--use-gpu", "--autoscaling"]
    there = reproduce.plan_reproduction(parse([*common, *more]), ixi())
    assert [step.line for step in here.values()] == [step.line for step in there.values()]
    for name in ("vqgan", "ms-spade", "diffusion"):
        assert " ".join(more) in there[name].typed
        assert "--engine plain" in here[name].typed
    assert "--engine" not in there["encode"].typed
    secret = parse([*common, "--engine", "ddp", "--storage-path", "s3://me:hidden@bucket/runs"])
    assert "s3://***@bucket/runs" in reproduce.plan_reproduction(secret, ixi())["vqgan"].typed
    assert "s3://me:hidden@bucket/runs" in reproduce.plan_reproduction(secret, ixi())["vqgan"].where
    with pytest.raises(UserError, match="2 workers cannot share batches of 1"):
        main(["ixi", *common, "--engine", "ddp", "--num-workers", "2"])


@pytest.mark.parametrize(
    ("minutes", "text"),
    [
        (0.1, "0.1 to 0.3 min"),
        (7, "7 to 21 min"),
        (60, "1 to 3 h"),
        (90, "1.5 to 4.5 h"),
        (60 * 24 * 20, "20 to 60 days"),
    ],
)
def test_a_time_is_said_in_the_unit_that_suits_it(minutes, text):
    assert span(minutes, 3) == text
    assert span(60 * 24 * 365.25 * 40) == "40 years"
    assert span(90) == "90 min"


# ---------------------------------------------------------------------------------------------------------------- whole


def test_a_run_that_is_not_the_papers_says_so():
    whole = "459 train, 3 validation, 115 test: the paper's sizes"
    assert caveats(ixi(), whole) == ""
    assert caveats(replace(ixi(), preprocess=replace(ixi().preprocess, register="rigid")), whole) == ""
    text = caveats(tiny(), "7 train: NOT the paper's 459 and 115")
    assert text.startswith("Not the paper's experiment (grid: NOT the paper's: 16 x 24 x 16 of 8 x 8 x 8 mm; networks")
    assert "splits" in text
    assert "codec: NOT the paper's: haar" in caveats(small(), whole)
    for changes in ({"max_steps": 100}, {"max_minutes": 5}, {"batch_size": 8}, {"epochs": 799}):
        text = caveats(with_training(ixi(), "diffusion", **changes), whole)
        assert text.startswith(
            "Not the paper's experiment (length: NOT the paper's: stage 1: 500 epochs of batch 1; stage 2"
        )


@pytest.mark.slow
def test_stopped_in_the_middle_it_ends_with_the_same_model(tmp_path, ixi_tree, monkeypatch, capsys):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(words(ixi_tree, whole)) == 0
    first = capsys.readouterr().out

    log = RunFolder.log

    def interrupting(run, record):
        log(run, record)
        if run.path.name == "diffusion" and record["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "log", interrupting)
    assert aldm(["reproduce", *words(ixi_tree, stopped)]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    monkeypatch.setattr(RunFolder, "log", log)
    assert json.loads((stopped / "runs/diffusion/last/training.json").read_text())["step"] == 2
    assert main(words(ixi_tree, stopped)) == 0
    assert capsys.readouterr().out.count("done before") == 4

    models = [json.loads((out / "scores/evaluation.json").read_text())["models"][0]["hash"] for out in (whole, stopped)]
    assert models[0] == models[1]
    assert (whole / "scores/scores.csv").read_bytes() == (stopped / "scores/scores.csv").read_bytes()

    report = (stopped / "report.html").read_text()
    for text in (
        models[0],
        "aldm reproduce ixi",
        "not stripped",
        "NOT the paper&#x27;s: widths of preset tiny",
        "29.49 ± 0.52",
    ):
        assert text in report, text
    for region in ("volume", "foreground"):
        assert verdict_by_hand(whole / "scores/scores.csv", region) in first

    assert main(words(ixi_tree, stopped)) == 0
    again = capsys.readouterr().out
    assert again.count("done before") == 7
    assert "verdict:" not in again
    with pytest.raises(UserError, match=r"made with seed 0, wanted seed 1: .*--overwrite"):
        main(words(ixi_tree, stopped, "--seed", "1"))


def verdict_by_hand(file: Path, region: str) -> str:
    """The sentence on the nine cells, from scores.csv."""
    rows = [row for row in csv.DictReader(file.open()) if row["method"] == "aldm" and row["region"] == region]
    ours = {
        pair: np.mean([float(row["psnr_db"]) for row in rows if (row["source"], row["target"]) == pair])
        for pair in TABLE_D
    }
    paper = {pair: cell[0][0] for pair, cell in TABLE_D.items()}
    mean, theirs = np.mean(list(ours.values())), np.mean(list(paper.values()))
    return (
        f"Mean PSNR of the nine cells over the {region}, 2 subjects: {mean:.2f} dB, the paper's {theirs:.2f} "
        f"({mean - theirs:+.2f}); in 0 of 9 cells ours is at least the paper's, in 0 within its standard deviation."
    )


def test_a_table_like_the_papers_is_said_to_be_like_it():
    """The verdict of the paper's own means is a difference of nothing."""
    from aldm.score_rows import ScoreRow

    rows = [
        ScoreRow("s", "aldm", source, target, "ddim", 200, "volume", *(mean for mean, _ in cell))
        for (source, target), cell in TABLE_D.items()
    ]
    text = verdict_text(cells_of(rows, "volume"), "volume")
    assert "(+0.00); in 9 of 9 cells ours is at least the paper's, in 9 within" in text
