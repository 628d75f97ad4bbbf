"""The manifests as they are: valid, of this version, and with names that go together. Nothing here needs a cluster."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_objects import OVERLAYS, ROOT, all_of, one, overlay, pods, ports_of, selected

import aldm
from aldm.config import Config
from pipelines.kubernetes_checks import containers_of, manifest_errors
from pipelines.kubernetes_commands import cluster_spec, has_gpu, parsed, words_of
from pipelines.kubernetes_render import MANIFESTS, kustomized
from pipelines.kubernetes_schemas import json_errors, name_of, strict
from pipelines.training_metrics import LOSS, SAMPLES_PER_SECOND
from serve.app import LONGEST_JOB_S, SURGE_PERCENT
from serve.metrics import Tally, prometheus_text
from serve.settings import Settings

CRDS = json.loads((ROOT / "tests" / "data" / "kuberay-crds.json").read_text())
"""The schemas of KubeRay's own CRDs, but for what is inside pods (tests/data/reduce_crds.py)."""
JOBS = {
    "prepare",
    "train-vqgan",
    "encode",
    "train-ms-spade",
    "train-diffusion",
    "export",
    "evaluate",
    "promote",
    "tune",
    "benchmark",
}
OF_THE_CLUSTER = {"model", "work_dir", "token_file", "num_replicas", "max_replicas", "use_gpu", "max_queue"}
"""Arguments of serve/deploy.yaml that a cluster sets for itself."""
GATEWAY = "aldm-translator-gateway"
STEP = {"pipelines.kubeflow.org/v2_component": "true"}
MADE_BY_OPERATORS = ({"gateway.networking.k8s.io/gateway-name": GATEWAY}, STEP)
"""Labels of pods that are not in the manifests: the Gateway's, and those of the Kubeflow pipeline's steps."""


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_in_order(name: str) -> None:
    assert manifest_errors(overlay(name)) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_bucket_elsewhere_goes_with_an_overlay(name: str, tmp_path: Path) -> None:
    """With components/external-s3 among its components MinIO is gone and MLflow asks the bucket elsewhere alone."""
    shutil.copytree(MANIFESTS, tmp_path / "k8s")
    file = tmp_path / "k8s" / "overlays" / name / "kustomization.yaml"
    before = "  - ../../components/pods\n"
    assert file.read_text().count(before) == 1
    file.write_text(file.read_text().replace(before, f"  - ../../components/external-s3\n{before}"))
    made = kustomized(file.parent)
    assert manifest_errors(made) == []
    assert {name_of(item) for item in overlay(name)} - {name_of(item) for item in made} == {
        f"{kind} artifact-store" for kind in ("StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy")
    }
    (mlflow,) = [item for item in made if name_of(item) == "Deployment mlflow"]
    assert "http://artifact-store" not in str(mlflow)
    for container in containers_of(mlflow["spec"]["template"]["spec"]):
        variables = {item["name"]: item for item in container["env"]}
        assert "https://s3.example.org" in [item.get("value") for item in variables.values()]
        assert variables["AWS_SECRET_ACCESS_KEY"]["valueFrom"]["secretKeyRef"]["name"] == "artifact-store"
    (policy,) = [item for item in made if name_of(item) == "NetworkPolicy mlflow"]
    assert {"ports": [{"port": 443, "protocol": "TCP"}]} in policy["spec"]["egress"]
    database = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "mlflow-database"}}}
    assert database in [peer for rule in policy["spec"]["egress"] for peer in rule.get("to", [])]


@pytest.mark.parametrize("name", OVERLAYS)
def test_whose_workers_have_gpus(name: str) -> None:
    """On the overlay gpu those of every job that computes on them; none waits for files to be prepared."""
    with_gpus = {
        job["metadata"]["name"]
        for job in all_of(name, "RayJob")
        if any(has_gpu(group) for group in cluster_spec(job).get("workerGroupSpecs", []))
    }
    without = {"prepare", "export", "promote"}
    assert with_gpus == ({f"aldm-{job}" for job in JOBS - without} if name == "gpu" else set())


