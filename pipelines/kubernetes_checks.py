"""The house rules of the manifests, beyond what the API server asks: security, resources, names that go together."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from aldm import __version__
from pipelines.kubernetes_commands import RAY_CLUSTER_IN, command_errors, service_errors
from pipelines.kubernetes_schemas import Manifest, name_of, pod_templates, schema_errors

QUEUE, PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
ENFORCE = "pod-security.kubernetes.io/enforce"
SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|CREDENTIAL|_KEY(_ID)?$|^KEY$", re.IGNORECASE)
_CONTAINER = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True}
RELEASE = re.compile(r"(?P<version>\d+\.\d+\.\d+)(?:-(?P<variant>cpu|cuda))?")
"""Tag of an image that k8s/Dockerfile made, as its first lines say to name it."""
OURS = re.compile(r"(?:.*/)?aldm(?::[\w.-]+)?(?:@sha256:[0-9a-f]{64})?")


def manifest_errors(manifests: Sequence[Manifest], *, image: str | None = None) -> list[str]:
    """Return everything that is wrong with a set of manifests, a line each.

    Args:
        manifests: all objects of an overlay.
        image: the one image of aldm that all its pods run; None takes what the manifests say, with aldm's own version.
    """
    found = [line for manifest in manifests for line in schema_errors(manifest)]
    if found:
        return found  # the rules below read fields that are known to be there
    for manifest in manifests:
        found += _object_errors(manifest)
        for place, template in pod_templates(manifest):
            found += [f"{name_of(manifest)}: {place}: {line}" for line in _pod_errors(template["spec"])]
    found += _image_errors(manifests, image)
    found += _budget_errors(manifests)
    found += _twice(manifests)
    for job in of_kind(manifests, "RayJob"):
        found += [f"{name_of(job)}: {line}" for line in [*_queue_errors(job, manifests), *command_errors(job)]]
    for service in of_kind(manifests, "RayService"):
        found += [f"{name_of(service)}: {line}" for line in service_errors(service)]
    return found


def of_kind(manifests: Sequence[Manifest], kind: str) -> list[Manifest]:
    """Return the objects of a kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def containers_of(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all containers of a pod, those that run before the others first."""
    yield from spec.get("initContainers", [])
    yield from spec.get("containers", [])


def _object_errors(manifest: Manifest) -> list[str]:
    if manifest["kind"] == "Secret":
        return [
            f"{name_of(manifest)}: a Secret's values do not belong into manifests: make it with kubectl create secret"
        ]
    if manifest["kind"] == "Namespace":
        level = manifest["metadata"].get("labels", {}).get(ENFORCE)
        if level != "restricted":
            return [f"{name_of(manifest)}: label {ENFORCE} is {level}, wanted restricted"]
    return []


def _pod_errors(spec: dict[str, Any]) -> list[str]:
    """Check one pod: restricted, limited, and without secrets in its words."""
    found = []
    context = spec.get("securityContext") or {}
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        found.append("securityContext: wanted runAsNonRoot and a runAsUser above 0")
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        found.append("securityContext: wanted seccompProfile RuntimeDefault")
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            found.append(f"{key}: a pod stays to itself")
    for volume in spec.get("volumes", []):
        if "hostPath" in volume:
            found.append(f"volume {volume['name']}: hostPath is not allowed")
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            found.append(f"volume {volume['name']}: emptyDir without sizeLimit")
    for container in containers_of(spec):
        found += [f"container {container['name']}: {line}" for line in _container_errors(container)]
    return found


def _container_errors(container: dict[str, Any]) -> list[str]:
    found = []
    context = container.get("securityContext")
    if context is None:
        found.append("no securityContext")
    else:
        found += [
            f"securityContext.{key} is not {value}"
            for key, value in _CONTAINER.items()
            if context.get(key) is not value
        ]
        if context.get("capabilities", {}).get("drop") != ["ALL"]:
            found.append("securityContext.capabilities: wanted drop: [ALL]")
    resources = container.get("resources", {})
    limits, requests = resources.get("limits", {}), resources.get("requests", {})
    missing = [key for key in ("cpu", "memory") if key not in limits]
    if missing:
        found.append(f"resources: no limit of {' and '.join(missing)}")
    if limits != requests:
        found.append(f"resources: requests {requests} are not the limits {limits}")
    for variable in container.get("env", []):
        if variable.get("value") and SECRET_NAME.search(variable["name"]):
            found.append(f"env {variable['name']}: a secret's value in the manifest: take it by secretKeyRef")
    return found


def _image_errors(manifests: Sequence[Manifest], image: str | None) -> list[str]:
    """Every image has a tag or digest, and those of aldm are one and the same, of this version."""
    found = []
    for manifest in manifests:
        for place, template in pod_templates(manifest):
            for container in containers_of(template["spec"]):
                name, where = container["image"], f"{name_of(manifest)}: {place}: container {container['name']}"
                if ":" not in name.rpartition("/")[2] and "@" not in name:
                    found.append(f"{where}: image {name} has no tag")
                elif name.endswith(":latest"):
                    found.append(f"{where}: image {name} is whatever is newest: name a version")
                elif image is not None and OURS.fullmatch(name) and name != image:
                    found.append(f"{where}: image {name}, wanted {image}")
                elif image is None and OURS.fullmatch(name) and _version_of(name) != __version__:
                    found.append(f"{where}: image {name} is not of aldm {__version__}")
    return found


def _version_of(image: str) -> str:
    return tag_of(image).partition("-")[0]


def tag_of(image: str) -> str:
    """Return the tag of an image's name; nothing where it has none."""
    return image.rpartition("/")[2].partition("@")[0].partition(":")[2]


def _budget_errors(manifests: Sequence[Manifest]) -> list[str]:
    """Budgets of Ray's pods count with minAvailable: their owner, a RayCluster, has no scale to take the rest from."""
    ray = [item for item in manifests if item["kind"] in RAY_CLUSTER_IN]
    pods = [template["metadata"].get("labels", {}) for item in ray for _, template in pod_templates(item)]
    found = []
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        wanted = budget["spec"].get("selector", {}).get("matchLabels", {})
        selects = any(wanted.items() <= labels.items() for labels in pods)
        if selects and not isinstance(budget["spec"].get("minAvailable"), int):
            found.append(
                f"{name_of(budget)}: selects pods of Ray clusters, which have no scale: say minAvailable: NUMBER"
            )
    return found


def _queue_errors(job: Manifest, manifests: Sequence[Manifest]) -> list[str]:
    """A job waits in a queue that is there, with a priority that is there."""
    labels = job["metadata"].get("labels", {})
    if QUEUE not in labels:
        return [f"no label {QUEUE}: the job would not wait for its turn"]
    found = []
    for label, kind in ((QUEUE, "LocalQueue"), (PRIORITY, "WorkloadPriorityClass")):
        names = [manifest["metadata"]["name"] for manifest in of_kind(manifests, kind)]
        if label in labels and names and labels[label] not in names:
            found.append(f"label {label} is {labels[label]}, there is {', '.join(names)}")
    if PRIORITY not in labels:
        found.append(f"no label {PRIORITY}")
    return found


def _twice(manifests: Sequence[Manifest]) -> list[str]:
    seen, found = set(), []
    for manifest in manifests:
        key = (manifest["apiVersion"], manifest["kind"], manifest["metadata"]["name"])
        if key in seen:
            found.append(f"{name_of(manifest)}: defined twice")
        seen.add(key)
    return found
