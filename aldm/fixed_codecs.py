"""Codecs in closed form beside the trained ones: what a fixed transform keeps of a volume in a number of scalars.

* Truncated Haar: of the bands of one or two orthonormal 3D Haar transforms the low-pass alone, or with the three first
  differences (those along one axis). The other bands become 0.
* Linear: of all linear maps of a block of voxels to k scalars and back, the one with the least squared error over the
  training split, which is that of its first k principal components (Karhunen-Loeve transform). A trained codec of as
  many scalars that is no better has learnt nothing that is not linear.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from aldm.config import CodecConfig
from aldm.data.store import VolumeStore
from aldm.models.codecs import build_codec
from aldm.progress import progress

LARGEST_BLOCK = 8
"""Voxels along each side of the blocks of the linear codec."""
LINEAR_RATIOS = (4, 8, 16, 64)
"""Voxels per scalar of the linear codecs."""
LOW_PASS, DIFFERENCES = (0,), (0, 1, 2, 4)
"""Channels of the last Haar transform of the low-pass; see HaarTransform for their order."""


@dataclass(frozen=True, eq=False)
class FixedCodec:
    """A codec with nothing to train."""

    scalars_per_voxel: float
    reconstruct: Callable[[np.ndarray], np.ndarray]
    """Volume (X, Y, Z) in [-1, 1] to what the codec makes of it, of the same shape."""


@dataclass(frozen=True, eq=False)
class LinearCodec:
    """Principal components of the blocks of a split.

    Attributes:
        side: voxels along each side of a block.
        mean: of the blocks, (side^3,).
        variances: of the components, (side^3,), the largest first.
        components: orthonormal columns, (side^3, side^3), in the order of the variances.
    """

    side: int
    mean: np.ndarray
    variances: np.ndarray
    components: np.ndarray

    def reconstruct(self, x: np.ndarray, kept: int) -> np.ndarray:
        """Return the volume (X, Y, Z) from the first `kept` components of each of its blocks."""
        own = self.components[:, :kept]
        return from_blocks((blocks_of(x, self.side) - self.mean) @ own @ own.T + self.mean, x.shape)


def fixed_codecs(store: VolumeStore) -> dict[str, FixedCodec]:
    """Return the codecs in closed form by name; the linear ones are fitted in one pass over the training split.

    Args:
        store: of volumes with even sides; those that need sides of 4 voxels are left out where they are not.

    Raises:
        UserError: the shard of a training subject cannot be read.
    """
    shape = store.preprocess.spatial_shape
    found = {"haar": FixedCodec(1.0, partial(truncated_haar, levels=1, kept=tuple(range(8))))}
    for levels in (1, 2) if all(side % 4 == 0 for side in shape) else (1,):
        for name, kept in (("low-pass and differences", DIFFERENCES), ("low-pass", LOW_PASS)):
            codec = FixedCodec(len(kept) / 8**levels, partial(truncated_haar, levels=levels, kept=kept))
            found[f"haar, level {levels}, {name}"] = codec
    side = math.gcd(LARGEST_BLOCK, *shape)
    linear = fit_linear(store, side)
    for ratio in LINEAR_RATIOS:
        if side**3 % ratio == 0:
            found[f"linear {ratio}:1"] = FixedCodec(1 / ratio, partial(linear.reconstruct, kept=side**3 // ratio))
    return found


def truncated_haar(x: np.ndarray, levels: int, kept: tuple[int, ...]) -> np.ndarray:
    """Return a volume from some of its Haar bands.

    Args:
        x: (X, Y, Z), float32; 2^levels divides its sides.
        levels: how often the low-pass is transformed.
        kept: channels of the last transform that are not set to 0.
    """
    codec = build_codec(CodecConfig(kind="haar", haar_levels=levels))
    z = codec.encode(torch.from_numpy(x)[None, None])
    z_kept = torch.zeros_like(z)
    z_kept[:, list(kept)] = z[:, list(kept)]
    return codec.decode(z_kept)[0, 0].numpy()


def fit_linear(store: VolumeStore, side: int) -> LinearCodec:
    """Return the principal components of all blocks of the training split, side^3 voxels each.

    Raises:
        UserError: the shard of a training subject cannot be read.
    """
    count, total, squares = 0, np.zeros(side**3), np.zeros((side**3, side**3))
    for record in progress(store.subjects("train"), description="linear codec", unit="subject"):
        for modality in record.modalities:
            blocks = blocks_of(store.volume(record.subject_id, modality), side)
            count, total, squares = count + len(blocks), total + blocks.sum(axis=0), squares + blocks.T @ blocks
    mean = total / count
    variances, components = np.linalg.eigh(squares / count - np.outer(mean, mean))
    return LinearCodec(side, mean, variances[::-1], components[:, ::-1])


def blocks_of(x: np.ndarray, side: int) -> np.ndarray:
    """Return the blocks of a volume (X, Y, Z) as rows, (X Y Z / side^3, side^3), float64."""
    parts = x.astype(np.float64).reshape([n for length in x.shape for n in (length // side, side)])
    return parts.transpose(0, 2, 4, 1, 3, 5).reshape(-1, side**3)


def from_blocks(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Undo `blocks_of`; float32."""
    side = round(rows.shape[1] ** (1 / 3))
    parts = rows.reshape(*(length // side for length in shape), side, side, side)
    return parts.transpose(0, 3, 1, 4, 2, 5).reshape(shape).astype(np.float32)
