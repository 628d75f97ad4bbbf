"""Scores of a translated volume against the true one (method.md section 3): of error, of structure, of sharpness.

Images are X Y Z in [0, 1], so the data range is 1. The functions of one score compute in float64 unless they say
otherwise; `Truth`, which takes all scores of many images against one, filters in float32: it differs by less than 1e-4.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import binary_erosion

from aldm import similarity
from aldm.calibration import STANDARD_DEVIATIONS
from aldm.errors import UserError
from aldm.gain import with_fitted_gain
from aldm.similarity import Similarity

NMI_BINS = 64
"""Intervals of equal width that [0, 1] is cut into for NMI."""
EDGE_SHARE = 0.1
"""Share of the inner voxels, those with the largest gradients, that `edges` marks."""


@dataclass(frozen=True)
class Scores:
    """All scores of one image over one region. NaN is a score that the region does not define."""

    psnr_db: float
    """Peak signal-to-noise ratio, dB; higher is better, infinite for an exact match."""
    nmse: float
    """||x - y||^2 / ||x||^2 with x the true image; lower is better."""
    ssim: float
    """Mean of the SSIM map over the region, at most 1; higher is better."""
    mae: float = math.nan
    """Mean absolute error, in [0, 1]; lower is better."""
    ms_ssim: float = math.nan
    """SSIM over several scales, in [0, 1]; higher is better."""
    nmi: float = math.nan
    """Normalised mutual information, in [1, 2]; higher is better."""
    sharpness: float = math.nan
    """Gradient energy by that of the true image, at least 0; 1 is right, less is blurred, more is noise or ringing."""
    coverage: float = math.nan
    """Share of the voxels whose true value lies in the interval that the model gives, in [0, 1]; NaN without one."""
    error_ratio: float = math.nan
    """RMS error by the RMS standard deviation that the interval stands for; 1 is right, above 1 it is too narrow."""
    gain_psnr_db: float = math.nan
    """PSNR, dB, after the smooth gain that fits best (gain.py); NaN where it was not asked for."""
    gain_ssim: float = math.nan
    """SSIM after it."""


def to_unit(x: np.ndarray) -> np.ndarray:
    """Map model intensities in [-1, 1] to the [0, 1] that the scores are defined on, clipped (float64)."""
    return np.clip((np.asarray(x, dtype=np.float64) + 1) / 2, 0, 1)


def psnr_db(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Return the peak signal-to-noise ratio in dB, 10 log10(1 / MSE); infinite where the two are equal.

    Args:
        reference: the true image, X Y Z in [0, 1].
        image: the image to score, same shape and range.
        mask: bool, the voxels that count; None counts all.

    Raises:
        UserError: shapes that differ, an empty mask, or voxels that are not finite.
    """
    reference, image = _voxels(reference, image, mask)
    return _psnr_db(float(np.mean((reference - image) ** 2)))


