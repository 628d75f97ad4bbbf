"""The MLflow runs of a sweep: a parent, and below it one run a trial, told from the trials' run folders."""

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from aldm.config import Config, from_dict
from aldm.errors import UserError
from aldm.run_folder import CONFIG_FILE, METRICS_FILE, RUN_FILE
from pipelines.tracking import RECORD_FILE, RunRecord, Tracker, check_server, tracking_uri
from pipelines.tracking_server import answering, connect, impatient
from tune.sweep import FAILED, MEASURED, STAGE, STOPPED, TRIALS, Outcome

logger = logging.getLogger(__name__)

STATE_TAG = "tune.state"
STATUS = {MEASURED: "FINISHED", STOPPED: "KILLED", FAILED: "FAILED"}


class SweepRuns:
    """Follows the run folders of a sweep's trials; use it in a `with` block.

    The trials run in processes of their own and may be ended without a word, so the driver keeps their runs: each is
    closed, and one process writes where the store is a SQLite file.

    Args:
        out: the sweep's folder.
        group: name of the parent run.
    """

    def __init__(self, out: Path, group: str) -> None:
        self._out, self._group = out, group
        self._open: dict[str, Tracker] = {}
        self._read: dict[str, int] = {}

    def __enter__(self) -> "SweepRuns":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for tracker in self._open.values():
            tracker.close("KILLED")

    def follow(self, name: str) -> None:
        """Log what a trial's metrics.jsonl has more than when it was last looked at.

        A server that does not answer costs a warning: the next look logs what this one could not.
        """
        folder = self._out / TRIALS / name
        if not (folder / RUN_FILE).is_file():
            return  # it has not started to train
        try:
            self._open.setdefault(name, self._open.get(name) or self._opened(folder))
        except UserError as error:
            logger.warning("%s is not logged for now: %s", name, error)
            return
        file = folder / METRICS_FILE
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        for line in whole[self._read.get(name, 0) :]:
            self._open[name].log(json.loads(line))
        self._read[name] = len(whole)

    def end(self, name: str, state: str) -> None:
        """Log the rest of a trial, its measurements with the network evaluations as steps, and how it ended.

        Args:
            name: the trial's.
            state: one of STATUS.
        """
        self.follow(name)
        tracker = self._open.pop(name, None)
        if tracker is None:
            return
        outcome = Outcome.load(self._out / TRIALS / name)
        for measured in sorted(outcome.measured if outcome else (), key=lambda one: one.way.network_evaluations):
            sampler = measured.way.sampler.replace("+", "p")  # which MLflow does not take
            tracker.log({"step": measured.way.network_evaluations, f"sampled/{sampler}": measured.value})
        tracker.close(STATUS[state])

    def finish(self, states: Mapping[str, str], files: Sequence[str], scores: Mapping[str, float]) -> None:
        """Say of every trial what became of it, and give the parent the results; only warns where it cannot.

        Args:
            states: the name of every trial -> its state.
            files: names of the results in the sweep's folder, for the parent.
            scores: of the best measurement, for the parent.
        """
        try:
            uri = tracking_uri(self._out)
            with impatient(), answering(uri):
                client, parent = connect(uri), None
                for name, state in states.items():
                    record = self._record(name)
                    if record is None or client.get_run(record.run_id).info.status == "RUNNING":
                        self.end(name, state)  # the driver that saw it end was killed before it could say so
                        record = self._record(name)
                    if record is not None:
                        client.set_tag(record.run_id, STATE_TAG, state)
                        parent = record.parent_run_id
                if parent is not None:
                    for file in files:
                        client.log_artifact(parent, str(self._out / file))
                    for name, value in scores.items():
                        client.log_metric(parent, name, value)
                    client.set_terminated(parent)
        except UserError as error:
            logger.warning("the results of %s are not logged: %s", self._out, error)

    def _opened(self, folder: Path) -> Tracker:
        import yaml

        config = from_dict(Config, yaml.safe_load((folder / CONFIG_FILE).read_text()))
        inputs = json.loads((folder / RUN_FILE).read_text())["starts"][-1]["inputs"]
        return Tracker.open(folder, stage=STAGE, config=config, inputs=inputs, group=self._group)

    def _record(self, name: str) -> RunRecord | None:
        file = self._out / TRIALS / name / RECORD_FILE
        return RunRecord(**json.loads(file.read_text())) if file.is_file() else None


@contextlib.contextmanager
def tracking_store(out: Path) -> Iterator[None]:
    """Keep the runs inside the block where those of `aldm train` beside the sweep's folder go.

    Raises:
        UserError: that place does not answer or cannot be used.
    """
    uri = tracking_uri(out)
    check_server(uri)
    given = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri  # else a trial's would be beside its own folder
    try:
        yield
    finally:
        if given is None:
            del os.environ["MLFLOW_TRACKING_URI"]
