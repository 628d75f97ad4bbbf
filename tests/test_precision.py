"""What a processor cannot do at speed is not asked of it."""

from pathlib import Path

import pytest
import torch
from untrained import save_untrained

from aldm.precision import usable_precision
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
