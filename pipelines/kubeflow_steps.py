"""The steps of the pipeline without Kubeflow: their `aldm` commands, and how one is run, skipped or gone on with.

Everything that a run makes lies in one folder on shared storage, SHARED/runs/RUN_NAME:

    pipeline.json     what the run is made of: data, preset, settings, seeds; a run with others is refused
    steps/NAME.json   of each step: its command, whether it runs, is done or failed, and how long it took
    data store latents vqgan ms-spade diffusion model scores serve.yaml     what the commands write

A step whose record says `done`, with the same command, and whose result is there is skipped. One that was stopped or
failed is run again so that it goes on: trainings with --resume, `aldm prepare` as it is, the others with --overwrite.
Where a step runs (workers, cluster, service) is no part of its command here: that may change from start to start.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from aldm.cli import Terminated
from aldm.config import Config, override
from aldm.errors import UserError
from aldm.files import atomic_path
from aldm.presets import load_preset
from pipelines.champion import is_current
from pipelines.tracking_server import STORE_FILE, default_server

SETTINGS, STEPS = "pipeline.json", "steps"
STEP_NAMES = (
    "simulate",
    "prepare",
    "train-vqgan",
    "encode",
    "train-ms-spade",
    "train-diffusion",
    "export",
    "evaluate",
    "register",
    "roll",
)
"""In their order; the last two only where the new model is better than the champion."""
ON_RAY = ("prepare", "train-vqgan", "encode", "train-ms-spade", "train-diffusion", "evaluate")
"""What is submitted to the cluster of `ray_address`; the others are short and run in the step's own pod."""
ALWAYS = ("register", "roll")
"""These find out by themselves that there is nothing to do, which may be otherwise tomorrow."""
MADE_OF = ("data", "layout", "preset", "settings", "splits", "num_subjects", "seed")
"""The parameters that a run's models depend on; a run goes on with the same ones only."""
END_WAIT_S = 60.0
"""For so long a command that is no longer waited for may write its last checkpoint."""


def _parameter(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Parameters:
    """The pipeline's parameters; each is a flag of `python -m pipelines.kubeflow` too."""

    data: str = _parameter("", "folder of the data set (with layout table a CSV file); empty: simulated subjects")
    layout: str = _parameter("brats", "how the data set's files are named: brats, ixi, bids, table")
    preset: str = _parameter("small", "configuration to start from: a preset, or a YAML file on shared storage")
    settings: list[str] = field(default_factory=list, metadata={"help": "changes of the configuration, as --set"})
    splits: str = _parameter("", "CSV file of subject_id, split, as with aldm prepare --splits; empty: by the layout")
    num_subjects: int = _parameter(24, "how many subjects are simulated, where there is no data set")
    seed: int = _parameter(0, "seed of the simulated subjects and of the trainings")
    shared: str = _parameter("/shared", "folder of the storage that all steps and all nodes reach under this name")
    run_name: str = _parameter("first", "the run's folder is SHARED/runs/RUN_NAME; the same name goes on with it")
    split: str = _parameter("test", "subjects on which the new model and the champion are measured")
    device: str = _parameter("auto", "where to compute: auto, cpu, cuda")
    num_workers: int = _parameter(0, "workers on Ray of each step; 0 works in one process without Ray")
    use_gpu: bool = _parameter(False, "give every worker of a training a GPU")
    max_failures: int = _parameter(3, "restarts of a training whose worker died, where there are workers")
    ray_address: str = _parameter("", "Ray's job server, such as http://aldm-head-svc:8265; empty: work in the step")
    tracking_uri: str = _parameter("", "MLflow server, such as http://mlflow:5000; empty: SHARED/mlflow.db")
    model_name: str = _parameter("translator", "registered model")
    alias: str = _parameter("champion", "alias of the version that is to be beaten")
    min_gain_db: float = _parameter(0.0, "by how much the new model's PSNR has to be higher, dB")
    service: str = _parameter("", "RayService that is rolled to the new champion; empty: its configuration is written")
    namespace: str = _parameter("aldm", "namespace of the RayService")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.shared) / "runs" / self.run_name

    @property
    def server(self) -> str:
        """URI of MLflow."""
        return self.tracking_uri or f"sqlite:///{Path(self.shared).resolve() / STORE_FILE}"

    @property
    def config(self) -> Config:
        """The configuration of all steps."""
        return override(load_preset(self.preset), self.settings)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Parameters":
        """Return the parameters, with whole numbers where JSON made floats of them.

        Raises:
            UserError: an unknown name.
        """
        kinds: dict[str, Any] = {item.name: item.type for item in fields(cls)}
        unknown = set(values) - set(kinds)
        if unknown:
            raise UserError(f"the pipeline has no parameter {', '.join(sorted(unknown))}")
        return cls(**{name: int(value) if kinds[name] is int else value for name, value in values.items()})


