"""The jobs train, encode and export from the command line, on a small simulated store."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from jobs import content

from aldm import cli
from aldm.checkpoint import load_checkpoint
from aldm.data.store import VolumeStore
from aldm.denoising import build_ms_spade
from aldm.models.codecs import build_codec
from aldm.translate import Translator

TINY = ("--preset", "tiny", "--device", "cpu", "--log-level", "warning")


def here(*words: object) -> tuple[object, ...]:
    """Return a command with what keeps a training in this process; test_ray_training.py has Ray's."""
    return (*words, "--engine", "plain", "--no-tracking") if words[0] == "train" and len(words) > 2 else words


def run(*words: object) -> int:
    return jobs.run(*here(*words))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    return jobs.refused(capsys, *here(*words))


@pytest.fixture(scope="module")
def stage_3(haar_latents: Path, stage_2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "diffusion"
    assert run("train", "diffusion", "--latents", haar_latents, "--ms-spade", stage_2, "--run-dir", folder, *TINY) == 0
    return folder


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "elapsed_s"} for line in lines]


def test_from_stage_1_to_a_translator(brats_store: VolumeStore, tmp_path: Path) -> None:
    store, model = brats_store.path, tmp_path / "model"
    r1, r2, r3, latents = (tmp_path / name for name in ("r1", "r2", "r3", "latents"))
    assert run("train", "vqgan", "--store", store, "--run-dir", r1, *TINY) == 0
    assert run("encode", "--store", store, "--codec", r1, "--out", latents, "--flips", *TINY) == 0
    assert run("train", "ms-spade", "--latents", latents, "--run-dir", r2, *TINY) == 0
    assert run("train", "diffusion", "--latents", latents, "--ms-spade", r2, "--run-dir", r3, *TINY) == 0
    assert run("export", "--codec", r1, "--ms-spade", r2, "--diffusion", r3, "--out", model, *TINY) == 0

    translator = Translator.load(model)
    for part, folder in (("codec", r1), ("ms_spade", r2), ("unet", r3)):
        weights = load_checkpoint(folder / "best").weights
        own = getattr(translator.predictor, part).state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in weights.items())
    subject = brats_store.subjects("test")[0].subject_id
    predicted = translator.translate_encoded(translator.encode(brats_store.volume(subject, "t1")), "t1", "t2").mean
    assert predicted.shape == brats_store.preprocess.spatial_shape
    assert translator.median_percentiles["t2"] == brats_store.median_percentiles("t2")
    card = (model / "README.md").read_text()
    assert "t1, t1ce, t2, flair" in card
    assert "Not a medical device" in card
    assert all(f"| {stage} | 4 |" in card for stage in ("vqgan", "ms-spade", "diffusion"))

    again = tmp_path / "again"  # with the codec of a translator folder, as after fine-tuning
    assert run("export", "--codec", model, "--ms-spade", r2, "--diffusion", r3, "--out", again, *TINY) == 0
    assert content(again) == content(model)


def test_the_lossless_codec_needs_no_run(stage_2: Path, stage_3: Path, tmp_path: Path) -> None:
    words = ("export", "--codec", "haar", "--ms-spade", stage_2, "--diffusion", stage_3, "--out", tmp_path / "model")
    assert run(*words, *TINY, "--set", "sampling.sampler=ddim") == 0
    config = load_checkpoint(tmp_path / "model", "aldm").config
    assert config.codec.kind == "haar"
    assert config.sampling.sampler == "ddim"


