"""ResViT (Dalmaz et al. 2022): ResNet-9 two of whose blocks also look at the whole slice through one transformer.

Without its transformer it is Res_CNN, the network of the first stage of training, and every entry of Res_CNN's state
is one of ResViT's. Tensors are B C X Y slices of RAS+ volumes in [-1, 1] with a background of -1.
"""

import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from aldm.baselines.networks import ResidualBlock, crop_sides, pad_sides, resnet_decoder, resnet_encoder
from aldm.errors import UserError

TRANSFORMER_BLOCKS = (0, 5)
"""The published blocks 1 and 6."""
TOKEN_SIDE = 16
"""Pixels along each side of a token."""
DROPOUT = 0.1


class VisionTransformer(nn.Module):
    """The encoder of ViT (Dosovitskiy et al. 2021): pre-norm layers and a final norm, without embedding and head."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_dim: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(num_layers):
            layer = nn.TransformerEncoderLayer(
                hidden_size,
                num_heads,
                mlp_dim,
                dropout=DROPOUT,
                activation="gelu",
                layer_norm_eps=1e-6,
                batch_first=True,
                norm_first=True,
            )
            layer.self_attn.dropout = layer.dropout1.p = 0.0  # published: dropout in the MLP only
            self.layers.append(layer)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (B, tokens, hidden_size) to the same shape."""
        for layer in self.layers:
            tokens = layer(tokens)
        out: Tensor = self.norm(tokens)
        return out


