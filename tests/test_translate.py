"""The translator around a predictor whose answer is known: geometry, intensities, samples, provenance."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from untrained import save_untrained

from aldm.config import Config, DiffusionConfig, PreprocessConfig, SamplingConfig
from aldm.data.foreground import find_foreground
from aldm.data.intensity import unscale
from aldm.data.preprocess import prepare_volume, restore
from aldm.data.volume import Volume, crop_or_pad
from aldm.diffusion import draw_noise
from aldm.errors import UserError
from aldm.memory import resident_bytes
from aldm.predictors import MemoryLimit, Predictor, build_predictor
from aldm.presets import small, tiny
from aldm.translate import Translator
from aldm.translation import Request

MODALITIES = ("t1", "t2", "pd")
PERCENTILES = {"t1": (0.0, 100.0), "t2": (10.0, 210.0), "pd": (0.0, 1.0)}


class Echo(Predictor):
    """Predicts the source, darker by a tenth of the target's id, plus noise where several samples are wanted."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def encode(self, x):
        return x

    def decode(self, code):
        return code

    def needed_bytes(self):
        return 0

    def predict(self, code, sources, targets, sampling, generators, on_step):
        for step in range(sampling.num_inference_steps):
            if on_step is not None:
                on_step(step + 1, sampling.num_inference_steps)
        noise = draw_noise(code, generators) * (0.01 * (sampling.num_samples > 1))
        return code - 0.1 * torch.tensor(targets).reshape(-1, 1, 1, 1, 1) + noise


def translator(objective="v", kind="aldm", **preprocess) -> Translator:
    config = replace(
        small(),
        modalities=MODALITIES,
        preprocess=PreprocessConfig(**{"spacing_mm": (2.0, 2.0, 2.0), "spatial_shape": (32, 32, 32)} | preprocess),
        diffusion=DiffusionConfig(objective=objective, num_train_timesteps=100),
        sampling=SamplingConfig(
            sampler="one-step" if objective == "regression" else "ddim",
            num_inference_steps=1 if objective == "regression" else 5,
        ),
    )
    return Translator(Echo(config), config, kind=kind, median_percentiles=PERCENTILES, model_hash="abc")


def smooth_volume(shape=(30, 28, 26), affine=None) -> Volume:
    """A bright ellipsoid with a gradient on a black background."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    inside = 1 / (1 + np.exp(12 * (np.sqrt((grid**2).sum(axis=0)) - 0.7)))
    data = inside * (60 + 20 * grid[0] + 10 * grid[1] - 5 * grid[2])
    return Volume(data.astype(np.float32), np.diag([2.0, 2, 2, 1]) if affine is None else affine)


def in_unit(volume: Volume, model: Translator) -> np.ndarray:
    """The volume in [0, 1], as the model's intensities have it."""
    _, record = prepare_volume(volume, model.config.preprocess)
    return np.clip((volume.data - record.low) / (record.high - record.low), 0, 1)


def test_on_the_model_s_own_grid_the_result_is_the_prediction_exactly():
    volume = smooth_volume()
    result = translator().translate(volume, "t1", "t1")
    expected = in_unit(volume, translator()) * 100
    assert result.volume.data.dtype == np.float32
    np.testing.assert_array_equal(result.volume.affine, volume.affine)
    np.testing.assert_allclose(result.volume.data, expected, atol=1e-3)


@pytest.mark.parametrize(
    "affine",
    [
        pytest.param(np.diag([1.5, 2.5, 2, 1]), id="anisotropic"),
        pytest.param(np.diag([1.0, 1, 1, 1]), id="finer than the model"),
        pytest.param(
            np.block(
                [[2 * np.linalg.qr(np.array([[9.0, 2, 1], [-2, 9, 2], [1, -2, 9]]))[0], np.ones((3, 1))], [0, 0, 0, 1]]
            )
            * np.array([[-1], [-1], [-1], [1]]),
            id="oblique",
        ),
    ],
)
def test_any_grid_comes_back_as_itself(affine):
    volume = smooth_volume(affine=affine)
    model = translator(spatial_shape=(48, 48, 48))
    result = model.translate(volume, "t1", "t1", intensity="unit")
    assert result.volume.data.shape == volume.data.shape
    np.testing.assert_array_equal(result.volume.affine, affine)
    expected = in_unit(volume, model)
    inner = (slice(3, -3),) * 3

    def error(shift: int, axis: int) -> float:
        return float(np.abs(np.roll(result.volume.data, shift, axis) - expected)[inner].mean())

    assert error(0, 0) < 0.03  # a coarser grid blurs the edge
    for axis in range(3):
        assert error(0, axis) < min(error(1, axis), error(-1, axis))


