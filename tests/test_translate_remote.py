"""`aldm translate --server`: the files that the same command makes here, made by a running service."""

import csv
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import nibabel
import numpy as np
import pydicom
import pytest
from scans import same_image, write
from series import eight_times, make_series
from service import RunningService, free_port
from test_serve import LONG

import pipelines.translate_remote
from aldm.cli import main
from pipelines.translate_remote import _pause


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("scans") / "sub-01_T1w.nii.gz", affine=np.diag([8.0, 8, 8, 1]))


def run(*words: object) -> int:
    return main(["translate", *map(str, words)])


def test_the_same_files_as_without_a_server(service: RunningService, scan: Path, tmp_path: Path, capsys) -> None:
    flags = ("--source", "t1", "--target", "t2", "--num-samples", 3, "--seed", 4)
    for folder, where in (("here", ("--model", service.folder)), ("there", ("--server", service.url))):
        (tmp_path / folder).mkdir()
        out, std = tmp_path / folder / "t2.nii", tmp_path / folder / "std.nii.gz"
        assert run(scan, out, *where, *flags, "--spread", std) == 0
    assert "t2.nii: t2 from t1, synthetic; made as t2.json says" in capsys.readouterr().out
    here, there = tmp_path / "here", tmp_path / "there"
    assert {path.name for path in here.iterdir()} == {path.name for path in there.iterdir()}
    for name in ("t2.nii", "std.nii.gz"):
        same_image(nibabel.load(there / name), nibabel.load(here / name))
    made, wanted = (json.loads((folder / "t2.json").read_text()) for folder in (there, here))
    assert made.pop("server") == service.url
    differ = {key for key in made.keys() | wanted.keys() if made.get(key) != wanted.get(key)}
    assert differ <= {"created", "time", "device", "threads", "num_threads"}


