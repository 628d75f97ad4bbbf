"""The configuration of Ray Serve as a file: the model that it names, in a file of its own or inside a RayService."""

from pathlib import Path
from typing import Any

from aldm.errors import UserError

DEPLOY = Path(__file__).resolve().parent.parent / "serve" / "deploy.yaml"
"""The package's own configuration."""
KIND, FIELD = "RayService", "serveConfigV2"
APPLICATION = "aldm"
"""Its name in serve/deploy.yaml and in the manifests."""


def read_serve_text(file: Path | None) -> str:
    """Return the text of a manifest or configuration; of the package's own without a file.

    Raises:
        UserError: it cannot be read.
    """
    path = file or DEPLOY
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def model_of(text: str, application: str) -> str | None:
    """Return the model that an application is given; None for the one inside the package.

    Args:
        text: configuration of Ray Serve, or manifests with one RayService among them.
        application: its name.

    Raises:
        UserError: there is no such application.
    """
    _, config = _split(text)
    model = _application(config, application)["args"].get("model")
    return None if model is None else str(model)


def with_model(text: str, model: str | None, application: str) -> str:
    """Return the text with another model and all else as it was, comments excepted; see `model_of`."""
    documents, config = _split(text)
    _application(config, application)["args"]["model"] = model
    services = [document for document in documents if document.get("kind") == KIND]
    for service in services:
        service["spec"][FIELD] = _dump([config])
    return _dump(documents if services else [config])


def _split(text: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the YAML documents, and the configuration of Ray Serve in them."""
    import yaml

    try:
        documents = [document for document in yaml.safe_load_all(text) if document is not None]
        services = [document for document in documents if document.get("kind") == KIND]
        configs = [yaml.safe_load(each["spec"][FIELD]) for each in services] or documents
        if len(configs) != 1:
            raise ValueError(f"{len(services)} {KIND}s among {len(documents)} documents")
        config = configs[0]
        if not isinstance(config["applications"], list):
            raise TypeError("applications is no list")
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"this is neither the manifest of one {KIND} with {FIELD} nor a configuration of Ray Serve with "
            f"applications ({error or type(error).__name__})"
        ) from error
    return documents, config


def _application(config: dict[str, Any], name: str) -> dict[str, Any]:
    found = [each for each in config["applications"] if each.get("name") == name]
    if len(found) != 1:
        known = ", ".join(str(each.get("name")) for each in config["applications"])
        raise UserError(f"the configuration has no application {name!r}, only {known}: give --application")
    application: dict[str, Any] = found[0]
    if application.get("args") is None:
        application["args"] = {}
    return application


def _dump(documents: list[dict[str, Any]]) -> str:
    """Return YAML; text of several lines as it stands."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump_all(documents, Dumper=Dumper, sort_keys=False, width=120)
