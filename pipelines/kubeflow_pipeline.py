"""The Kubeflow pipeline itself: components and their order. Needs kfp; `pipelines/kubeflow.py` is how it is used.

Every component is a few lines that Kubeflow puts into the pod as they stand (so they import inside): they run one step
(`pipelines/kubeflow_run.py`), which is an `aldm` command, and show what it made.

Caching. Kubeflow remembers a step by its inputs, and would call it done though the folder on shared storage that it
wrote is gone or holds another run's. So only `check` is cached, which looks at the parameters (and a preset's file)
alone, never at the run's folder. All others are not, and ask the storage instead (`is_done`): a step whose result is
there, made by the same command, ends within seconds. By step:

    check                  cached: a function of the parameters and the image; whether the run's folder goes with them
                           every other step checks for itself
    simulate, prepare,     not cached: the result is a folder on shared storage; skipped there if complete
    encode, export
    train-*                not cached: as above; a retry goes on from the last checkpoint
    evaluate               not cached: the champion it is compared with changes meanwhile; skipped if it has not
    to_beat                not cached: reads what evaluate wrote
    register, roll         not cached: they change the registry and the service; both do nothing a second time

Retries. Steps that wait for machines (on Ray) are tried again after 1, 2 and 4 minutes; `check` never, since the same
parameters are wrong again.
"""

from typing import Any, NamedTuple

from kfp import dsl
from kfp.dsl import HTML, Markdown, Metrics, Output

from aldm import __version__

IMAGE = f"aldm:{__version__}-cpu"
"""The steps' image: trainings run on the cluster's GPUs, their steps submit and wait."""
USER = 10001
"""That of all pods, as the image has it and the files on shared storage are owned."""
VOLUME, SECRETS = "aldm-data", {"ray-auth-token": {"auth_token": "RAY_AUTH_TOKEN"}}
"""Claim of the shared storage; Secret -> its key -> environment variable."""
RETRIES, BACKOFF_S = 3, "60s"


component = dsl.component(base_image=IMAGE, install_kfp_package=False)


@component
def check(
    plan: Output[Markdown],
    data: str,
    layout: str,
    preset: str,
    settings: list,
    splits: str,
    num_subjects: int,
    seed: int,
    shared: str,
    run_name: str,
    split: str,
    device: str,
    num_workers: int,
    use_gpu: bool,
    max_failures: int,
    ray_address: str,
    tracking_uri: str,
    model_name: str,
    alias: str,
    min_gain_db: float,
    service: str,
    namespace: str,
) -> NamedTuple("Checked", [("parameters", dict)]):  # type: ignore[valid-type]  # the form that kfp reads
    """Refuse parameters that cannot work, and show every command of the run."""
    values = {name: value for name, value in locals().items() if name != "plan"}
    import collections

    from pipelines.kubeflow_report import plan_page, write_text
    from pipelines.kubeflow_run import checked

    write_text(plan.path, plan_page(checked(values)))
    return collections.namedtuple("Checked", ["parameters"])(values)


@component
def simulate(parameters: dict) -> None:
    """Write simulated subjects, where there is no data set (aldm phantom)."""
    from pipelines.kubeflow_run import step

    step("simulate", parameters)


@component
def prepare(parameters: dict) -> None:
    """Check the data set and make a store of it (aldm prepare)."""
    from pipelines.kubeflow_run import step

    step("prepare", parameters)


@component
def train_vqgan(parameters: dict, metrics: Output[Metrics]) -> None:
    """Stage 1 (aldm train vqgan); nothing to do for the lossless codec."""
    from pipelines.kubeflow_report import training_numbers
    from pipelines.kubeflow_run import step

    for name, value in training_numbers("vqgan", step("train-vqgan", parameters)).items():
        metrics.log_metric(name, value)


@component
def encode(parameters: dict) -> None:
    """Encode the store into latents (aldm encode)."""
    from pipelines.kubeflow_run import step

    step("encode", parameters)


@component
def train_ms_spade(parameters: dict, metrics: Output[Metrics]) -> None:
    """Stage 2 (aldm train ms-spade)."""
    from pipelines.kubeflow_report import training_numbers
    from pipelines.kubeflow_run import step

    for name, value in training_numbers("ms-spade", step("train-ms-spade", parameters)).items():
        metrics.log_metric(name, value)


@component
def train_diffusion(parameters: dict, metrics: Output[Metrics]) -> None:
    """Stage 3 (aldm train diffusion)."""
    from pipelines.kubeflow_report import training_numbers
    from pipelines.kubeflow_run import step

    for name, value in training_numbers("diffusion", step("train-diffusion", parameters)).items():
        metrics.log_metric(name, value)


@component
def export(parameters: dict) -> None:
    """Put the trained stages together (aldm export)."""
    from pipelines.kubeflow_run import step

    step("export", parameters)