@pytest.mark.parametrize(("target", "expected"), [("t1", (0, 100)), ("t2", (10, 210)), ("pd", (0, 1))])
def test_intensities_span_the_training_set_s_median_percentiles_of_the_target(target, expected):
    data = translator().translate(smooth_volume(), "t1", target).volume.data
    brightest = in_unit(smooth_volume(), translator()).max() - 0.05 * MODALITIES.index(target)  # Echo darkens t2, pd
    low, high = expected
    assert (data.min(), data.max()) == pytest.approx((low, low + brightest * (high - low)), rel=1e-4, abs=1e-4)
    unit = translator().translate(smooth_volume(), "t1", target, intensity="unit").volume.data
    assert unit.min() >= 0
    assert unit.max() <= 1


def test_the_scale_of_the_input_does_not_matter():
    volume = smooth_volume()
    once = translator().translate(volume, "t1", "t2").volume.data
    again = translator().translate(Volume(volume.data * 37 + 5, volume.affine), "t1", "t2").volume.data
    np.testing.assert_allclose(again, once, atol=0.05)


def test_translate_each_gives_what_translate_gives():
    volume = smooth_volume()
    model = translator()
    for target, result in zip(MODALITIES, model.translate_each(volume, "t2", MODALITIES), strict=True):
        np.testing.assert_array_equal(result.volume.data, model.translate(volume, "t2", target).volume.data)


def test_several_samples_give_mean_and_spread_and_the_seed_decides():
    volume, model = smooth_volume(), translator()
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (32, 32, 32)).astype(np.float32)
    made = model.translate_encoded(model.encode(x), "t1", "t1", sampling=model.sampling(num_samples=50), seed=3)
    assert np.abs(made.mean - x).mean() < 0.01 / np.sqrt(50)
    assert made.spread is not None
    assert made.spread.mean() == pytest.approx(0.01, rel=0.05)
    result = model.translate(volume, "t1", "t2", num_samples=3, seed=1)
    same = model.translate(volume, "t1", "t2", num_samples=3, seed=1)
    other = model.translate(volume, "t1", "t2", num_samples=3, seed=2)
    np.testing.assert_array_equal(result.volume.data, same.volume.data)
    np.testing.assert_array_equal(result.spread, same.spread)
    assert (result.volume.data != other.volume.data).any()
    assert result.spread.shape == volume.data.shape
    assert 0.1 < result.spread[10:20, 10:20, 10:20].mean() < 3  # 0.01 in [-1, 1] is 1 of t2's 200


def test_one_sample_has_no_spread():
    assert translator().translate(smooth_volume(), "t1", "t2").spread is None


def test_the_spread_of_samples_is_never_called_uncertainty():
    assert translator().translate(smooth_volume(), "t1", "t2", num_samples=2).uncertainty is None


