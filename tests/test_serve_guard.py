"""What the service refuses before and while it reads a request's body: the application itself, without Ray."""

import asyncio
import contextlib
import io
import tempfile
import tracemalloc
import zipfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import pytest
from scans import blob
from untrained import save_untrained

from aldm.data.volume import load_nifti
from aldm.errors import UserError
from serve.api import build_api
from serve.files import keep_nifti, load_source
from serve.jobs import JobStore
from serve.models import find_model
from serve.problems import Problem, without_paths
from serve.security import PROXY_VARIABLE, Body, check_no_proxy, new_token, read_tokens
from serve.settings import Settings
from serve.uploads import MAX_DIRECTORY, accept
from serve.work_folder import check_free

Send = Callable[..., Awaitable[httpx.Response]]
MB = 10**6


class Near:
    """A job store in this process, called as the one in an actor is."""

    def __init__(self, store: JobStore) -> None:
        self.store = store

    async def acall(self, method: str, *args: Any) -> Any:
        return getattr(self.store, method)(*args)

    def tell(self, method: str, *args: Any) -> None:
        with contextlib.suppress(Problem):
            getattr(self.store, method)(*args)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("translators") / "model")


class Service:
    """The application over a job store, and requests to it."""

    def __init__(self, model: Path, work: Path, tokens: dict[str, str], **limits: Any) -> None:
        usual = {"max_upload_mb": 4, "max_upload_seconds": 30, "max_voxels": 100_000}
        self.settings = Settings(model=str(model), work_dir=str(work), **usual | limits)
        self.store = JobStore(self.settings)
        near: Any = Near(self.store)
        self.model = find_model(str(model), work)
        self.app = build_api(self.settings, self.model, tokens, near)

    async def send(self, method: str, path: str, **request: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **request)

    def ask(self, method: str, path: str, **request: Any) -> httpx.Response:
        return asyncio.run(self.send(method, path, **request))

    @property
    def at_rest(self) -> bool:
        """Whether nothing is left of any upload."""
        return self.store.counts()["uploading"] == 0 and self.app.arriving == 0 and not any(self.store.folder.iterdir())


@pytest.fixture
def started(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Service]:
    monkeypatch.setattr(tempfile, "tempdir", None)  # the service sets its own
    return lambda tokens=None, **limits: Service(model, tmp_path / "work", tokens or {}, **limits)


def scan() -> bytes:
    return nibabel.Nifti1Image(blob(), np.diag([8.0, 8, 8, 1])).to_bytes()


