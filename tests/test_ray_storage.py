"""Where the checkpoints of a run are kept: in its folder, in another one, or in a bucket of a local S3 server."""

import json
import logging
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from jobs import run
from pyarrow.fs import FileSelector, FileSystem
from ray_runs import losses

from aldm import cli
from aldm.errors import UserError
from pipelines.ray_storage import Storage

TINY = ("--preset", "tiny", "--device", "cpu", "--log-level", "warning", "--no-tracking")
STEADY = ("--set", "train_ms_spade.warmup_steps=0", "--set", "train_ms_spade.decay=constant")
"""A learning rate that does not depend on the length of the training."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Query of URIs of a local S3 server that has the bucket `bucket`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line a request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
        urllib.request.urlopen(request, timeout=60).close()
        yield f"?scheme=http&region=us-east-1&endpoint_override=127.0.0.1:{port}"
    finally:
        server.stop()


def test_the_storage_of_a_run_is_found_from_its_name(tmp_path: Path) -> None:
    assert Storage.of(tmp_path / "r1", None).parent == str(tmp_path / "r1")
    elsewhere = Storage.of(tmp_path / "r1", "s3://bucket/aldm")
    assert (elsewhere.parent, elsewhere.name) == ("s3://bucket/aldm", "r1")


def test_a_storage_that_does_not_answer_is_refused_in_time_and_without_its_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.ray_storage.ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"s3://me:w0rd5ecret@bucket/a?scheme=http&region=eu&endpoint_override=127.0.0.1:{silent.getsockname()[1]}"
        storage = Storage.of(tmp_path / "run", uri)
        begin = time.monotonic()
        with pytest.raises(UserError, match=r"--storage-path s3://\*\*\*@bucket/a\S* cannot be .* no answer in 1 s"):
            storage.check(resume=False, overwrite=False)
    assert time.monotonic() - begin < 30
    assert "w0rd5ecret" not in f"{storage.flag} {storage.record}"


@pytest.mark.slow
def test_a_prefix_of_several_levels_is_made_and_a_bucket_is_not(server: str, tmp_path: Path) -> None:
    Storage.of(tmp_path / "run", f"s3://me:w0rd5ecret@bucket/one/two{server}").check(resume=False, overwrite=False)
    with pytest.raises(UserError, match="Bucket 'nowhere' not found"):
        Storage.of(tmp_path / "run", f"s3://me:w0rd5ecret@nowhere/one{server}").check(resume=False, overwrite=False)


@pytest.mark.slow
def test_a_training_goes_on_from_a_bucket(
    ray_cluster: None, haar_latents: Path, server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In two parts on Ray it is the curve of one process; what is left on this machine has no secret."""

    folder = tmp_path / "run"
    words = ("train", "ms-spade", "--latents", haar_latents, *TINY, *STEADY)
    uri = f"s3://me:w0rd5ecret@bucket/some/prefix{server}"
    kept = (*words, "--run-dir", folder, "--storage-path", uri)
    assert run(*kept, "--max-steps", 4) == 0
    assert not (folder / "checkpoints").exists()
    first = (folder / "metrics.jsonl").read_bytes()
    assert run(*kept[:-2], "--max-steps", 6, "--resume") == cli.EXIT_USER_ERROR
    assert run(*kept, "--max-steps", 6, "--resume") == 0
    assert run(*words, "--run-dir", tmp_path / "plain", "--max-steps", 6, "--engine", "plain") == 0

    assert (folder / "metrics.jsonl").read_bytes().startswith(first), "it started over"
    assert losses(folder).keys() == losses(tmp_path / "plain").keys()
    np.testing.assert_allclose(list(losses(folder).values()), list(losses(tmp_path / "plain").values()), rtol=1e-4)
    filesystem, path = FileSystem.from_uri(uri)
    files = filesystem.get_file_info(FileSelector(f"{path}/run", recursive=True))
    assert any(file.path.endswith("step-00000006/engine.pt") for file in files)
    starts = json.loads((folder / "run.json").read_text())["starts"]
    assert [start["storage"] for start in starts] == [f"s3://***@bucket/some/prefix{server}"] * 2
    assert not [file for file in folder.rglob("*") if file.is_file() and b"w0rd5ecret" in file.read_bytes()]
    output = capfd.readouterr()
    assert "w0rd5ecret" not in output.out + output.err
