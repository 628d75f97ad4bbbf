"""`ray job submit --working-dir . -- aldm JOB ...` on a cluster that is started for these tests and ended by them."""

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from ray_head import RayHead, Submission, wait_until
from ray_runs import committed, losses

from aldm import cli
from aldm.data.store import VolumeStore

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
CODE = ("aldm", "pipelines", "serve", "tune")
TINY = ("--preset", "tiny", "--device", "cpu")
STEADY = (
    "--set",
    "train_ms_spade.batch_size=2",
    "--set",
    "train_ms_spade.warmup_steps=0",
    "--set",
    "train_ms_spade.decay=constant",
    "--set",
    "train_ms_spade.learning_rate=1e-4",
)
"""A learning rate that does not depend on the length, and too low for differences in rounding to grow."""


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with RayHead(num_cpus=4) as head:
        yield head


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def copy_code(folder: Path) -> Path:
    """A working directory of what the jobs need, quicker to upload than the repository."""
    for package in CODE:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_code(tmp_path_factory.mktemp("code"))


@pytest.fixture
def edited(tmp_path: Path) -> Path:
    """A working directory whose code differs from the installed one: every step is logged, not one in 15 s."""
    folder = copy_code(tmp_path / "edited")
    file = folder / "aldm" / "progress.py"
    text = file.read_text()
    assert text.count("LOG_INTERVAL_S = 15.0") == 1
    file.write_text(text.replace("LOG_INTERVAL_S = 15.0", "LOG_INTERVAL_S = 0.0"))
    return folder


def job_processes(head: RayHead) -> list[list[str]]:
    """Return the command lines of the drivers, controllers and workers of trainings that run on the cluster."""
    found = []
    for process in head.processes():
        try:
            line = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if {"train", "ms-spade"} <= set(line) or "RayTrainWorker" in line[0] or "TrainController" in line[0]:
            found.append(line)
    return found


def metrics(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_a_submitted_training_is_stopped_and_resumed(
    head: RayHead, haar_latents: Path, edited: Path, tmp_path: Path
) -> None:
    """Its logs stream, the uploaded code is what runs, and what it goes on with is its last checkpoint."""
    folder = tmp_path / "run"
    words = ("aldm", "train", "ms-spade", "--latents", haar_latents, "--run-dir", folder, *TINY, *STEADY)
    endless = ("--max-steps", 10_000, "--set", "train_ms_spade.checkpoint_every=1", "--num-workers", 2)
    submission = head.submit("first", edited, *words, *endless)
    step = re.compile(r"RayTrainWorker pid=\d+.* ms-spade: \d+/10000 step,")
    wait_until(lambda: committed(folder) and step.search(submission.output), submission)
    assert f"training ms-spade in {folder} on Ray, workers: 2" in submission.output
    assert job_processes(head)

    stopped = head.job("stop", "first")
    assert stopped.returncode == 0, stopped.stdout
    assert submission.wait() == 0, submission.output
    assert "Job 'first' was stopped" in submission.output
    deadline = time.monotonic() + 180
    while job_processes(head):
        assert time.monotonic() < deadline, job_processes(head)
        time.sleep(0.1)

    from mlflow import MlflowClient  # seconds to import

    run_of = json.loads((folder / "mlflow.json").read_text())
    client = MlflowClient(tracking_uri=run_of["tracking_uri"])
    assert client.get_run(run_of["run_id"]).info.status == "KILLED", submission.output

    last = committed(folder)
    assert last
    kept = [line for line in metrics(folder) if json.loads(line)["step"] <= last]
    length = ("--max-steps", last + 4, "--set", "train_ms_spade.checkpoint_every=100")
    submission = head.submit("second", ROOT, *words, *length, "--resume")
    assert submission.wait() == 0, submission.output
    assert f"ms-spade: {last + 4} steps" in submission.output
    assert metrics(folder)[: len(kept)] == kept, "steps before the last checkpoint were computed again"
    plain = tmp_path / "plain"
    assert run(*words[1:5], "--run-dir", plain, "--no-tracking", *TINY, *STEADY, *length, "--engine", "plain") == 0
    reference = losses(plain)
    assert list(losses(folder)) == list(reference) == list(range(1, last + 5))
    np.testing.assert_allclose(list(losses(folder).values()), list(reference.values()), rtol=1e-4)


def test_a_submitted_encoding_writes_the_same_bytes(
    head: RayHead, code: Path, brats_store: VolumeStore, haar_latents: Path, tmp_path: Path
) -> None:
    """Preparing and evaluating on workers, which is done the same way, is in test_ray_pool.py."""
    out = tmp_path / "haar"
    words = ("aldm", "encode", "--store", brats_store.path, "--codec", "haar", "--out", out, *TINY)
    submission = head.submit("encode", code, *words, "--num-workers", 2)
    assert submission.wait() == 0, submission.output
    assert f"{out}: latents of 9 subjects" in submission.output
    files = sorted(path.relative_to(haar_latents) for path in haar_latents.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert [name for name in files if (out / name).read_bytes() != (haar_latents / name).read_bytes()] == []


def test_a_submitted_sweep_leaves_its_results(
    head: RayHead, code: Path, haar_latents: Path, stage_2: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    words = ("aldm", "tune", "--latents", haar_latents, "--ms-spade", stage_2, "--out", out, *TINY, "--num-trials", 1)
    flags = ("--objectives", "regression", "--scheduler", "none", "--max-steps", 2)
    submission = head.submit("tune", code, *words, *flags)
    assert submission.wait() == 0, submission.output
    assert "tune: 1 trial (1 measured)" in submission.output
    assert {"best.yaml", "pareto.png", "trials.csv", "trials.md"} <= {path.name for path in out.iterdir()}


def test_a_refusal_is_in_the_logs_of_a_job_that_failed(
    head: RayHead, code: Path, haar_latents: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    words = ("aldm", "train", "ms-spade", "--latents", haar_latents, "--run-dir", folder, *TINY)
    too_many = ("--set", "train_ms_spade.batch_size=64", "--num-workers", 64)
    submission = head.submit("refused", code, *words, *too_many)
    assert submission.wait() == 1
    assert "aldm train: --num-workers 64 is more than the 4 CPUs of this Ray cluster" in submission.output
    assert "Traceback" not in submission.output
    assert "Job 'refused' failed" in submission.output
    assert "failed with exit code 2" in submission.output
    assert not folder.exists()


def test_nobody_without_the_token_submits(head: RayHead) -> None:
    stranger = {**head.environment, "RAY_AUTH_MODE": "disabled"}
    submission = Submission(["ray", "job", "submit", "--no-wait", "--", "true"], stranger)
    assert submission.wait() != 0
    assert "401" in submission.output or "Unauthorized" in submission.output, submission.output


def test_ending_the_head_leaves_nothing(head: RayHead) -> None:
    """The last test of the module: what the jobs before have started is ended with the head node."""
    assert head.listening() == set(head.ports.values())
    assert len(head.processes()) > 10
    assert head.end() == []
    assert head.listening() == set()