def test_steps_are_counted_over_all_samples_and_may_cancel():
    seen: list[tuple[int, int]] = []
    model = translator()
    x = np.zeros((32, 32, 32), np.float32)
    code = model.encode(x)
    model.translate_encoded(
        code,
        "t1",
        "t2",
        sampling=model.sampling(num_samples=2, num_inference_steps=3),
        on_step=lambda *s: seen.append(s),
    )
    assert seen == [(i, 6) for i in range(1, 7)]

    def cancel(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.translate_encoded(code, "t1", "t2", on_step=cancel)


def test_provenance_says_what_was_done_and_is_json():
    made = translator().translate(smooth_volume(), "t1", "t2", sampler="ddim", num_inference_steps=4, seed=9).provenance
    assert json.loads(json.dumps(made)) == made
    wanted = {"synthetic": True, "model_hash": "abc", "sampler": "ddim", "num_inference_steps": 4, "seed": 9}
    wanted |= {"source": "t1", "target": "t2", "intensity": "median", "intensity_range": [10.0, 210.0]}
    assert wanted.items() <= made.items()


@pytest.mark.parametrize(
    ("objective", "asked", "expected"),
    [
        ("v", {}, ("ddim", 5, 1, 0.0)),
        ("v", {"sampler": "dpm-solver++"}, ("dpm-solver++", 10, 1, 0.0)),
        ("v", {"sampler": "ddpm"}, ("ddpm", 100, 1, 0.0)),
        ("v", {"num_inference_steps": 7, "eta": 0.5}, ("ddim", 7, 1, 0.5)),
        ("x0", {"sampler": "one-step"}, ("one-step", 1, 1, 0.0)),
        ("v", {"num_samples": 3}, ("ddim", 5, 3, 0.0)),
        ("regression", {}, ("one-step", 1, 1, 0.0)),
        ("regression", {"sampler": "bridge"}, ("one-step", 1, 1, 0.0)),  # what it was called
    ],
)
def test_what_is_not_said_about_sampling_is_filled_in(objective, asked, expected):
    chosen = translator(objective).sampling(**asked)
    assert (chosen.sampler, chosen.num_inference_steps, chosen.num_samples, chosen.eta) == expected


@pytest.mark.parametrize(
    ("objective", "kind", "asked", "words"),
    [
        ("v", "aldm", {"sampler": "one-step"}, "dpm-solver"),
        ("v", "aldm", {"sampler": "euler"}, "not a sampler"),
        ("v", "aldm", {"num_inference_steps": 0}, "num_inference_steps"),
        ("v", "aldm", {"num_samples": 0}, "num_samples"),
        ("regression", "aldm", {"sampler": "bridge", "num_inference_steps": 4}, "num_inference_steps"),
        ("regression", "aldm", {"num_samples": 2}, "one answer"),
        ("v", "unet", {"sampler": "ddim"}, "no sampler"),
        ("v", "unet", {"num_samples": 2}, "one answer"),
    ],
)
def test_sampling_that_cannot_work_is_refused(objective, kind, asked, words):
    with pytest.raises(UserError, match=words):
        translator(objective, kind).sampling(**asked)


def test_unknown_modalities_and_intensities_and_shapes_are_refused():
    volume, model = smooth_volume(), translator()
    with pytest.raises(UserError, match=r"'flair'.*t1, t2, pd"):
        model.translate(volume, "flair", "t1")
    with pytest.raises(UserError, match="'t3'"):
        model.translate(volume, "t1", "t3")
    with pytest.raises(UserError, match="median, unit"):
        model.translate(volume, "t1", "t2", intensity="percent")
    with pytest.raises(UserError, match=r"\(32, 32, 32\)"):
        model.encode(crop_or_pad(volume, (0, 0, 0), (16, 16, 16), 0).data)


def test_a_memory_limit_that_preparing_the_volume_would_break_is_refused():
    model, volume = translator(), smooth_volume((64, 64, 64))
    model.predictor.limit = MemoryLimit(10**6)
    with pytest.raises(UserError, match=r"262,144 voxels.*at least"):
        model.translate(volume, "t1", "t2")
    model.predictor.limit = MemoryLimit(resident_bytes() + 2**30)
    assert model.translate(volume, "t1", "t2").volume.data.shape == (64, 64, 64)


# ------------------------------------------------------------------------------------------------------- several boxes


def head_and_neck(affine) -> Volume:
    """A head of 150 x 180 x 170 mm on a neck that goes on to the end of the field of view; dark outside, not zero."""
    shape = (96, 100, 128)
    index = np.indices(shape).reshape(3, -1)
    x, y, z = affine[:3, :3] @ index + affine[:3, 3:]
    skull = np.sqrt((x / 75) ** 2 + (y / 90) ** 2 + ((z - 40) / 85) ** 2)
    neck = np.sqrt((x / 45) ** 2 + ((y + 10) / 50) ** 2) + np.where(z < 0, 0, 9)
    inside = 1 / (1 + np.exp(np.clip(40 * (np.minimum(skull, neck) - 1), -50, 50)))
    data = 3 + inside * (90 + 20 * np.sin(x / 11) * np.cos(y / 13) + 10 * np.sin(z / 9))
    return Volume(data.reshape(shape).astype(np.float32), affine)


def placed(turn=None, spacing=2.5) -> np.ndarray:
    """The affine of head_and_neck's grid, whose middle is the origin."""
    affine = np.eye(4)
    affine[:3, :3] = spacing * (np.eye(3) if turn is None else turn)
    affine[:3, 3] = -affine[:3, :3] @ ((np.array((96, 100, 128)) - 1) / 2)
    return affine


TILTED = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1]]) @ np.array(
    [[1, 0, 0], [0, 0.96, 0.28], [0, -0.28, 0.96]]
)


