"""MLflow runs: one per training, whatever the number of workers, restarts and resumes.

A training never waits for the tracking server. What it logs goes through an outbox in its run folder, so a server that
is lost is a warning, and what it missed is sent when it answers again, in this start of the training or a later one.
"""

import contextlib
import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from aldm.config import Config, to_dict
from aldm.errors import UserError
from aldm.files import atomic_path
from pipelines.outbox import Item, Outbox
from pipelines.tracking_server import EXPERIMENT as EXPERIMENT
from pipelines.tracking_server import (
    answering,
    connect,
    experiment_id,
    flat,
    impatient,
    log_metrics,
    log_params,
    new_run,
)
from pipelines.tracking_server import check_server as check_server
from pipelines.tracking_server import tracking_uri as tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from aldm.players import Panel

logger = logging.getLogger(__name__)

RECORD_FILE, OUTBOX_FILE, PANELS = "mlflow.json", "mlflow-buffer.jsonl", "panels"
CLOSE_S = 20.0
"""How long the end of a training waits for what is not delivered yet."""


@dataclass(frozen=True)
class RunRecord:
    """mlflow.json: the MLflow run that a run folder's training is logged to."""

    run_id: str
    parent_run_id: str | None
    tracking_uri: str
    experiment: str
    started: float
    """Seconds since 1970."""