def nmse(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Return ||reference - image||^2 / ||reference||^2; infinite where the reference is 0 and the image is not.

    Arguments and errors as in `psnr_db`.
    """
    reference, image = _voxels(reference, image, mask)
    return _nmse(float(np.sum((reference - image) ** 2)), float(np.sum(reference**2)))


def ssim(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Return the mean of `ssim_map` over the mask (over every voxel without one).

    Arguments and errors as in `psnr_db`.
    """
    _check(reference, image, mask)
    values = ssim_map(reference, image)
    return float(np.mean(values if mask is None else values[mask]))


def ssim_map(reference: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Return the structural similarity at every voxel (X Y Z float64, at most 1).

    Arguments and errors as in `psnr_db`, without a mask.
    """
    _check(reference, image, None)
    x, y = np.asarray(reference, dtype=np.float64), np.asarray(image, dtype=np.float64)
    return similarity.ssim_map(x, y)


def mae(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Return the mean absolute error, mean |reference - image|. Arguments and errors as in `psnr_db`."""
    reference, image = _voxels(reference, image, mask)
    return float(np.mean(np.abs(reference - image)))


def ms_ssim(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Return the multi-scale SSIM (Wang, Simoncelli & Bovik, Asilomar 2003, eq. 7), in [0, 1], with float32 filters.

    MS-SSIM = SSIM_M^w_M * prod_{j < M} CS_j^w_j over scales 1 (the finest) to M, with w SCALE_WEIGHTS. SSIM_M is the
    mean of the SSIM map at scale M, CS_j that of its contrast and structure (2 cov + C2) / (var_x + var_y + C2). The
    means are over the region, as in the authors' code over the image. A negative mean counts as 0.

    The next scale is the mean of 2 x 2 x 2 voxels; the last voxel of an odd axis is repeated. There a voxel's weight in
    the region's mean is the share of it that the mask covers. Scales stop before the shortest axis is shorter than the
    window (`ms_ssim_scales`); the weights of those that are left are divided by their sum.

    Arguments and errors as in `psnr_db`.
    """
    return score(reference, image, {"": mask})[""].ms_ssim


def nmi(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Return the normalised mutual information (H(x) + H(y)) / H(x, y) (Studholme et al. 1999, Pattern Recognition 32).

    H is the entropy of the region's intensities, of one image or of both together, in NMI_BINS bins over [0, 1]. It is
    1 for images that say nothing of each other and 2 where each follows from the other: it does not ask for equal
    intensities. NaN where both images fill one bin only. Arguments and errors as in `psnr_db`.
    """
    return score(reference, image, {"": mask})[""].nmi


def sharpness(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Return sum |grad image|^2 / sum |grad reference|^2 over the region, at least 0: 1 is right, below 1 is blurred.

    Gradients are central differences between voxels, at the border one-sided. The energy is the usual measure of focus
    (Subbarao et al. 1993, Optical Engineering 32(11)). Noise raises it, and a gain g multiplies it by g^2, so it is
    read beside the other scores. NaN where neither image has a gradient, infinite where the reference alone has none.

    Arguments and errors as in `psnr_db`.
    """
    return score(reference, image, {"": mask})[""].sharpness


def edges(reference: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the voxels with the largest gradients inside a mask, the upper tenth (EDGE_SHARE) of them (X Y Z bool).

    The mask's outermost layer of voxels is left out: the outline of a brain without its skull is the largest gradient
    of all and says little. Nothing is marked where nothing is left, or where the gradient is the same everywhere.

    Args:
        reference: the true image, X Y Z.
        mask: where to look, bool, same shape.
    """
    inner = binary_erosion(mask)
    energy = _gradient_energy(np.asarray(reference, dtype=np.float64))
    found: np.ndarray = inner & (energy > np.quantile(energy[inner], 1 - EDGE_SHARE)) if inner.any() else inner
    return found


def score(reference: np.ndarray, image: np.ndarray, regions: Mapping[str, np.ndarray | None]) -> dict[str, Scores]:
    """Return all scores over each region; for several images against one reference make a `Truth` once.

    Args:
        reference: the true image, X Y Z in [0, 1].
        image: the image to score, same shape and range.
        regions: name -> bool mask, or None for the whole volume.

    Raises:
        UserError: as `psnr_db`.
    """
    return Truth(reference, regions).score(image)


class Truth:
    """A true image and some regions, with all that scoring an image against it takes of them alone."""

    def __init__(self, reference: np.ndarray, regions: Mapping[str, np.ndarray | None]) -> None:
        """Filter the reference once.

        Args:
            reference: the true image, X Y Z in [0, 1].
            regions: name -> bool mask, or None for the whole volume.

        Raises:
            UserError: as `psnr_db`.
        """
        for mask in regions.values():
            _check(reference, reference, mask)
        self.image = np.asarray(reference, dtype=np.float64)
        # a region's voxels in the order of the flat image
        self._places = {name: slice(None) if mask is None else np.flatnonzero(mask) for name, mask in regions.items()}
        self._energy = {name: float(np.sum(values**2)) for name, values in self._each(self.image)}
        self._similarity = Similarity(self.image, regions)
        gradients = _gradient_energy(self.image.astype(np.float32))
        self._gradients = {name: _sum(values) for name, values in self._each(gradients)}
        self._bins = _bins(self.image) * NMI_BINS

    def score(self, image: np.ndarray, half_width: np.ndarray | None = None) -> dict[str, Scores]:
        """Return all scores of an image over each region.

        Args:
            image: X Y Z in [0, 1].
            half_width: of the same shape, half of the interval around each voxel that is to hold the true value with
                probability LEVEL; None leaves coverage and error_ratio out.

        Raises:
            UserError: another shape, or voxels that are not finite.
        """
        found = self._scores(image)
        if half_width is None:
            return found
        error = np.abs(self.image - image)
        inside, square = dict(self._each(error <= half_width)), dict(self._each(error**2))
        spread = dict(self._each((np.asarray(half_width, np.float64) / STANDARD_DEVIATIONS) ** 2))
        return {
            name: replace(
                scores,
                coverage=float(np.mean(inside[name])),
                error_ratio=math.sqrt(_ratio(float(np.mean(square[name])), float(np.mean(spread[name])))),
            )
            for name, scores in found.items()
        }

    def after_gain(self, image: np.ndarray, region: str) -> dict[str, float]:
        """Return `gain_psnr_db` and `gain_ssim` of an image (X Y Z in [0, 1]) over a region, the gain fitted there."""
        mask = np.zeros(self.image.size, bool)
        mask[self._places[region]] = True
        gained = with_fitted_gain(self.image, image, mask.reshape(self.image.shape))
        error = (self.image - gained).reshape(-1)[self._places[region]]
        ssim = self._similarity.ssim(gained.astype(np.float32), region)
        return {"gain_psnr_db": _psnr_db(float(np.mean(error**2))), "gain_ssim": ssim}

    def _scores(self, image: np.ndarray) -> dict[str, Scores]:
        """Return the scores of the image alone."""
        _check(self.image, image, None)
        y = np.asarray(image, dtype=np.float64)
        error = self.image - y
        y32 = y.astype(np.float32)
        ssim, ms_ssim = self._similarity.compare(y32)
        gradients = dict(self._each(_gradient_energy(y32)))
        pairs = dict(self._each(self._bins + _bins(y)))
        return {
            name: Scores(
                psnr_db=_psnr_db(float(np.mean(own**2))),
                nmse=_nmse(float(np.sum(own**2)), self._energy[name]),
                ssim=ssim[name],
                mae=float(np.mean(np.abs(own))),
                ms_ssim=ms_ssim[name],
                nmi=_nmi(np.bincount(pairs[name], minlength=NMI_BINS**2).reshape(NMI_BINS, NMI_BINS)),
                sharpness=_ratio(_sum(gradients[name]), self._gradients[name]),
            )
            for name, own in self._each(error)
        }

    def _each(self, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each region's voxels of an X Y Z array."""
        flat = values.reshape(-1)
        for name, places in self._places.items():
            yield name, flat[places]


def _gradient_energy(x: np.ndarray) -> np.ndarray:
    """Return the squared length of the gradient at every voxel, per voxel width; an axis of one voxel has none."""
    energy = np.zeros_like(x)
    for axis in (axis for axis, side in enumerate(x.shape) if side > 1):
        energy += np.gradient(x, axis=axis) ** 2
    return energy


def _bins(x: np.ndarray) -> np.ndarray:
    """Return the bin of every intensity, int in [0, NMI_BINS); what lies outside [0, 1] falls into the outermost."""
    return np.clip((x * NMI_BINS).astype(np.intp), 0, NMI_BINS - 1)


def _nmi(counts: np.ndarray) -> float:
    """Return the normalised mutual information of a joint histogram."""
    joint = counts / counts.sum()
    return _ratio(_entropy(joint.sum(axis=0)) + _entropy(joint.sum(axis=1)), _entropy(joint))


def _entropy(shares: np.ndarray) -> float:
    """Return the entropy of a distribution, nats; exactly 0 where all is in one bin."""
    shares = shares[shares > 0]
    return abs(float(np.sum(shares * np.log(shares))))


def _ratio(one: float, other: float) -> float:
    if other == 0:
        return math.nan if one == 0 else math.inf
    return one / other


def _sum(values: np.ndarray) -> float:
    return float(np.sum(values, dtype=np.float64))


def _psnr_db(mean_square: float) -> float:
    return math.inf if mean_square == 0 else -10 * math.log10(mean_square)


def _nmse(error: float, energy: float) -> float:
    if error == 0:
        return 0.0
    return error / energy if energy > 0 else math.inf


def _voxels(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the voxels that count as two float64 arrays."""
    _check(reference, image, mask)
    if mask is not None:
        reference, image = reference[mask], image[mask]
    return np.asarray(reference, dtype=np.float64), np.asarray(image, dtype=np.float64)


def _check(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None) -> None:
    """Refuse what has no score."""
    if reference.shape != image.shape:
        raise UserError(f"cannot score an image of shape {image.shape} against a reference of shape {reference.shape}")
    if mask is not None and (mask.shape != reference.shape or mask.dtype != bool):
        raise UserError(f"the mask is {mask.dtype} of shape {mask.shape}, wanted bool of shape {reference.shape}")
    if mask is not None and not mask.any():
        raise UserError("the mask is empty: there is no voxel to score")
    for name, data in (("reference", reference), ("image", image)):
        if not np.isfinite(data).all():
            raise UserError(f"the {name} holds NaN or infinite voxels, which have no score")