def detail(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return str(answer.json()["detail"])


# -------------------------------------------------------------------------------------------------------------- forms


def test_a_form_of_the_right_kind_is_taken(started: Callable[..., Service]) -> None:
    service = started()
    answer = service.ask("POST", "/v1/translations", files={"volume": ("t1.nii", scan())}, data={"target": "t2"})
    assert answer.status_code == 202, answer.text
    job = answer.json()
    source = service.ask("GET", job["links"]["source"])
    assert source.status_code == 200
    assert source.headers["content-disposition"] == 'attachment; filename="source-t1.nii.gz"'
    assert service.app.arriving == 0
    (service.store.folder / job["id"] / "volume.nii.gz").unlink()  # expires between check and read
    assert "expired" in detail(service.ask("GET", job["links"]["source"]), 404)
    assert service.ask("DELETE", job["links"]["self"]).status_code == 204
    assert service.ask("GET", job["links"]["self"]).json()["state"] == "cancelled"
    assert service.ask("DELETE", job["links"]["self"]).status_code == 204
    assert "no such" in detail(service.ask("DELETE", job["links"]["self"]), 404)


def test_files_that_expire_while_they_are_asked_for(started: Callable[..., Service]) -> None:
    service = started()
    form = {"files": {"volume": ("t1.nii", scan())}, "data": {"target": "t2"}}
    job = service.ask("POST", "/v1/translations", **form).json()
    (mine,) = service.store.claim("w", 1, "1", service.model.hash)
    service.store.finish("w", mine.id)
    for kind in ("result", "preview.png", "provenance"):
        answer = service.ask("GET", f"{job['links']['self']}/{kind}?target=t2")
        assert "expired" in detail(answer, 404)


@pytest.mark.parametrize(
    ("request_", "status", "words"),
    [
        ({"data": {"target": "t2"}}, 415, "multipart/form-data"),
        ({"json": {"target": "t2"}}, 415, "multipart/form-data"),
        ({"content": b""}, 415, "multipart/form-data"),
        ({"files": {"target": (None, "t2")}}, 422, "volume"),
        ({"files": [("volume", ("t1.nii", b"x"))] * 2}, 422, "target: Field required"),
        ({"files": [("volume", ("t1.nii", b"x"))] * 7}, 400, "Too many files"),
        ({"files": [("target", (None, "t2"))] * 1000}, 400, "Too many fields"),
        ({"files": [("volume", ("t1.nii", b"x")), ("source", (None, "x" * 2000))]}, 400, "exceeded maximum size"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "boundary"),
    ],
)
def test_a_form_of_another_kind_is_refused(
    started: Callable[..., Service], request_: dict[str, Any], status: int, words: str
) -> None:
    service = started()
    assert words in detail(service.ask("POST", "/v1/translations", **request_), status)
    assert service.at_rest


@pytest.mark.parametrize(
    ("path", "field"), [("/v1/translations", "samples"), ("/v1/translate", "samples"), ("/v1/translate", "format")]
)
def test_a_field_that_would_be_passed_over_is_refused(started: Callable[..., Service], path: str, field: str) -> None:
    service = started()
    form = {"files": {"volume": ("t1.nii", scan())}, "data": {"target": "t2", field: "dicom"}}
    assert f"unknown field '{field}', wanted of volume, " in detail(service.ask("POST", path, **form), 422)
    assert service.at_rest


def test_a_url_encoded_body_is_not_read(started: Callable[..., Service]) -> None:
    service, read = started(), []

    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            read.append(1)
            yield b"a=b&" * 1000

    kind = {"Content-Type": "application/x-www-form-urlencoded", "Content-Length": "400000"}
    detail(service.ask("POST", "/v1/translate", content=body(), headers=kind), 415)
    assert read == []


# ---------------------------------------------------------------------------------------------------- size and slowness

FORM = {"Content-Type": "multipart/form-data; boundary=x"}
BEGIN = b'--x\r\nContent-Disposition: form-data; name="volume"; filename="t1.nii"\r\n\r\n'


def test_a_body_whose_length_is_not_said_or_too_large_is_not_read(started: Callable[..., Service]) -> None:
    service, read = started(), []

    async def body() -> AsyncIterator[bytes]:
        read.append(1)
        yield BEGIN

    for headers, status, words in (
        ({}, 411, "send Content-Length"),
        ({"Content-Length": str(5 * MB)}, 413, "the limit is 4,065,536"),
        ({"Content-Length": "-5"}, 400, "wanted a number"),
        ({"Content-Length": "1e3"}, 400, "wanted a number"),
    ):
        answer = service.ask("POST", "/v1/translations", content=body(), headers=FORM | headers)
        assert words in detail(answer, status)
    assert read == []
    assert service.at_rest


def test_a_body_longer_than_it_said_is_cut_off(started: Callable[..., Service]) -> None:
    service, sent = started(), 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield BEGIN
        while True:
            sent += 2**16
            yield bytes(2**16)

    headers = FORM | {"Content-Length": str(MB)}
    assert "larger than" in detail(service.ask("POST", "/v1/translations", content=endless(), headers=headers), 413)
    assert MB - 2**16 <= sent < MB + 2**17
    assert service.at_rest


def test_a_body_that_dribbles_in_loses_its_place(started: Callable[..., Service]) -> None:
    service = started(max_upload_seconds=0.5)

    async def dribble() -> AsyncIterator[bytes]:
        yield BEGIN
        while True:
            await asyncio.sleep(0.05)
            yield b"x"

    headers = FORM | {"Content-Length": str(MB)}
    answer = service.ask("POST", "/v1/translations", content=dribble(), headers=headers)
    assert "did not arrive within 0.5 s" in detail(answer, 408)
    assert service.at_rest


def test_what_follows_the_body_is_waited_for_without_end() -> None:
    """The application listens for the client's hanging up."""

    async def run() -> tuple[Any, Any]:
        messages = [{"type": "http.request", "body": b"x", "more_body": False}, {"type": "http.disconnect"}]

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.2 if len(messages) == 1 else 0)
            return messages.pop(0)

        body = Body(receive, 10, 0.05)
        return await body(), await body()

    first, second = asyncio.run(run())
    assert (first["body"], second["type"]) == (b"x", "http.disconnect")


