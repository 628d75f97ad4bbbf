"""aldm promote: the champion's alias goes to a model that an evaluation found better, and back again."""

import json
from pathlib import Path

import pytest
import torch
from untrained import save_untrained

from aldm.checkpoint import load_checkpoint, read_checkpoint_record, save_checkpoint
from aldm.cli import main
from aldm.data.store import VolumeStore
from aldm.evaluation_settings import EVALUATION_FILE
from pipelines.registry_download import find_alias
from pipelines.tracking_server import connect


def nearly_constant_model(folder: Path, intensity: float) -> Path:
    """A regression U-Net that says about the same everywhere; inside the head 0 is nearer than -0.8."""
    folder.mkdir()
    fresh = load_checkpoint(save_untrained(folder / "fresh", kind="unet"))
    weights = {name: weight.clone() for name, weight in fresh.weights.items()}
    weights["unet.out.conv.weight"].normal_(0, 0.01, generator=torch.Generator().manual_seed(0))
    weights["unet.out.conv.bias"][0] = (intensity + 1) * 8**0.5  # the low-pass band, over background
    save_checkpoint(folder / "model", kind=fresh.kind, config=fresh.config, weights=weights, meta=fresh.meta)
    return folder / "model"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return {name: nearly_constant_model(tmp_path / name, value) for name, value in (("bad", -0.8), ("good", 0.0))}


def broken_model(folder: Path, model: Path) -> Path:
    """The same model with weights that are no numbers."""
    found = load_checkpoint(model)
    weights = {name: torch.full_like(weight, torch.nan) for name, weight in found.weights.items()}
    save_checkpoint(folder, kind=found.kind, config=found.config, weights=weights, meta=found.meta)
    return folder


def evaluate(model: Path, store: VolumeStore, out: Path) -> Path:
    """One pair of the nine is enough to compare two models on."""
    words = ["evaluate", "--model", model, "--store", store.path, "--out", out, "--champion", "translator"]
    words += ["--source", "t1", "--target", "t2"]
    assert main([*map(str, words), "--log-level", "warning"]) == 0
    return out


def promote(*words: object) -> int:
    return main(["promote", "--register", "translator", *map(str, words)])


def version_of(alias: str, server: str) -> int | None:
    found = find_alias("translator", alias, server)
    return None if found is None else found.version


@pytest.mark.slow
@pytest.mark.smoke
def test_the_better_model_is_the_champion(
    models: dict[str, Path], ixi_store: VolumeStore, tmp_path: Path, server: str, capsys
) -> None:
    first = evaluate(models["bad"], ixi_store, tmp_path / "first")
    good_before = evaluate(models["good"], ixi_store, tmp_path / "good-before")  # there was no champion then
    assert promote("--model", models["bad"], "--scores", first, "--dry-run") == 0
    assert version_of("champion", server) is None
    assert promote("--model", models["bad"], "--scores", first) == 0
    assert (version_of("champion", server), version_of("previous", server)) == (1, None)
    capsys.readouterr()

    assert promote("--model", models["good"], "--scores", good_before) == 2  # it compares with nobody
    assert "run aldm evaluate --champion translator@champion again" in capsys.readouterr().err
    good = evaluate(models["good"], ixi_store, tmp_path / "good-scores")
    assert promote("--model", models["bad"], "--scores", good) == 2
    assert "an evaluation of another model" in capsys.readouterr().err
    assert promote("--model", models["good"], "--scores", good, "--min-gain-db", 90) == 0
    assert version_of("champion", server) == 1
    assert promote("--model", models["good"], "--scores", good) == 0
    assert (version_of("champion", server), version_of("previous", server)) == (2, 1)
    assert promote("--model", models["good"], "--scores", good) == 0  # again: nothing to do
    assert "it is the champion already" in capsys.readouterr().out
    assert len(connect(server).search_model_versions("name = 'translator'")) == 2

    bad = evaluate(models["bad"], ixi_store, tmp_path / "bad-scores")
    capsys.readouterr()
    assert promote("--model", models["bad"], "--scores", bad) == 0
    assert "NOT better than the champion models:/translator/2" in capsys.readouterr().out
    assert version_of("champion", server) == 2

    assert promote("--rollback", "--dry-run") == 0
    assert version_of("champion", server) == 2
    assert promote("--rollback") == 0
    assert (version_of("champion", server), version_of("previous", server)) == (1, 2)


@pytest.mark.slow
def test_a_model_that_does_not_work_is_not_registered(
    models: dict[str, Path], ixi_store: VolumeStore, tmp_path: Path, server: str, capsys
) -> None:
    """Whatever its evaluation says: it may have been measured where it worked."""
    scores = evaluate(models["good"], ixi_store, tmp_path / "scores")
    broken = broken_model(tmp_path / "broken", models["good"])
    record = json.loads((scores / EVALUATION_FILE).read_text())
    record["models"][0]["hash"] = read_checkpoint_record(broken)["hash"]
    (scores / EVALUATION_FILE).write_text(json.dumps(record))
    capsys.readouterr()
    for words in ([], ["--dry-run"]):
        assert promote("--model", broken, "--scores", scores, *words) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"aldm promote: not registered: {broken} does not work: ")
        assert message.count("\n") == 1
    assert connect(server).search_registered_models() == []


def test_what_cannot_be_promoted_is_refused(server: str, tmp_path: Path, capsys) -> None:
    model = save_untrained(tmp_path / "model")
    cases = [
        (["--model", model, "--scores", tmp_path / "none"], "is no evaluation: make one with aldm evaluate --out"),
        (["--model", model], "give --model and --scores, or --rollback"),
        (["--rollback"], "no version with the alias champion, so there is nothing to go back to there"),
        (["--rollback", "--model", model], "--rollback goes without --model and --scores"),
        (["--alias", "previous", "--rollback"], "--alias previous is what the champion before gets"),
    ]
    for words, message in cases:
        try:
            code = promote(*words)
        except SystemExit as end:  # argparse
            code = int(str(end.code))
        assert code == 2
        assert message in capsys.readouterr().err
    assert find_alias("translator", "champion", server) is None
