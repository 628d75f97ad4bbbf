"""All targets of a source in one evaluation: what is drawn, what the loss counts, what a translator gives."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from untrained import save_untrained

from aldm.config import Config, DiffusionConfig
from aldm.data.dataset import LatentTargets, collate
from aldm.denoising import build_denoiser, of_target
from aldm.latents import LatentStore
from aldm.presets import small, tiny
from aldm.randomness import derived_generator
from aldm.stages import DiffusionStage, MSSpadeStage
from aldm.training import PlainEngine
from aldm.translate import Translator

TOGETHER = replace(
    tiny(),
    diffusion=DiffusionConfig(objective="regression", all_targets=True),
    sampling=replace(tiny().sampling, sampler="one-step", num_inference_steps=1),
)


@pytest.fixture(scope="module")
def latents(haar_latents: Path) -> LatentStore:
    return LatentStore.open(haar_latents)


def stage_of(latents: LatentStore, config: Config = TOGETHER) -> DiffusionStage:
    torch.manual_seed(0)
    ms_spade = MSSpadeStage(config, latents).ms_spade
    stage = DiffusionStage(config, latents, ms_spade, "0" * 64)
    torch.nn.init.normal_(stage.unet.out.conv.weight, std=0.05)
    engine = PlainEngine()
    for player in stage.players:
        engine.prepare(player)
    stage.connect(engine)
    return stage


def test_a_sample_holds_the_source_and_every_other_modality_of_its_subject(latents: LatentStore) -> None:
    names = (*latents.modalities, "pd")  # which nobody has
    samples = LatentTargets(latents, "train", names)
    seen = set()
    for draw in range(20):
        sample = samples.sample(0, torch.Generator().manual_seed(draw))
        source, subject_id = sample["source"], sample["subject_id"]
        seen.add(source)
        np.testing.assert_array_equal(sample["z_source"], latents.latent(subject_id, names[source]))
        wanted = [1.0 if m not in (source, 4) else 0.0 for m in range(5)]
        assert sample["wanted"].tolist() == wanted
        for m, z in enumerate(sample["z_targets"].unflatten(0, (5, -1))):
            other = latents.latent(subject_id, names[m]) if wanted[m] else np.zeros_like(z)
            np.testing.assert_array_equal(z, other)
    assert seen == {0, 1, 2, 3}


def test_a_sample_of_a_pair_asks_for_its_target_alone(latents: LatentStore) -> None:
    sample = LatentTargets(latents, "train", latents.modalities, ("t2", "t1")).sample(0, torch.Generator())
    assert (sample["source"], sample["wanted"].tolist()) == (2, [1, 0, 0, 0])


@pytest.mark.parametrize("image_space", [False, True])
def test_the_loss_is_the_mean_of_the_pairs_that_there_are(latents: LatentStore, image_space: bool) -> None:
    training = replace(TOGETHER.train_diffusion, image_space_loss=image_space)
    stage = stage_of(latents, replace(TOGETHER, train_diffusion=training))
    samples = stage.samples("train")
    batch = collate([samples.sample(i, derived_generator(0, i)) for i in range(2)])
    batch["wanted"][1, int(batch["source"][1]) - 1] = 0  # as if the second subject lacked one
    loss, _ = stage.players[0].loss(stage.unet, batch, None)  # type: ignore[arg-type]
    squares = []
    std = torch.from_numpy(latents.std)
    weights = std**2 / (std**2).mean() if image_space else torch.ones(8)
    with torch.no_grad():
        for b in range(2):
            one = slice(b, b + 1)
            source = batch["source"][one]
            like = [stage._ms_spade(batch["z_source"][one], torch.tensor([m]), source).half().float() for m in range(4)]
            everything = stage.unet.refine_all(
                z_source=batch["z_source"][one], z_target_like=torch.cat(like, dim=1), source=source
            )
            for m in range(4):
                if batch["wanted"][b, m]:
                    error = (everything[:, 8 * m : 8 * m + 8] - batch["z_targets"][one, 8 * m : 8 * m + 8]).square()
                    squares.append((error * weights.view(1, -1, 1, 1, 1)).mean())
    assert len(squares) == 5
    torch.testing.assert_close(loss, torch.stack(squares).mean(), rtol=1e-4, atol=1e-5)


def test_the_source_comes_back_as_it_is_and_each_target_is_its_own_part() -> None:
    config = replace(TOGETHER, modalities=("t1", "t2", "pd"))
    unet = build_denoiser(config, 2)
    torch.nn.init.normal_(unet.out.conv.weight)
    z_source, like, source = torch.randn(2, 2, 4, 4, 4), torch.randn(2, 6, 4, 4, 4), torch.tensor([2, 0])
    z = unet.refine_all(z_source=z_source, z_target_like=like, source=source)
    assert torch.equal(of_target(z, source, 2), of_target(like, source, 2))
    for target in ([0, 1], [1, 2]):
        part = of_target(z, torch.tensor(target), 2)
        for b, m in enumerate(target):
            assert torch.equal(part[b], z[b, 2 * m : 2 * m + 2])
            assert not torch.equal(part[b], like[b, 2 * m : 2 * m + 2])


def test_a_translator_gives_what_the_training_validates(latents: LatentStore, tmp_path: Path) -> None:
    folder = save_untrained(tmp_path / "model", config=replace(TOGETHER, codec=small().codec))
    translator = Translator.load(folder, precision="fp32")
    predictor = translator.predictor
    x = torch.randn(1, 1, 16, 24, 16)
    code = predictor.encode(x)
    everything = predictor.predict_all(code, torch.tensor([0]))
    calls: list[tuple[int, int]] = []
    for target in range(3):
        got = predictor.predict(code, [(0,)], [target], translator.config.sampling, [], lambda *c: calls.append(c))
        torch.testing.assert_close(got, predictor.decode(everything[:, 8 * target : 8 * target + 8]))
    assert calls == [(1, 1)] * 3


def test_other_objectives_predict_one_target() -> None:
    assert TOGETHER.diffusion.together
    assert not replace(TOGETHER.diffusion, objective="epsilon").together
    config = replace(TOGETHER, modalities=("t1", "t2", "pd"), diffusion=replace(TOGETHER.diffusion, objective="v"))
    assert build_denoiser(config, 2).out.conv.out_channels == 2
    assert build_denoiser(replace(config, diffusion=TOGETHER.diffusion), 2).out.conv.out_channels == 6
