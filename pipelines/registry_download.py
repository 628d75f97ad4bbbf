"""Models that are registered with MLflow: which version an address means, and their weights, checked against it.

An address is models:/NAME/VERSION or models:/NAME@ALIAS. A version never changes; an alias may point to another version
tomorrow, so whoever works with a model resolves its address once, and keeps the version.

`aldm export --register` leaves with every version a tag `hash`: the SHA-256 over its weights. What is downloaded is
hashed again and compared with that tag, so weights that were changed, cut short or mixed up on the way, or in the store
of the artifacts, are refused. (`aldm.checkpoint` compares weights with the config.json beside them only, which came the
same way.)
"""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aldm.errors import UserError
from pipelines.tracking_server import answering, connect, default_server, impatient, is_missing

REGISTRY = "models:/"
HASH_TAG = "hash"
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""MLflow's codes for a model or version, and for an alias, that it has not got."""
_ADDRESS = re.compile(r"models:/([\w-]+)(?:@([\w-]+)|/(\d+))", flags=re.ASCII)


@dataclass(frozen=True)
class Registered:
    """A version of a registered model."""

    name: str
    version: int
    hash: str
    """SHA-256 over its weights, as it was registered."""

    @property
    def address(self) -> str:
        """The address that means this version forever."""
        return f"{REGISTRY}{self.name}/{self.version}"


def is_version(address: str) -> bool:
    """Whether an address is models:/NAME/VERSION, which never changes."""
    match = _ADDRESS.fullmatch(address)
    return match is not None and match[3] is not None


def resolve(address: str, server: str) -> Registered:
    """Return the version that models:/NAME/VERSION or models:/NAME@ALIAS means now.

    Args:
        address: of the model.
        server: URI of the MLflow server.

    Raises:
        UserError: not such an address, no such version, or one without a hash.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address!r} is no registered model: wanted models:/NAME/VERSION or models:/NAME@ALIAS")
    name, alias, version = match.groups()
    found = _read_version(name, alias, version, server)
    if found is None:
        raise UserError(
            f"the registry at {server} has no {address}: register it there (aldm export --register {name}), or set "
            "MLFLOW_TRACKING_URI to the registry that has it"
        )
    return _registered(address, name, *found)


def _registered(address: str, name: str, version: str, tags: dict[str, str]) -> Registered:
    """Return a version that was read, which has to have a hash."""
    if HASH_TAG not in tags:
        raise UserError(
            f"{address}: version {version} has no tag {HASH_TAG!r}, so its weights cannot be checked: register it with "
            "aldm export --register NAME"
        )
    return Registered(name, int(version), tags[HASH_TAG])


def _read_version(name: str, alias: str | None, version: str | None, server: str) -> tuple[str, dict[str, str]] | None:
    """Return number and tags of a version, given that or an alias; None where there is none."""
    with answering(server), impatient():
        from mlflow import MlflowException

        if is_missing(server):
            return None
        client = connect(server)
        try:
            if alias is not None:
                version = str(client.get_model_version_by_alias(name, alias).version)
            return str(version), client.get_model_version(name, str(version)).tags
        except MlflowException as error:
            if error.error_code not in _ABSENT:
                raise
            return None


def find_alias(name: str, alias: str, server: str) -> Registered | None:
    """Return the version that an alias points to; None where there is no such model or alias yet.

    Raises:
        UserError: the server does not answer, or the version has no hash.
    """
    found = _read_version(name, alias, None, server)
    return None if found is None else _registered(f"{REGISTRY}{name}@{alias}", name, *found)


def fetch(model: Registered, folder: Path, server: str) -> Path:
    """Return the translator folder of a version, downloaded to `folder`/NAME-VERSION unless it is there.

    A version has a folder of its own, so one that is being served is never written to when another one comes.

    Args:
        model: from `resolve`.
        folder: exists.
        server: URI of the MLflow server.

    Raises:
        UserError: it cannot be downloaded, holds no translator folder, or its weights are not those registered.
    """
    place = folder / f"{model.name}-{model.version}"
    if place.is_dir():
        with contextlib.suppress(UserError):  # damaged: it is downloaded again
            return verified(translator_folder(place, model), model)
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        with answering(server), impatient(), default_server(server):
            downloaded = Path(download_artifacts(artifact_uri=model.address, dst_path=temporary))
        verified(translator_folder(downloaded, model), model)
        if place.exists():
            shutil.rmtree(place)
        os.rename(downloaded, place)
        Path(temporary).mkdir(exist_ok=True)  # it may be what was renamed
    return translator_folder(place, model)


def translator_folder(downloaded: Path, model: Registered) -> Path:
    """Return the translator folder inside a downloaded model.

    Raises:
        UserError: there is none, or more than one.
    """
    from aldm.checkpoint import CONFIG, WEIGHTS

    code = downloaded / "code"  # this package's own, the built-in model in it
    found = sorted(
        path.parent
        for path in downloaded.rglob(CONFIG)
        if (path.parent / WEIGHTS).is_file() and code not in path.parents
    )
    if len(found) != 1:
        raise UserError(f"{model.address} holds no translator folder: register one with aldm export --register NAME")
    return found[0]


def verified(folder: Path, model: Registered) -> Path:
    """Return the folder, whose weights were hashed again.

    Raises:
        UserError: they are not those that were registered, or not those of the config.json beside them.
    """
    from aldm.checkpoint import WEIGHTS, read_checkpoint_record, read_weights, weights_hash

    found = weights_hash(read_weights(folder / WEIGHTS))
    stated = read_checkpoint_record(folder)["hash"]
    if found != model.hash or stated != model.hash:
        raise UserError(
            f"{model.address} is not what was registered: its weights have the hash {found[:12]}, its config.json says "
            f"{stated[:12]}, the registry {model.hash[:12]}; it is not used. Register the model again, or take another "
            "version"
        )
    return folder


@contextlib.contextmanager
def fetched(model: Registered, near: Path, server: str) -> Iterator[Path]:
    """Yield the translator folder of a version, which goes with the block.

    Args:
        model: from `resolve`.
        near: the folder is made beside this path: where the nodes of a cluster see that, they see it too.
        server: URI of the MLflow server.

    Raises:
        UserError: as `fetch`, or a place that cannot be written to.
    """
    parent = near.absolute().parent
    try:
        folder = tempfile.TemporaryDirectory(prefix=".model-", dir=parent)
    except OSError as error:
        raise UserError(f"cannot write to {parent}: {error.strerror}") from error
    with folder as temporary:
        yield fetch(model, Path(temporary), server)
