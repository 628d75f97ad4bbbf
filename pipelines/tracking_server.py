"""The MLflow tracking server, or the SQLite file in its place: where it is, that it answers, and new runs in it."""

import contextlib
import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.errors import UserError
from aldm.files import existing_parent
from pipelines.outbox import brief

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

EXPERIMENT = "aldm"
DATABASE_FILE, ARTIFACTS = "mlflow.db", "mlflow-artifacts"
GROUP_TAG, PARENT_TAG, COMMIT_TAG = "aldm.group", "mlflow.parentRunId", "mlflow.source.git.commit"
_IMPATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_PARAMS_AT_ONCE, _METRICS_AT_ONCE = 100, 500  # MLflow takes at most 100 and 1000
_SQLITE = "sqlite:///"


def tracking_uri(run_dir: Path) -> str:
    """Return where a run folder's run is kept: MLFLOW_TRACKING_URI, or a SQLite file beside the folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{run_dir.resolve().parent / DATABASE_FILE}"


def check_server(uri: str) -> None:
    """Check before any work that the tracking server answers, or that the SQLite file can be used or made.

    Raises:
        UserError: it does not, or it cannot.
    """
    with impatient(), answering(uri):
        if is_missing(uri):
            _check_file(uri)
        else:
            connect(uri).get_experiment_by_name(EXPERIMENT)


def is_missing(uri: str) -> bool:
    """Whether this is a SQLite file that nobody has made yet: whoever only reads finds nothing, and makes none."""
    return uri.startswith(_SQLITE) and not _file_of(uri).exists()


def connect(uri: str) -> "MlflowClient":
    """Return a client; the first one of a SQLite file makes it, and the folders above.

    Raises:
        UserError: a SQLite file that cannot be made, or a kind of store that cannot be used here.
    """
    with answering(uri):
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        if not uri.startswith(_SQLITE):
            return MlflowClient(tracking_uri=uri)
        _file_of(uri).parent.mkdir(parents=True, exist_ok=True)
        _check_file(uri)
        with _alone(_file_of(uri).parent):
            return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait for other processes that open a store here: two that make its tables at once leave half of them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # gone with the process
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn what the server, or the way to it, refuses inside the block into a UserError that names it."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except CommandError as error:
        raise UserError(
            f"MLflow at {uri} cannot be used: its tables are half made, or of another version of MLflow "
            f"({brief(error)}); move the file away (a new one is made), or set MLFLOW_TRACKING_URI to another store"
        ) from error
    except (MlflowException, SQLAlchemyError, OSError, ImportError) as error:  # ImportError: a database's driver
        way_out = "fix that, or set MLFLOW_TRACKING_URI to a tracking server"
        if os.environ.get("MLFLOW_TRACKING_URI"):
            way_out = "start the server, give its address, or unset MLFLOW_TRACKING_URI to keep runs in a local file"
        raise UserError(f"MLflow at {uri} cannot be used: {brief(error)}; {way_out}") from error


@contextlib.contextmanager
def impatient() -> Iterator[None]:
    """Let requests fail soon: by themselves they are repeated for minutes. Values that the user has set stay."""
    with _environment({name: value for name, value in _IMPATIENCE.items() if name not in os.environ}):
        yield


@contextlib.contextmanager
def default_server(uri: str) -> Iterator[None]:
    """Let MLflow's functions that take no address, and its own code behind others, go to this one."""
    with _environment({"MLFLOW_TRACKING_URI": uri}):
        yield


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    """Return the id of an experiment, which is made if there is none; a SQLite file's artifacts lie beside it.

    Raises:
        UserError: the experiment was deleted.
    """
    from mlflow import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        place = None
        if uri.startswith(_SQLITE):
            place = (_file_of(uri).parent / ARTIFACTS).as_uri()
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another training may have made it meanwhile
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        raise UserError(f"the experiment {name!r} at {uri} was deleted: restore it (mlflow experiments restore)")
    return str(found.experiment_id)


def new_run(
    client: "MlflowClient", experiment: str, name: str, *, group: str | None, tags: Mapping[str, str | None]
) -> tuple[str, str | None]:
    """Start a run, as a child of the group's where one is named.

    Args:
        client: of the server.
        experiment: id of the experiment.
        name: the run's name.
        group: the parent run's tag, which is made if there is none; the last part of a path is its name. None for no
            parent.
        tags: None leaves one out.

    Returns:
        The ids of the run and of its parent.
    """
    from mlflow.tracking.context.registry import resolve_tags

    from aldm.run_folder import git_state

    git = git_state()
    all_tags: dict[str, str | None] = {
        COMMIT_TAG: None if git["git_commit"] is None else str(git["git_commit"]),
        "git_changed": None if git["git_changed"] is None else str(git["git_changed"]),
        **tags,
    }
    parent = None if group is None else _group_run(client, experiment, group)
    if parent is not None:
        all_tags[PARENT_TAG] = parent
    known = resolve_tags({key: value for key, value in all_tags.items() if value is not None})  # adds user and source
    return client.create_run(experiment, run_name=name, tags=known).info.run_id, parent


def log_params(client: "MlflowClient", run_id: str, params: Mapping[str, Any]) -> None:
    """Log parameters, however many."""
    from mlflow.entities import Param

    entities = [Param(name, str(value)) for name, value in params.items()]
    for i in range(0, len(entities), _PARAMS_AT_ONCE):
        client.log_batch(run_id, params=entities[i : i + _PARAMS_AT_ONCE])


def log_metrics(client: "MlflowClient", run_id: str, metrics: Sequence["Metric"]) -> None:
    """Log metrics, however many."""
    for i in range(0, len(metrics), _METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[i : i + _METRICS_AT_ONCE])


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def _group_run(client: "MlflowClient", experiment: str, group: str) -> str:
    """Return the id of the group's parent run; of several that were made at once the first counts."""
    quote = '"' if "'" in group else "'"
    wanted = f"tags.`{GROUP_TAG}` = {quote}{group}{quote}"

    def find() -> str | None:
        runs = client.search_runs([experiment], wanted, max_results=1, order_by=["attributes.start_time ASC"])
        return runs[0].info.run_id if runs else None

    found = find()
    if found is not None:
        return found
    name = Path(group).name if Path(group).is_absolute() else group
    made = client.create_run(experiment, run_name=name, tags={GROUP_TAG: group}).info.run_id
    first = find() or made
    if first != made:
        client.delete_run(made)
    return str(first)


def _file_of(uri: str) -> Path:
    return Path(uri.removeprefix(_SQLITE).partition("?")[0]).resolve()


def _check_file(uri: str) -> None:
    """Find out whether a SQLite file can be opened or made: MLflow itself would try for minutes."""
    file = _file_of(uri)
    if file.exists():
        file.open("r+b").close()
    else:
        tempfile.TemporaryFile(dir=existing_parent(file)).close()
