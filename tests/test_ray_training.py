"""`aldm train` on Ray Train, as its user runs it: workers that share the batch, die, and go on."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from ray_runs import command_of, committed, lines_until, losses, wait_for_end

from aldm import cli
from aldm.checkpoint import load_checkpoint
from aldm.data.store import VolumeStore
from pipelines.ray_worker import scratch_prefix

TINY = ("--preset", "tiny", "--device", "cpu", "--log-level", "warning")
BATCH = ("--set", "train_ms_spade.batch_size=2")
STEADY = ("--set", "train_ms_spade.warmup_steps=0", "--set", "train_ms_spade.decay=constant")
"""A learning rate that does not depend on the length of the training."""
SLOW = ("--set", "train_ms_spade.learning_rate=0.0001")
"""Rounding differs between one worker and two; with large steps it would grow."""
LONG = (
    *STEADY,
    *SLOW,
    "--max-steps",
    16,
    "--set",
    "train_ms_spade.checkpoint_every=4",
    "--set",
    "train_ms_spade.validate_every=8",
)


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def assert_same_curve(folder: Path, reference: dict[int, float]) -> None:
    got = losses(folder)
    assert list(got) == list(reference)
    np.testing.assert_allclose(list(got.values()), list(reference.values()), rtol=1e-4)


@pytest.fixture(scope="module")
def reference(haar_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The loss curve of one process that nothing disturbs."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    assert run(*train(haar_latents, folder), *LONG, "--engine", "plain") == 0
    return losses(folder)


def train(latents: Path, folder: Path) -> tuple[object, ...]:
    return ("train", "ms-spade", "--latents", latents, "--run-dir", folder, *TINY, "--no-tracking", *BATCH)


@pytest.mark.slow
def test_the_job_trains_resumes_and_leaves_a_plain_run_folder(
    ray_cluster: None, haar_latents: Path, reference: dict[int, float], tmp_path: Path
) -> None:
    """Two workers; stopped after 8 steps and resumed by one worker it is the curve of one process.

    The score so far is made one that is never reached again: the best checkpoint has to stay. DeepSpeed's resuming is
    in test_distributed_engines.py and, through the command line, below.
    """
    words = (*train(haar_latents, tmp_path / "run"), "--engine", "ddp")
    assert run(*words, *LONG, "--max-steps", 8, "--num-workers", 2, "--keep-checkpoints", 1) == 0
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert "step-00000008" in kept
    assert len(kept) <= 2  # the best one and the last one
    state = tmp_path / "run" / "checkpoints" / "step-00000008" / "training.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"best": 1000.0}))
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    best = load_checkpoint(tmp_path / "run" / "best").hash
    assert best == load_checkpoint(tmp_path / "run" / "last").hash
    left = Path(tempfile.mkdtemp(prefix=scratch_prefix(tmp_path / "run")))  # by a worker killed in writing
    assert run(*words, *LONG, "--resume") == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(before), "it started over"
    assert load_checkpoint(tmp_path / "run" / "best").hash == best
    assert load_checkpoint(tmp_path / "run" / "last").meta["training"]["step"] == 16
    assert not list(left.parent.glob(f"{scratch_prefix(tmp_path / 'run')}*"))
    assert_same_curve(tmp_path / "run", reference)
    for name in ("best", "last"):
        load_checkpoint(tmp_path / "run" / name, "ms-spade")
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert [start["engine"] for start in starts] == ["ddp", "ddp"]


def workers_below(process: psutil.Process) -> list[psutil.Process]:
    """Return the Ray Train workers that a process has started."""
    found = [child for child in process.children(recursive=True) if "RayTrainWorker" in " ".join(command_of(child))]
    forks = {child for one in found for child in children_of(one)}  # they have the title of their parent at first
    return [child for child in found if child not in forks]


def children_of(process: psutil.Process) -> list[psutil.Process]:
    """Return a process's children; none if it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children()
    return []


