"""A checkpoint is a folder: weights.safetensors and config.json; it needs nothing else to be used, and loads strictly.

config.json holds `format_version`, `kind` (what the weights are), `hash` (SHA-256 over the weights), `config` (the
whole resolved configuration) and `meta` (modalities, latent statistics, codec hash, the data's record: whatever the
reader of this kind needs).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aldm.config import Config, from_dict, to_dict
from aldm.errors import UserError
from aldm.files import atomic_folder
from aldm.records import Kinds, check_record, has_file, read_record

FORMAT_VERSION = 2
"""2: another rule of intensities (preprocess.intensity)."""
WEIGHTS, CONFIG = "weights.safetensors", "config.json"
WAY_OUT = "write the checkpoint again"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds.

    Attributes:
        path: the folder.
        kind: what the weights are, such as "vqgan" or "diffusion".
        config: the resolved configuration of the training.
        weights: parameters and buffers by name, on the CPU.
        meta: what the reader of this kind needs besides.
        hash: SHA-256 over the weights, hexadecimal.
    """

    path: Path
    kind: str
    config: Config
    weights: dict[str, Tensor]
    meta: dict[str, Any]
    hash: str

    def check_meta(self, kinds: Kinds) -> None:
        """Check what the reader of this kind needs of `meta`: dotted key -> kind of its value.

        Raises:
            UserError: something is missing or of another kind.
        """
        check_record(self.meta, kinds, f"the meta of {self.path / CONFIG}", WAY_OUT)


def weights_hash(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over names, types, shapes and bytes of the weights, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checkpoint(
    folder: Path, *, kind: str, config: Config, weights: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> str:
    """Write weights.safetensors and config.json into an existing folder and return the weights' hash."""
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / WEIGHTS)
    digest = weights_hash(tensors)
    record = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "hash": digest,
        "config": to_dict(config),
        "meta": dict(meta),
    }
    (folder / CONFIG).write_text(json.dumps(record, indent=1) + "\n")
    return digest


def save_checkpoint(
    folder: str | os.PathLike[str],
    *,
    kind: str,
    config: Config,
    weights: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    overwrite: bool = False,
) -> str:
    """Write a checkpoint folder under a temporary name, then rename it; return the weights' hash.

    Raises:
        UserError: the folder exists and `overwrite` is False, it cannot be written, or the disk is full.
    """
    with atomic_folder(folder, overwrite, marker=CONFIG) as temporary:
        return write_checkpoint(temporary, kind=kind, config=config, weights=weights, meta=meta)


def read_checkpoint_record(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return config.json of a checkpoint folder, checked for its format version, without reading the weights.

    Raises:
        UserError: not a checkpoint folder, unreadable, or of another format version.
    """
    path = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not has_file(path, name):
            lack = f"it holds no {name}" if path.is_dir() else "there is no such folder"
            raise UserError(f"{path} is not a checkpoint folder: {lack}; aldm export writes translator folders")
    record = read_record(path / CONFIG, {}, WAY_OUT)
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} is a checkpoint of format version {version!r}, wanted {FORMAT_VERSION}: "
            "use the version of aldm that wrote it, or train and export again"
        )
    check_record(record, {"kind": str, "hash": str, "config": dict, "meta": dict}, path / CONFIG, WAY_OUT)
    return record


def config_of(record: Mapping[str, Any], folder: str | os.PathLike[str]) -> Config:
    """Return the configuration in what `read_checkpoint_record` returned.

    Raises:
        UserError: a key or value that this version does not know.
    """
    try:
        return from_dict(Config, record["config"])
    except UserError as error:
        raise UserError(f"{Path(folder) / CONFIG}: {error}; change it there, or train and export again") from error


def load_checkpoint(folder: str | os.PathLike[str], *kinds: str) -> Checkpoint:
    """Read a checkpoint folder.

    Args:
        folder: the checkpoint folder.
        kinds: the kinds that will do; any if none is named.

    Raises:
        UserError: as `read_checkpoint_record`, the checkpoint is of another kind, or the weights are damaged.
    """
    path = Path(folder)
    record = read_checkpoint_record(path)
    if kinds and record["kind"] not in kinds:
        raise UserError(f"{path} is a checkpoint of kind {record['kind']!r}, wanted {' or '.join(map(repr, kinds))}")
    weights = read_weights(path / WEIGHTS)
    if weights_hash(weights) != record["hash"]:
        raise UserError(f"{path / WEIGHTS} does not belong to its config.json (the hashes differ): write it again")
    return Checkpoint(path, record["kind"], config_of(record, path), weights, record["meta"], record["hash"])


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: the file is missing, unreadable or damaged.
    """
    try:
        return load_file(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read ({error}): the file is damaged, write it again") from error


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Load weights strictly: every name and every shape must agree.

    Args:
        module: takes the weights.
        weights: parameters and buffers by name.
        source: where they come from, for the message.

    Raises:
        UserError: a name is missing or unknown, or a shape differs; at most five are listed.
    """
    _check_fit(module.state_dict(), weights, source, type(module).__name__)
    module.load_state_dict(dict(weights), strict=True)


def copy_weights(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str | os.PathLike[str], network: str
) -> None:
    """Copy weights into tensors of the same names, such as those of a module's `state_dict`, strictly.

    Args:
        own: take the weights.
        weights: parameters and buffers by name.
        source, network: where they come from and whose they become, for the message.

    Raises:
        UserError: as `load_weights`.
    """
    _check_fit(own, weights, source, network)
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def _check_fit(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str | os.PathLike[str], network: str
) -> None:
    """Refuse weights of other names or shapes."""
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in own]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, wanted {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"the weights in {source} do not fit this {network}: {'; '.join(problems[:5])}{more}")
