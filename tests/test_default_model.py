"""The model that ships: its answer to a fixed volume, that it is better than no model, and what it finds unlike."""

import json
from dataclasses import replace
from pathlib import Path

import corruptions
import golden_default_model as golden
import numpy as np
import pytest
from untrained import save_untrained

from aldm.data.preprocess import prepare_subject
from aldm.data.volume import Volume, crop_or_pad, load_nifti
from aldm.default_model import default_model
from aldm.metrics import psnr_db
from aldm.presets import tiny
from aldm.translate import Translator
from serve.models import read_model
from serve.pages import example_of


def test_its_answer_is_the_one_that_was_written_down():
    """Wavelet order, schedule, gates, intensities, weights: whatever changes, changes this."""
    wanted = json.loads(golden.FILE.read_text())
    got = golden.answers()
    assert got.keys() == wanted.keys()
    for target, values in wanted.items():
        assert np.ptp(values) > 0.2, "there is something in it"
        np.testing.assert_allclose(got[target], values, atol=1e-3)


def test_a_bridge_of_four_steps_and_several_samples_gives_its_first_step(tmp_path: Path) -> None:
    """Models of before have that in their config.json."""
    base = tiny()
    one_step = replace(base.sampling, sampler="one-step", num_inference_steps=1, num_samples=1)
    regression = replace(base.diffusion, objective="regression", residual_std=())
    folder = save_untrained(tmp_path / "model", config=replace(base, diffusion=regression, sampling=one_step))
    now = Translator.load(folder)
    file = folder / "config.json"
    record = json.loads(file.read_text())
    record["config"]["diffusion"] |= {"objective": "bridge", "bridge_noise": 0.1, "bridge_start_fraction": 0.8}
    record["config"]["sampling"] = {"sampler": "bridge", "num_inference_steps": 4, "num_samples": 3, "eta": 1.0}
    file.write_text(json.dumps(record))
    before = Translator.load(folder)
    assert (before.config.diffusion, before.config.sampling) == (now.config.diffusion, now.config.sampling)
    x = np.random.default_rng(0).uniform(-1, 1, now.config.preprocess.spatial_shape).astype(np.float32)
    made, wanted = (one.translate_encoded(one.encode(x), "t1", "t2", seed=0) for one in (before, now))
    np.testing.assert_array_equal(made.mean, wanted.mean)
    assert made.spread is None


def test_a_held_out_subject_is_better_translated_than_copied_or_averaged():
    translator = Translator.load(default_model(), precision="fp32")

    def boxes(index: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
        volumes = golden.subject(index, seed)
        prepared = prepare_subject({name: volumes[name] for name in ("t1", "t2")}, translator.config.preprocess)
        start = prepared.records["t1"].boxes[0]

        def box(data: np.ndarray, fill: float) -> np.ndarray:
            return crop_or_pad(Volume(data, np.eye(4)), start, translator.config.preprocess.spatial_shape, fill).data

        return {name: box(data, -1) for name, data in prepared.volumes.items()}, box(prepared.mask, False)

    held_out, inside = boxes(0, golden.SEED)
    made = translator.translate_encoded(translator.encode(held_out["t1"]), "t1", "t2", seed=0).mean
    mean = np.mean([boxes(index, 7)[0]["t2"] for index in range(3)], axis=0)

    def score(x: np.ndarray) -> float:
        return psnr_db((held_out["t2"] + 1) / 2, np.clip((x + 1) / 2, 0, 1), inside)

    assert score(made) > score(mean)
    assert score(made) > score(held_out["t1"]) + 3


@pytest.fixture(scope="module")
def translator() -> Translator:
    return Translator.load(default_model())


@pytest.fixture(scope="module")
def head() -> dict[str, Volume]:
    """A held-out subject as the model's training had them."""
    return corruptions.subject(0)


@pytest.mark.parametrize("source", ["t1", "t1ce", "t2", "flair", "pd"])
def test_a_held_out_volume_is_like_the_training_data(
    source: str, translator: Translator, head: dict[str, Volume]
) -> None:
    assert not corruptions.likeness(translator, head[source], source).is_unlike


UNLIKE = [
    "turned by 180 degrees about the axis from ear to ear",
    "upside down (mirrored)",
    "two legs",
    "noise alone",
    "lower half zeros",
    "skull-stripped",
    "noise, 10 %",
]


@pytest.mark.parametrize("name", UNLIKE)
def test_what_is_unlike_the_training_data_is_told(name: str, translator: Translator, head: dict[str, Volume]) -> None:
    assert corruptions.likeness(translator, corruptions.CORRUPTIONS[name](head["t1"]), "t1").is_unlike


@pytest.mark.parametrize("name", corruptions.HARMLESS)
def test_what_makes_no_difference_is_not_told(name: str, translator: Translator, head: dict[str, Volume]) -> None:
    assert not corruptions.likeness(translator, corruptions.HARMLESS[name](head["t1"]), "t1").is_unlike


def test_the_example_of_the_page_is_like_the_training_data(translator: Translator, tmp_path: Path) -> None:
    source, path = example_of(tmp_path, read_model(default_model(), "default"))
    assert not corruptions.likeness(translator, load_nifti(path)[0], source).is_unlike
