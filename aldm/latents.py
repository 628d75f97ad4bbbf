"""The latent cache: every volume of a store encoded once by a frozen codec.

A folder like a volume store:

    latents.json        format version, codec hash, modalities, subjects, statistics, the record of the data
    shards/<id>.arrow   one a subject: a record per modality and flip variant, key "t1/0", float16 (C, x, y, z)

Stored is the latent before quantisation as the codec gives it; reading standardises it per channel with the mean and
standard deviation of the training split, so another whitening never means encoding again. The cache belongs to one
codec: its key is the hash of the codec's weights and configuration, and a stale cache is an error.
"""

import json
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aldm.checkpoint import weights_hash
from aldm.config import CodecConfig
from aldm.data.parallel import ProcessWorkers, Workers, map_in_order, remove_leftovers
from aldm.data.store import SHARD_FOLDER, ShardReader, VolumeStore, shard_path, write_shard
from aldm.errors import UserError
from aldm.files import atomic_folder
from aldm.likeness import MIN_VOLUMES, fit_statistics, kind_of
from aldm.models.codecs import Codec
from aldm.records import check_record, has_file, read_record

FORMAT_VERSION = 2
LATENTS_FILE = "latents.json"
_WAY_OUT = "encode again with `overwrite`"
_HEADER = {
    "codec_hash": str,
    "codec.kind": str,
    "isometric": bool,
    "latent_channels": int,
    "modalities": list,
    "num_flips": int,
    "mean": list,
    "std": list,
    "data.fingerprint": str,
    "data.preprocess": dict,
    "data.median_percentiles": dict,
    "data.backgrounds": dict,
    "subjects": list,
}
_SUBJECT = {"subject_id": str, "split": str, "modalities": list}
_OPEN_SHARDS = 64
_SMALLEST_STD = 1e-6


def codec_hash(config: CodecConfig, weights: Mapping[str, Tensor]) -> str:
    """Return the identity of a codec: the hash of its weights; of a codec without any, what it is."""
    if weights:
        return weights_hash(weights)
    return f"{config.kind}-{config.haar_levels}"