class Tracker:
    """The MLflow run of one training, for the process of rank 0; use it in a `with` block.

    Its end decides the run's status: FINISHED, KILLED after Ctrl-C or SIGTERM, FAILED after any other exception. One
    that is not `alone` leaves it as it is after an exception, for the process that started the training to say.
    """

    def __init__(self, run_dir: Path, client: "MlflowClient", record: RunRecord, alone: bool = True) -> None:
        """Use Tracker.open."""
        self.run_dir, self.record, self.alone = run_dir, record, alone
        self._client = client
        self._last_steps: dict[str, int] | None = None
        """Metric -> last step that the run has; None where the server is to be asked."""
        self._impatience = contextlib.ExitStack()
        self._impatience.enter_context(impatient())
        self._outbox = Outbox(run_dir / OUTBOX_FILE, self._deliver, f"MLflow at {record.tracking_uri}")
        self._outbox.put({"status": "RUNNING", "time": _now_ms()})
        self._closing = threading.Event()
        self._watch = threading.Thread(target=self._watch_system, name="system metrics", daemon=True)
        self._watch.start()

    @classmethod
    def open(
        cls,
        run_dir: Path,
        *,
        stage: str,
        config: Config,
        inputs: Mapping[str, str],
        experiment: str = EXPERIMENT,
        group: str | None = None,
        alone: bool = True,
    ) -> "Tracker":
        """Go on with the run that the folder's mlflow.json names, or start one.

        Args:
            run_dir: the training's run folder.
            stage: the stage's name.
            config: resolved; becomes the run's parameters.
            inputs: name -> path or hash of what the training reads, the data's fingerprint among them; become tags.
            experiment: MLflow's experiment; made if there is none.
            group: name of the parent run; made if there is none. None starts a run without a parent.
            alone: whether no other process says how the training ended.

        Raises:
            UserError: a new run is to be started and the tracking server does not answer. To go on with a run, it need
                not answer: a restarted worker goes on though the server is away.
        """
        uri = tracking_uri(run_dir)
        with impatient():
            client = connect(uri)
            record = _recorded(client, run_dir, uri, config)
            if record is None:
                with answering(uri):
                    tags = {"stage": stage, **{f"input.{name}": value for name, value in inputs.items()}}
                    place = experiment_id(client, uri, experiment)
                    run_id, parent = new_run(client, place, run_dir.name, group=group, tags=tags)
                    log_params(client, run_id, flat(to_dict(config)))
                record = RunRecord(run_id, parent, uri, experiment, time.time())
                with atomic_path(run_dir / RECORD_FILE, overwrite=True) as temporary:
                    temporary.write_text(json.dumps(asdict(record), indent=1) + "\n")
        return cls(run_dir, client, record, alone)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("FINISHED")
        elif not self.alone:
            self.close(None)
        else:
            self.close("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def log(self, record: Mapping[str, Any]) -> None:
        """Log what `fit` hands to on_log: {"step": n, name: number, ...}, without None and what is not finite.

        After a restart from an earlier checkpoint, the steps that the run has already are not logged again.
        """
        self._put(int(record["step"]), {name: value for name, value in record.items() if name != "step"})

    def panel(self, step: int, panel: "Panel") -> None:
        """Draw a panel of `fit`'s on_panel into panels/ of the run folder, and log it."""
        from aldm.pictures import save_training_panel

        path = self.run_dir / PANELS / f"step-{step:08d}.png"
        path.parent.mkdir(exist_ok=True)
        volumes = {name: volume.detach().float().cpu().numpy() for name, volume in panel.items()}
        save_training_panel(path, volumes, f"{self.run_dir.name}, step {step}")
        self._outbox.put({"panel": path.name})

    def close(self, status: str | None) -> None:
        """Set the run's status (FINISHED, FAILED, KILLED; None leaves it) and wait a little until all is delivered."""
        self._closing.set()
        self._watch.join()
        if status is not None:
            self._outbox.put({"status": status, "time": _now_ms()})
        left = self._outbox.close(CLOSE_S)
        self._impatience.close()
        if left:
            logger.warning(
                "MLflow at %s lacks the last %d records of %s: they are kept in %s and sent at the next --resume",
                self.record.tracking_uri,
                left,
                self.run_dir,
                self._outbox.path.name,
            )

    def _put(self, step: int, values: Mapping[str, float | None]) -> None:
        metrics = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        if metrics:
            self._outbox.put({"step": step, "time": _now_ms(), "metrics": metrics})

    def _watch_system(self) -> None:
        """Log the load and memory of this machine now and then, and at the end; step counts the run's seconds."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        # never started: by itself it gives up when the server is lost
        monitor = SystemMetricsMonitor(self.record.run_id, tracking_uri=self.record.tracking_uri)
        monitor.collect_metrics()  # the first load that psutil returns is always 0
        stopped = False
        while not stopped:
            for part in monitor.monitors:
                part.clear_metrics()
            stopped = self._closing.wait(monitor.sampling_interval)
            monitor.collect_metrics()
            values = {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
            self._put(int(time.time() - self.record.started), values)

    def _deliver(self, items: Sequence[Item]) -> None:
        """Send items (in the outbox's thread)."""
        try:
            self._send_metrics(items)
        except BaseException:
            self._last_steps = None  # how much of it has arrived is not known
            raise
        for item in items:
            if "panel" in item:
                path = self.run_dir / PANELS / item["panel"]
                if path.is_file():  # else the user has removed it meanwhile
                    self._client.log_artifact(self.record.run_id, str(path), PANELS)
            if "status" in item:
                for run_id in filter(None, (self.record.run_id, self.record.parent_run_id)):
                    _set_status(self._client, run_id, item["status"], item["time"])

    def _send_metrics(self, items: Sequence[Item]) -> None:
        """Send what the run does not have yet: no metric gets a step twice."""
        from mlflow.entities import Metric

        if self._last_steps is None:
            run = self._client.get_run(self.record.run_id)
            self._last_steps = {metric.key: metric.step for metric in run.data._metric_objs}  # the last of each
        metrics = []
        for item in items:
            for name, value in item.get("metrics", {}).items():
                if item["step"] > self._last_steps.get(name, -1):
                    self._last_steps[name] = item["step"]
                    metrics.append(Metric(name, value, item["time"], item["step"]))
        log_metrics(self._client, self.record.run_id, metrics)


def discard(run_dir: Path) -> None:
    """Remove what a tracker keeps in a run folder, for a new training there; MLflow keeps the old run."""
    for name in (RECORD_FILE, OUTBOX_FILE):
        (run_dir / name).unlink(missing_ok=True)
    shutil.rmtree(run_dir / PANELS, ignore_errors=True)


def mark(run_dir: Path, status: str) -> None:
    """Set the run of a training whose process was ended, and so could not say it; only warns where it cannot.

    Args:
        run_dir: the training's run folder.
        status: FAILED or KILLED.
    """
    file = run_dir / RECORD_FILE
    if not file.is_file():
        return
    record = RunRecord(**json.loads(file.read_text()))
    try:
        with impatient(), answering(record.tracking_uri):
            client = connect(record.tracking_uri)
            for run_id in filter(None, (record.run_id, record.parent_run_id)):
                _set_status(client, run_id, status, _now_ms())
    except UserError as error:
        logger.warning("%s", error)


def _recorded(client: "MlflowClient", run_dir: Path, uri: str, config: Config) -> RunRecord | None:
    """Return the run to go on with; None where there is none, or not any more, or not at this server."""
    from mlflow import MlflowException

    file = run_dir / RECORD_FILE
    if not file.is_file():
        return None
    record = RunRecord(**json.loads(file.read_text()))
    if record.tracking_uri != uri:
        logger.warning("%s was logged to MLflow at %s, now %s: starting a new run", run_dir, record.tracking_uri, uri)
        return None
    try:
        run = client.get_run(record.run_id)
        if run.info.lifecycle_stage != "deleted":
            _note_changes(client, run, config)
            return record
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            return record  # the server is away: the outbox waits for it
    logger.warning("the MLflow run %s of %s was deleted: starting a new one", record.run_id, run_dir)
    return None


def _note_changes(client: "MlflowClient", run: "Run", config: Config) -> None:
    """Tag what a resumed training changes, such as its length: parameters cannot be changed."""
    for name, value in flat(to_dict(config)).items():
        if run.data.params.get(name) != str(value):
            client.set_tag(run.info.run_id, f"resumed.{name}", value)


def _set_status(client: "MlflowClient", run_id: str, status: str, time_ms: int) -> None:
    if status == "RUNNING":
        client.update_run(run_id, status)
    else:
        client.set_terminated(run_id, status, time_ms)


def _now_ms() -> int:
    return int(time.time() * 1000)
