"""The service on a running Ray cluster: `serve deploy`, deployed again, `serve run`, and that nothing of it stays."""

import contextlib
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import psutil
import pytest
import yaml
from kubernetes_objects import one
from ray_head import RayHead
from scans import image_of, same_image, write
from service import free_port
from untrained import save_untrained

from aldm.checkpoint import load_checkpoint, read_checkpoint_record, save_checkpoint
from aldm.cli import main
from aldm.presets import tiny
from pipelines.registry import register
from pipelines.serve_config import with_model
from serve.security import new_token
from serve.settings import Settings
from serve.store import IDLE_S

FIELDS = {"source": "t1", "target": "t2"}
LONG = {"sampler": "ddpm", "num_inference_steps": "1000"}
CONFIG = Path(__file__).resolve().parent.parent / "serve" / "deploy.yaml"


def overlay_config(port: int, **args: Any) -> dict[str, Any]:
    """The configuration that the overlay dev gives KubeRay, with another port and other arguments."""
    config = yaml.safe_load(one("dev", "RayService", "aldm-translator")["spec"]["serveConfigV2"])
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"] |= args
    return config


class Watch:
    """Asks a running service again and again, until its `with` block ends.

    Attributes:
        seen: every answer: path, status (or what went wrong), seconds that it took, hash of the model or "".
    """

    PATHS = ("/v1/health/ready", "/v1/models")

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        """Take where the service is, and what is sent with every request."""
        self.seen: list[tuple[str, int | str, float, str]] = []
        self._url, self._headers, self._end = url, headers, threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._end.wait(0.05):
            for path in self.PATHS:
                begin = time.monotonic()
                try:
                    answer = httpx.get(self._url + path, headers=self._headers, timeout=30)
                    found: tuple[int | str, str] = (answer.status_code, hash_of(answer) if path == "/v1/models" else "")
                except httpx.TransportError as error:
                    found = (repr(error), "")
                self.seen.append((path, found[0], time.monotonic() - begin, found[1]))

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def hash_of(answer: httpx.Response) -> str:
    """The hash of the model that an answer of /v1/models tells of."""
    return str(answer.json()["models"][0]["hash"]) if answer.status_code == 200 else ""


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
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address beside loopback")
        return str(probe.getsockname()[0])


def test_its_arguments_are_those_of_the_settings() -> None:
    (application,) = yaml.safe_load(CONFIG.read_text())["applications"]
    Settings(**application["args"])


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two translators, 1 and 2, which are these versions of `translator` in its mlflow.db."""
    folder = tmp_path_factory.mktemp("registry")
    first = load_checkpoint(save_untrained(folder / "1", diffusion=replace(tiny().diffusion, num_train_timesteps=1000)))
    weights = {name: weight / 2 if weight.is_floating_point() else weight for name, weight in first.weights.items()}
    save_checkpoint(folder / "2", kind=first.kind, config=first.config, weights=weights, meta=first.meta)
    for name in "12":
        register(folder / name, "translator", None, f"sqlite:///{folder}/mlflow.db")
    return folder


@pytest.fixture(scope="module")
def head(registry: Path) -> Iterator[RayHead]:
    """A cluster whose nodes know the registry by their environment, as those of k8s/ do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{registry}/mlflow.db")
        with RayHead(num_cpus=4) as head:
            yield head


def by_hand(model: Path, scan: Path, out: Path) -> nibabel.Nifti1Image:
    """What `aldm translate` makes of a scan."""
    words = ["translate", scan, out, "--model", model, "--source", "t1", "--target", "t2"]
    assert main([str(word) for word in words]) == 0
    return nibabel.load(out)


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


@dataclass(frozen=True)
class Deployed:
    """A service on the cluster, as the overlay dev configures it: with tokens, and two copies at most."""

    config: dict[str, Any]
    url: str
    tokens: Path
    work: Path
    headers: dict[str, str]

    def record(self, job: dict[str, Any]) -> dict[str, Any]:
        """What the store has written of a job."""
        found: dict[str, Any] = json.loads((self.work / "jobs" / job["id"] / "job.json").read_text())
        return found

    def post(self, path: str, scan: Path, **fields: str) -> httpx.Response:
        files = {"volume": (scan.name, scan.read_bytes())}
        return httpx.post(f"{self.url}{path}", files=files, data=FIELDS | fields, headers=self.headers, timeout=120)


