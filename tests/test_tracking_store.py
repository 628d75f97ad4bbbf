"""The SQLite file of a machine's trainings: several may begin in one empty folder, and a broken one is named."""

import multiprocessing
import sqlite3
from pathlib import Path

import pytest

from aldm.errors import UserError
from pipelines.tracking_server import connect, experiment_id

TOGETHER = 2


def _begin(uri: str, start, end) -> None:
    """What the first training in a folder does first; the other processes do it at the same time."""
    start.wait(60)
    try:
        end.put(experiment_id(connect(uri), uri, "aldm"))
    except BaseException as error:
        end.put(repr(error))
        raise


def test_trainings_that_begin_together_in_an_empty_folder_share_one_store(tmp_path: Path) -> None:
    import mlflow  # noqa: F401  the processes begin with it

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    context = multiprocessing.get_context("fork")
    start, end = context.Barrier(TOGETHER), context.Queue()
    processes = [context.Process(target=_begin, args=(uri, start, end)) for _ in range(TOGETHER)]
    for process in processes:
        process.start()
    found = [end.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert found == ["1"] * TOGETHER
    assert [process.exitcode for process in processes] == [0] * TOGETHER
    assert connect(uri).get_experiment_by_name("aldm") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_store_that_is_half_made_is_named_with_the_way_out(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    with sqlite3.connect(file) as database:  # what a process leaves that dies while it makes the tables
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        database.execute("INSERT INTO alembic_version VALUES ('0123456789ab')")
    with pytest.raises(UserError, match=r"mlflow\.db cannot be used: its tables are half made.*move the file away"):
        connect(f"sqlite:///{file}")
