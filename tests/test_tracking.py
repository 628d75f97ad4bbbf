"""MLflow runs of trainings and evaluations, against a real SQLite store and a real tracking server that is killed."""

import csv
import http.server
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from untrained import save_untrained

from aldm import cli
from aldm.data.store import VolumeStore
from aldm.errors import UserError
from aldm.pictures import save_training_panel
from aldm.presets import tiny
from aldm.run_folder import git_state
from pipelines import outbox, tracking
from pipelines.evaluation_tracking import log_evaluation
from pipelines.outbox import Outbox
from pipelines.tracking import RECORD_FILE, Tracker, discard, mark
from pipelines.tracking_server import check_server, connect, tracking_uri
from pipelines.train import parse
from pipelines.training_logs import group_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

INPUTS = {"store": "/data/store", "store_fingerprint": "abc123"}


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def store_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite store to copy: making one takes seconds."""
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    connect(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="module")
def runs(store_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs beside a store."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copy(store_file, folder)
    return folder


@pytest.fixture
def run_dir(runs: Path, request: pytest.FixtureRequest) -> Path:
    folder = runs / request.node.name
    folder.mkdir()
    return folder


def opened(run_dir: Path, **changes: Any) -> Tracker:
    arguments: dict[str, Any] = {"stage": "vqgan", "config": tiny(), "inputs": INPUTS, "group": "all"} | changes
    return Tracker.open(run_dir, **arguments)


def fail(run_dir: Path, numbers: range, error: type[BaseException], **changes: Any) -> None:
    with opened(run_dir, **changes) as tracker:
        for step in numbers:
            tracker.log({"step": step, "loss": 1 / step})
        raise error


def found(run_dir: Path) -> "tuple[MlflowClient, Run]":
    record = json.loads((run_dir / RECORD_FILE).read_text())
    client = connect(record["tracking_uri"])
    return client, client.get_run(record["run_id"])


def steps(run_dir: Path, name: str) -> list[int]:
    client, run = found(run_dir)
    return sorted(metric.step for metric in client.get_metric_history(run.info.run_id, name))


def until(condition: Callable[[], bool], limit_s: float) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


# ---------------------------------------------------------------------------------------------------------- one run


def test_a_run_holds_configuration_metrics_panels_and_where_it_comes_from(run_dir: Path) -> None:
    panel = {"volume": torch.rand(6, 8, 5), "reconstruction": torch.rand(6, 8, 5, dtype=torch.bfloat16)}
    with opened(run_dir) as tracker:
        tracker.log({"step": 1, "codec/loss": 0.5, "learning_rate": 1e-4, "nothing": None, "broken": float("nan")})
        tracker.log({"step": 2, "codec/loss": torch.tensor(0.1).item(), "endless": float("inf")})
        tracker.log({"step": 2, "validation/psnr_db": 21})
        tracker.panel(2, panel)
    client, run = found(run_dir)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == run_dir.name
    assert run.data.params["codec.kind"] == tiny().codec.kind
    assert run.data.params["train_vqgan.learning_rate"] == str(tiny().train_vqgan.learning_rate)
    history = client.get_metric_history(run.info.run_id, "codec/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, torch.tensor(0.1).item())]
    own = {name: value for name, value in run.data.metrics.items() if not name.startswith("system/")}
    assert set(own) == {"codec/loss", "learning_rate", "validation/psnr_db"}
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0
    assert run.data.tags["input.store_fingerprint"] == "abc123"
    assert run.data.tags["stage"] == "vqgan"
    assert run.data.tags.get("mlflow.source.git.commit") == git_state()["git_commit"]
    (artifact,) = client.list_artifacts(run.info.run_id, "panels")
    copy = client.download_artifacts(run.info.run_id, artifact.path)
    assert Path(copy).read_bytes() == (run_dir / "panels" / "step-00000002.png").read_bytes()
    assert run.info.artifact_uri.startswith((run_dir.parent / "mlflow-artifacts").as_uri())
    assert sorted(path.name for path in run_dir.iterdir()) == [RECORD_FILE, "panels"]


def test_a_panel_shows_all_volumes_on_the_scale_of_the_first(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    volume, other = rng.random((6, 8, 5)), rng.random((6, 8, 5))

    def drawn(**volumes: np.ndarray) -> bytes:
        save_training_panel(tmp_path / "panel.png", volumes, "a title")
        return (tmp_path / "panel.png").read_bytes()

    image = drawn(data=volume, prediction=other)
    assert drawn(data=3 * volume - 1, prediction=3 * other - 1) == image
    assert drawn(data=volume, prediction=other / 2) != image
    with pytest.raises(UserError, match="one shape"):
        drawn(data=volume, prediction=other[:3])


@pytest.mark.parametrize(("error", "status"), [(ZeroDivisionError, "FAILED"), (cli.Terminated, "KILLED")])
def test_the_status_says_how_the_training_ended(run_dir: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error):
        fail(run_dir, range(1, 2), error)
    client, run = found(run_dir)
    assert run.info.status == status
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.status == status
    assert steps(run_dir, "loss") == [1]


def test_a_worker_leaves_it_to_the_driver_to_say_how_the_training_failed(run_dir: Path) -> None:
    with pytest.raises(RuntimeError):
        fail(run_dir, range(1, 2), RuntimeError, alone=False)
    assert found(run_dir)[1].info.status == "RUNNING"
    assert steps(run_dir, "loss") == [1]


def test_the_stages_of_a_group_are_children_of_one_parent(run_dir: Path) -> None:
    parents = set()
    for stage in ("vqgan", "ms-spade", "diffusion"):
        folder = run_dir / stage
        folder.mkdir()
        with opened(folder, stage=stage, group="it's one"):
            pass
        client, run = found(folder)
        parents.add(run.data.tags["mlflow.parentRunId"])
    (parent,) = parents
    assert client.get_run(parent).info.run_name == "it's one"
    assert client.get_run(parent).info.status == "FINISHED"
    with opened(run_dir, group=f"{run_dir}/runs"):
        pass
    client, run = found(run_dir)
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.run_name == "runs"
    discard(run_dir)
    with opened(run_dir, group=None):
        pass
    assert "mlflow.parentRunId" not in found(run_dir)[1].data.tags


def test_the_default_group_is_the_whole_path_of_the_folder_around() -> None:
    """On a server that many people share, all of them have a folder runs/."""
    words = ["--latents", "l", "--run-dir", "/nowhere/runs/r1"]
    assert parse("ms-spade", words)[0].group is None
    assert group_of(parse("ms-spade", words)[0]) == "/nowhere/runs"
    assert group_of(parse("ms-spade", [*words, "--group", "mine"])[0]) == "mine"


# ------------------------------------------------------------------------------------------------- restart and resume


def test_a_restart_goes_on_in_the_same_run_and_logs_no_step_twice(run_dir: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail(run_dir, range(1, 8), ZeroDivisionError)
    _, first = found(run_dir)
    longer = replace(tiny(), train_vqgan=replace(tiny().train_vqgan, max_steps=999))
    with opened(run_dir, config=longer) as tracker:
        until(lambda: found(run_dir)[1].info.status == "RUNNING", 60)
        for step in range(5, 11):  # from the checkpoint of step 4
            tracker.log({"step": step, "loss": 1 / step})
            tracker.log({"step": step, "validation/loss": 2.0})
    _, run = found(run_dir)
    assert run.info.run_id == first.info.run_id
    assert run.info.status == "FINISHED"
    assert steps(run_dir, "loss") == list(range(1, 11))
    assert steps(run_dir, "validation/loss") == list(range(5, 11))
    assert {name: value for name, value in run.data.tags.items() if name.startswith("resumed.")} == {
        "resumed.train_vqgan.max_steps": "999"
    }


def test_a_run_that_is_gone_or_discarded_is_not_gone_on_with(
    run_dir: Path, store_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(store_file, tmp_path / "other.db")
    ids = []
    for change in ("none", "deleted", "discarded", "elsewhere"):
        if change == "deleted":
            found(run_dir)[0].delete_run(ids[-1])
        if change == "discarded":
            discard(run_dir)
            assert list(run_dir.iterdir()) == []
        if change == "elsewhere":
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
        with opened(run_dir) as tracker:
            tracker.log({"step": 1, "loss": 0.5})
            tracker.panel(1, {"volume": torch.rand(4, 4, 4)})
        ids.append(found(run_dir)[1].info.run_id)
        assert steps(run_dir, "loss") == [1]
    assert len(set(ids)) == 4
    assert found(run_dir)[1].info.artifact_uri.startswith((tmp_path / "mlflow-artifacts").as_uri())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        opened(run_dir)  # that would be a new run


def test_what_a_killed_process_had_logged_is_sent_at_the_next_start(run_dir: Path) -> None:
    """It is killed with lines in its file that were sent already, some that were not, and half a line."""
    with opened(run_dir) as tracker:
        tracker.log({"step": 1, "loss": 0.5})
    left = [{"step": step, "time": 1000 + step, "metrics": {"loss": 1 / step}} for step in (1, 2, 3)]
    (run_dir / "mlflow-buffer.jsonl").write_text("".join(json.dumps(item) + "\n" for item in left) + '{"step": 4, "ti')
    with opened(run_dir) as tracker:
        tracker.log({"step": 3, "loss": 7.0})
        tracker.log({"step": 4, "loss": 0.25})
    client, run = found(run_dir)
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(1, 0.5), (2, 0.5), (3, 1 / 3), (4, 0.25)]


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_training_whose_process_died_can_be_marked(run_dir: Path, status: str) -> None:
    mark(run_dir, status)  # it had not come to its run yet
    tracker = opened(run_dir)
    until(lambda: not (run_dir / "mlflow-buffer.jsonl").read_text(), 60)
    mark(run_dir, status)
    assert found(run_dir)[1].info.status == status
    tracker.close("FINISHED")


# ------------------------------------------------------------------------------------------------------------ server


class Server:
    """A tracking server in a process group of its own, on a port and a store that outlive it."""

    def __init__(self, folder: Path, store_file: Path) -> None:
        self.folder = folder
        shutil.copy(store_file, folder / "server.db")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", *words],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self.answers, 120)

    def answers(self) -> bool:
        try:
            check_server(self.uri)
        except UserError:
            return False
        return True

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server(store_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"), store_file)
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_a_server_that_is_lost_costs_a_warning_and_nothing_else(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is killed in mid-training, away at the end and at the next start, and comes back in the midst of that."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    monkeypatch.setattr(tracking, "CLOSE_S", 2.0)
    monkeypatch.setattr(outbox, "LONGEST_PAUSE_S", 0.3)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    longest = 0.0

    def log(tracker: Tracker, numbers: range) -> None:
        nonlocal longest
        for step in numbers:
            begin = time.monotonic()
            tracker.log({"step": step, "loss": 1 / step, "learning_rate": 1e-3})
            longest = max(longest, time.monotonic() - begin)
            time.sleep(0.02)

    with caplog.at_level(logging.WARNING):
        tracker = opened(run_dir)
        log(tracker, range(1, 21))
        until(lambda: steps(run_dir, "loss")[-1:] == [20], 60)
        server.kill()
        log(tracker, range(21, 61))
        tracker.panel(60, {"volume": torch.rand(6, 8, 5)})
        until(lambda: "does not take what is logged" in caplog.text, 60)
        time.sleep(1)  # further attempts fail without a word
        tracker.close("FAILED")
        assert caplog.text.count("does not take what is logged") == 1
        assert "sent at the next --resume" in caplog.text
    with opened(run_dir) as tracker:
        log(tracker, range(55, 81))
        server.start()
        log(tracker, range(81, 101))
        until(lambda: steps(run_dir, "loss")[-1:] == [100], 60)
        until(lambda: (run_dir / "mlflow-buffer.jsonl").read_text() == "", 60)
    assert longest < 9  # a request is given up after 10 s
    assert steps(run_dir, "loss") == list(range(1, 101))
    assert steps(run_dir, "learning_rate") == list(range(1, 101))
    client, run = found(run_dir)
    assert run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.info.run_id, "panels")] == ["panels/step-00000060.png"]
    assert not (run_dir / "mlflow-buffer.jsonl").exists()


@pytest.mark.parametrize("kind", ["refuses", "is silent", "is no server", "cannot be written"])
def test_a_server_that_does_not_answer_at_the_start_is_refused_at_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "is silent":
            listener.listen()
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv(
            "MLFLOW_TRACKING_URI",
            {
                "refuses": f"http://127.0.0.1:{listener.getsockname()[1]}",
                "is silent": f"http://127.0.0.1:{listener.getsockname()[1]}",
                "is no server": "postgresql://nobody@127.0.0.1/nothing",
                "cannot be written": "sqlite:////proc/mlflow.db",
            }[kind],
        )
        with pytest.raises(UserError, match="MLflow"):
            check_server(tracking_uri(tmp_path))
        with pytest.raises(UserError, match="MLflow"):
            opened(tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_a_server_in_trouble_is_asked_once_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself MLflow asks seven times more, with longer and longer pauses: for minutes."""
    asked: list[str] = []

    class InTrouble(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), InTrouble) as server, ThreadPoolExecutor(1) as pool:
        serving = pool.submit(server.serve_forever)
        try:
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
            for attempt in (lambda: check_server(tracking_uri(tmp_path)), lambda: opened(tmp_path)):
                asked.clear()
                with pytest.raises(UserError, match="cannot be used"):
                    attempt()
                assert len(asked) == 1
        finally:
            server.shutdown()
        serving.result()


