"""The tables of an intensity map, in closed form from the training subjects of a store of latents."""

from collections.abc import Sequence

import numpy as np
import torch

from aldm.data.modalities import modality_index
from aldm.latents import LatentStore
from aldm.models.intensity_map import AIR, BINS, IntensityMap
from aldm.progress import progress
from aldm.references import bins_of, conditional_mean


def fit_intensity_map(into: IntensityMap, latents: LatentStore, modalities: Sequence[str]) -> np.ndarray:
    """Fill the tables: of all functions that are constant in each bin, the one with the least squared error per pair.

    Over all voxels of the training subjects that are not air. One subject at a time is in memory. A pair that no
    training subject has both modalities of keeps its table, at first the identity.

    Args:
        into: built for these modalities, and for the codec of the latents.
        latents: of a lossless codec.
        modalities: those of the model; ids count through them.

    Returns:
        (M, M) mean squared error that the map of (source, target) leaves, intensities in [-1, 1]: 0 between a modality
        and itself, NaN where no training subject has both.
    """
    into.mean.copy_(torch.from_numpy(latents.mean))
    into.std.copy_(torch.from_numpy(latents.std))
    number = len(modalities)
    counts, sums = np.zeros((number, number, BINS)), np.zeros((number, number, BINS))
    squares = np.zeros((number, number))
    for subject in progress(latents.subjects("train"), description="intensity maps", unit="subject"):
        own = [name for name in modalities if name in subject.modalities]
        volumes = {modality_index(n, tuple(modalities)): _volume(into, latents, subject.subject_id, n) for n in own}
        for source, x in volumes.items():
            tissue = x >= AIR
            bins = bins_of(x[tissue])
            own_counts = np.bincount(bins, minlength=BINS)
            for target, y in volumes.items():
                counts[source, target] += own_counts
                sums[source, target] += np.bincount(bins, y[tissue], minlength=BINS)
                squares[source, target] += np.square(y[tissue], dtype=np.float64).sum()
    errors = np.full((number, number), np.nan)
    for source in range(number):
        for target in range(number):
            n, total = counts[source, target], sums[source, target]
            if source != target and n.any():
                into.tables[source, target] = torch.from_numpy(conditional_mean(n, total))
                explained = np.divide(total**2, n, out=np.zeros(BINS), where=n > 0).sum()
                errors[source, target] = (squares[source, target] - explained) / n.sum()
    np.fill_diagonal(errors, 0.0)
    return errors


def _volume(into: IntensityMap, latents: LatentStore, subject_id: str, modality: str) -> np.ndarray:
    """Return the volume of a latent, flat, in [-1, 1]."""
    z = torch.from_numpy(latents.latent(subject_id, modality))[None]
    volume: np.ndarray = into.inverse(z * into.std.view(1, -1, 1, 1, 1) + into.mean.view(1, -1, 1, 1, 1)).numpy()
    return volume.ravel()