@component
def evaluate(parameters: dict, metrics: Output[Metrics], scores: Output[Markdown], report: Output[HTML]) -> float:
    """Measure the new model and the champion (aldm evaluate --champion); return the new one's mean PSNR, dB."""
    from pipelines.kubeflow_report import comparison_of, score_numbers, score_page, score_report, write_text
    from pipelines.kubeflow_run import step

    p = step("evaluate", parameters)
    for name, value in score_numbers(p).items():
        metrics.log_metric(name, value)
    write_text(scores.path, score_page(p))
    write_text(report.path, score_report(p))
    return comparison_of(p).psnr_db


@component
def to_beat(parameters: dict) -> float:
    """Return what the new model's mean PSNR, dB, has to be above: the champion's in the same evaluation."""
    from pipelines.kubeflow_report import comparison_of
    from pipelines.kubeflow_steps import Parameters

    p = Parameters.of(parameters)
    return comparison_of(p).to_beat_db(p.min_gain_db)


@component
def register(parameters: dict) -> None:
    """Register the new model as the champion (aldm promote)."""
    from pipelines.kubeflow_run import step

    step("register", parameters)


@component
def roll(parameters: dict) -> None:
    """Check the champion and bring it into the service (aldm k8s roll)."""
    from pipelines.kubeflow_run import step

    step("roll", parameters)


def _in_pod(task: Any, *, memory: str, retries: int) -> Any:
    """Say what a step's pod needs: shared storage, Ray's token, as much memory at most as it asks for."""
    task.set_cpu_request("1").set_cpu_limit("1").set_memory_request(memory).set_memory_limit(memory)
    if retries:
        task.set_retry(retries, backoff_duration=BACKOFF_S, backoff_factor=2.0)
    task.set_env_variable("RAY_AUTH_MODE", "token")
    # what the package kfp-kubernetes writes (mount_pvc, use_secret_as_env, set_security_context), without that package.
    # The rest of PodSecurity's `restricted` Kubeflow sets by itself, since 2.16: no more can be said here.
    task.platform_config["kubernetes"] = {
        "securityContext": {"runAsUser": str(USER), "runAsGroup": str(USER), "runAsNonRoot": True},
        "pvcMount": [{"constant": VOLUME, "pvcNameParameter": _constant(VOLUME), "mountPath": "/shared"}],
        "secretAsEnv": [
            {
                "secretName": name,
                "secretNameParameter": _constant(name),
                "keyToEnv": [{"secretKey": key, "envVar": variable} for key, variable in keys.items()],
                "optional": True,
            }
            for name, keys in SECRETS.items()
        ],
    }
    return task


def _constant(value: str) -> dict[str, Any]:
    return {"runtimeValue": {"constant": value}}


@dsl.pipeline(
    name="aldm",
    description="Data set to served model: prepare, train the three stages, evaluate against the champion, register "
    "the model if it is better, and roll the service to it.",
)
def pipeline(
    data: str = "",
    layout: str = "brats",
    preset: str = "small",
    settings: list = [],  # noqa: B006
    splits: str = "",
    num_subjects: int = 24,
    seed: int = 0,
    shared: str = "/shared",
    run_name: str = "first",
    split: str = "test",
    device: str = "auto",
    num_workers: int = 0,
    use_gpu: bool = False,
    max_failures: int = 3,
    ray_address: str = "",
    tracking_uri: str = "",
    model_name: str = "translator",
    alias: str = "champion",
    min_gain_db: float = 0.0,
    service: str = "",
    namespace: str = "aldm",
) -> None:
    """Wire the steps; `Parameters` of pipelines/kubeflow_steps.py says what each parameter is."""
    first = check(**locals()).set_caching_options(True).set_display_name("check the parameters")
    _in_pod(first, memory="4G", retries=0)
    parameters = first.outputs["parameters"]
    last = first

    def then(make: Any, title: str, memory: str = "4G", retries: int = RETRIES) -> Any:
        nonlocal last
        task = make(parameters=parameters).after(last).set_caching_options(False).set_display_name(title)
        last = _in_pod(task, memory=memory, retries=retries)
        return task

    then(simulate, "aldm phantom")
    then(prepare, "aldm prepare")
    then(train_vqgan, "aldm train vqgan")
    then(encode, "aldm encode")
    then(train_ms_spade, "aldm train ms-spade")
    then(train_diffusion, "aldm train diffusion")
    then(export, "aldm export", memory="16G")
    measured = then(evaluate, "aldm evaluate", memory="16G")
    bar = then(to_beat, "what is to be beaten")
    # each by a component with no other value: kfp.local cannot look up values by name in a condition
    with dsl.If(measured.outputs["Output"] > bar.outputs["Output"], name="better than the champion"):
        then(register, "aldm promote", memory="16G")
        then(roll, "aldm k8s roll", memory="16G", retries=1)
