"""Who may ask: bearer tokens, or this machine alone; how much; and the headers that go with every answer.

A token is 256 random bits, so its plain SHA-256 can lie in a file: there is nothing to guess.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from aldm.errors import UserError
from serve.problems import MEDIA_TYPE, Problem, busy
from serve.settings import Settings
from serve.store import StoreHandle

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOCAL_OWNER = "local"
OPEN_PATHS = re.compile(r"/|/web/[\w.-]+|/docs|/openapi\.json|/v1/health/(live|ready)")
UPLOADS = ("/v1/translations", "/v1/translate")
SMALL_BODY = 2**16
"""Largest body of every other request, bytes."""
FORM_BYTES = 2**16
"""What the fields beside the volume may take, bytes."""
PROXY_HEADERS = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")
"""What proxies add to the requests that they pass on."""
PROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}
_NOTHING = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
PAGE_POLICY = "; ".join(
    [
        _NOTHING,
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' blob: data:",
        "connect-src 'self' blob: data:",
        "font-src 'self' data:",
    ]
)
"""NiiVue sets styles of its canvas, and reads its fonts and matcaps from data: addresses inside its own file."""


def new_token(path: Path, name: str) -> str:
    """Make a token, add its hash to the file (made if it is missing), and return the token: it is kept nowhere.

    Raises:
        UserError: a name that is not letters, digits, - and _, or is in the file already; the file cannot be written.
    """
    if not re.fullmatch(r"[\w-]{1,64}", name, flags=re.ASCII) or name == LOCAL_OWNER:
        raise UserError(f"--new-token is {name!r}: wanted letters, digits, - and _, and not {LOCAL_OWNER!r}")
    text = _text_of(path) if path.exists() else ""
    if name in _tokens_in(text, path):
        raise UserError(f"{path} has a token named {name} already: take another name, or remove its line first")
    token = f"aldm_{secrets.token_urlsafe(32)}"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a") as stream:
            stream.write("\n" * (text != "" and not text.endswith("\n")) + f"{name} {_digest(token)}\n")
    except OSError as error:
        raise UserError(f"--token-file {path}: cannot be written: {error.strerror}") from error
    return token


def read_tokens(path: Path) -> dict[str, str]:
    """Return name -> SHA-256 of each token of a file; lines that begin with # are comments.

    Raises:
        UserError: no such file, a line that is not `NAME SHA256`, or no token at all.
    """
    tokens = _tokens_in(_text_of(path), path)
    if not tokens:
        raise UserError(f"--token-file {path} holds no token: make one with aldm serve --new-token NAME")
    return tokens


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {path}: cannot be read: {error}") from error


def _tokens_in(text: str, path: Path) -> dict[str, str]:
    tokens = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w-]+)\s+([0-9a-f]{64})\s*", line, flags=re.ASCII)
        if match is None or match[1] == LOCAL_OWNER:
            raise UserError(
                f"--token-file {path}, line {number}: wanted NAME and the SHA-256 of a token; make one with "
                "aldm serve --new-token NAME --token-file FILE"
            )
        tokens[match[1]] = match[2]
    return tokens


def owner_of(header: str, tokens: Mapping[str, str]) -> str | None:
    """Return the name of the token that an Authorization header carries; every hash is compared, in constant time."""
    scheme, _, token = header.partition(" ")
    digest = _digest(token.strip())
    found = None
    for name, known in tokens.items():
        if hmac.compare_digest(digest, known) and scheme.lower() == "bearer":
            found = name
    return found


def check_no_proxy() -> None:
    """Refuse to answer this machine alone where every request comes from it, whoever sent it.

    Raises:
        UserError: Ray Serve is told to put HAProxy in front.
    """
    if os.environ.get(PROXY_VARIABLE, "0") not in ("", "0"):
        raise UserError(
            f"{PROXY_VARIABLE} puts a proxy in front of the service, so that everybody seems to be on this machine: "
            "give --token-file FILE, or unset it"
        )


class Guard:
    """ASGI middleware around the whole application: host, token, size and room are checked before a body is read.

    Attributes:
        arriving: bytes of the bodies that are being read, as they were announced.
    """

    def __init__(self, app: Any, *, settings: Settings, tokens: Mapping[str, str], store: StoreHandle) -> None:
        self.app, self.settings, self.tokens, self.store = app, settings, tokens, store
        self.arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or say why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(scope, send)
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            scope.setdefault("state", {})["owner"] = self._owner(scope, headers)
            if scope["method"] == "POST" and scope["path"] in UPLOADS:
                await self._upload(scope, headers, receive, answer)
            else:
                _checked_length(headers, SMALL_BODY)
                await self.app(scope, Body(receive, SMALL_BODY, self.settings.max_upload_seconds), answer)
        except Problem as problem:
            await answer.problem(problem)

    async def _upload(self, scope: Scope, headers: dict[str, str], receive: Receive, answer: "_Answer") -> None:
        """Let an upload in when there is a place for it, and memory for its body.

        Ray Serve has no back-pressure on a request's body: what has arrived and is not yet on the disk lies in memory.
        So its length has to be said, and bodies that arrive at the same time may be as large together as one may be.
        """
        limit = self.settings.max_upload_bytes + FORM_BYTES
        size = _checked_length(headers, limit)
        if size is None:
            raise Problem(411, "the length of the request is not said: send Content-Length, not chunks")
        _check_form(headers)
        if self.arriving and self.arriving + size > limit:
            raise busy("other large volumes are arriving", 2)
        ticket = scope["state"]["ticket"] = secrets.token_hex(8)
        self.arriving += size
        body = Body(receive, size, self.settings.max_upload_seconds, at_end=lambda: self._arrived(size))
        try:
            await self.store.acall("reserve", ticket, size)
            await self.app(scope, body, answer)
        finally:
            body.end()
            self.store.tell("release", ticket)

    def _arrived(self, size: int) -> None:
        self.arriving -= size

    def _owner(self, scope: Scope, headers: dict[str, str]) -> str:
        """Return who asks: a token's name and part of its hash, so that a new token of an old name is somebody else."""
        if not self.tokens:
            _check_local(scope, headers)
            return LOCAL_OWNER
        header = headers.get("authorization")
        name = None if header is None else owner_of(header, self.tokens)
        if name is None and not OPEN_PATHS.fullmatch(scope["path"]):
            raise Problem(
                401,
                "this service wants a token: send the header Authorization: Bearer TOKEN",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return "" if name is None else f"{name}:{self.tokens[name][:16]}"


class Body:
    """A request's body as it arrives: counted, since it may say no length, and not waited for without end."""

    def __init__(
        self, receive: Receive, limit: int, seconds: float, *, at_end: Callable[[], None] = lambda: None
    ) -> None:
        """Wrap what ASGI gives.

        Args:
            receive: returns the next message.
            limit: bytes of the body at most.
            seconds: from the first message asked for to its end at most.
            at_end: called once, when no more of it comes.
        """
        self._receive, self._limit, self._at_end = receive, limit, at_end
        self._seconds, self._until = seconds, 0.0
        self._done, self._ended = 0, False

    async def __call__(self) -> Message:
        """Return the next message; raises Problem 413 for too much, 408 for too slow."""
        if self._ended:
            return await self._receive()
        self._until = self._until or time.monotonic() + self._seconds
        try:
            async with asyncio.timeout(max(0.0, self._until - time.monotonic())):
                message = await self._receive()
        except TimeoutError as error:
            raise Problem(408, f"the request did not arrive within {self._seconds:g} s; send it again") from error
        self._done += len(message.get("body", b""))
        if self._done > self._limit:
            raise Problem(413, f"the request is larger than the limit of {self._limit:,} bytes")
        if not message.get("more_body"):
            self.end()
        return message

    def end(self) -> None:
        """No more of it comes, or is wanted."""
        if not self._ended:
            self._ended = True
            self._at_end()


class _Answer:
    """Sends an answer with the security headers, and a problem instead of one that has not begun."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._send, self._begun = send, False
        self._policy = PAGE_POLICY if scope["path"] in ("/", "/docs") or scope["path"].startswith("/web/") else _NOTHING

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            known = {name.lower() for name, _ in message["headers"]}
            wanted = _HEADERS | {"Content-Security-Policy": self._policy}
            added = [(name.lower().encode(), value.encode()) for name, value in wanted.items()]
            message["headers"] = [*message["headers"], *(item for item in added if item[0] not in known)]
        await self._send(message)

    async def problem(self, problem: Problem) -> None:
        if self._begun:
            raise problem
        headers = {"content-type": MEDIA_TYPE} | {name.lower(): value for name, value in problem.headers.items()}
        encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self({"type": "http.response.start", "status": problem.status, "headers": encoded})
        await self({"type": "http.response.body", "body": json.dumps(problem.as_dict()).encode()})


def _check_local(scope: Scope, headers: dict[str, str]) -> None:
    """Let only this machine's programs in, and of its browsers only the service's own page (DNS rebinding)."""
    client = (scope.get("client") or ("",))[0]
    if not _is_loopback(client):
        raise Problem(403, "without tokens this service answers this machine alone: start it with --token-file")
    if any(name in headers for name in PROXY_HEADERS):
        raise Problem(
            403, "the request comes through a proxy: a service behind one has to be started with --token-file"
        )
    host = headers.get("host", "")
    if not _is_loopback(_parts(f"//{host}").hostname or ""):
        raise Problem(403, "the Host header names another machine, wanted localhost or 127.0.0.1")
    origin = headers.get("origin")
    if origin is not None and _parts(origin).netloc != host:
        raise Problem(403, "the request comes from a page of another origin")


def _parts(address: str) -> SplitResult:
    try:
        return urlsplit(address)
    except ValueError as error:
        raise Problem(403, "the Host or Origin header is no address") from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    """Whether a name or address to listen on is this machine's own."""
    return _is_loopback(host)


def _checked_length(headers: dict[str, str], limit: int) -> int | None:
    """Return how long the body is, None where that is not said."""
    length = headers.get("content-length")
    if length is None:
        return None
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise Problem(400, f"Content-Length is {length[:20]!r}, wanted a number")
    if int(length) > limit:
        raise Problem(413, f"the request has {int(length):,} bytes, the limit is {limit:,}")
    return int(length)


def _check_form(headers: dict[str, str]) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Problem(
            415, "wanted a form of type multipart/form-data with the file in its field volume or volume_MODALITY"
        )


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