@pytest.mark.parametrize("turn", [pytest.param(None, id="straight"), pytest.param(TILTED, id="oblique")])
def test_no_tissue_of_a_head_with_its_neck_is_lost(turn):
    volume = head_and_neck(placed(turn))
    model = translator(spacing_mm=(3.0, 3.0, 3.0), spatial_shape=(56, 72, 56))
    result = model.translate(volume, "t1", "t1", intensity="unit")
    assert result.provenance["num_boxes"] == model.count_boxes(volume) >= 2
    assert result.provenance["share_outside"] == 0
    foreground = volume.data > 50
    height = (volume.affine @ np.vstack([np.argwhere(foreground).T, np.ones(foreground.sum())]))[2]
    for part in (foreground, height > height.max() - 90):
        background = result.volume.data[foreground][part] if part.ndim == 1 else result.volume.data[part]
        assert (background <= 0.05).mean() < 0.005
    error = np.abs(result.volume.data - in_unit(volume, model))[foreground]
    assert error.mean() < 0.02, "one scale for all boxes"


def test_several_boxes_say_what_one_large_box_says():
    volume = smooth_volume()
    for options in ({}, {"num_samples": 4, "seed": 3}):
        one = translator().translate(volume, "t1", "t2", **options)
        many = translator(spatial_shape=(14, 28, 12)).translate(volume, "t1", "t2", **options)
        assert one.provenance["num_boxes"] == 1
        assert many.provenance["num_boxes"] > 3
        inside = find_foreground(volume).mask
        np.testing.assert_allclose(many.volume.data[inside], one.volume.data[inside], atol=5 if options else 1e-3)
    assert many.spread[inside].mean() == pytest.approx(one.spread[inside].mean(), rel=0.1)


class Blur(Echo):
    """A small convolutional network: it sees 2 voxels around, and nothing beyond its box."""

    def predict(self, code, sources, targets, sampling, generators, on_step):
        window = torch.tensor([1.0, 4, 6, 4, 1]) / 16
        kernel = (window[:, None, None] * window[:, None] * window)[None, None]
        return torch.nn.functional.conv3d(code + 1, kernel, padding=2) - 1.02


def test_two_boxes_are_as_good_as_one_large_box_for_a_convolutional_network():
    volume = head_and_neck(placed())

    def psnr_db(shape) -> tuple[int, float]:
        model = translator(spacing_mm=(3.0, 3.0, 3.0), spatial_shape=shape)
        model.predictor = Blur(model.config)
        result = model.translate(volume, "t1", "t1", intensity="unit")
        error = (result.volume.data - in_unit(volume, model))[volume.data > 50]
        return result.provenance["num_boxes"], -10 * np.log10(np.square(error).mean())

    (one, large), (two, boxes) = psnr_db((56, 72, 112)), psnr_db((56, 72, 64))
    assert (one, two) == (1, 2)
    assert boxes == pytest.approx(large, abs=0.1)