def data_record(
    store: VolumeStore, modalities: Sequence[str], model: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return what a checkpoint keeps of the data that it was trained on (JSON-able).

    Args:
        store: prepared volumes.
        modalities: those of the model.
        model: the same of the model that a training started from, which tells of modalities that no training subject
            of the store has. Their likeness is not measured.

    Raises:
        UserError: no training subject has one of the modalities, and no model tells of it.
    """
    own = [name for name in modalities if model is None or name in store.trained_modalities]
    statistics = fit_statistics(*(_likeness_rows(store, own, split) for split in ("train", "validation")))
    percentiles = {name: list(store.median_percentiles(name)) for name in own}
    backgrounds = {name: store.median_background(name) for name in own}
    for name in modalities:
        if name not in own and model is not None:
            percentiles[name], backgrounds[name] = model["median_percentiles"][name], model["backgrounds"][name]
    return {
        "layout": store.layout,
        "fingerprint": store.fingerprint,
        "preprocess": asdict(store.preprocess),
        "num_subjects": {split: len(store.subjects(split)) for split in ("train", "validation", "test")},
        "median_percentiles": percentiles,
        "backgrounds": backgrounds,
        "likeness": None if statistics is None else statistics.to_dict(),
    }


def _likeness_rows(store: VolumeStore, modalities: Sequence[str], split: str) -> dict[str, list[tuple[float, ...]]]:
    """Return what tells how unlike a volume is, by kind: heads and brains apart where both train a modality well."""
    found: dict[str, list[tuple[float, ...]]] = {}
    regions = sorted({record.region for record in store.subjects("train")})
    for name in modalities:
        enough = [len(store.likeness_rows(name, "train", region)) >= MIN_VOLUMES for region in regions]
        if len(regions) > 1 and all(enough):
            found |= {kind_of(name, region): store.likeness_rows(name, split, region) for region in regions}
        else:
            found[kind_of(name)] = store.likeness_rows(name, split)
    return found


@dataclass(frozen=True)
class ModelLatents:
    """What latents that are to be a trained model's take over from it."""

    mean: list[float]
    std: list[float]
    """(C,) each, float32: its networks see latents that are standardised with these."""
    modalities: tuple[str, ...]
    data: Mapping[str, Any]
    """What it keeps of its data."""


@dataclass(frozen=True)
class LatentSubject:
    """A subject of the cache."""

    subject_id: str
    split: str
    modalities: tuple[str, ...]


class LatentStore:
    """Encoded volumes, memory-mapped; use LatentStore.open."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.codec_hash: str = header["codec_hash"]
        self.codec: dict[str, Any] = header["codec"]
        self.isometric: bool = header["isometric"]
        self.latent_channels: int = header["latent_channels"]
        self.modalities: tuple[str, ...] = tuple(header["modalities"])
        self.num_flips: int = header["num_flips"]
        self.data: dict[str, Any] = header["data"]
        self.mean = np.asarray(header["mean"], np.float32)
        self.std = np.asarray(header["std"], np.float32)
        self._subjects = [
            LatentSubject(entry["subject_id"], entry["split"], tuple(entry["modalities"]))
            for entry in header["subjects"]
        ]
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()

    @classmethod
    def open(cls, path: str | os.PathLike[str], codec_hash: str | None = None) -> "LatentStore":
        """Open a cache.

        Args:
            path: its folder.
            codec_hash: the codec that the reader uses; None takes whatever the cache was made with.

        Raises:
            UserError: not a cache, of another format version, or stale (made with another codec).
        """
        path = Path(path)
        if not has_file(path, LATENTS_FILE):
            raise UserError(f"{path} is not a store of latents (no {LATENTS_FILE}): make one with aldm encode")
        file = path / LATENTS_FILE
        header = read_record(file, {"format_version": int}, _WAY_OUT)
        version = header["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}: encode again")
        check_record(header, _HEADER, file, _WAY_OUT)
        for subject in header["subjects"]:
            entry = {"subject": subject}
            check_record(entry, {f"subject.{key}": kind for key, kind in _SUBJECT.items()}, file, _WAY_OUT)
        check_statistics(header, header["latent_channels"], file, _WAY_OUT)
        if codec_hash is not None and header["codec_hash"] != codec_hash:
            raise UserError(
                f"{path} is stale: it was encoded with codec {header['codec_hash'][:12]}, wanted "
                f"{codec_hash[:12]}: encode the store again with this codec"
            )
        return cls(path, header)

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return LatentStore.open, (self.path,)

    def subjects(self, split: str | None = None) -> list[LatentSubject]:
        """Return the subjects of a split (train, validation, test), or all, sorted by subject_id."""
        return [subject for subject in self._subjects if split in (None, subject.split)]

    def latent(self, subject_id: str, modality: str, flip: int = 0) -> np.ndarray:
        """Return a standardised latent, (C, x, y, z) float32.

        Args:
            subject_id, modality: whose.
            flip: 0 as it is, 1 flipped left to right before it was encoded (where num_flips is 2).
        """
        raw = self._reader(subject_id)[f"{modality}/{flip}"].astype(np.float32)
        raw -= self.mean[:, None, None, None]
        raw /= self.std[:, None, None, None]
        return raw

    @property
    def sides(self) -> tuple[int, ...]:
        """Voxels x, y, z of a latent."""
        first = self._subjects[0]
        return self._reader(first.subject_id)[f"{first.modalities[0]}/0"].shape[1:]

    def _reader(self, subject_id: str) -> ShardReader:
        """Return a subject's shard, keeping the most recently used ones mapped."""
        reader = self._readers.pop(subject_id, None) or ShardReader(shard_path(self.path, subject_id))
        self._readers[subject_id] = reader
        if len(self._readers) > _OPEN_SHARDS:
            self._readers.popitem(last=False)
        return reader


def encode_store(
    store: VolumeStore,
    codec: Codec,
    config: CodecConfig,
    out: str | os.PathLike[str],
    *,
    flips: bool = False,
    device: torch.device | str = "cpu",
    encode: Callable[[Tensor], Tensor] | None = None,
    overwrite: bool = False,
    workers: Workers | None = None,
    like: ModelLatents | None = None,
) -> LatentStore:
    """Encode all volumes of a store into a cache.

    Args:
        store: prepared volumes.
        codec: frozen.
        config: what the codec was built from.
        out: folder of the cache; it appears when it is whole.
        flips: store every volume flipped left to right too.
        device: where to encode.
        encode: volume (1, 1, X, Y, Z) on `device` to latent; codec.encode if None (one in bounded memory may stand
            here). With `workers` it is sent to them, pickled.
        overwrite: replace an earlier cache.
        workers: encode a subject each, the result being the same; `out` and the store's path, which must be absolute,
            lie where all of them reach them. None encodes in this process.
        like: of the model that is to be trained on with them; None standardises them with their own statistics.

    Raises:
        UserError: no training subject, a volume that the codec cannot take, or `out` cannot be written.
    """
    codec = codec.to(device).eval()
    subjects = [LatentSubject(record.subject_id, record.split, record.modalities) for record in store.subjects()]
    if not any(subject.split == "train" for subject in subjects):
        raise UserError(f"the store {store.path} has no training subject: latents are standardised over those")
    num_flips = 2 if flips else 1
    with atomic_folder(out, overwrite, marker=LATENTS_FILE) as temporary:
        (temporary / SHARD_FOLDER).mkdir()
        encode_one = partial(
            _encode_subject,
            store=store,
            encode=encode or codec.encode,
            device=device,
            num_flips=num_flips,
            folder=temporary.absolute(),
        )
        moments = map_in_order(workers or ProcessWorkers(1), encode_one, subjects, description="encode", unit="subject")
        remove_leftovers(temporary)
        statistics = _Statistics(codec.latent_channels)
        for subject, latents in zip(subjects, moments, strict=True):
            for each in latents if subject.split == "train" else ():
                statistics.add(each)
        header = {
            "format_version": FORMAT_VERSION,
            "codec_hash": codec_hash(config, codec.state_dict()),
            "codec": asdict(config),
            "isometric": codec.isometric,
            "latent_channels": codec.latent_channels,
            "modalities": list(store.modalities),
            "num_flips": num_flips,
            "mean": statistics.mean.tolist() if like is None else like.mean,
            "std": statistics.std.tolist() if like is None else like.std,
            "data": _record(store, like),
            "subjects": [asdict(subject) for subject in subjects],
        }
        (temporary / LATENTS_FILE).write_text(json.dumps(header, indent=1) + "\n")
    return LatentStore.open(out)


def _record(store: VolumeStore, like: ModelLatents | None) -> dict[str, Any]:
    """Return the record of the data, with what the model that is to learn from them knows and the store lacks."""
    if like is None:
        return data_record(store, store.modalities)
    return data_record(store, tuple(dict.fromkeys((*store.modalities, *like.modalities))), like.data)


@torch.inference_mode()
def _encode_subject(
    subject: LatentSubject,
    *,
    store: VolumeStore,
    encode: Callable[[Tensor], Tensor],
    device: torch.device | str,
    num_flips: int,
    folder: Path,
) -> list["_Moments"]:
    """Encode one subject and write its shard; return its share of the statistics, one per modality, flips left out."""
    latents: list[tuple[str, np.ndarray]] = []
    for modality in subject.modalities:
        volume = torch.from_numpy(store.volume(subject.subject_id, modality)).to(device)[None, None]
        for flip in range(num_flips):
            z = encode(volume.flip(2) if flip else volume)[0].half().cpu().numpy()
            _check_finite(z, subject.subject_id, modality)
            latents.append((f"{modality}/{flip}", z))
    write_shard(shard_path(folder, subject.subject_id), latents)
    return [_Moments.of(z) for key, z in latents if key.endswith("/0")]


def cache_bytes(store: VolumeStore, codec: Codec, flips: bool) -> int:
    """Return the size of the cache that `encode_store` would write, bytes (headers left out)."""
    voxels = float(np.prod([side / codec.downsampling for side in store.preprocess.spatial_shape]))
    volumes = sum(len(record.modalities) for record in store.subjects())
    return int(2 * voxels * codec.latent_channels * volumes * (2 if flips else 1))


def check_statistics(record: Mapping[str, Any], channels: int, file: str | os.PathLike[str], way_out: str) -> None:
    """Check that `mean` and `std` hold a number for every latent channel.

    Raises:
        UserError: they do not.
    """
    for name in ("mean", "std"):
        values = record[name]
        numbers = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        if len(values) != channels or not numbers:
            raise UserError(
                f"{file} is damaged: {name} of the latents is {values!r:.60}, wanted {channels} numbers; {way_out}"
            )


def standardise(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (z - mean) / std per channel; z is (B, C, x, y, z), mean and std are (C,)."""
    return (z - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


def unstandardise(z: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Undo `standardise`."""
    return z * std.view(1, -1, 1, 1, 1) + mean.view(1, -1, 1, 1, 1)


def _check_finite(z: np.ndarray, subject_id: str, modality: str) -> None:
    if not np.isfinite(z).all():
        raise UserError(
            f"the latent of {subject_id}, {modality} is not finite in float16: the codec is broken or was not trained; "
            "train it again"
        )


@dataclass(frozen=True, eq=False)
class _Moments:
    """Of one latent, float64: mean and summed squared deviations (C,) per channel over `count` voxels."""

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, z: np.ndarray) -> "_Moments":
        """Measure a latent (C, x, y, z)."""
        values = z.reshape(z.shape[0], -1).astype(np.float64)
        count = values.shape[1]
        return cls(count, values.mean(axis=1), values.var(axis=1) * count)


class _Statistics:
    """Mean and standard deviation per channel, merged latent by latent in float64 (Chan et al. 1979).

    The last bits depend on the order of the latents.
    """

    def __init__(self, channels: int) -> None:
        self._count = 0
        self.mean = np.zeros(channels)
        self._squares = np.zeros(channels)

    def add(self, latent: _Moments) -> None:
        """Take in one latent."""
        count, delta = latent.count, latent.mean - self.mean
        total = self._count + count
        self._squares += latent.squares + delta**2 * self._count * count / total
        self.mean += delta * count / total
        self._count = total

    @property
    def std(self) -> np.ndarray:
        """(C,), at least 1e-6, so that a constant channel can be divided by it."""
        return np.maximum(np.sqrt(self._squares / self._count), _SMALLEST_STD)
