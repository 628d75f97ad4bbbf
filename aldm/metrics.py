"""Scores of a translated volume against the true one: PSNR, NMSE and 3D SSIM (method.md section 3).

Images are X Y Z in [0, 1], so the data range is 1. Everything is computed in float64.

SSIM follows Wang et al. 2004 (IEEE TIP 13(4)), eq. 13, with its Gaussian window extended to 3D: sigma 1.5, 11 taps per
axis, K1 = .01, K2 = .03, weights that sum to 1 and so the biased (co)variances of the paper. At the border the image is
mirrored with the edge voxel repeated (d c b a | a b c d | d c b a); the map covers every voxel and nothing is cropped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import correlate1d

from aldm.errors import UserError

SIGMA = 1.5
TAPS = 11
K1 = 0.01
K2 = 0.03


@dataclass(frozen=True)
class Scores:
    """The three scores of one image over one region."""

    psnr_db: float
    """Peak signal-to-noise ratio, dB; higher is better, infinite for an exact match."""
    nmse: float
    """||x - y||^2 / ||x||^2 with x the true image; lower is better."""
    ssim: float
    """Mean of the SSIM map over the region, at most 1; higher is better."""


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
    error = float(np.mean((reference - image) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def nmse(reference: np.ndarray, image: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Return ||reference - image||^2 / ||reference||^2; infinite where the reference is 0 and the image is not.

    Arguments and errors as in `psnr_db`.
    """
    reference, image = _voxels(reference, image, mask)
    error, energy = float(np.sum((reference - image) ** 2)), float(np.sum(reference**2))
    if error == 0:
        return 0.0
    return error / energy if energy > 0 else math.inf


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
    mean_x, mean_y = _blur(x), _blur(y)
    c1, c2 = K1**2, K2**2
    covariance = _blur(x * y) - mean_x * mean_y
    # var_x + var_y is all that the formula needs of the two variances: one blur for both
    variances = _blur(x * x + y * y) - mean_x**2 - mean_y**2
    return ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / ((mean_x**2 + mean_y**2 + c1) * (variances + c2))


def score(reference: np.ndarray, image: np.ndarray, regions: Mapping[str, np.ndarray | None]) -> dict[str, Scores]:
    """Return the three scores over each region, with one SSIM map for all of them.

    Args:
        reference: the true image, X Y Z in [0, 1].
        image: the image to score, same shape and range.
        regions: name -> bool mask, or None for the whole volume.

    Raises:
        UserError: as `psnr_db`.
    """
    values = ssim_map(reference, image)
    return {
        name: Scores(
            psnr_db=psnr_db(reference, image, mask),
            nmse=nmse(reference, image, mask),
            ssim=float(np.mean(values if mask is None else values[mask])),
        )
        for name, mask in regions.items()
    }


def gaussian_taps() -> np.ndarray:
    """Return the window's weights along one axis, (TAPS,), summing to 1."""
    offsets = np.arange(TAPS) - TAPS // 2
    weights = np.exp(-(offsets**2) / (2 * SIGMA**2))
    return weights / weights.sum()


def _blur(x: np.ndarray) -> np.ndarray:
    """Filter with the separable Gaussian window; scipy's `reflect` repeats the edge voxel."""
    for axis in range(x.ndim):
        x = correlate1d(x, gaussian_taps(), axis=axis, mode="reflect")
    return x


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
