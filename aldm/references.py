"""Two references that change intensities alone, in closed form from the training split: what contrast by itself gives.

Inside the region's mask they map the source's intensities voxel by voxel; outside it they leave the source as it is, as
the identity does.

* Intensity map: of all functions of the source's intensity that are constant in each of BINS bins, the one with the
  least squared error over the voxels of all training subjects. It is the mean target intensity of every bin (the
  regressogram, Tukey 1961). A model below it has learnt nothing of where a voxel lies or what is around it.
* Histogram matching (histogram specification, Gonzalez & Woods, Digital Image Processing): the monotone map that takes
  the source volume's distribution to the mean distribution of the training volumes of the target. It knows no pairs.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aldm.data.store import VolumeStore
from aldm.models.intensity_map import BINS
from aldm.progress import progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class References:
    """What was fitted on the training split; a few kB."""

    maps: Mapping[tuple[str, str], np.ndarray]
    """(source, target) -> target intensity of every bin of the source's, (BINS,) in [-1, 1]."""
    histograms: Mapping[str, np.ndarray]
    """Target -> share of the voxels in every bin, mean over subjects, (BINS,), sum 1."""

    def predictions(
        self, x: np.ndarray, mask: np.ndarray, source: str, target: str
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (row's name, x as the target), for what the training split had.

        Args:
            x: the source volume, (spatial_shape) in [-1, 1].
            mask: the voxels to map, (spatial_shape) bool.
            source, target: two different modalities.
        """
        if (source, target) in self.maps:
            yield "intensity-map", _inside(x, mask, self.maps[source, target][bins_of(x[mask])])
        if target in self.histograms and mask.any():
            yield "histogram-matching", _inside(x, mask, match_histogram(x[mask], self.histograms[target]))


def fit_references(store: VolumeStore, pairs: Sequence[tuple[str, str]]) -> References:
    """Fit both references for some (source, target); one pass over the training subjects, one of them in memory.

    A pair that no training subject has both modalities of gets no intensity map, and a warning; without any training
    subject there is nothing to fit, which is one warning.

    Raises:
        UserError: the shard of a training subject cannot be read.
    """
    if not store.subjects("train"):
        logger.warning(
            "the store has no training subject: the rows training-mean, intensity-map and histogram-matching, which "
            "are made of those, are left out"
        )
        return References({}, {})
    names = {name for pair in pairs for name in pair}
    joint = {pair: np.zeros((2, BINS)) for pair in pairs}  # number of voxels, and sum of the target's intensities
    histograms = {target: np.zeros(BINS) for _, target in pairs}
    for record in progress(store.subjects("train"), description="intensity maps", unit="subject"):
        mask = store.mask(record.subject_id)
        if not mask.any():
            continue
        values = {n: store.volume(record.subject_id, n)[mask] for n in record.modalities if n in names}
        bins = {name: bins_of(x) for name, x in values.items()}
        counts = {name: np.bincount(own, minlength=BINS) for name, own in bins.items()}
        for (source, target), total in joint.items():
            if source in values and target in values:
                total += counts[source], np.bincount(bins[source], values[target], minlength=BINS)
        for target in histograms.keys() & counts.keys():
            histograms[target] += counts[target] / counts[target].sum()
    for source, target in (pair for pair, total in joint.items() if not total.any()):
        logger.warning("no training subject has both %s and %s: no intensity map for them", source, target)
    return References(
        {pair: conditional_mean(*total) for pair, total in joint.items() if total.any()},
        {target: total / total.sum() for target, total in histograms.items() if total.any()},
    )


def bins_of(x: np.ndarray) -> np.ndarray:
    """Return the bin of every intensity, int in [0, BINS); what lies outside [-1, 1] falls into the first or last."""
    return np.clip(((x + 1) * (BINS / 2)).astype(np.intp), 0, BINS - 1)


def conditional_mean(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Return the mean of every bin, (BINS,); empty ones between their neighbours, linearly, constant at the ends.

    Args:
        counts: number of voxels in each bin, (BINS,), not all 0.
        sums: sum of the target's intensities over them, (BINS,).
    """
    filled = np.flatnonzero(counts)
    return np.interp(np.arange(BINS), filled, sums[filled] / counts[filled])


def match_histogram(x: np.ndarray, histogram: np.ndarray) -> np.ndarray:
    """Return intensities with the histogram's quantiles, in the order of x.

    A value's quantile is the middle of the shares below and up to it, so equal values stay equal.

    Args:
        x: intensities, (n,), n at least 1.
        histogram: share of each bin, (BINS,), sum 1; even within a bin.
    """
    _, rank, counts = np.unique(x, return_inverse=True, return_counts=True)
    quantiles = (np.cumsum(counts) - counts / 2) / x.size
    shares, edges = np.concatenate([[0], np.cumsum(histogram)]), np.linspace(-1, 1, BINS + 1)
    return np.interp(quantiles, shares, edges)[rank]


def _inside(x: np.ndarray, mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return x with other values inside the mask."""
    result = x.copy()
    result[mask] = values
    return result
