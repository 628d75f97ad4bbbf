"""Who may ask: bearer tokens, or this machine alone; how much; and the headers that go with every answer.

A token is 256 random bits, so its plain SHA-256 can lie in a file: there is nothing to guess.
"""

import hashlib
import hmac
import ipaddress
import json
import os
import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from aldm.errors import UserError
from serve.problems import MEDIA_TYPE, Problem
from serve.settings import Settings
from serve.store import StoreHandle

Scope, Message = dict[str, Any], dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

LOCAL_OWNER = "local"
OPEN_PATHS = re.compile(r"/|/web/[\w.-]+|/docs|/openapi\.json|/v1/health/(live|ready)")
UPLOADS = ("/v1/translations", "/v1/translate")
SMALL_BODY = 2**16
"""Largest body of every other request, bytes."""
FORM_BYTES = 2**16
"""What the fields beside the volume may take, bytes."""
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
    known = read_tokens(path) if path.exists() else {}
    if name in known:
        raise UserError(f"{path} has a token named {name} already: take another name, or remove its line first")
    token = f"aldm_{secrets.token_urlsafe(32)}"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a") as stream:
            stream.write(f"{name} {_digest(token)}\n")
    except OSError as error:
        raise UserError(f"--token-file {path}: cannot be written: {error.strerror}") from error
    return token


def read_tokens(path: Path) -> dict[str, str]:
    """Return name -> SHA-256 of each token of a file; lines that begin with # are comments.

    Raises:
        UserError: no such file, a line that is not `NAME SHA256`, or no token at all.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {path}: cannot be read: {error}") from error
    tokens = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([\w-]+)\s+([0-9a-f]{64})\s*", line, flags=re.ASCII)
        if match is None or match[1] == LOCAL_OWNER:
            raise UserError(
                f"--token-file {path}, line {number}: wanted NAME and the SHA-256 of a token; make one with "
                "aldm serve --new-token NAME --token-file FILE"
            )
        tokens[match[1]] = match[2]
    if not tokens:
        raise UserError(f"--token-file {path} holds no token: make one with aldm serve --new-token NAME")
    return tokens


def owner_of(header: str, tokens: dict[str, str]) -> str | None:
    """Return whose token an Authorization header carries; every hash is compared, in constant time."""
    scheme, _, token = header.partition(" ")
    digest = _digest(token.strip())
    found = None
    for name, known in tokens.items():
        if hmac.compare_digest(digest, known) and scheme.lower() == "bearer":
            found = name
    return found


class Guard:
    """ASGI middleware around the whole application: host, token, size and room are checked before a body is read."""

    def __init__(self, app: Any, *, settings: Settings, tokens: dict[str, str], store: StoreHandle) -> None:
        self.app, self.settings, self.tokens, self.store = app, settings, tokens, store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or say why not."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        answer = _Answer(scope, send)
        ticket = None
        try:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            state = scope.setdefault("state", {})
            state["owner"] = self._owner(scope, headers)
            upload = scope["method"] == "POST" and scope["path"] in UPLOADS
            limit = self.settings.max_upload_bytes + FORM_BYTES if upload else SMALL_BODY
            _check_length(headers, limit)
            if upload:
                ticket = state["ticket"] = await self.store.acall("reserve")
            await self.app(scope, _counted(receive, limit), answer)
        except Problem as problem:
            await answer.problem(problem)
        finally:
            if ticket is not None:
                await self.store.acall("release", ticket)

    def _owner(self, scope: Scope, headers: dict[str, str]) -> str:
        if not self.tokens:
            _check_local(scope, headers)
            return LOCAL_OWNER
        owner = owner_of(headers.get("authorization", ""), self.tokens)
        if owner is None and not OPEN_PATHS.fullmatch(scope["path"]):
            raise Problem(
                401,
                "this service wants a token: send the header Authorization: Bearer TOKEN",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return owner or ""


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
    host = headers.get("host", "")
    if not _is_loopback(urlsplit(f"//{host}").hostname or ""):
        raise Problem(403, "the Host header names another machine, wanted localhost or 127.0.0.1")
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        raise Problem(403, "the request comes from a page of another origin")


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


def _check_length(headers: dict[str, str], limit: int) -> None:
    length = headers.get("content-length")
    if length is None:
        return
    if not length.isdigit():
        raise Problem(400, f"Content-Length is {length[:20]!r}, wanted a number")
    if int(length) > limit:
        raise Problem(413, f"the request has {int(length):,} bytes, the limit is {limit:,}")


def _counted(receive: Receive, limit: int) -> Receive:
    """Count what arrives: a chunked body says no length."""
    done = 0

    async def counted() -> Message:
        nonlocal done
        message = await receive()
        done += len(message.get("body", b""))
        if done > limit:
            raise Problem(413, f"the request is larger than the limit of {limit:,} bytes")
        return message

    return counted


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
