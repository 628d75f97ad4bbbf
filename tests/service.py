"""A translation service of its own for a test: `aldm serve` in a process, as a user starts it."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

START_S, END_S = 180.0, 120.0
"""The longest waits for start and end, on a machine that is busy with other things."""
FINISHED = ("done", "failed", "cancelled")


class RunningService:
    """`aldm serve` on a free port of this machine; use it in a `with` block.

    Attributes:
        url: where it answers.
        folder: the model that it serves.
        work_dir: where it keeps its jobs.
        client: sends to it.
    """

    def __init__(self, folder: Path, work_dir: Path, *flags: str, token: str | None = None) -> None:
        """Choose what is run; nothing is started before the `with` block.

        Args:
            folder: translator folder.
            work_dir: for its jobs.
            flags: more of `aldm serve`'s.
            token: that the client sends.
        """
        self.folder, self.work_dir, self.flags = folder, work_dir, flags
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=120)
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> "RunningService":
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment["ALDM_SERVE_LEASE_S"] = "10"  # a killed worker is noticed sooner
        words = [sys.executable, "-m", "aldm.cli", "serve", "--model", str(self.folder), "--port", str(self.port)]
        words += ["--work-dir", str(self.work_dir), *self.flags]
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self.log = self.work_dir / "service.log"
        with self.log.open("wb") as stream:
            self._process = subprocess.Popen(
                words, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self.await_log("ready: http")
            self.processes()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.stop()
        finally:
            self.kill()
            self.client.close()

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send the service a signal, wait for its end, and return its exit code."""
        assert self._process is not None
        self.processes()
        if self._process.poll() is None:
            self._process.send_signal(number)
        code = self._process.wait(END_S)
        psutil.wait_procs(list(self._seen), timeout=20)  # Ray's own end a moment later
        return code

    def signal(self, number: signal.Signals) -> None:
        """Send the service a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def await_log(self, words: str) -> None:
        """Wait until the service has said something."""
        assert self._process is not None
        until = time.monotonic() + START_S
        while words not in self.log.read_text():
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """End every process that the service started and that is still there."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(list(self._seen), timeout=10)

    def processes(self) -> list[psutil.Process]:
        """Return the living processes of the service."""
        assert self._process is not None
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(self._process.pid)
            self._seen |= {root, *root.children(recursive=True)}
        return [process for process in self._seen if _alive(process)]

    def process_of(self, title: str) -> psutil.Process:
        """Return the one process whose title holds a word: StoreActor, :model, :api."""
        found = [process for process in self.processes() if title in _title(process)]
        assert len(found) == 1, [_title(process) for process in self.processes()]
        return found[0]

    def resident_bytes(self) -> int:
        """Return the memory of all processes together; pages that several share are counted once for each."""
        total = 0
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def logs(self) -> list[Path]:
        """Return the logs of the Ray session that the service started for itself."""
        folders = set()
        for process in self.processes():
            found = re.search(r"--session[-_]dir=(\S+)", _title(process))
            if found is not None:
                folders.add(Path(found[1]))
        assert len(folders) == 1, folders
        return [path for path in (folders.pop() / "logs").rglob("*") if path.is_file()]

    def submit(self, volume: Path, **fields: Any) -> dict[str, Any]:
        """Queue a translation and return the job."""
        answer = self.post("/v1/translations", volume, **fields)
        assert answer.status_code == 202, answer.text
        job: dict[str, Any] = answer.json()
        assert answer.headers["location"] == job["links"]["self"]
        return job

    def post(self, path: str, volume: Path, **fields: Any) -> httpx.Response:
        """Send a volume with form fields."""
        with volume.open("rb") as stream:
            return self.client.post(path, files={"volume": (volume.name, stream)}, data=fields)

    def job(self, job: dict[str, Any], *, wounded: bool = False) -> dict[str, Any]:
        """Return where a job stands.

        Args:
            job: as it was submitted.
            wounded: a process of the service was killed, so that it may not answer for a while; else it has to.
        """
        until = time.monotonic() + START_S
        while True:
            with contextlib.suppress(*([httpx.TransportError] if wounded else [])):
                answer = self.client.get(job["links"]["self"])
                if answer.status_code < 500 or not wounded:
                    assert answer.status_code == 200, answer.text
                    view: dict[str, Any] = answer.json()
                    return view
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.2)

    def wait(self, job: dict[str, Any], *states: str, wounded: bool = False) -> dict[str, Any]:
        """Return a job once it is in one of the states (none: once it is finished)."""
        until = time.monotonic() + START_S
        while (view := self.job(job, wounded=wounded))["state"] not in (states or FINISHED):
            assert time.monotonic() < until, view
            time.sleep(0.1)
        return view

    def result(self, job: dict[str, Any], target: str, kind: str = "result") -> bytes:
        """Return a file of a finished job."""
        answer = self.client.get(job["links"]["results"][target][kind])
        assert answer.status_code == 200, answer.text
        return answer.content


def forget_peak(process: psutil.Process) -> int:
    """Let the peak of a process's memory start from scratch, and return what it is now, bytes."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # proc(5)
    return peak_bytes(process)


def peak_bytes(process: psutil.Process) -> int:
    """Return the most memory that a process has had since `forget_peak`, bytes."""
    (line,) = (line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmHWM" in line)
    return 1024 * int(line.split()[1])


def free_port() -> int:
    """Return a port that nobody listens on, below those that the system gives to outgoing connections."""
    ports = list(range(21_000, 31_000))
    random.SystemRandom().shuffle(ports)
    for port in ports:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def _alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
