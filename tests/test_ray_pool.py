"""Jobs on the workers of a Ray cluster: the bytes of one process, and ends that leave nothing half done."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import content, refused, run
from untrained import save_untrained

from aldm import cli
from aldm.checkpoint import save_checkpoint
from aldm.config import CodecConfig
from aldm.data.store import SHARD_FOLDER, VolumeStore, shard_path
from aldm.errors import UserError
from aldm.latents import encode_store
from aldm.models.codecs import build_codec
from aldm.presets import tiny
from pipelines.ray_pool import RayWorkers

TINY = ("--preset", "tiny", "--device", "cpu", "--log-level", "warning")
TWO = ("--num-workers", 2)
HAAR = CodecConfig(kind="haar", haar_levels=1)


@pytest.fixture(scope="module", autouse=True)
def by_value(ray_cluster: None) -> None:
    """Workers cannot import this module, so its functions are sent with their code."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def workers() -> Iterator[RayWorkers]:
    with RayWorkers(2, num_threads=3) as pool:
        yield pool


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec with fresh weights, as a run of stage 1 leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "codec"
    torch.manual_seed(0)
    weights = build_codec(tiny().codec).state_dict()
    save_checkpoint(folder, kind="codec", config=tiny(), weights=weights, meta={})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("models") / "model")


def prepare(source: Path, store: Path, *flags: object) -> tuple[object, ...]:
    return "prepare", source, store, "--layout", "brats", *TINY, *flags


def encode(store: VolumeStore, out: Path, *flags: object) -> tuple[object, ...]:
    return "encode", "--store", store.path, "--out", out, *TINY, *flags


def evaluate(store: VolumeStore, model: Path, out: Path, *flags: object) -> tuple[object, ...]:
    words = ("--store", store.path, "--model", model, "--out", out, "--split", "train", "--max-subjects", 2)
    return "evaluate", *words, "--device", "cpu", "--log-level", "warning", *flags


# ------------------------------------------------------------------------------------------------------ the same bytes


@pytest.mark.slow
def test_prepare_writes_the_bytes_of_one_process(brats_tree: Path, brats_store: VolumeStore, tmp_path: Path) -> None:
    assert run(*prepare(brats_tree, tmp_path / "store", *TWO)) == 0
    assert content(tmp_path / "store") == content(brats_store.path)


def test_prepare_goes_on_where_processes_of_one_machine_stopped(
    brats_tree: Path, brats_store: VolumeStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = shutil.copytree(brats_store.path, tmp_path / "store")
    (store / "manifest.parquet").unlink()
    gone, kept = (shard_path(store, brats_store.subjects()[index].subject_id) for index in (0, 1))
    gone.unlink()
    (store / SHARD_FOLDER / ".tmp-1-2-S.arrow").write_bytes(b"left behind by a killed run")
    written = kept.stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)  # workers have another working folder
    assert run(*prepare(Path(os.path.relpath(brats_tree)), Path("store"), *TWO)) == 0
    assert content(store) == content(brats_store.path)
    assert kept.stat().st_mtime_ns == written


