"""The model that ships: its answer to a fixed volume, and that it is better than no model."""

import json
import shutil
from pathlib import Path

import golden_default_model as golden
import numpy as np

from aldm.data.preprocess import prepare_subject
from aldm.data.volume import Volume, crop_or_pad
from aldm.default_model import default_model
from aldm.metrics import psnr_db
from aldm.translate import Translator


def test_its_answer_is_the_one_that_was_written_down():
    """Wavelet order, schedule, gates, intensities, weights: whatever changes, changes this."""
    wanted = json.loads(golden.FILE.read_text())
    got = golden.answers()
    assert got.keys() == wanted.keys()
    for target, values in wanted.items():
        assert np.ptp(values) > 0.2, "there is something in it"
        np.testing.assert_allclose(got[target], values, atol=1e-3)


def test_as_a_bridge_of_four_steps_and_several_samples_it_gives_its_first_step(tmp_path: Path) -> None:
    """Models of before have that in their config.json."""
    shutil.copytree(default_model(), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    record = json.loads(file.read_text())
    record["config"]["diffusion"] |= {"objective": "bridge", "bridge_noise": 0.1, "bridge_start_fraction": 0.8}
    record["config"]["sampling"] = {"sampler": "bridge", "num_inference_steps": 4, "num_samples": 3, "eta": 1.0}
    file.write_text(json.dumps(record))
    before, now = Translator.load(tmp_path / "model"), Translator.load(default_model())
    assert (before.config.diffusion, before.config.sampling) == (now.config.diffusion, now.config.sampling)
    x = np.random.default_rng(0).uniform(-1, 1, now.config.preprocess.spatial_shape).astype(np.float32)
    (made, spread), (wanted, _) = (one.translate_encoded(one.encode(x), "t1", "t2", seed=0) for one in (before, now))
    np.testing.assert_array_equal(made, wanted)
    assert spread is None


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
    made, _ = translator.translate_encoded(translator.encode(held_out["t1"]), "t1", "t2", seed=0)
    mean = np.mean([boxes(index, 7)[0]["t2"] for index in range(3)], axis=0)

    def score(x: np.ndarray) -> float:
        return psnr_db((held_out["t2"] + 1) / 2, np.clip((x + 1) / 2, 0, 1), inside)

    assert score(made) > score(mean) + 2
    assert score(made) > score(held_out["t1"]) + 5
