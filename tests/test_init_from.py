"""`aldm train --init-from`: a trained model goes on learning from a user's own subjects."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from untrained import save_untrained

from aldm.checkpoint import load_checkpoint
from aldm.data.store import VolumeStore
from aldm.latents import LatentStore
from aldm.presets import tiny
from aldm.stage_inputs import StageInputs
from aldm.training_build import build_stage
from aldm.translate import Translator

CPU = ("--device", "cpu", "--log-level", "warning")
TINY = ("--preset", "tiny", *CPU)
HERE = ("--engine", "plain", "--no-tracking")
MAP = ("--set", "ms_spade.intensity_map=true", "--set", "diffusion.objective=regression")
ALL = ("--set", "diffusion.all_targets=true", "--set", "diffusion.any_sources=true")
ONE_STEP = ("--set", "sampling.sampler=one-step", "--set", "sampling.num_inference_steps=1")
NO_STEPS = ("--max-steps", 1, "--set")
"""One step, with a learning rate (to be added) that moves no weight."""


def train(stage: str, *words: object) -> int:
    return jobs.run("train", stage, *words, *CPU, *HERE)


def aldm_model(latents: Path, out: Path, *words: object) -> Path:
    """Train stages 2 and 3 and put them together."""
    assert train("ms-spade", "--latents", latents, "--run-dir", out / "ms-spade", *words) == 0
    stages = ("--ms-spade", out / "ms-spade")
    assert train("diffusion", "--latents", latents, *stages, "--run-dir", out / "diffusion", *words) == 0
    return exported(out)


def exported(out: Path) -> Path:
    runs = ("--ms-spade", out / "ms-spade", "--diffusion", out / "diffusion")
    assert jobs.run("export", "--codec", "haar", *runs, "--out", out / "model", *CPU) == 0
    return out / "model"


@pytest.fixture(scope="module")
def model(haar_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the tiny preset with what the preset small has: an intensity map, all targets; and any sources."""
    words = ("--preset", "tiny", *MAP, *ALL, *ONE_STEP)
    return aldm_model(haar_latents, tmp_path_factory.mktemp("model"), *words)