def test_all_targets_of_a_folder_with_a_guessed_source(service: RunningService, scan: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a_T1w.nii.gz", "b_T2w.nii.gz", "c.nii.gz"):
        (scans / name).write_bytes(scan.read_bytes())
    assert run(scans, tmp_path / "out", "--server", service.url, "--source", "auto", "--target", "pd") == 2
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [(row["status"], row["source"]) for row in rows] == [("ok", "t1"), ("ok", "t2"), ("failed", "")]
    assert "give --source" in rows[2]["message"]
    assert run(scan, tmp_path / "all", "--server", service.url, "--source", "t1", "--target", "all") == 0
    names = {path.name for path in (tmp_path / "all").glob("*.nii.gz")}
    assert names == {f"sub-01_T1w_synthetic-{target}.nii.gz" for target in ("t1", "t2", "pd")}


def test_a_dicom_series_there_and_back(service: RunningService, tmp_path: Path) -> None:
    make_series(tmp_path / "series", edit=eight_times)
    flags = ("--source", "t1", "--target", "t2", "--format", "dicom")
    for out, where in (("here", ("--model", service.folder)), ("there", ("--server", service.url))):
        assert run(tmp_path / "series", tmp_path / out, *where, *flags) == 0
    files = [sorted((tmp_path / out).iterdir()) for out in ("here", "there")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    for here, there in zip(*files, strict=True):
        wanted, got = pydicom.dcmread(here), pydicom.dcmread(there)
        assert got.ImagePositionPatient == wanted.ImagePositionPatient
        np.testing.assert_allclose(got.pixel_array, wanted.pixel_array, atol=2e-3 * np.ptp(wanted.pixel_array))


def test_nothing_stays_at_the_service(service: RunningService, scan: Path, tmp_path: Path) -> None:
    before = set((service.work_dir / "jobs").iterdir())
    assert run(scan, tmp_path / "o.nii", "--server", service.url, "--source", "t1", "--target", "t2") == 0
    assert set((service.work_dir / "jobs").iterdir()) == before


def test_a_dry_run_asks_and_sends_nothing(service: RunningService, scan: Path, tmp_path: Path, capsys) -> None:
    flags = ("--server", service.url, "--source", "t1", "--target", "t2", "--dry-run")
    assert run(scan, tmp_path / "o.nii", *flags) == 0
    assert f"{service.url}: " in capsys.readouterr().out
    assert not (tmp_path / "o.nii").exists()


def test_ctrl_c_cancels_at_the_service(service: RunningService, scan: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "aldm.cli", "translate", scan, tmp_path / "o.nii", "--server", service.url]
    words += ["--source", "t1", "--target", "t2", "--sampler", "ddpm", "--num-inference-steps", 500]
    process = subprocess.Popen(list(map(str, [*words, "--num-samples", 8])), start_new_session=True)
    until = time.monotonic() + 60
    while "jobs_running 1" not in service.client.get("/metrics").text:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    while "jobs_running 0" not in service.client.get("/metrics").text:
        assert time.monotonic() < until + 30
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--server", "SERVER", "--model", "x"], "--model: a service decides that by itself"),
        (["--server", "SERVER", "--max-memory-gb", "4"], "--max-memory-gb"),
        (["--server", "nowhere"], "wanted an address such as http://"),
        (["--server", "http://127.0.0.1:PORT"], "does not answer"),
        (["--server", "SERVER", "--target", "flair"], "flair"),
        (["--server", "SERVER", "--num-samples", "99"], "the limit is 16"),
        (["--server", "SERVER", "--spread", "std.nii"], "--spread is the standard deviation of several samples"),
        (["--server", "SERVER", "--spread", "std.nii", "--dry-run"], "--spread is the standard deviation of several"),
        (["--server", "SERVER", "--uncertainty", "u.nii", "--dry-run"], "--uncertainty needs a model that knows"),
        (["--server", "SERVER", "--token-file", "missing"], "--token-file missing cannot be read"),
        (["--token-file", "missing"], "--token-file is for --server"),
    ],
)
def test_bad_calls(service: RunningService, scan: Path, tmp_path: Path, capsys, monkeypatch, flags, words) -> None:
    monkeypatch.chdir(tmp_path)
    known = {"SERVER": service.url, "http://127.0.0.1:PORT": f"http://127.0.0.1:{free_port()}"}
    if "--target" not in flags:
        flags = [*flags, "--target", "t2"]
    assert run(scan, tmp_path / "o.nii", "--source", "t1", *[known.get(flag, flag) for flag in flags]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bad_file_is_told_as_the_service_tells_it(service: RunningService, tmp_path: Path, capsys) -> None:
    (tmp_path / "scan.nii").write_text("not an image")
    flags = ("--server", service.url, "--source", "t1", "--target", "t2")
    assert run(tmp_path / "scan.nii", tmp_path / "o.nii", *flags) == 2
    assert "not a NIfTI" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["scan.nii"]


# --------------------------------------------------------------------------------------------- a service that is away


class Unreliable(ThreadingHTTPServer):
    """Passes requests on to a service, but for those that `fault` says something of: a status, or 0 to hang up."""

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Pass)
        self.url, self.seen, self.headers = url, [], {}
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class _Pass(BaseHTTPRequestHandler):
    def _pass(self) -> None:
        server: Unreliable = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server.seen.append((self.command, self.path))
        fault = server.fault(self.command, self.path)
        if fault == 0:
            self.close_connection = True
            return
        if fault is not None:
            self.send_response(fault)
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        answer = httpx.request(self.command, server.url + self.path, content=body, headers=headers, timeout=60)
        self.send_response(answer.status_code)
        for name in ("content-type", "retry-after", "location"):
            if name in answer.headers:
                self.send_header(name, answer.headers[name])
        if answer.status_code != 204:
            self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_GET = do_POST = do_DELETE = _pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def unreliable(service: RunningService) -> Iterator[Unreliable]:
    """A way to the service that can be made to fail."""
    with Unreliable(service.url) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def first(count: int, method: str, words: str, *faults: int) -> Callable[[str, str], int | None]:
    """Let the first requests of a kind fail."""
    met = []

    def fault(got: str, path: str) -> int | None:
        if got == method and words in path and len(met) < count:
            met.append(path)
            return faults[(len(met) - 1) % len(faults)]
        return None

    return fault