# ------------------------------------------------------------------------------------------------------------ outbox


def test_an_outbox_delivers_in_order_and_repeats_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(outbox, "BATCH", 3)
    calls = []

    def deliver(items: Any) -> None:
        calls.append([item["n"] for item in items])
        if len(calls) in (2, 3, 4):
            raise ValueError("not now")

    box = Outbox(tmp_path / "box.jsonl", deliver, "nobody")
    for n in range(10):
        box.put({"n": n})
    until(lambda: sum(map(len, calls[:1] + calls[4:])) == 10, 60)
    box.put({"n": 10})
    assert box.close(5) == 0
    good = [n for number, call in enumerate(calls, 1) if number not in (2, 3, 4) for n in call]
    assert good == list(range(11))
    assert len({call[0] for call in calls[1:5]}) == 1  # a repeated batch may have grown meanwhile
    assert caplog.text.count("not now") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_outbox_keeps_what_it_could_not_deliver(tmp_path: Path) -> None:
    def refuse(items: Any) -> None:
        attempts.append(len(items))
        raise ConnectionError

    def take(items: Any) -> None:
        taken.extend(items)

    taken: list[Any] = []
    attempts: list[int] = []
    box = Outbox(tmp_path / "box.jsonl", refuse, "nobody")
    box.put({"n": 1})
    assert box.close(1) == 1
    assert 1 <= len(attempts) <= 4  # every half second of the one that it has
    again = Outbox(tmp_path / "box.jsonl", take, "somebody")
    again.put({"n": 2})
    assert again.close(5) == 0
    assert taken == [{"n": 1}, {"n": 2}]