def when(condition: Callable[[], bool], action: Callable[[], None], timeout_s: float = 300) -> threading.Thread:
    """Start a thread that acts once the condition holds."""

    def watch() -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if condition():
                action()
                return
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(
    ray_cluster: None, brats_store: VolumeStore, haar_latents: Path, reference: dict[int, float], tmp_path: Path
) -> None:
    """SIGKILL to a worker in mid-training; elastic, so that one or two workers may go on.

    With DeepSpeed, whose checkpoint is in pieces; a new group of DDP goes on from its checkpoint in the test above.
    """
    folder = tmp_path / "run"
    kept: list[list[str]] = []

    def kill() -> None:
        victim = workers_below(psutil.Process())[-1]
        kept.append(lines_until(folder, committed(folder)))
        victim.kill()

    watcher = when(lambda: committed(folder) >= 8, kill)
    words = [word for word in train(haar_latents, folder) if word != "--no-tracking"]
    assert run(*words, *LONG, "--engine", "deepspeed", "--num-workers", "1:2", "--max-failures", 1) == 0
    watcher.join(timeout=10)
    assert kept, "the training was over before the worker could be killed"
    assert lines_until(folder, 16)[: len(kept[0])] == kept[0], "it went back further than to the last checkpoint"
    assert_same_curve(folder, reference)
    assert_best_is_kept(folder)
    assert_one_tracked_run(folder, brats_store.fingerprint)


def assert_best_is_kept(folder: Path) -> None:
    """best/ is of the step that was validated best."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = {record["step"]: record["validation/psnr_db"] for record in records if "validation/psnr_db" in record}
    assert set(scores) == {8, 16}
    best = max(scores, key=lambda step: scores[step])
    assert load_checkpoint(folder / "best").meta["training"]["step"] == best


def assert_one_tracked_run(folder: Path, fingerprint: str) -> None:
    """One MLflow run, nested in one parent, that has every step of metrics.jsonl once."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("aldm")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {folder.parent.name, "run"}
    child = runs["run"]
    assert child.data.tags["mlflow.parentRunId"] == runs[folder.parent.name].info.run_id
    assert child.info.status == "FINISHED"
    assert child.data.tags["input.store_fingerprint"] == fingerprint
    assert child.data.params["train_ms_spade.batch_size"] == "2"
    history = client.get_metric_history(child.info.run_id, "ms-spade/loss")
    assert sorted((metric.step, metric.value) for metric in history) == sorted(losses(folder).items())
    assert {file.path for file in client.list_artifacts(child.info.run_id, "panels")} == {
        "panels/step-00000008.png",
        "panels/step-00000016.png",
    }


