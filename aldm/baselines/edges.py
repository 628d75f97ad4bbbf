"""Edge maps of Ea-GAN (Yu et al. 2019). Volumes are B 1 X Y Z, RAS+, in [-1, 1] with a background of -1."""

import torch
import torch.nn.functional as F
from torch import Tensor

from aldm.baselines.networks import BACKGROUND, full_precision


def _neighbours(x: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the voxels before, at and behind each inner voxel along an axis."""
    inner = x.shape[axis] - 2
    return x.narrow(axis, 0, inner), x.narrow(axis, 1, inner), x.narrow(axis, 2, inner)


def sobel_edges(x: Tensor) -> Tensor:
    """Return 2 tanh(|gradient|) - 1, from -1 to 1: -1 where the volume is flat, 2 tanh(4 d) - 1 at a step of height d.

    The gradient is that of the 3^3 Sobel filters divided by 4: differences of voxels two apart along one axis, smoothed
    with (1, 2, 1) along the other two. Beyond the borders there is background.

    Args:
        x: (B, 1, X, Y, Z); the result has its shape, at least fp32, and carries its graph.
    """
    padded = F.pad(full_precision(x), (1,) * 6, value=BACKGROUND)
    gradient = []
    for axis in (2, 3, 4):
        before, _, behind = _neighbours(padded, axis)
        response = behind - before  # first, so that it is exactly 0 where all voxels are the same
        for other in {2, 3, 4} - {axis}:
            before, at, behind = _neighbours(response, other)
            response = before + 2 * at + behind
        gradient.append(response / 4)
    # unlike the root of a sum of squares, this norm has a finite gradient (0) where its argument is 0
    return 2 * torch.tanh(torch.linalg.vector_norm(torch.stack(gradient), dim=0)) - 1
