"""Writes kuberay-crds.json, the schemas of KubeRay's CRDs that tests/test_kubernetes.py checks the manifests against.

    python tests/data/reduce_crds.py FOLDER

FOLDER holds ray.io_rayclusters.yaml, ray.io_rayjobs.yaml and ray.io_rayservices.yaml of a KubeRay release
(github.com/ray-project/kuberay, helm-chart/kuberay-operator/crds). Descriptions go, and what is inside pod templates,
which are checked as pods of Kubernetes; a cluster inside a job or a service is that of RayCluster. 3 MB become 40 kB.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
OUT = Path(__file__).with_name("kuberay-crds.json")
ANYTHING = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
CLUSTER = {"$ref": "#/$defs/cluster"}


def reduced(schema: Any) -> Any:
    """Return a schema without descriptions, its pods any object."""
    if isinstance(schema, list):
        return [reduced(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    pod = schema.get("properties", {}).get("spec", schema).get("properties", {})
    if isinstance(pod, dict) and {"containers", "initContainers"} <= set(pod):
        return ANYTHING
    return {key: reduced(value) for key, value in schema.items() if key != "description" or isinstance(value, dict)}


def main() -> None:
    """Write the file."""
    schemas = {}
    for kind, name in KINDS.items():
        text = (Path(sys.argv[1]) / f"ray.io_{name}.yaml").read_text()
        versions = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
        (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
        schemas[kind] = reduced(schema)
        schemas[kind]["properties"].pop("status")
    cluster = schemas["RayCluster"]["properties"]["spec"]
    for kind, field in (("RayJob", "rayClusterSpec"), ("RayService", "rayClusterConfig")):
        assert schemas[kind]["properties"]["spec"]["properties"][field] == cluster
        schemas[kind]["properties"]["spec"]["properties"][field] = CLUSTER
    schemas["RayCluster"]["properties"]["spec"] = CLUSTER
    OUT.write_text(json.dumps({"cluster": cluster, "kinds": schemas}, separators=(",", ":"), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
