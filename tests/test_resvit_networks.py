"""ResViT: published sizes, one shared transformer, global context, and both ways of loading weights."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from aldm.baselines.networks import ResNetGenerator
from aldm.baselines.resvit_networks import ResViTGenerator, load_pretrained, load_vit_weights
from aldm.errors import UserError

HIDDEN, HEADS, MLP, LAYERS, CHANNELS = 8, 2, 12, 2, 2
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(image_shape: tuple[int, int] = (48, 32), with_transformer: bool = True) -> ResViTGenerator:
    return ResViTGenerator(
        image_shape,
        channels=CHANNELS,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        mlp_dim=MLP,
        num_layers=LAYERS,
        with_transformer=with_transformer,
    )


@pytest.mark.parametrize(
    ("sides", "published"),
    [((256, 256), 123_441_537), ((240, 240), 123_393_921), ((256, 160), 123_294_081), ((160, 256), 123_294_081)],
)
def test_parameters_and_shapes_of_the_published_network(sides: tuple[int, int], published: int) -> None:
    with torch.device("meta"):
        generator = ResViTGenerator(sides)
        assert num_parameters(generator) == published
        assert num_parameters(generator.vit) == 85_056_000
        assert generator.token_grid == (sides[0] // 16, sides[1] // 16)
        assert generator(torch.empty(2, 1, *sides)).shape == (2, 1, *sides)


def test_parameters_of_a_transformer_branch_and_of_res_cnn() -> None:
    with torch.device("meta"):
        for branch in (branches := ResViTGenerator((256, 256)).branches()):
            assert num_parameters(branch.down) == 5_901_312
            assert num_parameters(branch.patch_embedding) + branch.positions.numel() == 983_808
            assert num_parameters(branch.up) == 4_720_128
            assert num_parameters(branch.compression) + num_parameters(branch.shortcut) == 1_902_080
        assert len(branches) == 2
        res_cnn = ResViTGenerator((256, 256), with_transformer=False)
        assert num_parameters(res_cnn) == 11_370_881 == num_parameters(ResNetGenerator(2, norm="batch"))


def test_the_transformer_is_in_blocks_1_and_6_and_drops_out_in_the_mlp_only() -> None:
    generator = small()
    assert [index for index, block in enumerate(generator.blocks, start=1) if block.transformer] == [1, 6]
    for layer in generator.vit.layers:
        assert (layer.self_attn.dropout, layer.dropout1.p, layer.dropout.p, layer.dropout2.p) == (0, 0, 0.1, 0.1)


def test_one_transformer_is_called_twice() -> None:
    generator, calls = small().eval(), []
    generator.vit.register_forward_hook(lambda module, *_: calls.append(module))
    generator(torch.randn(1, 1, 48, 32))
    assert len(calls) == 2
    assert calls[0] is calls[1]
    assert sum(name.endswith("layers.0.linear1.weight") for name in generator.state_dict()) == 1


class Alternating(nn.Module):
    """Another copy of the transformer for every call."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.copies = nn.ModuleList([copy.deepcopy(vit), copy.deepcopy(vit)])
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return self.copies[self.calls - 1](tokens)


def test_the_gradients_of_both_calls_land_in_the_same_weights() -> None:
    generator = small().double().eval()
    apart = copy.deepcopy(generator)
    apart.vit = Alternating(apart.vit)
    x = torch.randn(1, 1, 48, 32, dtype=torch.float64)
    for each in (generator, apart):
        each(x).square().sum().backward()
    for shared, first, second in zip(
        generator.vit.parameters(), *(c.parameters() for c in apart.vit.copies), strict=True
    ):
        assert first.grad is not None
        assert second.grad is not None
        torch.testing.assert_close(shared.grad, first.grad + second.grad)
    assert all(any(p.grad.any() for p in c.parameters()) for c in apart.vit.copies)


def test_every_parameter_gets_a_gradient() -> None:
    generator = small()
    generator(torch.randn(2, 1, 48, 32)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())


