"""Where the values of a training go: metrics.jsonl of its run folder, and MLflow beside it."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.config import Config
from aldm.run_folder import RunFolder
from pipelines.arguments import JobParser

if TYPE_CHECKING:
    from aldm.players import Panel


@dataclass(frozen=True)
class Logs:
    """What `fit` calls on rank 0."""

    on_log: Callable[[dict[str, Any]], None]
    on_panel: "Callable[[int, Panel], None] | None" = None


def add_tracking_arguments(parser: JobParser) -> None:
    """Add the flags that say where MLflow keeps the run."""
    group = parser.add_argument_group("flags of the tracking")
    group.add_argument("--experiment", default="aldm", metavar="NAME", help="MLflow experiment of the run")
    group.add_argument(
        "--group",
        metavar="NAME",
        help="MLflow run that this one is nested in, such as one for the trainings of a model (default: the path of "
        "the folder around the run folder)",
    )
    group.add_argument(
        "--no-tracking",
        action="store_true",
        help="leave MLflow out; without MLFLOW_TRACKING_URI it is a file mlflow.db beside the run folder",
    )


@dataclass(frozen=True)
class Tracking:
    """Where MLflow keeps a training; every process of it is told the same."""

    experiment: str
    group: str
    """Name of the run that this one is nested in."""
    uri: str | None
    """Of the server, as MLFLOW_TRACKING_URI says; None for a file beside the run folder."""


def tracking_of(args: argparse.Namespace) -> Tracking | None:
    """Return what --experiment, --group and the environment say; None for no tracking.

    Raises:
        UserError: the tracking server cannot be reached.
    """
    if args.no_tracking:
        return None
    from pipelines.tracking import check_server, tracking_uri

    check_server(tracking_uri(args.run_dir))
    return Tracking(args.experiment, group_of(args), os.environ.get("MLFLOW_TRACKING_URI"))


def group_of(args: argparse.Namespace) -> str:
    """Return --group, or the whole path of the folder around the run folder: others have a folder of that name too."""
    return args.group or str(args.run_dir.resolve().parent)


@contextlib.contextmanager
def open_logs(
    run: RunFolder,
    stage: str,
    config: Config,
    inputs: Mapping[str, str],
    tracking: Tracking | None,
    *,
    alone: bool = True,
) -> Iterator[Logs]:
    """Yield what rank 0 logs to; the MLflow run ends with the block.

    Args:
        run: the training's folder.
        stage: its name.
        config: resolved.
        inputs: name -> path or hash of what the training reads.
        tracking: from `tracking_of`, of the process that started the training.
        alone: whether this is that process, which says how the training ended.
    """
    if tracking is None:
        yield Logs(run.log)
        return
    from pipelines.tracking import Tracker

    if tracking.uri:
        os.environ["MLFLOW_TRACKING_URI"] = tracking.uri
    path = Path(run.path)
    with Tracker.open(
        path,
        stage=stage,
        config=config,
        inputs=inputs,
        experiment=tracking.experiment,
        group=tracking.group,
        alone=alone,
    ) as tracker:

        def log(record: dict[str, Any]) -> None:
            run.log(record)
            tracker.log(record)

        yield Logs(log, tracker.panel)
