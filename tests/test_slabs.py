"""Slab by slab equals all at once: bounded memory, and layers too large for one kernel."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from aldm.errors import UserError
from aldm.models import slabs
from aldm.models.blocks import conv3
from aldm.models.codecs import Codec, build_codec
from aldm.models.passes import merge_moments, plan_passes, rows_within, window
from aldm.models.quantizer import Codebook
from aldm.models.slabs import Store, decode_bounded, encode_bounded, floor_bytes
from aldm.presets import tiny

KINDS = ["vqgan", "haar-vqgan", "haar"]
SHAPE = (20, 12, 28)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_margins(monkeypatch: pytest.MonkeyPatch) -> None:
    """At test size the constant parts of the limit would hold every tensor."""
    monkeypatch.setattr(slabs, "MARGIN_BYTES", 0)
    monkeypatch.setattr(Codebook, "search_bytes", lambda self, rows: 0)
    monkeypatch.setattr(slabs, "UNFOLD_BELOW", 0)


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each whole tensor made, whether it lay in a file."""
    made: list[bool] = []
    start = Store.__init__

    def watched(self: Store, *arguments: Any) -> None:
        start(self, *arguments)
        made.append(self.bytes_in_memory == 0)

    monkeypatch.setattr(Store, "__init__", watched)
    return made


def codec_of(kind: str) -> Codec:
    """One of KINDS, or fsq: haar-vqgan with that quantiser, or voxel-norm: haar-vqgan with those norms."""
    config = replace(tiny().codec, channels=(8, 12, 16), haar_levels=1)
    changes = {"fsq": {"quantizer": "fsq"}, "voxel-norm": {"voxel_norm": True}}.get(kind)
    codec = build_codec(replace(config, **({"kind": kind} if changes is None else {"kind": "haar-vqgan", **changes})))
    for parameter in codec.parameters():  # no layer starts as nothing or as one, so that a wrong order shows
        torch.nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.5 / parameter[0].numel() ** 0.5)
    return codec


