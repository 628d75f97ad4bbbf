"""`aldm translate --server`: the files that the same command makes here, made by a running service."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from service import RunningService, free_port
from test_dicom import make_series
from test_serve import eight_times, same_image
from test_translate_job import write

from aldm.cli import main


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
        assert run(scan, out, *where, *flags, "--uncertainty", std) == 0
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
    lines = (tmp_path / "out" / "results.csv").read_text().splitlines()
    assert [line.split(",")[4] for line in lines[1:]] == ["ok", "ok", "failed"]
    assert "give source" in lines[3]
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
        (["--server", "SERVER", "--uncertainty", "std.nii"], "--uncertainty is the spread of several samples"),
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
