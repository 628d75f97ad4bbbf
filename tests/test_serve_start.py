"""What `aldm serve` refuses before it starts anything, its tokens, and what it guesses of a file."""

import contextlib
import hashlib
import signal
import socket
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
from service import free_port
from untrained import save_untrained

from aldm.cli import main
from aldm.errors import UserError
from pipelines.registry import register
from serve.models import find_model
from serve.security import new_token, owner_of, read_tokens
from serve.work_folder import locked


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("translators") / "model")


def start(model: Path | str, work: Path, *flags: object) -> int:
    return main(["serve", "--model", str(model), "--work-dir", str(work), "--dry-run", *map(str, flags)])


def test_a_dry_run_says_what_would_be_served(model, tmp_path, capsys):
    port = free_port()
    assert start(model, tmp_path / "work", "--port", port, "--max-queue", 3) == 0
    said = capsys.readouterr().out
    assert f"would listen on 127.0.0.1:{port} and answer clients on this machine" in said
    assert str(tmp_path / "work") in said
    assert "memory of a copy" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is more than this machine, so tokens are needed"),
        (["--host", "nowhere.invalid", "--token-file", "TOKENS"], "cannot listen there"),
        (["--port", "0"], "--port is 0, wanted 1 to 65535"),
        (["--max-queue", "0"], "--max-queue is 0"),
        (["--max-upload-mb", "-1"], "--max-upload-mb is -1"),
        (["--max-folder-gb", "inf"], "--max-folder-gb is inf"),
        (["--drain-seconds", "nan"], "--drain-seconds is nan, wanted"),
        (["--max-folder-gb", "1"], "--max-folder-gb is 1, one upload of --max-upload-mb 512 and --max-voxels 67108864"),
        (["--precision", "fp16"], "fp16"),
        (["--token-file", "missing"], "--token-file"),
        (["--preset", "tiny"], "a served model carries its own configuration"),
        (["--set", "sampling.num_samples=2"], "a served model carries its own configuration"),
        (["--max-memory-gb", "0.01"], "memory"),
        (["--new-token", "a b", "--token-file", "TOKENS"], "--new-token is 'a b'"),
        (["--new-token", "ward"], "give --token-file FILE as well"),
    ],
)
def test_what_cannot_be_served_is_refused(model, tmp_path, capsys, flags, words):
    tokens = tmp_path / "tokens"
    new_token(tokens, "someone")
    try:
        code = start(model, tmp_path / "work", *[str(tokens) if flag == "TOKENS" else flag for flag in flags])
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2
    assert words in capsys.readouterr().err


def test_a_proxy_in_front_needs_tokens(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert start(model, tmp_path / "work") == 2
    assert "puts a proxy in front of the service" in capsys.readouterr().err
    new_token(tmp_path / "tokens", "someone")
    assert start(model, tmp_path / "work", "--port", free_port(), "--token-file", tmp_path / "tokens") == 0


def test_a_registered_model_is_served_with_its_card(tmp_path, capsys, monkeypatch):
    folder = save_untrained(tmp_path / "model")
    (folder / "card.json").write_text('[{"sampler": "ddim", "psnr_db": 21.5}]')
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    register(folder, "brats", "champion", uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    found = find_model("models:/brats@champion", tmp_path / "work")
    wanted = find_model(str(folder), tmp_path / "work")
    assert (found.name, found.hash, found.card) == ("models:/brats@champion", wanted.hash, wanted.card)
    assert found.folder.is_relative_to(tmp_path / "work" / "models")
    assert stat.S_IMODE((tmp_path / "work").stat().st_mode) == 0o700
    assert start("models:/brats@champion", tmp_path / "work", "--port", free_port()) == 0
    assert "model: models:/brats@champion: aldm, preset tiny" in capsys.readouterr().out
    assert start("models:/brats@nobody", tmp_path / "work", "--port", free_port()) == 2


def test_a_model_that_is_none_is_refused(tmp_path, capsys):
    assert start(tmp_path / "missing", tmp_path / "work") == 2
    assert "is not a checkpoint folder: there is no such folder; aldm export writes" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_a_port_or_folder_in_use_is_refused(model, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert start(model, tmp_path / "work", "--port", port) == 2
        assert f"--port {port}: cannot listen there" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
    with locked(tmp_path / "work"):
        assert start(model, tmp_path / "work", "--port", free_port()) == 2
        assert "in use by another service" in capsys.readouterr().err
    assert start(model, tmp_path / "work", "--port", free_port()) == 0


@pytest.mark.parametrize(
    ("signal_number", "started", "code"),
    [
        (signal.SIGINT, True, 0),
        (signal.SIGTERM, True, 0),
        (signal.SIGINT, False, 130),
        (signal.SIGTERM, False, 143),
    ],
)
def test_a_service_that_has_started_ends_in_order_and_one_that_has_not_was_stopped(
    model, tmp_path, monkeypatch, signal_number, started, code
):
    """With everything that runs on Ray left out."""
    from ray import serve as ray_serve

    def stop(*_: object) -> None:
        signal.raise_signal(signal_number)

    for name in ("start", "shutdown"):
        monkeypatch.setattr(ray_serve, name, lambda **_: None)
    monkeypatch.setattr(ray_serve, "run", lambda *_, **__: None if started else stop())
    monkeypatch.setattr("pipelines.ray_session.ray_session", contextlib.nullcontext)
    monkeypatch.setattr("pipelines.ray_session.check_cluster_has", lambda *_, **__: None)
    monkeypatch.setattr("serve.app.build_app", lambda settings: None)
    monkeypatch.setattr("serve.store.start_store", lambda settings: SimpleNamespace(call=lambda method: 0))
    monkeypatch.setattr("serve.store.end_store", lambda: None)
    monkeypatch.setattr("serve.main.time.sleep", stop)
    words = ["serve", "--model", str(model), "--work-dir", str(tmp_path / "work"), "--port", str(free_port())]
    assert main(words) == code


def test_tokens_are_kept_as_hashes(tmp_path, capsys):
    path = tmp_path / "tokens"
    assert main(["serve", "--new-token", "ward-1", "--token-file", str(path)]) == 0
    token = capsys.readouterr().out.strip()
    other = new_token(path, "ward-2")
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    tokens = read_tokens(path)
    assert tokens["ward-1"] == hashlib.sha256(token.encode()).hexdigest()
    assert owner_of(f"Bearer {token}", tokens) == "ward-1"
    assert owner_of(f"bearer {other}", tokens) == "ward-2"
    for header in ("", "Bearer", f"Basic {token}", "Bearer ", f"Bearer {token}x", f"Bearer {tokens['ward-1']}", token):
        assert owner_of(header, tokens) is None
    with pytest.raises(UserError, match="has a token named ward-1 already"):
        new_token(path, "ward-1")


@pytest.mark.parametrize("text", ["", "# nothing\n", "ward secret\n", "ward " + "0" * 63 + "\n", "local " + "0" * 64])
def test_a_file_without_good_tokens_is_refused(tmp_path, text):
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(UserError, match="--token-file"):
        read_tokens(tmp_path / "tokens")