def commands(p: Parameters) -> dict[str, tuple[str, ...] | None]:
    """Return the words after `aldm` of every step; None where there is nothing to do."""
    run, config = p.folder, p.config
    haar = config.codec.kind == "haar"
    setup = ("--preset", p.preset, *(word for text in p.settings for word in ("--set", text)))
    device = ("--device", p.device)
    workers = ("--num-workers", p.num_workers) if p.num_workers else ()

    def train(stage: str, *inputs: object) -> tuple[object, ...]:
        engine = (*workers, "--max-failures", p.max_failures) if workers else ("--engine", "plain")
        gpu = ("--use-gpu",) if p.use_gpu else ()
        words = ("train", stage, *inputs, "--run-dir", run / stage, *setup, "--seed", p.seed, *device)
        return (*words, "--group", run, *engine, *gpu)

    codec = "haar" if haar else run / "vqgan"
    store, latents, model = ("--store", run / "store"), ("--latents", run / "latents"), ("--model", run / "model")
    ms_spade = ("--ms-spade", run / "ms-spade")
    simulated = ("phantom", run / "data", "--layout", p.layout, "--num-subjects", p.num_subjects, "--seed", p.seed)
    splits = ("--splits", p.splits) if p.splits else ()
    name = f"{p.model_name}@{p.alias}"
    service = ("--service", p.service, "--namespace", p.namespace, "--apply")
    plan: dict[str, tuple[object, ...] | None] = {
        "simulate": None if p.data else (*simulated, "--spacing-mm", config.preprocess.spacing_mm[0]),
        "prepare": ("prepare", p.data or run / "data", run / "store", "--layout", p.layout, *splits, *setup, *workers),
        "train-vqgan": None if haar else train("vqgan", *store),
        "encode": ("encode", *store, "--codec", codec, "--out", run / "latents", *setup, *device, *workers),
        "train-ms-spade": train("ms-spade", *latents),
        "train-diffusion": train("diffusion", *latents, *ms_spade),
        "export": ("export", "--codec", codec, *ms_spade, "--diffusion", run / "diffusion", "--out", run / "model"),
        "evaluate": (
            *("evaluate", *model, *store, "--split", p.split, "--out", run / "scores", *device, *workers),
            *("--champion", name, "--group", run),
        ),
        "register": (
            *("promote", *model, "--scores", run / "scores", "--register", p.model_name, "--alias", p.alias),
            *("--min-gain-db", p.min_gain_db),
        ),
        "roll": (
            "k8s",
            "roll",
            "--model",
            f"models:/{name}",
            *(service if p.service else ("--out", run / "serve.yaml")),
        ),
    }
    return {step: None if words is None else tuple(map(str, words)) for step, words in plan.items()}


