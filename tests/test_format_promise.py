"""Files that this version, or one before it, has written: every later one reads them and finds the same in them.

tests/data/make.py has made them. A test that fails here says that what users have from before would not be
read as it was: fix that, do not make the files again.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aldm.checkpoint import load_checkpoint
from aldm.cli import main
from aldm.data.store import VolumeStore
from aldm.latents import LatentStore
from aldm.run_folder import step_of
from aldm.translate import Translator

DATA = Path(__file__).parent / "data"
WRITTEN = DATA / "written"
CONTENTS: dict[str, Any] = json.loads((WRITTEN / "contents.json").read_text())


@pytest.fixture(scope="module")
def make() -> Any:
    """The script that wrote the files, for its volume and its digests."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_written", DATA / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_store_is_read_as_it_was_written(make: Any) -> None:
    store, wanted = VolumeStore.open(WRITTEN / "store"), CONTENTS["store"]
    assert (list(store.modalities), store.layout) == (wanted["modalities"], wanted["layout"])
    assert {subject.subject_id: subject.split for subject in store.subjects()} == {
        name: subject["split"] for name, subject in wanted["subjects"].items()
    }
    for subject_id, subject in wanted["subjects"].items():
        assert make.digest(store.mask(subject_id)) == subject["mask"]
        for modality, digest in subject["volumes"].items():
            assert make.digest(store.volume(subject_id, modality)) == digest


def test_latents_are_read_as_they_were_written(make: Any) -> None:
    latents, wanted = LatentStore.open(WRITTEN / "latents"), CONTENTS["latents"]
    assert (latents.mean.tolist(), latents.std.tolist()) == (wanted["mean"], wanted["std"])
    for subject_id, volumes in wanted["subjects"].items():
        for modality, digest in volumes.items():
            assert make.digest(latents.latent(subject_id, modality, 0)) == digest


def test_a_run_is_read_and_gone_on_with(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more steps: configuration, optimizer's state and averages of then are those that a training starts from."""
    wanted = CONTENTS["run"]
    assert load_checkpoint(WRITTEN / "run" / "last", "ms-spade").hash == wanted["hash"]
    assert step_of(WRITTEN / "run" / "last") == wanted["step"]
    shutil.copytree(WRITTEN, tmp_path / "written")
    run, latents = tmp_path / "written" / "run", tmp_path / "written" / "latents"
    before = (run / "metrics.jsonl").read_text()
    words = ["train", "ms-spade", "--latents", str(latents), "--run-dir", str(run), *make.settings(), "--resume"]
    words += ["--engine", "plain", "--no-tracking", "--log-level", "warning"]
    assert main([*words, "--max-steps", str(wanted["step"] + 2)]) == 0
    assert (run / "metrics.jsonl").read_text().startswith(before)
    assert step_of(run / "last") == wanted["step"] + 2


def test_a_translator_translates_as_it_did(make: Any) -> None:
    translator = Translator.load(WRITTEN / "translator")
    got = translator.translate(make.scan(), "t1", "t2", seed=3).volume.data[::4, ::4, ::4]
    wanted = np.array(CONTENTS["translator"]["t1 to t2"], np.float32)
    assert wanted.std() > 0.02 * np.ptp(wanted) > 0
    np.testing.assert_allclose(got, wanted, atol=2e-3 * np.ptp(wanted))


def test_they_are_small_and_say_nothing_of_where_they_were_made() -> None:
    files = [path for path in WRITTEN.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000
    for path in files:
        assert str(DATA).encode() not in path.read_bytes(), path
