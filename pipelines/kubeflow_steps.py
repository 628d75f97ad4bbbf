"""The steps of the pipeline without Kubeflow: their parameters and `aldm` commands, and which of them are done.

Everything that a run makes lies in one folder on shared storage, SHARED/runs/RUN_NAME:

    pipeline.json     what the run is made of: data, preset, settings, seeds; a run with others is refused
    steps/NAME.json   of each step: its command, whether it runs, is done or failed, how long it took, its job on Ray
    data store latents vqgan ms-spade diffusion model scores serve.yaml     what the commands write

A step whose record says `done`, with the same command, and whose result is there is skipped; how the others are run or
gone on with says `pipelines/kubeflow_run.py`. Where a step runs (workers, cluster, service) is no part of its command
here: that may change from start to start. Only a training in the middle keeps to what it began with, workers or none:
an engine cannot go on from what another one has written.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from aldm.config import Config, override, training_name, training_of
from aldm.config_training import choice
from aldm.data.layouts import LAYOUTS
from aldm.data.store import SPLITS
from aldm.errors import UserError
from aldm.presets import load_preset
from pipelines.champion import is_current
from pipelines.registry import check_names
from pipelines.tracking_server import DATABASE_FILE, default_server

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
"""The parameters that a run's models depend on; a run continues with the same ones only."""


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
    run_name: str = _parameter("first", "the run's folder is SHARED/runs/RUN_NAME; the same name continues it")
    split: str = _parameter("test", "subjects on which the new model and the champion are measured")
    device: str = _parameter("auto", "where to compute: auto, cpu, cuda")
    num_workers: int = _parameter(0, "workers on Ray of each step; 0 works in one process without Ray")
    use_gpu: bool = _parameter(False, "give a GPU to every worker that trains, encodes or evaluates")
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
        return self.tracking_uri or f"sqlite:///{Path(self.shared).resolve() / DATABASE_FILE}"

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
        kinds = {item.name: item.type for item in fields(cls)}
        unknown = set(values) - set(kinds)
        if unknown:
            raise UserError(f"the pipeline has no parameter {', '.join(sorted(unknown))}")
        whole: dict[str, Any] = {name: int(value) if kinds[name] is int else value for name, value in values.items()}
        return cls(**whole)


def commands(p: Parameters) -> dict[str, tuple[str, ...] | None]:
    """Return the words after `aldm` of every step; None where there is nothing to do."""
    run, config = p.folder, p.config
    haar = config.codec.kind == "haar"
    setup = ("--preset", p.preset, *(word for text in p.settings for word in ("--set", text)))
    # the cluster may be an idle one: what it has now says nothing about the nodes and GPUs that it adds when asked
    growing = ("--autoscaling",) if p.ray_address else ()
    workers = ("--num-workers", p.num_workers, *growing) if p.num_workers else ()
    device = ("--device", "cuda" if p.use_gpu else p.device)

    def train(stage: str, *inputs: object) -> tuple[object, ...]:
        words = ("train", stage, *inputs, "--run-dir", run / stage, *setup, "--seed", p.seed)
        if not workers:
            return (*words, *device, "--group", run, "--engine", "plain")
        # never --device cuda: it asks for a GPU where the job was submitted to as well, which is the head
        where = ("--use-gpu",) if "cuda" in device else device
        return (*words, *where, "--group", run, *workers, "--max-failures", p.max_failures)

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
    """Refuse parameters that cannot work, or not with what the run's folder holds, before any step.

    Raises:
        UserError: one of them, a run of this name that is made of other ones, or a training that cannot go on so.
    """
    check_parameters(p)
    has_begun(p)
    _check_engines(p)


def check_parameters(p: Parameters, *, with_batches: bool = True) -> None:
    """Refuse parameters that cannot work whatever is in the run's folder, which is not looked at.

    Args:
        p: of the run.
        with_batches: whether the preset is the run's own, so that its batches say what workers can share.

    Raises:
        UserError: one of them.
    """
    commands(p)  # refuses a wrong preset or setting
    check_names(p.model_name, p.alias)
    choice("layout", p.layout, LAYOUTS)
    choice("split", p.split, SPLITS)
    if p.seed < 0 or not math.isfinite(p.min_gain_db):
        raise UserError(f"seed is {p.seed} and min_gain_db {p.min_gain_db}: wanted 0 or more, and a finite number")
    for name, kinds in (("ray_address", ("http",)), ("tracking_uri", ("http", "sqlite", "postgresql", "mysql"))):
        text = getattr(p, name)
        if text and not ("://" in text and text.startswith(kinds)):
            raise UserError(f"{name} is {text!r}, wanted an address such as http://host:port")
    for name in ("service", "namespace"):
        text = getattr(p, name)
        if text and not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", text):
            raise UserError(f"{name} is {text!r}, wanted a name of Kubernetes: small letters, digits and -")
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
    if p.use_gpu and p.device == "cpu":
        raise UserError("use_gpu and device cpu contradict each other: give one of them")
    if with_batches and p.num_workers:
        _check_batches(p)


def _check_batches(p: Parameters) -> None:
    """Refuse workers that cannot share the batch of a training.

    Raises:
        UserError: the batch size is no multiple of the number of workers.
    """
    for step in STEP_NAMES:
        if step.startswith("train-") and commands(p)[step] is not None:
            stage = step.removeprefix("train-")
            size = training_of(p.config, stage).batch_size
            shared = -(-size // p.num_workers) * p.num_workers
            if size != shared:
                raise UserError(
                    f"num_workers is {p.num_workers}, which cannot share the batches of {size} of {step}: give "
                    f"{training_name(stage)}.batch_size={shared} in settings (--set), "
                    "or another number of workers"
                )


def has_begun(p: Parameters) -> bool:
    """Return whether the run has begun before.

    Raises:
        UserError: a run made of other parameters.
    """
    file = p.folder / SETTINGS
    if not file.is_file():
        return False
    before, now = json.loads(file.read_text()), made_of(p)
    changed = [f"{name} {before.get(name)!r}" for name in now if before.get(name) != now[name]]
    if changed:
        raise UserError(f"{p.folder} holds a run with {', '.join(changed)}: give another run_name, or the same again")
    return True


def made_of(p: Parameters) -> dict[str, Any]:
    """Return the parameters that the run's models depend on."""
    return {name: value for name, value in asdict(p).items() if name in MADE_OF}


def _check_engines(p: Parameters) -> None:
    """Refuse to go on with a training by another engine; one that is done or starts from scratch may have any.

    Raises:
        UserError: there is such a training.
    """
    for step in STEP_NAMES:
        before = read_step(step, p).get("num_workers")
        if before is None or bool(before) == bool(p.num_workers) or is_done(step, p) or not goes_on(step, p):
            continue
        raise UserError(
            f"{step} of {p.folder} has begun with num_workers {before} and cannot go on with {p.num_workers}: training "
            "in one process and training on workers keep their states differently. Give "
            f"{'at least 1' if before else '0'} until it is done, or another run_name"
        )


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


def goes_on(step: str, p: Parameters) -> bool:
    """Return whether a step is a training that was stopped and goes on from its last checkpoint."""
    same = read_step(step, p).get("command") == line_of(step, p)
    return step.startswith("train-") and same and result_of(step, p).exists()


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
