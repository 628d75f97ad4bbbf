"""The U-Net: shapes, conditioning, padding; at the paper's size on the meta device."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from aldm.config import DiffusionConfig, UNetConfig
from aldm.models.blocks import ResBlock
from aldm.models.denoiser import Denoiser
from aldm.models.lean_unet import LeanUNet
from aldm.models.unet import UNet
from aldm.presets import brats, ixi

SMALL = UNetConfig(
    channels=(8, 12, 16), num_res_blocks=1, attention_levels=(1, 2), head_channels=4, norm_groups=4, embed_source=True
)
LATENTS = ("z_t", "z_source", "z_target_like")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def fresh(config: UNetConfig = SMALL) -> Denoiser:
    """A U-Net of three modalities and two latent channels."""
    return (LeanUNet if config.lean else UNet)(config, DiffusionConfig(), 3, 2)


def network(config: UNetConfig = SMALL) -> Denoiser:
    """A U-Net none of whose layers starts as 0, so that its output says something."""
    model = fresh(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d | torch.nn.Linear):
            module.reset_parameters()
    return model


def inputs(batch: int = 2, sides: tuple[int, int, int] = (8, 4, 12)) -> dict[str, Tensor]:
    latents = dict(zip(LATENTS, torch.randn(3, batch, 2, *sides), strict=True))
    ids = {"target": torch.arange(batch) % 3, "source": torch.ones(batch).long()}
    return {**latents, "t": torch.arange(batch) * 100, **ids}


def test_parameters_and_shapes_of_table_c() -> None:
    with torch.device("meta"):
        model = UNet(brats().unet, brats().diffusion, 4, 3)
        for sides in ((48, 48, 36), (40, 64, 56)):
            assert model(**model.example_inputs(sides)).shape == (1, 3, *sides)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 166.5
    assert brats().unet == ixi().unet


def test_it_starts_by_predicting_zero() -> None:
    assert torch.equal(fresh()(**inputs()), torch.zeros(2, 2, 8, 4, 12))


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("sides", [(6, 6, 5), (7, 9, 4), (1, 3, 2)])
def test_sides_that_the_strides_do_not_divide(sides: tuple[int, int, int], lean: bool) -> None:
    model = network(replace(SMALL, lean=lean))
    given = inputs(sides=sides)
    padding = [p for side in reversed(sides) for p in (0, -side % 4)]
    padded = {name: torch.nn.functional.pad(given[name], padding) for name in LATENTS}
    expected = model(**given | padded)[:, :, : sides[0], : sides[1], : sides[2]]
    out = model(**given)
    assert out.shape == (2, 2, *sides)
    torch.testing.assert_close(out, expected)


def test_samples_of_a_batch_do_not_meet() -> None:
    model = network().double()
    given = {name: x.double() if name in LATENTS else x for name, x in inputs(3).items()}
    alone = model(**{name: x[1:2] for name, x in given.items()})
    torch.testing.assert_close(model(**given)[1:2], alone)


@pytest.mark.parametrize("conditioning", ["add", "scale-shift"])
def test_time_target_and_source_each_matter(conditioning: str) -> None:
    model = network(replace(SMALL, conditioning=conditioning))
    given = inputs(1)
    out = model(**given)
    for name in ("t", "target", "source"):
        assert not torch.allclose(out, model(**given | {name: given[name] + 1}), atol=1e-6)


def test_the_target_reaches_every_residual_block() -> None:
    blocks = [module for module in network().modules() if isinstance(module, ResBlock)]
    assert len(blocks) == 3 + 2 + 6
    assert all(block.embedding is not None for block in blocks)


def test_without_the_embedding_of_the_pair_the_source_does_not_matter() -> None:
    model = network(replace(SMALL, embed_source=False))
    given = inputs()
    torch.testing.assert_close(model(**given), model(**given | {"source": given["source"] + 1}))


def test_integer_and_float_times_are_the_same_times() -> None:
    model = network()
    given = inputs()
    torch.testing.assert_close(model(**given), model(**given | {"t": given["t"].float()}))


@pytest.mark.parametrize("attention", [(), (1, 2)])
def test_every_parameter_gets_a_gradient_in_every_step(attention: tuple[int, ...]) -> None:
    model = network(replace(SMALL, attention_levels=attention))
    model(**inputs(1)).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_activation_checkpointing_changes_no_gradient() -> None:
    model = network().double()
    given = {name: x.double() if name in LATENTS else x for name, x in inputs().items()}
    gradients = []
    for flag in (False, True):
        model.activation_checkpointing = flag
        out = model(**given)
        gradients.append(torch.autograd.grad(out.square().sum(), list(model.parameters())))
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bf16_autocast_stays_near_fp32() -> None:
    model = network()
    given = inputs()
    exact = model(**given)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**given)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).abs().mean() < 0.02 * exact.abs().mean()


def test_the_lean_layout_does_half_the_work_and_sees_every_condition() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    operations = {}
    for lean in (False, True):
        model = network(replace(SMALL, lean=lean, attention_levels=(), conditioning="scale-shift"))
        given = inputs()
        with FlopCounterMode(display=False) as counter:
            out = model(**given)
        operations[lean] = counter.get_total_flops()
        others = {"t": given["t"] + 50, "target": (given["target"] + 1) % 3, "source": given["source"] + 1}
        for name, other in others.items():
            assert not torch.allclose(model(**given | {name: other}), out)
        out.square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert operations[True] < 0.6 * operations[False]


def test_with_voxel_norms_a_box_of_a_latent_is_answered_as_in_the_whole() -> None:
    """Away from the box's border, by more than the network sees; with group norms what else is in view has a say."""
    config = replace(SMALL, channels=(8, 12), attention_levels=(), lean=True)
    given = inputs(1, (48, 8, 8))
    for name in LATENTS:
        given[name][:, :, 40:] += 4
    part = {name: given[name][:, :, :32] for name in LATENTS}
    for voxel_norm, same in ((True, True), (False, False)):
        model = fresh(replace(config, voxel_norm=voxel_norm))
        for module in model.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.reset_parameters()
        whole, box = model(**given), model(**given | part)
        assert torch.allclose(whole[:, :, :8], box[:, :, :8], atol=1e-5) is same