@pytest.fixture(scope="module")
def own_store(brats_store: VolumeStore, brats_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    """A user's own subjects: other ones for training than the model's, and only two of its modalities."""
    folder = tmp_path_factory.mktemp("own")
    names = [record.subject_id for record in brats_store.subjects()][::-1]
    lines = ["subject_id,modality,path"]
    for name in names:
        lines += [f"{name},{m},{brats_tree / name / f'{name}_{m}.nii.gz'}" for m in ("t1", "t2")]
    (folder / "table.csv").write_text("\n".join(lines) + "\n")
    splits = ["subject_id,split", *(f"{name},{'train' if i < 3 else 'validation'}" for i, name in enumerate(names))]
    (folder / "splits.csv").write_text("\n".join(splits) + "\n")
    words = ("prepare", folder / "table.csv", folder / "store", "--layout", "table", *TINY, "--num-processes", 1)
    jobs.run(*words, "--splits", folder / "splits.csv")
    return VolumeStore.open(folder / "store")


@pytest.fixture(scope="module")
def own_latents(own_store: VolumeStore, model: Path) -> Path:
    out = own_store.path.parent / "latents"
    assert jobs.run("encode", "--store", own_store.path, "--like", model, "--out", out, *CPU) == 0
    return out


def predictions(folder: Path, store: VolumeStore) -> Iterator[np.ndarray]:
    translator = Translator.load(folder)
    subject = store.subjects("validation")[0].subject_id
    code = translator.encode(store.volume(subject, "t1"))
    for target in translator.modalities:
        yield translator.translate_encoded(code, "t1", target).mean


def test_without_a_learning_step_the_model_predicts_what_it_did(
    haar_latents: Path, model: Path, brats_store: VolumeStore, tmp_path: Path
) -> None:
    """On its own subjects, to whom its intensity map is fitted already."""
    words = ("--latents", haar_latents, "--init-from", model, *NO_STEPS)
    own = ("--run-dir", tmp_path / "ms-spade", *words, "train_ms_spade.learning_rate=1e-30")
    assert train("ms-spade", *own) == 0
    own = ("--run-dir", tmp_path / "diffusion", *words, "train_diffusion.learning_rate=1e-30")
    assert train("diffusion", "--ms-spade", tmp_path / "ms-spade", *own) == 0
    before, after = (list(predictions(folder, brats_store)) for folder in (model, exported(tmp_path)))
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert not np.array_equal(before[0], before[2])
    card = (tmp_path / "model" / "README.md").read_text()
    digest = load_checkpoint(model).hash
    assert f"Fine-tuned: the weights began as those of the model model (hash {digest[:12]})" in card
    assert "Fine-tuned" not in (model / "README.md").read_text()
    (start,) = json.loads((tmp_path / "diffusion" / "run.json").read_text())["starts"]
    assert (start["inputs"]["init_from"], start["inputs"]["init_from_hash"]) == (str(model), digest)


def test_a_model_learns_from_subjects_with_some_of_its_modalities_and_keeps_the_others(
    own_latents: Path, own_store: VolumeStore, model: Path, tmp_path: Path
) -> None:
    before, latents = load_checkpoint(model), LatentStore.open(own_latents)
    assert latents.mean.tolist() == np.float32(before.meta["latents"]["mean"]).tolist()
    out = aldm_model(own_latents, tmp_path, "--init-from", model)
    after = load_checkpoint(out)
    assert after.config.modalities == before.config.modalities == ("t1", "t1ce", "t2", "flair")
    assert after.config.preset == "tiny"
    tables = "ms_spade.intensity_map.tables"
    moved = (after.weights[tables] != before.weights[tables]).any(dim=2)
    assert {(i, j) for i, j in moved.nonzero().tolist()} == {(0, 2), (2, 0)}, "the pairs that the subjects have"
    moved = after.weights["ms_spade.precision"] != before.weights["ms_spade.precision"]
    assert {(i, j) for i, j in moved.nonzero().tolist()} == {(0, 2), (2, 0)}
    kept = before.meta["data"]
    for name, value in after.meta["data"]["median_percentiles"].items():
        own = list(own_store.median_percentiles(name)) if name in ("t1", "t2") else kept["median_percentiles"][name]
        assert value == own
    assert len(list(predictions(out, own_store))) == 4


def test_resumed_fine_tuning_is_that_of_never_having_stopped(own_latents: Path, model: Path, tmp_path: Path) -> None:
    words = ("--latents", own_latents, "--init-from", model, "--set", "train_ms_spade.decay=constant")
    assert train("ms-spade", *words, "--run-dir", tmp_path / "whole", "--max-steps", 4) == 0
    assert train("ms-spade", *words, "--run-dir", tmp_path / "parts", "--max-steps", 2) == 0
    assert train("ms-spade", *words, "--run-dir", tmp_path / "parts", "--max-steps", 4, "--resume") == 0
    one, other = (load_checkpoint(tmp_path / name / "last") for name in ("whole", "parts"))
    assert one.hash == other.hash
    assert one.config.init_from == f"model@{load_checkpoint(model).hash[:12]}"
    assert one.hash != load_checkpoint(model.parent / "ms-spade" / "last").hash


@pytest.mark.parametrize("method", ["reggan", "nicegan"])
def test_a_comparison_method_goes_on_from_its_own_network(
    method: str, brats_store: VolumeStore, tmp_path: Path
) -> None:
    """RegGAN exports one of its players' networks, NICE-GAN parts of two."""
    words = ("--store", brats_store.path, "--source", "t1", "--target", "t2")
    assert train(method, *words, "--run-dir", tmp_path / "a", "--preset", "tiny", "--max-steps", 1) == 0
    assert jobs.run("export", "--baseline", tmp_path / "a", "--out", tmp_path / "model", *CPU) == 0
    still = ("--max-steps", 1, "--set", f"baselines.{method}.training.learning_rate=1e-30")
    for start in (tmp_path / "a", tmp_path / "model"):
        assert train(method, *words, "--run-dir", tmp_path / "b", "--init-from", start, *still, "--overwrite") == 0
        assert jobs.run("export", "--baseline", tmp_path / "b", "--out", tmp_path / "c", *CPU, "--overwrite") == 0
        before, after = (next(predictions_of_pair(tmp_path / name, brats_store)) for name in ("model", "c"))
        assert np.abs(before - after).max() < 1e-5, "NICE-GAN's spectral norms go on being estimated"
    another = ("--source", "t1", "--target", "flair", "--init-from", tmp_path / "model", "--run-dir", tmp_path / "d")
    assert train(method, "--store", brats_store.path, *another) == 2


def predictions_of_pair(folder: Path, store: VolumeStore) -> Iterator[np.ndarray]:
    translator = Translator.load(folder)
    code = translator.encode(store.volume(store.subjects("test")[0].subject_id, "t1"))
    yield translator.translate_encoded(code, "t1", "t2").mean


def test_a_codec_and_a_unet_go_on_from_their_own_weights(
    brats_store: VolumeStore, own_store: VolumeStore, tmp_path: Path
) -> None:
    for stage, part in (("vqgan", "codec"), ("unet", "unet")):
        assert train(stage, "--store", brats_store.path, "--run-dir", tmp_path / stage, "--preset", "tiny") == 0
        words = ("--store", own_store.path, "--init-from", tmp_path / stage, "--run-dir", tmp_path / f"{stage}-b")
        still = ("--max-steps", 1, "--set", f"train_{stage}.learning_rate=1e-30")
        assert train(stage, *words, *still) == 0
        before, after = (load_checkpoint(tmp_path / name / "best") for name in (stage, f"{stage}-b"))
        names = [name for name, _ in after.weights.items() if "quantizer" not in name]  # whose codes move by themselves
        assert names
        assert all(torch.allclose(before.weights[name], after.weights[name], rtol=0, atol=1e-20) for name in names)
        assert after.meta["data"]["fingerprint"] == own_store.fingerprint
        assert after.kind == part


def test_fine_tuning_is_shorter_and_gentler_than_the_model_s_own_training(model: Path) -> None:
    from pipelines.train import parse

    own = load_checkpoint(model).config
    words = ["--latents", "l", "--run-dir", "r", "--init-from", str(model)]
    _, config = parse("ms-spade", words)
    before, now = own.train_ms_spade, config.train_ms_spade
    assert now.max_steps == max(1, (before.max_steps or 0) // 5)
    assert now.learning_rate == before.learning_rate / 2
    assert now.adversarial_start_step <= now.max_steps
    same = replace(config, init_from="", train_ms_spade=before)
    assert same == own, "nothing else is changed"
    assert (
        parse("ms-spade", [*words, "--set", "train_ms_spade.learning_rate=0.5"])[1].train_ms_spade.learning_rate == 0.5
    )


def test_the_uncertainty_of_a_fine_tuned_model_is_trained_from_its_own_configuration(
    model: Path, own_store: VolumeStore, tmp_path: Path
) -> None:
    """A worker on Ray builds the stage again from the configuration that the first one has resolved."""
    tuned = tmp_path / "tuned"
    before = load_checkpoint(model)
    config = replace(before.config, init_from="model@0123456789ab", modalities=("t1", "t2"))
    save_untrained(tuned, config=config, modalities=("t1", "t2"))
    paths = StageInputs(store=own_store.path, model=tuned)
    first, _ = build_stage("uncertainty", tiny(), paths)
    assert first.config.init_from == "model@0123456789ab"
    again, _ = build_stage("uncertainty", first.config, paths)
    assert again.config == first.config


def test_what_does_not_fit_the_model_is_refused(
    haar_latents: Path,
    own_store: VolumeStore,
    own_latents: Path,
    model: Path,
    ixi_store: VolumeStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*words: object) -> str:
        return jobs.refused(capsys, *words, *CPU)

    def encode(name: str, *words: object) -> Path:
        assert jobs.run("encode", "--store", own_store.path, "--codec", "haar", "--out", tmp_path / name, *words) == 0
        return tmp_path / name

    run = ("--run-dir", tmp_path / "r", *HERE)
    start = ("train", "ms-spade", "--init-from", model, *run, "--latents")
    its_own = encode("its-own", *TINY)
    message = refused(*start, its_own)
    assert "standardised with its own mean and standard deviation" in message
    assert f"encode the store again with --like {model}" in message
    assert "are of codec haar-2" in refused(*start, encode("deeper", *TINY, "--set", "codec.haar_levels=2"))
    assert "carries its configuration" in refused(*start, own_latents, "--preset", "tiny")
    assert "changes unet, which the model" in refused(*start, own_latents, "--set", "unet.channels=[4]")
    assert "kind aldm, which has no network for aldm train unet: give one of kind unet" in refused(
        "train", "unet", "--store", own_store.path, "--init-from", model, *run
    )
    assert "holds no checkpoint" in refused(
        "train", "ms-spade", "--latents", own_latents, "--init-from", "nowhere", *run
    )
    message = refused("encode", "--store", own_store.path, "--like", "default", "--out", tmp_path / "out")
    assert "--set preprocess.spacing_mm=[2.0,2.0,2.0], --set preprocess.spatial_shape=[88,112,88]" in message
    message = refused("encode", "--store", ixi_store.path, "--codec", tmp_path, "--out", tmp_path / "out")
    assert "holds no checkpoint" in message
    config = own_store.path.parent / "fine.yaml"
    config.write_text("preset: tiny\ninit_from: model@0123456789ab\n")
    message = refused("train", "ms-spade", "--latents", haar_latents, *run, "--preset", config)
    assert "started from model@0123456789ab: name that model, --init-from" in message
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "out").exists()
