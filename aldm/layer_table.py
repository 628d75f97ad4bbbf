"""The layers of a configuration's networks: shapes, parameters and operations, without computing a voxel."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from aldm.config import Config
from aldm.denoising import build_denoiser, build_ms_spade
from aldm.models.codecs import build_codec
from aldm.models.quantizer import Codebook
from aldm.trace import Trace


@dataclass(frozen=True)
class Layer:
    """A block of a network.

    Attributes:
        part: encoder, decoder, ms-spade or unet.
        name: where it stands in its part.
        kind: its class.
        shape: C, X, Y, Z of its output for one volume (or the length of an embedding).
        parameters: their number.
        flops: operations for one volume; a multiplication and an addition are two.
    """

    part: str
    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    flops: int


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters; the codebook is counted apart, as the supplement's 237 M leave it out."""

    encoder: int
    decoder: int
    codebook: int
    ms_spade: int
    ms_spade_one_target: int
    unet: int


def parameter_counts(config: Config) -> ParameterCounts:
    """Return the parameter counts of a configuration, `modalities` named."""
    with FakeTensorMode():
        codec = build_codec(config.codec)
        channels = codec.latent_channels
        one = replace(config, modalities=config.modalities[:1])
        return ParameterCounts(
            encoder=count(codec.encoder),
            decoder=count(codec.decoder),
            codebook=codec.quantizer.codebook.numel() if isinstance(codec.quantizer, Codebook) else 0,
            ms_spade=count(build_ms_spade(config, channels)),
            ms_spade_one_target=count(build_ms_spade(one, channels)),
            unet=count(build_denoiser(config, channels)),
        )


def count(module: nn.Module) -> int:
    """Return the number of parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def layer_table(config: Config) -> list[Layer]:
    """Return the blocks of encoder, decoder, MS-SPADE and U-Net in the order in which one volume meets them.

    Args:
        config: `modalities` named.
    """
    with FakeTensorMode(), torch.no_grad():
        codec = build_codec(config.codec).eval()
        channels = codec.latent_channels
        ms_spade, unet = build_ms_spade(config, channels).eval(), build_denoiser(config, channels).eval()
        ids = torch.zeros(1, dtype=torch.long)
        x = torch.zeros(1, 1, *config.preprocess.spatial_shape)
        # block by block: the codec itself may cut the largest tensors into slabs
        rows, z = _run_blocks("encoder", codec.encoder, x)
        rows += _hooked("ms-spade", ms_spade, lambda: ms_spade(z, ids, ids))
        rows += _hooked("unet", unet, lambda: unet(**unet.example_inputs(z.shape[2:])))
        rows += _run_blocks("decoder", codec.decoder, z)[0]
    return rows


def _run_blocks(part: str, blocks: nn.Sequential, x: Tensor) -> tuple[list[Layer], Tensor]:
    rows = []
    for name, block in blocks.named_children():
        with Trace() as trace:
            x = block(x)
        rows.append(_layer(part, name, block, x, trace.flops))
    return rows, x


def _hooked(part: str, network: nn.Module, run: Callable[[], Tensor]) -> list[Layer]:
    """Run a network and take note of each of its blocks as it is done."""
    rows: list[Layer] = []
    begun: list[int] = []
    handles = []
    with Trace() as trace:

        def after(name: str, block: nn.Module, output: Tensor) -> None:
            rows.append(_layer(part, name, block, output, trace.flops - begun.pop()))

        for name, block in _blocks(network):
            handles.append(block.register_forward_pre_hook(lambda *_: begun.append(trace.flops)))
            handles.append(
                block.register_forward_hook(lambda _m, _i, out, name=name, block=block: after(name, block, out))
            )
        run()
    for handle in handles:
        handle.remove()
    return rows


def _blocks(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Return the modules directly inside lists and sequences, with their names."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential):
            yield from _blocks(child, f"{prefix}{name}.")
        else:
            yield prefix + name, child


def _layer(part: str, name: str, block: nn.Module, output: Tensor, flops: int) -> Layer:
    return Layer(part, name, type(block).__name__, tuple(output.shape[1:]), count(block), flops)
