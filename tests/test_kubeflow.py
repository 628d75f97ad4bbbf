"""The Kubeflow pipeline: what it compiles to, that its commands are those of the jobs, and all of it run here."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import yaml
from ray_runs import command_of

from aldm import __version__
from aldm.cli import JOBS, main
from aldm.errors import UserError
from pipelines import kubeflow, kubernetes_roll
from pipelines.arguments import JobParser
from pipelines.champion import NO_CHAMPION_DB
from pipelines.kubeflow_run import checked, run_step
from pipelines.kubeflow_steps import (
    ALWAYS,
    ON_RAY,
    STEP_NAMES,
    Parameters,
    check,
    commands,
    is_done,
    line_of,
    read_step,
    result_of,
)
from pipelines.tracking_server import connect

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = Parameters(
    data="/shared/dataset",
    preset="brats",
    settings=["train_vqgan.batch_size=4", "train_ms_spade.batch_size=4", "train_diffusion.batch_size=4"],
    num_workers=4,
    use_gpu=True,
    ray_address="http://aldm-head-svc:8265",
    tracking_uri="http://mlflow:5000",
    service="aldm-translator",
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pipeline's specification and what it asks of Kubernetes."""
    file = tmp_path_factory.mktemp("compiled") / "aldm.yaml"
    assert kubeflow.main(["--compile", str(file), "--image", "registry.example/aldm:1", "--run-name", "nightly"]) == 0
    spec, platform = yaml.safe_load_all(file.read_text())
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def tasks_of(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All tasks by name, those under the condition too."""
    tasks = dict(spec["root"]["dag"]["tasks"])
    inner = next(name for name in tasks if name.startswith("condition"))
    return tasks | spec["components"][tasks[inner]["componentRef"]["name"]]["dag"]["tasks"]


def parsed(words: tuple[str, ...]) -> Any:
    """What the job's own parser makes of the words after `aldm`."""

    class Parsed(Exception):
        pass

    parse = JobParser.parse_args

    def stop(self: JobParser, args: Any = None, namespace: Any = None) -> Any:
        raise Parsed(parse(self, args, namespace))

    job, *rest = words
    main = kubernetes_roll.main if (job, rest[0]) == ("k8s", "roll") else None
    if main is None:
        main = __import__(JOBS[job][0], fromlist=["main"]).main
    else:
        rest = rest[1:]
    with mock.patch.object(JobParser, "parse_args", stop), pytest.raises(Parsed) as found:
        main(rest)
    return found.value.args[0]


@pytest.mark.parametrize("p", [Parameters(), CLUSTER, Parameters(preset="tiny", layout="ixi", splits="/shared/s.csv")])
def test_every_command_is_one_that_its_job_takes(p: Parameters) -> None:
    check(p)
    plan = commands(p)
    assert tuple(plan) == STEP_NAMES
    for words in plan.values():
        if words is not None:
            parsed(words)
    assert (plan["simulate"] is None) == bool(p.data)
    assert (plan["train-vqgan"] is None) == (p.config.codec.kind == "haar")
    assert parsed(plan["evaluate"]).champion == "translator@champion"
    assert parsed(plan["roll"]).apply == bool(p.service)


def test_the_trainings_on_a_cluster_are_those_of_its_workers() -> None:
    from pipelines.ray_training import cluster_of
    from pipelines.train import parse

    for step in ("train-vqgan", "train-ms-spade", "train-diffusion"):
        _, stage, *words = commands(CLUSTER)[step]
        args, config = parse(stage, words)
        cluster = cluster_of(args, config, stage)
        assert (cluster.max_workers, cluster.use_gpu, cluster.autoscaling) == (4, True, True)
        assert args.device == "auto"  # the head, where the job begins, has no GPU


def test_an_idle_cluster_is_asked_for_workers() -> None:
    """As test_kubeflow_ray.py sees it done; and where a step runs is no part of what it makes."""
    alone = replace(CLUSTER, num_workers=0, use_gpu=False, ray_address="")
    for step in ON_RAY:
        args = parsed(commands(CLUSTER)[step])
        assert (int(args.num_workers), args.autoscaling) == (4, True)
        if step in ("encode", "evaluate"):
            assert args.device == "cuda"  # auto asks the cluster what it has now
            assert parsed(commands(replace(CLUSTER, use_gpu=False))[step]).device == "auto"
        assert not parsed(commands(replace(CLUSTER, ray_address=""))[step]).autoscaling  # a machine does not grow
        assert line_of(step, CLUSTER) == line_of(step, alone)


def test_it_compiles_to_the_steps_in_their_order(compiled) -> None:
    spec, _ = compiled
    tasks = tasks_of(spec)
    condition = next(name for name in tasks if name.startswith("condition"))
    assert set(tasks) == {"check", "to-beat", condition, *STEP_NAMES}
    before = {name: task.get("dependentTasks", []) for name, task in tasks.items()}
    outer = ["check", *(name for name in STEP_NAMES if name not in ALWAYS), "to-beat"]
    for first, second in pairwise(outer):
        assert first in before[second], second
    assert "evaluate" in before[condition]
    assert "register" in before["roll"]
    for name in STEP_NAMES:
        code = spec["deploymentSpec"]["executors"][f"exec-{name}"]["container"]["command"][-1]
        assert f'step("{name}", parameters)' in code


def test_only_a_better_model_is_registered_and_rolled_out(compiled) -> None:
    spec, _ = compiled
    root = spec["root"]["dag"]["tasks"]
    assert not set(ALWAYS) & set(root)
    (condition,) = [task["triggerPolicy"]["condition"] for task in root.values() if "triggerPolicy" in task]
    left, right = (f"inputs.parameter_values['pipelinechannel--{name}-Output']" for name in ("evaluate", "to-beat"))
    assert " ".join(condition.split()) == f"{left} > {right}"
    assert NO_CHAMPION_DB < 0  # the least PSNR of images in [0, 1]


def test_only_the_check_of_the_parameters_is_cached_and_not_tried_again(compiled) -> None:
    spec, _ = compiled
    tasks = tasks_of(spec)
    assert [name for name, task in tasks.items() if task.get("cachingOptions", {}).get("enableCache")] == ["check"]
    retries = {name: task["retryPolicy"]["maxRetryCount"] for name, task in tasks.items() if "retryPolicy" in task}
    assert set(retries) == {"to-beat", *STEP_NAMES}
    assert min(retries.values()) >= 1


def test_its_parameters_and_their_defaults_are_those_of_the_steps(compiled) -> None:
    from pipelines.kubeflow_pipeline import check as checking
    from pipelines.kubeflow_pipeline import pipeline

    spec, _ = compiled
    names = [item.name for item in fields(Parameters)]
    assert list(inspect.signature(pipeline.pipeline_func).parameters) == names
    assert list(inspect.signature(checking.python_func).parameters)[1:] == names
    given = spec["root"]["inputDefinitions"]["parameters"]
    wanted = asdict(Parameters(run_name="nightly"))
    assert {name: given[name].get("defaultValue", wanted[name]) for name in names} == wanted
    own = {name: each.default for name, each in inspect.signature(pipeline.pipeline_func).parameters.items()}
    assert own == asdict(Parameters())


def test_every_pod_has_the_image_the_storage_and_limits_equal_to_its_requests(compiled) -> None:
    spec, platform = compiled
    executors = spec["deploymentSpec"]["executors"]
    assert set(platform) == set(executors)
    for name, executor in executors.items():
        container = executor["container"]
        assert container["image"] == "registry.example/aldm:1"
        assert "pip install" not in " ".join(container["command"])
        assert container["env"] == [{"name": "RAY_AUTH_MODE", "value": "token"}]
        resources = container["resources"]
        assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"]
        assert resources["resourceCpuLimit"] == resources["resourceCpuRequest"]
        # as kfp-kubernetes writes whole numbers; Kubeflow takes these three and no more
        assert platform[name]["securityContext"] == {
            "runAsUser": "10001",
            "runAsGroup": "10001",
            "runAsNonRoot": True,
        }
        (mount,), (secret,) = platform[name]["pvcMount"], platform[name]["secretAsEnv"]
        assert (mount["constant"], mount["mountPath"]) == ("aldm-data", Parameters().shared)
        assert (secret["secretName"], secret["keyToEnv"]) == (
            "ray-auth-token",
            [{"secretKey": "auth_token", "envVar": "RAY_AUTH_TOKEN"}],
        )


def test_the_image_is_that_of_this_version() -> None:
    from pipelines.kubeflow_pipeline import IMAGE

    assert f"aldm:{__version__}-cpu" == IMAGE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "huge"}, "no preset 'huge'"),
        ({"settings": ["sampling.nothing=1"]}, "nothing"),
        ({"shared": "here"}, "wanted an absolute path"),
        ({"data": "here"}, "wanted an absolute path"),
        ({"run_name": "../x"}, "wanted the name of a folder"),
        ({"num_workers": -1}, "wanted at least 0"),
        ({"ray_address": "http://x:8265"}, "give the workers"),
        ({"use_gpu": True}, "gives GPUs to workers"),
        ({"use_gpu": True, "num_workers": 2, "device": "cpu"}, "contradict each other"),
        ({"num_workers": 4, "settings": ["train_ms_spade.batch_size=6"]}, r"batches of 6 .*\.batch_size=8 in settings"),
        ({"layout": "nifti"}, "layout is 'nifti'"),
        ({"split": "foo"}, "split is 'foo'"),
        ({"seed": -1}, "wanted 0 or more"),
        ({"min_gain_db": float("nan")}, "a finite number"),
        ({"model_name": ""}, "wanted letters, digits"),
        ({"ray_address": "head:8265", "num_workers": 1}, "ray_address is 'head:8265'"),
        ({"tracking_uri": "mlflow"}, "tracking_uri is 'mlflow'"),
        ({"service": "Bad Name"}, "wanted a name of Kubernetes"),
    ],
)
def test_parameters_that_cannot_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(replace(Parameters(), **changes))


