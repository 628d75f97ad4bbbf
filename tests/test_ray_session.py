"""The Ray session that a job starts for itself, where Ray is slow to come up."""

import subprocess
import sys
from typing import Any

import psutil
import pytest
import ray

from aldm.errors import UserError
from pipelines.ray_session import START_TRIES, start_ray

SLOW = "The current node timed out during startup."


class Starts:
    """In place of ray.init: the first starts leave a process behind and fail."""

    def __init__(self, failures: int, error: type[Exception] = Exception) -> None:
        self.failures, self.error = failures, error
        self.left: list[subprocess.Popen[bytes]] = []
        self.arguments: list[dict[str, Any]] = []

    def __call__(self, **arguments: Any) -> None:
        self.arguments.append(arguments)
        if len(self.arguments) <= self.failures:
            self.left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
            raise self.error(SLOW if self.error is Exception else "something else")


def test_a_start_that_takes_too_long_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(START_TRIES - 1)
    monkeypatch.setattr(ray, "init", starts)
    start_ray(num_cpus=3)
    assert starts.arguments == [{"address": "local", "include_dashboard": False, "num_cpus": 3}] * START_TRIES
    assert not [process.pid for process in starts.left if process.poll() is None and psutil.pid_exists(process.pid)]


def test_a_start_that_never_comes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(START_TRIES)
    monkeypatch.setattr(ray, "init", starts)
    with pytest.raises(
        UserError, match=f"does not start on this machine, tried {START_TRIES} times .*{SLOW}.*RAY_ADDRESS"
    ):
        start_ray()
    assert all(process.poll() is not None for process in starts.left)


def test_another_error_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(1, ValueError)
    monkeypatch.setattr(ray, "init", starts)
    try:
        with pytest.raises(ValueError, match="something else"):
            start_ray()
        assert len(starts.arguments) == 1
    finally:
        for process in starts.left:
            process.kill()
            process.wait()