def _conv_norm(before: int, after: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(before, after, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return [conv, nn.BatchNorm2d(after)]


def _up(before: int, after: int) -> list[nn.Module]:
    conv = nn.ConvTranspose2d(before, after, 3, stride=2, padding=1, output_padding=1, bias=False)
    return [conv, nn.BatchNorm2d(after), nn.ReLU()]


class TransformerBranch(nn.Module):
    """Features to tokens, through a transformer that belongs to several branches, back, and together with the features.

    Args:
        channels: width of the features.
        hidden_size: width of the tokens.
        token_grid: rows and columns of tokens; a quarter of the features' sides.
    """

    def __init__(self, channels: int, hidden_size: int, token_grid: tuple[int, int]) -> None:
        super().__init__()
        self.down = nn.Sequential(
            *_conv_norm(channels, 2 * channels, 3, stride=2),
            nn.ReLU(),
            *_conv_norm(2 * channels, 4 * channels, 3, stride=2),
            nn.ReLU(),
        )
        self.patch_embedding = nn.Conv2d(4 * channels, hidden_size, 1)
        self.positions = nn.Parameter(torch.zeros(1, math.prod(token_grid), hidden_size))
        self.dropout = nn.Dropout(DROPOUT)
        self.up = nn.Sequential(*_up(hidden_size, 2 * channels), *_up(2 * channels, channels))
        self.compression = nn.Sequential(
            *_conv_norm(2 * channels, channels, 3), nn.ReLU(), *_conv_norm(channels, channels, 3)
        )
        self.shortcut = nn.Sequential(*_conv_norm(2 * channels, channels, 1))

    def forward(self, x: Tensor, vit: nn.Module) -> Tensor:
        """Map (B, channels, X / 4, Y / 4) to the same shape."""
        grid = self.patch_embedding(self.down(x))
        tokens = vit(self.dropout(grid.flatten(2).transpose(1, 2) + self.positions))
        context = self.up(tokens.transpose(1, 2).unflatten(2, grid.shape[2:]))
        both = torch.cat((context, x), dim=1)
        return F.relu(self.compression(both) + self.shortcut(both))


class ARTBlock(nn.Module):
    """Aggregated residual transformer: the transformer branch, in the blocks that have one, then a residual block."""

    def __init__(self, channels: int, transformer: TransformerBranch | None) -> None:
        super().__init__()
        self.transformer = transformer
        self.residual = ResidualBlock(2, channels, "batch")

    def forward(self, x: Tensor, vit: nn.Module | None) -> Tensor:
        """Map (B, channels, X / 4, Y / 4) to the same shape."""
        if self.transformer is not None:
            x = self.transformer(x, vit)
        out: Tensor = self.residual(x)
        return out


class ResViTGenerator(nn.Module):
    """ResViT, or Res_CNN. Sides that are no multiple of 16 are padded with background and cropped back.

    Args:
        image_shape: X and Y of the slices, pixels; the positional encodings are made for it.
        channels: width at full resolution; 4 times as much in the blocks.
        num_blocks: blocks; the first and the sixth have the transformer.
        hidden_size, num_heads, mlp_dim, num_layers: of the transformer; ViT-B as published.
        with_transformer: False builds Res_CNN.

    Attributes:
        vit: the one transformer of all blocks; None in Res_CNN.
        token_grid: rows and columns of tokens.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: int = 64,
        num_blocks: int = 9,
        hidden_size: int = 768,
        num_heads: int = 12,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        with_transformer: bool = True,
    ) -> None:
        super().__init__()
        assert num_blocks > max(TRANSFORMER_BLOCKS), f"ResViT's transformer is in blocks 1 and 6, got {num_blocks}"
        self.image_shape = tuple(image_shape)
        rows, columns = (-(-side // TOKEN_SIDE) for side in image_shape)
        self.token_grid = (rows, columns)
        self.encoder = resnet_encoder(2, channels, "batch")
        self.vit = VisionTransformer(hidden_size, num_heads, mlp_dim, num_layers) if with_transformer else None
        self.blocks = nn.ModuleList()
        for block in range(num_blocks):
            branch = None
            if with_transformer and block in TRANSFORMER_BLOCKS:
                branch = TransformerBranch(4 * channels, hidden_size, self.token_grid)
            self.blocks.append(ARTBlock(4 * channels, branch))
        self.decoder = resnet_decoder(2, channels, "batch")

    def branches(self) -> list[TransformerBranch]:
        """Return the transformer branches; none in Res_CNN."""
        return [module for module in self.modules() if isinstance(module, TransformerBranch)]

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, 1, X, Y) to the same shape.

        Raises:
            UserError: X and Y are not those of the positional encodings.
        """
        sides = tuple(x.shape[2:])
        if self.vit is not None and sides != self.image_shape:
            raise UserError(f"this ResViT translates slices of {_by(self.image_shape)} pixels, got {_by(sides)}")
        h = self.encoder(pad_sides(x, TOKEN_SIDE))
        for block in self.blocks:
            h = block(h, self.vit)
        return crop_sides(self.decoder(h), sides)


def _by(sides: Sequence[int]) -> str:
    return " x ".join(map(str, sides))


def load_pretrained(generator: ResViTGenerator, res_cnn_state: Mapping[str, Tensor]) -> None:
    """Copy every entry of a trained Res_CNN into a ResViT, whose transformer stays as it is.

    Raises:
        UserError: an entry of one has no counterpart of its shape in the other; nothing was copied.
    """
    state = generator.state_dict()
    wanted = {name for name in state if not name.startswith("vit.") and ".transformer." not in name}
    problems = [f"{name}: missing" for name in sorted(wanted - res_cnn_state.keys())]
    problems += [f"{name}: not in ResViT" for name in sorted(res_cnn_state.keys() - wanted)]
    for name in sorted(wanted & res_cnn_state.keys()):
        if (got := res_cnn_state[name].shape) != state[name].shape:
            problems.append(f"{name}: shape {tuple(got)} instead of {tuple(state[name].shape)}")
    if problems:
        raise UserError(_listed("this is not the Res_CNN that belongs to this ResViT", problems))
    generator.load_state_dict({**state, **res_cnn_state})


def _listed(what: str, problems: Sequence[str]) -> str:
    rest = f" (and {len(problems) - 10} more)" if len(problems) > 10 else ""
    return f"{what}:\n  " + "\n  ".join(problems[:10]) + rest


_EMBEDDING = {
    "patch_embedding.weight": ("patch_embed.proj.weight", ("embedding/kernel",)),
    "patch_embedding.bias": ("patch_embed.proj.bias", ("embedding/bias",)),
}
"""Ours: the name in timm's files, the names in Google's."""
_FINAL_NORM = {
    "norm.weight": ("norm.weight", ("Transformer/encoder_norm/scale",)),
    "norm.bias": ("norm.bias", ("Transformer/encoder_norm/bias",)),
}
_ATTENTION = "MultiHeadDotProductAttention_1"
_QKV = tuple(f"{_ATTENTION}/{name}" for name in ("query", "key", "value"))
_LAYER = {
    "norm1.weight": ("norm1.weight", ("LayerNorm_0/scale",)),
    "norm1.bias": ("norm1.bias", ("LayerNorm_0/bias",)),
    "self_attn.in_proj_weight": ("attn.qkv.weight", tuple(f"{name}/kernel" for name in _QKV)),
    "self_attn.in_proj_bias": ("attn.qkv.bias", tuple(f"{name}/bias" for name in _QKV)),
    "self_attn.out_proj.weight": ("attn.proj.weight", (f"{_ATTENTION}/out/kernel",)),
    "self_attn.out_proj.bias": ("attn.proj.bias", (f"{_ATTENTION}/out/bias",)),
    "norm2.weight": ("norm2.weight", ("LayerNorm_2/scale",)),
    "norm2.bias": ("norm2.bias", ("LayerNorm_2/bias",)),
    "linear1.weight": ("mlp.fc1.weight", ("MlpBlock_3/Dense_0/kernel",)),
    "linear1.bias": ("mlp.fc1.bias", ("MlpBlock_3/Dense_0/bias",)),
    "linear2.weight": ("mlp.fc2.weight", ("MlpBlock_3/Dense_1/kernel",)),
    "linear2.bias": ("mlp.fc2.bias", ("MlpBlock_3/Dense_1/bias",)),
}
_POSITIONS = ("pos_embed", ("Transformer/posembed_input/pos_embedding",))


def load_vit_weights(generator: ResViTGenerator, file: str | os.PathLike[str]) -> None:
    """Load ViT's ImageNet weights into the shared encoder, the patch embeddings and the positional encodings.

    Args:
        generator: a ResViT.
        file: a local copy of R50+ViT-B/16 trained on ImageNet-21k: Google's .npz, or .safetensors with timm's names
            (vit_base_r50_s16_224.orig_in21k) or Google's.

    Raises:
        UserError: the file cannot be read, or lacks entries of the right shape; nothing was loaded.
    """
    vit, branches = generator.vit, generator.branches()
    assert vit is not None, "Res_CNN has no transformer"
    weights = _read_weights(Path(file))
    google = any(name.startswith("Transformer/") for name in weights)
    names: dict[str, tuple[str, tuple[str, ...]]] = {**_FINAL_NORM}
    for layer in range(len(vit.layers)):
        before = f"Transformer/encoderblock_{layer}/"
        for ours, (timm, theirs) in _LAYER.items():
            names[f"layers.{layer}.{ours}"] = (f"blocks.{layer}.{timm}", tuple(before + name for name in theirs))
    targets = vit.state_dict()
    assert names.keys() == targets.keys()
    names |= _EMBEDDING
    targets |= {name: branches[0].get_parameter(name) for name in _EMBEDDING}
    problems: list[str] = []
    found = {
        ours: _entry(weights, theirs if google else (timm,), targets[ours].shape, google, problems)
        for ours, (timm, theirs) in names.items()
    }
    name = _POSITIONS[1][0] if google else _POSITIONS[0]
    positions = _resized_positions(weights, name, generator.token_grid, branches[0].positions.shape[2], problems)
    if problems:
        raise UserError(_listed(f"{os.fspath(file)} does not hold this ResViT's transformer", problems))
    with torch.no_grad():
        for ours, value in found.items():
            if ours in _EMBEDDING:
                for branch in branches:
                    branch.get_parameter(ours).copy_(value)
            else:
                targets[ours].copy_(value)
        for branch in branches:
            branch.positions.copy_(positions)


def _read_weights(file: Path) -> dict[str, Tensor]:
    """Return the entries of an .npz or .safetensors file."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, SafetensorError) as error:
        raise UserError(
            f"cannot read the transformer's weights from {file}: {error}; want .npz or .safetensors"
        ) from error


def _entry(
    weights: Mapping[str, Tensor], names: Sequence[str], shape: torch.Size, google: bool, problems: list[str]
) -> Tensor:
    """Return the entry of that shape that the named ones make, or note what is wrong with them.

    Google's matrices are (in, out), with heads as an axis of their own: one reshape covers them all.
    """
    columns = shape[1] if google and len(shape) > 1 else 1
    parts = []
    for name in names:
        if name not in weights:
            problems.append(f"{name}: missing")
            continue
        got = weights[name]
        fits = got.shape == shape
        if google:
            whole = got.numel() * len(names) == shape.numel()
            fits = whole and (len(shape) == 1 or columns in accumulate(got.shape, mul))
        if fits:
            parts.append(got.reshape(columns, -1).T if google else got)
        else:
            rows = shape[0] // len(names)
            wanted = f"{columns} inputs and {rows} outputs" if google and columns > 1 else str(tuple(shape))
            problems.append(f"{name}: shape {tuple(got.shape)} instead of {wanted}")
    return torch.cat(parts).reshape(shape) if len(parts) == len(names) else torch.empty(0)


def _resized_positions(
    weights: Mapping[str, Tensor], name: str, token_grid: tuple[int, int], hidden_size: int, problems: list[str]
) -> Tensor:
    """Return the encodings (1, tokens, hidden_size) of a token grid: those of the file's square grid, interpolated."""
    if name not in weights:
        problems.append(f"{name}: missing")
        return torch.empty(0)
    got = weights[name]
    side = math.isqrt(max(0, got.numel() // hidden_size - 1))
    if not side or got.shape != (1, 1 + side**2, hidden_size):
        problems.append(f"{name}: shape {tuple(got.shape)} instead of (1, 1 + n^2, {hidden_size})")
        return torch.empty(0)
    grid = got[:, 1:].transpose(1, 2).unflatten(2, (side, side)).float()  # the first one is the class token's
    # corners stay corners, as in the zoom of the published code
    return F.interpolate(grid, token_grid, mode="bilinear", align_corners=True).flatten(2).transpose(1, 2)
