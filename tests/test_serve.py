"""The translation service over HTTP, for real: files in and out, bad input, cancelling, and what it leaves behind."""

import contextlib
import gzip
import io
import json
import re
import select
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from scans import BAD, blob, image_of, nifti_bytes, noise, oblique, same_image, with_header, write
from series import DAMAGE, UNUSABLE, eight_times, make_series
from service import RunningService, forget_peak, peak_bytes

from aldm.cli import main

LONG = {"sampler": "ddpm", "num_inference_steps": 400, "num_samples": 8}
"""A translation that takes much longer than it takes to look at it."""


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An oblique, anisotropic volume on PIR axes with different codes and odd units; its name says T1."""
    path = tmp_path_factory.mktemp("scans") / "sub-01_T1w.nii.gz"
    affine = oblique(spacing=(7, 8, 9)) @ nibabel.orientations.inv_ornt_aff(
        nibabel.orientations.axcodes2ornt("PIR"), (14, 12, 10)
    )
    image = nibabel.Nifti1Image(blob().astype(np.int16), affine)
    image.set_sform(affine, code=4)
    image.set_qform(affine, code=2)
    image.header.set_xyzt_units("mm", "sec")
    image.header["aux_file"], image.header["db_name"] = b"Doe^Jane", b"ID-4711"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Doe^Jane was here"))
    nibabel.save(image, path)
    return path


def by_hand(service: RunningService, source: Path, out: Path, *flags: object) -> nibabel.Nifti1Image:
    words = ["translate", source, out, "--model", service.folder, "--source", "t1", *flags]
    assert main([str(word) for word in words]) == 0
    return nibabel.load(out)


# ------------------------------------------------------------------------------------------------------------- results


def test_results_are_those_of_aldm_translate(service: RunningService, scan: Path, tmp_path: Path) -> None:
    job = service.submit(scan, target=["t2", "pd"], num_samples=3, seed=11)
    assert job["source"] == "t1"
    assert job["source_from"] == "file name"
    done = service.wait(job)
    assert (done["state"], done["progress"], done["attempt"]) == ("done", 1.0, 1)
    for target in ("t2", "pd"):
        std = tmp_path / f"std_{target}.nii.gz"
        out = tmp_path / f"{target}.nii.gz"
        wanted = by_hand(service, scan, out, "--target", target, "--num-samples", 3, "--seed", 11, "--spread", std)
        result = image_of(service.result(job, target))
        same_image(result, wanted)
        np.testing.assert_array_equal(result.affine, nibabel.load(scan).affine)
        same_image(image_of(service.result(job, target, "spread")), nibabel.load(std))
        with Image.open(io.BytesIO(service.result(job, target, "preview"))) as picture:
            assert picture.format == "PNG"
            assert np.asarray(picture).std() > 10
        made = service.client.get(f"{job['links']['self']}/provenance", params={"target": target}).json()
        by = json.loads((tmp_path / f"{target}.json").read_text())
        keys = ("synthetic", "model_hash", "sampler", "num_inference_steps", "num_samples", "seed", "source", "target")
        assert {key: made[key] for key in keys} == {key: by[key] for key in keys}


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_one_blocking_call(service: RunningService, suffix: str, tmp_path: Path) -> None:
    source = write(tmp_path / f"scan{suffix}", affine=np.diag([8.0, 8, 8, 1]))
    answer = service.post("/v1/translate", source, source="t1", target="pd", seed=3)
    assert answer.status_code == 200
    assert answer.headers["content-disposition"] == 'attachment; filename="synthetic-pd.nii.gz"'
    same_image(
        image_of(answer.content),
        by_hand(service, source, tmp_path / "out.nii.gz", "--target", "pd", "--seed", 3),
    )


def test_the_source_is_guessed_from_the_header(service: RunningService, tmp_path: Path) -> None:
    source = write(tmp_path / "scan.nii.gz", descrip=b"axial PD, 3 mm")
    job = service.submit(source, target="t1")
    assert (job["source"], job["source_from"]) == ("pd", "header")
    unsaid = write(tmp_path / "unsaid.nii.gz")
    answer = service.post("/v1/translations", unsaid, target="t1")
    assert answer.status_code == 422
    assert "give source, one of t1, t2, pd" in answer.json()["detail"]
    for name, words in (
        ("sub-01_desc-T1w_mask.nii.gz", "a segmentation or a mask ('mask')"),
        ("t2_map.nii.gz", "a map ('map')"),
        ("PD_T2_dual.nii.gz", "may mean t2 or pd: give source"),
    ):
        answer = service.post("/v1/translations", write(tmp_path / name), target="t1")
        assert answer.status_code == 422
        assert words in answer.json()["detail"]
    service.wait(job)


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"series/{file.name}")
    return path


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dicom")
    make_series(folder / "series", angles=(4, -7, 12), edit=eight_times)
    return zipped(folder / "series", folder / "t1.zip")


def test_a_zipped_dicom_series_in_and_out(service: RunningService, series: Path, tmp_path: Path) -> None:
    words = ["translate", series.parent / "series", tmp_path / "out", "--model", service.folder]
    words += ["--source", "t1", "--target", "t2", "--format", "dicom"]
    assert main([str(word) for word in words]) == 0
    job = service.submit(series, target="t2", format="dicom")
    assert service.wait(job)["state"] == "done"
    with zipfile.ZipFile(io.BytesIO(service.result(job, "t2"))) as archive:
        got = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    wanted = [pydicom.dcmread(file) for file in sorted((tmp_path / "out").iterdir())]
    assert len(got) == len(wanted) > 1
    for header in (*got, *wanted):
        header.scaled = header.pixel_array * float(header.RescaleSlope) + float(header.RescaleIntercept)
    for each in (got, wanted):
        each.sort(key=lambda header: header.InstanceNumber)
    for one, other in zip(got, wanted, strict=True):
        assert one.ImagePositionPatient == other.ImagePositionPatient
        assert one.ImageOrientationPatient == other.ImageOrientationPatient
        np.testing.assert_allclose(one.scaled, other.scaled, atol=1e-3 * np.ptp(other.scaled))
        assert "synthetic" in str(one.get("DerivationDescription", "")) + str(one.ImageType).lower()
        assert one.get("PatientName", "") != "Doe^Jane"


def test_a_zipped_dicom_series_to_nifti(service: RunningService, series: Path, tmp_path: Path) -> None:
    answer = service.post("/v1/translate", series, target="t2")
    assert answer.status_code == 200, answer.text
    same_image(
        image_of(answer.content), by_hand(service, series.parent / "series", tmp_path / "o.nii.gz", "--target", "t2")
    )


def tells_much(_: int, header: pydicom.Dataset) -> None:
    """Put the patient where pydicom warns of it, and where free text is copied easily."""
    with pydicom.config.disable_value_validation():
        header.BodyPartExamined, header.PatientPosition = "DOE JANE", "Doe^Jane"
        header.StudyInstanceUID, header.SeriesDescription = "Doe^Jane", "t1 Doe^Jane"
        header.PatientID = "ID-4711" * 40
        header.PatientAge = "Doe^Jane is old"


def test_nothing_of_the_patient_is_kept(service: RunningService, series: Path, scan: Path, tmp_path: Path) -> None:
    make_series(tmp_path / "telling", edit=lambda k, header: (eight_times(k, header), tells_much(k, header)))
    make_series(tmp_path / "bad", edit=lambda k, header: setattr(header, "StudyInstanceUID", "Doe^Jane"))
    path = tmp_path / "bad" / "IM1.dcm"
    path.write_bytes(path.read_bytes().replace(b"-31.4\\", b"Doe^J\\"))
    refused(service.post("/v1/translations", zipped(tmp_path / "bad", tmp_path / "t1.zip"), target="t2"), 422)
    telling = zipped(tmp_path / "telling", tmp_path / "telling.zip")
    jobs = [
        service.submit(telling, target="t2", format="dicom"),
        service.submit(series, target="t2", format="dicom"),
        service.submit(scan, target="t2"),
    ]
    for job in jobs:
        assert service.wait(job)["state"] == "done"
    kept = [file for file in service.work_dir.rglob("*") if file.is_file()]
    assert len(kept) > 6
    secret = (b"Doe^J", b"DOE JANE", b"ID-4711", b"Elsewhere")
    logs = [path for path in (service.log, *service.logs()) if path.stat().st_size]
    assert len(logs) > 5
    assert [(path, word) for path in logs for word in secret if word in path.read_bytes()] == []
    secret += (b"secret", b"sub-01", b"19700101")
    for file in kept:
        content = file.read_bytes()
        with contextlib.suppress(gzip.BadGzipFile):
            content += gzip.decompress(content)
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                content = b"".join(archive.read(name) for name in archive.namelist())
        assert [word for word in secret if word in content] == [], file
    assert image_of(service.client.get(jobs[2]["links"]["source"]).content).shape == nibabel.load(scan).shape


# ------------------------------------------------------------------------------------------------- progress and the end


def events(service: RunningService, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with service.client.stream("GET", job["links"]["events"]) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            field, _, value = line.partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                assert name == "job", line
                yield json.loads(value)


def test_events_tell_every_change_until_the_end(service: RunningService, scan: Path) -> None:
    job = service.submit(scan, target="t2", **LONG)
    states, progress, cancelled = [], [], False
    for view in events(service, job):
        states.append(view["state"])
        progress += [view["progress"]] if view["state"] == "running" else []
        if len({value for value in progress if 0 < value < 1}) == 2 and not cancelled:
            cancelled = service.client.delete(job["links"]["self"]).status_code == 204
    assert cancelled
    assert (states[-1], states[-2]) == ("cancelled", "running")
    assert progress == sorted(progress)
    assert len(list(events(service, job))) == 1  # a finished one says so and ends


def test_the_last_event_of_a_translation_says_that_it_is_done(service: RunningService, scan: Path) -> None:
    *_, last = events(service, service.submit(scan, target="t2"))
    assert (last["state"], last["progress"]) == ("done", 1)


def test_cancelling_stops_the_sampler(service: RunningService, scan: Path) -> None:
    job = service.submit(scan, target="t2", **LONG)
    waiting = service.submit(scan, target="pd", **LONG)
    service.wait(job, "running")
    assert service.job(waiting)["state"] == "queued"
    for one in (waiting, job):
        assert service.client.delete(one["links"]["self"]).status_code == 204
    for one in (waiting, job):
        assert service.job(one)["state"] == "cancelled"
    following = service.wait(service.submit(scan, target="t2", num_inference_steps=1))
    assert following["state"] == "done"
    assert following["seconds_waited"] < 10  # of the cancelled one minutes were left
    answer = service.client.get(job["links"]["results"]["t2"]["result"])
    assert (answer.status_code, answer.headers["content-type"]) == (409, "application/problem+json")
    assert [file.name for file in (service.work_dir / "jobs" / job["id"]).iterdir()] == ["job.json"]
    assert service.client.delete(job["links"]["self"]).status_code == 204  # a finished one is forgotten
    assert service.client.get(job["links"]["self"]).status_code == 404
    assert not (service.work_dir / "jobs" / job["id"]).exists()


def test_a_blocking_call_that_hangs_up_is_cancelled(service: RunningService, scan: Path) -> None:
    before = counters(service)
    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=service.url, timeout=2) as client:
        client.post("/v1/translate", files={"volume": (scan.name, scan.read_bytes())}, data=LONG | {"target": "t2"})
    until = time.monotonic() + 120
    while counters(service)["cancelled"] == before["cancelled"]:
        assert time.monotonic() < until
        time.sleep(0.2)


def counters(service: RunningService) -> dict[str, float]:
    lines = service.client.get("/metrics").text.splitlines()
    found = {}
    for line in lines:
        if line.startswith("aldm_service_jobs_total"):
            found[line.split('"')[1]] = float(line.split()[-1])
    return found


# ------------------------------------------------------------------------------------------------------ what it refuses


def refused(answer: httpx.Response, status: int, *words: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == status
    for word in words:
        assert word in problem["detail"], problem
    assert "/tmp" not in problem["detail"]  # no path of the server


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_every_bad_file_is_refused(service: RunningService, suffix: str, tmp_path: Path) -> None:
    known = set((service.work_dir / "jobs").iterdir())
    memory = forget_peak(service.process_of(":api"))
    for name, (content, reason) in BAD.items():
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(gzip.compress(content) if suffix == ".nii.gz" and content else content)
        answer = service.post("/v1/translations", path, source="t1", target="t2")
        refused(answer, 422, reason)
    assert set((service.work_dir / "jobs").iterdir()) == known
    assert peak_bytes(service.process_of(":api")) < memory + 300 * 2**20  # one header claims 70 TB


def test_a_gzip_bomb_and_a_false_header_take_no_memory(service: RunningService, tmp_path: Path) -> None:
    bomb, claim = tmp_path / "bomb.nii.gz", tmp_path / "claim.nii.gz"
    bomb.write_bytes(gzip.compress(nifti_bytes(noise()) + bytes(512 * 2**20), compresslevel=1))
    claim.write_bytes(gzip.compress(with_header(dim=[3, 400, 400, 400, 1, 1, 1, 1])))  # below the limit
    memory = forget_peak(service.process_of(":api"))
    refused(service.post("/v1/translate", bomb, source="t1", target="t2"), 422, "decompresses to far more")
    refused(service.post("/v1/translate", claim, source="t1", target="t2"), 422, "truncated")
    assert peak_bytes(service.process_of(":api")) < memory + 100 * 2**20


def zip_of(**entries: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


BAD_ZIPS = {
    "no zip": (b"PK nothing", 422, "not a zip"),
    "empty": (zip_of(), 422, "empty"),
    "no DICOM": (zip_of(**{"a.txt": b"hello"}), 422, "DICOM"),
    "a path that leaves": (zip_of(**{"../../x.dcm": b"x"}), 422, "leaves"),
    "an absolute path": (zip_of(**{"/etc/x.dcm": b"x"}), 422, "leaves"),
    "a bomb": (zip_of(**{"x.dcm": bytes(2**26)}), 413, "grows more than"),
    "too many": (zip_of(**{f"{number}.dcm": b"x" for number in range(4097)}), 413, "4,097 files"),
}


@pytest.mark.parametrize("name", BAD_ZIPS)
def test_a_bad_zip_is_refused(service: RunningService, name: str, tmp_path: Path) -> None:
    content, status, words = BAD_ZIPS[name]
    path = tmp_path / "series.zip"
    path.write_bytes(content)
    known = set((service.work_dir / "jobs").iterdir())
    refused(service.post("/v1/translations", path, source="t1", target="t2"), status, words)
    assert set((service.work_dir / "jobs").iterdir()) == known


def test_every_bad_series_is_refused_and_a_good_one_taken(
    service: RunningService, series: Path, tmp_path: Path
) -> None:
    known = set((service.work_dir / "jobs").iterdir())
    number = 0

    def refuses(folder: Path, words: str) -> None:
        nonlocal number
        number += 1
        answer = service.post("/v1/translations", zipped(folder, tmp_path / f"{number}.zip"), source="t1", target="t2")
        refused(answer, 422)
        assert re.search(words, answer.json()["detail"]), answer.text

    for edit, words in UNUSABLE:
        make_series(tmp_path / "in", edit=edit)
        refuses(tmp_path / "in", words)
    make_series(tmp_path / "in")
    whole = (tmp_path / "in" / "IM2.dcm").read_bytes()
    cut = [(f"cut off at {length}", lambda whole, length=length: whole[:length]) for length in (140, 300, -10)]
    for _, damage in [*DAMAGE.items(), *cut]:
        (tmp_path / "in" / "IM2.dcm").write_bytes(damage(whole))
        refuses(tmp_path / "in", "^volume, file 3 of the zip: |cannot be read, it is damaged")
    (tmp_path / "in" / "IM2.dcm").write_bytes(whole)
    (tmp_path / "in" / "IM1.dcm").unlink()
    refuses(tmp_path / "in", "between file 3 of the zip and file 4 of the zip, .* 1 slice missing")
    assert set((service.work_dir / "jobs").iterdir()) == known
    assert service.wait(service.submit(series, target="t2"))["state"] == "done"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"target": "flair"}, "unknown modality 'flair': this model knows t1, t2, pd"),
        ({"target": "t2", "source": "ct"}, "unknown modality 'ct'"),
        ({}, "target"),
        ({"target": "t2", "sampler": "magic"}, "magic"),
        ({"target": "t2", "num_inference_steps": 0}, "num_inference_steps"),
        ({"target": "t2", "num_inference_steps": "many"}, "num_inference_steps"),
        ({"target": "t2", "num_samples": 17}, "the limit is 16"),
        ({"target": "t2", "num_samples": 16, "num_inference_steps": 999, "sampler": "ddpm"}, "evaluations"),
        ({"target": "t2", "seed": -1}, "seed"),
        ({"target": "t2", "format": "png"}, "format"),
        ({"target": "t2", "format": "dicom"}, "wanted a zip of a DICOM series"),
    ],
)
def test_bad_fields_are_refused(service: RunningService, scan: Path, fields: dict[str, Any], words: str) -> None:
    refused(service.post("/v1/translations", scan, **fields), 422, words)


def test_other_requests_that_make_no_sense(service: RunningService, scan: Path, tmp_path: Path) -> None:
    client = service.client
    refused(client.get("/v1/translations/unknown"), 404, "no such translation")
    refused(client.delete("/v1/translations/..%2f..%2fetc"), 404)
    refused(client.get("/nowhere"), 404)
    refused(client.put("/v1/translations"), 405)
    refused(client.post("/v1/translations", files={"target": (None, "t2")}), 422, "volume")
    refused(client.post("/v1/translations", data={"target": "t2"}), 415, "multipart/form-data")
    refused(client.post("/v1/translations", content=b"x" * 100, headers={"Content-Type": "multipart/form-data"}), 400)
    refused(client.post("/v1/translations", files=[("target", (None, "t2"))] * 1000), 400, "Too many fields")
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    refused(service.post("/v1/translations", text, target="t2"), 415, ".nii")
    job = service.submit(scan, target="t2")
    service.wait(job)
    refused(client.get(f"{job['links']['self']}/result"), 422, "target")
    refused(client.get(f"{job['links']['self']}/result", params={"target": "pd"}), 404, "no target 'pd'")
    refused(client.get(f"{job['links']['self']}/result", params={"target": "../job.json"}), 404)
    refused(client.get(f"{job['links']['self']}/spread", params={"target": "t2"}), 404, "num_samples")
    refused(
        client.get(f"{job['links']['self']}/uncertainty", params={"target": "t2"}), 404, "does not know how far off"
    )
    refused(client.get("/web/..%2fapi.py"), 404)


def test_an_upload_that_is_too_large_is_refused_unread(service: RunningService) -> None:
    words = "POST /v1/translations HTTP/1.1", f"Host: 127.0.0.1:{service.port}", f"Content-Length: {10**12}"
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as line:
        line.sendall("\r\n".join([*words, "Content-Type: multipart/form-data; boundary=x", "", ""]).encode())
        assert line.recv(4096).startswith(b"HTTP/1.1 413")

    memory = forget_peak(service.process_of(":api"))
    with socket.create_connection(("127.0.0.1", service.port), timeout=60) as line:  # in chunks: no length is said
        words = [*words[:2], "Transfer-Encoding: chunked", "Content-Type: multipart/form-data; boundary=x", "", ""]
        line.sendall("\r\n".join(words).encode())
        head = b'--x\r\nContent-Disposition: form-data; name="volume"; filename="t1.nii"\r\n\r\n'
        sent = 0
        for block in (head, *[bytes(2**20)] * 1000):
            if select.select([line], [], [], 0)[0]:
                break
            with contextlib.suppress(ConnectionError):  # it has hung up; its answer is here
                line.sendall(f"{len(block):x}\r\n".encode() + block + b"\r\n")
            sent += len(block)
        assert line.recv(4096).startswith(b"HTTP/1.1 411")
    assert sent < 1000 * 2**20
    assert peak_bytes(service.process_of(":api")) < memory + 200 * 2**20
    assert service.client.get("/v1/health/ready").status_code == 200


def test_other_hosts_and_origins_are_refused(service: RunningService) -> None:
    refused(service.client.get("/v1/models", headers={"Host": "evil.example"}), 403, "Host")
    refused(service.client.get("/v1/models", headers={"Origin": "http://evil.example"}), 403, "origin")
    refused(service.client.get("/v1/models", headers={"Origin": "http://[::1"}), 403, "no address")
    refused(service.client.get("/v1/models", headers={"X-Forwarded-For": "127.0.0.1"}), 403, "proxy")
    assert service.client.get("/v1/models", headers={"Origin": service.url}).status_code == 200


def test_answers_carry_security_headers(service: RunningService) -> None:
    for path in ("/", "/docs", "/web/niivue.js", "/v1/models", "/nowhere"):
        headers = service.client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe-eval" not in headers["content-security-policy"]
        assert headers["x-frame-options"] == "DENY"


# ------------------------------------------------------------------------------------------------------------ and more


def test_what_it_says_of_itself(service: RunningService) -> None:
    answer = service.client.get("/v1/models").json()
    (model,) = answer["models"]
    assert model["modalities"] == ["t1", "t2", "pd"]
    assert {"name": "ddim"} in model["samplers"]
    assert [(row["sampler"], row["psnr_db"], row["ssim"]) for row in model["card"]] == [("ddim", 21.5, 0.75)]
    assert answer["limits"]["max_queue"] == 8
    assert "not for diagnosis" in answer["notice"]
    assert service.client.get("/v1/health/live").json() == {"status": "ok"}
    assert service.client.get("/v1/health/ready").json() == {"status": "ok"}
    example = service.client.get("/v1/example")
    assert image_of(example.content).shape == (80, 80, 47)
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name for family in text_string_to_metric_families(service.client.get("/metrics").text)}
    assert {"aldm_service_jobs_queued", "aldm_service_jobs", "aldm_service_job_seconds"} <= families


def test_the_example_of_the_documentation_works(service: RunningService, scan: Path, tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "sub-01_T1w.nii.gz").write_bytes(scan.read_bytes())
    words = [sys.executable, "-c", code.replace("http://127.0.0.1:8000", service.url)]
    done = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "done: 100%" in done.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"sub-01_{name}.nii.gz" for name in ("T1w", "t2", "pd")}


def test_many_at_once_are_taken_or_sent_away_and_nothing_else(
    service: RunningService, scan: Path, tmp_path: Path
) -> None:
    wanted = by_hand(service, scan, tmp_path / "t2.nii.gz", "--target", "t2")
    working = service.submit(scan, target="t2", **LONG)  # the queue keeps what is sent meanwhile
    service.wait(working, "running")

    parts = {title: service.process_of(title) for title in (":api", "StoreActor", ":model")}
    memory = {title: forget_peak(process) for title, process in parts.items()}

    def one(number: int) -> httpx.Response:
        return service.post("/v1/translations", scan, target="t2", seed=0)

    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(one, range(64)))
    assert service.job(working)["state"] == "running"
    codes = [answer.status_code for answer in answers]
    assert (codes.count(202), codes.count(503)) == (8, 56), "the queue holds eight"
    assert service.client.delete(working["links"]["self"]).status_code == 204
    for answer in answers:
        if answer.status_code == 503:
            refused(answer, 503, "queue is full")
            assert 1 <= int(answer.headers["retry-after"]) <= 120
    accepted = [answer.json() for answer in answers if answer.status_code == 202]
    for job in accepted:
        assert service.wait(job)["state"] == "done"
        same_image(image_of(service.result(job, "t2")), wanted)
    assert service.client.get("/v1/health/ready").status_code == 200
    grown = {title: (peak_bytes(process) - memory[title]) / 2**20 for title, process in parts.items()}
    assert max(grown.values()) < 150, grown