def test_bodies_that_arrive_together_are_together_as_large_as_one_may_be(started: Callable[..., Service]) -> None:
    service = started()
    file = BEGIN + bytes(3 * MB) + b"\r\n--x--\r\n"
    held = asyncio.Event

    async def run() -> tuple[list[httpx.Response], httpx.Response]:
        go_on = held()

        async def slowly() -> AsyncIterator[bytes]:
            yield file[:1000]
            await go_on.wait()
            yield file[1000:]

        length = {"Content-Length": str(len(file))}
        first = asyncio.create_task(service.send("POST", "/v1/translations", content=slowly(), headers=FORM | length))
        while not service.app.arriving:
            await asyncio.sleep(0.01)
        second = await service.send("POST", "/v1/translations", content=file, headers=FORM)
        small = {"files": {"volume": ("t1.nii", scan())}, "data": {"target": "t2"}}
        third = await service.send("POST", "/v1/translations", **small)
        go_on.set()
        return [await first, second], third

    (first, second), small = asyncio.run(run())
    assert "other large volumes are arriving" in detail(second, 503)
    assert second.headers["retry-after"] == "2"
    assert small.status_code == 202  # there is room for it
    detail(first, 422)  # it was read to its end, and names no target
    assert service.app.arriving == 0
    assert service.store.counts()["uploading"] == 0


# ------------------------------------------------------------------------------------------------------------ who asks


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "[::1"},
        {"Host": "evil.example"},
        {"Host": "]"},
        {"Origin": "http://[::1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=192.0.2.1"},
        {"Via": "1.1 proxy"},
    ],
    ids=str,
)
def test_without_tokens_other_hosts_origins_and_proxies_are_refused(
    started: Callable[..., Service], headers: dict[str, str]
) -> None:
    service = started()
    for path in ("/v1/models", "/"):
        detail(service.ask("GET", path, headers=headers), 403)
    assert service.ask("GET", "/v1/models", headers={"Origin": "http://localhost"}).status_code == 200


def test_a_new_token_of_an_old_name_is_somebody_else(started: Callable[..., Service], tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    old = new_token(path, "ward")
    tokens = read_tokens(path)
    service = started(tokens)
    mine = {"Authorization": f"Bearer {old}"}
    form = {"files": {"volume": ("t1.nii", scan())}, "data": {"target": "t2"}}
    job = service.ask("POST", "/v1/translations", headers=mine, **form).json()
    path.unlink()
    new = {"Authorization": f"Bearer {new_token(path, 'ward')}"}
    tokens |= read_tokens(path)  # as a new start reads it
    detail(service.ask("GET", job["links"]["self"], headers=mine), 401)
    detail(service.ask("GET", job["links"]["self"], headers=new), 404)
    assert service.ask("GET", "/v1/models", headers=new).status_code == 200


def test_a_proxy_of_ray_serve_s_own_needs_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PROXY_VARIABLE, "1")
    with pytest.raises(UserError, match="give --token-file FILE, or unset it"):
        check_no_proxy()
    monkeypatch.setenv(PROXY_VARIABLE, "0")
    check_no_proxy()


