"""aldm benchmark: what it runs, that it goes on, and that its table is what the scores say."""

import contextlib
import csv
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from jobs import run_here
from scipy import stats

from aldm.baselines.methods import method_network
from aldm.cli import main
from aldm.data.store import VolumeStore
from aldm.presets import small, tiny
from aldm.score_rows import REFERENCES, ScoreRow, write_csv
from pipelines.benchmark_plan import BENCHMARKED, MethodsBenchmark, check_methods, plan_entry
from pipelines.benchmark_run import finished
from pipelines.benchmark_table import interval, methods_table, read_benchmark_scores

PAIR = ("--source", "t1", "--target", "t2")
BUDGET = 0.1
"""Minutes of a training that is stopped in the middle."""
STEPWISE = ("--set", "train_unet.checkpoint_every=5", "--set", "train_unet.log_every=1")


def benchmark_of(tmp_path: Path) -> MethodsBenchmark:
    return MethodsBenchmark(
        store=tmp_path / "store",
        fingerprint="",
        out=tmp_path / "out",
        pair=("t1", "t2"),
        minutes=10.0,
        flags=("--preset", "small"),
    )


@pytest.mark.parametrize("method", BENCHMARKED)
@pytest.mark.parametrize("config", [small(), tiny()], ids=["haar", "vqgan"])
def test_every_method_trains_for_the_same_time(method: str, config, tmp_path: Path) -> None:
    entry = plan_entry(method, 3, benchmark_of(tmp_path), config)
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


def test_the_table_tests_the_first_row_and_says_the_spread_over_seeds() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(20, 2, 8)
    db = {method: base + rng.normal(gain, 1, (3, 8)) for method, gain in (("unet", 3.0), ("pix2pix", 2.0))}
    db |= {"identity": base[None], "reconstruction of unet": base[None] + 20}
    rows = [
        (seed, ScoreRow(f"s{i}", method, "t1", "t2", "", 0, "brain", float(value), 0.1, 0.5))
        for method, values in db.items()
        for seed, own in enumerate(values)
        for i, value in enumerate(own)
    ]
    lines = methods_table(rows, "brain", {}).splitlines()[2:]
    assert lines[0].endswith("| p (Holm, 2 comparisons) | SD over seeds (dB) |")
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[-3:-1]] for line in lines[2:]}
    assert list(cells) == ["reconstruction of unet", "unet", "pix2pix", "identity"]
    means = {method: values.mean(axis=0) for method, values in db.items()}  # one number per subject
    p = {other: stats.wilcoxon(means["unet"] - means[other]).pvalue for other in ("pix2pix", "identity")}
    assert p["identity"] <= p["pix2pix"]
    spread = {method: f"{np.std(db[method].mean(axis=1), ddof=1):.2f}" for method in ("unet", "pix2pix")}
    assert cells["unet"] == ["-", spread["unet"]]
    assert cells["pix2pix"] == [f"{max(2 * p['identity'], p['pix2pix']):.3f}", spread["pix2pix"]]
    assert cells["identity"] == [f"{2 * p['identity']:.3f}", "-"]
    assert cells["reconstruction of unet"] == ["-", "-"]
    assert "SD over seeds" not in methods_table([(seed, row) for seed, row in rows if seed == 0], "brain", {})


def test_rows_that_every_evaluation_repeats_stand_in_the_table_once(tmp_path: Path) -> None:
    entries = [plan_entry("unet", seed, benchmark_of(tmp_path), small()) for seed in (0, 1)]
    for entry in entries:
        (entry.folder / "scores").mkdir(parents=True)
        names = ["own-name", *REFERENCES]
        rows = [ScoreRow("s", name, "t1", "t2", "", 0, "brain", 20.0, 0.1, 0.5) for name in names]
        write_csv(entry.folder / "scores" / "scores.csv", rows)
    found = read_benchmark_scores(entries)
    assert sorted(row.method for _, row in found) == sorted([*REFERENCES, "unet", "unet"])
    assert [seed for seed, row in found if row.method == "unet"] == [0, 1]


