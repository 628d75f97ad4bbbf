"""The tokens of a running service: those of its file as it is now."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from test_serve_security import ask
from untrained import save_untrained

from serve.app import build_app
from serve.security import new_token, owner_of, read_tokens
from serve.settings import Settings
from serve.tokens import TokenFile


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the file to be read again."""
    monkeypatch.setattr("serve.tokens.READ_S", 0.0)


def with_token(token: str) -> dict[str, Any]:
    return {"headers": {"Authorization": f"Bearer {token}"}}


def without_line(path: Path, name: str) -> None:
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith(f"{name} ")))


def test_a_token_that_is_taken_back_is_refused_and_a_new_one_let_in(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    kept, taken = new_token(path, "ward-1"), new_token(path, "ward-2")
    tokens: Any = TokenFile(path)
    assert [ask(tokens=tokens, **with_token(token)).status_code for token in (kept, taken)] == [200, 200]
    without_line(path, "ward-2")
    assert [ask(tokens=tokens, **with_token(token)).status_code for token in (kept, taken)] == [200, 401]
    later = new_token(path, "ward-2")
    found = [ask(tokens=tokens, **with_token(token)) for token in (kept, taken, later)]
    assert [answer.status_code for answer in found] == [200, 401, 200]
    assert found[2].text == f"ward-2:{hashlib.sha256(later.encode()).hexdigest()[:16]}"


def test_the_file_is_not_read_for_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens"
    token = new_token(path, "ward")
    tokens: Any = TokenFile(path)
    monkeypatch.setattr("serve.tokens.READ_S", 3600.0)
    assert ask(tokens=tokens, **with_token(token)).status_code == 200
    path.unlink()
    assert ask(tokens=tokens, **with_token(token)).status_code == 200
    monkeypatch.setattr("serve.tokens.READ_S", 0.0)
    assert ask(tokens=tokens, **with_token(token)).status_code == 503


@pytest.mark.parametrize(
    "damaged", [None, b"", b"# all were taken back\n", b"ward\n", b"\xff\xfe\0", b"ward " + b"0" * 64 + b"ward-2 x"]
)
@pytest.mark.parametrize("begun", [True, False], ids=["running", "just started"])
def test_a_file_that_cannot_be_used_lets_nobody_in(
    begun: bool, damaged: bytes | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "tokens"
    token = new_token(path, "ward")
    whole = path.read_bytes()
    tokens: Any = TokenFile(path)
    if begun:
        assert ask(tokens=tokens, **with_token(token)).status_code == 200
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    for _ in range(2):
        answer = ask(tokens=tokens, **with_token(token))
        assert answer.status_code == 503
        assert "nobody is let in" in answer.json()["detail"]
        assert answer.headers["retry-after"] == "10"
        assert str(tmp_path) not in answer.text
        assert ask(tokens=tokens).status_code == 401  # this machine is not let in instead
        assert ask("/v1/health/live", tokens=tokens).text == ""
    (said,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert str(path) in said.getMessage()
    path.write_bytes(whole)
    assert ask(tokens=tokens, **with_token(token)).status_code == 200


def test_a_link_that_is_turned_is_followed(tmp_path: Path) -> None:
    """As Kubernetes changes the files of a Secret: the folder of the old ones goes."""
    (tmp_path / "old").mkdir()
    (tmp_path / "new").mkdir()
    old, new = new_token(tmp_path / "old" / "tokens", "ward"), new_token(tmp_path / "new" / "tokens", "ward")
    (tmp_path / "tokens").symlink_to(tmp_path / "old" / "tokens")
    tokens: Any = TokenFile(tmp_path / "tokens")
    assert ask(tokens=tokens, **with_token(old)).status_code == 200
    (tmp_path / "link").symlink_to(tmp_path / "new" / "tokens")
    (tmp_path / "link").replace(tmp_path / "tokens")
    (tmp_path / "old" / "tokens").unlink()
    assert [ask(tokens=tokens, **with_token(token)).status_code for token in (old, new)] == [401, 200]


def test_what_ray_serve_keeps_of_the_application_holds_no_token(tmp_path: Path) -> None:
    """It starts copies of the ingress from that, whatever became of the tokens; nor may a link be followed for good."""
    path = tmp_path / "link"
    token = new_token(tmp_path / "tokens", "ward")
    path.symlink_to(tmp_path / "tokens")
    digest = read_tokens(path)["ward"]
    model = save_untrained(tmp_path / "model")
    app = build_app(Settings(model=str(model), work_dir=str(tmp_path / "work"), token_file=str(path)))
    kept = cloudpickle.dumps(app)
    assert str(path).encode() in kept
    assert token.encode() not in kept
    assert digest.encode() not in kept


@pytest.mark.parametrize("before", ["", "# nobody\n", "ward-1 " + "0" * 64, "ward-1 " + "0" * 64 + "\n"])
def test_a_token_is_added_to_whatever_a_file_of_tokens_holds(before: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(before)
    token = new_token(path, "ward-2")
    tokens = read_tokens(path)
    assert owner_of(f"Bearer {token}", tokens) == "ward-2"
    assert tokens.get("ward-1", "0" * 64) == "0" * 64
    assert set(tokens) == ({"ward-1", "ward-2"} if "ward-1" in before else {"ward-2"})