def result_of(step: str, p: Parameters) -> Path:
    """Return the file or folder whose being there says that a step has a result."""
    run = p.folder
    return {
        "simulate": run / "data",
        "prepare": run / "store" / "store.json",
        "train-vqgan": run / "vqgan" / "last",
        "encode": run / "latents",
        "train-ms-spade": run / "ms-spade" / "last",
        "train-diffusion": run / "diffusion" / "last",
        "export": run / "model" / "config.json",
        "evaluate": run / "scores" / "scores.csv",
        "register": run,
        "roll": run,
    }[step]


def check(p: Parameters) -> None:
    """Refuse parameters that cannot work, before any step.

    Raises:
        UserError: one of them, or a run of this name that is made of other ones.
    """
    commands(p)  # a wrong preset or setting is said so
    if not Path(p.shared).is_absolute():
        raise UserError(f"shared is {p.shared!r}, wanted an absolute path: every step has a working folder of its own")
    if not p.run_name or Path(p.run_name).name != p.run_name or p.run_name.startswith("."):
        raise UserError(f"run_name is {p.run_name!r}, wanted the name of a folder")
    if p.data and not Path(p.data).is_absolute():
        raise UserError(f"data is {p.data!r}, wanted an absolute path")
    if p.num_workers < 0:
        raise UserError(f"num_workers is {p.num_workers}, wanted at least 0")
    if p.ray_address and not p.num_workers:
        raise UserError(
            f"ray_address is {p.ray_address} and num_workers 0: give the workers that the cluster is to start"
        )
    if p.use_gpu and not p.num_workers:
        raise UserError("use_gpu gives GPUs to workers, and num_workers is 0: give both, or device cuda alone")
    _check_folder(p)


def _check_folder(p: Parameters) -> bool:
    """Return whether the run has begun before.

    Raises:
        UserError: a run made of other parameters.
    """
    file = p.folder / SETTINGS
    if not file.is_file():
        return False
    before, now = json.loads(file.read_text()), _made_of(p)
    changed = [f"{name} {before.get(name)!r}" for name in now if before.get(name) != now[name]]
    if changed:
        raise UserError(f"{p.folder} holds a run with {', '.join(changed)}: give another run_name, or the same again")
    return True


def _made_of(p: Parameters) -> dict[str, Any]:
    return {name: value for name, value in asdict(p).items() if name in MADE_OF}


def _anywhere(p: Parameters) -> Parameters:
    """Return the parameters without those that only say where a step runs."""
    plain = Parameters()
    places = ("device", "num_workers", "use_gpu", "max_failures", "ray_address", "tracking_uri")
    return replace(p, **{name: getattr(plain, name) for name in places})


def line_of(step: str, p: Parameters) -> str:
    """Return what identifies a step's result: its command, wherever it runs."""
    return "aldm " + " ".join(commands(_anywhere(p))[step] or ("nothing",))


def read_step(step: str, p: Parameters) -> dict[str, Any]:
    """Return the record of a step, empty where it never began."""
    file = p.folder / STEPS / f"{step}.json"
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def is_done(step: str, p: Parameters) -> bool:
    """Return whether a step need not be run again.

    Raises:
        UserError: the registry, which says whether an evaluation is still one of the champion, does not answer.
    """
    record = read_step(step, p)
    if step in ALWAYS or record.get("state") != "done" or record["command"] != line_of(step, p):
        return False
    if not result_of(step, p).exists():
        return False
    with default_server(p.server):
        return step != "evaluate" or is_current(p.folder / "scores", p.model_name, p.alias)


