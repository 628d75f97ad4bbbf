"""Broken manifests: each is caught, by the name of the object and of what is wrong with it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from kubernetes_objects import one

from pipelines.kubernetes_checks import manifest_errors
from pipelines.kubernetes_commands import cluster_spec
from pipelines.kubernetes_schemas import Manifest

Change = Callable[[Manifest], Any]


def worker(manifest: Manifest) -> dict[str, Any]:
    """The container of the worker group of a Ray object."""
    found: dict[str, Any] = cluster_spec(manifest)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    return found


def pod(manifest: Manifest) -> dict[str, Any]:
    """The pod of a Deployment or StatefulSet."""
    found: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return found


def renamed(old: str, new: str) -> Change:
    """Change words of a RayJob's command."""

    def change(job: Manifest) -> None:
        assert old in job["spec"]["entrypoint"]
        job["spec"]["entrypoint"] = job["spec"]["entrypoint"].replace(old, new)

    return change


def moved(old: str, new: str) -> Change:
    """Change words of a RayService's configuration."""

    def change(service: Manifest) -> None:
        assert old in service["spec"]["serveConfigV2"]
        service["spec"]["serveConfigV2"] = service["spec"]["serveConfigV2"].replace(old, new)

    return change


JOB, SERVICE = ("RayJob", "aldm-train-ms-spade"), ("RayService", "aldm-translator")
MLFLOW, CLUSTER = ("Deployment", "mlflow"), ("RayCluster", "aldm")
FAULTS: dict[str, tuple[tuple[str, str], Change, str]] = {
    "typo in a field of a RayJob": (JOB, lambda j: j["spec"].update(entryPoint="x"), "'entryPoint' was unexpected"),
    "typo in a field of a Ray cluster": (
        CLUSTER,
        lambda c: c["spec"].update(rayVersoin="2"),
        "'rayVersoin' was unexpected",
    ),
    "typo inside a Ray pod": (JOB, lambda j: worker(j).update(imagez="x"), "'imagez' was unexpected"),
    "typo in a Deployment": (MLFLOW, lambda d: d["spec"].update(replica=1), "'replica' was unexpected"),
    "text for a number in a Deployment": (
        MLFLOW,
        lambda d: d["spec"].update(replicas="1"),
        "spec.replicas: '1' is not of",
    ),
    "text for a number in a RayJob": (
        JOB,
        lambda j: j["spec"].update(backoffLimit="2"),
        "spec.backoffLimit: '2' is not of",
    ),
    "a number for text": (JOB, lambda j: j["metadata"].update(name=7), "metadata.name: 7 is not of type 'string'"),
    "unknown kind": (MLFLOW, lambda d: d.update(kind="Deploymint"), "kind Deploymint of apps/v1 is not known"),
    "unknown version": (JOB, lambda j: j.update(apiVersion="ray.io/v2"), "kind RayJob of ray.io/v2 is not known"),
    "no command": (JOB, lambda j: j["spec"].pop("entrypoint"), "'entrypoint' is a required property"),
    "no limit": (MLFLOW, lambda d: pod(d)["containers"][0]["resources"]["limits"].pop("memory"), "no limit of memory"),
    "no limit in an init container": (
        MLFLOW,
        lambda d: pod(d)["initContainers"][0].pop("resources"),
        "container bucket: resources: no limit of cpu and memory",
    ),
    "requests below limits": (
        JOB,
        lambda j: worker(j)["resources"]["requests"].update(cpu="100m"),
        "are not the limits",
    ),
    "no securityContext": (JOB, lambda j: worker(j).pop("securityContext"), "container ray-worker: no securityContext"),
    "privilege escalation": (
        CLUSTER,
        lambda c: worker(c)["securityContext"].update(allowPrivilegeEscalation=True),
        "securityContext.allowPrivilegeEscalation is not False",
    ),
    "root": (
        MLFLOW,
        lambda d: pod(d)["securityContext"].update(runAsUser=0),
        "wanted runAsNonRoot and a runAsUser above 0",
    ),
    "a host's folder": (
        MLFLOW,
        lambda d: pod(d)["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
        "volume host: hostPath is not allowed",
    ),
    "wrong image tag": (JOB, lambda j: worker(j).update(image="aldm:0.0.9-cpu"), "image aldm:0.0.9-cpu is not of aldm"),
    "no image tag": (MLFLOW, lambda d: pod(d)["containers"][0].update(image="postgres"), "image postgres has no tag"),
    "newest image": (MLFLOW, lambda d: pod(d)["containers"][0].update(image="x:latest"), "name a version"),
    "a secret's value": (
        MLFLOW,
        lambda d: pod(d)["containers"][0]["env"].append({"name": "DB_PASSWORD", "value": "hunter2"}),
        "env DB_PASSWORD: a secret's value in the manifest",
    ),
    "a Secret": (
        MLFLOW,
        lambda d: (d.clear(), d.update(apiVersion="v1", kind="Secret", metadata={"name": "s"}, stringData={"a": "b"})),
        "Secret s: a Secret's values do not belong into manifests",
    ),
    "no queue": (
        JOB,
        lambda j: j["metadata"]["labels"].pop("kueue.x-k8s.io/queue-name"),
        "no label kueue.x-k8s.io/queue-name",
    ),
    "no shutdown": (
        JOB,
        lambda j: j["spec"].update(shutdownAfterJobFinishes=False),
        "shutdownAfterJobFinishes: True was expected",
    ),
    "no token": (CLUSTER, lambda c: c["spec"]["authOptions"].update(mode="disabled"), "'token' was expected"),
    "unknown flag": (JOB, renamed("--latents", "--latentz"), "--latent"),
    "unknown job": (JOB, renamed("aldm train", "aldm trian"), "no job 'trian'"),
    "unknown stage": (JOB, renamed("ms-spade --latents", "ms-spode --latents"), "aldm train ms-spode: wanted one of"),
    "unknown preset": (JOB, renamed("--preset tiny", "--preset teeny"), "no preset 'teeny'"),
    "unknown key": (JOB, renamed("train_ms_spade.batch_size", "train_ms_spade.batchsize"), "batchsize"),
    "a batch that cannot be shared": (JOB, renamed("batch_size=2", "batch_size=3"), "cannot share batches of 3"),
    "another number of workers": (
        JOB,
        lambda j: cluster_spec(j)["workerGroupSpecs"][0].update(replicas=5, minReplicas=5, maxReplicas=5),
        "--num-workers 2 on 5 workers",
    ),
    "workers that come and go in a queue": (
        JOB,
        lambda j: cluster_spec(j)["workerGroupSpecs"][0].update(minReplicas=0),
        "Kueue counts a cluster of a fixed size",
    ),
    "GPUs that are not there": (
        JOB,
        renamed("--num-workers 2", "--num-workers 2 --use-gpu"),
        "the command asks for GPUs, and the workers have none",
    ),
    "GPUs that nobody asked for": (
        JOB,
        lambda j: [worker(j)["resources"][kind].update({"nvidia.com/gpu": "1"}) for kind in ("limits", "requests")],
        "the workers have GPUs, and the command says neither --use-gpu nor --device cuda",
    ),
    "another Ray": (JOB, lambda j: cluster_spec(j).update(rayVersion="2.9.0"), "rayVersion is 2.9.0"),
    "no such application": (SERVICE, moved("serve.app:build_app", "serve.app:make_app"), "make_app"),
    "no such module": (SERVICE, moved("serve.app:", "serve.application:"), "serve.application"),
    "unknown argument": (SERVICE, moved("max_queue", "queue_max"), "queue_max"),
    "a GPU that is not there": (SERVICE, moved("use_gpu: false", "use_gpu: true"), "the workers have no GPU"),
    "more copies than workers": (
        SERVICE,
        moved("max_replicas: 2", "max_replicas: 3"),
        "3 copies of the model, as many of the next one beside them when it is rolled out, and at most 4 workers",
    ),
    "a model that may change": (
        SERVICE,
        moved("models:/translator/1", "models:/translator@champion"),
        "model models:/translator@champion may be another one at the next start: wanted models:/NAME/VERSION",
    ),
    "tokens that are not mounted": (
        SERVICE,
        moved("/var/run/aldm/tokens", "/var/run/tokens"),
        "is not in a pod's mount",
    ),
    "a strategy that there is not": (
        SERVICE,
        lambda s: s["spec"]["upgradeStrategy"].update(type="Rolling"),
        "spec.upgradeStrategy.type: 'Rolling' is not one of",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_caught_by_name(fault: str) -> None:
    (kind, name), change, wanted = FAULTS[fault]
    manifest = copy.deepcopy(one("dev", kind, name))
    assert manifest_errors([manifest]) == []
    change(manifest)
    found = manifest_errors([manifest])
    assert any(wanted in line for line in found), found
    assert all(line.startswith(f"{manifest['kind']} {manifest['metadata']['name']}:") for line in found)


def test_two_of_one_name_are_caught() -> None:
    manifest = one("dev", *MLFLOW)
    assert manifest_errors([manifest, manifest]) == ["Deployment mlflow: defined twice"]


@pytest.mark.parametrize("asked", [{"maxUnavailable": 1}, {"maxUnavailable": 0}, {"minAvailable": "50%"}])
def test_a_budget_that_needs_a_scale_is_caught_where_it_selects_rays_pods(asked: dict[str, Any]) -> None:
    budget, cluster = copy.deepcopy(one("dev", "PodDisruptionBudget", "ray-heads")), one("dev", *CLUSTER)
    selector = {"selector": budget["spec"]["selector"]}
    assert manifest_errors([budget, cluster]) == []
    budget["spec"] = selector | asked
    (found,) = manifest_errors([budget, cluster])
    assert found.startswith("PodDisruptionBudget ray-heads: selects pods of Ray clusters, which have no scale")
    budget["spec"]["selector"] = {"matchLabels": {"app.kubernetes.io/name": "mlflow"}}
    assert manifest_errors([budget, cluster, one("dev", *MLFLOW)]) == []


def test_a_priority_that_is_not_there_is_caught() -> None:
    job = copy.deepcopy(one("dev", *JOB))
    job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] = "urgent"
    (found,) = manifest_errors([job, one("dev", "WorkloadPriorityClass", "aldm-low")])
    assert "kueue.x-k8s.io/priority-class is urgent, there is aldm-low" in found