def test_only_the_transformer_sees_the_whole_slice() -> None:
    for with_transformer in (True, False):
        generator = small((256, 256), with_transformer).double().eval()
        x = torch.randn(1, 1, 256, 256, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(generator(x)[0, 0, 2, 2], x)
        assert bool(gradient[0, 0, 250, 250]) == with_transformer
        if not with_transformer:
            assert gradient[0, 0].any(dim=1).nonzero().max() <= 86


def test_slices_of_any_sides_but_only_of_those_it_was_made_for() -> None:
    generator = small((50, 33)).eval()
    assert generator.token_grid == (4, 3)
    x = torch.rand(1, 1, 50, 33)
    out = generator(x)
    assert out.shape == x.shape
    assert out.abs().max() <= 1
    padded = nn.functional.pad(x, (0, 15, 0, 14), value=-1.0)
    generator.image_shape = (64, 48)
    torch.testing.assert_close(generator(padded)[..., :50, :33], out)
    with pytest.raises(UserError, match="slices of 64 x 48 pixels, got 50 x 33"):
        generator(x)


def test_res_cnn_loads_whole() -> None:
    res_cnn, generator = small(with_transformer=False), small()
    res_cnn(torch.randn(2, 1, 48, 32))  # moves the running statistics
    before = copy.deepcopy(generator.state_dict())
    state = res_cnn.state_dict()
    assert len(state) == 140
    load_pretrained(generator, state)
    after = generator.state_dict()
    assert state.keys() <= after.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())
    assert all(torch.equal(after[name], before[name]) for name in after.keys() - state.keys())


def test_a_res_cnn_that_does_not_fit_is_refused_whole() -> None:
    generator, state = small(), small(with_transformer=False).state_dict()
    before = copy.deepcopy(generator.state_dict())
    name = "blocks.3.residual.layers.1.weight"
    for broken, problem in (
        ({key: value for key, value in state.items() if key != name}, f"{name}: missing"),
        ({**state, name: torch.zeros(1)}, rf"{name}: shape \(1,\) instead of \(8, 8, 3, 3\)"),
        ({**state, "head.weight": torch.zeros(1)}, "head.weight: not in ResViT"),
    ):
        with pytest.raises(UserError, match=problem):
            load_pretrained(generator, broken)
    assert all(torch.equal(value, before[key]) for key, value in generator.state_dict().items())