def test_finished_is_what_has_run_all_its_commands(tmp_path: Path) -> None:
    """Rows of another version of the code, which no longer has their method, are passed over."""
    plan = partial(plan_entry, benchmark=benchmark_of(tmp_path), config=small())
    lines = {name: [" ".join(command) for command in plan(name, 1).commands()] for name in ("unet", "pix2pix")}
    for name, done in {"unet": lines["unet"], "pix2pix": lines["pix2pix"][:-1], "gone": []}.items():
        folder = tmp_path / "out" / name / "seed-1"
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps({"done": dict.fromkeys(done)}))
    assert finished(tmp_path / "out", BENCHMARKED, plan) == [plan("unet", 1)]


@pytest.mark.slow
def test_it_goes_on_and_its_table_is_what_the_scores_say(
    ixi_store: VolumeStore, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of the first method are processes of their own, those of the second run here."""
    words = ["benchmark", "--store", str(ixi_store.path), "--out", str(tmp_path / "out"), *PAIR, "--preset", "tiny"]
    words += ["--budget", "0.03"]
    assert main([*words, "--methods", "pix2pix"]) == 0
    record = tmp_path / "out" / "pix2pix" / "seed-0" / "record.json"
    before = record.read_bytes()
    seconds = json.loads(before)["done"]
    assert all(each["peak_bytes"] > 10**8 for each in seconds.values())
    monkeypatch.setattr("pipelines.benchmark_run.run_bound", run_here)
    assert main([*words, "--methods", "aldm-regression"]) == 0
    assert record.read_bytes() == before  # nothing of it ran again
    own = tmp_path / "out" / "aldm-regression" / "seed-0" / "record.json"
    done = json.loads(own.read_text())["done"]
    assert [line.split()[0] for line in done] == ["train", "encode", "train", "train", "export", "evaluate"]
    with (tmp_path / "out" / "scores.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["region"] == "volume"]
    values = defaultdict(list)
    for row in rows:
        values[row["method"]].append(float(row["psnr_db"]))
    codec = "reconstruction of aldm-regression"
    assert set(values) == {*REFERENCES, "pix2pix", "aldm-regression", codec}
    page = (tmp_path / "out" / "benchmark.md").read_text()
    for method, numbers in values.items():
        assert f"| {method} | {np.mean(numbers):.2f}" in page
    parameters = sum(
        each.numel() for each in method_network(replace(tiny(), pair=("t1", "t2")), "pix2pix").parameters()
    )
    cells = next(line for line in page.splitlines() if "| pix2pix |" in line).split("|")
    (took,) = (each for line, each in seconds.items() if line.startswith("train"))
    assert cells[5].strip() == f"{parameters:,}"
    metrics = (record.parent / "pix2pix" / "metrics.jsonl").read_text().splitlines()
    elapsed = max(json.loads(line).get("elapsed_s", 0.0) for line in metrics)
    assert 0 < elapsed < took["seconds"]
    assert cells[7].strip() == f"{elapsed / 60:.1f}"
    assert cells[9].strip() == f"{took['peak_bytes'] / 1e9:.2f}"
    assert (tmp_path / "out" / "methods.png").stat().st_size > 10_000
    from mlflow import MlflowClient  # seconds to import

    client = MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert len({run.data.tags["mlflow.parentRunId"] for run in runs if "mlflow.parentRunId" in run.data.tags}) == 1
    assert sum("mlflow.parentRunId" not in run.data.tags for run in runs) == 1
    line = next(line for line in done if line.startswith("encode"))
    own.write_text(json.dumps({"done": {name: each for name, each in done.items() if name != line}}))
    assert main([*words, "--methods", "aldm-regression"]) == 0  # stopped after it had ended and before that was noted
    assert line in json.loads(own.read_text())["done"]
    capsys.readouterr()
    assert main([*words[:-1], "1", "--methods", "pix2pix"]) == 2
    assert "holds a benchmark with other settings" in capsys.readouterr().err


def long_one(store: VolumeStore, out: Path, *flags: str) -> list[str]:
    """A benchmark whose trainings are long enough to be stopped in the middle."""
    words = ["benchmark", "--store", str(store.path), "--out", str(out), *PAIR, "--preset", "tiny", *flags]
    return [*words, *STEPWISE, "--budget", str(BUDGET)]


def start(words: list[str]) -> "subprocess.Popen[str]":
    """Start a benchmark in a process of its own."""
    own = [sys.executable, "-m", "aldm.cli", *words]
    return subprocess.Popen(own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < until
        time.sleep(0.1)


def trainings_in(out: Path) -> list[psutil.Process]:
    """The trainings that run into a benchmark's folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "pipelines.bound" in words and any(word.startswith(str(out)) for word in words):
                found.append(process)
    return found


def stopped(store: VolumeStore, out: Path, stop: signal.Signals, code: int, *flags: str) -> None:
    """Stop a benchmark in the middle of its training: nothing of it stays, and there is no table."""
    first = start(long_one(store, out, "--methods", "unet", *flags))
    wait_for(lambda: (out / "unet" / "seed-0" / "unet" / "last").exists(), first)
    first.send_signal(stop)
    assert first.wait(90) == code
    psutil.wait_procs(trainings_in(out), timeout=60)
    assert trainings_in(out) == []
    assert not (out / "benchmark.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "stop", "code"),
    [(0, signal.SIGKILL, -9), (2, signal.SIGINT, 130)],
    ids=["killed", "interrupted on Ray"],
)
def test_stopped_it_leaves_nothing_running_and_goes_on(
    workers: int,
    stop: signal.Signals,
    code: int,
    ixi_store: VolumeStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Going on, workers share it with another method; without workers the commands run here."""
    flags = ("--num-workers", str(workers)) if workers else ()
    methods = ("unet", "reggan") if workers else ("unet",)
    out = tmp_path / "out"
    run = out / "unet" / "seed-0" / "unet"
    stopped(ixi_store, out, stop, code, *flags)
    words = long_one(ixi_store, out, "--methods", *methods, *flags)
    if workers:
        second = start(words)
        text, _ = second.communicate(timeout=480)
        assert second.returncode == 0, text
    else:
        monkeypatch.setattr("pipelines.benchmark_run.run_bound", run_here)
        assert main(words) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if "elapsed_s" in record]
    assert steps == sorted(set(steps)), "a step twice"
    assert len(json.loads((run / "run.json").read_text())["starts"]) == 2
    elapsed_s = [record["elapsed_s"] for record in records if "elapsed_s" in record]
    assert elapsed_s == sorted(elapsed_s), "the time started again"
    assert elapsed_s[-2] < BUDGET * 60, "a step began after the end of the time"
    cells = next(line for line in (out / "benchmark.md").read_text().splitlines() if "| unet |" in line).split("|")
    assert cells[6].strip() == f"{steps[-1] * tiny().train_unet.batch_size:,}"
    for method in methods:
        assert (out / method / "seed-0" / "scores" / "scores.csv").is_file()
        assert f"| {method} |" in (out / "benchmark.md").read_text()


def test_what_makes_no_sense_is_refused(ixi_store: VolumeStore, tmp_path: Path, capsys) -> None:
    words = ["benchmark", "--store", str(ixi_store.path), "--out", str(tmp_path / "out"), "--preset", "tiny"]
    cases = [
        ([*PAIR, "--methods", "pix3pix"], "unknown pix3pix; known are unet, pix2pix"),
        ([*PAIR, "--methods", "unet", "unet"], "names a method twice"),
        ([*PAIR, "--budget", "0"], "--budget is 0.0"),
        ([*PAIR, "--seeds", "0"], "--seeds is 0"),
        (["--source", "t1", "--target", "t1"], "two different modalities"),
        (["--source", "t1", "--target", "flair"], "flair"),
        (["--source", "t1"], "give the pair to translate, --source and --target, or --codecs"),
        ([*PAIR, "--codecs"], "leave out --source, --target"),
        (["--codecs", "vqvae"], "unknown vqvae; known are haar-vqgan, haar-vqgan-fsq, vqgan, vqgan-fsq"),
        (["--codecs", "vqgan", "vqgan"], "names a codec twice"),
        (["--codecs", "haar-vqgan", "--set", "codec.haar_levels=3"], "use at most 2 Haar levels"),
        (["--codecs", "vqgan", "--set", "codec.channels=[8,8,8,8,8]"], "multiples of 16; pad it to"),
    ]
    for flags, message in cases:
        assert main([*words, *flags]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, *PAIR, "--dry-run"]) == 0
    assert "aldm train resvit-cnn" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    check_methods(BENCHMARKED)