def test_a_run_goes_on_with_its_own_parameters_only(tmp_path: Path, monkeypatch, capsys) -> None:
    """Where it runs may change; what it is made of may not."""
    p = Parameters(shared=str(tmp_path), preset="tiny", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    ran = []

    def run(words: Any, p: Parameters) -> tuple[int, str]:
        ran.append(words)
        step = words[0] if words[0] == "prepare" else f"train-{words[1]}"
        result_of(step, p).mkdir(parents=True, exist_ok=True)
        return (1, "no space left") if len(ran) == 2 else (0, "")

    monkeypatch.setattr("pipelines.kubeflow_run._run", run)
    run_step("prepare", p)
    with pytest.raises(UserError, match="train-vqgan: aldm train ended with code 1: no space left"):
        run_step("train-vqgan", p)
    assert read_step("train-vqgan", p)["state"] == "failed"
    on_workers = replace(p, num_workers=1)
    with pytest.raises(UserError, match=r"begun with num_workers 0 and cannot go on with 1: .*Give 0 until it is done"):
        run_step("prepare", on_workers)
    for step in ("prepare", "train-vqgan", "train-vqgan"):
        run_step(step, replace(p, device="cpu"))
    run_step("train-vqgan", on_workers)  # it is done, and the next one may be trained by others
    assert [words[-1] == "--resume" for words in ran] == [False, False, True]
    assert len(ran) == 3
    assert line_of("train-vqgan", on_workers) == line_of("train-vqgan", p)
    (result_of("prepare", p)).rmdir()
    assert not is_done("prepare", p)  # its result has gone
    with pytest.raises(UserError, match="a run with seed 0: give another run_name"):
        run_step("encode", replace(p, seed=1))
    checked(asdict(replace(p, seed=1)))  # Kubeflow remembers this step: what the folder holds is not its business


def test_a_dry_run_prints_every_command_and_writes_nothing(tmp_path: Path, capsys) -> None:
    assert kubeflow.main(["--dry-run", "--shared", str(tmp_path / "out"), "--preset", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": aldm ") == len(STEP_NAMES)
    assert list(tmp_path.iterdir()) == []


def test_without_kfp_it_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "kfp"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "kfp", None)
    monkeypatch.delitem(sys.modules, "pipelines.kubeflow_pipeline", raising=False)
    monkeypatch.delattr("pipelines.kubeflow_pipeline", raising=False)
    with pytest.raises(UserError, match=r"pip install 'aldm\[kubeflow\]'"):
        kubeflow.main(["--compile", str(tmp_path / "x.yaml")])


@pytest.mark.slow
def test_a_run_that_is_ended_ends_what_it_started(tmp_path: Path) -> None:
    """By SIGTERM, as Kubernetes ends it."""
    p = Parameters(shared=str(tmp_path), preset="tiny", layout="ixi", num_subjects=40)
    words = ["--local", "--shared", str(tmp_path), "--preset", "tiny", "--layout", "ixi", "--num-subjects", "40"]
    program = [sys.executable, "-m", "pipelines.kubeflow", *words]
    run = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    started: list[psutil.Process] = []
    deadline = time.monotonic() + 180
    while not any("aldm.cli" in command_of(each) for each in started):
        assert run.poll() is None
        assert time.monotonic() < deadline
        started = psutil.Process(run.pid).children(recursive=True)
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    output, _ = run.communicate(timeout=180)
    assert run.returncode == 143, output
    assert output.splitlines()[-1] == "python -m pipelines.kubeflow: terminated"
    assert psutil.wait_procs(started, timeout=0)[1] == []
    assert (read_step("simulate", p)["state"], is_done("simulate", p)) == ("running", False)


def local(shared: Path) -> subprocess.CompletedProcess[str]:
    words = ["--local", "--shared", shared, "--preset", "tiny", "--layout", "ixi", "--num-subjects", "9"]
    words += ["--set", "sampling.num_inference_steps=1", "--device", "cpu"]
    program = [sys.executable, "-m", "pipelines.kubeflow", *map(str, words)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)


def artifacts(run: Path, step: str, name: str) -> list[Path]:
    """What the runs of a step left for the UI."""
    return sorted(run.glob(f"kubeflow/*/{step}/{name}"))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let steps run their commands here, where everything is imported already; returns what has run."""
    ran = []

    def run(words: Any, p: Parameters) -> tuple[int, str]:
        ran.append(words[0])
        with mock.patch.dict(os.environ, {"MLFLOW_TRACKING_URI": p.server}):
            return main(words), ""

    monkeypatch.setattr("pipelines.kubeflow_run._run", run)
    return ran


@pytest.mark.slow
def test_all_of_it_on_this_machine(tmp_path: Path, in_this_process: list[str]) -> None:
    """From data to a registered model, with a step that fails first; then again, which replaces nothing.

    Two starts are real, in processes of their own; between them the steps up to the last training run here.
    """
    p = Parameters(shared=str(tmp_path), preset="tiny", layout="ixi", num_subjects=9, device="cpu")
    p = replace(p, settings=["sampling.num_inference_steps=1"])
    run = p.folder
    run.mkdir(parents=True)
    (run / "data").write_text("in the way of aldm phantom")
    done = local(tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    (last,) = [line for line in done.stderr.splitlines() if line.startswith("python -m pipelines.kubeflow:")]
    assert "the step simulate failed: aldm phantom: " in last
    assert "is a file, wanted a folder to write" in last
    (run / "data").unlink()

    for step in STEP_NAMES[:6]:
        run_step(step, p)
    begun = {step: read_step(step, p)["begun"] for step in STEP_NAMES[:6]}
    done = local(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    records = {step: read_step(step, p) for step in STEP_NAMES}
    assert {step: records[step]["begun"] for step in begun} == begun  # none of them ran again
    assert {record["state"] for record in records.values()} == {"done"}
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    champion = client.get_model_version_by_alias("translator", "champion")
    assert champion.tags["hash"] == json.loads((run / "model" / "config.json").read_text())["hash"]
    (application,) = yaml.safe_load((run / "serve.yaml").read_text())["applications"]
    assert application["args"]["model"] == "models:/translator/1"
    (scores,), (report,) = artifacts(run, "evaluate", "scores"), artifacts(run, "evaluate", "report")
    assert "there is no champion yet" in scores.read_text()
    assert "data:image/png;base64," in report.read_text()

    stopped = records["evaluate"] | {"state": "running"}
    (run / "steps" / "evaluate.json").write_text(json.dumps(stopped))  # measured again, against itself
    in_this_process.clear()
    for step in STEP_NAMES[:7]:
        run_step(step, p)
    psnr_db, to_beat_db, page = measured_again(p)
    assert in_this_process == ["evaluate"]
    assert not psnr_db > to_beat_db, "then the pipeline would register it"
    assert "NOT better than the champion models:/translator/1" in page
    run_step("register", p)
    assert len(client.search_model_versions("name = 'translator'")) == 1


def measured_again(p: Parameters) -> tuple[float, float, str]:
    """What the components say of which the pipeline's condition is made, and the page with the scores."""
    from kfp.dsl import HTML, Markdown, Metrics

    from pipelines import kubeflow_pipeline as made

    places = {name: str(p.folder / f"{name}.of.again") for name in ("scores", "report", "metrics")}
    kinds = {"scores": Markdown, "report": HTML, "metrics": Metrics}
    outputs = {name: kinds[name](uri=place) for name, place in places.items()}
    psnr_db = made.evaluate.python_func(asdict(p), **outputs)
    return psnr_db, made.to_beat.python_func(asdict(p)), Path(places["scores"]).read_text()
