"""What a volume would cost once it lies on the model's grid: a few bytes may claim a body in steps of a head's size."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aldm.errors import UserError
from serve.files import source_file
from serve.problems import Problem

if TYPE_CHECKING:
    from aldm.config import PreprocessConfig

MAX_FIELD_MM = 600.0
"""No scanner's field of view is longer."""


def check_grid(folder: Path, config: "PreprocessConfig", max_voxels: int) -> None:
    """Refuse an accepted volume, by its header, whose grid would be too large.

    Args:
        folder: of its job.
        config: of the model.
        max_voxels: limit on the grid.

    Raises:
        Problem: 422, its field of view is longer than any, or its grid has more voxels.
    """
    from aldm.data.preprocess import model_grid
    from aldm.data.volume import Volume, read_source

    source = read_source(source_file(folder))
    spacing = np.linalg.norm(source.affine[:3, :3], axis=0)
    sides = spacing * source.shape
    if sides.max() > MAX_FIELD_MM:
        field, step = (" x ".join(f"{side:.4g}" for side in each) for each in (sides, spacing))
        raise Problem(
            422,
            f"volume: a field of view of {field} mm, wanted at most {MAX_FIELD_MM:g} mm along each axis: are its "
            f"voxels really {step} mm?",
        )
    try:
        model_grid([Volume(np.broadcast_to(np.float32(0), source.shape), source.affine)], config, max_voxels=max_voxels)
    except UserError as error:
        raise Problem(422, f"volume: {error}") from error
