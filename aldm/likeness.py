"""How unlike a volume is to those that a model was trained on: a few numbers of it against their statistics.

The numbers (`features`) are of the volume as the model gets it: one box, X Y Z of an RAS+ volume in [-1, 1]. They come
in groups, and for each of these every kind of volume has a Gaussian of its training volumes: a modality is one kind, or
two where some of its training volumes are whole heads and some skull-stripped. The distance of a volume is the largest
of its Mahalanobis distances over the groups (Lee et al. 2018 have the features of a network there), each in units of a
limit that hardly any volume of the kind exceeds: 1 is at the limit, 5 far from all that the model has seen. Of a
modality's kinds the nearest counts. What modality a volume looks like is told by its contrast and texture alone: that
whose Gaussians make them the likeliest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np

from aldm.errors import UserError
from aldm.records import check_record

INSIDE = -0.8
"""What is brighter is foreground; air is -1."""
QUANTILES = (5, 25, 50, 75, 95)
NUM_SHELLS = 4
_PAIRS = ((0, 1), (0, 2), (1, 2))
_TRIPLES = ((0, 0, 1), (1, 2, 2), (0, 0, 2), (1, 1, 2))
"""Third moments that change their sign with the direction of y or z, beside the skewnesses."""
_BANDS = ("x", "y", "xy", "z", "xz", "yz", "xyz")
"""Of a 3D Haar transform, by the axes along which they are differences."""
_MIXED = tuple("".join("xyz"[axis] for axis in triple) for triple in _TRIPLES)
GROUPS: Mapping[str, tuple[str, ...]] = {
    "shape": (
        "share of the box",
        *(f"{what} {axis}" for what in ("centre", "spread") for axis in "xyz"),
        *("tilt xy", "tilt xz", "tilt yz"),
        *(f"moment {axes}" for axes in ("xxx", "yyy", "zzz", *_MIXED)),
    ),
    "brightness": tuple(
        f"bright moment {axes}" for axes in ("x", "y", "z", "xx", "yy", "zz", "yz", "xxx", "yyy", "zzz", *_MIXED)
    ),
    "contrast": (
        *(f"mean of shell {shell}" for shell in range(NUM_SHELLS)),
        *(f"quantile {percent} %" for percent in QUANTILES),
    ),
    "texture": tuple(f"level {level} band {band}" for level in (1, 2) for band in _BANDS),
}
"""What `features` returns, in its order, all of the foreground: its form (centre and spread in sides of the box, the
moments in its own spread), where it is bright (moments weighted with the intensity), its intensities, first from the
middle outwards, and log10 of the mean square of each band of two Haar transforms."""
NUM_FEATURES = sum(map(len, GROUPS.values()))
_ENDS = np.cumsum([len(names) for names in GROUPS.values()])
_SLICES = tuple(slice(end - len(names), end) for end, names in zip(_ENDS.tolist(), GROUPS.values(), strict=True))
MOST_VOXELS = 2**19
"""Of a larger volume every second voxel along each axis counts, or every third, but for its bands."""
LIMIT = 1.0
MIN_VOLUMES = 10
"""Fewer training volumes than that have no statistics."""
FOLDS = 5
DEVIATIONS = 3.0
"""The limit lies so many standard deviations above the mean of the held-out volumes' log distances: 1 in 700 of them
lies beyond, were they normal."""
MIN_SHRINKAGE, MIN_STD = 0.05, 0.01
"""No direction counts as having no variance."""
TELLING = ("contrast", "texture")
"""Groups that tell the modalities apart."""
_SMALL = 1e-6
NOT_MEASURED = "not measured"
WAY_OUT = "export it again"
Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Likeness:
    """How unlike a volume is to the training volumes of the modality that it is said to be."""

    distance: float
    """In units of the limit: 1 is as unlike as is taken without a word."""
    source: str
    """The modality that it is said to be."""
    differs_in: str
    """The group of features with that distance: shape, brightness (where it is bright), contrast or texture."""
    looks_like: str
    """The modality of the model in whose training volumes its contrast and texture are the likeliest."""

    @property
    def is_unlike(self) -> bool:
        """Whether it lies beyond the limit."""
        return self.distance > LIMIT

    def words(self) -> str:
        """Return what is wrong with a volume that is unlike those of its modality, and the way out."""
        other = "" if self.looks_like == self.source else f"; it looks more like {self.looks_like}"
        return (
            f"it is unlike the {self.source} volumes that the model was trained on: likeness {self.distance:.3g}, most "
            f"of all in {self.differs_in}, wanted at most {LIMIT:g}{other}. Check modality, body part, orientation and "
            "artefacts, or say `accept_unlike` where it is as it should be"
        )


# ------------------------------------------------------------------------------------------------------------ features


def features(x: np.ndarray) -> tuple[float, ...]:
    """Return the numbers that GROUPS names, all finite, whatever the volume.

    Args:
        x: (X, Y, Z), at least 4 along each axis, in [-1, 1]; sides are cut to multiples of 4.
    """
    x = x[tuple(slice(side // 4 * 4) for side in x.shape)].astype(np.float32)
    inside = x > INSIDE
    share = float(inside.mean())
    if share < _SMALL:
        inside[:] = True
    step = max(1, round((x.size / MOST_VOXELS) ** (1 / 3)))
    seen = (slice(None, None, step),) * 3
    values = x[seen][inside[seen]].astype(np.float64)
    places = (step * np.argwhere(inside[seen]) + 0.5) / x.shape - 0.5
    centre, spread = places.mean(axis=0), places.std(axis=0) + _SMALL
    z = (places - centre) / spread
    even = np.full(len(z), 1 / len(z))
    bright = values + 1 + _SMALL
    bright /= bright.sum()
    found = [share, *centre, *spread, *(even @ _products(z, _PAIRS)), *_third_moments(z, even)]
    found += [*(bright @ z), *(bright @ z**2), float(bright @ (z[:, 1] * z[:, 2])), *_third_moments(z, bright)]
    found += [*_shells(z, values), *np.percentile(values, QUANTILES), *_energies(x, inside)]
    return tuple(float(f"{value:.6g}") for value in found)


def _products(z: np.ndarray, axes: Sequence[tuple[int, ...]]) -> np.ndarray:
    return np.stack([np.prod(z[:, list(each)], axis=1) for each in axes], axis=1)


def _third_moments(z: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.asarray(weights @ _products(z, ((0, 0, 0), (1, 1, 1), (2, 2, 2), *_TRIPLES)))


def _shells(z: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean intensities (NUM_SHELLS,) from the middle outwards, of as many voxels each in an ellipsoid."""
    radii = np.sqrt(5) * (np.arange(1, NUM_SHELLS) / NUM_SHELLS) ** (1 / 3)  # in its spreads
    shell = np.searchsorted(radii, np.sqrt(np.square(z).sum(axis=1)))
    counts = np.bincount(shell, minlength=NUM_SHELLS)
    return np.asarray(np.bincount(shell, values, minlength=NUM_SHELLS) / np.maximum(counts, 1))


