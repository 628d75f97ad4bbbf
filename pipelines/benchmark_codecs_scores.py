"""What `aldm benchmark --codecs` measures: reconstructions of the test split, around the quantisation, and costs."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aldm.files import atomic_path
from pipelines.benchmark_codecs import CodecEntry, CodecTerms

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from aldm.data.store import SubjectRecord, VolumeStore
    from aldm.models.codecs import Codec
    from aldm.score_rows import ScoreRow

BEFORE = ", before quantisation"
"""Behind a codec's name: the decoder given the latent as the encoder made it."""
FIXED = "closed-forms"
"""Folder of the scores of the codecs that need no training."""
SCORES_FILE, FACTS = "scores.csv", "codec.json"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a codec costs; None where nothing is quantised, trained or timed."""

    scalars_per_voxel: float
    bits_per_voxel: float | None = None
    """log2 of the number of codes, times latent voxels over voxels: what the codes take at a fixed length."""
    codes: int | None = None
    codes_used: float | None = None
    """Share of the codes that the split's latents come to."""
    perplexity: float | None = None
    """exp(entropy) of how often each code is used there."""
    parameters: int | None = None
    seconds_per_volume: float | None = None
    """Median time of encoding, quantising and decoding."""


@dataclass(frozen=True)
class Measured:
    """One codec with one seed."""

    codec: str
    seed: int
    facts: Facts
    rows: Sequence["ScoreRow"]


def score_all(
    terms: CodecTerms, entries: Sequence[CodecEntry], store: "VolumeStore", device: "torch.device"
) -> list[Measured]:
    """Measure the codecs in closed form and the trained ones on the test split; what was measured before is read."""
    found = _fixed(terms, store)
    for entry in entries:
        if not (entry.folder / FACTS).is_file():
            _score_trained(entry, store, terms.split, device)
        facts = Facts(**json.loads((entry.folder / FACTS).read_text()))
        found.append(Measured(entry.method, entry.seed, facts, _rows(entry.folder)))
    return found


def _fixed(terms: CodecTerms, store: "VolumeStore") -> list[Measured]:
    folder = terms.out / FIXED
    file = folder / FACTS
    if not file.is_file():
        from aldm.fixed_codecs import fixed_codecs

        codecs = fixed_codecs(store)
        rows = score_volumes(
            store,
            store.subjects(terms.split),
            lambda x: {name: codec.reconstruct(x) for name, codec in codecs.items()},
            "codecs in closed form",
        )
        facts = {name: asdict(Facts(scalars_per_voxel=codec.scalars_per_voxel)) for name, codec in codecs.items()}
        _write(folder, rows, facts)
    rows = _rows(folder)
    return [
        Measured(name, 0, Facts(**facts), [row for row in rows if row.method == name])
        for name, facts in json.loads(file.read_text()).items()
    ]


def _score_trained(entry: CodecEntry, store: "VolumeStore", split: str, device: "torch.device") -> None:
    from aldm.checkpoint import load_checkpoint, load_weights
    from aldm.models.codecs import build_codec
    from aldm.run_folder import checkpoint_folder

    checkpoint = load_checkpoint(checkpoint_folder(entry.folder / "vqgan"), "codec")
    config = checkpoint.config
    codec = build_codec(config.codec)
    load_weights(codec, checkpoint.weights, checkpoint.path)
    measure = _Reconstruction(entry.method, codec.to(device).eval(), config.precision, device)
    rows = score_volumes(store, store.subjects(split), measure, f"{entry.method}, seed {entry.seed}")
    _write(entry.folder, rows, asdict(measure.facts()))


@dataclass(eq=False)
class _Reconstruction:
    """Runs a trained codec on volumes, and counts its codes and the time."""

    name: str
    codec: "Codec"
    precision: str
    device: "torch.device"
    counts: np.ndarray = field(init=False)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.codec.quantizer is not None, "a codec that is trained quantises"
        self.counts = np.zeros(self.codec.quantizer.codebook_size, np.int64)

    def __call__(self, x: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        from aldm.precision import arithmetic, usable_precision

        volume = torch.from_numpy(x).to(self.device)[None, None]
        with torch.inference_mode(), arithmetic(usable_precision(self.precision, self.device), self.device):
            start = time.perf_counter()
            z = self.codec.encode(volume)
            quantized = self.codec.quantize(z)
            after = _volume(self.codec.decode_codes(quantized.z_q))
            self.seconds.append(time.perf_counter() - start)
            before = _volume(self.codec.decode_codes(z))
        assert quantized.indices is not None, "a codec that is trained quantises"
        self.counts += np.bincount(quantized.indices.flatten().cpu().numpy(), minlength=self.counts.size)
        return {self.name: after, self.name + BEFORE: before}

    def facts(self) -> Facts:
        """Return what the codec costs, its codes counted over the volumes so far."""
        from aldm.layer_table import count

        voxels = self.codec.downsampling**3
        share = self.counts[self.counts > 0] / self.counts.sum()
        return Facts(
            scalars_per_voxel=self.codec.latent_channels / voxels,
            bits_per_voxel=math.log2(self.counts.size) / voxels,
            codes=self.counts.size,
            codes_used=float(np.mean(self.counts > 0)),
            perplexity=float(np.exp(-np.sum(share * np.log(share)))),
            parameters=count(self.codec),
            seconds_per_volume=float(np.median(self.seconds)),
        )


def _volume(x: "Tensor") -> np.ndarray:
    volume: np.ndarray = x[0, 0].float().cpu().numpy()
    return volume


def score_volumes(
    store: "VolumeStore",
    subjects: Sequence["SubjectRecord"],
    reconstruct: Callable[[np.ndarray], Mapping[str, np.ndarray]],
    description: str,
) -> list["ScoreRow"]:
    """Score reconstructions of all volumes of some subjects, over the whole box and inside the mask.

    Args:
        store: of the subjects.
        subjects: of one split.
        reconstruct: volume (X, Y, Z) in [-1, 1] to its reconstructions by name.
        description: of the progress.
    """
    from aldm.metrics import Truth, to_unit
    from aldm.progress import progress
    from aldm.score_rows import ScoreRow

    rows = []
    for record in progress(subjects, description=description, unit="subject"):
        mask = store.mask(record.subject_id)
        regions = {"volume": None} | ({record.region: mask} if mask.any() else {})
        for name in record.modalities:
            x = store.volume(record.subject_id, name)
            truth = Truth(to_unit(x), regions)
            for method, y in reconstruct(x).items():
                for region, values in truth.score(to_unit(y)).items():
                    rows.append(ScoreRow(record.subject_id, method, name, name, "", 0, region, **asdict(values)))
    return rows


def _write(folder: Path, rows: Sequence["ScoreRow"], facts: Mapping[str, Any]) -> None:
    """Write the scores, then the facts: where these are, both are whole."""
    from aldm.score_rows import write_csv

    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / SCORES_FILE, rows, overwrite=True)
    with atomic_path(folder / FACTS, overwrite=True) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n")


def _rows(folder: Path) -> list["ScoreRow"]:
    from aldm.score_rows import read_csv

    return read_csv(folder / SCORES_FILE)
