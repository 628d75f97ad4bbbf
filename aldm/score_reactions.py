"""How the scores react to known faults: real volumes, corrupted on purpose, scored against themselves.

A score that hardly moves under a fault cannot tell a model with that fault from one without. Dohmen et al. (Scientific
Reports 2025) compare similarity scores of MR images in this way.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.ndimage import gaussian_filter

from aldm.data.store import SubjectRecord, VolumeStore
from aldm.progress import progress
from aldm.score_rows import MethodKey, ScoreRow, mean_scores
from aldm.subject_scorer import SubjectScorer

UNCHANGED = "unchanged"
"""Method of the rows of the volumes themselves, which have the perfect value of every score."""
HEADINGS = {
    "psnr_db": "PSNR (dB)",
    "nmse": "NMSE",
    "ssim": "SSIM",
    "mae": "MAE",
    "ms_ssim": "MS-SSIM",
    "nmi": "NMI",
    "sharpness": "sharpness",
}


@dataclass(frozen=True)
class Corruption:
    """A fault at one strength."""

    name: str
    """Its name with its strength and unit."""
    apply: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    """Takes a volume, X Y Z in [0, 1], and returns it with the fault, clipped to [0, 1]."""


def blur(x: np.ndarray, _: np.random.Generator, sigma: float) -> np.ndarray:
    """Filter with a Gaussian of `sigma` voxels."""
    return np.asarray(gaussian_filter(x, sigma))


def noise(x: np.ndarray, rng: np.random.Generator, std: float) -> np.ndarray:
    """Return the magnitude after complex Gaussian noise of `std` in either part (Rician noise)."""
    return np.clip(np.hypot(x + std * rng.standard_normal(x.shape), std * rng.standard_normal(x.shape)), 0, 1)


def gain(x: np.ndarray, _: np.random.Generator, factor: float) -> np.ndarray:
    """Multiply by a factor."""
    return np.clip(factor * x, 0, 1)


def shift(x: np.ndarray, _: np.random.Generator, voxels: int) -> np.ndarray:
    """Move along X by whole voxels; the first plane is repeated where nothing comes in."""
    return np.concatenate([np.repeat(x[:1], voxels, axis=0), x], axis=0)[: len(x)]


def ghost(x: np.ndarray, _: np.random.Generator, share: float) -> np.ndarray:
    """Weaken every second line of k-space along Y by `share`: a ghost of share / 2 half the field of view away."""
    return np.clip((1 - share / 2) * x + share / 2 * np.roll(x, x.shape[1] // 2, axis=1), 0, 1)


CORRUPTIONS = (
    Corruption("blur, sigma 0.5 voxels", partial(blur, sigma=0.5)),
    Corruption("blur, sigma 1 voxel", partial(blur, sigma=1.0)),
    Corruption("noise, SD 0.02", partial(noise, std=0.02)),
    Corruption("noise, SD 0.05", partial(noise, std=0.05)),
    Corruption("gain 0.95", partial(gain, factor=0.95)),
    Corruption("gain 0.8", partial(gain, factor=0.8)),
    Corruption("shift, 1 voxel", partial(shift, voxels=1)),
    Corruption("shift, 2 voxels", partial(shift, voxels=2)),
    Corruption("ghosting, 10 %", partial(ghost, share=0.1)),
    Corruption("ghosting, 30 %", partial(ghost, share=0.3)),
)
"""Every fault at two strengths, the weaker one first."""


def reactions(store: VolumeStore, subjects: Sequence[SubjectRecord], *, seed: int = 0) -> list[ScoreRow]:
    """Score every volume of some subjects, unchanged and with each fault, against itself.

    Args:
        store: of the subjects.
        subjects: at least one.
        seed: of the noise; every volume has its own.

    Returns:
        rows whose method is UNCHANGED or a corruption's name, and whose source and target are the volume's modality.
    """
    rows: list[ScoreRow] = []
    for record in progress(subjects, description="self-test", unit="subject"):
        volumes = {name: store.volume(record.subject_id, name) for name in record.modalities}
        scorer = SubjectScorer(rows, store, record, volumes)
        for name in volumes:
            truth = scorer.truth(name)
            rng = np.random.default_rng([seed, zlib.crc32(f"{record.subject_id}/{name}".encode())])
            scorer.file(MethodKey(UNCHANGED, "", 0), name, name, truth.score(truth.image))
            for corruption in CORRUPTIONS:
                made = truth.score(corruption.apply(truth.image, rng))
                scorer.file(MethodKey(corruption.name, "", 0), name, name, made)
    return rows


def reaction_table(rows: Sequence[ScoreRow], region: str) -> str:
    """Return a table of the mean scores, a line per fault.

    Behind a score stands its distance from the unchanged volume's, as a share of the largest in its column; PSNR has no
    such distance.

    Args:
        rows: of `reactions`.
        region: the region that counts.
    """
    means = mean_scores([row for row in rows if row.region == region], with_codec=True)
    means = means.droplevel(["sampler", "num_inference_steps", "region"])
    distances = (means - means.loc[UNCHANGED]).abs()
    lines = [f"| | {' | '.join(HEADINGS.values())} |", "|---" * (len(HEADINGS) + 1) + "|"]
    for method, values in means.iterrows():
        cells = ["exact" if np.isinf(values["psnr_db"]) else f"{values['psnr_db']:.1f}"]
        for name in list(HEADINGS)[1:]:
            share = "" if method == UNCHANGED else f" ({distances.loc[method, name] / distances[name].max():.0%})"
            cells.append(f"{values[name]:.3f}{share}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
