"""RegGAN's reason to exist: on pairs that are misaligned, registering before comparing beats comparing directly."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from baseline_stages import PAIR
from torch import Tensor, nn

from aldm.baselines.pairs import on_volume
from aldm.baselines.reggan import RegGANStage, _judgement
from aldm.cli import main
from aldm.config import Config, training_of, with_training
from aldm.data.store import VolumeStore
from aldm.players import Batch, StepInfo, Values
from aldm.presets import tiny
from aldm.training import PlainEngine, fit

SHAPE = (40, 56, 48)
STEPS = 500
MISALIGNMENT = 4.0
"""Degrees by which each end of a pair may be turned, and half the percents by which it may be shifted."""


class DirectStage(RegGANStage):
    """The same networks, weights, data and steps; the result is compared with the target as it lies."""

    def _generator_loss(self, model: nn.Module, batch: Batch, info: StepInfo) -> tuple[Tensor, Values]:
        source, target = info.shared["ends"] = self._moved(batch, info)
        fake = self.generator.generator(source)
        l1 = F.l1_loss(fake.float(), target)
        adversarial = (_judgement(self.discriminator, fake) - 1).square().mean()
        return self._own.correction_weight * l1 + self._own.adversarial_weight * adversarial, {"l1": l1.detach()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    """Sixteen subjects at 4 mm, whose volumes are aligned."""
    folder = tmp_path_factory.mktemp("aligned")
    words = ["phantom", "--layout", "ixi", folder / "tree", "--num-subjects", 16, "--spacing-mm", 4]
    assert main([str(word) for word in words]) == 0
    words = ["prepare", "--layout", "ixi", folder / "tree", folder / "store", "--spacing-mm", 4]
    assert main([str(word) for word in (*words, "--num-processes", 1, "--spatial-shape", *SHAPE)]) == 0
    return VolumeStore.open(folder / "store")


def config() -> Config:
    base = replace(tiny(), pair=PAIR)
    reggan = replace(
        base.baselines.reggan,
        channels=8,
        num_blocks=3,
        discriminator_channels=8,
        registration_channels=8,
        registration_levels=4,
        misalignment=MISALIGNMENT,
    )
    base = replace(base, baselines=replace(base.baselines, reggan=reggan, slice_shape=None))
    never = 10**6
    length = {"max_steps": STEPS, "validate_every": never, "checkpoint_every": never, "log_every": never}
    return with_training(base, "reggan", batch_size=8, learning_rate=3e-3, **length)


def error_on_aligned_pairs(kind: type[RegGANStage], store: VolumeStore) -> float:
    """Train on misaligned pairs; return the mean absolute error on those of the held-out subjects, as they lie."""
    torch.manual_seed(0)
    stage = kind(config(), store, "reggan")
    training = training_of(stage.config, "reggan")
    fit(stage, PlainEngine(), training, seed=0, on_log=lambda record: None, on_checkpoint=lambda snapshot: None)
    generator = stage.generator.generator.eval()
    errors = []
    for record in (*store.subjects("validation"), *store.subjects("test")):
        x, y = (torch.from_numpy(store.volume(record.subject_id, name).copy()).view(1, 1, *SHAPE) for name in PAIR)
        with torch.no_grad():
            result = on_volume(generator, x, 2, SHAPE[:2])
        errors.append(float((result - y).abs()[y > -0.999].mean()))
    return sum(errors) / len(errors)


@pytest.mark.slow
def test_reggan_beats_direct_l1_on_misaligned_pairs(store: VolumeStore) -> None:
    assert error_on_aligned_pairs(RegGANStage, store) < 0.85 * error_on_aligned_pairs(DirectStage, store)
