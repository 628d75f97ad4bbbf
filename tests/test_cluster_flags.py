"""The flags of `aldm train` that say where and how it is spread, before anything is started."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest

from aldm.config import Config
from aldm.errors import UserError
from aldm.run_folder import without_secrets
from pipelines.ray_training import Cluster, cluster_of
from pipelines.train import parse


def parsed(*words: str) -> tuple[argparse.Namespace, Config]:
    common = ("--latents", "l", "--run-dir", "r", "--preset", "tiny", "--device", "cpu")
    return parse("ms-spade", [*common, *words])


def cluster(*words: str) -> Cluster:
    args, config = parsed(*words)
    return cluster_of(args, config, "ms-spade")


@pytest.mark.parametrize("engine", ["plain", "ddp"])
def test_the_zero_stage_of_another_engine_is_refused(engine: str) -> None:
    with pytest.raises(UserError, match=f"--zero-stage is for --engine deepspeed, this is --engine {engine}"):
        cluster("--engine", engine, "--zero-stage", "2")


@pytest.mark.parametrize(
    "words",
    [
        ("--num-workers", "1"),
        ("--use-gpu",),
        ("--storage-path", "somewhere"),
        ("--max-failures", "0"),
        ("--keep-checkpoints", "2"),
        ("--autoscaling",),
    ],
    ids=lambda words: words[0],
)
def test_a_flag_of_ray_is_refused_without_ray(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=f"--engine plain trains in one process without Ray, where {words[0]} would do"):
        cluster("--engine", "plain", *words)


def test_the_flags_have_the_defaults_of_the_help() -> None:
    assert cluster("--engine", "deepspeed") == Cluster(
        engine="deepspeed",
        zero_stage=1,
        min_workers=1,
        max_workers=1,
        use_gpu=False,
        max_failures=0,
        keep_checkpoints=2,
        autoscaling=False,
    )


def test_a_batch_that_cannot_be_shared_names_one_that_can() -> None:
    with pytest.raises(UserError, match=r"3 workers cannot share .* --set train_ms_spade\.batch_size=12"):
        cluster("--num-workers", "2:4", "--set", "train_ms_spade.batch_size=8")
    assert cluster("--num-workers", "2:4", "--set", "train_ms_spade.batch_size=12").max_workers == 4
    with pytest.raises(UserError, match=r"8 workers cannot share .* --set train_ms_spade\.batch_size=8"):
        cluster("--num-workers", "8", "--set", "train_ms_spade.batch_size=2")


@pytest.mark.parametrize(
    ("words", "gpus", "taken"),
    [
        (("--device", "auto"), 2, True),
        (("--device", "auto"), 1, False),
        (("--device", "auto"), 0, False),
        (("--device", "auto", "--use-gpu"), 0, True),
        (("--device", "cuda"), 0, True),
        (("--device", "cpu"), 2, False),
    ],
)
def test_auto_takes_gpus_where_there_are_as_many_as_workers(words: tuple[str, ...], gpus: int, taken: bool) -> None:
    wanted = cluster("--num-workers", "2", "--set", "train_ms_spade.batch_size=2", *words)
    assert wanted.takes_gpus(gpus) == taken


def test_a_plan_says_what_will_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert cluster("--device", "auto").describe() == "1 worker with a GPU each"
    assert replace(cluster("--device", "auto"), min_workers=2, max_workers=3).describe() == "2 to 3 workers, on CPUs"
    assert cluster().describe() == "1 worker, on CPUs"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster("--device", "auto").describe() == "1 worker, with a GPU each if the cluster has as many"
    assert cluster("--use-gpu", "--device", "auto").describe() == "1 worker with a GPU each"


def test_secrets_in_a_uri_are_not_shown() -> None:
    uri = "s3://AKIA:p%2Fw@bucket/a/b?region=eu&session_token=xyz&scheme=http"
    assert without_secrets(uri) == "s3://***@bucket/a/b?region=eu&session_token=***&scheme=http"
    for plain in ("s3://bucket/a?region=eu", "/data/a@b", "--storage-path"):
        assert without_secrets(plain) == plain
    assert without_secrets(str(Path("/data/runs"))) == "/data/runs"
