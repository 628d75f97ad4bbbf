"""What all tests share: their environment, the groups that run together, small simulated data sets, one service."""

import os

SETTINGS_OF_THE_USER = ("MLFLOW_", "RAY_", "AWS_", "ALDM_")
for _name in [name for name in os.environ if name.startswith(SETTINGS_OF_THE_USER)]:
    del os.environ[_name]  # whoever runs the tests has servers, buckets and clusters that are not theirs to write to
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same tests on every machine; tests/gpu/ is not run by pytest
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is loaded: before every import below
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# ruff: noqa: E402
import contextlib
import json
import logging
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from service import RunningService
from untrained import save_untrained

from aldm import cli
from aldm.data.phantom import write_phantom
from aldm.data.preparing import prepare_store
from aldm.data.store import VolumeStore
from aldm.presets import tiny

CARD_ROW = {"method": "aldm", "sampler": "ddim", "num_inference_steps": 4, "region": "brain", "psnr_db": 21.5}
CARD_ROW |= {"nmse": 0.125, "ssim": 0.75, "seconds": 0.25}
"""What the session's service says of its model's quality."""
NUM_SUBJECTS = 9
"""The fewest simulated subjects whose names put one in each split, in both layouts."""
SPACING_MM = 8.0


settings.register_profile("fixed", derandomize=True)  # --hypothesis-profile=default draws new examples


def pytest_configure(config: pytest.Config) -> None:
    """Give the tests' Ray session a token before anything imports Ray.

    Ctrl-C is heard even where a shell that runs the tests in the background has it ignored: tests send it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("fixed")
    from pipelines.ray_session import own_token

    token = own_token()
    token.__enter__()
    config.add_cleanup(lambda: token.__exit__(None, None, None))


KINDS = {
    "ray_cluster": "ray",
    "head": "ray",
    "service": "service",
    "closed": "service",
    "browser": "browser",
    "pod": "image",
    "image": "image",
}
"""Fixture -> the mark of what needs it: a contributor leaves out what their machine lacks, -m "not browser"."""
SHARED = {"service": "service", "ray_cluster": "ray"}
"""Fixture of the whole session -> the group of tests that --dist loadgroup runs in one process: it starts once."""
OPEN: dict[str, contextlib.ExitStack] = {}
"""Group -> what its fixture has opened."""
LONGEST_VALUE_IN_A_NAME = 100


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by kind; keep together what shares something, a file by default, the longest groups first.

    These are the groups of a shared fixture, then the files with slow tests: no long one is left alone at the end.
    """
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        for kind in {KINDS[name] for name in fixtures if name in KINDS}:
            item.add_marker(kind)
        if item.get_closest_marker("xdist_group") is None:
            shared = [SHARED[name] for name in SHARED if name in fixtures]
            item.add_marker(pytest.mark.xdist_group([*shared, item.path.stem][0]))
    if sys.platform != "linux":
        for item in items:
            if any(item.get_closest_marker(kind) for kind in ("linux", "ray", "service")):
                item.add_marker(pytest.mark.skip(reason="needs Linux: it looks into /proc"))
    # the order is kept otherwise; what kills the service comes after all else that uses it
    groups = list(SHARED.values())
    place = {_group(item): len(groups) for item in items if item.get_closest_marker("slow")}
    place |= {group: groups.index(group) for group in groups}
    items.sort(key=lambda item: (place.get(_group(item), len(groups) + 1), item.path.stem == "test_serve_faults"))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End what a group shares after its last test: a service and a Ray session take processor time while they idle."""
    if nextitem is not None and _group(nextitem) != _group(item):
        OPEN.pop(_group(item), contextlib.ExitStack()).close()


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name a long text or file after its argument: two processes that make it themselves agree on the test's name."""
    return argname if isinstance(val, str | bytes) and len(val) > LONGEST_VALUE_IN_A_NAME else None


