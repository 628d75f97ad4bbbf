"""The U-Net: shapes, conditioning, padding; at the paper's size on the meta device."""

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from aldm.config import UNetConfig
from aldm.models.blocks import ResBlock
from aldm.models.unet import UNet, time_embedding
from aldm.presets import brats, ixi

SMALL = UNetConfig(
    channels=(8, 12, 16), num_res_blocks=1, attention_levels=(1, 2), head_channels=4, norm_groups=4, embed_source=True
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def network(config: UNetConfig = SMALL, **arguments: bool) -> UNet:
    """A U-Net none of whose layers starts as 0, so that its output says something."""
    model = UNet(5, 2, 3, **asdict(config), **arguments)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.Linear):
            module.reset_parameters()
    return model


def inputs(batch: int = 2, sides: tuple[int, int, int] = (8, 4, 12)) -> tuple[torch.Tensor, ...]:
    return torch.randn(batch, 5, *sides), torch.arange(batch) * 100, torch.arange(batch) % 3, torch.ones(batch).long()


def test_parameters_and_shapes_of_table_c() -> None:
    with torch.device("meta"):
        model = UNet(9, 3, 4, **asdict(brats().unet))
        for sides in ((48, 48, 36), (40, 64, 56)):
            ids = torch.zeros(1, dtype=torch.long)
            assert model(torch.empty(1, 9, *sides), ids, ids).shape == (1, 3, *sides)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 166.5
    assert brats().unet == ixi().unet


def test_it_starts_by_predicting_zero() -> None:
    model = UNet(5, 2, 3, **asdict(SMALL))
    assert torch.equal(model(*inputs()), torch.zeros(2, 2, 8, 4, 12))


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("sides", [(6, 6, 5), (7, 9, 4), (1, 3, 2)])
def test_sides_that_the_strides_do_not_divide(sides: tuple[int, int, int], lean: bool) -> None:
    model = network(replace(SMALL, lean=lean))
    x, t, target, source = inputs(sides=sides)
    padded = torch.nn.functional.pad(x, [p for side in reversed(sides) for p in (0, -side % 4)])
    expected = model(padded, t, target, source)[:, :, : sides[0], : sides[1], : sides[2]]
    out = model(x, t, target, source)
    assert out.shape == (2, 2, *sides)
    torch.testing.assert_close(out, expected)


def test_samples_of_a_batch_do_not_meet() -> None:
    model = network().double()
    x, t, target, source = inputs(3)
    x = x.double()
    whole = model(x, t, target, source)
    torch.testing.assert_close(whole[1:2], model(x[1:2], t[1:2], target[1:2], source[1:2]))


@pytest.mark.parametrize("conditioning", ["add", "scale-shift"])
def test_time_target_and_source_each_matter(conditioning: str) -> None:
    model = network(replace(SMALL, conditioning=conditioning))
    x, t, target, source = inputs(1)
    out = model(x, t, target, source)
    assert not torch.allclose(out, model(x, t + 1, target, source), atol=1e-6)
    assert not torch.allclose(out, model(x, t, target + 1, source), atol=1e-6)
    assert not torch.allclose(out, model(x, t, target, source + 1), atol=1e-6)


def test_the_target_reaches_every_residual_block() -> None:
    blocks = [module for module in network().modules() if isinstance(module, ResBlock)]
    assert len(blocks) == 3 + 2 + 6
    assert all(block.embedding is not None for block in blocks)


def test_without_the_embedding_of_the_pair_the_source_is_not_asked_for() -> None:
    model = network(replace(SMALL, embed_source=False))
    x, t, target, source = inputs()
    torch.testing.assert_close(model(x, t, target, None), model(x, t, target, source))


def test_integer_and_float_times_are_the_same_times() -> None:
    model = network()
    x, t, target, source = inputs()
    torch.testing.assert_close(model(x, t, target, source), model(x, t.float(), target, source))


