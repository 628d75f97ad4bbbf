"""The translation service when its processes are killed, when it is stopped and started again, and with tokens."""

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from scans import image_of, same_image, write
from service import RunningService

from aldm.cli import main
from serve.security import new_token

MEDIUM = {"sampler": "ddpm", "num_inference_steps": 600, "target": "t2", "source": "t1", "seed": 5}
"""A translation of some seconds."""


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scans") / "scan.nii.gz", affine=np.diag([8.0, 8, 8, 1]))


@pytest.fixture(scope="module")
def wanted(scan: Path, service: RunningService, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What MEDIUM makes of the scan by hand."""
    out = tmp_path_factory.mktemp("wanted") / "t2.nii.gz"
    words = ["translate", scan, out, "--model", service.folder, "--source", "t1", "--target", "t2", "--seed", 5]
    assert main([str(word) for word in (*words, "--sampler", "ddpm", "--num-inference-steps", 600)]) == 0
    return image_of(out.read_bytes())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("killed", "attempts"),
    [
        pytest.param(":model", 2, id="model", marks=pytest.mark.smoke),
        pytest.param(":api", 1, id="ingress"),
        pytest.param("StoreActor", 1, id="store"),
    ],
)
def test_a_killed_process_costs_at_most_one_attempt(
    service: RunningService, scan: Path, wanted: Any, killed: str, attempts: int
) -> None:
    job = service.submit(scan, **MEDIUM)
    service.wait(job, "running")
    time.sleep(1)
    process = service.process_of(killed)
    assert service.job(job)["state"] == "running"
    process.kill()
    done = service.wait(job, wounded=True)
    assert (done["state"], done["attempt"]) == ("done", attempts), done
    assert not process.is_running()
    same_image(image_of(service.result(job, "t2")), wanted)
    after = service.wait(service.submit(scan, **MEDIUM | {"sampler": "ddim", "num_inference_steps": 2}))
    assert after["state"] == "done"


@pytest.mark.slow
def test_a_stream_of_events_that_breaks_can_be_taken_up_again(service: RunningService, scan: Path) -> None:
    """What the page and the client do when the ingress dies."""
    job = service.submit(scan, **MEDIUM)
    seen: list[str] = []

    def listen() -> None:
        with service.client.stream("GET", job["links"]["events"]) as answer:
            seen.extend(answer.iter_lines())

    def broken() -> None:
        try:
            listen()
        except httpx.TransportError:
            seen.append("broken")

    thread = threading.Thread(target=broken)
    thread.start()
    service.wait(job, "running")
    service.process_of(":api").kill()
    thread.join(60)
    assert not thread.is_alive()
    assert service.wait(job, wounded=True)["state"] == "done"
    listen()
    assert '"state":"done"' in seen[-2] + seen[-1]


# ------------------------------------------------------------------------------------- tokens, the end, and a new start


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    path = tmp_path_factory.mktemp("tokens") / "tokens"
    return path, new_token(path, "ward-1"), new_token(path, "ward-2")


@pytest.fixture(scope="module")
def closed(
    service: RunningService, tokens: tuple[Path, str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningService]:
    """A service that wants tokens and makes batches, on all addresses.

    `service` comes first so that both do not start at once.
    """
    path, token, _ = tokens
    work = tmp_path_factory.mktemp("closed")
    flags = ("--token-file", str(path), "--host", "0.0.0.0", "--max-batch-size", "3")
    with RunningService(service.folder, work, *flags, token=token) as running:
        yield running


@pytest.mark.slow
def test_without_the_token_that_made_it_a_job_is_not_seen(
    closed: RunningService, tokens: tuple[Path, str, str], scan: Path
) -> None:
    job = closed.submit(scan, target="t2", source="t1")
    assert closed.wait(job)["state"] == "done"
    others = {"Authorization": f"Bearer {tokens[2]}"}
    with httpx.Client(base_url=closed.url, timeout=60) as client:
        assert client.get("/v1/models", headers=others).status_code == 200
        for path in (job["links"]["self"], job["links"]["events"], *job["links"]["results"]["t2"].values()):
            if path is not None:
                assert client.get(path, headers=others).status_code == 404
        assert client.delete(job["links"]["self"], headers=others).status_code == 404
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {tokens[1]}"}):
            answer = client.get(job["links"]["self"], headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        for path in ("/v1/models", "/v1/example", "/metrics"):
            assert client.get(path).status_code == 401
        assert client.post("/v1/translate", content=b"x").status_code == 401
        for path in ("/", "/docs", "/openapi.json", "/v1/health/live", "/v1/health/ready"):
            assert client.get(path).status_code == 200
    assert closed.job(job)["state"] == "done"
    logged = closed.log.read_text() + (closed.work_dir / "jobs" / job["id"] / "job.json").read_text()
    assert tokens[1] not in logged


@pytest.mark.slow
def test_the_client_sends_its_token(
    closed: RunningService, tokens: tuple[Path, str, str], scan: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    words = ["translate", str(scan), str(tmp_path / "t2.nii.gz"), "--server", closed.url]
    words += ["--source", "t1", "--target", "t2"]
    monkeypatch.delenv("ALDM_TOKEN", raising=False)
    assert main(words) == 2
    assert "wants a token: put it into a file" in capsys.readouterr().err
    (tmp_path / "token").write_text(tokens[2] + "\n")
    assert main([*words, "--token-file", str(tmp_path / "token")]) == 0
    monkeypatch.setenv("ALDM_TOKEN", tokens[2])
    assert main([*words, "--overwrite"]) == 0
    assert main([*words, "--overwrite", "--token-file", str(tokens[0])]) == 2  # the service's own file of hashes
    assert "wanted the token alone" in capsys.readouterr().err


@pytest.mark.slow
def test_a_token_is_taken_back_while_the_service_runs(closed: RunningService, tokens: tuple[Path, str, str]) -> None:
    path = tokens[0]
    kept = path.read_text()
    taken = {"Authorization": f"Bearer {new_token(path, 'ward-3')}"}
    for text, wanted in ((path.read_text(), 200), (kept, 401)):
        path.write_text(text)
        until = time.monotonic() + 60
        while (found := httpx.get(f"{closed.url}/v1/models", headers=taken, timeout=60).status_code) != wanted:
            assert time.monotonic() < until, found
            time.sleep(0.2)
    assert closed.client.get("/v1/models").status_code == 200


@pytest.mark.slow
def test_a_batch_gives_what_single_jobs_give(closed: RunningService, service: RunningService, scan: Path) -> None:
    busy = closed.submit(scan, **MEDIUM)
    closed.wait(busy, "running")
    fields = {"sampler": "ddpm", "num_inference_steps": 400, "source": "t1"}
    targets = ("t2", "pd", "t2", "pd")
    jobs = [closed.submit(scan, target=target, seed=seed, **fields) for seed, target in enumerate(targets)]
    closed.wait(jobs[1], "running")
    assert closed.client.delete(jobs[1]["links"]["self"]).status_code == 204  # the others of its batch go on
    single = [service.submit(scan, target=target, seed=seed, **fields) for seed, target in enumerate(targets)]
    done = [closed.wait(job) for job in jobs]
    assert [job["state"] for job in done] == ["done", "cancelled", "done", "done"]
    started = [job["started_at"] for job in done]
    assert started[0] == started[1] == started[2] < started[3]
    for number in (0, 2, 3):
        assert service.wait(single[number])["state"] == "done"
        target = targets[number]
        same_image(image_of(closed.result(jobs[number], target)), image_of(service.result(single[number], target)))
    assert closed.wait(busy)["state"] == "done"


@pytest.mark.slow
def test_sigterm_lets_running_jobs_finish_and_a_new_start_makes_the_rest(
    closed: RunningService, tokens: tuple[Path, str, str], scan: Path, wanted: Any
) -> None:
    first = closed.submit(scan, **MEDIUM)
    closed.wait(first, "running")
    second = closed.submit(scan, **MEDIUM)
    assert closed.stop(signal.SIGTERM) == 0
    assert closed.processes() == []
    record = (closed.work_dir / "jobs" / first["id"] / "job.json").read_text()
    assert '"state": "done"' in record
    path, _, old = tokens
    kept = [line for line in path.read_text().splitlines() if not line.startswith("ward-2 ")]
    path.write_text("\n".join(kept) + "\n")  # as docs/serving.md says that a token is taken back
    with closed:
        revoked = {"Authorization": f"Bearer {old}"}
        assert httpx.get(f"{closed.url}/v1/models", headers=revoked, timeout=60).status_code == 401
        assert closed.job(first)["state"] == "done"
        assert closed.wait(second)["state"] == "done"
        for job in (first, second):
            same_image(image_of(closed.result(job, "t2")), wanted)
        third = closed.submit(scan, **MEDIUM | {"num_samples": 4})
        closed.wait(third, "running")
        closed.signal(signal.SIGTERM)
        closed.await_log("once more to stop at once")
        assert closed.stop(signal.SIGTERM) == 0
    assert closed.processes() == []
    record = (closed.work_dir / "jobs" / third["id"] / "job.json").read_text()
    assert '"state": "running"' in record  # what a new start goes on with, see test_serve_jobs.py
