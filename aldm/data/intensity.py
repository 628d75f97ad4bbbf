"""Intensities of a volume, scaled to what the models take and back.

`tissue`: air becomes -1 (of a skull-stripped volume, which has none, the 0.1st percentile of the brain) and the 95th
percentile of the patient's own voxels 0. So half of the range is left for what is brighter still, such as a lesion or a
vessel; healthy tissue has the same intensities whether there is one or not, and however much air is in view.
`foreground`: the 99.9th percentile of those voxels becomes 0.6; models made before `tissue` have it. `paper`: the 0.5
and 99.5 percentiles of the model's box become -1 and 1, as the supplement and the authors' code have it. What lies
outside is clipped by every rule.
"""

import numpy as np

from aldm.errors import UserError

PERCENTILES = {"tissue": (0.1, 95.0), "foreground": (0.1, 99.9), "paper": (0.5, 99.5)}
"""Rule -> lower and upper percentile."""
HEADROOM = {"tissue": 2.0, "foreground": 1.25, "paper": 1.0}
"""Rule -> the distance from the lower percentile to what becomes +1, in distances between the two percentiles."""
MAX_CLIPPED = 0.01
"""Clipped share of a region from which it is warned."""


def intensity_range(values: np.ndarray, rule: str, air: float | None = None) -> tuple[float, float]:
    """Return the intensities that become -1 and +1.

    Args:
        values: by the rule paper those of the model's box, else those inside the mask; any shape.
        rule: tissue, foreground or paper.
        air: what becomes -1 where it is known, instead of the lower percentile.

    Raises:
        UserError: there is no contrast to rescale.
    """
    lower, upper = PERCENTILES[rule]
    low, high = (float(value) for value in np.percentile(values, (lower, upper)))
    low = low if air is None else air
    if not low < high:
        where = "model's box" if rule == "paper" else "foreground"
        raise UserError(
            f"the {lower:g} and {upper:g} percentiles of the {where} are both {low:g}: almost every voxel has "
            "this value, so there is no contrast to rescale"
        )
    return low, low + HEADROOM[rule] * (high - low)


def rescale(data: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map [low, high] to [-1, 1], clipped, as float32."""
    scaled = (data.astype(np.float32, copy=False) - np.float32(low)) * np.float32(2 / (high - low)) - np.float32(1)
    return np.clip(scaled, -1, 1, out=scaled)


def unscale(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map [-1, 1] to [low, high], as float32 (undoes rescale, but for what was clipped)."""
    return (x.astype(np.float32, copy=False) + np.float32(1)) * np.float32((high - low) / 2) + np.float32(low)


def clipped_share(values: np.ndarray, low: float, high: float) -> float:
    """Return the share, 0 to 1, of values that `rescale` clips; 0 of none."""
    return float(np.mean((values < low) | (values > high))) if values.size else 0.0
