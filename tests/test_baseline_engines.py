"""The comparison methods on the platform: every engine computes the same training, however many workers share it."""

from typing import Any

import numpy as np
import pytest
from engine_curves import assert_same, losses, run_on

from aldm.data.store import VolumeStore

pytestmark = pytest.mark.timeout(1500)  # the first test waits for all trainings of the file

TRAINING = {
    "batch_size": 2,
    "max_steps": 2,
    "log_every": 1,
    "validate_every": 2,
    "num_validation_samples": 2,
    "checkpoint_every": 2,
}
METHODS = ("pix2pix", "cyclegan-3d", "nicegan", "reggan")
"""One of each kind: batch norms, image pools and three players, shared encoders, a field. Engines know no more."""
OF_ITS_OWN = ("pix2pix", "cyclegan-3d")
"""Batch norms see a share of the batch, and image pools are kept, by each worker: two train otherwise than one, but the
two have the same parameters all the same, since every step is one of the mean of their gradients."""


@pytest.fixture(scope="module")
def trained(
    ixi_store: VolumeStore, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str, str], dict[str, Any]]:
    """Trainings by (number of workers, method, engine)."""
    folder = tmp_path_factory.mktemp("methods")
    inputs = {"store": str(ixi_store.path)}

    def run(number: int, engines: tuple[str, ...]) -> dict[tuple[int, str, str], dict[str, Any]]:
        tasks = {}
        for method in METHODS:
            for engine in engines:
                own = folder / str(number) / method / engine
                task = {"stage": method, "engine": engine, "inputs": inputs, "training": TRAINING, "folder": str(own)}
                tasks[number, method, engine] = task
        return dict(zip(tasks, run_on(number, list(tasks.values())), strict=True))

    return run(1, ("plain", "ddp")) | run(2, ("ddp", "zero-2"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_worker_computes_what_one_process_computes(trained: Any, method: str) -> None:
    assert_same(losses(trained[1, method, "ddp"]), losses(trained[1, method, "plain"]), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_workers_compute_what_one_process_computes(trained: Any, method: str) -> None:
    first, second = trained[2, method, "ddp"]["parameters"]
    assert first == second
    if method not in OF_ITS_OWN:
        assert_same(losses(trained[2, method, "ddp"]), losses(trained[1, method, "plain"]), 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_sharded_states_compute_what_ddp_computes(trained: Any, method: str) -> None:
    run, ddp = trained[2, method, "zero-2"], trained[2, method, "ddp"]
    assert_same(losses(run), losses(ddp), 1e-4)
    assert run["weights"].keys() == ddp["weights"].keys()
    for name, weight in ddp["weights"].items():
        if not name.endswith("bias"):  # before an instance norm its gradient is rounding, which Adam takes for a sign
            difference = np.linalg.norm(run["weights"][name] - weight)
            assert difference < 1e-2 * np.linalg.norm(weight), name
