"""Which translator a service runs: a folder, a registered model of MLflow, or the one inside the package.

A registered model is found out once, when the service is started or deployed with a changed configuration, not by each
copy or node: models:/NAME/VERSION is that version forever, models:/NAME@ALIAS is the version that the alias points to
at that moment, and it stays when the alias moves. To bring another model into a running service, deploy it again with
another address (on Kubernetes: aldm k8s roll).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aldm.config import Config
from aldm.errors import UserError
from aldm.words import counted
from serve.work_folder import MODELS

CARD_FILE = "card.json"
REGISTRY = "models:/"


@dataclass(frozen=True)
class Model:
    """A translator folder and what is said of it without loading it."""

    folder: Path
    name: str
    description: str
    kind: str
    hash: str
    config: Config
    card: list[dict[str, Any]]
    uncertainty_level: float | None
    """Share of the voxels that its intervals are to hold; None where it has none."""


def find_model(model: str | None, work_dir: Path) -> Model:
    """Return the model that a service is asked to run.

    Args:
        model: translator folder, models:/NAME@ALIAS or models:/NAME/VERSION, or None for the built-in one.
        work_dir: where a registered model is downloaded to.

    Raises:
        UserError: there is none, it is no translator, or a registered one whose weights are not those registered.
    """
    if model is None:
        from aldm.default_model import default_model

        return read_model(default_model(), "built-in default model")
    if model.startswith(REGISTRY):
        return read_model(_download(model, work_dir), model)
    return read_model(Path(model).expanduser().resolve(), Path(model).resolve().name)


def read_model(folder: Path, name: str) -> Model:
    """Return what a translator folder says of itself.

    Raises:
        UserError: it is none.
    """
    from aldm.checkpoint import config_of, read_checkpoint_record
    from aldm.predictors import KINDS, UNCERTAINTY

    record = read_checkpoint_record(folder)
    if record["kind"] not in KINDS:
        raise UserError(f"{folder} holds a checkpoint of kind {record['kind']!r}, wanted a translator folder")
    config = config_of(record, folder)
    return Model(
        folder=folder,
        name=name,
        description=_description(record, config),
        kind=record["kind"],
        hash=record["hash"],
        config=config,
        card=json.loads((folder / CARD_FILE).read_text()) if (folder / CARD_FILE).is_file() else [],
        uncertainty_level=record["meta"].get(UNCERTAINTY, {}).get("level"),
    )


def _description(record: dict[str, Any], config: Config) -> str:
    data = record["meta"]["data"]
    splits = data.get("num_subjects") or data.get("subjects") or {}
    trained = "a model"
    if "train" in splits:
        trained = f"trained on {counted(splits['train'], 'subject')} of layout {data.get('layout')}"
    how = f"preset {config.preset}"
    return f"{record['kind']}, {how}, {trained}; for research use only"


def _download(uri: str, work_dir: Path) -> Path:
    from pipelines.registry_download import fetch, resolve
    from pipelines.tracking_server import tracking_uri

    server = tracking_uri(Path.cwd() / "service")
    target = work_dir / MODELS
    work_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    target.mkdir(exist_ok=True)
    return fetch(resolve(uri, server), target, server)
