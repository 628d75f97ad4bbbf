"""The numbers of docs/scaling.md are those of the planner and of its formulas, its settings those of DeepSpeed."""

import importlib.util
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "scaling.md").read_text(encoding="utf-8")
QUICK = [(training, True) for training in ("vqgan, crops", "ms-spade", "diffusion")]
"""The quickest row of each stage: planning everything takes half a minute."""
TRAININGS = ("vqgan, crops", "ms-spade", "diffusion", "vqgan, whole", "IXI: diffusion", "IXI: vqgan, whole")
SLOW = [pair for training in TRAININGS for pair in ((training, False), (training, True)) if pair not in QUICK]


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    """The script that prints the table."""
    spec = importlib.util.spec_from_file_location("scaling_page", DOCS / "scaling.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def steps(scaling: ModuleType) -> dict[str, Any]:
    """The planner's word on the quickest row of each stage, by training."""
    return {training: scaling.need(training, recomputing) for training, recomputing in QUICK}


@pytest.mark.parametrize(
    ("training", "recomputing"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]
)
def test_a_row_of_the_page_is_what_the_planner_says(scaling: ModuleType, training: str, recomputing: bool) -> None:
    assert scaling.row(training, recomputing) in PAGE, "run python docs/scaling.py and paste its table"


def test_every_training_has_its_rows_and_every_column_its_name(scaling: ModuleType) -> None:
    assert tuple(scaling.configs()) == TRAININGS
    assert f"| {' | '.join(scaling.COLUMNS)} |\n" in PAGE
    assert [PAGE.count(f"| {training} | ") for training in TRAININGS] == [2] * len(TRAININGS)


def test_without_sharding_the_memory_is_the_planner_s(scaling: ModuleType, steps: dict[str, Any]) -> None:
    for step in steps.values():
        assert scaling.memory_bytes(step, 0, 512) == step.peak
        assert [scaling.memory_bytes(step, stage, 1) for stage in (1, 2, 3)] == [step.peak] * 3


@pytest.mark.parametrize("gpus", [8, 64, 512])
def test_what_a_stage_spares_is_all_but_a_gpu_s_part(scaling: ModuleType, steps: dict[str, Any], gpus: int) -> None:
    """(N - 1) / N of Adam's moments, then of the gradients, then of the trained weights."""
    step = steps["vqgan, crops"]
    spared = [-after + before for before, after in pairwise(scaling.memory_bytes(step, s, gpus) for s in range(4))]
    wholes = [part * gpus / (gpus - 1) for part in spared]
    assert wholes == pytest.approx([step.optimizer, step.gradients, step.trained])


def test_no_stage_needs_less_than_what_nobody_shards(scaling: ModuleType, steps: dict[str, Any]) -> None:
    for step in steps.values():
        frozen = step.weights - step.trained
        assert scaling.memory_bytes(step, 3, 10**9) >= frozen + step.average + step.kept - 1


@pytest.mark.parametrize("gpus", [2, 8, 512])
def test_bytes_on_the_wire_are_those_of_rings(scaling: ModuleType, steps: dict[str, Any], gpus: int) -> None:
    """In passes of a ring over the weights: an all-reduce is two, a gather or a scatter one.

    tests/benchmarks/scaling.py counts those of DDP and of every stage in trainings.
    """
    step = steps["diffusion"]
    once = step.trained * (gpus - 1) / gpus
    for stage, passes in enumerate((2, 3, 3, 3)):
        assert scaling.wire_bytes(step, stage, gpus) == pytest.approx(passes * once), stage
    assert scaling.wire_bytes(replace(step, average=0), 3, gpus) == pytest.approx(2 * once)
    assert scaling.wire_bytes(step, 0, 1) == 0


def test_a_slow_network_sends_longer_than_a_gpu_computes(scaling: ModuleType, steps: dict[str, Any]) -> None:
    step = steps["diffusion"]
    compute, send = scaling.compute_s(step), scaling.send_s(step, 64, scaling.ETHERNET)
    assert scaling.send_s(step, 64, scaling.NETWORK) < compute < send
    assert scaling.send_s(step, 8, scaling.ETHERNET) == scaling.send_s(step, 8, scaling.NETWORK) < compute
    assert scaling.send_s(step, 1, scaling.ETHERNET) == 0


def test_the_settings_that_the_page_names_are_those_of_the_engine(steps: dict[str, Any]) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from pipelines.distributed_engines import DeepSpeedEngine

    engine = object.__new__(DeepSpeedEngine)  # without a process group
    engine._batch_size, engine.world_size, engine._precision, engine._zero_stage = 8, 8, "bf16", 3
    player: Any = SimpleNamespace(config=SimpleNamespace(gradient_clip=1.0))
    settings = DeepSpeedZeroConfig(**engine._config(player)["zero_optimization"])
    assert settings.reduce_bucket_size == 500_000_000
    assert "buckets of 500 M" in PAGE
    assert settings.use_multi_rank_bucket_allreduce
    assert settings.max_reuse_distance == 1e9 > max(step.trained for step in steps.values()) / 4
