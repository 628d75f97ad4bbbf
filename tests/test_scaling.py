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

Rows = dict[tuple[str, str], Any]


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


@pytest.fixture(scope="module")
def rows(scaling: ModuleType) -> Rows:
    """The planner's rows on the page, by training and recomputing."""
    found, _ = scaling.read((DOCS / "scaling.md").read_text(encoding="utf-8"))
    return {(row.training, row.recomputing): row for row in found}


def test_the_page_is_what_the_script_writes_from_its_planned_rows(scaling: ModuleType) -> None:
    text = (DOCS / "scaling.md").read_text(encoding="utf-8")
    planned, measured = scaling.read(text)
    assert len(planned) == 2 * len(scaling.configs())
    assert scaling.page(planned, measured) == text, "docs/scaling.md is not of this code: run python docs/scaling.py"


@pytest.mark.parametrize("training", ["vqgan, crops", "ms-spade", "diffusion"])
def test_a_row_of_the_page_is_what_the_planner_says(scaling: ModuleType, rows: Rows, training: str) -> None:
    """The quickest row of each stage: planning everything takes half a minute."""
    assert scaling.need(training, True) == rows[training, "yes"], "run python docs/scaling.py"


def test_every_row_is_of_its_preset_s_shape(scaling: ModuleType, rows: Rows) -> None:
    wanted = {(name, again): scaling.voxels(name) for name in scaling.configs() for again in ("no", "yes")}
    assert {key: row.voxels for key, row in rows.items()} == wanted


def test_without_sharding_the_memory_is_the_planner_s(scaling: ModuleType, rows: Rows) -> None:
    for row in rows.values():
        assert scaling.memory_mib(row, 0, 512) == row.peak
        assert [scaling.memory_mib(row, stage, 1) for stage in (1, 2, 3)] == [row.peak] * 3
        assert scaling.memory_mib(row, 0, 8, batch=3) == row.peak + 2 * row.kept


@pytest.mark.parametrize("gpus", [8, 64, 512])
def test_what_a_stage_spares_is_all_but_a_gpu_s_part(scaling: ModuleType, rows: Rows, gpus: int) -> None:
    """(N - 1) / N of Adam's moments, then of the gradients, then of the trained weights."""
    row = rows["vqgan, crops", "no"]
    spared = [-after + before for before, after in pairwise(scaling.memory_mib(row, s, gpus) for s in range(4))]
    wholes = [part * gpus / (gpus - 1) for part in spared]
    assert wholes == pytest.approx([row.optimizer, row.gradients, row.trained / scaling.MIB])


def test_no_stage_needs_less_than_what_nobody_shards(scaling: ModuleType, rows: Rows) -> None:
    for row in rows.values():
        frozen = row.weights - row.trained / scaling.MIB
        assert scaling.memory_mib(row, 3, 10**9) >= frozen + row.average + row.kept - 1


@pytest.mark.parametrize("gpus", [2, 8, 512])
def test_bytes_on_the_wire_are_those_of_rings(scaling: ModuleType, rows: Rows, gpus: int) -> None:
    """In passes of a ring over the weights: an all-reduce is two, a gather or a scatter one.

    tests/benchmarks/scaling.py counts those of ddp and deepspeed-N in trainings.
    """
    row = replace(rows["diffusion", "no"], low=0)
    once = row.trained * (gpus - 1) / gpus
    for engine, passes in {"ddp": 2, "zero-1": 2, "deepspeed-1": 3, "zero-3": 3, "deepspeed-3": 3}.items():
        assert scaling.wire_bytes(row, engine, gpus) == pytest.approx(passes * once), engine
    assert scaling.wire_bytes(replace(row, average=0), "deepspeed-3", gpus) == pytest.approx(2 * once)
    assert scaling.wire_bytes(row, "ddp", 1) == 0


def test_a_step_lies_between_its_bounds(scaling: ModuleType, rows: Rows) -> None:
    row = rows["diffusion", "no"]
    compute, send = scaling.compute_s(row), scaling.send_s(row, 64, scaling.ETHERNET)
    assert compute < send
    assert scaling.step_s(row, 64, scaling.ETHERNET) == (send, compute + send)
    assert scaling.step_s(row, 64, scaling.NETWORK)[0] == compute
    assert scaling.step_s(row, 1, scaling.ETHERNET) == (compute, compute)


@pytest.mark.parametrize("stage", ["vqgan", "diffusion"])
def test_what_goes_in_bf16_is_what_deepspeed_marks(scaling: ModuleType, stage: str) -> None:
    from deepspeed.runtime import torch_autocast
    from torch import bfloat16, nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    from aldm import planner
    from aldm.presets import brats

    config = planner.with_modalities(brats())
    with FakeTensorMode():
        built, *_ = planner.stage_and_batch(config, stage, planner.training_of(config, stage), {})
    networks = nn.ModuleList([player.module for player in built.players])
    engine = SimpleNamespace(module=networks, zero_quantized_weights=lambda: False)
    with pytest.MonkeyPatch.context() as patch:  # DeepSpeed notes in globals that autocast is on
        patch.setattr(torch_autocast, "TORCH_AUTOCAST_INITIALIZED", False)
        patch.setattr(torch_autocast, "TORCH_AUTOCAST_DTYPE", None)
        torch_autocast.init_autocast_params(engine, bfloat16, None)
    low = sum(p.numel() for p in networks.parameters() if torch_autocast.get_comm_dtype(p) == bfloat16)
    assert low == scaling.low_parameters(config, stage)
    assert 0 < low < 0.1 * sum(p.numel() for p in networks.parameters()), "the page says: a few"


def test_the_settings_that_the_page_names_are_those_of_the_engine(scaling: ModuleType, rows: Rows) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from pipelines.distributed_engines import DeepSpeedEngine

    engine = object.__new__(DeepSpeedEngine)  # without a process group
    engine._batch_size, engine.world_size, engine._precision, engine._zero_stage = 8, 8, "bf16", 3
    player: Any = SimpleNamespace(config=SimpleNamespace(gradient_clip=1.0))
    settings = DeepSpeedZeroConfig(**engine._config(player)["zero_optimization"])
    assert settings.reduce_bucket_size == scaling.BUCKET
    assert settings.use_multi_rank_bucket_allreduce
    assert settings.max_reuse_distance == 1e9 > max(row.trained for row in rows.values()) / 4
