"""Clients of the service that hang up: nobody else waits for it, and what they had begun is undone."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from ray.exceptions import TaskCancelledError
from scans import write
from service import RunningService
from test_serve_guard import Near, scan
from untrained import save_untrained

from serve.api import build_api
from serve.jobs import JobStore
from serve.models import find_model
from serve.news import News
from serve.problems import Problem
from serve.records import Job, new_id
from serve.settings import Settings

STREAMS, ROUNDS = 60, 3
PATIENCE_S = 15.0
"""An answer comes within tenths of a second; with a store that waits for a call that was lost it takes a minute."""
LONG = {"sampler": "ddpm", "num_inference_steps": 400, "num_samples": 8, "source": "t1", "target": "t2"}


@pytest.fixture
def long_job(service: RunningService, tmp_path: Path) -> Iterator[dict[str, Any]]:
    job = service.submit(write(tmp_path / "scan.nii.gz", affine=np.diag([8.0, 8, 8, 1])), **LONG)
    yield job
    assert service.client.delete(job["links"]["self"]).status_code == 204


def opened_stream(service: RunningService, job: dict[str, Any]) -> socket.socket:
    """A client that has asked for a job's events and has heard the first."""
    line = socket.create_connection(("127.0.0.1", service.port), timeout=60)
    line.sendall(f"GET {job['links']['events']} HTTP/1.1\r\nHost: 127.0.0.1:{service.port}\r\n\r\n".encode())
    heard = b""
    while b"event: job" not in heard:
        heard += line.recv(2**16)
    return line


def test_many_streams_that_hang_up_at_once_hold_up_nobody(service: RunningService, long_job: dict[str, Any]) -> None:
    for _ in range(ROUNDS):
        lines = [opened_stream(service, long_job) for _ in range(STREAMS)]
        for line in lines:
            line.close()
        for path in (long_job["links"]["self"], "/v1/health/ready", "/metrics"):
            answer = service.client.get(path, timeout=PATIENCE_S)
            assert answer.status_code == 200, answer.text


def test_many_blocking_calls_that_hang_up_at_once_are_all_cancelled(service: RunningService, tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii.gz", affine=np.diag([8.0, 8, 8, 1]))
    calls = 5
    with httpx.Client(base_url=service.url) as client:
        request = client.build_request("POST", "/v1/translate", data=LONG, files={"volume": path.open("rb")})
        body = request.read()
    head = f"POST /v1/translate HTTP/1.1\r\nHost: 127.0.0.1:{service.port}\r\n"
    head += f"Content-Type: {request.headers['content-type']}\r\nContent-Length: {len(body)}\r\n\r\n"
    before = numbers(service)
    lines = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(calls)]
    for line in lines:
        line.sendall(head.encode() + body)
    await_numbers(service, accepted=before["accepted"] + calls)
    for line in lines:
        line.close()
    await_numbers(service, cancelled=before["cancelled"] + calls, uploads_open=0)


def numbers(service: RunningService) -> dict[str, float]:
    """What /metrics says, by the name or the label of each number."""
    found = {}
    for line in service.client.get("/metrics", timeout=PATIENCE_S).text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("aldm_service_"):
            found[name.split('"')[1] if '"' in name else name.removeprefix("aldm_service_")] = float(value)
    return found


def await_numbers(service: RunningService, **wanted: float) -> None:
    until = time.monotonic() + 60
    while {name: (found := numbers(service))[name] for name in wanted} != wanted:
        assert time.monotonic() < until, (wanted, found)
        time.sleep(0.2)


# ------------------------------------------------------------------------------------------------ without Ray's session


class Recording(Near):
    """Notes what is called; fails with what it is given, once, when the state of a job is asked for."""

    def __init__(self, store: JobStore, error: BaseException | None = None) -> None:
        super().__init__(store)
        self.error = error
        self.called: list[str] = []

    async def acall(self, method: str, *args: Any) -> Any:
        self.called.append(method)
        if method in ("get", "views") and self.error is not None:
            error, self.error = self.error, None
            raise error
        return await super().acall(method, *args)


@pytest.mark.parametrize("error", [TaskCancelledError(), asyncio.CancelledError(), Problem(503, "away")], ids=repr)
def test_a_blocking_call_that_ends_without_a_result_is_cancelled(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever Ray makes of the client's hanging up; the client was never told the job's id."""
    monkeypatch.setattr("tempfile.tempdir", None)  # the service sets its own
    model = save_untrained(tmp_path / "model")
    settings = Settings(model=str(model), work_dir=str(tmp_path / "work"))
    near: Any = Recording(JobStore(settings), error)
    app = build_api(settings, find_model(str(model), tmp_path), {}, near)

    async def call() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            form = {"files": {"volume": ("t1.nii", scan())}, "data": {"target": "t2"}}
            await client.post("/v1/translate", **form)

    with contextlib.suppress(asyncio.CancelledError):
        asyncio.run(asyncio.wait_for(call(), 30))
    assert near.store.counts()["totals"] == {"accepted": 1, "cancelled": 1}


def test_all_who_wait_for_news_are_told_by_one_look_at_the_store(tmp_path: Path) -> None:
    store = JobStore(Settings(model="unused", work_dir=str(tmp_path / "work")))
    values: dict[str, Any] = {"sampler": None, "num_inference_steps": 1, "num_samples": 1, "eta": 0.0, "seed": 0}
    values |= {"source": "t1", "source_from": "request", "format": "nii.gz", "model": {"name": "m", "hash": "h"}}
    jobs = [Job(id=new_id(), owner="me", targets=["t2"], **values) for _ in range(3)]
    for job in jobs:
        (store.folder / job.id).mkdir()
        store.submit("", job)
    near: Any = Recording(store)
    news = News(near)

    async def ask() -> list[Any]:
        mine = [news.next(job.id, "me") for job in jobs for _ in range(20)]
        asked = asyncio.gather(*mine, news.next(jobs[0].id, "you"), return_exceptions=True)
        hung_up = asyncio.ensure_future(news.next(jobs[0].id, "me"))
        await asyncio.sleep(0)
        hung_up.cancel()
        first = await asked
        store.cancel(jobs[0].id, "me")
        return [*first, await news.next(jobs[0].id, "me")]

    *told, other, again = asyncio.run(ask())
    assert [view.id for view in told] == [job.id for job in jobs for _ in range(20)]
    assert isinstance(other, Problem)
    assert other.status == 404
    assert again.state == "cancelled"
    assert near.called == ["views", "views"]
