"""aldm benchmark: what it runs, that it goes on, and that its table is what the scores say."""

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from aldm.cli import main
from aldm.data.store import VolumeStore
from aldm.presets import small, tiny
from pipelines.benchmark_plan import BENCHMARKED, Contest, check_methods, plan_entry
from pipelines.benchmark_table import interval

PAIR = ("--source", "t1", "--target", "t2")


def contest_of(tmp_path: Path) -> Contest:
    return Contest(tmp_path / "store", tmp_path / "out", ("t1", "t2"), 10.0, ("--preset", "small"))


@pytest.mark.parametrize("method", BENCHMARKED)
@pytest.mark.parametrize("config", [small(), tiny()], ids=["haar", "vqgan"])
def test_every_method_trains_for_the_same_time(method: str, config, tmp_path: Path) -> None:
    entry = plan_entry(method, 3, contest_of(tmp_path), config)
    minutes = [float(command[command.index("--max-minutes") + 1]) for command in entry.trainings]
    assert sum(minutes) == pytest.approx(10, rel=1e-3)
    for command in entry.trainings:
        assert command[command.index("--seed") + 1] == "3"
        one_pair = "--source" in command
        assert one_pair == (not method.endswith("-all-pairs") and command[1] != "vqgan")
    kinds = [command[0] for command in entry.commands()]
    assert kinds[-2:] == ["export", "evaluate"]
    if method.startswith("aldm"):
        first = "train" if config.codec.kind == "vqgan" else "encode"
        assert kinds[0] == first
        assert kinds.count("encode") == 1


def test_the_interval_is_that_of_a_t_test() -> None:
    values = [20.0, 21.5, 19.0, 22.0]
    mean, half = interval(values)
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose((mean - half, mean + half), (wanted.low, wanted.high))
    assert np.isnan(interval([1.0])[1])


@pytest.mark.slow
def test_it_goes_on_and_its_table_is_what_the_scores_say(ixi_store: VolumeStore, tmp_path: Path, capsys) -> None:
    words = ["benchmark", "--store", str(ixi_store.path), "--out", str(tmp_path / "out"), *PAIR, "--preset", "tiny"]
    words += ["--budget", "0.03"]
    assert main([*words, "--methods", "pix2pix"]) == 0
    record = tmp_path / "out" / "pix2pix" / "seed-0" / "record.json"
    before = record.read_bytes()
    assert main([*words, "--methods", "pix2pix", "aldm-regression"]) == 0
    assert record.read_bytes() == before  # nothing of it ran again
    done = json.loads((tmp_path / "out" / "aldm-regression" / "seed-0" / "record.json").read_text())["done"]
    assert [line.split()[0] for line in done] == ["train", "encode", "train", "train", "export", "evaluate"]
    assert all(each["peak_bytes"] > 10**8 for each in done.values())
    with (tmp_path / "out" / "scores.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["region"] == "volume"]
    values = defaultdict(list)
    for row in rows:
        values[row["method"]].append(float(row["psnr_db"]))
    assert set(values) == {"identity", "training-mean", "pix2pix", "aldm-regression"}
    page = (tmp_path / "out" / "benchmark.md").read_text()
    for method, numbers in values.items():
        assert f"| {method} | {np.mean(numbers):.2f}" in page
    assert (tmp_path / "out" / "methods.png").stat().st_size > 10_000
    capsys.readouterr()
    assert main([*words[:-1], "1", "--methods", "pix2pix"]) == 2
    assert "holds a benchmark with other settings" in capsys.readouterr().err


def test_what_makes_no_sense_is_refused(ixi_store: VolumeStore, tmp_path: Path, capsys) -> None:
    words = ["benchmark", "--store", str(ixi_store.path), "--out", str(tmp_path / "out"), "--preset", "tiny"]
    cases = [
        ([*PAIR, "--methods", "pix3pix"], "unknown pix3pix; known are unet, pix2pix"),
        ([*PAIR, "--methods", "unet", "unet"], "names a method twice"),
        ([*PAIR, "--budget", "0"], "--budget is 0.0"),
        ([*PAIR, "--seeds", "0"], "--seeds is 0"),
        (["--source", "t1", "--target", "t1"], "two different modalities"),
        (["--source", "t1", "--target", "flair"], "flair"),
    ]
    for flags, message in cases:
        assert main([*words, *flags]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, *PAIR, "--dry-run"]) == 0
    assert "aldm train resvit-cnn" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    check_methods(BENCHMARKED)
