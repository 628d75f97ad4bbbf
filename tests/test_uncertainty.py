"""How far off a translation may be: what is learnt, and the factor that makes it an interval."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from jobs import refused, run
from untrained import save_untrained

from aldm.calibration import LESION_LEVEL, LEVEL, STANDARD_DEVIATIONS, RatioCounts
from aldm.checkpoint import load_checkpoint, save_checkpoint
from aldm.config import DiffusionConfig
from aldm.data.store import VolumeStore
from aldm.data.volume import Volume
from aldm.data.volume_subsets import VolumeSubsets
from aldm.denoising import build_error_unet
from aldm.errors import UserError
from aldm.metrics import Truth
from aldm.models.error_unet import ErrorUNet
from aldm.presets import tiny
from aldm.provenance import describe_map
from aldm.sampling_choice import choose_sampling
from aldm.subsets import subsets_of
from aldm.translate import Translator
from aldm.translation import Request
from aldm.uncertainty import (
    FrozenModel,
    UncertaintyStage,
    calibrate,
    negative_log_likelihood,
    translations_of,
    voxel_weights,
)

BRATS = ("t1", "t1ce", "t2", "flair")
ANY = replace(
    tiny(),
    diffusion=DiffusionConfig(objective="regression", all_targets=True, any_sources=True),
    sampling=replace(tiny().sampling, sampler="one-step", num_inference_steps=1),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of any sources with fresh weights: as wrong as can be, which is all that is needed."""
    return save_untrained(tmp_path_factory.mktemp("model") / "model", config=ANY, modalities=BRATS)