def test_a_dry_run_of_export_says_how_much_memory_it_takes(
    stage_2: Path, stage_3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("export", "--codec", "haar", "--ms-spade", stage_2, "--diffusion", stage_3, "--out", tmp_path / "model")
    assert run(*words, *TINY, "--dry-run") == 0
    assert re.search(r"memory: program and weights \d\.\d\d GB, writing them 0\.\d\d GB more", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


def test_the_regression_unet_is_a_model_of_its_own(brats_store: VolumeStore, tmp_path: Path) -> None:
    assert run("train", "unet", "--store", brats_store.path, "--run-dir", tmp_path / "r", *TINY) == 0
    assert run("export", "--baseline", tmp_path / "r", "--out", tmp_path / "model", *TINY) == 0
    translator = Translator.load(tmp_path / "model")
    assert translator.kind == "unet"
    volume = brats_store.volume(brats_store.subjects("test")[0].subject_id, "t1")
    assert translator.translate_encoded(translator.encode(volume), "t1", "flair")[0].shape == volume.shape


def test_resume_or_start_is_a_command_that_may_be_run_again(
    haar_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("train", "ms-spade", "--latents", haar_latents, "--run-dir", tmp_path / "run", *TINY, "--resume-or-start")
    assert run(*words, "--max-steps", 2) == 0
    assert run(*words, "--max-steps", 4) == 0
    assert [line["step"] for line in metrics(tmp_path / "run") if "learning_rate" in line] == [1, 2, 3, 4]
    assert run(*words, "--overwrite") == 2
    assert "--resume-or-start decides by itself" in capsys.readouterr().err


@pytest.mark.parametrize("changed", [[], ["--activation-checkpointing"]])
def test_resume_gives_the_metrics_of_never_having_stopped(
    haar_latents: Path, tmp_path: Path, changed: list[str]
) -> None:
    words = ("train", "ms-spade", "--latents", haar_latents, *TINY, "--set", "train_ms_spade.decay=constant")
    assert run(*words, "--run-dir", tmp_path / "whole", "--max-steps", 6) == 0
    assert run(*words, "--run-dir", tmp_path / "parts", "--max-steps", 2) == 0
    assert run(*words, "--run-dir", tmp_path / "parts", "--max-steps", 6, "--resume", *changed) == 0
    parts = [{**record, "num_steps": 6} if "num_steps" in record else record for record in metrics(tmp_path / "parts")]
    assert parts == metrics(tmp_path / "whole")
    hashes = {load_checkpoint(tmp_path / name / "last").hash for name in ("whole", "parts")}
    assert len(hashes) == 1


def test_the_seed_decides_everything(haar_latents: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = ("train", "ms-spade", "--latents", haar_latents, "--max-steps", 2, "--seed", seed)
        assert run(*words, "--run-dir", tmp_path / name, *TINY) == 0
    a, b, c = (metrics(tmp_path / name) for name in "abc")
    assert a == b
    assert a != c


def test_bf16_trains(haar_latents: Path, stage_2: Path, tmp_path: Path) -> None:
    words = ("train", "diffusion", "--latents", haar_latents, "--ms-spade", stage_2, "--run-dir", tmp_path / "r")
    assert run(*words, *TINY, "--precision", "bf16", "--activation-checkpointing") == 0
    weights = load_checkpoint(tmp_path / "r" / "last").weights
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


@pytest.mark.parametrize("flag", ["--overwrite", "--resume"])
def test_a_dry_run_refuses_the_folder_of_another_stage_as_the_run_does(
    haar_latents: Path, stage_2: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    words = ("train", "diffusion", "--latents", haar_latents, "--ms-spade", stage_2, "--run-dir", stage_2, *TINY, flag)
    for more in ((), ("--dry-run",)):
        assert run(*words, *more) == 2
        assert "is a run of aldm train ms-spade, not of diffusion" in capsys.readouterr().err


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    brats_store: VolumeStore, haar_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", "ms-spade", "--latents", haar_latents, "--run-dir", tmp_path / "r", *TINY, "--dry-run") == 0
    text = capsys.readouterr().out
    module = build_ms_spade(load_config(haar_latents), 8)
    assert f"{sum(parameter.numel() for parameter in module.parameters()):,} parameters" in text
    words = ("encode", "--store", brats_store.path, "--codec", "haar", "--out", tmp_path / "l", *TINY, "--dry-run")
    assert run(*words) == 0
    assert list(tmp_path.iterdir()) == []


def load_config(haar_latents: Path) -> Any:
    from aldm.latents import LatentStore
    from aldm.presets import tiny
    from aldm.stage_data import with_data

    store = LatentStore.open(haar_latents)
    return with_data(tiny(), store.modalities, store.data["preprocess"], store.codec)


def test_an_existing_run_is_not_touched(stage_2: Path, haar_latents: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in stage_2.rglob("*")}
    message = refused(capsys, "train", "ms-spade", "--latents", haar_latents, "--run-dir", stage_2, *TINY)
    assert "--resume continues it, --overwrite deletes it" in message
    assert {path: path.stat().st_mtime_ns for path in stage_2.rglob("*")} == before


def test_a_stage_trained_on_other_latents_is_refused(
    brats_store: VolumeStore, stage_2: Path, stage_3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    words = ("encode", "--store", brats_store.path, "--codec", "haar", "--set", "codec.haar_levels=2", "--out", other)
    assert run(*words, *TINY) == 0
    words = ("train", "diffusion", "--latents", other, "--ms-spade", stage_2, "--run-dir", tmp_path / "r")
    assert "was trained on other latents" in refused(capsys, *words, *TINY)
    assert not (tmp_path / "r").exists()


def test_stages_that_do_not_belong_together_are_not_exported(
    brats_store: VolumeStore,
    haar_latents: Path,
    stage_2: Path,
    stage_3: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "model"
    other = tmp_path / "other"
    assert run("train", "ms-spade", "--latents", haar_latents, "--run-dir", other, "--seed", 9, *TINY) == 0
    words = ("export", "--codec", "haar", "--ms-spade", other, "--diffusion", stage_3, "--out", model)
    assert "was trained with MS-SPADE" in refused(capsys, *words, *TINY)
    assert run("train", "vqgan", "--store", brats_store.path, "--run-dir", tmp_path / "r1", *TINY) == 0
    words = ("export", "--codec", tmp_path / "r1", "--ms-spade", stage_2, "--diffusion", stage_3, "--out", model)
    assert "was trained on latents of codec haar-1" in refused(capsys, *words, *TINY)
    words = ("export", "--codec", "haar", "--ms-spade", stage_2, "--diffusion", stage_3, "--out", model)
    assert "only sampling.* can be set here" in refused(capsys, *words, *TINY, "--set", "seed=3")
    assert "no preset 'nope': wanted one of" in refused(capsys, *words, "--preset", "nope")
    assert not model.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "vqgan", "--store", "STORE", "--set", "codec.kind=haar"), "nothing to train"),
        (("train", "vqgan", "--store", "STORE", "--crop", "16", "16"), "wanted three whole numbers X Y Z, or full"),
        (("train", "vqgan", "--store", "STORE", "--crop", "64", "64", "64"), "does not fit into the store's volumes"),
        (("train", "vqgan", "--store", "nowhere"), "is not a store of prepared volumes"),
        (("train", "ms-spade", "--latents", "nowhere"), "is not a store of latents"),
        (("train", "ms-spade", "--latents", "LATENTS", "--resume"), "holds no run to resume"),
        (("train", "ms-spade", "--latents", "LATENTS", "--max-minutes", "nan"), "wanted a finite value above 0"),
        (("train", "diffusion", "--latents", "LATENTS", "--ms-spade", "nowhere"), "holds no checkpoint"),
        (("train", "ms-spade", "--latents", "LATENTS", "--set", "modalities=[pd]"), "the data have t1, t1ce"),
    ],
)
def test_what_cannot_be_trained_is_refused_and_nothing_is_written(
    words: tuple[str, ...],
    message: str,
    brats_store: VolumeStore,
    haar_latents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"STORE": brats_store.path, "LATENTS": haar_latents}
    named = [places.get(word, word) for word in words]
    assert message in refused(capsys, *named, "--run-dir", tmp_path / "r", *TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_codec_that_is_none_is_refused(
    brats_store: VolumeStore, stage_2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("encode", "--store", brats_store.path, "--out", tmp_path / "l", *TINY, "--codec")
    assert "neither haar nor the run folder" in refused(capsys, *words, "har")
    assert "kind 'ms-spade', wanted 'codec'" in refused(capsys, *words, stage_2)
    assert list(tmp_path.iterdir()) == []


def test_encoding_in_bounded_memory_gives_the_same_latents(brats_store: VolumeStore, tmp_path: Path) -> None:
    from aldm.encoding import make_encoder
    from aldm.memory import resident_bytes
    from aldm.presets import tiny

    torch.manual_seed(0)
    codec = build_codec(tiny().codec).eval()
    shape = brats_store.preprocess.spatial_shape
    volume = torch.from_numpy(brats_store.volume(brats_store.subjects()[0].subject_id, "t1"))[None, None]
    limit_gb = (resident_bytes() + 2e9) / 1e9
    with torch.inference_mode():
        whole = make_encoder(codec, shape, torch.device("cpu"), "fp32", None)(volume)
        bounded = make_encoder(codec, shape, torch.device("cpu"), "fp32", limit_gb)(volume)
    assert torch.allclose(whole, bounded, atol=1e-4)


def test_a_full_disk_is_seen_before_encoding(
    brats_store: VolumeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("aldm.encoding.free_gib", lambda folder: 1e-6)
    words = ("encode", "--store", brats_store.path, "--codec", "haar", "--out", tmp_path / "l", *TINY)
    assert "free some space" in refused(capsys, *words)


@pytest.fixture
def training(haar_latents: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A long training of stage 2 in a process of its own, in tmp_path / run, past its first checkpoint."""
    words = ["train", "ms-spade", "--latents", haar_latents, "--run-dir", tmp_path / "run", *TINY]
    words += ["--max-steps", 100000, "--engine", "plain", "--no-tracking"]
    process = subprocess.Popen([sys.executable, "-m", "aldm.cli", *map(str, words)], env=os.environ)
    deadline = time.monotonic() + 180
    try:
        while not (tmp_path / "run" / "last").is_dir():
            assert process.poll() is None, "the training ended by itself"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        process.wait()


def test_sigterm_leaves_a_run_that_can_be_resumed(
    training: subprocess.Popen[bytes], haar_latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = ("train", "ms-spade", "--latents", haar_latents, "--run-dir", folder, *TINY, "--resume")
    assert f"another training runs in {folder}" in refused(capsys, *words, "--max-steps", 100000)
    training.send_signal(signal.SIGTERM)
    assert training.wait(timeout=180) == cli.EXIT_TERMINATED
    step = json.loads((folder / "last" / "training.json").read_text())["step"]
    assert metrics(folder)[-1]["step"] == step
    load_checkpoint(folder / "last", "ms-spade")
    assert not list(folder.glob(".tmp-*"))
    assert run(*words, "--max-steps", step + 2) == 0
    assert metrics(folder)[-1]["step"] == step + 2


def test_a_killed_training_goes_on_from_its_last_checkpoint(
    training: subprocess.Popen[bytes], haar_latents: Path, tmp_path: Path
) -> None:
    training.kill()
    training.wait()
    words = ("train", "ms-spade", "--latents", haar_latents, "--run-dir", tmp_path / "run", *TINY)
    step = json.loads((tmp_path / "run" / "last" / "training.json").read_text())["step"]
    assert run(*words, "--resume", "--max-steps", step + 1) == 0
    steps = [record["step"] for record in metrics(tmp_path / "run") if "num_steps" in record]
    assert steps == list(range(1, step + 2))