def crd(kind: str) -> dict[str, Any]:
    """Return the schema of a kind's CRD, in which unknown fields are errors."""
    schema: dict[str, Any] = strict(CRDS["kinds"][kind] | {"$defs": {"cluster": CRDS["cluster"]}})
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


@pytest.mark.parametrize("kind", CRDS["kinds"])
def test_ray_objects_are_what_the_crd_says(kind: str) -> None:
    """And k8s/schemas.yaml, which stands in for it elsewhere, allows no field that it does not know."""
    found = [manifest for name in OVERLAYS for manifest in all_of(name, kind)]
    for manifest in found:
        assert json_errors(manifest, crd(kind)) == [], name_of(manifest)
        broken = json.loads(json.dumps(manifest))
        cluster_spec(broken)["headGroupSpec"]["rayStartParameters"] = {}
        cluster_spec(broken)["enableInTreeAutoscaling"] = "yes"
        errors = "\n".join(json_errors(broken, crd(kind)))
        assert "rayStartParameters" in errors
        assert "'yes' is not of type 'boolean'" in errors
    assert found or kind == "RayCluster"


def test_both_overlays_have_every_job() -> None:
    assert OVERLAYS == ["dev", "gpu"]
    for name in OVERLAYS:
        assert {job["metadata"]["name"] for job in all_of(name, "RayJob")} == {f"aldm-{job}" for job in JOBS}


@pytest.mark.parametrize("name", OVERLAYS)
def test_commands_are_those_of_the_jobs(name: str) -> None:
    """A job's own parser takes each, and its name says what it runs; all paths are on the shared volume."""
    for job in all_of(name, "RayJob"):
        words = words_of(job)
        assert isinstance(parsed(words)[1], Config)
        said = "-".join(words[1:3]) if words[1] == "train" else words[1]
        assert job["metadata"]["name"] == f"aldm-{said}"
        paths = [word for word in words if "/" in word]
        assert paths
        assert all(path.startswith("/shared/") for path in paths)


