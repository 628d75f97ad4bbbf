"""What turns a learned size of error into an interval that holds the truth with a known probability.

Split conformal prediction (Papadopoulos et al. 2002; Lei et al. 2018): the size is multiplied by the quantile, over the
voxels of subjects that no training saw, of error by size; where their lesions would be held too seldom, by more. Of
subjects unlike those it promises nothing.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from statistics import NormalDist
from typing import Any

import numpy as np

from aldm.errors import UserError
from aldm.records import check_record

LEVEL = 0.9
"""Share of the voxels whose error the interval holds."""
LESION_LEVEL = 0.8
"""The least share that it is to hold of a lesion's voxels, where the errors are largest and matter most."""
STANDARD_DEVIATIONS = NormalDist().inv_cdf((1 + LEVEL) / 2)
"""Half the width of the interval that holds LEVEL of a normal distribution, in its standard deviations."""
BINS = np.linspace(-10, 10, 20_001)
"""Edges for the logarithm of error by size: a quantile is right to a thousandth of itself."""
WAY_OUT = "export the model again, with `uncertainty`"


@dataclass(frozen=True)
class Calibration:
    """The factors of a model's intervals."""

    factors: dict[str, tuple[float, ...]]
    """Target modality -> what its learned sizes are multiplied by, above 0: from one source, from two, and so on."""
    num_subjects: int
    """Subjects that they were fitted on."""
    level: float = LEVEL
    """Share of those subjects' voxels whose error is within the interval, at least."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values (JSON-able)."""
        return asdict(self)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], modalities: tuple[str, ...], file: str | PathLike[str]
    ) -> "Calibration":
        """Undo to_dict.

        Args:
            values: what it returned.
            modalities: of the model; targets that were not fitted have no interval.
            file: where they were read, for the message.

        Raises:
            UserError: they are damaged.
        """
        check_record(values, {"factors": dict, "num_subjects": int, "level": float}, file, WAY_OUT)
        factors = values["factors"]
        good = all(name in modalities and _above_0(own) for name, own in factors.items())
        if not good or not 0 < values["level"] < 1:
            raise UserError(f"{file} is damaged: the meta's uncertainty cannot be used ({values!r:.120}); {WAY_OUT}")
        return cls({name: tuple(own) for name, own in factors.items()}, values["num_subjects"], values["level"])

    def factor(self, target: str, num_sources: int) -> float:
        """Return the factor of a translation; from more sources than were fitted it is that of the most."""
        own = self.factors[target]
        return own[min(num_sources, len(own)) - 1]


def _above_0(values: Any) -> bool:
    """Whether these are factors: one at least, each finite and above 0."""
    numbers = isinstance(values, list) and all(isinstance(value, float) and 0 < value < np.inf for value in values)
    return numbers and bool(values)


class RatioCounts:
    """Counts error by size, voxel by voxel, in bins of equal width of its logarithm."""

    def __init__(self) -> None:
        self.counts = np.zeros(len(BINS) - 1, np.int64)

    def add(self, error: np.ndarray, size: np.ndarray) -> None:
        """Count voxels: their absolute errors, at least 0, and the sizes that were said, above 0."""
        with np.errstate(divide="ignore"):  # no error at all: the lowest bin
            ratios = np.log(np.abs(error)) - np.log(size)
        self.counts += np.histogram(np.clip(ratios, BINS[0], BINS[-1]), BINS)[0]

    def factor(self, lesion: "RatioCounts") -> float:
        """Return the least factor that holds LEVEL of the voxels, and LESION_LEVEL of those counted in `lesion`."""
        own = self.quantile(LEVEL)
        return max(own, lesion.quantile(LESION_LEVEL)) if lesion.counts.any() else own

    def quantile(self, level: float) -> float:
        """Return the least factor, to a thousandth of itself, with which `level` of the voxels are within the size."""
        below = np.cumsum(self.counts)
        return float(np.exp(BINS[1:][np.searchsorted(below, level * below[-1])]))
