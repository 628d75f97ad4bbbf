"""The intensity map: what it looks up, and that no other function of the source's intensity is nearer the target."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from aldm.config import Config, MSSpadeConfig
from aldm.data.store import VolumeStore
from aldm.denoising import build_ms_spade
from aldm.errors import UserError
from aldm.intensity_map_fit import fit_intensity_map
from aldm.latents import LatentStore
from aldm.models.blocks import HaarTransform
from aldm.models.intensity_map import AIR, BINS, IntensityMap, look_up
from pipelines.train import main as train

MIDDLES = (np.arange(BINS) + 0.5) * (2 / BINS) - 1


@pytest.fixture(scope="module")
def latents(haar_latents: Path) -> LatentStore:
    return LatentStore.open(haar_latents)


@pytest.fixture(scope="module")
def fitted(latents: LatentStore) -> IntensityMap:
    module = IntensityMap(8, 4, 1)
    fit_intensity_map(module, latents, latents.modalities)
    return module


def latent(volume: Tensor, module: IntensityMap) -> Tensor:
    """The standardised latent of (X, Y, Z)."""
    z = HaarTransform()(volume[None, None])
    return (z - module.mean.view(1, -1, 1, 1, 1)) / module.std.view(1, -1, 1, 1, 1)


def test_a_table_is_read_between_the_middles_of_its_bins() -> None:
    table = torch.randn(BINS)
    x = torch.empty(5, 6, 7).uniform_(AIR, 1.1)
    np.testing.assert_allclose(look_up(x, table), np.interp(x, MIDDLES, table), atol=1e-4)
    air = torch.tensor([-1.0, -1.002, AIR - 1e-5])
    assert torch.equal(look_up(air, table), air)


def test_the_latent_of_the_result_is_that_of_the_volume_looked_up(fitted: IntensityMap) -> None:
    volumes = torch.empty(3, 4, 6, 8).uniform_(-1, 1)
    source, target = torch.tensor([0, 2, 1]), torch.tensor([3, 0, 1])
    z = torch.cat([latent(volume, fitted) for volume in volumes])
    mapped = [look_up(v, fitted.tables[s, t]) for v, s, t in zip(volumes, source, target, strict=True)]
    expected = torch.cat([latent(volume, fitted) for volume in mapped])
    got = fitted(z, target, source)
    torch.testing.assert_close(got[:2], expected[:2], atol=1e-4, rtol=1e-4)
    assert torch.equal(got[2], z[2]), "of one modality it is the source itself, to the bit"


def test_no_other_function_of_intensity_is_nearer_the_training_targets(
    fitted: IntensityMap, brats_store: VolumeStore
) -> None:
    for source, target in ((0, 2), (2, 1), (3, 0)):
        xs, ys = (
            np.concatenate(
                [
                    brats_store.volume(s.subject_id, brats_store.modalities[m]).ravel()
                    for s in brats_store.subjects("train")
                ]
            )
            for m in (source, target)
        )
        tissue = xs >= AIR
        x, y = xs[tissue], ys[tissue]
        own = np.square(look_up(torch.from_numpy(x), fitted.tables[source, target]).numpy() - y).mean()
        for degree in (1, 2, 3):
            assert own < np.square(np.polyval(np.polyfit(x, y, degree), x) - y).mean()
        assert own < 0.9 * np.square(x - y).mean()


def test_a_pair_that_no_subject_has_keeps_the_identity(latents: LatentStore) -> None:
    module = IntensityMap(8, 5, 1)
    fit_intensity_map(module, latents, (*latents.modalities, "pd"))
    np.testing.assert_allclose(module.tables[:, 4], np.tile(MIDDLES, (5, 1)), atol=1e-6)
    assert not np.allclose(module.tables[0, 1], MIDDLES, atol=1e-2)


def test_a_training_begins_at_the_map_and_its_checkpoint_holds_it(
    haar_latents: Path, fitted: IntensityMap, tmp_path: Path
) -> None:
    from aldm.checkpoint import load_checkpoint
    from aldm.run_folder import checkpoint_folder

    words = ["ms-spade", "--latents", str(haar_latents), "--run-dir", str(tmp_path / "run"), "--preset", "tiny"]
    words += ["--set", "ms_spade.intensity_map=true", "--device", "cpu", "--engine", "plain", "--no-tracking"]
    assert train([*words, "--max-steps", "1", "--set", "train_ms_spade.learning_rate=1e-12"]) == 0
    checkpoint = load_checkpoint(checkpoint_folder(tmp_path / "run"), "ms-spade")
    torch.testing.assert_close(checkpoint.weights["intensity_map.tables"], fitted.tables)
    module = build_ms_spade(checkpoint.config, 8)
    module.load_state_dict(checkpoint.weights)
    z, target, source = torch.randn(2, 8, 4, 4, 4), torch.tensor([1, 2]), torch.tensor([0, 2])
    torch.testing.assert_close(module(z, target, source), fitted(z, target, source), atol=1e-4, rtol=1e-4)
    assert torch.equal(module(z, target, source)[1], z[1])


def test_it_needs_the_lossless_codec() -> None:
    config = Config(modalities=("t1", "t2"), ms_spade=MSSpadeConfig(intensity_map=True))
    with pytest.raises(UserError, match="needs latents of the codec haar"):
        build_ms_spade(config, 3)
    with pytest.raises(UserError, match="two starts"):
        MSSpadeConfig(intensity_map=True, source_skip=True)