@pytest.fixture(scope="module")
def trained(model: Path, brats_store: VolumeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short training on its errors."""
    folder = tmp_path_factory.mktemp("run") / "uncertainty"
    flags = ("--preset", "tiny", "--store", brats_store.path, "--model", model, "--engine", "plain", "--max-steps", 6)
    assert run("train", "uncertainty", *flags, "--run-dir", folder) == 0
    return folder


@pytest.fixture(scope="module")
def calibrated(model: Path, trained: Path, brats_store: VolumeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    words = ("--model", model, "--uncertainty", trained, "--store", brats_store.path, "--out", folder)
    assert run("export", *words) == 0
    return folder


def test_the_loss_is_least_at_the_standard_deviation() -> None:
    error = torch.from_numpy(np.random.default_rng(0).normal(0, 0.3, 20_000))
    sizes = torch.linspace(0.1, 0.6, 51, dtype=torch.float64)
    losses = [float(negative_log_likelihood(error, size.log().expand_as(error)).mean()) for size in sizes]
    assert float(sizes[int(np.argmin(losses))]) == pytest.approx(float(error.square().mean().sqrt()), abs=0.0051)


def test_a_lesion_weighs_three_times_as_much_as_the_mask() -> None:
    mask, lesion = torch.zeros(3, 1, 10, 10, 10, dtype=torch.bool), torch.zeros(3, 1, 10, 10, 10, dtype=torch.bool)
    mask[:, :, 2:8, 2:8, 2:8] = True  # 216 voxels
    lesion[0, :, 3:5, 3:5, 3:5], lesion[1, :, 3, 3, 3] = True, True
    weights = voxel_weights(mask, lesion)
    extra = [float((weights[i] - torch.where(mask[i], 1.0, 0.05)).sum()) for i in range(3)]
    assert extra == pytest.approx([3 * 216, 150, 0], rel=1e-6)


@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_the_factor_is_the_quantile_of_error_by_size(level: float) -> None:
    rng = np.random.default_rng(0)
    error, size = rng.exponential(0.1, 10_000), rng.uniform(0.01, 1, 10_000)
    error[:50] = 0  # as good as can be
    counts = RatioCounts()
    for part in range(4):
        counts.add(error[part::4], size[part::4])
    assert counts.quantile(level) == pytest.approx(np.quantile(error / size, level), rel=5e-3)


def test_a_lesion_is_held_at_least_four_times_in_five() -> None:
    rng = np.random.default_rng(0)
    error, size = rng.exponential(0.1, 10_000), np.full(10_000, 0.1)
    counts, none, mild, bad = RatioCounts(), RatioCounts(), RatioCounts(), RatioCounts()
    counts.add(error, size)
    mild.add(error[:500], size[:500])
    bad.add(5 * error[:500], size[:500])
    assert counts.factor(none) == counts.factor(mild) == counts.quantile(LEVEL)
    assert counts.factor(bad) == pytest.approx(np.quantile(5 * error[:500] / 0.1, 0.8), rel=5e-3)


def test_coverage_and_ratio_are_those_of_the_voxels_of_a_region() -> None:
    rng = np.random.default_rng(0)
    truth, image, half = rng.random((8, 9, 10)), rng.random((8, 9, 10)), rng.uniform(0.1, 0.6, (8, 9, 10))
    mask = rng.random((8, 9, 10)) < 0.3
    scores = Truth(truth, {"volume": None, "part": mask}).score(image, half)
    for name, where in (("volume", np.ones_like(mask)), ("part", mask)):
        error = abs(truth - image)[where]
        assert scores[name].coverage == pytest.approx(sum(error <= half[where]) / len(error))
        wanted = np.sqrt(np.mean(error**2)) / (np.sqrt(np.mean(half[where] ** 2)) / STANDARD_DEVIATIONS)
        assert scores[name].error_ratio == pytest.approx(wanted)
    assert np.isnan(Truth(truth, {"volume": None}).score(image)["volume"].coverage)


def network() -> ErrorUNet:
    module = build_error_unet(replace(tiny(), modalities=BRATS))
    torch.nn.init.normal_(module.out.conv.weight, std=0.1)
    return module


def test_what_is_not_given_is_not_seen() -> None:
    module, x = network(), torch.randn(1, 1, 16, 16, 16)
    volumes, given, target = torch.randn(1, 4, 16, 16, 16), torch.tensor([[1.0, 0, 1, 0]]), torch.tensor([1])
    said = module(x, volumes, given, target)
    other = torch.where(given[:, :, None, None, None] > 0, volumes, torch.randn_like(volumes))
    assert torch.equal(module(x, other, given, target), said)
    assert not torch.equal(module(x, volumes + 0.1, given, target), said)
    assert not torch.equal(module(x, volumes, given, torch.tensor([3])), said)


def test_a_draw_gives_some_and_wants_another(brats_store: VolumeStore) -> None:
    samples = VolumeSubsets(brats_store, "train", (*BRATS, "pd"), lambda source, target: True, True)
    numbers = []
    for draw in range(60):
        sample = samples.sample(0, torch.Generator().manual_seed(draw))
        given, target = sample["given"], sample["target"]
        assert given[target] == 0
        assert given[4] == 0 != target - 4
        subject = sample["subject_id"]
        for m in [*given.nonzero()[:, 0].tolist(), target]:
            np.testing.assert_array_equal(sample["volumes"][m], brats_store.volume(subject, BRATS[m]))
        np.testing.assert_array_equal(sample["mask"][0], brats_store.mask(subject))
        np.testing.assert_array_equal(sample["lesion"][0], brats_store.seg(subject) > 0)
        numbers.append(int(given.sum()))
    assert set(numbers) == {1, 2, 3}
    pairs = VolumeSubsets(
        brats_store, "train", BRATS, lambda source, target: (source, target) == ("t2", "flair"), False
    )
    sample = pairs.sample(0, torch.Generator())
    assert sample["given"].tolist() == [0, 0, 1, 0]
    assert sample["target"] == 3


def test_the_interval_covers_its_share_of_the_subjects_that_it_was_fitted_on(
    calibrated: Path, brats_store: VolumeStore
) -> None:
    translator = Translator.load(calibrated)
    within, lesions = (defaultdict(lambda: np.zeros(2)) for _ in range(2))
    wanted = []
    for subject in brats_store.subjects("validation"):
        mask, labels = brats_store.mask(subject.subject_id), brats_store.seg(subject.subject_id)
        assert labels is not None
        for request, truth in translations_of(translator, brats_store, subject):
            ((mean, spread, half),) = translator.translate_batch([request])
            assert spread is None
            assert half is not None
            wanted.append((tuple(request.codes), request.target))
            held = abs(mean - truth) <= half
            within[request.target, len(request.codes)] += held[mask].sum(), mask.sum()
            lesions[request.target, len(request.codes)] += held[labels > 0].sum(), (labels > 0).sum()
    assert sorted(wanted) == sorted((s, t) for s in subsets_of(BRATS) for t in set(BRATS) - set(s))
    assert set(within) == {(name, number) for name in BRATS for number in (1, 2, 3)}
    for key, (inside, total) in within.items():
        shares = inside / total - LEVEL, lesions[key][0] / lesions[key][1] - LESION_LEVEL
        assert min(shares) == pytest.approx(0, abs=3e-3)  # the one that asks for more is met exactly


def test_the_interval_does_not_change_the_translation(model: Path, calibrated: Path, brats_store: VolumeStore) -> None:
    x = brats_store.volume(brats_store.subjects("test")[0].subject_id, "t1")
    before, after = Translator.load(model), Translator.load(calibrated)
    made, same = (one.translate_encoded(one.encode(x), "t1", "flair") for one in (before, after))
    np.testing.assert_array_equal(made.mean, same.mean)
    assert made.half_width is None
    assert same.half_width is not None
    assert (same.half_width > 0).all()


def test_the_map_is_in_the_results_units_and_says_its_level(calibrated: Path, brats_store: VolumeStore) -> None:
    x = brats_store.volume(brats_store.subjects("test")[0].subject_id, "t1")
    volume = Volume((x + 1) * 50, np.diag([8.0, 8, 8, 1]))
    translator = Translator.load(calibrated)
    unit, median = (translator.translate(volume, "t1", "t2", intensity=name) for name in ("unit", "median"))
    assert unit.provenance["uncertainty_level"] == LEVEL
    np.testing.assert_allclose(median.uncertainty, 200 * unit.uncertainty, rtol=1e-5)  # t2's percentiles are 10 and 210
    assert unit.spread is None


def test_the_header_of_a_map_still_says_which_model_made_it() -> None:
    made = {"source": "t1+t1ce+t2+flair", "target": "pd", "model_kind": "aldm", "model_hash": "0123456789"}
    made |= {"uncertainty_level": LEVEL, "sampler": "one-step", "num_inference_steps": 1, "seed": 0}
    words = describe_map("uncertainty", made)[:79]  # all that a NIfTI header holds
    assert words.startswith("uncertainty (90% within +-): synthetic pd from t1+t1ce+t2+flair")
    assert "aldm 01234567" in words


def test_a_model_sampled_otherwise_has_no_interval(brats_store: VolumeStore, tmp_path: Path) -> None:
    translator = Translator.load(save_untrained(tmp_path / "model", modalities=BRATS))
    error_unet = network()
    calibration = calibrate(translator, error_unet, brats_store)
    translator.predictor.error_unet, translator.calibration = error_unet, calibration
    code = translator.encode(brats_store.volume(brats_store.subjects("test")[0].subject_id, "t1"))
    own = translator.translate_encoded(code, "t1", "t2")
    other = translator.translate_encoded(code, "t1", "t2", sampling=translator.sampling(num_samples=2))
    assert own.half_width is not None
    assert other.half_width is None
    assert other.spread is not None


def test_the_frozen_model_is_asked_as_a_user_asks_it(model: Path, brats_store: VolumeStore) -> None:
    translator = Translator.load(model)
    stage = UncertaintyStage(tiny(), brats_store, FrozenModel(translator))
    sample = stage.samples("train").sample(0, torch.Generator().manual_seed(5))
    batch = {name: value[None] for name, value in sample.items() if isinstance(value, torch.Tensor)}
    batch["target"] = torch.tensor([sample["target"]])
    made, _ = FrozenModel(translator).predict(batch, [torch.Generator()])
    sources = [BRATS[m] for m in sample["given"].nonzero()[:, 0].tolist()]
    volumes = {name: Volume(brats_store.volume(sample["subject_id"], name), np.eye(4)) for name in sources}
    codes = {name: translator.encode(volume.data) for name, volume in volumes.items()}
    (wanted,) = translator.translate_batch([Request(codes, BRATS[sample["target"]], 0)])
    np.testing.assert_array_equal(made[0, 0], wanted.mean)
    assert choose_sampling(translator.config, "aldm") == translator.sampling()


def test_the_network_is_shown_in_training_what_it_is_shown_in_use(model: Path, brats_store: VolumeStore) -> None:
    translator = Translator.load(model)  # whose codec is lossy
    stage = UncertaintyStage(tiny(), brats_store, FrozenModel(translator))
    translator.predictor.error_unet = network()
    sample = stage.samples("train").sample(0, torch.Generator().manual_seed(5))
    batch = {name: value[None] for name, value in sample.items() if isinstance(value, torch.Tensor)}
    batch["target"] = torch.tensor([sample["target"]])
    with torch.no_grad():
        error, log_size = stage._error_and_size(translator.predictor.error_unet, batch, [torch.Generator()])
    codes = {m: translator.encode(sample["volumes"][m].numpy()) for m in sample["given"].nonzero()[:, 0].tolist()}
    prediction = error + sample["volumes"][sample["target"]]
    said = translator.predictor.error_size(prediction, [codes], [sample["target"]])
    torch.testing.assert_close(log_size.exp(), said, rtol=1e-3, atol=1e-5)


def learnt(folder: Path, model: Path, channels: tuple[int, ...]) -> Path:
    """Write what a training of no step leaves: a network of other widths, and whose errors it knows."""
    checkpoint = load_checkpoint(model, "aldm")
    config = replace(checkpoint.config, error_unet=replace(checkpoint.config.error_unet, channels=channels))
    meta = {"training": {"stage": "uncertainty", "step": 0, "validation": {}}, "model_hash": checkpoint.hash}
    weights = build_error_unet(config).state_dict()
    save_checkpoint(folder, kind="uncertainty", config=config, weights=weights, meta=meta)
    return folder


def test_the_interval_is_that_of_the_sampling_that_is_exported_and_of_no_other(
    brats_store: VolumeStore, tmp_path: Path
) -> None:
    before = save_untrained(tmp_path / "first", modalities=BRATS)
    for steps, channels in ((2, (8, 8, 8)), (1, (8, 8))):  # the second network takes the place of the first
        checkpoint = learnt(tmp_path / f"learnt-{steps}", before, channels)
        words = ("--model", before, "--uncertainty", checkpoint, "--store", brats_store.path)
        before = tmp_path / f"model-{steps}"
        assert run("export", *words, "--set", f"sampling.num_inference_steps={steps}", "--out", before) == 0
    own = Translator.load(before)
    assert own.has_uncertainty(own.sampling())
    assert own.sampling().num_inference_steps == 1
    error_unet, calibration = own.predictor.error_unet, own.calibration
    assert isinstance(error_unet, ErrorUNet)
    assert calibration == calibrate(own, error_unet, brats_store)
    other = Translator.load(before, sampling=replace(own.sampling(), num_inference_steps=3))
    assert not other.has_uncertainty(other.sampling())


def test_a_run_on_another_model_is_refused(
    trained: Path, brats_store: VolumeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_untrained(tmp_path / "other", modalities=BRATS)
    words = ("--model", other, "--uncertainty", trained, "--store", brats_store.path, "--out", tmp_path / "out")
    assert "train uncertainty again" in refused(capsys, "export", *words)
    assert "got --baseline with --model" in refused(capsys, "export", *words, "--baseline", trained)
    assert not (tmp_path / "out").exists()


def test_a_store_of_another_grid_is_refused(
    model: Path, brats_store: VolumeStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(ANY, preprocess=replace(ANY.preprocess, spacing_mm=(4.0, 4.0, 4.0)))
    folder = save_untrained(tmp_path / "other", config=other, modalities=BRATS)
    words = ("--preset", "tiny", "--store", brats_store.path, "--model", folder, "--run-dir", tmp_path / "run")
    assert "prepare the data with the model's preprocessing" in refused(capsys, "train", "uncertainty", *words)


@pytest.mark.parametrize(
    "damage",
    [
        {"factors": {"t1": [0.0]}},
        {"factors": {"t1": []}},
        {"factors": {"t1": 1.0}},
        {"factors": {"pd": [1.0]}},
        {"factors": 3},
        {"level": 1.5},
        {"level": None},
    ],
)
def test_a_damaged_calibration_is_said_so(damage: dict, calibrated: Path, tmp_path: Path) -> None:
    folder = Path(copytree(calibrated, tmp_path / "model"))
    record = json.loads((folder / "config.json").read_text())
    record["meta"]["uncertainty"] |= damage
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="damaged"):
        Translator.load(folder)