def google_arrays(grid: int = 3) -> Arrays:
    """Random weights under the names and in the shapes of Google's release."""
    generator, head = np.random.default_rng(0), HIDDEN // HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "cls": (1, 1, HIDDEN),
        "conv_root/kernel": (7, 7, 3, 4),
        "embedding/kernel": (1, 1, 16 * CHANNELS, HIDDEN),
        "embedding/bias": (HIDDEN,),
        "Transformer/posembed_input/pos_embedding": (1, 1 + grid**2, HIDDEN),
        "Transformer/encoder_norm/scale": (HIDDEN,),
        "Transformer/encoder_norm/bias": (HIDDEN,),
    }
    for layer in range(LAYERS):
        before = f"Transformer/encoderblock_{layer}"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{before}/{norm}/scale": (HIDDEN,), f"{before}/{norm}/bias": (HIDDEN,)}
        attention = f"{before}/MultiHeadDotProductAttention_1"
        for name in ("query", "key", "value"):
            shapes |= {f"{attention}/{name}/kernel": (HIDDEN, HEADS, head), f"{attention}/{name}/bias": (HEADS, head)}
        shapes |= {f"{attention}/out/kernel": (HEADS, head, HIDDEN), f"{attention}/out/bias": (HIDDEN,)}
        for dense, (inputs, outputs) in enumerate(((HIDDEN, MLP), (MLP, HIDDEN))):
            mlp = f"{before}/MlpBlock_3/Dense_{dense}"
            shapes |= {f"{mlp}/kernel": (inputs, outputs), f"{mlp}/bias": (outputs,)}
    return {name: generator.standard_normal(shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}


def google_encoder(arrays: Arrays, tokens: np.ndarray) -> np.ndarray:
    """ViT's encoder written down from its definition in Google's layout, (tokens, hidden) to the same shape."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * arrays[f"{name}/scale"] + arrays[f"{name}/bias"]

    for layer in range(LAYERS):
        before = f"Transformer/encoderblock_{layer}"
        attention, mlp = f"{before}/MultiHeadDotProductAttention_1", f"{before}/MlpBlock_3"
        x = norm(tokens, f"{before}/LayerNorm_0")
        q, k, v = (
            np.einsum("td,dhk->htk", x, arrays[f"{attention}/{name}/kernel"])
            + arrays[f"{attention}/{name}/bias"][:, None]
            for name in ("query", "key", "value")
        )
        scores = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1]))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        tokens = tokens + np.einsum("htk,hkd->td", mixed, arrays[f"{attention}/out/kernel"])
        tokens = tokens + arrays[f"{attention}/out/bias"]
        x = norm(tokens, f"{before}/LayerNorm_2") @ arrays[f"{mlp}/Dense_0/kernel"] + arrays[f"{mlp}/Dense_0/bias"]
        x = nn.functional.gelu(torch.from_numpy(x)).numpy()
        tokens = tokens + x @ arrays[f"{mlp}/Dense_1/kernel"] + arrays[f"{mlp}/Dense_1/bias"]
    return norm(tokens, "Transformer/encoder_norm")


def timm_weights(arrays: Arrays) -> dict[str, Tensor]:
    """The same weights as timm writes them."""
    out: Arrays = {
        "cls_token": arrays["cls"],
        "pos_embed": arrays["Transformer/posembed_input/pos_embedding"],
        "patch_embed.proj.weight": arrays["embedding/kernel"].transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": arrays["embedding/bias"],
        "norm.weight": arrays["Transformer/encoder_norm/scale"],
        "norm.bias": arrays["Transformer/encoder_norm/bias"],
    }
    for layer in range(LAYERS):
        before, block = f"Transformer/encoderblock_{layer}", f"blocks.{layer}"
        qkv = [f"{before}/MultiHeadDotProductAttention_1/{name}" for name in ("query", "key", "value")]
        out |= {
            f"{block}.attn.qkv.weight": np.concatenate(
                [arrays[f"{name}/kernel"].reshape(HIDDEN, -1).T for name in qkv]
            ),
            f"{block}.attn.qkv.bias": np.concatenate([arrays[f"{name}/bias"].ravel() for name in qkv]),
        }
        projection = f"{before}/MultiHeadDotProductAttention_1/out"
        out[f"{block}.attn.proj.weight"] = arrays[f"{projection}/kernel"].reshape(-1, HIDDEN).T
        out[f"{block}.attn.proj.bias"] = arrays[f"{projection}/bias"]
        for ours, theirs in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{block}.{ours}.weight"] = arrays[f"{before}/{theirs}/scale"]
            out[f"{block}.{ours}.bias"] = arrays[f"{before}/{theirs}/bias"]
        for ours, theirs in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            out[f"{block}.mlp.{ours}.weight"] = arrays[f"{before}/MlpBlock_3/{theirs}/kernel"].T
            out[f"{block}.mlp.{ours}.bias"] = arrays[f"{before}/MlpBlock_3/{theirs}/bias"]
    return {name: torch.from_numpy(value.copy()) for name, value in out.items()}


def test_googles_weights_make_googles_encoder(tmp_path: Path) -> None:
    arrays = google_arrays()
    np.savez(tmp_path / "vit.npz", **arrays)
    generator = small().eval()
    load_vit_weights(generator, tmp_path / "vit.npz")
    tokens = torch.randn(2, 5, HIDDEN)
    expected = np.stack([google_encoder(arrays, sample) for sample in tokens.numpy()])
    torch.testing.assert_close(generator.vit(tokens).detach(), torch.from_numpy(expected).float(), atol=1e-4, rtol=1e-4)
    features = torch.randn(1, 16 * CHANNELS, 3, 2)
    embedded = np.einsum("cxy,cd->dxy", features[0].numpy(), arrays["embedding/kernel"][0, 0])
    expected_embedding = torch.from_numpy(embedded + arrays["embedding/bias"][:, None, None])
    for branch in generator.branches():
        torch.testing.assert_close(branch.patch_embedding(features)[0].detach(), expected_embedding)


@pytest.mark.parametrize("names", ["timm", "google"])
def test_safetensors_hold_the_same(tmp_path: Path, names: str) -> None:
    arrays = google_arrays()
    np.savez(tmp_path / "vit.npz", **arrays)
    plain = {name: torch.from_numpy(value) for name, value in arrays.items()}
    save_file(timm_weights(arrays) if names == "timm" else plain, tmp_path / "vit.safetensors")
    one, other = small(), small()
    other.load_state_dict(one.state_dict())
    load_vit_weights(one, tmp_path / "vit.npz")
    load_vit_weights(other, str(tmp_path / "vit.safetensors"))
    for name, value in other.state_dict().items():
        torch.testing.assert_close(value, one.state_dict()[name], rtol=0, atol=0)


@pytest.mark.parametrize("image_shape", [(48, 48), (32, 80)])
def test_positions_are_stretched_over_the_token_grid(tmp_path: Path, image_shape: tuple[int, int]) -> None:
    """A ramp stays a ramp with the same ends; the class token's encoding is dropped."""
    arrays, name = google_arrays(grid=3), "Transformer/posembed_input/pos_embedding"
    rows, columns = np.meshgrid([0, 0.5, 1], [0, 0.5, 1], indexing="ij")
    arrays[name][0, 0] = 99
    arrays[name][0, 1:] = (rows + 10 * columns).reshape(-1, 1)
    np.savez(tmp_path / "vit.npz", **arrays)
    generator = small(image_shape)
    load_vit_weights(generator, tmp_path / "vit.npz")
    grid_rows, grid_columns = generator.token_grid
    expected = torch.linspace(0, 1, grid_rows)[:, None] + 10 * torch.linspace(0, 1, grid_columns)
    for branch in generator.branches():
        stretched = branch.positions.detach().reshape(grid_rows, grid_columns, HIDDEN)
        torch.testing.assert_close(stretched, expected[..., None].expand(-1, -1, HIDDEN))


def test_a_file_that_does_not_fit_is_refused_whole(tmp_path: Path) -> None:
    generator, file = small(), tmp_path / "vit.npz"
    before = copy.deepcopy(generator.state_dict())
    arrays = google_arrays()
    dense, position = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel", "Transformer/posembed_input/pos_embedding"
    for changes, problem in (
        ({dense: None}, f"{dense}: missing"),
        ({dense: arrays[dense].T}, rf"{dense}: shape \(12, 8\) instead of 8 inputs and 12 outputs"),
        ({position: None}, f"{position}: missing"),
        ({position: arrays[position][:, :-1]}, rf"{position}: shape \(1, 9, 8\) instead of"),
        ({"embedding/bias": np.zeros(9, np.float32)}, r"embedding/bias: shape \(9,\) instead of \(8,\)"),
    ):
        np.savez(file, **{name: value for name, value in (arrays | changes).items() if value is not None})
        with pytest.raises(UserError, match=problem) as error:
            load_vit_weights(generator, file)
        assert str(file) in str(error.value)
    save_file({"blocks.0.norm1.weight": torch.zeros(HIDDEN)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"blocks\.0\.norm1\.bias: missing"):
        load_vit_weights(generator, tmp_path / "a.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in generator.state_dict().items())


@pytest.mark.parametrize("name", ["missing.npz", "missing.safetensors", "junk.npz", "junk.safetensors", "array.npz"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    for suffix in (".npz", ".safetensors"):
        (tmp_path / "junk").with_suffix(suffix).write_bytes(b"nothing of the kind")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(UserError, match=f"cannot read .*{name}"):
        load_vit_weights(small(), tmp_path / name)