def _group(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    assert mark is not None
    return str(mark.args[0])


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Draw the same numbers in every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Leave no job's --log-level to the tests after it."""
    root, ours = logging.getLogger(), [logging.getLogger(name) for name in ("aldm", "pipelines", "serve", "tune")]
    handlers, levels = list(root.handlers), [logger.level for logger in (root, *ours)]
    yield
    root.handlers[:] = handlers
    for logger, level in zip((root, *ours), levels, strict=True):
        logger.setLevel(level)


@pytest.fixture(scope="session")
def brats_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated subjects as a BraTS tree at 8 mm: t1, t1ce, t2, flair and seg. Read it only."""
    folder = tmp_path_factory.mktemp("phantom") / "brats"
    write_phantom(folder, "brats", NUM_SUBJECTS, seed=0, spacing_mm=SPACING_MM)
    return folder


@pytest.fixture(scope="session")
def ixi_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated subjects as an IXI tree at 8 mm: t1 on one grid, t2 and pd on another. Read it only."""
    folder = tmp_path_factory.mktemp("phantom") / "ixi"
    write_phantom(folder, "ixi", NUM_SUBJECTS, seed=0, spacing_mm=SPACING_MM)
    return folder


@pytest.fixture(scope="session")
def brats_store(brats_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    """The store that the tiny preset makes of `brats_tree`. Read it only."""
    return _prepared(brats_tree, "brats", tmp_path_factory.mktemp("store") / "brats")


@pytest.fixture(scope="session")
def ixi_store(ixi_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    """The store that the tiny preset makes of `ixi_tree`. Read it only."""
    return _prepared(ixi_tree, "ixi", tmp_path_factory.mktemp("store") / "ixi")


def _warned(message: str, *values: object) -> None:
    """Let pytest count a start of Ray that had to be tried again: its summary of warnings names it."""
    warnings.warn(message % values, stacklevel=2)


@pytest.fixture(scope="session")
def haar_latents(brats_store: VolumeStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lossless codec's latents of `brats_store`, as `aldm encode` writes them. Read them only."""
    out = tmp_path_factory.mktemp("latents") / "haar"
    words = ["encode", "--store", str(brats_store.path), "--codec", "haar", "--out", str(out)]
    assert cli.main([*words, "--preset", "tiny", "--device", "cpu", "--log-level", "warning"]) == 0
    return out


@pytest.fixture(scope="session")
def stage_2(haar_latents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an MS-SPADE network of the tiny preset, trained on `haar_latents`. Read it only."""
    out = tmp_path_factory.mktemp("runs") / "ms-spade"
    words = ["train", "ms-spade", "--latents", str(haar_latents), "--run-dir", str(out), "--preset", "tiny"]
    words += ["--device", "cpu", "--log-level", "warning", "--engine", "plain", "--no-tracking"]
    assert cli.main(words) == 0
    return out


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray session of 4 logical CPUs for the whole test run; the jobs find and use it."""
    import ray

    from pipelines.ray_session import start_ray, worker_environment

    with contextlib.ExitStack() as stack:
        OPEN["ray"] = stack
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setattr("pipelines.ray_session.logger.warning", _warned)
        start_ray(
            num_cpus=4,
            object_store_memory=2**28,
            logging_level="warning",
            log_to_driver=False,
            runtime_env={"env_vars": worker_environment() | {"OMP_NUM_THREADS": "1"}},
        )
        stack.callback(ray.shutdown)
        yield


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """One translation service for the whole test run: an untrained tiny() for t1, t2 and pd (all unlike its own)."""
    folder = tmp_path_factory.mktemp("service")
    diffusion = replace(tiny().diffusion, num_train_timesteps=1000)  # so that a job can be made to last
    model = save_untrained(folder / "model", diffusion=diffusion, limits={"pd": 1e-3})
    (model / "card.json").write_text(json.dumps([CARD_ROW]))
    with contextlib.ExitStack() as stack:
        OPEN["service"] = stack
        yield stack.enter_context(RunningService(model, folder / "work", "--max-upload-mb", "64"))


def _prepared(tree: Path, layout: str, out: Path) -> VolumeStore:
    return prepare_store(tree, out, layout=layout, config=tiny().preprocess, num_processes=1)
