"""The numbers of docs/scaling.md are those of the planner and of its formulas."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    """The script that writes the page."""
    spec = importlib.util.spec_from_file_location("scaling_page", DOCS / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes_from_its_planned_rows(scaling: ModuleType) -> None:
    text = (DOCS / "scaling.md").read_text(encoding="utf-8")
    rows, measured = scaling.read(text)
    assert len(rows) == 2 * len(scaling.configs())
    assert scaling.page(rows, measured) == text


def test_a_row_of_the_page_is_what_the_planner_says(scaling: ModuleType) -> None:
    rows, _ = scaling.read((DOCS / "scaling.md").read_text(encoding="utf-8"))
    assert scaling.need("ms-spade", True) == next(
        r for r in rows if r.training == "ms-spade" and r.recomputing == "yes"
    )


@pytest.mark.parametrize("gpus", [8, 512])
def test_the_formulas_shard_what_zero_shards(scaling: ModuleType, gpus: int) -> None:
    rows, _ = scaling.read((DOCS / "scaling.md").read_text(encoding="utf-8"))
    row = next(r for r in rows if r.training == "vqgan, crops" and r.recomputing == "no")
    of = [scaling.memory_mib(row, stage, gpus) for stage in range(4)]
    rest = 1 - 1 / gpus
    assert of[0] - of[1] == pytest.approx(row.optimizer * rest)
    assert of[0] > of[1] > of[2] > of[3]
    assert of[0] == row.peak
    assert scaling.wire_bytes(row, "ddp", gpus) == pytest.approx(2 * rest * row.trained)
