"""The jobs of `aldm` as tests run them: in the test's own process, with what a user would type."""

import os
import resource
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO
from unittest import mock

import pytest

from aldm import cli


def run(*words: object) -> int:
    """Run `aldm WORDS` and return its exit code."""
    return cli.main([str(word) for word in words])


def run_here(words: Sequence[str], stream: IO[bytes], environment: Mapping[str, str]) -> tuple[int, int]:
    """Do what pipelines.benchmark_run.run_bound does, but in this process, where everything is imported already."""
    with mock.patch.dict(os.environ, environment, clear=True):
        return run(*words), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """Run a job that is to end with one message and no traceback; return the message."""
    capsys.readouterr()
    assert run(*words) == cli.EXIT_USER_ERROR
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def content(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder and of those in it: relative name -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