# -------------------------------------------------------------------------------------------------------- what is kept


def many_entries(count: int) -> bytes:
    """A zip of empty files, written by hand: zipfile takes a minute for a million."""
    names = [b"%07d" % number for number in range(count)]
    local = b"PK\3\4" + bytes(22) + b"\7\0\0\0"
    central = b"PK\1\2" + bytes(24) + b"\7\0" + bytes(16)
    files = b"".join(local + name for name in names)
    directory = b"".join(central + name for name in names)
    end64 = b"PK\6\6" + (44).to_bytes(8, "little") + bytes(12) + count.to_bytes(8, "little") * 2
    end64 += len(directory).to_bytes(8, "little") + len(files).to_bytes(8, "little")
    locator = b"PK\6\7" + bytes(4) + (len(files) + len(directory)).to_bytes(8, "little") + b"\1\0\0\0"
    end = b"PK\5\6" + bytes(4) + b"\xff" * 12 + b"\0\0"
    return files + directory + end64 + locator + end


def test_a_zip_of_very_many_files_is_not_listed(tmp_path: Path) -> None:
    content = many_entries(300)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert len(archive.infolist()) == 300  # it is a zip
    stream = io.BytesIO(many_entries(1_000_000))
    settings = Settings(model="unused")
    tracemalloc.start()
    with pytest.raises(Problem, match="far more than 4,096 files") as caught:
        accept(stream, "t1.zip", tmp_path, settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.status == 413
    assert peak < 3 * MAX_DIRECTORY
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_of_a_nifti_header_only_the_grid_is_kept(kind: Any, tmp_path: Path) -> None:
    image = kind(blob().astype(np.float32), np.diag([8.0, 8, 8, 1]))
    image.set_qform(image.affine, code=2)
    header, text = image.header, b"Doe^Jane"
    for name in header.structarr.dtype.names:
        if header.structarr.dtype[name].kind == "S" and name != "magic":
            header[name] = text[: header.structarr.dtype[name].itemsize]
    header["intent_p1"] = header["toffset"] = 19_700_101
    nibabel.save(image, tmp_path / "scan.nii")
    assert (tmp_path / "scan.nii").read_bytes().count(text) >= 2
    volume, source = load_nifti(tmp_path / "scan.nii")
    keep_nifti(tmp_path, volume, source)
    kept = nibabel.load(tmp_path / "volume.nii.gz")
    assert text[:3] not in kept.header.binaryblock
    assert (kept.header["intent_p1"], kept.header["toffset"]) == (0, 0)
    again, again_source = load_source(tmp_path)
    np.testing.assert_array_equal(again.data, volume.data)
    np.testing.assert_array_equal(again.affine, volume.affine)
    for name in ("dim", "pixdim", "qform_code", "sform_code", "xyzt_units", "srow_x", "quatern_b"):
        np.testing.assert_array_equal(kept.header[name], source.parsed_header()[name], err_msg=name)
    assert len(again_source.header) == len(source.header)


def test_errors_name_no_place_of_the_server() -> None:
    jobs = Path("/data/work/jobs")
    text = "/data/work/jobs/ab-C_1/result_t2.nii.gz: the folder /data/work/jobs/ab-C_1 is missing; see /data/work/x"
    assert without_paths(text, jobs) == "volume: the folder volume is missing; see the service's folder"


def test_looking_whether_a_folder_is_free_makes_nothing(tmp_path: Path) -> None:
    check_free(tmp_path / "work")
    assert not (tmp_path / "work").exists()
    (tmp_path / "project").mkdir(mode=0o755)
    check_free(tmp_path / "project")
    assert list((tmp_path / "project").iterdir()) == []