def test_encode_writes_the_bytes_of_one_process(
    brats_store: VolumeStore, codec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store, flags = VolumeStore.open(os.path.relpath(brats_store.path)), ("--codec", os.path.relpath(codec), "--flips")
    assert run(*encode(store, Path("one"), *flags)) == 0
    assert run(*encode(store, Path("two"), *flags, *TWO)) == 0
    assert content(Path("two")) == content(Path("one"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.slow
def test_evaluate_writes_the_bytes_of_one_process(
    ixi_store: VolumeStore, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--samplers", "ddim:1", "--baseline", f"again={model}")
    printed, found = [], []
    for name, spread in (("one", ()), ("two", TWO)):
        assert run(*evaluate(ixi_store, model, tmp_path / name, *flags, *spread)) == 0
        printed.append(capsys.readouterr().out.replace(str(tmp_path / name), ""))
        found.append(content(tmp_path / name))
    one, two = found
    assert one.keys() == two.keys()
    times = one.pop("times.csv"), two.pop("times.csv")
    assert len(times[0].splitlines()) == len(times[1].splitlines())
    for name in ("quality.png", "scores.md", "evaluation.json"):  # hold times, or the state of the repository
        del one[name], two[name]
    assert two == one
    assert len([name for name in two if name.startswith("pictures/")]) == 2 * 6
    assert printed[0] == printed[1]


@pytest.mark.slow
def test_a_worker_computes_with_as_many_threads_as_it_is_told(workers: RayWorkers) -> None:
    """Sums over a volume are cut by thread: another number changes the last bits."""
    assert list(workers.map(threads, [0, 1], description="count", unit="worker")) == [3, 3]


def threads(_: int) -> int:
    import torch

    return torch.get_num_threads()


# --------------------------------------------------------------------------------------------------- dry runs, refusals


def test_dry_runs_name_workers_and_memory_and_write_nothing(
    brats_tree: Path, brats_store: VolumeStore, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for words in (
        prepare(brats_tree, out),
        encode(brats_store, out, "--codec", "haar"),
        evaluate(brats_store, model, out),
    ):
        assert run(*words, *TWO, "--dry-run") == 0
        text = capsys.readouterr().out
        assert "2 tasks at a time on Ray, each on a CPU" in text
        assert "memory" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num-workers", 5), "--num-workers 5 is more than the 4 CPUs"),
        (("--num-workers", 0), "--num-workers is 0, wanted at least 1"),
        (("--num-workers", 2, "--device", "cuda"), "takes a GPU for every worker, this Ray cluster has 0"),
    ],
)
def test_workers_that_the_cluster_has_not_are_refused(
    flags: tuple[object, ...],
    words: str,
    brats_store: VolumeStore,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert words in refused(capsys, *encode(brats_store, tmp_path / "out", "--codec", "haar", *flags))
    assert list(tmp_path.iterdir()) == []


def test_prepare_takes_processes_or_workers(
    brats_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, *prepare(brats_tree, tmp_path / "store", *TWO, "--num-processes", 2))
    assert "--num-processes and --num-workers were both given" in message
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------- errors and killed workers


def test_what_a_task_refuses_is_said_once(
    brats_store: VolumeStore, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = encode(brats_store, tmp_path / "out", "--codec", "haar", *TWO, "--max-memory-gb", 0.1)
    assert run(*words) == cli.EXIT_USER_ERROR
    message = capfd.readouterr().err
    assert message.count("--max-memory-gb 0.1 is too little") == 1
    assert message.startswith("aldm encode: ")
    assert "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


class Killer:
    """The lossless codec, but the process dies of the first `times` volumes, with a shard half written."""

    def __init__(self, folder: Path, times: int) -> None:
        self.folder, self.times = folder, times

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        from aldm.models.codecs import build_codec

        deaths = len(list(self.folder.glob("died-*")))
        if deaths < self.times:
            (self.folder / f"died-{deaths}-{os.getpid()}").touch()
            for shards in self.folder.glob(f".tmp-*/{SHARD_FOLDER}"):
                (shards / f".tmp-{os.getpid()}-0-half.arrow").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return build_codec(HAAR).encode(x)


def test_a_task_whose_process_is_killed_is_done_again(
    brats_store: VolumeStore, workers: RayWorkers, tmp_path: Path
) -> None:
    (tmp_path / "two").mkdir()
    one = encode_store(brats_store, build_codec(HAAR), HAAR, tmp_path / "one", flips=True)
    killer = Killer(tmp_path / "two", times=1)
    out = tmp_path / "two" / "latents"
    encode_store(brats_store, build_codec(HAAR), HAAR, out, flips=True, encode=killer, workers=workers)
    assert list(killer.folder.glob("died-*"))
    assert content(out) == content(one.path)


@pytest.mark.slow
def test_a_task_that_always_kills_its_process_ends_with_one_message(
    brats_store: VolumeStore, workers: RayWorkers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.ray_pool.RETRIES", 1)
    killer = Killer(tmp_path, times=1000)
    with pytest.raises(UserError, match=r"encode: a worker's process was killed 2 times .* smaller --num-workers"):
        encode_store(brats_store, build_codec(HAAR), HAAR, tmp_path / "out", encode=killer, workers=workers)
    assert all(path.name.startswith("died-") for path in tmp_path.iterdir())


def ticks_or_refuses(file: Path, refuse: bool) -> None:
    """Write on and on, or raise once the other task writes."""
    from aldm.errors import UserError

    while not refuse or not file.exists():
        if not refuse:
            with file.open("a") as stream:
                stream.write(".")
        time.sleep(0.01)
    raise UserError("refused by the task")


def test_once_a_task_failed_no_other_runs(workers: RayWorkers, tmp_path: Path) -> None:
    ticks = partial(ticks_or_refuses, tmp_path / "ticks")
    with pytest.raises(UserError, match=r"^refused by the task$"):
        list(workers.map(ticks, [False, True], description="tick", unit="task"))
    size = (tmp_path / "ticks").stat().st_size
    time.sleep(0.2)
    assert 0 < (tmp_path / "ticks").stat().st_size == size
    assert list(workers.map(threads, [0, 0, 0], description="count", unit="worker")), "the pool can be used again"


def crash(_: Any) -> None:
    raise ZeroDivisionError("a bug in the task")


def test_a_bug_in_a_task_keeps_its_traceback(workers: RayWorkers) -> None:
    with pytest.raises(ZeroDivisionError, match="in crash"):
        list(workers.map(crash, [0], description="crash", unit="task"))