def _energies(x: np.ndarray, inside: np.ndarray) -> list[float]:
    """Return log10 of the mean square of the bands of two Haar transforms, over blocks that lie in the foreground."""
    found = []
    for _ in range(2):
        x, *bands = _haar(x)
        blocks = inside.reshape([n for side in inside.shape for n in (side // 2, 2)])
        inside = np.asarray(blocks.all(axis=(1, 3, 5)))
        used = inside if inside.any() else np.ones_like(inside)
        found += [float(np.log10(np.square(band[used]).mean() + _SMALL)) for band in bands]
        x = x * np.float32(8**-0.5)  # a mean
    return found


def _haar(x: np.ndarray) -> list[np.ndarray]:
    """Return the eight bands of an orthonormal 3D Haar transform, the low-pass first, then in the order of _BANDS."""
    bands = [x]
    for axis in range(3):
        pairs = [np.moveaxis(band, axis, 0) for band in bands]
        lows = [np.moveaxis(pair[0::2] + pair[1::2], 0, axis) for pair in pairs]
        highs = [np.moveaxis(pair[0::2] - pair[1::2], 0, axis) for pair in pairs]
        bands = [band * np.float32(0.5**0.5) for band in lows + highs]
    return bands


# ---------------------------------------------------------------------------------------------------------- statistics


def kind_of(modality: str, region: str = "") -> str:
    """Return the name of a kind of volumes.

    Args:
        modality: of the volumes.
        region: brain or foreground, where the training volumes of the modality are of both.
    """
    return f"{modality} {region}".strip()


def modality_of(kind: str) -> str:
    """Return the modality of a kind."""
    return kind.split()[0]


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a model keeps of its training volumes: 112 numbers a kind (`kind_of`), and 354 that all share."""

    means: Mapping[str, np.ndarray]
    """Kind -> (NUM_FEATURES,)."""
    stds: Mapping[str, np.ndarray]
    """Kind -> (NUM_FEATURES,), positive."""
    limits: Mapping[str, np.ndarray]
    """Kind -> (groups,): the Mahalanobis distances that count as 1."""
    correlations: Sequence[np.ndarray]
    """Of each group (f, f): of the standardised features, shrunken, so that it has an inverse."""

    def distances(self, kind: str, rows: np.ndarray) -> np.ndarray:
        """Return the distances (N, groups) of rows (N, NUM_FEATURES) from a kind of volumes, in units of its limits."""
        return np.sqrt(self._mean_squares(kind, rows)) / self.limits[kind]

    def log_likelihood(self, kind: str, row: Sequence[float]) -> float:
        """Return that of a row's TELLING features under the kind's Gaussians, less what all kinds share."""
        squares = self._mean_squares(kind, np.array([row]))[0]
        parts = [
            -0.5 * square * len(names) - np.log(self.stds[kind][each]).sum()
            for square, (group, names), each in zip(squares, GROUPS.items(), _SLICES, strict=True)
            if group in TELLING
        ]
        return float(sum(parts))

    def _mean_squares(self, kind: str, rows: np.ndarray) -> np.ndarray:
        """Return the mean squares of the whitened features of rows (N, NUM_FEATURES) by group, (N, groups)."""
        z = (rows - self.means[kind]) / self.stds[kind]
        found = []
        for each, correlation in zip(_SLICES, self.correlations, strict=True):
            whitened = np.linalg.solve(np.linalg.cholesky(correlation), z[:, each].T)
            found.append(np.square(whitened).mean(axis=0))
        return np.stack(found, axis=1)

    def measure(self, row: Sequence[float], source: str) -> Likeness | None:
        """Return how unlike a volume is.

        Args:
            row: its `features`.
            source: the modality that it is said to be; None is returned where that has no statistics.
        """
        if len(row) != NUM_FEATURES:
            return None
        own = [kind for kind in self.means if modality_of(kind) == source]
        if not own:
            return None
        distances = {kind: self.distances(kind, np.array([row]))[0] for kind in self.means}
        nearest = min((distances[kind] for kind in own), key=lambda one: float(one.max()))

        def looks_like(kind: str) -> tuple[float, float]:
            return self.log_likelihood(kind, row), -float(distances[kind].max())  # of two as likely the nearer one

        group = int(nearest.argmax())
        return Likeness(
            distance=float(f"{nearest[group]:.4g}"),
            source=source,
            differs_in=list(GROUPS)[group],
            looks_like=modality_of(max(self.means, key=looks_like)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON takes: of a correlation the rows below its diagonal, one after another."""
        return {
            "modalities": {
                name: {
                    "mean": _plain(self.means[name]),
                    "std": _plain(self.stds[name]),
                    "limits": _plain(self.limits[name]),
                }
                for name in self.means
            },
            "correlations": [_plain(one[np.tril_indices(len(one), -1)]) for one in self.correlations],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], file: str | PathLike[str]) -> "Statistics | None":
        """Undo to_dict; None for features of another version of this program.

        Args:
            values: what `to_dict` returned.
            file: where they were read, for the message.

        Raises:
            UserError: they are damaged.
        """
        check_record(values, {"modalities": dict, "correlations": list}, file, WAY_OUT)
        kinds = {f"{name}.{key}": list for name in values["modalities"] for key in ("mean", "std", "limits")}
        check_record(values["modalities"], kinds, file, WAY_OUT)
        try:
            means, stds, limits = (
                {name: np.array(one[key], np.float64) for name, one in values["modalities"].items()}
                for key in ("mean", "std", "limits")
            )
            correlations = [_symmetric(np.array(one, np.float64)) for one in values["correlations"]]
            if [len(one) for one in correlations] != [len(names) for names in GROUPS.values()]:
                return None
            found = cls(means, stds, limits, correlations)
            for name in means:  # shapes that do not fit, a matrix that is no correlation
                found.distances(name, np.zeros((1, NUM_FEATURES)))
        except (ValueError, TypeError, np.linalg.LinAlgError) as error:
            raise UserError(f"{file} is damaged: data.likeness cannot be used ({error}); {WAY_OUT}") from error
        return found


def fit_statistics(train: Mapping[str, Rows], held_out: Mapping[str, Rows]) -> Statistics | None:
    """Return the statistics of training volumes; None where no kind has MIN_VOLUMES of them.

    The limits come from volumes that the Gaussians were not made of: those held out, and each fifth of the training
    volumes measured with Gaussians of the other four.

    Args:
        train: kind -> `features` of its training volumes; rows of another length are left out.
        held_out: the same of validation volumes; there may be none.
    """
    known = {name: _table(rows) for name, rows in train.items()}
    known = {name: rows for name, rows in known.items() if len(rows) >= MIN_VOLUMES}
    if not known:
        return None
    whole = _gaussians(known)
    found = {name: [whole.distances(name, _table(held_out.get(name, ())))] for name in known}
    for fold in range(FOLDS):
        rest = _gaussians({name: np.delete(rows, np.s_[fold::FOLDS], axis=0) for name, rows in known.items()})
        for name, rows in known.items():
            found[name].append(rest.distances(name, rows[fold::FOLDS]))
    for name, distances in found.items():
        logs = np.log(np.concatenate(distances) + _SMALL)
        whole.limits[name][:] = np.exp(logs.mean(axis=0) + DEVIATIONS * logs.std(axis=0))
    return whole


def _gaussians(known: Mapping[str, np.ndarray]) -> Statistics:
    """Return the statistics of rows (N, NUM_FEATURES) by kind, with limits of 1."""
    means = {name: rows.mean(axis=0) for name, rows in known.items()}
    stds = {name: np.maximum(rows.std(axis=0), MIN_STD) for name, rows in known.items()}
    z = np.concatenate([(rows - means[name]) / stds[name] for name, rows in known.items()])
    limits = {name: np.ones(len(GROUPS)) for name in known}
    return Statistics(means, stds, limits, [shrunken_correlation(z[:, each]) for each in _SLICES])


def shrunken_correlation(z: np.ndarray) -> np.ndarray:
    """Return the correlation of standardised rows (N, F), shrunken towards none by the share of it that is chance.

    The share is that of Schaefer and Strimmer (2005, Statistical Applications in Genetics and Molecular Biology 4, 32;
    Ledoit and Wolf's for correlations), at least MIN_SHRINKAGE.
    """
    products = z[:, :, None] * z[:, None, :]
    correlation, variance = products.mean(axis=0), products.var(axis=0) / (len(z) - 1)
    off = ~np.eye(z.shape[1], dtype=bool)
    chance = variance[off].sum() / max(np.square(correlation[off]).sum(), _SMALL)
    shrunken = (1 - np.clip(chance, MIN_SHRINKAGE, 1)) * correlation
    np.fill_diagonal(shrunken, 1)
    return np.asarray(shrunken)


def _table(rows: Rows) -> np.ndarray:
    return np.array([row for row in rows if len(row) == NUM_FEATURES], np.float64).reshape(-1, NUM_FEATURES)


def _plain(values: np.ndarray) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def _symmetric(below: np.ndarray) -> np.ndarray:
    side = round((1 + (1 + 8 * len(below)) ** 0.5) / 2)
    lower = np.zeros((side, side))
    lower[np.tril_indices(side, -1)] = below
    return lower + lower.T + np.eye(side)
