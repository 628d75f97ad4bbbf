"""Whether objects have the fields, and the types of fields, that the API server takes: nothing is asked of a cluster.

Kinds of Kubernetes go through kubernetes-validate, those of KubeRay, Kueue and Prometheus through k8s/schemas.yaml, and
the pod templates inside Ray objects through kubernetes-validate as if each were an object of its own.
"""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

KUBERNETES_VERSION = "1.34"
"""The API that is checked against; newer ones take the same manifests."""
SCHEMAS = Path(__file__).resolve().parent.parent / "k8s" / "schemas.yaml"
Manifest = dict[str, Any]


def schema_errors(manifest: Manifest) -> list[str]:
    """Return what the API server would refuse of one object, a line each; nothing for one that it takes."""
    name = name_of(manifest)
    if not (isinstance(manifest.get("apiVersion"), str) and isinstance(manifest.get("kind"), str)):
        return [f"{name}: wanted apiVersion and kind, both text"]
    own = _own_schema(f"{manifest['apiVersion']} {manifest['kind']}")
    if own is None:
        return _kubernetes_errors(manifest, name)
    found = [f"{name}: {line}" for line in json_errors(manifest, own)]
    for place, template in pod_templates(manifest):
        wrapped = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": template}
        found += _kubernetes_errors(wrapped, f"{name}: {place}", inside=("template",))
    return found


def json_errors(value: Any, schema: dict[str, Any]) -> list[str]:
    """Return what is wrong with a value under a JSON schema, each with its place."""
    from jsonschema import Draft202012Validator

    errors = sorted(Draft202012Validator(schema).iter_errors(value), key=lambda error: list(map(str, error.path)))
    return [_told(error) for error in errors]


def strict(schema: Any) -> Any:
    """Return a schema in which an object that names properties takes no others, at every depth."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    named = isinstance(made.get("properties"), dict) and made.get("type") in ("object", None)
    if named and "additionalProperties" not in made and not made.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


def pod_templates(manifest: Manifest) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the pod templates of an object with their places, wherever they are."""
    kind, spec = manifest.get("kind"), manifest.get("spec")
    if kind == "Pod" and isinstance(spec, dict):
        yield "", {"metadata": manifest.get("metadata", {}), "spec": spec}
        return
    if kind == "CustomResourceDefinition":
        return
    yield from _templates_in(manifest, "")


def _templates_in(value: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _templates_in(item, f"{place}[{number}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            inner = f"{place}.{key}" if place else key
            if key in ("template", "submitterPodTemplate") and isinstance(item, dict) and "spec" in item:
                yield inner, item
            else:
                yield from _templates_in(item, inner)


def name_of(manifest: Manifest) -> str:
    """Return kind and name of an object, for messages."""
    metadata = manifest.get("metadata")
    name = metadata.get("name", "?") if isinstance(metadata, dict) else "?"
    return f"{manifest.get('kind', '?')} {name}"


def _kubernetes_errors(manifest: Manifest, name: str, inside: tuple[str, ...] = ()) -> list[str]:
    """Return what kubernetes-validate says of one object.

    Args:
        manifest: the object.
        name: what stands before the message.
        inside: where in the object that begins which the message is about.
    """
    said = _kubernetes_word(json.dumps(manifest, sort_keys=True, default=str), inside)
    return [f"{name}: {said}"] if said else []


@functools.lru_cache(maxsize=512)
def _kubernetes_word(text: str, inside: tuple[str, ...]) -> str:
    """Ask kubernetes-validate once about each object: it reads a large file every time, and most pods are alike."""
    import kubernetes_validate

    manifest = json.loads(text)
    try:
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        return f"kind {manifest['kind']} of {manifest['apiVersion']} is not known"
    except kubernetes_validate.ValidationError as error:
        return _told(error, inside)
    return ""


def _told(error: Any, inside: tuple[str, ...] = ()) -> str:
    path = list(error.path)
    path = path[len(inside) :] if tuple(path[: len(inside)]) == inside else path
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    message = error.message if len(error.message) < 300 else error.message[:140] + " ... " + error.message[-140:]
    return f"{place}: {message}" if place else message


@functools.cache
def _schemas() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(SCHEMAS.read_text(encoding="utf-8"))
    return loaded


@functools.cache
def _own_schema(kind: str) -> dict[str, Any] | None:
    """Return the schema of a kind of k8s/schemas.yaml, with what every object has."""
    body = _schemas()["kinds"].get(kind)
    if body is None:
        return None
    common = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        "metadata": {"$ref": "#/definitions/metadata"},
    }
    required = [
        "apiVersion",
        "kind",
        "metadata",
        *body.get("required", [name for name in body["properties"] if name == "spec"]),
    ]
    whole = {"type": "object", "required": required, "properties": common | body["properties"]}
    made: dict[str, Any] = strict(whole | {"definitions": _schemas()["definitions"]})
    return made
