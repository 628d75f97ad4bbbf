"""The regression U-Net on Haar bands: what it starts from, what the pair reaches, what it is made of."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from untrained import MODALITIES

from aldm.checkpoint import load_weights, save_checkpoint
from aldm.config import CodecConfig, Config
from aldm.denoising import build_regression_unet
from aldm.errors import UserError
from aldm.export import baseline_model
from aldm.models.blocks import ResBlock
from aldm.models.codecs import build_codec
from aldm.models.haar_unet import HaarUNet
from aldm.presets import brats, ixi, small, tiny
from aldm.translate import Translator

TINY = replace(tiny(), modalities=MODALITIES)
SIDES = (8, 12, 8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network(config: Config = TINY) -> HaarUNet:
    """A network none of whose layers starts as 0, so that its output says something."""
    model = build_regression_unet(config)
    for module in model.modules():
        if isinstance(module, nn.Conv3d | nn.Linear):
            module.reset_parameters()
    return model


def inputs(number: int = 2, sides: tuple[int, int, int] = SIDES) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(number, 1, *sides), torch.zeros(number).long(), torch.arange(number) % 2 + 1


@pytest.mark.parametrize("sides", [SIDES, (7, 12, 9)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_starts_as_an_empty_volume(sides: tuple[int, int, int], precision: str) -> None:
    model, (x, source, target) = build_regression_unet(TINY), inputs(sides=sides)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert torch.equal(model(x, source, target), torch.full_like(x, -1.0))


def test_nothing_is_lost_before_and_behind_the_network() -> None:
    """A network that repeats its input, less the bands of an empty volume, gives back the source."""
    model, (x, source, target) = network(), inputs()
    empty = model.haar(torch.full((1, 1, *SIDES), -1.0))
    model.bands = lambda bands, embedding: bands - empty  # type: ignore[method-assign]
    torch.testing.assert_close(model(x, source, target), x, atol=1e-5, rtol=0)


def test_it_is_the_lossless_codec_around_a_u_net() -> None:
    model, (x, source, target) = network(), inputs()
    codec = build_codec(CodecConfig(kind="haar"))
    expected = codec.decode(model.bands(codec.encode(x), model.mix(model.pair(3 * source + target)))) - 1
    assert expected.std() > 0.01
    torch.testing.assert_close(model(x, source, target), expected, atol=1e-5, rtol=1e-5)


def test_sides_that_the_strides_do_not_divide_are_those_of_a_volume_with_background_around_it() -> None:
    model, (x, source, target) = network(), inputs(sides=(7, 12, 9))
    wider = nn.functional.pad(x, (0, 3, 0, 0, 0, 1), value=-1.0)
    torch.testing.assert_close(model(x, source, target), model(wider, source, target)[:, :, :7, :, :9])


def test_the_pair_reaches_every_residual_block() -> None:
    model, x = network(), torch.randn(1, 1, *SIDES).expand(3, -1, -1, -1, -1)
    blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
    seen: list[Tensor] = []
    for block in blocks:
        assert block.scale_shift
        assert block.embedding is not None
        block.embedding.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(x, torch.tensor([0, 1, 0]), torch.tensor([1, 0, 2]))
    assert len(seen) == len(blocks) == 1 + 2 + 1
    for scale_and_shift in seen:
        distances = torch.cdist(scale_and_shift, scale_and_shift) + torch.eye(3)
        assert distances.min() > 0.01


def test_volumes_of_a_batch_do_not_meet() -> None:
    model, (x, source, target) = network().double(), inputs(3)
    whole = model(x.double(), source, target)
    alone = [model(x[i : i + 1].double(), source[i : i + 1], target[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone))


def test_a_volume_of_the_targets_modality_is_returned_as_it_is() -> None:
    model, (x, source, _) = network(), inputs(3)
    result = model(x, source, torch.tensor([1, 0, 2]))
    assert torch.equal(result[1], x[1])
    torch.testing.assert_close(result[[0, 2]], model(x, source, torch.tensor([1, 1, 2]))[[0, 2]])


def test_convolutions_lie_channels_last_before_and_after_weights_are_loaded() -> None:
    model, fresh, (x, source, target) = network(), build_regression_unet(TINY), inputs()
    load_weights(fresh, {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, "a file")
    for net in (model, fresh):
        convolutions = [m for m in net.modules() if isinstance(m, nn.Conv3d | nn.ConvTranspose3d)]
        assert len(convolutions) > 10
        assert all(conv.weight.is_contiguous(memory_format=torch.channels_last_3d) for conv in convolutions)
        seen: list[Tensor] = []
        for conv in convolutions:
            conv.register_forward_pre_hook(lambda _module, inputs, seen=seen: seen.append(inputs[0]))
        net(x, source, target)
        assert len(seen) == len(convolutions)
        assert all(z.is_contiguous(memory_format=torch.channels_last_3d) for z in seen)
    assert torch.equal(model(x, source, target), fresh(x, source, target))


@pytest.mark.parametrize("preset", [brats, ixi])
def test_whole_volumes_of_the_papers_size_fit_its_strides(preset: object) -> None:
    config = preset()  # type: ignore[operator]
    assert config.train_unet.crop is None
    assert config.haar_unet == small().haar_unet
    with torch.device("meta"):
        model = build_regression_unet(config)
        x = torch.empty(1, 1, *config.preprocess.spatial_shape)
        ids = torch.zeros(1, dtype=torch.long)
        assert model(x, ids, ids + 1).shape == x.shape
    assert [block.conv2.out_channels for block in model.down] == [32, 64]


def earlier_network(folder: Path, prefix: str) -> Path:
    """A checkpoint as the regression U-Net on voxels left it: the names of its weights say so."""
    record = {"stage": "unet", "step": 1, "num_steps": 1, "score": "psnr_db", "validation": {}}
    weights = {f"{prefix}target.weight": torch.zeros(3, 32)}
    save_checkpoint(folder, kind="unet", config=TINY, weights=weights, meta={"data": {}, "training": record})
    return folder


def test_the_network_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    words = r"regression U-Net of an earlier version.*train it again \(aldm train unet\) and export"
    with pytest.raises(UserError, match=f"model holds a {words}"):
        Translator.load(earlier_network(tmp_path / "model", "unet."))
    (tmp_path / "run").mkdir()
    earlier_network(tmp_path / "run" / "best", "")
    with pytest.raises(UserError, match=f"best holds a {words}"):
        baseline_model(tmp_path / "run")
