"""A smooth gain fitted to an image: what a score would be if coil and scale were known.

Two scans of a head differ by a gain that varies slowly over it, of the coils and of the scale, which no other scan
tells. Here it is a polynomial of second order of the position, ten numbers, by least squares (as Axel et al. 1987,
AJR 148, model a coil's sensitivity). What is left after it is contrast, anatomy and noise.
"""

import numpy as np

_POWERS = np.array([p for p in np.ndindex(3, 3, 3) if sum(p) <= 2])
"""(10, 3) powers of x, y and z in each monomial."""


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
    inside = result * mask
    if not inside.any():
        return result
    squares, products = _moments(inside**2, 4), _moments(inside * reference, 2)  # of the normal equations
    sums = _POWERS[:, None] + _POWERS
    weights, *_ = np.linalg.lstsq(squares[tuple(sums.T)], products[tuple(_POWERS.T)], rcond=None)
    gain = np.zeros((3, 3, 3))
    gain[tuple(_POWERS.T)] = weights
    for side in mask.shape:  # of the first axis left, whose values become the last
        gain = np.tensordot(gain, _powers(side, 2), axes=(0, 0))
    result[mask] = np.clip((inside * gain)[mask], 0, 1)
    return result


def _moments(values: np.ndarray, order: int) -> np.ndarray:
    """Return the sums of values (X, Y, Z) times x^a y^b z^c at [a, b, c], each up to the order."""
    for side in values.shape:
        values = np.tensordot(values, _powers(side, order), axes=(0, 1))
    return values


def _powers(side: int, order: int) -> np.ndarray:
    """Return the powers 0 to the order of an axis' positions, from -1 to 1, (order + 1, side)."""
    return np.vander(np.linspace(-1, 1, side), order + 1, increasing=True).T
