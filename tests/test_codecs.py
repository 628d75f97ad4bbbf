"""The codecs behind their one interface, at small size and, on the meta device, at the paper's."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from aldm.config import CodecConfig, Config
from aldm.errors import UserError
from aldm.models.blocks import ResBlock
from aldm.models.codecs import MAX_TENSOR_ELEMENTS, Codec, build_codec
from aldm.models.ms_spade import MSSpade
from aldm.models.passes import largest_tensor, plan_passes
from aldm.models.quantizer import Codebook, FiniteScalars
from aldm.presets import brats, ixi, tiny

KINDS = ["vqgan", "haar-vqgan", "haar"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def small_codec(kind: str, **changes: object) -> Codec:
    return build_codec(replace(tiny().codec, kind=kind, **changes))  # type: ignore[arg-type]


def millions(module: nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def test_parameters_of_table_a_with_table_b_for_one_target() -> None:
    with torch.device("meta"):
        codec = build_codec(brats().codec)
        ms_spade = MSSpade(codec.latent_channels, 1, **asdict(brats().ms_spade))
    assert round(millions(codec.encoder), 1) == 83.4
    assert round(millions(codec.decoder), 1) == 125.8
    assert round(millions(ms_spade), 1) == 27.8
    assert round(millions(codec.encoder) + millions(codec.decoder) + millions(ms_spade), 1) == 237.0


@pytest.mark.parametrize("preset", [brats(), ixi()], ids=lambda preset: preset.preset)
def test_the_papers_shapes(preset: Config) -> None:
    shape = preset.preprocess.spatial_shape
    with torch.device("meta"):
        codec = build_codec(preset.codec).eval()
        z = codec.encode(torch.empty(1, 1, *shape))
        x = codec.decode(z)
    assert z.shape == (1, 3, *(side // 4 for side in shape))
    assert x.shape == (1, 1, *shape)


def test_the_papers_decoder_is_too_large_for_one_kernel() -> None:
    with torch.device("meta"):
        codec = build_codec(brats().codec)
    assert largest_tensor(plan_passes(codec.decoder, 3, (48, 48, 36))) > MAX_TENSOR_ELEMENTS


@pytest.mark.parametrize("quantizer", ["codebook", "fsq"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_interface(kind: str, quantizer: str) -> None:
    codec = small_codec(kind, quantizer=quantizer).eval()
    x = torch.rand(2, 1, 16, 24, 12) * 2 - 1
    out = codec(x)
    d = codec.downsampling
    assert out.z.shape == (2, codec.latent_channels, 16 // d, 24 // d, 12 // d)
    assert out.reconstruction.shape == x.shape
    torch.testing.assert_close(out.z, codec.encode(x))
    torch.testing.assert_close(out.reconstruction, codec.decode(out.z))
    assert codec.isometric == (kind == "haar")


@pytest.mark.parametrize("levels", [1, 2])
def test_haar_is_lossless_and_isometric(levels: int) -> None:
    codec = small_codec("haar", haar_levels=levels)
    x, y = torch.rand(2, 1, 1, 8, 12, 16) * 2 - 1
    z = codec.encode(x)
    assert z.shape == (1, codec.latent_channels, *(side // codec.downsampling for side in (8, 12, 16)))
    assert (codec.decode(z) - x).abs().max() < 1e-5
    torch.testing.assert_close((codec.encode(y) - z).square().sum(), (y - x).square().sum())
    assert codec.last_layer is None
    assert not list(codec.parameters())


@pytest.mark.parametrize("levels", [1, 2])
def test_each_haar_level_of_haar_vqgan_replaces_a_halving(levels: int) -> None:
    plain = small_codec("vqgan", channels=(4, 8, 12))
    codec = small_codec("haar-vqgan", channels=(4, 8, 12), haar_levels=levels)
    assert codec.downsampling == plain.downsampling == 4
    assert codec.encode(torch.zeros(1, 1, 8, 8, 8)).shape == (1, 4, 2, 2, 2)
    first = next(module for module in codec.encoder if isinstance(module, nn.Conv3d))
    assert (first.in_channels, first.out_channels) == (8**levels, (4, 8, 12)[levels])
    with pytest.raises(UserError, match="use at most 2 Haar levels"):
        small_codec("haar-vqgan", channels=(4, 8, 12), haar_levels=3)


@pytest.mark.parametrize("quantizer", ["codebook", "fsq"])
@pytest.mark.parametrize("kind", ["vqgan", "haar-vqgan"])
def test_everything_learns_from_one_step(kind: str, quantizer: str) -> None:
    codec = small_codec(kind, quantizer=quantizer).train()
    for module in codec.modules():
        if isinstance(module, ResBlock):  # starts as its shortcut, with no gradient before its last convolution
            nn.init.normal_(module.conv2.weight)
    out = codec(torch.rand(1, 1, 8, 8, 8))
    ((out.reconstruction - 1).abs().mean() + out.commitment_loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in codec.parameters())
    assert codec.last_layer is not None
    assert codec.last_layer.weight in set(codec.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sides", [(16, 10, 16), (2, 0, 2)])
def test_sides_that_do_not_divide_are_refused(kind: str, sides: tuple[int, int, int]) -> None:
    codec = small_codec(kind, haar_levels=2)
    with pytest.raises(UserError, match="multiples of 4; pad it to"):
        codec.encode(torch.zeros(1, 1, *sides))


def test_the_configuration_reaches_the_codebook() -> None:
    config = CodecConfig(channels=(4, 4), codebook_size=7, embedding_dim=5, commitment_weight=0.5, norm_groups=2)
    quantizer = build_codec(config).quantizer
    assert isinstance(quantizer, Codebook)
    assert quantizer.codebook.shape == (7, 5)
    assert (quantizer.decay, quantizer.commitment_weight) == (0.99, 0.5)


def test_finite_scalars_take_the_place_of_the_codebook() -> None:
    config = CodecConfig(channels=(4, 4), quantizer="fsq", fsq_levels=(3, 4), codebook_decay=0.9, norm_groups=2)
    codec = build_codec(config).eval()
    assert isinstance(codec.quantizer, FiniteScalars)
    assert (codec.quantizer.levels, codec.quantizer.decay, codec.latent_channels) == ((3, 4), 0.9, 2)
    z = codec.encode(100 * torch.randn(1, 1, 8, 8, 8))
    assert z.abs().max() <= 1  # what is stored lies in the space of the codes
    z_q = codec.quantize(z).z_q
    assert ((z_q - z).abs() <= torch.tensor([1 / 2, 1 / 3]).view(2, 1, 1, 1) + 1e-6).all()
    torch.testing.assert_close(codec.decode(z), codec.decode_codes(z_q))


@pytest.mark.parametrize("voxel_norm", [False, True])
def test_with_voxel_norms_what_is_far_away_has_no_say(voxel_norm: bool) -> None:
    codec = small_codec("haar-vqgan", channels=(4, 8), voxel_norm=voxel_norm).eval()
    for module in codec.modules():
        if isinstance(module, ResBlock):
            nn.init.normal_(module.conv2.weight)
    x = torch.rand(1, 1, 96, 4, 4)
    other = x.clone()
    other[:, :, -8:] = 1
    here, there = (codec.decode_codes(codec.encode(volume))[:, :, :8] for volume in (x, other))
    assert ((here - there).abs().max() < 1e-6) == voxel_norm


@pytest.mark.parametrize("kind", ["vqgan", "haar-vqgan"])
def test_a_codec_overfits_one_volume(kind: str) -> None:
    codec = small_codec(kind, channels=(8, 16), codebook_size=64).train()
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-3, 3, 8)] * 3, indexing="ij"))
    x = torch.sin(grid).prod(dim=0)[None, None]
    optimizer = torch.optim.Adam(codec.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        out = codec(x)
        loss = (out.reconstruction - x).abs().mean()
        optimizer.zero_grad()
        (loss + out.commitment_loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * x.abs().mean()
    assert out.codebook_usage > 0.5