def test_a_tracking_server_that_does_not_answer_is_an_error_at_the_start(
    haar_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    words = [word for word in train(haar_latents, tmp_path / "run") if word != "--no-tracking"]
    message = refused(capsys, *words, "--engine", "plain")
    assert "MLflow at http://127.0.0.1:9 cannot be used" in message
    assert not (tmp_path / "run").exists()


@pytest.fixture
def driver(haar_latents: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A training in a process that starts Ray by itself."""
    words = [word for word in train(haar_latents, tmp_path / "run") if word != "--no-tracking"]
    words += [*LONG, "--num-workers", 2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "aldm.cli", *map(str, words)], env=environment)
    yield process
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for each in (process, *children):
        each.kill()
    process.wait()


@pytest.mark.slow
def test_an_interrupted_driver_leaves_nothing_running_and_a_checkpoint(
    driver: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """What goes on from it goes on as after SIGKILL, below; SIGTERM is in test_job_submit.py."""
    folder = tmp_path / "run"
    step = stop(driver, folder, signal.SIGINT, 130)
    assert status_of(folder) == "KILLED"
    (checkpoint,) = (folder / "checkpoints").glob(f"step-{step:08d}")
    assert load_checkpoint(checkpoint, "ms-spade").meta["training"]["step"] == step
    assert [json.loads(line)["step"] for line in lines_until(folder, step) if "ms-spade/loss" in line][-1] == step


@pytest.mark.slow
@pytest.mark.smoke
def test_a_killed_driver_leaves_nothing_running_and_the_run_goes_on(
    driver: subprocess.Popen[bytes], ray_cluster: None, haar_latents: Path, reference: dict[int, float], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    stop(driver, folder, signal.SIGKILL, -9)
    assert status_of(folder) == "RUNNING"
    kept = lines_until(folder, committed(folder))
    words = [word for word in train(haar_latents, folder) if word != "--no-tracking"]
    assert run(*words, *LONG, "--num-workers", 1, "--resume") == 0
    assert lines_until(folder, 16)[: len(kept)] == kept, "it went back further than to the last checkpoint"
    assert_same_curve(folder, reference)
    assert_best_is_kept(folder)
    assert status_of(folder) == "FINISHED"


def stop(driver: subprocess.Popen[bytes], folder: Path, number: signal.Signals, code: int) -> int:
    """Send the driver a signal after its first checkpoint, see all that it started end, and return its last step."""
    deadline = time.monotonic() + 300
    while not committed(folder):
        assert driver.poll() is None, "the training ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = psutil.Process(driver.pid).children(recursive=True)
    driver.send_signal(number)
    assert driver.wait(timeout=180) == code
    wait_for_end(started, killed=number == signal.SIGKILL)
    return committed(folder)


def status_of(folder: Path) -> str:
    """Return the status of a training's MLflow run."""
    from mlflow import MlflowClient

    record = json.loads((folder / "mlflow.json").read_text())
    return str(MlflowClient(tracking_uri=record["tracking_uri"]).get_run(record["run_id"]).info.status)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Return the one message of a job that is refused."""
    capsys.readouterr()
    assert run(*words) == cli.EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num-workers", 64, "--set", "train_ms_spade.batch_size=64"), "--num-workers 64 is more than the 4 CPUs"),
        (("--use-gpu", "--device", "auto"), "--use-gpu with --num-workers 1 needs 1 GPUs, this Ray cluster has 0"),
        (("--num-workers", 3), "3 workers cannot share batches of 2 evenly"),
        (("--num-workers", "1:3"), "3 workers cannot share batches of 2 evenly"),
        (("--num-workers", "two"), "--num-workers 'two' is neither a number nor MIN:MAX"),
        (("--num-workers", "2:1"), "MIN not above MAX"),
        (("--max-failures", -1), "--max-failures is -1"),
        (("--storage-path", "/proc/aldm"), "--storage-path /proc/aldm cannot be reached or written"),
        (("--storage-path", "nowhere://x"), "--storage-path nowhere://x cannot be reached or written"),
        (("--storage-path", "abfs://"), "--storage-path abfs:// cannot be reached or written"),
    ],
    ids=str,
)
def test_what_the_cluster_cannot_do_is_refused_and_nothing_is_written(
    ray_cluster: None,
    haar_latents: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[object, ...],
    message: str,
) -> None:
    assert message in refused(capsys, *train(haar_latents, tmp_path / "run"), *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_is_not_lost_by_a_wrong_resume_or_a_name_used_twice(
    ray_cluster: None, haar_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*train(haar_latents, tmp_path / "run"), "--storage-path", tmp_path / "storage")
    assert "cannot be reached" not in refused(capsys, *words, "--num-workers", 3)
    (tmp_path / "storage").mkdir()
    assert run(*words) == 0
    kept = sorted(path.name for path in (tmp_path / "storage" / "run").glob("step-*"))
    assert kept == ["step-00000002", "step-00000004"]
    before = losses(tmp_path / "run")
    other = refused(capsys, *words, "--resume", "--set", "ms_spade.hidden_channels=8")
    assert "another configuration (ms_spade.hidden_channels was 4, now 8)" in other
    assert "--engine plain" in refused(capsys, *words[:-2], "--resume", "--engine", "plain")
    longer = ("--resume", "--max-steps", 6)
    message = f"no --storage-path: {tmp_path}/run keeps what it goes on from in {tmp_path}/storage; resume with"
    assert message in refused(capsys, *words[:-2], *longer)
    (tmp_path / "empty").mkdir()
    assert f"--storage-path {tmp_path}/storage" in refused(capsys, *words[:-1], tmp_path / "empty", *longer)
    (tmp_path / "storage" / "run").rename(tmp_path / "moved")
    assert "holds no checkpoint of" in refused(capsys, *words, *longer)
    (tmp_path / "moved").rename(tmp_path / "storage" / "run")
    assert list((tmp_path / "empty").iterdir()) == []
    twin = (*train(haar_latents, tmp_path / "twin" / "run"), "--storage-path", tmp_path / "storage")
    (tmp_path / "twin").mkdir()
    assert "holds a run named run already" in refused(capsys, *twin)
    assert not (tmp_path / "twin" / "run").exists()
    assert losses(tmp_path / "run") == before
    assert sorted(path.name for path in (tmp_path / "storage" / "run").glob("step-*")) == kept


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_and_is_not_tried_again(
    ray_cluster: None, haar_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A learning rate that blows up: one message, no restart although restarts are allowed."""
    seen: set[int] = set()
    over = threading.Event()

    def look() -> bool:
        seen.update(worker.pid for worker in workers_below(psutil.Process()))
        return over.is_set()

    watcher = when(look, lambda: None)
    flags = ("--set", "train_ms_spade.learning_rate=1e30", *STEADY, "--max-steps", 50)
    words = [word for word in train(haar_latents, tmp_path / "run") if word != "--no-tracking"]
    message = refused(capsys, *words, *flags, "--num-workers", 2, "--max-failures", 3)
    over.set()
    watcher.join()
    assert "the step was not taken" in message
    assert "ms-spade" in message
    assert len(seen) == 2, "it was tried again"
    assert status_of(tmp_path / "run") == "FAILED"
