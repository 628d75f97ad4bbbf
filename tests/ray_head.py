"""A Ray cluster of its own for a test: a head node as `ray start --head` starts it, and the clients of its users."""

import contextlib
import ctypes
import os
import random
import secrets
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO

import psutil

from pipelines.ray_session import worker_environment

START_S, END_S = 180.0, 180.0
"""The longest waits for the head node, on a machine that is busy with other things."""
START_TRIES = 3
"""Ray gives its node 30 s to come up; a busy machine may need another try."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h
PORT_FLAGS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "metrics-export-port",
    "ray-client-server-port",
    "object-manager-port",
    "node-manager-port",
    "runtime-env-agent-port",
)


class TooSlowError(RuntimeError):
    """The node did not come up in the time that Ray gives it."""


class RayHead:
    """A head node with ports, folder and token of its own beside any other Ray session; use it in a `with` block."""

    def __init__(self, *, num_cpus: int) -> None:
        """Choose what the head node will have; nothing is started before the `with` block.

        Args:
            num_cpus: logical CPUs; more than the machine has is fine.
        """
        self.num_cpus = num_cpus
        self.ports = dict(zip(PORT_FLAGS, _free_ports(len(PORT_FLAGS)), strict=True))
        self.address = f"http://127.0.0.1:{self.ports['dashboard-port']}"
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> "RayHead":
        # a short path: those of Ray's sockets in it must stay below 108 characters
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ray-")))
        token = self._folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment |= worker_environment() | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_API_SERVER_ADDRESS": self.address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",  # no traffic to wait for: SIGTERM ends it at once
            "RAY_JOB_STOP_WAIT_TIME_S": "60",  # 3 s are little on a busy machine
            "OMP_NUM_THREADS": "1",
            "ALDM_SERVE_IDLE_S": "5",  # a service that is shut down is gone sooner
        }
        for left in reversed(range(START_TRIES)):
            try:
                self._start(token.read_text())
                break
            except TooSlowError as error:
                warnings.warn(
                    f"Ray's head did not start, {left} tries are left: {error}", stacklevel=2
                )  # pytest counts it
                self._end_processes()
                if not left:
                    self._stack.close()
                    raise
            except BaseException:
                self.end()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end()

    def _start(self, token: str) -> None:
        words = ["ray", "start", "--head", "--block", "--disable-usage-stats", "--dashboard-host=127.0.0.1"]
        words += [f"--num-cpus={self.num_cpus}", f"--object-store-memory={2**28}", f"--temp-dir={self._folder}"]
        words += [f"--{flag}={port}" for flag, port in self.ports.items()]
        log = self._folder / "head.log"
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                words,
                env=self.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        request = urllib.request.Request(f"{self.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
        deadline = time.monotonic() + START_S
        while "Ray runtime started" not in log.read_text() or not _answers(request):
            if self._process.poll() is not None and "timed out during startup" in log.read_text():
                raise TooSlowError(log.read_text())
            assert self._process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """Return the living processes that the head node has started, jobs and their workers among them.

        They are found by the session of the head's process and by the token's path in their environment, so that those
        whose parent has died are found too.
        """
        assert self._process is not None
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                mine = process.environ().get("RAY_AUTH_TOKEN_PATH") == self.environment["RAY_AUTH_TOKEN_PATH"]
                if mine or os.getsid(process.pid) == self._process.pid:
                    self._seen.add(process)
        return [process for process in self._seen if _alive(process)]

    def listening(self) -> set[int]:
        """Return which of its ports somebody listens on."""
        sockets = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        return {getattr(each.laddr, "port", 0) for each in sockets} & set(self.ports.values())

    def job(self, *words: object) -> subprocess.CompletedProcess[str]:
        """Run `ray job WORDS` as a user of the cluster; returns its output, stderr in stdout, and its exit code."""
        return subprocess.run(
            ["ray", "job", *map(str, words)],
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=240,
        )

    def submit(self, name: str, working_dir: Path, *words: object) -> "Submission":
        """Run `ray job submit` for a command whose logs it will stream; `name` is the job's submission id."""
        flags = ["--working-dir", str(working_dir), "--submission-id", name]
        return Submission(["ray", "job", "submit", *flags, "--", *map(str, words)], self.environment)

    def end(self) -> list[psutil.Process]:
        """End the head node with SIGTERM and return which of its processes had to be killed; a second call is nothing.

        Asks nothing of processes that it did not start.
        """
        left = self._end_processes()
        self._stack.close()
        return left

    def _end_processes(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        started = self.processes()
        self._process.terminate()
        _, left = psutil.wait_procs(started, timeout=END_S)
        left = list({*left, *self.processes()})
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process = None
        return left


class Submission:
    """A `ray job submit` that runs: what it has printed so far, and how it ended."""

    def __init__(self, words: list[str], environment: dict[str, str]) -> None:
        """Start it."""
        self._lines: list[str] = []
        self._process = subprocess.Popen(
            words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            self._lines.extend(stream)

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return "".join(self._lines)

    @property
    def running(self) -> bool:
        """Whether the client still waits for its job."""
        return self._process.poll() is None

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    def wait(self, timeout_s: float = 240) -> int:
        """Wait for its end; returns the exit code."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise AssertionError(f"still running after {timeout_s:.0f} s:\n{self.output}") from None
        self._reader.join()
        return code


def _end_with_parent() -> None:
    """Let this process get SIGTERM when the test process dies before it could end it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _answers(request: urllib.request.Request) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=5):
        return True
    return False


def _free_ports(count: int) -> list[int]:
    """Return ports that nobody has, all different, below those that the system hands out by itself meanwhile."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 1000):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            break
    return found


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(condition: Callable[[], object], submission: Submission, timeout_s: float = 240) -> None:
    """Wait for a condition while a job runs."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert submission.running, submission.output
        assert time.monotonic() < deadline, submission.output
        time.sleep(0.05)
