"""The overlays' objects, made once for all tests, and questions to them that several tests ask."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.kubernetes_render import MANIFESTS, kustomized, overlay_folder
from pipelines.kubernetes_schemas import Manifest, name_of, pod_templates

ROOT = Path(__file__).resolve().parent.parent
OVERLAYS = sorted(path.parent.name for path in (MANIFESTS / "overlays").glob("*/kustomization.yaml"))


@functools.cache
def overlay(name: str) -> tuple[Manifest, ...]:
    """All objects of an overlay. Copy before changing one."""
    return tuple(kustomized(overlay_folder(name)))


def one(overlay_name: str, kind: str, name: str) -> Manifest:
    """One object."""
    (found,) = [item for item in overlay(overlay_name) if (item["kind"], item["metadata"]["name"]) == (kind, name)]
    return found


def all_of(overlay_name: str, kind: str) -> list[Manifest]:
    """All objects of a kind."""
    return [item for item in overlay(overlay_name) if item["kind"] == kind]


def pods(overlay_name: str) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Yield name, labels and spec of each pod template."""
    for manifest in overlay(overlay_name):
        for place, template in pod_templates(manifest):
            yield f"{name_of(manifest)} {place}", template["metadata"]["labels"], template["spec"]


def selected(overlay_name: str, labels: dict[str, str]) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    """The pods that carry all of the labels."""
    return [pod for pod in pods(overlay_name) if labels.items() <= pod[1].items()]


def ports_of(spec: dict[str, Any]) -> set[str]:
    """Names of a pod's ports."""
    return {port["name"] for container in spec["containers"] for port in container.get("ports", [])}