def test_a_busy_service_is_waited_for(service: RunningService, scan: Path, tmp_path: Path) -> None:
    jobs = []
    while (answer := service.post("/v1/translations", scan, target="t2", **LONG)).status_code == 202:
        jobs.append(answer.json())
    assert answer.status_code == 503

    def make_room() -> None:
        for job in jobs:
            service.client.delete(job["links"]["self"])

    timer = threading.Timer(2, make_room)
    timer.start()
    assert run(scan, tmp_path / "o.nii", "--server", service.url, "--source", "t1", "--target", "t2") == 0
    timer.join()


def test_what_is_done_is_fetched_with_patience(
    unreliable: Unreliable, service: RunningService, scan: Path, tmp_path: Path
) -> None:
    flags = ("--source", "t1", "--target", "t2", "--num-samples", 2, "--seed", 4)
    assert run(scan, tmp_path / "wanted.nii", "--server", service.url, *flags) == 0
    before = set((service.work_dir / "jobs").iterdir())
    faults = [
        first(2, "POST", "/v1/translations", 503),
        first(1, "GET", "/provenance", 0),
        first(2, "GET", "/spread", 503, 502),
        first(3, "GET", "/result", 0, 503, 500),
    ]
    unreliable.headers = {"Retry-After": formatdate(time.time() + 1, usegmt=True)}  # a date, which is allowed
    unreliable.fault = lambda *request: next((code for one in faults if (code := one(*request)) is not None), None)
    std = tmp_path / "std.nii.gz"
    assert run(scan, tmp_path / "got.nii", "--server", unreliable.address, *flags, "--spread", std) == 0
    same_image(nibabel.load(tmp_path / "got.nii"), nibabel.load(tmp_path / "wanted.nii"))
    assert [sum(words in path for _, path in unreliable.seen) for words in ("/provenance", "/spread")] == [2, 3]
    assert set((service.work_dir / "jobs").iterdir()) == before


def test_a_service_that_goes_away_keeps_what_it_made(
    unreliable: Unreliable, service: RunningService, scan: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(pipelines.translate_remote, "PATIENCE_S", 2.0)
    unreliable.fault = lambda method, path: 503 if "/result" in path else None
    flags = ("--server", unreliable.address, "--source", "t1", "--target", "t2")
    assert run(scan, tmp_path / "o.nii", *flags) == 2
    said = capsys.readouterr().err
    assert "what it has made is kept there for a while, at /v1/translations/" in said
    (job,) = {path.split("/")[3] for _, path in unreliable.seen if "/result" in path}
    assert service.client.get(f"/v1/translations/{job}/result?target=t2").status_code == 200
    assert service.client.delete(f"/v1/translations/{job}").status_code == 204
    assert list(tmp_path.iterdir()) == []


def test_no_place_for_ever_is_an_error(unreliable: Unreliable, scan: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(pipelines.translate_remote, "BUSY_S", 1.0)
    unreliable.fault = lambda method, path: 503 if method == "POST" else None
    unreliable.headers = {"Retry-After": "1"}
    flags = ("--server", unreliable.address, "--source", "t1", "--target", "t2")
    assert run(scan, tmp_path / "o.nii", *flags) == 2
    assert "has had no place for sub-01_T1w.nii.gz" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("said", "low", "high"),
    [
        ("7", 7, 7),
        ("0", 0.5, 0.5),
        ("99999", 120, 120),
        (None, 5, 5),
        ("soon", 5, 5),
        (600, 120, 120),  # seconds from now, said as a date
        (-600, 0.5, 0.5),
        ("Sunday, 06-Nov-94 08:49:37 GMT", 0.5, 0.5),
    ],
)
def test_retry_after_is_seconds_or_a_date(said: str | int | None, low: float, high: float) -> None:
    if isinstance(said, int):
        said = formatdate(time.time() + said, usegmt=True)
    answer = httpx.Response(503, headers={} if said is None else {"Retry-After": said})
    assert low <= _pause(answer) <= high