def networks_of_fresh_weights(shape) -> Translator:
    """The networks of the model that ships, as deep as it and narrower; voxel norms, 8 voxels to its coarsest step."""
    config = replace(
        small(),
        modalities=MODALITIES,
        preprocess=PreprocessConfig(spacing_mm=(2.0, 2.0, 2.0), spatial_shape=shape),
        unet=replace(small().unet, channels=(8, 8, 8)),
        precision="fp32",
    )
    statistics = {"mean": [0.0] * 8, "std": [1.0] * 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        predictor = build_predictor("aldm", config, {"latents": statistics})
        torch.nn.init.normal_(predictor.unet.out.conv.weight, std=0.1)
    return Translator(predictor, config, kind="aldm", median_percentiles=PERCENTILES, model_hash="abc")


def test_two_boxes_say_what_one_says_with_a_network_that_halves_its_grid():
    """Moved by less than a step of its coarsest grid it takes other voxels together, and says something else."""
    volume = smooth_volume((14, 12, 120))
    one, two = (networks_of_fresh_weights((16, 16, side)) for side in (128, 80))
    assert two.predictor.period == 8
    wanted, got = (model.translate(volume, "t1", "t2", intensity="unit") for model in (one, two))
    assert (wanted.provenance["num_boxes"], got.provenance["num_boxes"]) == (1, 2)
    inside = find_foreground(volume).mask
    assert wanted.volume.data[inside].std() > 0.1
    error = (got.volume.data - wanted.volume.data)[inside]
    assert np.sqrt(np.mean(error**2)) < 0.005


@torch.inference_mode()
def test_an_answer_moves_with_the_volume_by_the_networks_period():
    model = networks_of_fresh_weights((8, 8, 176))
    x = torch.rand((1, 1, 8, 8, 192), generator=torch.Generator().manual_seed(0)) * 2 - 1

    def answer(start: int) -> torch.Tensor:
        code = model.predictor.encode(x[..., start : start + 176])
        made = model.predictor.predict(code, [(0,)], [1], model.sampling(), [torch.Generator()], None)
        return made[..., 84 - start : 92 - start]  # the middle, which sees neither end

    for shift in (2, 4, 8):
        same = torch.allclose(answer(0), answer(shift), atol=1e-4)
        assert same == (shift == model.predictor.period)


def test_a_volume_that_one_box_holds_is_translated_as_model_input_and_put_back():
    volume, model = smooth_volume(), translator()
    (x,), record = prepare_volume(volume, model.config.preprocess)
    inside = np.argwhere(find_foreground(volume).mask)
    middle = (inside.min(axis=0) + inside.max(axis=0) + 1 - 32) / 2
    assert record.boxes == (tuple(np.floor(middle).astype(int)),)
    mean = model.translate_encoded(model.encode(x), "t1", "t2", seed=5).mean
    expected = restore(unscale(mean, *PERCENTILES["t2"]), record, volume, fill=PERCENTILES["t2"][0])
    result = model.translate(volume, "t1", "t2", seed=5)
    assert result.volume.data.tobytes() == expected.tobytes()


def test_steps_are_counted_over_all_boxes_and_may_cancel_between_them():
    model, volume = translator(spatial_shape=(16, 28, 26)), smooth_volume()
    assert model.count_boxes(volume) == 2
    seen: list[tuple[int, int]] = []
    model.translate(volume, "t1", "t2", num_inference_steps=3, on_step=lambda *s: seen.append(s))
    assert seen == [(i, 6) for i in range(1, 7)]

    def cancel(done: int, total: int) -> None:
        seen.append((done, total))
        if done > 3:
            raise KeyboardInterrupt

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        model.translate(volume, "t1", "t2", num_inference_steps=3, on_step=cancel)
    assert len(seen) == 4


def test_too_many_boxes_for_the_limits_are_refused():
    model, volume = translator(spatial_shape=(12, 12, 12)), smooth_volume()
    count = model.count_boxes(volume)
    with pytest.raises(UserError, match=rf"takes {count} boxes of the model's 12 x 12 x 12 voxels, the limit is 5"):
        model.prepare({"t1": volume}, max_boxes=5)
    assert len(model.prepare({"t1": volume}, max_boxes=count).codes) == count
    model.predictor.needed_bytes = lambda: 10**12
    model.predictor.limit = MemoryLimit(resident_bytes() + 2**30)
    with pytest.raises(UserError, match=rf"too little for the {count} boxes.*give at least 10\d\d"):
        model.translate(volume, "t1", "t2")


# -------------------------------------------------------------------------------------------------- translator folders


@pytest.mark.parametrize("kind", ["aldm", "unet"])
def test_a_folder_is_all_that_a_translator_needs(kind, tmp_path):
    model = Translator.load(save_untrained(tmp_path / "model", kind=kind))
    assert (model.kind, model.modalities) == (kind, ("t1", "t2", "pd"))
    assert model.median_percentiles["t2"] == (10.0, 210.0)
    assert not model.predictor.training
    x = np.random.default_rng(0).uniform(-1, 1, tiny().preprocess.spatial_shape).astype(np.float32)
    first = model.translate_encoded(model.encode(x), "t1", "t2").mean
    assert first.shape == x.shape
    assert first.dtype == np.float32
    assert np.abs(first).max() <= 1
    once_more = Translator.load(tmp_path / "model")
    again = once_more.translate_encoded(once_more.encode(x), "t1", "t2").mean
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latents": {}}, r"config\.json is damaged: it lacks latents\.mean; it lacks latents\.std"),
        ({"latents": {"mean": [0.0], "std": [1.0]}}, r"mean of the latents is \[0\.0\], wanted 4 numbers"),
        ({"data": {"median_percentiles": {"t1": [0, 1], "t2": [0]}}}, r"median_percentiles\.t2 is \[0\], wanted two"),
        ({"data": {"median_percentiles": {"t1": [0, 1]}}}, r"it lacks data\.median_percentiles\.t2"),
        ({"data": 3}, "data is 3, wanted a mapping"),
    ],
)
def test_a_folder_that_lacks_what_a_translator_needs_is_refused(tmp_path, change, words):
    folder = save_untrained(tmp_path / "model")
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"meta": record["meta"] | change}))
    with pytest.raises(UserError, match=words):
        Translator.load(folder)


