"""Whether the commands and the service's configuration inside Ray objects are ones that this code takes.

A command is parsed by the job's own parser, a configuration by the service's own settings: nothing is kept in step by
hand.
"""

import contextlib
import importlib
import inspect
import io
import shlex
from importlib import metadata
from typing import Any

import yaml

from aldm.cli import JOBS
from aldm.config import Config
from aldm.errors import UserError
from pipelines.arguments import resolve_config
from pipelines.kubernetes_schemas import Manifest
from pipelines.registry_download import REGISTRY, is_version

TOKENS_SECRET = "aldm-service-tokens"
GPU = "nvidia.com/gpu"
RAY_CLUSTER_IN = {"RayCluster": "", "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}


def cluster_spec(manifest: Manifest) -> dict[str, Any]:
    """Return the description of the Ray cluster in a Ray object."""
    spec: dict[str, Any] = manifest["spec"]
    name = RAY_CLUSTER_IN[manifest["kind"]]
    return spec[name] if name else spec


def words_of(job: Manifest) -> list[str]:
    """Return the words of a RayJob's command."""
    return shlex.split(job["spec"]["entrypoint"])


def parsed(words: list[str]) -> tuple[Any, Config]:
    """Return the arguments of `aldm JOB ...` and its configuration, as the job itself would understand them.

    Raises:
        UserError: no such job, flag, preset or key.
    """
    if not words or words[0] != "aldm":
        raise UserError(f"entrypoint begins with {words[0] if words else 'nothing'}, wanted aldm")
    if len(words) < 2 or words[1] not in JOBS:
        raise UserError(f"entrypoint: no job {' '.join(words[1:2])!r}: the jobs are {', '.join(JOBS)}")
    module, rest = importlib.import_module(JOBS[words[1]][0]), words[2:]
    stages = getattr(module, "SUBCOMMANDS", None)
    if stages is not None and (not rest or rest[0] not in stages):
        raise UserError(f"entrypoint: aldm {words[1]} {' '.join(rest[:1])}: wanted one of {', '.join(stages)}")
    if not (hasattr(module, "parse") or hasattr(module, "_parser")):
        raise UserError(f"entrypoint: aldm {words[1]} is no job for a cluster")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if hasattr(module, "parse"):
                return module.parse(rest[0], rest[1:])
            args = module._parser().parse_args(rest)
    except SystemExit as error:
        raise UserError(f"entrypoint: {said.getvalue().splitlines()[0]}") from error
    return args, resolve_config(args)


def command_errors(job: Manifest) -> list[str]:
    """Return what is wrong with a RayJob's command, and where its cluster does not go with it."""
    words = words_of(job)
    try:
        args, config = parsed(words)
        if words[1] == "train":
            from pipelines.ray_training import cluster_of

            cluster_of(args, config, words[2])
            if words[2] == "vqgan" and config.codec.kind == "haar":
                raise UserError(f"entrypoint: preset {config.preset} has the haar codec, which is not trained")
    except UserError as error:
        return [str(error)]
    groups = cluster_spec(job).get("workerGroupSpecs", [])
    found = version_errors(cluster_spec(job))
    wanted = getattr(args, "num_workers", None)
    for group in groups:
        sizes = {group["replicas"], group["minReplicas"], group["maxReplicas"]}
        if len(sizes) != 1:
            found.append(
                f"worker group {group['groupName']}: Kueue counts a cluster of a fixed size, this has {sorted(sizes)}"
            )
        elif wanted is not None and sizes != {int(wanted)}:
            found.append(f"--num-workers {wanted} on {group['replicas']} workers")
        found += _gpu_errors(args, has_gpu(group))
    if wanted is not None and not groups:
        found.append(f"--num-workers {wanted}, and no worker group")
    return found


def has_gpu(group: dict[str, Any]) -> bool:
    """Whether each worker of a group has a GPU."""
    return GPU in group["template"]["spec"]["containers"][0]["resources"]["limits"]


def _gpu_errors(args: Any, there: bool) -> list[str]:
    """A command says that it computes on GPUs exactly where the workers have them."""
    asked = getattr(args, "use_gpu", False) or args.device == "cuda"
    if asked and not there:
        return ["the command asks for GPUs, and the workers have none"]
    if there and not asked:
        return ["the workers have GPUs, and the command says neither --use-gpu nor --device cuda"]
    return []


def service_errors(service: Manifest) -> list[str]:
    """Return what is wrong with a RayService's Serve configuration, and where its cluster does not go with it."""
    try:
        config = yaml.safe_load(service["spec"]["serveConfigV2"])
        (application,) = config["applications"]
        module, _, name = application["import_path"].partition(":")
        builder = getattr(importlib.import_module(module), name)
        (kind,) = [item.annotation for item in inspect.signature(builder).parameters.values()]
        settings = kind(**application["args"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError, ImportError, AttributeError) as error:
        return [f"serveConfigV2: {type(error).__name__}: {error}"]
    cluster = cluster_spec(service)
    found = version_errors(cluster)
    (group,) = cluster["workerGroupSpecs"]
    copies = settings.max_replicas or settings.num_replicas
    if group["maxReplicas"] < 2 * copies:  # serve.app.SURGE_PERCENT
        found.append(
            f"serveConfigV2: {copies} copies of the model, as many of the next one beside them when it is rolled out, "
            f"and at most {group['maxReplicas']} workers"
        )
    if (settings.model or "").startswith(REGISTRY) and not is_version(settings.model):
        found.append(
            f"serveConfigV2: model {settings.model} may be another one at the next start: wanted models:/NAME/VERSION "
            "(aldm k8s render --model)"
        )
    gpus = has_gpu(group)
    if gpus != settings.use_gpu:
        found.append(f"serveConfigV2: use_gpu is {settings.use_gpu}, and the workers have {'a' if gpus else 'no'} GPU")
    for part in (cluster["headGroupSpec"], group):
        if not _has_tokens(part["template"]["spec"], settings.token_file):
            found.append(f"serveConfigV2: token_file {settings.token_file} is not in a pod's mount of {TOKENS_SECRET}")
            break
    return found


def version_errors(cluster: dict[str, Any]) -> list[str]:
    """Return an error where a cluster's Ray is of another version than this environment's, which the image has too."""
    ours = metadata.version("ray")
    return [] if cluster["rayVersion"] == ours else [f"rayVersion is {cluster['rayVersion']}, this is for Ray {ours}"]


def _has_tokens(spec: dict[str, Any], path: str | None) -> bool:
    volumes = {item["name"] for item in spec["volumes"] if item.get("secret", {}).get("secretName") == TOKENS_SECRET}
    mounts = [item["mountPath"] for item in spec["containers"][0]["volumeMounts"] if item["name"] in volumes]
    return path is not None and any(path.startswith(f"{mount}/") for mount in mounts)