def test_time_embedding_is_its_definition() -> None:
    embedding = time_embedding(torch.tensor([0, 7]), 8)
    frequencies = torch.tensor([10_000 ** (-k / 4) for k in range(4)])
    torch.testing.assert_close(embedding[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(embedding[1], torch.cat(((7 * frequencies).cos(), (7 * frequencies).sin())))


@pytest.mark.parametrize("attention", [(), (1, 2)])
def test_every_parameter_gets_a_gradient_in_every_step(attention: tuple[int, ...]) -> None:
    model = network(replace(SMALL, attention_levels=attention))
    model(*inputs(1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = network().double()
    x, t, target, source = inputs()
    gradients = []
    for flag in (False, True):
        model.activation_checkpointing = flag
        out = model(x.double(), t, target, source)
        gradients.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bf16_autocast_stays_near_fp32() -> None:
    model = network()
    arguments = inputs()
    exact = model(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*arguments)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_the_lean_layout_does_half_the_work_and_sees_every_condition() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    operations = {}
    for lean in (False, True):
        model = network(replace(SMALL, lean=lean, attention_levels=(), conditioning="scale-shift"))
        x, t, target, source = inputs()
        with FlopCounterMode(display=False) as counter:
            out = model(x, t, target, source)
        operations[lean] = counter.get_total_flops()
        for other in ((x, t + 50, target, source), (x, t, (target + 1) % 3, source), (x, t, target, source + 1)):
            assert not torch.allclose(model(*other), out)
        out.square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert operations[True] < 0.6 * operations[False]


def test_the_gates_start_from_the_source_where_the_pair_is_the_same_and_without_a_say_elsewhere() -> None:
    model = UNet(6, 2, 3, **asdict(replace(SMALL, skip_gates=True)))
    torch.nn.init.normal_(model.out.conv.weight)
    z_t, z_source, z_target_like = torch.randn(3, 2, 2, 8, 4, 12)
    x, target, source = torch.cat([z_t, z_source, z_target_like], dim=1), torch.tensor([1, 1]), torch.tensor([1, 0])
    prediction = model(x, torch.ones(2), target, source) + z_target_like  # as `denoise` does
    plain = UNet(6, 2, 3, **asdict(SMALL))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name != "gates"})
    without = plain(x, torch.ones(2), target, source) + z_target_like
    torch.testing.assert_close(prediction, torch.stack([z_source[0], without[1]]))


def test_the_noise_gain_starts_without_a_say_and_passes_the_noisy_input_by_time_and_channel() -> None:
    values: dict[str, Any] = asdict(SMALL)
    model, plain = UNet(6, 2, 3, **values, noise_gain=True), UNet(6, 2, 3, **values)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "noise_gain" not in name})
    x, t, target, source = torch.randn(2, 6, 5, 4, 12), torch.tensor([3.0, 700.0]), *torch.tensor([[1, 0], [0, 1]])
    assert torch.equal(model(x, t, target, source), plain(x, t, target, source))
    assert model.noise_gain is not None
    torch.nn.init.normal_(model.noise_gain.weight)
    gained = (model(x, t, target, source) - plain(x, t, target, source)) / x[:, :2]
    gains = gained.mean(dim=(2, 3, 4))
    torch.testing.assert_close(gained, gains[:, :, None, None, None].expand_as(gained), rtol=1e-3, atol=1e-3)
    assert len(gains.unique()) == 4  # two channels at two times


def test_with_voxel_norms_a_box_of_a_latent_is_answered_as_in_the_whole() -> None:
    """Away from the box's border, by more than the network sees; with group norms what else is in view has a say."""
    values = asdict(replace(SMALL, channels=(8, 12), attention_levels=(), lean=True))
    x, t, target, source = torch.randn(1, 6, 48, 8, 8), torch.ones(1), torch.tensor([1]), torch.tensor([0])
    x[:, :, 40:] += 4
    for voxel_norm, same in ((True, True), (False, False)):
        model = UNet(6, 2, 3, **values | {"voxel_norm": voxel_norm})
        for module in model.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.reset_parameters()
        whole, box = model(x, t, target, source), model(x[:, :, :32], t, target, source)
        assert torch.allclose(whole[:, :, :8], box[:, :, :8], atol=1e-5) is same
