"""The small preset's stage 1 on simulated subjects: its codebook trains and is used."""

from dataclasses import replace

import pytest
import torch

from aldm.data.phantom import write_phantom
from aldm.data.preparing import prepare_store
from aldm.data.store import VolumeStore
from aldm.engine import PlainEngine
from aldm.models.codecs import Codec
from aldm.models.quantizer import nearest_code
from aldm.presets import small
from aldm.stages import VQGANStage
from aldm.training import fit

STEPS = 60
"""Of the preset's 400; usage is above 90 % from here on."""
PREPROCESS = replace(small().preprocess, spacing_mm=(5.0, 5.0, 5.0), spatial_shape=(32, 48, 40))
"""The smallest grid of a whole head that the preset's crop of 32 voxels fits into."""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> VolumeStore:
    folder = tmp_path_factory.mktemp("small")
    write_phantom(folder / "ixi", "ixi", 9, seed=0, spacing_mm=5.0)
    return prepare_store(folder / "ixi", folder / "store", layout="ixi", config=PREPROCESS, num_processes=1)


@torch.inference_mode()
def codes_used(codec: Codec, store: VolumeStore) -> int:
    """Count the codes that at least one latent voxel of the training split has for its nearest."""
    codec.eval()
    assert codec.quantizer is not None
    used: set[int] = set()
    for subject in store.subjects("train"):
        for modality in subject.modalities:
            z = codec.encode(torch.from_numpy(store.volume(subject.subject_id, modality))[None, None])
            indices = nearest_code(z.movedim(1, -1).reshape(-1, z.shape[1]), codec.quantizer.codebook)
            used.update(indices.tolist())
    return len(used)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["haar-vqgan", "vqgan"])
def test_the_codebook_trains_and_more_than_half_of_it_is_used(kind, store):
    """Usage alone does not prove it: an encoder trained around codes that never move comes to use them too."""
    config = small()
    training = replace(
        config.train_vqgan, max_steps=STEPS, adversarial_start_step=STEPS * 3 // 4, checkpoint_every=STEPS // 2
    )
    config = replace(
        config, preprocess=PREPROCESS, codec=replace(config.codec, kind=kind), train_vqgan=training, precision="fp32"
    )
    torch.manual_seed(0)
    stage = VQGANStage(config, store)
    quantizer = stage.codec.quantizer
    assert quantizer is not None
    codebooks: list[torch.Tensor] = []
    fit(
        stage,
        PlainEngine("cpu", config.precision),
        training,
        seed=0,
        on_log=lambda values: None,
        on_checkpoint=lambda snapshot: codebooks.append(quantizer.codebook.detach().clone()),
    )
    assert codes_used(stage.codec, store) > 0.5 * config.codec.codebook_size
    early, last = codebooks[0], codebooks[-1]
    moved = (last - early).norm(dim=1) > 0.01 * last.std()
    assert moved.float().mean() > 0.5
