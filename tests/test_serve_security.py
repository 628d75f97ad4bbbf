"""Who may ask: every rule by itself, without Ray and without a network."""

import asyncio
import hashlib
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from aldm.errors import UserError
from serve.problems import Problem
from serve.security import OPEN_PATHS, SMALL_BODY, Body, Guard, is_loopback, new_token, owner_of, read_tokens
from serve.settings import Settings

TOKEN = "aldm_secret"
DIGEST = hashlib.sha256(TOKEN.encode()).hexdigest()
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def application(scope: dict[str, Any], receive: Any, send: Send) -> None:
    """Answer with the name of who asks, after the whole body was read."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": scope["state"]["owner"].encode()})


def ask(
    path: str = "/v1/models", *, tokens: dict[str, str] | None = None, client: str = "127.0.0.1", **request: Any
) -> httpx.Response:
    store: Any = None
    guard = Guard(application, settings=Settings(model="unused"), tokens=tokens or {}, store=store)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(guard, client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as one:
            return await one.request(request.pop("method", "GET"), path, **request)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("client", "status"),
    [
        ("127.0.0.1", 200),
        ("127.8.9.1", 200),
        ("::1", 200),
        ("192.0.2.7", 403),
        ("10.0.0.1", 403),
        ("2001:db8::1", 403),
        ("0.0.0.0", 403),
        ("", 403),
        ("elsewhere", 403),
    ],
)
def test_without_tokens_only_this_machine_is_answered(client: str, status: int) -> None:
    for path in ("/v1/models", "/", "/v1/health/live"):
        assert ask(path, client=client).status_code == status
    if status == 403:
        assert "start it with --token-file" in ask(client=client).json()["detail"]


def test_with_tokens_every_address_is_answered_that_has_one() -> None:
    tokens = {"ward": DIGEST}
    mine = {"Authorization": f"Bearer {TOKEN}", "X-Forwarded-For": "192.0.2.1", "Host": "service.example"}
    answer = ask(tokens=tokens, client="192.0.2.7", headers=mine)
    assert (answer.status_code, answer.text) == (200, f"ward:{DIGEST[:16]}")
    refused = ask(tokens=tokens, client="127.0.0.1")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert ask("/v1/health/ready", tokens=tokens, client="192.0.2.7").text == ""


@pytest.mark.parametrize("place", [0, 7, 8, 15, 16, 40, 63])
def test_every_digit_of_a_hash_counts(place: int) -> None:
    other = "0" if DIGEST[place] != "0" else "1"
    assert owner_of(f"Bearer {TOKEN}", {"ward": DIGEST[:place] + other + DIGEST[place + 1 :]}) is None


@pytest.mark.parametrize(
    ("header", "owner"),
    [
        (f"Bearer {TOKEN}", "ward"),
        (f"bearer  {TOKEN} ", "ward"),
        (f"Basic {TOKEN}", None),
        (TOKEN, None),
        ("Bearer", None),
        ("", None),
        (f"Bearer {TOKEN[:-1]}", None),
        (f"Bearer {TOKEN}x", None),
        (f"Bearer {DIGEST}", None),
    ],
)
def test_a_token_is_known_by_its_hash_alone(header: str, owner: str | None) -> None:
    others = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a", "z")}
    assert owner_of(header, {"a": others["a"], "ward": DIGEST, "z": others["z"]}) == owner
    assert owner_of("Bearer z", {"a": others["a"], "ward": DIGEST, "z": others["z"]}) == "z"


def test_a_new_token_is_kept_as_a_hash_in_a_file_of_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    token = new_token(path, "ward-7_b")
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    second = new_token(path, "x" * 64)
    tokens = read_tokens(path)
    assert [owner_of(f"Bearer {one}", tokens) for one in (token, second)] == ["ward-7_b", "x" * 64]
    for name in ("", "local", "two words", "x" * 65, "é", "ward-7_b"):
        with pytest.raises(UserError, match=r"wanted letters|has a token named"):
            new_token(path, name)
    assert read_tokens(path) == tokens
    with pytest.raises(UserError, match="cannot be written"):
        new_token(tmp_path / "none" / "tokens", "ward")


@pytest.mark.parametrize("before", ["", f"old {DIGEST}", f"old {DIGEST}\n", "# of the ward"])
def test_a_new_token_has_a_line_of_its_own_and_leaves_no_empty_one(before: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(before)
    new_token(path, "ward")
    *first, last = path.read_text().splitlines()
    assert first == before.splitlines()
    assert last.startswith("ward ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"ward {DIGEST[:-1]}\n", "line 1: wanted NAME and the SHA-256"),
        (f"# comment\n\nward {DIGEST}0\n", "line 3"),
        (f"ward {DIGEST.upper()}\n", "line 1"),
        (f"local {DIGEST}\n", "line 1"),
        ("ward\n", "line 1"),
        ("# nobody\n", "holds no token"),
        ("", "holds no token"),
    ],
)
def test_a_file_of_tokens_that_makes_no_sense_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text(content)
    with pytest.raises(UserError, match=message):
        read_tokens(tmp_path / "tokens")
    with pytest.raises(UserError, match="cannot be read"):
        read_tokens(tmp_path / "none")


@pytest.mark.parametrize(
    ("host", "own"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("10.1.2.3", False), ("x", False)],
)
def test_this_machine_is_known_by_name_and_address(host: str, own: bool) -> None:
    assert is_loopback(host) is own


@pytest.mark.parametrize(
    ("path", "is_open"),
    [
        ("/", True),
        ("/docs", True),
        ("/openapi.json", True),
        ("/web/app.js", True),
        ("/v1/health/live", True),
        ("/v1/models", False),
        ("/v1/translations", False),
        ("/web/../v1/models", False),
        ("/v1/health/other", False),
    ],
)
def test_what_is_open_to_everybody_tells_nothing(path: str, is_open: bool) -> None:
    assert bool(OPEN_PATHS.fullmatch(path)) is is_open


def test_a_small_request_has_a_small_body() -> None:
    assert ask(method="POST", content=bytes(SMALL_BODY)).status_code == 200
    answer = ask(method="POST", content=bytes(SMALL_BODY + 1))
    assert (answer.status_code, answer.json()["detail"]) == (413, "the request has 65,537 bytes, the limit is 65,536")


def test_a_body_ends_once_at_its_last_part_or_when_it_is_not_wanted() -> None:
    parts = [{"body": b"ab", "more_body": True}, {"body": b"cd", "more_body": False}, {"type": "http.disconnect"}]
    ended: list[int] = []

    async def run(limit: int) -> list[dict[str, Any]]:
        rest = [dict(part) for part in parts]

        async def receive() -> dict[str, Any]:
            return rest.pop(0)

        body = Body(receive, limit, 5, at_end=lambda: ended.append(len(rest)))
        got = [await body() for _ in parts]
        body.end()
        return got

    assert asyncio.run(run(4)) == parts  # as many bytes as the limit
    assert ended == [1]
    with pytest.raises(Problem, match="larger than the limit of 3 bytes") as caught:
        asyncio.run(run(3))
    assert caught.value.status == 413


def test_a_problem_after_the_answer_has_begun_is_not_written_into_it() -> None:
    """The headers are gone: what is left is to break off."""

    async def begins(scope: dict[str, Any], receive: Any, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise Problem(500, "too late")

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    store: Any = None
    guard = Guard(begins, settings=Settings(model="unused"), tokens={"ward": DIGEST}, store=store)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with pytest.raises(Problem, match="too late"):
        asyncio.run(guard(scope, receive, send))
    assert [message["status"] for message in sent] == [200]


@pytest.mark.parametrize(
    ("path", "script"), [("/", True), ("/docs", True), ("/web/app.js", True), ("/v1/health/live", False)]
)
def test_only_the_page_may_run_scripts(path: str, script: bool) -> None:
    headers = ask(path).headers
    assert ("script-src 'self'" in headers["content-security-policy"]) is script
    assert "default-src 'none'" in headers["content-security-policy"]
    assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")
    assert headers["cache-control"] == "no-store"


def test_the_websocket_and_the_lifespan_are_the_applications() -> None:
    seen: list[str] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    store: Any = None
    guard = Guard(app, settings=Settings(model="unused"), tokens={}, store=store)
    nothing: Any = None
    asyncio.run(guard({"type": "lifespan"}, nothing, nothing))
    assert seen == ["lifespan"]
