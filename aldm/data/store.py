"""Arrow IPC shards for volumes and latents, and the store of prepared volumes on top of them.

A shard is an Arrow IPC file with one record a batch: (key, dtype, shape, raw bytes). It is memory-mapped, so a record
is read without a copy. A store is a folder:

    store.json          format version, layout, preprocessing, modalities, fingerprint
    shards/<id>.arrow   one a subject: one record per modality (float16 in [-1, 1], whole resampled grid), `mask` and,
                        where there are such, `seg` and `tissue` (uint8)
    manifest.parquet    one row per (subject, modality); written last, so a store without it is not finished
"""

import json
import statistics
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aldm.config import PreprocessConfig, Shape, from_dict
from aldm.data.modalities import MODALITIES, sort_modalities
from aldm.data.volume import Volume, crop_or_pad
from aldm.errors import UserError
from aldm.files import atomic_path
from aldm.records import check_record, has_file, read_record

FORMAT_VERSION = 2
"""2: another rule of intensities (preprocess.intensity), what was clipped, and the background."""
SPLITS = ("train", "validation", "test")
STORE_FILE, MANIFEST_FILE, SHARD_FOLDER = "store.json", "manifest.parquet", "shards"
_OPEN_SHARDS = 64


def write_shard(
    path: str | Path, records: Iterable[tuple[str, np.ndarray]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays under their keys into one Arrow IPC file, replacing it; the same input gives the same bytes.

    Args:
        path: the file; it appears under its name only when it is whole.
        records: (key, array) in the order they are stored; keys are distinct.
        metadata: text kept in the file's schema.

    Raises:
        UserError: the folder cannot be written or the disk is full.
    """
    import pyarrow as pa

    fields = [
        ("key", pa.string()),
        ("dtype", pa.string()),
        ("shape", pa.list_(pa.int32())),
        ("data", pa.large_binary()),
    ]
    schema = pa.schema(fields, metadata=dict(sorted((metadata or {}).items())))
    with (
        atomic_path(path, overwrite=True) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, schema) as writer,
    ):
        for key, array in records:
            flat = np.asarray(array, order="C")
            offsets = pa.py_buffer(np.array([0, flat.nbytes], np.int64))
            columns = [
                pa.array([key]),
                pa.array([flat.dtype.str]),
                pa.array([list(flat.shape)], pa.list_(pa.int32())),
                pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, pa.py_buffer(flat)]),
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))


class ShardReader(Mapping[str, np.ndarray]):
    """A memory-mapped shard: key -> array with its own shape and dtype, read-only, no copy."""

    def __init__(self, path: str | Path) -> None:
        """Map the file.

        Raises:
            UserError: there is no such file, or it is not a shard.
        """
        import pyarrow as pa

        self.path = Path(path)
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path), "r"))
            self._batch_of = {
                self._file.get_batch(i).column(0)[0].as_py(): i for i in range(self._file.num_record_batches)
            }
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path} is not a shard that can be read: {error}") from error
        raw = self._file.schema.metadata or {}
        self.metadata = {key.decode(): value.decode() for key, value in raw.items()}

    def __getitem__(self, key: str) -> np.ndarray:
        batch = self._file.get_batch(self._batch_of[key])
        dtype, shape = batch.column(1)[0].as_py(), batch.column(2)[0].as_py()
        return np.frombuffer(batch.column(3).buffers()[2], np.dtype(dtype), count=int(np.prod(shape))).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch_of)

    def __len__(self) -> int:
        return len(self._batch_of)


@dataclass(frozen=True)
class SubjectRecord:
    """What the manifest says of a subject."""

    subject_id: str
    split: str
    """train, validation or test."""
    modalities: tuple[str, ...]
    """Those that this subject has."""
    has_seg: bool
    region: str
    """What the mask is: brain or foreground."""
    grid_affine: tuple[tuple[float, ...], ...]
    """(4, 4) voxel -> world RAS, mm, of the whole resampled grid."""
    grid_shape: Shape
    crop_start: Shape
    """Voxel of the whole grid at which the model's box begins; may be negative."""
    percentiles: dict[str, tuple[float, float]]
    """Modality -> the intensities that became -1 and +1."""
    backgrounds: dict[str, float | None]
    """Modality -> intensity of the constant background of a masked volume, None where there is none."""
    clipped: dict[str, tuple[float, float | None]]
    """Modality -> shares, 0 to 1, of the region's and of the segmentation's voxels that were clipped."""
    sources: dict[str, dict[str, Any]]
    """Modality -> path, affine and shape of the file that it was read from (the file's own axes)."""
    share_outside: float | None = None
    """Share of the region, 0 to 1, that lies outside the model's box; None in stores of before it was measured."""
    likeness: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Modality -> what `likeness.features` says of the model's box; empty in stores of before it was measured."""
    has_tissue: bool = False


class VolumeStore:
    """Prepared volumes, memory-mapped. Pickles as its path."""

    def __init__(self, path: Path, header: Mapping[str, Any], records: Iterable[SubjectRecord]) -> None:
        """Use VolumeStore.open."""
        self.path = path
        self.layout: str = header["layout"]
        self.fingerprint: str = header["fingerprint"]
        self.preprocess = from_dict(PreprocessConfig, header["preprocess"], "preprocess.")
        self.modalities = sort_modalities(header["modalities"])
        self._subjects = {record.subject_id: record for record in sorted(records, key=lambda r: r.subject_id)}
        self._readers: OrderedDict[str, ShardReader] = OrderedDict()
        self._means: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, path: str | Path) -> "VolumeStore":
        """Open a finished store.

        Raises:
            UserError: not a store, an unfinished one, or one of another format version.
        """
        path = Path(path)
        header = read_store_file(path)
        if header is None:
            raise UserError(f"{path} is not a store of prepared volumes (no {STORE_FILE}): make one with aldm prepare")
        if not (path / MANIFEST_FILE).is_file():
            raise UserError(f"the store {path} is not finished: run the same aldm prepare again, it goes on")
        return cls(path, header, read_manifest(path))

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return VolumeStore.open, (self.path,)

    def subjects(self, split: str | None = None) -> list[SubjectRecord]:
        """Return the subjects of a split (train, validation, test), or all, sorted by subject_id."""
        if split is not None and split not in SPLITS:
            raise UserError(f"no split {split!r}: wanted one of {', '.join(SPLITS)}")
        return [record for record in self._subjects.values() if split in (None, record.split)]

    def subject(self, subject_id: str) -> SubjectRecord:
        """Return one subject's record; UserError when the store has no such subject."""
        if subject_id not in self._subjects:
            raise UserError(f"the store {self.path} has no subject {subject_id!r}")
        return self._subjects[subject_id]

    def whole(self, subject_id: str, modality: str) -> np.ndarray:
        """Return the whole resampled grid, (grid_shape) float32 in [-1, 1]."""
        return self._array(subject_id, modality).astype(np.float32)

    def volume(self, subject_id: str, modality: str) -> np.ndarray:
        """Return the model's box, (spatial_shape) float32 in [-1, 1]; -1 where it leaves the grid."""
        return self._box(subject_id, modality, -1.0).astype(np.float32)

    def axial_slice(self, subject_id: str, modality: str, index: int, shape: tuple[int, int]) -> np.ndarray:
        """Return slice `index` of the model's box in the middle of (shape), float32 in [-1, 1]; -1 around it.

        Nothing outside the box is shown: a translation has the box alone to go by.
        """
        whole, start = self._array(subject_id, modality), self.subject(subject_id).crop_start
        box = self.preprocess.spatial_shape
        inner = crop_or_pad(Volume(whole, np.eye(4)), (*start[:2], start[2] + index), (*box[:2], 1), -1.0)
        begin = (-((shape[0] - box[0]) // 2), -((shape[1] - box[1]) // 2))
        return crop_or_pad(inner, (*begin, 0), (*shape, 1), -1.0).data[:, :, 0].astype(np.float32)

    def mask(self, subject_id: str) -> np.ndarray:
        """Return the region's mask in the model's box, (spatial_shape) bool."""
        return self._box(subject_id, "mask", 0).astype(bool)

    def whole_mask(self, subject_id: str) -> np.ndarray:
        """Return the region's mask on the whole grid, (grid_shape) bool."""
        return self._array(subject_id, "mask").astype(bool)

    def region(self, subject_id: str) -> str:
        """Return what the mask is: brain or foreground."""
        return self.subject(subject_id).region

    def seg(self, subject_id: str) -> np.ndarray | None:
        """Return the segmentation's labels in the model's box, (spatial_shape) uint8, or None."""
        return self._box(subject_id, "seg", 0) if self.subject(subject_id).has_seg else None

    def tissue(self, subject_id: str) -> np.ndarray | None:
        """Return the tissues in the model's box, (spatial_shape) uint8 (1 CSF, 2 grey, 3 white matter), or None."""
        return self._box(subject_id, "tissue", 0) if self.subject(subject_id).has_tissue else None

    def median_percentiles(self, modality: str) -> tuple[float, float]:
        """Return the medians over the training subjects of the intensities that became -1 and +1."""
        pairs = [record.percentiles[modality] for record in self._training_subjects(modality)]
        lows, highs = zip(*pairs, strict=True)
        return statistics.median(lows), statistics.median(highs)

    def median_background(self, modality: str) -> float | None:
        """Return the median over the masked training volumes of their background; None where most are not masked."""
        found = [record.backgrounds[modality] for record in self._training_subjects(modality)]
        values = [value for value in found if value is not None]
        return statistics.median(values) if 2 * len(values) > len(found) else None

    def likeness_rows(self, modality: str, split: str, region: str | None = None) -> list[tuple[float, ...]]:
        """Return what `likeness.features` says of a split's volumes; those that it was not asked about are left out.

        Args:
            modality: of the volumes.
            split: of the subjects.
            region: those alone whose mask is this, brain or foreground; None takes all.
        """
        subjects = [record for record in self.subjects(split) if region in (None, record.region)]
        return [row for record in subjects if (row := record.likeness.get(modality, ()))]

    def training_mean(self, modality: str) -> np.ndarray:
        """Return the mean over the training volumes, (spatial_shape) float32 in [-1, 1] (kept in memory)."""
        if modality not in self._means:
            records = self._training_subjects(modality)
            total = np.zeros(self.preprocess.spatial_shape, np.float64)
            for record in records:
                total += self.volume(record.subject_id, modality)
            self._means[modality] = (total / len(records)).astype(np.float32)
        return self._means[modality]

    @property
    def trained_modalities(self) -> frozenset[str]:
        """The modalities that a training subject has."""
        return frozenset(name for record in self.subjects("train") for name in record.modalities)

    def _training_subjects(self, modality: str) -> list[SubjectRecord]:
        records = [record for record in self.subjects("train") if modality in record.modalities]
        if not records:
            raise UserError(f"the store {self.path} has no training subject with {modality}")
        return records

    def _array(self, subject_id: str, key: str) -> np.ndarray:
        """Return a record of a subject's shard, keeping the most recently used shards mapped."""
        record = self.subject(subject_id)
        if key in MODALITIES and key not in record.modalities:
            raise UserError(f"subject {subject_id} has no {key} in {self.path}: it has {', '.join(record.modalities)}")
        reader = self._readers.pop(subject_id, None) or ShardReader(shard_path(self.path, subject_id))
        self._readers[subject_id] = reader
        if len(self._readers) > _OPEN_SHARDS:
            self._readers.popitem(last=False)
        return reader[key]

    def _box(self, subject_id: str, key: str, fill: float) -> np.ndarray:
        whole, start = self._array(subject_id, key), self.subject(subject_id).crop_start
        return crop_or_pad(Volume(whole, np.eye(4)), start, self.preprocess.spatial_shape, fill).data


def shard_path(store: Path, subject_id: str) -> Path:
    """Return where a subject's shard lies."""
    return store / SHARD_FOLDER / f"{subject_id}.arrow"


def read_store_file(path: Path) -> dict[str, Any] | None:
    """Return what store.json says, or None where there is none; UserError: damaged, or of another format version."""
    if not has_file(path, STORE_FILE):
        return None
    file, way_out = path / STORE_FILE, "prepare the store again with `overwrite`"
    header = read_record(file, {"format_version": int}, way_out)
    if header["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} is a store of format version {header['format_version']}, this program reads {FORMAT_VERSION}: "
            "prepare it again"
        )
    check_record(header, {"layout": str, "preprocess": dict, "modalities": list, "fingerprint": str}, file, way_out)
    return header


def write_store_file(path: Path, header: Mapping[str, Any]) -> None:
    """Write store.json (format_version is added)."""
    with atomic_path(path / STORE_FILE, overwrite=True) as temporary:
        text = json.dumps({"format_version": FORMAT_VERSION, **header}, indent=2, sort_keys=True)
        temporary.write_text(text + "\n")


def write_manifest(path: Path, records: Iterable[SubjectRecord], fingerprint: str) -> None:
    """Write manifest.parquet: one row per (subject, modality), sorted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "subject_id": record.subject_id,
            "split": record.split,
            "modality": modality,
            "has_seg": record.has_seg,
            "has_tissue": record.has_tissue,
            "region": record.region,
            "grid_affine": [value for row in record.grid_affine for value in row],
            "grid_shape": list(record.grid_shape),
            "crop_start": list(record.crop_start),
            "share_outside": record.share_outside,
            "low": record.percentiles[modality][0],
            "high": record.percentiles[modality][1],
            "background": record.backgrounds[modality],
            "clipped": record.clipped[modality][0],
            "clipped_seg": record.clipped[modality][1],
            "likeness": list(record.likeness.get(modality, ())),
            "source_path": record.sources[modality]["path"],
            "source_affine": [value for row in record.sources[modality]["affine"] for value in row],
            "source_shape": list(record.sources[modality]["shape"]),
        }
        for record in sorted(records, key=lambda record: record.subject_id)
        for modality in record.modalities
    ]
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"fingerprint": fingerprint})
    with atomic_path(path / MANIFEST_FILE, overwrite=True) as temporary:
        pq.write_table(table, temporary)


def read_manifest(path: Path) -> list[SubjectRecord]:
    """Return the subjects of manifest.parquet; UserError for a damaged one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    by_subject: dict[str, list[dict[str, Any]]] = {}
    try:
        for row in pq.read_table(path / MANIFEST_FILE).to_pylist():
            by_subject.setdefault(row["subject_id"], []).append(row)
        return [_subject_record(group) for group in by_subject.values()]
    except (pa.ArrowException, OSError, KeyError, TypeError) as error:
        raise UserError(
            f"{path / MANIFEST_FILE} is damaged ({error!r}): run the same aldm prepare again, it writes it again"
        ) from error


def _subject_record(rows: list[dict[str, Any]]) -> SubjectRecord:
    def matrix(values: list[float]) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(values[i : i + 4]) for i in range(0, 16, 4))

    first = rows[0]
    return SubjectRecord(
        subject_id=first["subject_id"],
        split=first["split"],
        modalities=sort_modalities(row["modality"] for row in rows),
        has_seg=first["has_seg"],
        has_tissue=first.get("has_tissue", False),
        region=first["region"],
        grid_affine=matrix(first["grid_affine"]),
        grid_shape=tuple(first["grid_shape"]),
        crop_start=tuple(first["crop_start"]),
        share_outside=first.get("share_outside"),
        percentiles={row["modality"]: (row["low"], row["high"]) for row in rows},
        backgrounds={row["modality"]: row["background"] for row in rows},
        clipped={row["modality"]: (row["clipped"], row["clipped_seg"]) for row in rows},
        likeness={row["modality"]: tuple(row["likeness"]) for row in rows if row.get("likeness")},
        sources={
            row["modality"]: {
                "path": row["source_path"],
                "affine": matrix(row["source_affine"]),
                "shape": tuple(row["source_shape"]),
            }
            for row in rows
        },
    )
