"""The service on a running Ray cluster: `serve deploy`, deployed again, `serve run`, and that nothing of it stays."""

import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import psutil
import pytest
import yaml
from ray_head import RayHead
from service import free_port
from test_serve import image_of, same_image
from test_translate_job import write
from untrained import save_untrained

from aldm.cli import main
from aldm.presets import tiny
from serve.security import new_token
from serve.settings import Settings
from serve.store import IDLE_S

CONFIG = Path(__file__).resolve().parent.parent / "serve" / "deploy.yaml"


def config_with(port: int, **args: Any) -> dict[str, Any]:
    """deploy.yaml with another port and other arguments."""
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"] = {**application["args"], **args}
    return config


def deploy(head: RayHead, path: Path, config: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(config))
    words = ["serve", "deploy", "--address", head.address, str(path)]
    done = subprocess.run(words, env=head.environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def wait_for(url: str, wanted: int, **request: Any) -> httpx.Response:
    """Ask until the answer has the wanted status."""
    until = time.monotonic() + 180
    while True:
        try:
            answer = httpx.get(url, timeout=30, **request)
            if answer.status_code == wanted:
                return answer
            last = answer.text
        except httpx.TransportError as error:
            last = str(error)
        assert time.monotonic() < until, last
        time.sleep(0.3)


def own_address() -> str:
    """The address of this machine that is not loopback; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


def test_its_arguments_are_those_of_the_settings() -> None:
    (application,) = yaml.safe_load(CONFIG.read_text())["applications"]
    Settings(**application["args"])


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with RayHead(num_cpus=4) as head:
        yield head


def titles(head: RayHead) -> list[str]:
    """What of a service runs on the cluster: its store, copies of the model, the ingress."""
    found = []
    for process in head.processes():
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return [title for title in found if "StoreActor" in title or "ServeReplica" in title]


def nothing_stays(head: RayHead) -> None:
    """Wait until the service has gone, its job store a while after all else."""
    until = time.monotonic() + IDLE_S + 60
    while left := titles(head):
        assert time.monotonic() < until, left
        time.sleep(0.5)


@pytest.mark.slow
def test_deployed_used_and_deployed_again(head: RayHead, tmp_path: Path) -> None:
    diffusion = replace(tiny().diffusion, num_train_timesteps=1000)
    model, port = save_untrained(tmp_path / "model", diffusion=diffusion), free_port()
    tokens = tmp_path / "tokens"
    token = new_token(tokens, "ward")
    url, away = f"http://127.0.0.1:{port}", f"http://{own_address()}:{port}"
    scan = write(tmp_path / "scan.nii.gz", affine=np.diag([8.0, 8, 8, 1]))
    out = tmp_path / "t2.nii.gz"
    words = ["translate", scan, out, "--model", model, "--source", "t1", "--target", "t2"]
    assert main([str(word) for word in words]) == 0
    work = str(tmp_path / "work")
    deploy(head, tmp_path / "a.yaml", config_with(port, model=str(model), work_dir=work, token_file=None))
    wait_for(f"{url}/v1/health/ready", 200)
    assert httpx.get(f"{away}/v1/models").status_code == 403  # open to this machine alone, whatever it listens on
    fields = {"source": "t1", "target": "t2"}
    files = {"volume": (scan.name, scan.read_bytes())}
    answer = httpx.post(f"{url}/v1/translate", files=files, data=fields, timeout=120)
    assert answer.status_code == 200, answer.text
    same_image(image_of(answer.content), nibabel.load(out))

    long = fields | {"sampler": "ddpm", "num_inference_steps": "1000", "num_samples": "2"}
    job = httpx.post(f"{url}/v1/translations", files=files, data=long, timeout=120).json()
    again = config_with(port, model=str(model), work_dir=work, token_file=str(tokens), max_queue=3)
    deploy(head, tmp_path / "b.yaml", again)
    wait_for(f"{url}/v1/models", 401)
    headers = {"Authorization": f"Bearer {token}"}
    limits = wait_for(f"{away}/v1/models", 200, headers=headers).json()["limits"]
    assert limits["max_queue"] == 3
    wait_for(f"{away}/v1/health/ready", 200)
    record = json.loads((tmp_path / "work" / "jobs" / job["id"] / "job.json").read_text())
    assert (record["state"], record["attempt"]) in (("running", 1), ("done", 1))  # the old copy finishes it
    answer = httpx.post(f"{away}/v1/translate", files=files, data=fields, headers=headers, timeout=120)
    assert answer.status_code == 200, answer.text
    same_image(image_of(answer.content), nibabel.load(out))
    until = time.monotonic() + 120
    while record["state"] == "running":
        assert time.monotonic() < until
        time.sleep(0.5)
        record = json.loads((tmp_path / "work" / "jobs" / job["id"] / "job.json").read_text())
    assert (record["state"], record["attempt"]) == ("done", 1)
    assert any("StoreActor" in title for title in titles(head))
    words = ["serve", "shutdown", "--yes", "--address", head.address]
    subprocess.run(words, env=head.environment, check=True, capture_output=True)
    nothing_stays(head)


@pytest.mark.slow
def test_a_waiting_job_adds_a_copy_of_the_model(head: RayHead, tmp_path: Path) -> None:
    """Workers fetch their jobs, so Ray Serve sees no request wait: the store's own count has to bring the copy."""
    diffusion = replace(tiny().diffusion, num_train_timesteps=1000)
    model, port = save_untrained(tmp_path / "model", diffusion=diffusion), free_port()
    url, work = f"http://127.0.0.1:{port}", tmp_path / "work"
    config = config_with(port, model=str(model), work_dir=str(work), token_file=None, num_replicas=1, max_replicas=2)
    deploy(head, tmp_path / "a.yaml", config)
    wait_for(f"{url}/v1/health/ready", 200)
    scan = write(tmp_path / "scan.nii.gz", affine=np.diag([8.0, 8, 8, 1]))
    fields = {"source": "t1", "target": "t2", "sampler": "ddpm", "num_inference_steps": "1000", "num_samples": "4"}
    jobs = []
    for _ in range(2):
        answer = httpx.post(f"{url}/v1/translations", files={"volume": (scan.name, scan.read_bytes())}, data=fields)
        assert answer.status_code == 202, answer.text
        jobs.append(answer.json()["id"])
    until = time.monotonic() + 120
    while True:
        records = [json.loads((work / "jobs" / job / "job.json").read_text()) for job in jobs]
        workers = {record["worker"] for record in records if record["state"] == "running"}
        if len(workers) == 2:
            break
        assert time.monotonic() < until, records
        assert "done" not in {record["state"] for record in records}, "the jobs are too short to need another copy"
        time.sleep(0.5)
    for job in jobs:
        httpx.delete(f"{url}/v1/translations/{job}")
    words = ["serve", "shutdown", "--yes", "--address", head.address]
    subprocess.run(words, env=head.environment, check=True, capture_output=True)
    nothing_stays(head)


@pytest.mark.slow
def test_run_until_ctrl_c(head: RayHead, tmp_path: Path) -> None:
    model, port = save_untrained(tmp_path / "model"), free_port()
    token = new_token(tmp_path / "tokens", "ward")
    environment = head.environment | {"RAY_ADDRESS": f"127.0.0.1:{head.ports['port']}"}
    words = ["serve", "start", "--http-host", "127.0.0.1", "--http-port", str(port)]  # where serve run listens
    subprocess.run(words, env=environment, check=True, capture_output=True)
    words = ["serve", "run", "serve.app:build_app", f"model={model}", f"token_file={tmp_path / 'tokens'}"]
    with (tmp_path / "run.log").open("wb") as log:
        process = subprocess.Popen(
            [*words, f"work_dir={tmp_path / 'work'}"],
            env=environment,
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job ignores it
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/v1/health/ready", 200)
        scan = write(tmp_path / "scan.nii.gz", affine=np.diag([8.0, 8, 8, 1]))
        files, fields = {"volume": (scan.name, scan.read_bytes())}, {"source": "t1", "target": "t2"}
        url = f"http://127.0.0.1:{port}/v1/translate"
        assert httpx.post(url, files=files, data=fields, timeout=120).status_code == 401
        headers = {"Authorization": f"Bearer {token}"}
        answer = httpx.post(url, files=files, data=fields, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        assert image_of(answer.content).shape == nibabel.load(scan).shape
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0
    finally:
        process.kill()
        process.wait()
    nothing_stays(head)
