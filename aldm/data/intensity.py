"""Intensities of a volume, scaled to what the models take and back."""

import numpy as np

from aldm.config import PreprocessConfig
from aldm.errors import UserError


def percentiles(data: np.ndarray, config: PreprocessConfig) -> tuple[float, float]:
    """Return the intensities at the lower and the upper percentile of all voxels.

    Raises:
        UserError: they are equal, so there is no contrast to rescale.
    """
    low, high = np.percentile(data, (config.lower_percentile, config.upper_percentile), overwrite_input=False)
    if not low < high:
        raise UserError(
            f"the {config.lower_percentile} and {config.upper_percentile} percentiles of the volume are both {low:g}: "
            "almost every voxel has this value, so there is no contrast to rescale"
        )
    return float(low), float(high)


def rescale(data: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map [low, high] to [-1, 1], clipped, as float32."""
    scaled = (data.astype(np.float32, copy=False) - np.float32(low)) * np.float32(2 / (high - low)) - np.float32(1)
    return np.clip(scaled, -1, 1, out=scaled)


def unscale(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map [-1, 1] to [low, high], as float32 (undoes rescale, but for what was clipped)."""
    return (x.astype(np.float32, copy=False) + np.float32(1)) * np.float32((high - low) / 2) + np.float32(low)
