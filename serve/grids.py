"""What a volume would cost once it lies on the model's grid: a few bytes may claim a body in steps of a head's size."""

from collections.abc import Sequence
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


def check_grid(folders: Sequence[Path], fields: Sequence[str], config: "PreprocessConfig", max_voxels: int) -> None:
    """Refuse accepted volumes, by their headers, whose grid would be too large.

    Args:
        folders: of the volumes; the grid covers the first one's field of view, and all are brought to it.
        fields: of the form, in which they came.
        config: of the model.
        max_voxels: limit on what all of them take on the grid.

    Raises:
        Problem: 422, a field of view is longer than any, they do not lie on each other, or would take more voxels.
    """
    from aldm.data.overlap import check_one_place
    from aldm.data.preprocess import model_grid
    from aldm.data.volume import Volume, read_source

    sources = [read_source(source_file(folder)) for folder in folders]
    for name, source in zip(fields, sources, strict=True):
        spacing = np.linalg.norm(source.affine[:3, :3], axis=0)
        sides = spacing * source.shape
        if sides.max() > MAX_FIELD_MM:
            field, step = (" x ".join(f"{side:.4g}" for side in each) for each in (sides, spacing))
            raise Problem(
                422,
                f"{name}: a field of view of {field} mm, wanted at most {MAX_FIELD_MM:g} mm along each axis: are its "
                f"voxels really {step} mm?",
            )
    empty = [Volume(np.broadcast_to(np.float32(0), source.shape), source.affine) for source in sources]
    count = len(empty)
    try:
        check_one_place(dict(zip(fields, empty, strict=True)))
    except UserError as error:
        raise Problem(422, str(error)) from error
    try:
        model_grid(empty, config, max_voxels=max_voxels // count)
    except UserError as error:
        words = f"; {count} volumes share the service's {max_voxels:,}" if count > 1 else ""
        raise Problem(422, f"{fields[0]}: {error}{words}") from error