def test_the_haar_codec_loses_nothing_even_in_bf16(tmp_path):
    config = replace(tiny(), codec=replace(tiny().codec, kind="haar"))
    model = Translator.load(save_untrained(tmp_path / "model", config=config, precision="bf16"))
    x = np.random.default_rng(0).uniform(-1, 1, config.preprocess.spatial_shape).astype(np.float32)
    np.testing.assert_allclose(model.reconstruct(x), x, atol=1e-5)


@pytest.mark.parametrize(
    ("codec", "quantizer"), [("vqgan", "codebook"), ("haar-vqgan", "codebook"), ("haar-vqgan", "fsq"), ("haar", "fsq")]
)
def test_a_memory_limit_does_not_change_the_result(codec, quantizer, tmp_path):
    config = replace(tiny(), codec=replace(tiny().codec, kind=codec, quantizer=quantizer))
    folder = save_untrained(tmp_path / "model", config=config)
    x = np.random.default_rng(0).uniform(-1, 1, config.preprocess.spatial_shape).astype(np.float32)
    whole, bounded = Translator.load(folder), Translator.load(folder, max_memory_gb=3.0, scratch_dir=tmp_path)
    codes = [model.encode(x) for model in (whole, bounded)]
    assert torch.allclose(*codes, atol=1e-5)
    results = [
        model.translate_encoded(code, "t1", "t2")[0] for model, code in zip((whole, bounded), codes, strict=True)
    ]
    np.testing.assert_allclose(*results, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_limit_below_what_the_model_needs_names_the_least(tmp_path):
    folder = save_untrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"give at least (\d+\.\d+)") as refusal:
        Translator.load(folder, max_memory_gb=0.1)
    least = float(re.search(r"at least (\d+\.\d+)", str(refusal.value)).group(1))
    model = Translator.load(folder, max_memory_gb=least + 0.05)
    x = np.zeros(tiny().preprocess.spatial_shape, np.float32)
    assert model.translate_encoded(model.encode(x), "t1", "t2")[0].shape == x.shape


def test_sampling_and_precision_can_be_chosen_when_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("aldm.precision._cpu_has_bf16", lambda: True)
    folder = save_untrained(tmp_path / "model")
    chosen = SamplingConfig(sampler="ddim", num_inference_steps=2, eta=0.5)
    model = Translator.load(folder, sampling=chosen, precision="bf16")
    assert model.sampling() == chosen
    assert model.config.precision == model.predictor.config.precision == "bf16"


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_each_of_a_batch_is_as_if_it_were_alone(tmp_path, sampler):
    model = Translator.load(save_untrained(tmp_path / "model", diffusion=DiffusionConfig(objective="v")))
    generator = np.random.default_rng(0)
    shape = model.config.preprocess.spatial_shape
    volumes = [generator.uniform(-1, 1, shape).astype(np.float32) for _ in range(3)]
    requests = [
        Request({source: model.encode(x)}, target, seed)
        for x, (source, target), seed in zip(
            volumes, (("t1", "t2"), ("t2", "t1"), ("t1", "t1")), (4, 0, 4), strict=True
        )
    ]
    sampling = model.sampling(sampler, 3, 2)
    together = model.translate_batch(requests, sampling=sampling)
    for request, made in zip(requests, together, strict=True):
        alone = model.translate_encoded(
            request.codes[request.source], request.source, request.target, sampling=sampling, seed=request.seed
        )
        np.testing.assert_allclose(made.mean, alone.mean, atol=2e-4)
        np.testing.assert_allclose(made.spread, alone.spread, atol=2e-4)
        assert alone.spread.std() > 0
