"""SSIM in 3D, on one scale or several.

SSIM follows Wang et al. 2004 (IEEE TIP 13(4)), eq. 13, with its Gaussian window extended to 3D: sigma 1.5, 11 taps per
axis, K1 = .01, K2 = .03, weights that sum to 1 and so the biased (co)variances of the paper. At the border the image is
mirrored with the edge voxel repeated (d c b a | a b c d | d c b a); the map covers every voxel and nothing is cropped.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import correlate1d

SIGMA = 1.5
TAPS = 11
K1 = 0.01
K2 = 0.03
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Of MS-SSIM's scales, the finest first (Wang et al. 2003, section 3.2)."""


def ssim_map(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the structural similarity of two images at every voxel (X Y Z, at most 1), in their own precision."""
    # var_x + var_y is all that the formula needs of the two variances: one blur for both
    luminance, structure = _factors(_blur(x), _blur(y), _blur(x * x + y * y), _blur(x * y))
    return luminance * structure


def ms_ssim_scales(shape: tuple[int, ...]) -> int:
    """Return how many scales MS-SSIM takes of a volume, 1 to 5: where each axis has at least 11 voxels, or one."""
    shortest, count = min(shape), 1
    while count < len(SCALE_WEIGHTS) and (shortest + 1) // 2 >= TAPS:
        shortest, count = (shortest + 1) // 2, count + 1
    return count


class Similarity:
    """SSIM and MS-SSIM of images against one, in float32; what concerns the true image alone is filtered once."""

    def __init__(self, reference: np.ndarray, regions: Mapping[str, np.ndarray | None]) -> None:
        """Filter the true image.

        Args:
            reference: the true image, X Y Z in [0, 1].
            regions: name -> bool mask, not empty, or None for the whole volume.
        """
        self._scales = list(_scales(reference.astype(np.float32), regions))
        exponents = np.array(SCALE_WEIGHTS[: len(self._scales)])
        self._exponents = exponents / exponents.sum()

    def ssim(self, y: np.ndarray, region: str) -> float:
        """Return SSIM alone of an image (X Y Z float32 in [0, 1]) over a region."""
        luminance, structure = self._scales[0].compare(y)
        return _mean(luminance * structure, self._scales[0].weights[region])

    def compare(self, y: np.ndarray) -> tuple[dict[str, float], dict[str, float]]:
        """Return SSIM and MS-SSIM of an image (X Y Z float32 in [0, 1]) over each region."""
        ssim: dict[str, float] = {}
        ms_ssim = dict.fromkeys(self._scales[0].weights, 1.0)
        for scale, exponent in zip(self._scales, self._exponents, strict=True):
            luminance, structure = scale.compare(y)
            whole = luminance * structure
            if scale is self._scales[0]:
                ssim = {name: _mean(whole, weights) for name, weights in scale.weights.items()}
            factor = whole if scale is self._scales[-1] else structure
            for name, weights in scale.weights.items():
                ms_ssim[name] *= max(_mean(factor, weights), 0.0) ** float(exponent)
            y = _halve(y)
        return ssim, ms_ssim


@dataclass(frozen=True, eq=False)
class _Scale:
    """The true image at one scale, filtered."""

    x: np.ndarray
    mean: np.ndarray
    mean_square: np.ndarray
    weights: dict[str, np.ndarray | None]
    """Region -> share of every voxel that belongs to it; None is 1 everywhere."""

    def compare(self, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the two factors of SSIM at every voxel: luminance; contrast with structure."""
        return _factors(self.mean, _blur(y), self.mean_square + _blur(y * y), _blur(self.x * y))


def _scales(x: np.ndarray, regions: Mapping[str, np.ndarray | None]) -> Iterator[_Scale]:
    """Yield the scales of MS-SSIM, the finest first."""
    weights = {name: None if mask is None else mask.astype(np.float32) for name, mask in regions.items()}
    for _ in range(ms_ssim_scales(x.shape)):
        yield _Scale(x, _blur(x), _blur(x * x), weights)
        x = _halve(x)
        weights = {name: None if each is None else _halve(each) for name, each in weights.items()}


def _halve(x: np.ndarray) -> np.ndarray:
    """Return the means of 2 x 2 x 2 voxels; the last voxel of an odd axis is repeated."""
    x = np.pad(x, [(0, side % 2) for side in x.shape], mode="edge")
    for axis in range(x.ndim):
        first, second = (np.take(x, range(start, x.shape[axis], 2), axis) for start in (0, 1))
        x = (first + second) / 2
    return x


def _mean(values: np.ndarray, weights: np.ndarray | None) -> float:
    if weights is None:
        return float(np.mean(values, dtype=np.float64))
    return float(np.sum(values * weights, dtype=np.float64) / np.sum(weights, dtype=np.float64))


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


def _factors(
    mean_x: np.ndarray, mean_y: np.ndarray, mean_squares: np.ndarray, mean_product: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return luminance, and contrast with structure, from the blurred x, y, x^2 + y^2 and x y."""
    c1, c2 = K1**2, K2**2
    product, squares = mean_x * mean_y, mean_x**2 + mean_y**2
    luminance = (2 * product + c1) / (squares + c1)
    structure = (2 * (mean_product - product) + c2) / (mean_squares - squares + c2)
    return luminance, structure
