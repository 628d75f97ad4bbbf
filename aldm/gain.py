"""A smooth gain fitted to an image: what a score would be if coil and scale were known.

Two scans of a head differ by a gain that varies slowly over it, of the coils and of the scale, which no other scan
tells. Here it is a polynomial of second order of the position, ten numbers, by least squares (as Axel et al. 1987,
AJR 148, model a coil's sensitivity). What is left after it is contrast, anatomy and noise.
"""

import numpy as np


def with_fitted_gain(reference: np.ndarray, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return an image times the smooth gain that brings it nearest to the reference, clipped to [0, 1].

    Args:
        reference: the true image, X Y Z in [0, 1], where 0 is air.
        image: of the same shape and range.
        mask: bool, the voxels that are fitted; outside it the image stays as it is.

    Returns:
        X Y Z float64. The image itself where it is 0 in the whole mask.
    """
    result = np.array(image, dtype=np.float64)
    places = np.nonzero(mask)
    values = result[places]
    if not values.any():
        return result
    terms = _terms([at / max(side - 1, 1) * 2 - 1 for at, side in zip(places, mask.shape, strict=True)])
    weights, *_ = np.linalg.lstsq(terms * values[:, None], reference[places].astype(np.float64), rcond=None)
    result[places] = np.clip(values * (terms @ weights), 0, 1)
    return result


def _terms(positions: list[np.ndarray]) -> np.ndarray:
    """Return the monomials up to second order of positions in [-1, 1], (N, 10)."""
    x, y, z = positions
    return np.stack([np.ones_like(x), x, y, z, x * x, y * y, z * z, x * y, x * z, y * z], axis=1)
