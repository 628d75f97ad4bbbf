"""Every engine computes the same training, however many workers share it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_curves import assert_same, curve, losses, run_on
from processor import HAS_BF16, needs_bf16
from safetensors.torch import save_file

from aldm.data.store import VolumeStore
from aldm.errors import UserError
from aldm.presets import tiny
from pipelines.sharded_states import States
from pipelines.train import main as train_job

pytestmark = pytest.mark.timeout(1500)  # the first test waits for all trainings of the file

TRAINING = {
    "batch_size": 6,
    "max_steps": 4,
    "log_every": 1,
    "validate_every": 2,
    "num_validation_samples": 3,
    "checkpoint_every": 2,
    "ema_decay": 0.9,
}
STAGES = ("vqgan", "diffusion")
"""Two players and one."""
RESUMED = ("ddp", "zero-2", "zero-3")
BF16 = ("ddp", "zero-2", "zero-3")
"""Zero stages 1 and 2 are one optimizer of DeepSpeed; 1 is compared in fp32."""


@pytest.fixture(scope="module")
def inputs(brats_store: VolumeStore, haar_latents: Path, stage_2: Path) -> dict[str, dict[str, str]]:
    """The paths that each stage is built from."""
    return {
        "vqgan": {"store": str(brats_store.path)},
        "diffusion": {"latents": str(haar_latents), "ms_spade": str(stage_2)},
    }


Trained = dict[tuple[str, str, str], dict[str, Any]]
"""Trainings by (number of workers, stage, engine); those marked + go on from step 2 of two workers."""


def tasks_of(
    inputs: dict[str, dict[str, str]],
    folder: Path,
    workers: str,
    engines: tuple[str, ...],
    stages: tuple[str, ...] = STAGES,
    **changes: Any,
) -> dict[tuple[str, str, str], dict[str, Any]]:
    """What is trained, as `engine_curves.curve` takes it."""
    planned = {}
    for stage in stages:
        for engine in engines:
            task = {"stage": stage, "engine": engine, "inputs": inputs[stage], "training": TRAINING}
            planned[workers, stage, engine] = task | {"folder": str(folder / workers / stage / engine)} | changes
    return planned


def run(number: int, planned: dict[tuple[str, str, str], dict[str, Any]]) -> Trained:
    return dict(zip(planned, run_on(number, list(planned.values())), strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def pair(inputs: dict[str, dict[str, str]], folder: Path) -> Trained:
    """Stage 3 by two workers, and by this process."""
    diffusion = ("diffusion",)
    (plain,) = tasks_of(inputs, folder, "1", ("plain",), diffusion).values()
    return run(2, tasks_of(inputs, folder, "2", ("ddp", "zero-2"), diffusion)) | {
        ("1", "diffusion", "plain"): curve(**plain)
    }


@pytest.fixture(scope="module")
def trained(pair: Trained, inputs: dict[str, dict[str, str]], folder: Path) -> Trained:
    """All other trainings too, in three groups of workers."""

    def tasks(workers: str, engines: tuple[str, ...], *stages: str, **changes: Any) -> dict[Any, dict[str, Any]]:
        return tasks_of(inputs, folder, workers, engines, stages or STAGES, **changes)

    def going_on(workers: str, engines: tuple[str, ...]) -> dict[Any, dict[str, Any]]:
        return {
            key: task | {"resume": str(folder / "2" / task["stage"] / task["engine"] / "2")}
            for key, task in tasks(workers, engines).items()
        }

    two = (
        tasks("2", ("ddp", "zero-0", "zero-1", "zero-2", "zero-3"), "vqgan")
        | tasks("2", ("zero-0", "zero-1", "zero-3"), "diffusion")
        | tasks("poisoned", ("ddp",), "diffusion", poisoned_rank=1)
        | tasks("poisoned", ("zero-2",), "vqgan", poisoned_rank=1)
    )
    found = pair | run(2, two)
    one = (
        tasks("1", ("plain",), "vqgan")
        | tasks("1", ("ddp", "zero-1"))
        | going_on("1+", RESUMED)
        | (tasks("bf16", ("plain", *BF16), "diffusion", precision="bf16") if HAS_BF16 else {})
    )
    found |= run(1, one)
    return found | run(3, going_on("3+", ("ddp", "zero-2")))


@pytest.mark.slow
@pytest.mark.smoke
def test_two_workers_compute_what_one_process_computes(pair: Trained) -> None:
    """Stage 3; in stage 1 the workers draw other vectors for the first codes."""
    wanted = losses(pair["1", "diffusion", "plain"])
    for engine in ("ddp", "zero-2"):
        assert_same(losses(pair["2", "diffusion", engine]), wanted, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", ["ddp", "zero-1"])
def test_one_worker_computes_what_one_process_computes(trained: Trained, stage: str, engine: str) -> None:
    assert_same(losses(trained["1", stage, engine]), losses(trained["1", stage, "plain"]), 1e-5)


@pytest.mark.slow
@needs_bf16
@pytest.mark.parametrize("engine", BF16)
def test_one_worker_in_bf16_computes_what_one_process_computes(trained: Trained, engine: str) -> None:
    run, plain = trained["bf16", "diffusion", engine], trained["bf16", "diffusion", "plain"]
    assert_same(losses(run), losses(plain), 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_zero_stage_computes_what_ddp_computes(trained: Trained, stage: str, zero_stage: int) -> None:
    run, ddp = trained["2", stage, f"zero-{zero_stage}"], trained["2", stage, "ddp"]
    assert_same(losses(run), losses(ddp), 1e-5)
    assert run["weights"].keys() == ddp["weights"].keys()
    for name, wanted in ddp["weights"].items():
        # DeepSpeed's weights lie in another order in memory (pipelines/distributed_engines.py), so sums round otherwise
        np.testing.assert_allclose(run["weights"][name], wanted, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("workers", "engine"), [*(("1+", engine) for engine in RESUMED), ("3+", "ddp"), ("3+", "zero-2")]
)
def test_a_run_of_two_workers_goes_on_with_one_and_with_three(
    trained: Trained, stage: str, engine: str, workers: str
) -> None:
    """The same global batch at the same weights: the losses of having gone on with two."""
    got, wanted = trained[workers, stage, engine], trained["2", stage, engine]
    assert got["log"][0]["step"] == 3, "it started over"
    first = {name: values[:1] for name, values in losses(got, after=2).items()}
    assert_same(first, {name: values[:1] for name, values in losses(wanted, after=2).items()}, 1e-4)
    for name, values in wanted["weights"].items():
        np.testing.assert_allclose(got["weights"][name], values, rtol=1e-2, atol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero-0", "zero-1", "zero-2", "zero-3"])
def test_the_codebook_is_the_same_on_every_rank(trained: Trained, engine: str) -> None:
    ranks = trained["2", "vqgan", engine]["codebooks"]
    assert len(ranks) == 2
    assert ranks[0] is not None
    assert len(set(ranks)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "engine"), [("vqgan", "zero-2"), ("diffusion", "ddp")])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_step(
    trained: Trained, stage: str, engine: str
) -> None:
    stopped = trained["poisoned", stage, engine]
    assert len(stopped["refused"]) == 2
    assert len(set(stopped["refused"])) == 1
    assert stopped["poisoned"][0] == []
    subjects = ", ".join(stopped["poisoned"][1])
    assert f"is nan at step 3 of {stage}, on subject {subjects};" in stopped["refused"][0]
    two_steps = [record for record in trained["2", stage, engine]["log"] if record["step"] <= 2]
    assert losses(stopped) == losses({"log": two_steps})


def test_states_that_a_larger_group_has_left_are_not_read(tmp_path: Path) -> None:
    """Two workers died while they wrote a step, one worker has written it again into the same folder."""
    for rank, value in enumerate((1.0, 0.0)):
        save_file({"a|weight": torch.full((2,), value)}, tmp_path / f"states-net-{rank:05d}.safetensors")
    (tmp_path / "deepspeed.json").write_text(json.dumps({"world_size": 1, "steps": {"net": 1}}))
    assert States(tmp_path, "net").tensor("a", "weight").tolist() == [1.0, 1.0]
    (tmp_path / "states-net-00000.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks states-net-00000\.safetensors"):
        States(tmp_path, "net")


def test_deepspeed_in_bf16_without_sharding_is_refused(inputs: dict[str, dict[str, str]], tmp_path: Path) -> None:
    arguments = ["vqgan", "--store", inputs["vqgan"]["store"], "--run-dir", str(tmp_path / "run"), "--preset", "tiny"]
    with pytest.raises(UserError, match=r"--zero-stage 0 and bf16 diverges silently"):
        train_job([*arguments, "--engine", "deepspeed", "--zero-stage", "0", "--precision", "bf16"])
    assert not (tmp_path / "run").exists()


def test_the_batch_of_the_engines_tests_is_shared_by_one_two_and_three() -> None:
    assert all(TRAINING["batch_size"] % number == 0 for number in (1, 2, 3))
    assert tiny().train_vqgan.adversarial_start_step < TRAINING["max_steps"]