@pytest.fixture(scope="module")
def deployed(head: RayHead, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    """The overlay's configuration; what comes after these tests finds nothing of it."""
    folder = tmp_path_factory.mktemp("deployed")
    port, tokens, work = free_port(), folder / "tokens", folder / "work"
    headers = {"Authorization": f"Bearer {new_token(tokens, 'ward')}"}
    url = f"http://{own_address()}:{port}"
    config = overlay_config(port, work_dir=str(work), token_file=str(tokens))
    deploy(head, folder / "a.yaml", config)
    wait_for(f"{url}/v1/health/ready", 200)
    yield Deployed(config, url, tokens, work, headers)
    words = ["serve", "shutdown", "--yes", "--address", head.address]
    subprocess.run(words, env=head.environment, check=True, capture_output=True)
    nothing_stays(head)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return write(tmp_path / "scan.nii.gz", affine=np.diag([8.0, 8, 8, 1]))


@pytest.mark.slow
@pytest.mark.network
def test_run_until_ctrl_c(head: RayHead, scan: Path, tmp_path: Path) -> None:
    """Without tokens; it comes before the tests that share a deployed service."""
    model, port = save_untrained(tmp_path / "model"), free_port()
    environment = head.environment | {"RAY_ADDRESS": f"127.0.0.1:{head.ports['port']}"}
    words = ["serve", "start", "--http-host", "0.0.0.0", "--http-port", str(port)]  # where serve run listens
    subprocess.run(words, env=environment, check=True, capture_output=True)
    words = ["serve", "run", "serve.app:build_app", f"model={model}"]
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
        away = f"http://{own_address()}:{port}"
        assert httpx.get(f"{away}/v1/models").status_code == 403  # without tokens open to this machine alone
        files, url = {"volume": (scan.name, scan.read_bytes())}, f"http://127.0.0.1:{port}/v1/translate"
        answer = httpx.post(url, files=files, data=FIELDS, timeout=120)
        assert answer.status_code == 200, answer.text
        assert image_of(answer.content).shape == nibabel.load(scan).shape
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0
    finally:
        process.kill()
        process.wait()
    nothing_stays(head)


@pytest.mark.slow
@pytest.mark.network
def test_deployed_used_and_deployed_again_without_a_gap(
    deployed: Deployed, head: RayHead, registry: Path, scan: Path, tmp_path: Path
) -> None:
    """The overlay's configuration, then that of a roll: its next version of the model."""
    url, headers = deployed.url, deployed.headers
    assert httpx.get(f"{url}/v1/models").status_code == 401
    answer = deployed.post("/v1/translate", scan)
    assert answer.status_code == 200, answer.text
    same_image(image_of(answer.content), by_hand(registry / "1", scan, tmp_path / "first.nii.gz"))

    job = deployed.post("/v1/translations", scan, **LONG, num_samples="2").json()
    later = {"Authorization": f"Bearer {new_token(deployed.tokens, 'ward-2')}"}
    wait_for(f"{url}/v1/models", 200, headers=later)  # read by the running service, and nothing is deployed again
    deployed.config["applications"][0]["args"]["max_queue"] = 3
    text = with_model(yaml.safe_dump(deployed.config), "models:/translator/2", "aldm")
    with Watch(url, headers) as watch:
        deploy(head, tmp_path / "b.yaml", yaml.safe_load(text))
        until = time.monotonic() + 180
        while (answer := httpx.get(f"{url}/v1/models", headers=later, timeout=30)).json()["limits"]["max_queue"] != 3:
            assert time.monotonic() < until
            time.sleep(0.3)
        time.sleep(5)  # until the former copies have been told to go
    assert {status for _, status, *_ in watch.seen} == {200}, [each for each in watch.seen if each[1] != 200]
    hashes = [found for _, _, _, found in watch.seen if found]
    assert [hashes[0], hashes[-1]] == [read_checkpoint_record(registry / name)["hash"] for name in "12"]
    record = deployed.record(job)
    assert (record["state"], record["attempt"]) in (("running", 1), ("done", 1))  # the old copy finishes it
    answer = deployed.post("/v1/translate", scan)
    assert answer.status_code == 200, answer.text
    same_image(image_of(answer.content), by_hand(registry / "2", scan, tmp_path / "second.nii.gz"))
    until = time.monotonic() + 120
    while record["state"] == "running":
        assert time.monotonic() < until
        time.sleep(0.5)
        record = deployed.record(job)
    assert (record["state"], record["attempt"]) == ("done", 1)
    assert any("StoreActor" in title for title in titles(head))


@pytest.mark.slow
@pytest.mark.network
def test_a_waiting_job_adds_a_copy_of_the_model(deployed: Deployed, scan: Path) -> None:
    """Workers fetch their jobs, so Ray Serve sees no request wait: the store's own count has to bring the copy."""
    jobs = []
    for _ in range(2):
        answer = deployed.post("/v1/translations", scan, **LONG, num_samples="4")
        assert answer.status_code == 202, answer.text
        jobs.append(answer.json())
    until = time.monotonic() + 120
    while True:
        records = [deployed.record(job) for job in jobs]
        workers = {record["worker"] for record in records if record["state"] == "running"}
        if len(workers) == 2:
            break
        assert time.monotonic() < until, records
        assert "done" not in {record["state"] for record in records}, "the jobs are too short to need another copy"
        time.sleep(0.5)
    for job in jobs:
        httpx.delete(f"{deployed.url}/v1/translations/{job['id']}", headers=deployed.headers)