def test_versions_agree() -> None:
    locked = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert locked is not None
    for name in OVERLAYS:
        for kind in CRDS["kinds"]:
            assert {cluster_spec(item)["rayVersion"] for item in all_of(name, kind)} == {locked[1]}
        images = {container["image"] for *_, spec in pods(name) for container in containers_of(spec)}
        ours = [image for image in images if image.startswith("aldm:")]
        assert ours == [f"aldm:{aldm.__version__}-{'cuda' if name == 'gpu' else 'cpu'}"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_service_is_the_one_of_deploy_yaml(name: str) -> None:
    ours = yaml.safe_load((ROOT / "serve" / "deploy.yaml").read_text())
    theirs = yaml.safe_load(one(name, "RayService", "aldm-translator")["spec"]["serveConfigV2"])
    (mine,), (its,) = (config["applications"] for config in (ours, theirs))
    assert ours["http_options"] == theirs["http_options"]
    assert {key: value for key, value in mine.items() if key != "args"} == {k: v for k, v in its.items() if k != "args"}
    assert mine["args"].keys() == its["args"].keys()
    assert {key for key in its["args"] if its["args"][key] != mine["args"][key]} <= OF_THE_CLUSTER
    Settings(**its["args"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_translation_may_finish_before_its_pod_or_cluster_goes(name: str) -> None:
    service = one(name, "RayService", "aldm-translator")
    assert service["spec"]["rayClusterDeletionDelaySeconds"] > LONGEST_JOB_S
    (group,) = cluster_spec(service)["workerGroupSpecs"]
    spec = group["template"]["spec"]
    drained = {item["name"]: item["value"] for item in spec["containers"][0]["env"]}[
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
    ]
    assert spec["terminationGracePeriodSeconds"] > float(drained) >= LONGEST_JOB_S


@pytest.mark.parametrize("name", OVERLAYS)
def test_copies_of_a_new_model_have_room_beside_the_old_ones(name: str) -> None:
    service = one(name, "RayService", "aldm-translator")
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (group,) = cluster_spec(service)["workerGroupSpecs"]
    assert group["maxReplicas"] >= application["args"]["max_replicas"] * (100 + SURGE_PERCENT) / 100


@pytest.mark.parametrize("name", OVERLAYS)
def test_selectors_select(name: str) -> None:
    """Services find pods that have the port, budgets find pods, monitors find services that have the port."""
    for service in all_of(name, "Service"):
        found = selected(name, service["spec"]["selector"])
        assert found, name_of(service)
        for port in service["spec"]["ports"]:
            assert all(port["targetPort"] in ports_of(spec) for *_, spec in found), name_of(service)
    for budget in all_of(name, "PodDisruptionBudget"):
        assert selected(name, budget["spec"]["selector"]["matchLabels"]), name_of(budget)
    for monitor in all_of(name, "ServiceMonitor"):
        labels = monitor["spec"]["selector"]["matchLabels"]
        (service,) = [item for item in all_of(name, "Service") if labels.items() <= item["metadata"]["labels"].items()]
        ports = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports
    for kind in ("Deployment", "StatefulSet"):
        for item in all_of(name, kind):
            labels = item["spec"]["selector"]["matchLabels"]
            assert labels.items() <= item["spec"]["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_a_pod_mounts_is_there(name: str) -> None:
    claims = {item["metadata"]["name"] for item in all_of(name, "PersistentVolumeClaim")}
    maps = {item["metadata"]["name"] for item in all_of(name, "ConfigMap")}
    classes = {item["metadata"]["name"] for item in all_of(name, "PriorityClass")}
    templates = {
        claim["metadata"]["name"]
        for item in all_of(name, "StatefulSet")
        for claim in item["spec"]["volumeClaimTemplates"]
    }
    for pod, _, spec in pods(name):
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {}).get("claimName", "aldm-data") in claims, pod
        for container in containers_of(spec):
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted <= volumes.keys() | templates, pod
            assert {source["configMapRef"]["name"] for source in container.get("envFrom", [])} <= maps, pod
        assert spec.get("priorityClassName", "aldm-service") in classes, pod


def _rules(policy: dict[str, Any], side: str) -> list[dict[str, Any]]:
    rules: list[dict[str, Any]] = policy["spec"].get(side, [])
    return rules


@pytest.mark.parametrize("name", OVERLAYS)
def test_policies_open_ports_that_are_there(name: str) -> None:
    """Each policy selects pods, of the manifests or of operators, and a port by name is a receiver's."""
    for policy in all_of(name, "NetworkPolicy"):
        labels = policy["spec"]["podSelector"].get("matchLabels", {})
        receivers = selected(name, labels)
        assert receivers or labels in MADE_BY_OPERATORS, name_of(policy)
        for rule in _rules(policy, "ingress"):
            for port in rule.get("ports", []):
                if isinstance(port["port"], str):
                    assert all(port["port"] in ports_of(spec) for *_, spec in receivers), (name_of(policy), port)
        for rule in _rules(policy, "egress"):
            for peer in rule.get("to", []):
                if "namespaceSelector" in peer:
                    continue
                found = selected(name, peer["podSelector"]["matchLabels"])
                assert found, (name_of(policy), peer)
                for port in rule.get("ports", []):
                    assert any(port["port"] in ports_of(spec) for *_, spec in found), (name_of(policy), port)


def _allowed(name: str, sender: dict[str, str], receiver: dict[str, str], port: str) -> bool:
    """Whether some policies let a pod with the first labels out to, and into, one with the second at a port."""

    def matches(labels: dict[str, str], selector: dict[str, Any]) -> bool:
        return selector.get("matchLabels", {}).items() <= labels.items()

    def opens(owner: dict[str, str], other: dict[str, str], side: str, key: str) -> bool:
        for policy in all_of(name, "NetworkPolicy"):
            if not matches(owner, policy["spec"]["podSelector"]):
                continue
            for rule in _rules(policy, side):
                peers = [peer["podSelector"] for peer in rule.get(key, []) if "namespaceSelector" not in peer]
                named = "ports" not in rule or port in [item["port"] for item in rule["ports"]]
                if named and any(matches(other, peer) for peer in peers):
                    return True
        return False

    return opens(sender, receiver, "egress", "to") and opens(receiver, sender, "ingress", "from")


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_needs_to_talk_may_and_what_need_not_may_not(name: str) -> None:
    def labels(*parts: str) -> dict[str, str]:
        (found, *_) = [pod for pod in pods(name) if pod[0].startswith(parts[0]) and parts[-1] in pod[0]]
        return found[1]

    head, worker = labels("RayCluster", "headGroup"), labels("RayCluster", "workerGroup")
    submitter, translator = labels("RayJob", "submitter"), labels("RayService", "workerGroup")
    mlflow, redis = labels("Deployment mlflow"), labels("StatefulSet redis")
    database, store = labels("StatefulSet mlflow-database"), labels("StatefulSet artifact-store")
    gateway = {"gateway.networking.k8s.io/gateway-name": GATEWAY}
    wanted = [
        (worker, head, "gcs"),
        (head, worker, "any"),
        (head, redis, "redis"),
        (worker, mlflow, "http"),
        (submitter, head, "dashboard"),
        (mlflow, database, "postgres"),
        (mlflow, store, "s3"),
        (gateway, translator, "serve"),
        (STEP, head, "dashboard"),
        (STEP, mlflow, "http"),
    ]
    assert [item for item in wanted if not _allowed(name, *item)] == []
    forbidden = [
        (STEP, redis, "redis"),
        (STEP, database, "postgres"),
        (worker, redis, "redis"),
        (worker, database, "postgres"),
        (head, store, "s3"),
        (submitter, mlflow, "http"),
        (submitter, head, "gcs"),
        (gateway, head, "dashboard"),
        (gateway, mlflow, "http"),
        (mlflow, head, "gcs"),
        (redis, database, "postgres"),
    ]
    assert [item for item in forbidden if _allowed(name, *item)] == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_secret_is_one_that_the_readme_makes(name: str) -> None:
    """With each key that a manifest reads from it."""
    text = (ROOT / "k8s" / "README.md").read_text().replace("\\\n", " ")
    made = {}
    for secret, rest in re.findall(r"kubectl -n aldm create secret generic ([\w-]+)(.*)", text):
        made[secret] = set(re.findall(r"--from-(?:literal|file)=([\w-]+)=", rest))
    wanted = {("ray-auth-token", "auth_token"), ("aldm-service-tokens", "tokens")}  # read by KubeRay and by file name
    for reference in re.findall(r"'(?:secretKeyRef|credentials)': (\{[^}]*\})", str(overlay(name))):
        read = json.loads(reference.replace("'", '"'))
        wanted.add((read["name"], read["key"]))
    assert [(secret, key) for secret, key in sorted(wanted) if key not in made.get(secret, ())] == []


def test_the_dashboard_asks_for_metrics_that_are_told() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    ours = prometheus_text({"queued": 0, "uploading": 0, "running": 0, "folder_bytes": 0, **Tally().counts()})
    known = set(re.findall(r"^(\w+)[ {]", ours, re.MULTILINE)) | {f"ray_{SAMPLES_PER_SECOND}", f"ray_{LOSS}"}
    known |= {f"ray_{metric}" for metric in METRICS_GAUGES}
    known |= {"ray_serve_autoscaling_target_replicas"}
    panels = json.loads((ROOT / "k8s" / "base" / "dashboard.json").read_text())["panels"]
    asked = {
        name
        for panel in panels
        for query in panel["targets"]
        for name in re.findall(r"\b(?:aldm|ray)_\w+", query["expr"])
    }
    assert asked - known == set()
    for subject in ("Queue", "Seconds", "GPU memory", "Samples per second", "Loss"):
        assert any(panel["title"].startswith(subject) for panel in panels)