# -------------------------------------------------------------------------------------------------------- evaluation


def test_an_evaluation_is_logged_with_its_means_tables_card_and_pictures(
    ixi_store: VolumeStore,
    store_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shutil.copy(store_file, tmp_path)
    model = save_untrained(tmp_path / "model", preprocess=ixi_store.preprocess)
    out = tmp_path / "scores"
    words = ["evaluate", "--model", model, "--store", ixi_store.path, "--out", out, "--max-subjects", 1]
    assert cli.main([str(word) for word in [*words, "--device", "cpu", "--log-level", "warning"]]) == 0
    run_id = log_evaluation(out, group="all")
    assert run_id is not None
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    with (out / "scores.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    region = next(row["region"] for row in rows if row["region"] != "volume")
    for method, score in (("identity", "psnr_db"), ("training-mean", "nmse"), ("aldm", "ssim")):
        mine = [row for row in rows if (row["method"], row["region"]) == (method, region)]
        values = [float(row[score]) for row in mine if row["source"] != row["target"]]
        (name,) = [name for name in run.data.metrics if name.startswith(f"{score}/{region}/{method}")]
        assert run.data.metrics[name] == pytest.approx(sum(values) / len(values))
    assert any(name.startswith("seconds_per_volume/aldm-") for name in run.data.metrics)
    assert run.data.params["split"] == "test"
    assert run.data.tags["input.store_fingerprint"] == ixi_store.fingerprint
    assert "mlflow.parentRunId" in run.data.tags
    files = {file.path for file in client.list_artifacts(run_id)}
    assert {"scores.csv", "scores.md", "quality.png", "pictures", "mean_scores.json"} <= files

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        assert log_evaluation(out) is None
    assert "is not logged" in caplog.text
