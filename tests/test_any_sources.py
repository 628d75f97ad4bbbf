"""Any subset of a subject's modalities as sources: what is drawn, what the start is, what a translator gives."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_all_targets import stage_of as stage_of_pairs
from untrained import save_untrained

from aldm.config import Config, DiffusionConfig
from aldm.data.dataset import LatentSubsets, collate
from aldm.data.overlap import check_one_place
from aldm.data.preprocess import prepare_subject, prepare_volumes
from aldm.data.volume import Volume
from aldm.denoising import build_denoiser, target_like_of_sources
from aldm.errors import UserError
from aldm.intensity_map_fit import fit_intensity_map
from aldm.latents import LatentStore
from aldm.models.intensity_map import IntensityMap, look_up
from aldm.presets import small, tiny
from aldm.randomness import derived_generator
from aldm.stages import DiffusionStage
from aldm.translate import Translator

ANY = replace(
    tiny(),
    diffusion=DiffusionConfig(objective="regression", all_targets=True, any_sources=True),
    sampling=replace(tiny().sampling, sampler="one-step", num_inference_steps=1),
)


@pytest.fixture(scope="module")
def latents(haar_latents: Path) -> LatentStore:
    return LatentStore.open(haar_latents)


def stage_of(latents: LatentStore, config: Config = ANY) -> DiffusionStage:
    stage = stage_of_pairs(latents, config)
    torch.nn.init.uniform_(stage._ms_spade.precision, 0.1, 1)
    return stage


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Translator:
    folder = tmp_path_factory.mktemp("any") / "model"
    save_untrained(folder, config=replace(ANY, codec=small().codec))
    translator = Translator.load(folder)
    torch.manual_seed(1)
    torch.nn.init.normal_(translator.predictor.unet.out.conv.weight, std=0.1)
    torch.nn.init.uniform_(translator.predictor.ms_spade.precision, 0.1, 1)
    return translator


def test_a_draw_splits_what_a_subject_has_into_sources_and_the_rest(latents: LatentStore) -> None:
    names = (*latents.modalities, "pd")  # which nobody has
    samples = LatentSubsets(latents, "train", names)
    sizes = []
    for draw in range(60):
        sample = samples.sample(0, torch.Generator().manual_seed(draw))
        sources = sample["sources"]
        assert sources == sorted(sources) == sample["given"].nonzero()[:, 0].tolist()
        assert (sample["given"] + sample["wanted"]).tolist() == [1, 1, 1, 1, 0]
        for m, z in enumerate(sample["z"].unflatten(0, (5, -1))):
            here = latents.latent(sample["subject_id"], names[m]) if m < 4 else np.zeros_like(z)
            np.testing.assert_array_equal(z, here)
        sizes.append(len(sources))
    assert set(sizes) == {1, 2, 3}
    assert 20 <= sizes.count(1) <= 40


def test_the_start_is_the_weighted_mean_of_what_each_source_says() -> None:
    precision = torch.rand(4, 4) + 0.1
    z = [torch.randn(1, 2, 3, 3, 3) for _ in range(4)]
    made = {(s, t): torch.randn(1, 2, 3, 3, 3) for s in range(4) for t in range(4)}
    for sources in ([0], [3], [0, 2], [1, 2, 3]):
        given = [one if m in sources else None for m, one in enumerate(z)]
        found = target_like_of_sources(given, lambda s, t: made[s, t], precision).chunk(4, dim=1)
        for target in range(4):
            if target in sources:
                assert found[target] is z[target] or torch.equal(found[target], z[target])
                continue
            total = sum(float(precision[s, target]) for s in sources)
            wanted = sum(float(precision[s, target]) / total * made[s, target] for s in sources)
            torch.testing.assert_close(found[target], wanted)
            if len(sources) == 1:
                assert torch.equal(found[target], made[sources[0], target])


def test_the_squared_error_of_an_intensity_map_is_that_of_its_table(latents: LatentStore) -> None:
    module = IntensityMap(8, 4, 1)
    errors = fit_intensity_map(module, latents, latents.modalities)
    squares, count = 0.0, 0
    for subject in latents.subjects("train"):
        volumes = [
            module.inverse(
                torch.from_numpy(latents.latent(subject.subject_id, name))[None] * module.std.view(1, -1, 1, 1, 1)
                + module.mean.view(1, -1, 1, 1, 1)
            )
            for name in latents.modalities
        ]
        tissue = volumes[0] >= -1 + 1 / 256
        guess = look_up(volumes[0], module.tables[0, 2])[tissue]
        squares += float((guess - volumes[2][tissue]).square().sum())
        count += int(tissue.sum())
    assert errors.shape == (4, 4)
    assert not errors.diagonal().any()
    assert errors[0, 2] == pytest.approx(squares / count, rel=0.02)  # the table is read with interpolation


def test_what_is_given_comes_back_as_it_is_and_the_rest_depends_on_what_is_given() -> None:
    config = replace(ANY, modalities=("t1", "t2", "pd"))
    unet = build_denoiser(config, 2)
    for weights in unet.parameters():  # the blocks start without a word of the embedding
        torch.nn.init.normal_(weights, std=0.2)
    like = torch.randn(1, 6, 4, 4, 4)
    one, two = torch.tensor([[1.0, 0, 0]]), torch.tensor([[1.0, 1, 0]])
    of_one, of_two = (unet.refine_missing(z_target_like=like, given=given) for given in (one, two))
    assert torch.equal(of_one[:, :2], like[:, :2])
    assert torch.equal(of_two[:, :4], like[:, :4])
    assert not torch.equal(of_one[:, 2:4], like[:, 2:4])
    assert not torch.allclose(of_one[:, 4:], of_two[:, 4:])


def test_the_loss_is_the_mean_of_what_is_missing(latents: LatentStore) -> None:
    stage = stage_of(latents)
    samples = stage.samples("train")
    batch = collate([samples.sample(i, derived_generator(3, i)) for i in range(2)])
    loss, _ = stage.players[0].loss(stage.unet, batch, None)  # type: ignore[arg-type]
    squares = []
    with torch.no_grad():
        for b in range(2):
            z = batch["z"][b].unflatten(0, (4, -1))[:, None]
            sources = batch["sources"][b]
            like = [
                z[t]
                if t in sources
                else sum(
                    stage._ms_spade(z[s], torch.tensor([t]), torch.tensor([s])).half().float()
                    * float(stage._ms_spade.precision[s, t])
                    for s in sources
                )
                / sum(float(stage._ms_spade.precision[s, t]) for s in sources)
                for t in range(4)
            ]
            given = batch["given"][b : b + 1]
            found = stage.unet.refine_missing(z_target_like=torch.cat(like, dim=1), given=given).chunk(4, dim=1)
            squares += [(found[t] - z[t]).square().mean() for t in range(4) if t not in sources]
    torch.testing.assert_close(loss, torch.stack(squares).mean(), rtol=1e-4, atol=1e-5)


def head(seed: int) -> Volume:
    generator = np.random.default_rng(seed)
    places = np.linalg.norm(np.indices((20, 26, 20)) - np.array([[[[9.5]]], [[[12.5]]], [[[9.5]]]]), axis=0)
    tissue = 100 + 20 * seed + 30 * generator.random((20, 26, 20))
    return Volume(np.where(places < 8, tissue, 0).astype(np.float32), np.diag([8.0, 8.0, 8.0, 1.0]))


def test_the_order_of_the_sources_does_not_matter_to_the_bit(model: Translator) -> None:
    t1, t2 = head(0), head(1)
    t2.data[:, :10] = 0  # another constant background, which a masked volume's result has too
    one = model.translate(t1, "t1", "pd", others={"t2": t2})
    other = model.translate(t2, "t2", "pd", others={"t1": t1})
    assert one.volume.data.tobytes() == other.volume.data.tobytes()
    assert one.provenance == other.provenance
    assert one.provenance["source"] == "t1+t2"
    for alone in (model.translate(t1, "t1", "pd"), model.translate(t2, "t2", "pd")):
        assert not np.allclose(alone.volume.data, one.volume.data)


def test_one_source_is_what_it_is_without_others_to_the_bit(model: Translator) -> None:
    t1 = head(0)
    alone = model.translate(t1, "t1", "pd")
    assert alone.volume.data.tobytes() == model.translate(t1, "t1", "pd", others={}).volume.data.tobytes()
    boxes, record = prepare_volumes([t1], model.config.preprocess, stride=model.predictor.stride)
    mean = model.translate_encoded(model.encode(boxes[0][0]), "t1", "pd").mean
    (code,) = model.prepare({"t1": t1}).codes
    assert torch.equal(code["t1"], model.encode(boxes[0][0]))
    assert len(record.boxes) == 1
    assert np.isfinite(mean).all()


def test_sources_are_prepared_as_a_store_prepares_a_subject() -> None:
    config = replace(tiny().preprocess, spatial_shape=(24, 32, 24))
    volumes = {"t1": head(0), "t2": head(1)}
    arrays, record = prepare_volumes(list(volumes.values()), config)
    subject = prepare_subject(volumes, config)
    (start,) = record.boxes
    for boxes, name in zip(arrays, volumes, strict=True):
        whole = subject.volumes[name]
        low = [max(0, -s) for s in start]
        inside = boxes[0][tuple(slice(o, o + n) for o, n in zip(low, whole.shape, strict=True))]
        np.testing.assert_array_equal(inside, whole[tuple(slice(max(0, s), None) for s in start)])


def test_a_source_on_another_grid_is_brought_to_the_first_one(model: Translator) -> None:
    t1, t2 = head(0), head(1)
    moved = Volume(t2.data[2:, 1:], t2.affine @ np.array([[1, 0, 0, 2], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1.0]]))
    whole, cut = (model.translate(t1, "t1", "pd", others={"t2": one}) for one in (t2, moved))
    assert cut.volume.data.shape == t1.data.shape
    np.testing.assert_allclose(cut.volume.data, whole.volume.data, atol=1e-4)


@pytest.mark.parametrize(
    ("sources", "target", "words"),
    [
        (("t1", "t2"), "t2", "the target t2 is among the sources t1 and t2"),
        (("t1", "flair"), "t2", "`source` is 'flair', wanted one of: t1, t2, pd"),
    ],
)
def test_what_cannot_be_made_is_refused(model: Translator, sources: tuple[str, ...], target: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.check_sources(sources, target)


def test_volumes_that_cannot_be_of_two_modalities_of_one_head_are_refused(model: Translator) -> None:
    t1, t2 = head(0), head(1)
    with pytest.raises(UserError, match="t1 and t2 have the same voxels"):
        model.translate(t1, "t1", "pd", others={"t2": Volume(t1.data.copy(), t2.affine)})
    for millimetres, refused in ((96, False), (120, True)):
        affine = t2.affine.copy()
        affine[0, 3] += millimetres  # of 160 that each covers
        words = "t2 lies elsewhere than t1: 25% of the smaller field of view is in both, wanted 33%"
        with pytest.raises(UserError, match=words) if refused else nullcontext():
            check_one_place({"t1": t1, "t2": Volume(t2.data, affine)})


def test_a_model_of_pairs_refuses_two_sources(tmp_path: Path) -> None:
    model = Translator.load(save_untrained(tmp_path / "model"))
    with pytest.raises(UserError, match="this aldm model takes one source, got t1 and t2: give one, or a model that"):
        model.translate(head(0), "t1", "pd", others={"t2": head(1)})


def test_any_sources_needs_all_targets() -> None:
    with pytest.raises(UserError, match=r"any_sources needs diffusion\.all_targets and the objective regression"):
        DiffusionConfig(objective="regression", any_sources=True)


def test_one_pair_has_no_subsets(latents: LatentStore) -> None:
    with pytest.raises(UserError, match="learns from subsets of all modalities: leave `source` and `target` out"):
        stage_of(latents, replace(ANY, pair=("t1", "t2")))


def test_a_batch_of_different_sources_gives_each_its_own(model: Translator) -> None:
    sampling, z = model.config.sampling, [torch.randn(1, 8, 8, 12, 8) for _ in range(3)]
    sets = [{0: z[0]}, {0: z[0], 2: z[2]}]
    codes = [model.predictor.join(one) for one in sets]
    sources = [tuple(one) for one in sets]
    both = model.predictor.predict(torch.cat(codes), sources, [1, 1], sampling, [], None)
    for i in range(2):
        alone = model.predictor.predict(codes[i], sources[i : i + 1], [1], sampling, [], None)
        torch.testing.assert_close(both[i : i + 1], alone, atol=1e-4, rtol=0)
