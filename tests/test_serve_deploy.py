"""serve/deploy.yaml on a running Ray cluster: `serve deploy`, a translation, and a second deploy, other settings."""

import json
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
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


@pytest.mark.slow
def test_deployed_used_and_deployed_again(tmp_path: Path) -> None:
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
    with RayHead(num_cpus=4) as head:
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
