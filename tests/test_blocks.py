"""The building blocks against plain definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aldm.models.blocks import (
    Attention,
    HaarTransform,
    InverseHaarTransform,
    ResBlock,
    Upsample,
    VoxelNorm,
    instance_norm_fp32,
    make_norm,
    norm_fp32,
    run_blocks,
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_haar_is_orthonormal_and_its_inverse_is_exact() -> None:
    x = torch.randn(2, 3, 6, 4, 8)
    coefficients = HaarTransform()(x)
    assert coefficients.shape == (2, 24, 3, 2, 4)
    torch.testing.assert_close(coefficients.square().sum(), x.square().sum())
    assert (InverseHaarTransform()(coefficients) - x).abs().max() < 1e-5


def test_haar_coefficients_are_those_of_the_definition() -> None:
    x = torch.randn(1, 2, 2, 2, 2, dtype=torch.float64)
    coefficients = HaarTransform()(x).flatten()
    taps = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    expected = torch.einsum("cxyz,ix,jy,kz->cijk", x[0], taps, taps, taps).flatten()
    torch.testing.assert_close(coefficients, expected)


def test_haar_keeps_fp32_under_autocast() -> None:
    x = torch.randn(1, 1, 4, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        back = InverseHaarTransform()(HaarTransform()(x))
    assert (back - x).abs().max() < 1e-5


def test_upsample_is_nearest_neighbour_then_convolution_with_the_same_gradients() -> None:
    block = Upsample(3).double()
    x = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *block.parameters()]
    weights = torch.randn(2, 3, 4, 6, 8, dtype=torch.float64)
    fast = block(x)
    plain = block.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(fast, plain)
    for a, b in zip(
        torch.autograd.grad((fast * weights).sum(), inputs),
        torch.autograd.grad((plain * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_attention_is_softmax_attention() -> None:
    block = Attention(channels=6, head_channels=3, norm_groups=2).double()
    x = torch.randn(2, 6, 2, 3, 2, dtype=torch.float64)
    tokens = block.norm(x).flatten(2).transpose(1, 2)
    q, k, v = block.qkv(tokens).chunk(3, dim=-1)
    heads = [
        torch.softmax(q[..., s] @ k[..., s].transpose(1, 2) / math.sqrt(3), dim=-1) @ v[..., s]
        for s in (slice(0, 3), slice(3, 6))
    ]
    expected = x + block.out(torch.cat(heads, dim=-1)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("conditioning", ["add", "scale-shift"])
def test_res_block_uses_its_embedding_per_sample(conditioning: str) -> None:
    block = ResBlock(4, 6, norm_groups=2, embedding_channels=5, conditioning=conditioning)
    x, embedding = torch.randn(1, 4, 3, 3, 3).expand(2, -1, -1, -1, -1), torch.randn(2, 5)
    nn.init.normal_(block.conv2.weight)
    assert block.embedding is not None
    nn.init.normal_(block.embedding.weight)
    out = block(x, embedding)
    assert out.shape == (2, 6, 3, 3, 3)
    assert not torch.allclose(out[0], out[1])
    torch.testing.assert_close(out[1:], block(x[1:], embedding[1:]))


def test_a_scale_shift_block_without_modulation_is_the_plain_block() -> None:
    block = ResBlock(4, 4, norm_groups=2, embedding_channels=5, conditioning="scale-shift")
    nn.init.normal_(block.conv2.weight)
    plain = ResBlock(4, 4, norm_groups=2)
    plain.load_state_dict({key: value for key, value in block.state_dict().items() if "embedding" not in key})
    assert block.embedding is not None
    nn.init.zeros_(block.embedding.weight)
    nn.init.zeros_(block.embedding.bias)
    x = torch.randn(1, 4, 3, 3, 3)
    torch.testing.assert_close(block(x, torch.randn(1, 5)), plain(x))


def test_a_res_block_starts_as_its_shortcut() -> None:
    x = torch.randn(1, 4, 3, 3, 3)
    torch.testing.assert_close(ResBlock(4, 4, norm_groups=2)(x), x)


def test_group_norm_takes_the_groups_that_fit() -> None:
    for groups, channels, taken in ((32, 48, 16), (8, 4, 4)):
        norm = make_norm(groups, channels)
        assert isinstance(norm, nn.GroupNorm)
        assert norm.num_groups == taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_voxel_norm_divides_by_the_root_mean_square_of_a_voxel_s_channels(dtype: torch.dtype) -> None:
    norm = make_norm(0, 6)
    assert isinstance(norm, VoxelNorm)
    nn.init.normal_(norm.weight)
    x = (3 * torch.randn(2, 6, 3, 4, 5)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        got = norm_fp32(norm, x)
    assert got.dtype == dtype
    wanted = x.float() / x.float().square().mean(dim=1, keepdim=True).sqrt() * norm.weight.view(1, 6, 1, 1, 1)
    torch.testing.assert_close(got, wanted.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=1e-4)
    torch.testing.assert_close(norm_fp32(norm, x[:, :, 1:, 2:]), got[:, :, 1:, 2:])  # what else is in view is nothing


def test_norms_of_bf16_have_fp32_statistics() -> None:
    x = (torch.randn(2, 8, 6, 6, 6) + 3.0).bfloat16()
    norm = make_norm(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        grouped, single = norm_fp32(norm, x), instance_norm_fp32(x)
    assert grouped.dtype == single.dtype == torch.bfloat16
    torch.testing.assert_close(grouped, norm(x.float()).bfloat16())
    torch.testing.assert_close(single, F.instance_norm(x.float()).bfloat16())


def test_activation_checkpointing_changes_no_gradient() -> None:
    blocks = nn.Sequential(ResBlock(2, 4, 2), ResBlock(4, 4, 2)).double()
    for parameter in blocks.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 2, 4, 4, 4, dtype=torch.float64)
    gradients = [
        torch.autograd.grad(run_blocks(blocks, x, flag).square().sum(), list(blocks.parameters()))
        for flag in (False, True)
    ]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