def run_step(step: str, p: Parameters) -> None:
    """Run the command of a step, go on with it where it was stopped, or leave it where it is done.

    Raises:
        UserError: the command failed; the record keeps the last line that it printed.
    """
    check(p)
    words = commands(p)[step]
    if words is None:
        print(f"{step}: nothing to do", flush=True)
        return
    if is_done(step, p):
        print(f"{step}: done before, {result_of(step, p)}", flush=True)
        return
    begun = bool(read_step(step, p))
    _open(p)
    words = (*words, *(_again(step, p) if begun else ()))
    print(f"$ aldm {' '.join(words)}", flush=True)
    begin = time.time()
    _note(step, p, state="running", begun=begin)
    code, last = _run(step, words, p)
    seconds = round(time.time() - begin, 1)
    if code:
        _note(step, p, state="failed", begun=begin, seconds=seconds, message=last)
        raise UserError(f"{step}: aldm {words[0]} ended with code {code}: {last}")
    _note(step, p, state="done", begun=begin, seconds=seconds)


def _again(step: str, p: Parameters) -> tuple[str, ...]:
    """Return the flag with which a step that began before is run again."""
    if step.startswith("train-"):
        if read_step(step, p)["command"] != line_of(step, p):
            return ("--overwrite",)
        return ("--resume",) if result_of(step, p).exists() else ("--overwrite",)
    return ("--overwrite",) if step in ("simulate", "encode", "export", "evaluate") else ()


def _open(p: Parameters) -> None:
    """Make the run's folder."""
    if _check_folder(p):
        return
    try:
        (p.folder / STEPS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{p.folder} cannot be made: {error.strerror}") from error
    with atomic_path(p.folder / SETTINGS, overwrite=True) as temporary:
        temporary.write_text(json.dumps(_made_of(p), indent=1) + "\n")


def _note(step: str, p: Parameters, **values: Any) -> None:
    with atomic_path(p.folder / STEPS / f"{step}.json", overwrite=True) as temporary:
        temporary.write_text(json.dumps({"command": line_of(step, p), **values}, indent=1) + "\n")


def _run(step: str, words: Sequence[str], p: Parameters) -> tuple[int, str]:
    """Run a command, show what it prints, and return its exit code and last line."""
    environment = os.environ | {"MLFLOW_TRACKING_URI": p.server}
    submission = f"{step}-{secrets.token_hex(4)}" if p.ray_address and step in ON_RAY else None
    program = [sys.executable, "-m", "aldm.cli", *words]
    if submission is not None:
        program = submit(words, p, submission)
    tail: deque[str] = deque(maxlen=1)
    previous = signal.signal(signal.SIGTERM, _terminate)
    process = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True, errors="replace"
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            tail.extend([line.strip()] if line.strip() else [])
        return process.wait(), "".join(tail)
    finally:
        signal.signal(signal.SIGTERM, previous)
        if process.poll() is None:
            _end(process, p, submission)


def submit(words: Sequence[str], p: Parameters, submission: str) -> list[str]:
    """Return the command that runs `aldm WORDS` as a job of the cluster and waits for it."""
    environment = json.dumps({"env_vars": {"MLFLOW_TRACKING_URI": p.server}})
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", p.ray_address]
    return [*ray, "--submission-id", submission, "--runtime-env-json", environment, "--", "aldm", *words]


def _terminate(*_: object) -> None:
    raise Terminated


def _end(process: "subprocess.Popen[str]", p: Parameters, submission: str | None) -> None:
    """End a command that is no longer waited for, and its job: ending the client does not end that."""
    process.send_signal(signal.SIGTERM)
    if submission is not None:
        words = ["job", "stop", "--address", p.ray_address, submission]
        subprocess.run([sys.executable, "-m", "ray.scripts.scripts", *words], check=False, timeout=END_WAIT_S)
    try:
        process.wait(END_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()


def step(name: str, parameters: dict[str, Any]) -> Parameters:
    """Run a step in its pod, as `run_step`, and return the parameters; see `_explained`."""
    with _explained():
        p = Parameters.of(parameters)
        run_step(name, p)
        return p


def checked(parameters: dict[str, Any]) -> Parameters:
    """Return parameters that can work, in a pod; see `_explained`."""
    with _explained():
        p = Parameters.of(parameters)
        check(p)
        return p


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Let what the user can mend end the process with one line and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"pipeline: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from error
