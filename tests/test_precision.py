"""What a processor cannot do at speed is not asked of it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from untrained import save_untrained

from aldm.engine import PlainEngine
from aldm.precision import arithmetic, usable_precision
from aldm.translate import Translator


@pytest.fixture
def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aldm.precision._cpu_has_bf16", lambda: False)


@pytest.mark.usefixtures("without_bf16")
@pytest.mark.parametrize(
    ("precision", "device", "usable"),
    [("bf16", "cpu", "fp32"), ("fp32", "cpu", "fp32"), ("bf16", "cuda", "bf16"), ("fp32", "cuda", "fp32")],
)
def test_a_cpu_without_the_instructions_computes_in_fp32(precision: str, device: str, usable: str) -> None:
    assert usable_precision(precision, device) == usable


def test_a_cpu_with_them_computes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aldm.precision._cpu_has_bf16", lambda: True)
    assert usable_precision("bf16", torch.device("cpu")) == "bf16"


@pytest.mark.usefixtures("without_bf16")
def test_a_loaded_model_computes_in_fp32_there(tmp_path: Path) -> None:
    model = Translator.load(save_untrained(tmp_path / "model"), precision="bf16")
    with model.predictor.autocast():
        x = torch.ones(1, 1, 4, 4, 4)
        assert torch.nn.functional.conv3d(x, torch.ones(1, 1, 3, 3, 3)).dtype == torch.float32


@pytest.fixture
def tf32_flags() -> Iterator[Callable[[], tuple[bool, bool]]]:
    """Reads what a GPU may round, convolutions and products, from another setting than any precision asks for."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    yield lambda: (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("tf32", True), ("bf16", False)])
def test_only_tf32_lets_a_gpu_round_to_it(
    precision: str, allowed: bool, tf32_flags: Callable[[], tuple[bool, bool]]
) -> None:
    for use in (lambda: arithmetic(precision, "cpu"), PlainEngine("cpu", precision).autocast):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not allowed
        with use():
            assert tf32_flags() == (allowed, allowed)
        assert tf32_flags() == (allowed, allowed)  # the backward pass comes after


def test_a_translation_computes_in_its_models_precision(
    tmp_path: Path, tf32_flags: Callable[[], tuple[bool, bool]]
) -> None:
    model = Translator.load(save_untrained(tmp_path / "model"), precision="tf32")
    with model.predictor.autocast(enabled=False):
        assert tf32_flags() == (True, True)
    other = Translator.load(tmp_path / "model", precision="fp32")
    with other.predictor.autocast():
        assert tf32_flags() == (False, False)
