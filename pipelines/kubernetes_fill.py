"""Fills the manifests of an overlay: image, preset, number of workers, batches, GPU."""

import copy
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aldm.config import Config, training_name, training_of
from pipelines.kubernetes_checks import OURS, containers_of, of_kind
from pipelines.kubernetes_commands import cluster_spec, has_gpu, words_of
from pipelines.kubernetes_quantities import quantity, said
from pipelines.kubernetes_schemas import Manifest, pod_templates
from pipelines.serve_config import APPLICATION, FIELD, with_model

GPU_LABEL = "aldm/gpu"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the manifests are filled with.

    Attributes:
        image: of every pod of aldm.
        preset: name of the preset, which every command is given.
        config: that preset with `settings`.
        settings: key.path=value, as for --set.
        precision: as for --precision; None leaves it out.
        num_workers: of every job.
        layout: of the data set.
        gpu: name of the GPU model, of a node label; None takes any.
        model: that the service runs, models:/NAME/VERSION; None leaves the overlay's.
    """

    image: str
    preset: str
    config: Config
    settings: Sequence[str] = field(default=())
    precision: str | None = None
    num_workers: int
    layout: str
    gpu: str | None = None
    model: str | None = None

    def batch_size(self, stage: str) -> int:
        """Return a training's batch: the one that was asked for, else the preset's, made divisible by the workers."""
        size = training_of(self.config, stage).batch_size
        key = f"{training_name(stage)}.batch_size="
        if any(setting.startswith(key) for setting in self.settings):
            return size
        return math.ceil(size / self.num_workers) * self.num_workers


def filled(manifests: Sequence[Manifest], setup: Setup) -> list[Manifest]:
    """Return the manifests with the setup filled in; those given stay as they are."""
    made = copy.deepcopy(list(manifests))
    if setup.config.codec.kind == "haar":  # nothing to train
        made = [item for item in made if item["metadata"]["name"] != "aldm-train-vqgan"]
    for manifest in made:
        for _, template in pod_templates(manifest):
            for container in containers_of(template["spec"]):
                if OURS.fullmatch(container["image"]):
                    container["image"] = setup.image
    for job in of_kind(made, "RayJob"):
        job["spec"]["entrypoint"] = shlex.join(_command(words_of(job), setup))
        for group in cluster_spec(job).get("workerGroupSpecs", []):
            group["replicas"] = group["minReplicas"] = group["maxReplicas"] = setup.num_workers
    for service in of_kind(made, "RayService"):
        if setup.model is not None:
            service["spec"][FIELD] = with_model(service["spec"][FIELD], setup.model, APPLICATION)
    for manifest in [*of_kind(made, "RayCluster"), *of_kind(made, "RayJob"), *of_kind(made, "RayService")]:
        for group in cluster_spec(manifest).get("workerGroupSpecs", []):
            if manifest["kind"] == "RayCluster":
                group["maxReplicas"] = max(group["maxReplicas"], setup.num_workers)
            if setup.gpu is not None and has_gpu(group):
                group["template"]["spec"]["nodeSelector"] = {GPU_LABEL: setup.gpu}
    _raise_quota(made)
    return made


def _command(words: list[str], setup: Setup) -> list[str]:
    """Return a job's command for another setup."""
    words = _without_batch(words)
    if "--preset" in words:
        _put(words, "--preset", setup.preset)
        for setting in setup.settings:
            words += ["--set", setting]
        if setup.precision is not None:
            words += ["--precision", setup.precision]
    if "--num-workers" in words:
        _put(words, "--num-workers", str(setup.num_workers))
    if "--layout" in words:
        _put(words, "--layout", setup.layout)
    if words[1] == "train":
        key = f"{training_name(words[2])}.batch_size"
        if not any(setting.startswith(f"{key}=") for setting in setup.settings):
            words += ["--set", f"{key}={setup.batch_size(words[2])}"]
    if "--codec" in words and setup.config.codec.kind == "haar":
        _put(words, "--codec", "haar")
    return words


def _without_batch(words: list[str]) -> list[str]:
    kept: list[str] = []
    for word in words:
        if kept and kept[-1] == "--set" and ".batch_size=" in word:
            kept.pop()
        else:
            kept.append(word)
    return kept


def _put(words: list[str], flag: str, value: str) -> None:
    words[words.index(flag) + 1] = value


def demand_of(job: Manifest) -> dict[str, float]:
    """Return what a job's pods want together: the head, the workers and the submitter, by resource."""
    cluster = cluster_spec(job)
    pods = [(1, cluster["headGroupSpec"]["template"]), (1, job["spec"]["submitterPodTemplate"])]
    pods += [(group["replicas"], group["template"]) for group in cluster.get("workerGroupSpecs", [])]
    total: dict[str, float] = {}
    for count, template in pods:
        for name, amount in _pod_demand(template["spec"]).items():
            total[name] = total.get(name, 0.0) + count * amount
    return total


def _pod_demand(spec: dict[str, Any]) -> dict[str, float]:
    total: dict[str, float] = {}
    for container in spec["containers"]:
        for name, amount in container["resources"]["limits"].items():
            total[name] = total.get(name, 0.0) + quantity(amount)
    return total


def _raise_quota(manifests: Sequence[Manifest]) -> None:
    """Let the largest job fit into its queue: Kueue would keep it waiting forever."""
    demands = [demand_of(job) for job in of_kind(manifests, "RayJob")]
    for queue in of_kind(manifests, "ClusterQueue"):
        for group in queue["spec"]["resourceGroups"]:
            for resource in (item for flavor in group["flavors"] for item in flavor["resources"]):
                wanted = max((demand.get(resource["name"], 0.0) for demand in demands), default=0.0)
                if wanted > quantity(resource["nominalQuota"]):
                    resource["nominalQuota"] = said(wanted, like=resource["nominalQuota"])