@pytest.mark.parametrize("kind", [*KINDS, "fsq", "voxel-norm"])
@pytest.mark.parametrize("factor", [1.0, 1.5, 3.0, 100.0])
@pytest.mark.usefixtures("no_margins")
def test_bounded_equals_whole(kind: str, factor: float, tmp_path: Path, files: list[bool]) -> None:
    codec = codec_of(kind).eval()
    x = torch.rand(1, 1, *SHAPE) * 2 - 1
    limit = int(factor * floor_bytes(codec, SHAPE))
    with torch.no_grad():
        z = codec.encode(x)
        expected = codec.decode(z)
    assert (encode_bounded(codec, x, limit, tmp_path) - z).abs().max() < 1e-4
    assert (decode_bounded(codec, z, limit, tmp_path) - expected).abs().max() < 1e-4
    if factor in (1.0, 100.0) and kind != "haar":
        assert any(files) == (factor == 1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_margins")
def test_bounded_takes_a_batch(tmp_path: Path) -> None:
    codec = codec_of("vqgan").eval()
    x = torch.rand(2, 1, *SHAPE)
    limit = 2 * floor_bytes(codec, SHAPE)
    with torch.no_grad():
        assert (encode_bounded(codec, x, limit, tmp_path) - codec.encode(x)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [*KINDS, "fsq", "voxel-norm"])
def test_a_limit_below_the_floor_is_refused_with_the_floor(kind: str) -> None:
    codec = codec_of(kind)
    floor = floor_bytes(codec, SHAPE)
    x, z = torch.zeros(1, 1, *SHAPE), torch.zeros(1, codec.latent_channels, *(s // codec.downsampling for s in SHAPE))
    encode_bounded(codec, x, floor)
    decode_bounded(codec, z, floor)
    with pytest.raises(UserError, match=r"0\.\d+ GiB is too small .* the least is 0\.\d+ GiB"):
        decode_bounded(codec, z, floor // 2)


@pytest.mark.usefixtures("no_margins")
def test_a_scratch_folder_that_cannot_be_used_is_a_clear_error(tmp_path: Path) -> None:
    codec = codec_of("vqgan")
    with pytest.raises(UserError, match=r"scratch folder .*missing"):
        encode_bounded(codec, torch.zeros(1, 1, *SHAPE), floor_bytes(codec, SHAPE), tmp_path / "missing")


@pytest.mark.usefixtures("no_margins")
def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(slabs.os, "pwrite", full)
    codec = codec_of("vqgan")
    with pytest.raises(UserError, match="No space left on device"):
        encode_bounded(codec, torch.zeros(1, 1, *SHAPE), floor_bytes(codec, SHAPE), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.linux
def test_the_process_stays_within_the_limit(tmp_path: Path) -> None:
    script = """
import sys, torch
from dataclasses import replace
from aldm.models.codecs import build_codec
from aldm.models.slabs import decode_bounded, encode_bounded, floor_bytes
from aldm.presets import tiny
def status(key):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
codec = build_codec(replace(tiny().codec, kind="vqgan", channels=(16, 8, 8))).eval()
x = torch.rand(1, 1, 96, 64, 64)
with torch.no_grad():
    codec.decode(codec.encode(x[..., :16, :16, :16]))
limit = int(1.3 * floor_bytes(codec, (96, 64, 64)))
torch.set_num_threads(1)
def whole():
    with torch.no_grad():
        return codec.decode(codec.encode(x))
for run in (
    lambda: encode_bounded(codec, x, limit, sys.argv[1]), lambda: decode_bounded(codec, z, limit, sys.argv[1]), whole
):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
    before = status("VmRSS")
    z = run()
    print(limit, status("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True)
    (limit, encode), (_, decode), (_, whole) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert encode <= limit
    assert decode <= limit
    assert whole > 1.8 * limit


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation, forward or backward, takes or returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, result)):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def gradients(codec: Codec, x: Tensor) -> list[Tensor]:
    """Latent, reconstruction and the gradients of a loss that weighs every voxel differently."""
    x = x.clone().requires_grad_()
    z = codec.encode(x)
    y = codec.decode_codes(z)
    wanted = [x, *codec.parameters()]
    return [z, y, *torch.autograd.grad((y * torch.linspace(0, 1, y.shape[-1]).to(y)).sum(), wanted)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "voxel-norm"])
def test_layers_in_slabs_have_the_gradients_of_the_plain_pass(kind: str, checkpointing: bool) -> None:
    codec = codec_of(kind).double()
    codec.activation_checkpointing = checkpointing
    x = torch.rand(2, 1, *SHAPE, dtype=torch.float64)
    with LargestTensor() as plain:
        expected = gradients(codec, x)
    codec.max_tensor_elements = 2 * x.numel() if kind == "haar" else plain.elements // 3
    if kind == "haar":
        codec.max_tensor_elements = x.numel()
    with LargestTensor() as cut:
        found = gradients(codec, x)
    assert cut.elements <= codec.max_tensor_elements
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)


def test_slabs_keep_the_precision_of_autocast() -> None:
    codec = codec_of("vqgan")
    x = torch.rand(1, 1, *SHAPE)
    with torch.autocast("cpu", torch.bfloat16):
        plain = codec.encode(x)
        codec.max_tensor_elements = 25_000
        cut = codec.encode(x)
    assert plain.dtype == cut.dtype == torch.bfloat16
    assert (plain.float() - cut.float()).abs().mean() < 0.01 * plain.float().abs().mean()


def test_a_layer_whose_single_row_is_too_large_is_refused() -> None:
    codec = codec_of("vqgan")
    codec.max_tensor_elements = 1000
    with pytest.raises(UserError, match="use a smaller crop or batch"):
        codec.encode(torch.zeros(1, 1, *SHAPE))


@pytest.mark.parametrize("kind", KINDS)
def test_windows_cover_what_the_whole_layer_reads(kind: str) -> None:
    codec = codec_of(kind)
    for passes in plan_passes(codec.encoder, 1, SHAPE) + plan_passes(codec.decoder, codec.latent_channels, (20, 8, 12)):
        for each in passes:
            whole = window(each.step, 0, each.out_sides[0], each.sides[0])
            assert (whole.start, whole.stop) == (0, each.sides[0])
            for rows in range(each.step.granularity, each.out_sides[0] + 1, each.step.granularity):
                need = window(each.step, 0, rows, each.sides[0])
                size = (need.stop - need.start + sum(need.pad)) * each.sides[1] * each.sides[2] * each.channels
                assert size <= each.input_elements(rows)


def test_rows_within_is_the_largest_that_fits() -> None:
    (passes,) = plan_passes([conv3(1, 2)], 1, (11, 4, 4))
    for most in range(12):
        assert rows_within(passes[0], lambda rows, most=most: rows <= most) == (most or None)


def test_merged_moments_are_those_of_the_whole() -> None:
    x = 1000.0 + torch.randn(2, 3, 50)
    parts = [
        (part.shape[2], part.mean(dim=2), part.var(dim=2, correction=0))
        for part in (x[..., :7], x[..., 7:30], x[..., 30:])
    ]
    mean, variance = merge_moments(parts)
    torch.testing.assert_close(mean, x.double().mean(dim=2), rtol=1e-6, atol=0)
    torch.testing.assert_close(variance, x.double().var(dim=2, correction=0), rtol=1e-3, atol=0)
