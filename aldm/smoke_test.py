"""One translation of a small simulated volume: whether a translator folder works at all, before anybody is served."""

from pathlib import Path

import numpy as np

from aldm.data.phantom import MODALITIES_OF_LAYOUT, simulate_subject
from aldm.data.volume import to_ras
from aldm.errors import UserError
from aldm.translate import Translator

SPACING_MM = 16.0
"""Of the simulated volume: about 11 x 14 x 11 voxels."""
AFFINE_TOLERANCE = 1e-4


def smoke_test(folder: Path, *, device: str = "cpu", max_memory_gb: float | None = None) -> str:
    """Translate a simulated volume as the model's configuration says; return a sentence on what came out.

    Args:
        folder: written by `aldm export`.
        device: cpu or cuda.
        max_memory_gb: the most memory that this process may hold, GB (10^9 bytes), on a CPU.

    Raises:
        UserError: the model does not load, or its result is not finite, is one value, or lies on another grid.
    """
    translator = Translator.load(folder, device, max_memory_gb=max_memory_gb)
    config = translator.config
    names = config.pair or config.modalities
    source, layout = next(
        ((name, layout) for layout, known in MODALITIES_OF_LAYOUT.items() for name in names[:1] if name in known),
        (None, ""),
    )
    if source is None:
        raise UserError(f"{folder} translates from {names[0]}, which no simulated subject has: it cannot be tried out")
    simulated = simulate_subject(0, 0, layout, SPACING_MM)[source]
    volume = to_ras(simulated.data, simulated.affine)
    target = names[-1]
    made = translator.translate(volume, source, target).volume
    problems = []
    if made.data.shape != volume.data.shape or np.abs(made.affine - volume.affine).max() > AFFINE_TOLERANCE:
        problems.append(f"is not on the grid of the input ({made.data.shape}, wanted {volume.data.shape})")
    elif not np.isfinite(made.data).all():
        problems.append(f"has {np.count_nonzero(~np.isfinite(made.data))} voxels that are no numbers")
    elif made.data.min() == made.data.max():
        problems.append(f"is {made.data.min():g} everywhere")
    if problems:
        raise UserError(f"{folder} does not work: its translation of a simulated {source} to {target} {problems[0]}")
    return f"{source} to {target} of a simulated volume: {' x '.join(map(str, made.data.shape))} voxels, finite"
