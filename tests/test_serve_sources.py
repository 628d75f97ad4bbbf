"""Several volumes of one head over HTTP: the voxels of `aldm translate`, what is told of them, what is refused."""

import asyncio
import contextlib
import io
import json
import re
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import pydicom
import pytest
from scans import image_of, same_image, write
from series import in_the_head, make_series
from test_any_sources import ANY
from test_any_sources import head as head_of
from test_serve import zipped
from test_serve_guard import Service, detail
from test_translate_several import run
from untrained import save_untrained

from aldm.presets import small
from aldm.translate import Translator
from serve import worker
from serve.problems import Problem
from serve.records import JOB_FILE, read_record
from serve.security import FORM_BYTES
from serve.settings import Settings
from serve.uploads import accept


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of any sources, to which every t1 and t2 is unlike its own, t2 most."""
    folder = tmp_path_factory.mktemp("translators") / "model"
    return save_untrained(folder, config=replace(ANY, codec=small().codec), limits={"t1": 1e-2, "t2": 1e-3})


@pytest.fixture(scope="module")
def translator(model: Path) -> Translator:
    return worker.load(model, Settings(threads=1))


@pytest.fixture
def service(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(tempfile, "tempdir", None)  # the service sets its own
    return Service(model, tmp_path / "work", {})


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for seed, name in enumerate(("t1", "t2")):
        volume = head_of(seed)
        paths[name] = write(tmp_path / f"scan_{name}.nii.gz", volume.data, volume.affine)
    return paths


def form_of(files: dict[str, Path]) -> list[tuple[str, tuple[str, bytes]]]:
    return [(f"volume_{name}", (path.name, path.read_bytes())) for name, path in files.items()]


def submit(service: Service, files: dict[str, Path], **fields: Any) -> dict[str, Any]:
    answer = service.ask("POST", "/v1/translations", files=form_of(files), data=FIELDS | fields)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    return job


def make(service: Service, translator: Translator) -> dict[str, Any]:
    """Make the job that waits as a worker does, and return its view."""
    (job,) = service.store.claim("w", 1, str(service.store.counts()), service.model.hash)
    problems: dict[str, Problem] = {}
    worker.translate(translator, service.store.folder, [job], problems, set(), lambda jobs, share: None, 4096)
    problem = problems.get(job.id)
    found = (job.num_boxes, job.share_outside, job.likeness)
    service.store.finish("w", job.id, problem and problem.as_dict(), *found)
    view: dict[str, Any] = service.ask("GET", f"/v1/translations/{job.id}").json()
    return view


def fetched(service: Service, path: str) -> bytes:
    answer = service.ask("GET", path)
    assert answer.status_code == 200, answer.text
    return answer.content


def by_hand(model: Path, files: dict[str, Path], out: Path, *flags: object) -> nibabel.Nifti1Image:
    named = [f"--source={name}={path}" for name, path in files.items()]
    assert run(out, *named, "--target", "pd", "--model", model, *flags) == 0
    return nibabel.load(out) if out.is_file() else None


def backwards(files: dict[str, Path]) -> dict[str, Path]:
    return dict(reversed(files.items()))


FIELDS = {"target": "pd", "accept_unlike": "true"}

# ------------------------------------------------------------------------------------------------------------- results


def test_the_result_is_that_of_aldm_translate_in_either_order(
    service: Service, translator: Translator, model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    wanted = by_hand(model, files, tmp_path / "wanted.nii.gz")
    for order in (files, backwards(files)):
        job = submit(service, order)
        assert list(job["sources"].items()) == [(name, "request") for name in order]
        done = make(service, translator)
        assert (done["state"], done["source"]) == ("done", next(iter(order)))
        result = image_of(fetched(service, job["links"]["results"]["pd"]["result"]))
        same_image(result, wanted)
        np.testing.assert_array_equal(result.get_fdata(), wanted.get_fdata())
        made = json.loads(fetched(service, f"{job['links']['self']}/provenance?target=pd"))
        assert (made["source"], made["sources"]) == ("t1+t2", list(order))
        assert (made["likeness"]["source"], done["likeness"]["source"]) == ("t2", "t2")  # the most unlike of them
        for name, path in files.items():
            kept = image_of(fetched(service, job["links"]["sources"][name]))
            np.testing.assert_array_equal(kept.get_fdata(), nibabel.load(path).get_fdata())
        first = image_of(fetched(service, job["links"]["source"])).get_fdata()
        np.testing.assert_array_equal(first, nibabel.load(order[done["source"]]).get_fdata())
        assert "no source 'pd'" in detail(service.ask("GET", f"{job['links']['source']}?modality=pd"), 404)
    for name in files:
        job = submit(service, {name: files[name]})
        assert make(service, translator)["sources"] == {name: "request"}
        alone = image_of(fetched(service, job["links"]["results"]["pd"]["result"])).get_fdata()
        assert np.abs(alone - wanted.get_fdata()).max() > 1e-3


def test_the_first_one_s_grid_and_orientation_are_the_result_s(
    service: Service, translator: Translator, model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    image = nibabel.load(files["t2"])
    files["t2"] = tmp_path / "turned_t2.nii"
    nibabel.save(image.slicer[2:, 1:].as_reoriented(np.array([[1, -1], [2, 1], [0, -1]])), files["t2"])
    for number, order in enumerate((files, backwards(files))):
        wanted = by_hand(model, order, tmp_path / f"wanted{number}.nii.gz")
        job = submit(service, order)
        assert (done := make(service, translator))["state"] == "done", done["error"]
        result = image_of(fetched(service, job["links"]["results"]["pd"]["result"]))
        same_image(result, wanted)
        np.testing.assert_array_equal(result.get_fdata(), wanted.get_fdata())
        first = nibabel.load(next(iter(order.values())))
        assert result.shape == first.shape
        np.testing.assert_array_equal(result.affine, first.affine)


def test_a_series_and_a_file_together_make_a_series(
    service: Service, translator: Translator, tmp_path: Path, files: dict[str, Path]
) -> None:
    make_series(tmp_path / "series", edit=in_the_head)
    both = {"t1": zipped(tmp_path / "series", tmp_path / "a.zip"), "t2": files["t2"]}
    job = submit(service, both, format="dicom")
    assert (done := make(service, translator))["state"] == "done", done["error"]
    with zipfile.ZipFile(io.BytesIO(fetched(service, job["links"]["results"]["pd"]["result"]))) as archive:
        headers = [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist()]
    assert {header.SeriesDescription for header in headers} == {"SYNTHETIC pd from t1+t2"}
    assert all('"source": "t1+t2"' in header.DerivationDescription for header in headers)
    assert not any("SourceImageSequence" in header for header in headers)
    kept = (service.store.folder / job["id"] / "series.json").read_text()
    assert not [path for path in (tmp_path / "series").iterdir() if pydicom.dcmread(path).SOPInstanceUID in kept]
    answer = service.ask("POST", "/v1/translations", files=form_of(backwards(both)), data=FIELDS | {"format": "dicom"})
    assert "wanted a zip of a DICOM series as volume_t2" in detail(answer, 422)
    job = submit(service, backwards(both))
    assert (done := make(service, translator))["state"] == "done", done["error"]
    assert image_of(fetched(service, job["links"]["results"]["pd"]["result"])).shape == nibabel.load(files["t2"]).shape


def test_the_worst_of_them_decides(service: Service, translator: Translator, files: dict[str, Path]) -> None:
    submit(service, files, accept_unlike="false")
    failed = make(service, translator)
    assert (failed["state"], failed["likeness"]["source"]) == ("failed", "t2")
    assert "one of the volumes: " in failed["error"]["detail"]


def test_what_source_says_is_of_the_plain_volume(service: Service, files: dict[str, Path]) -> None:
    form = {"volume": (files["t2"].name, files["t2"].read_bytes()), "volume_t1": form_of(files)[0][1]}
    job = service.ask("POST", "/v1/translations", files=form, data=FIELDS).json()
    assert list(job["sources"].items()) == [("t2", "file name"), ("t1", "request")]
    job = service.ask("POST", "/v1/translations", files=form, data=FIELDS | {"source": "pd", "target": "t2"}).json()
    assert list(job["sources"].items()) == [("pd", "request"), ("t1", "request")]
    twice = [("volume", file) for _, file in form_of(files)]
    job = service.ask("POST", "/v1/translations", files=twice, data=FIELDS).json()
    assert list(job["sources"].items()) == [("t1", "file name"), ("t2", "file name")]


def test_a_record_of_before_is_read(service: Service, files: dict[str, Path]) -> None:
    folder = service.store.folder / submit(service, {"t1": files["t1"]})["id"]
    values = json.loads((folder / JOB_FILE).read_text())
    assert values.pop("sources") == {"t1": "request"}
    (folder / JOB_FILE).write_text(json.dumps(values))
    job = read_record(folder)
    assert job is not None
    assert job.sources == {"t1": "request"}


# ------------------------------------------------------------------------------------------------------------ refusals


def put(name: str, content: bytes) -> Callable[[list[Any], dict[str, str]], None]:
    """Send another file in the place of the second."""
    return lambda form, fields: form.__setitem__(1, (form[1][0], (name, content)))


def also(field: str) -> Callable[[list[Any], dict[str, str]], None]:
    """Send the first file a second time."""
    return lambda form, fields: form.append((field, form[0][1]))


@pytest.mark.parametrize(
    ("edit", "status", "words"),
    [
        (also("volume_t1"), 422, "volume_t1 is given twice"),
        (also("volume"), 422, "two of the volumes are t1"),
        (also("volume_flair"), 422, "unknown modality 'flair': this model knows t1, t2, pd"),
        (also("volume_swi"), 422, "unknown field 'volume_swi', wanted of volume, volume_t1, volume_t2, volume_pd, acc"),
        (also("volume_pd"), 422, "the target pd is among the sources t1 and t2 and pd"),
        (lambda form, fields: form.__setitem__(1, ("volume_t2", (None, b""))), 422, "volume_t2: wanted a file"),
        (lambda form, fields: form.clear() or form.append(("seed", (None, b"1"))), 422, "no volume: give volume, or"),
        (lambda form, fields: fields.update(source="t1"), 422, "source says what one volume is, got 0 of them"),
        (lambda form, fields: form.extend([("volume", form[0][1])] * 2), 422, "two of the volumes are t1"),
        (lambda form, fields: form.extend([("volume", ("x.nii", b""))] * 2), 422, "volume 3: "),
        (put("t2.nii", b""), 422, "volume_t2: "),
        (put("t2.png", b"x"), 415, "volume_t2: wanted a file named"),
        (put("t2.zip", b"x"), 422, "volume_t2: not a zip file"),
    ],
)
def test_what_is_refused_leaves_nothing(
    edit: Callable[[list[Any], dict[str, str]], None],
    status: int,
    words: str,
    service: Service,
    files: dict[str, Path],
) -> None:
    form, fields = form_of(files), dict(FIELDS)
    edit(form, fields)
    said = detail(service.ask("POST", "/v1/translations", files=form, data=fields), status)
    assert words in said
    assert str(service.store.folder.parent) not in said
    assert service.at_rest


def test_a_model_of_pairs_takes_one(tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    service = Service(save_untrained(tmp_path / "pairs"), tmp_path / "work", {})
    answer = service.ask("POST", "/v1/translations", files=form_of(files), data=FIELDS)
    assert "this aldm model takes one source, got t1 and t2: give one" in detail(answer, 422)
    form = [("volume", form_of(files)[0][1]), form_of(files)[1]]
    answer = service.ask("POST", "/v1/translations", files=form, data=FIELDS)
    assert "this aldm model takes one source, got t1 and t2: give one" in detail(answer, 422)
    assert service.at_rest
    assert submit(service, {"t1": files["t1"]})["sources"] == {"t1": "request"}


VOXELS = 20 * 26 * 20


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_voxels": 2 * VOXELS}, ""),
        ({"max_voxels": 2 * VOXELS - 1}, "volume_t2: .* count together, of 20,799 voxels"),
        ({"max_grid_voxels": 2 * VOXELS}, ""),
        ({"max_grid_voxels": 2 * VOXELS - 1}, "volume_t1: .*; 2 volumes share the service's 20,799"),
    ],
)
def test_limits_are_of_all_volumes_together(
    limits: dict[str, Any], words: str, model: Path, files: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    service = Service(model, tmp_path / "work", {}, **limits)
    answer = service.ask("POST", "/v1/translations", files=form_of(files), data=FIELDS)
    if not words:
        assert answer.status_code == 202, answer.text
        return
    assert re.search(words, detail(answer, 422))
    assert service.at_rest


def test_the_size_of_a_request_is_of_all_its_files(
    model: Path, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    plain = {name: write(tmp_path / f"{name}.nii", nibabel.load(path).get_fdata()) for name, path in files.items()}
    one = plain["t1"].stat().st_size
    service = Service(model, tmp_path / "work", {}, max_upload_mb=(2 * one - FORM_BYTES) / 1e6)
    assert submit(service, {"t1": plain["t1"]})["state"] == "queued"
    answer = service.ask("POST", "/v1/translations", files=form_of(plain), data=FIELDS)
    assert "the limit is" in detail(answer, 413)


def test_volumes_that_lie_elsewhere_are_refused(service: Service, files: dict[str, Path]) -> None:
    image = nibabel.load(files["t2"])
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(), image.affine + 500 * np.eye(4, k=3)), files["t2"])
    answer = service.ask("POST", "/v1/translations", files=form_of(files), data=FIELDS)
    assert "volume_t2 lies elsewhere than volume_t1: 0% of the smaller field of view is in both" in detail(answer, 422)
    assert service.at_rest


# ------------------------------------------------------------------------------------------------------------ hang-ups


def call(service: Service, files: dict[str, Path], share: float) -> Callable[[], Any]:
    """A call of the application by a client that hangs up when so much of the body has left."""
    request = httpx.Request("POST", "http://localhost/v1/translations", files=form_of(files), data=FIELDS)
    body = request.read()
    messages = [{"type": "http.request", "body": body[: round(share * len(body))], "more_body": share < 1}]
    scope = {"type": "http", "method": "POST", "path": "/v1/translations", "raw_path": b"/v1/translations"}
    scope |= {"query_string": b"", "http_version": "1.1", "scheme": "http", "client": ("127.0.0.1", 1)}
    scope |= {"headers": [(name.lower(), value) for name, value in request.headers.raw]}

    async def receive() -> dict[str, Any]:
        return messages.pop() if messages else {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        pass

    return lambda: service.app(scope, receive, send)


@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_a_client_that_hangs_up_in_its_upload_leaves_nothing(
    share: float, service: Service, files: dict[str, Path]
) -> None:
    with contextlib.suppress(Exception):
        asyncio.run(call(service, files, share)())
    assert service.at_rest
    assert not any((service.settings.folder / "incoming").iterdir())


def test_a_client_that_hangs_up_in_the_check_of_the_second_leaves_nothing(
    service: Service, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    async def hang_up() -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(call(service, files, 1)())

        def watched(stream: Any, name: str, folder: Path, *more: Any) -> tuple[str, int]:
            seen.append(folder.name)
            if len(seen) == 2:
                assert (folder.parent / "volume.nii.gz").exists()
                loop.call_soon_threadsafe(task.cancel)
            return accept(stream, name, folder, *more)

        monkeypatch.setattr("serve.volumes.accept", watched)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(hang_up())
    assert len(seen) == 2
    assert service.at_rest
