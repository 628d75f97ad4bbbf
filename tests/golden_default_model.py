"""What the model that ships makes of a fixed simulated head: `python tests/golden_default_model.py` writes it again.

Run it after `make default-model`, or when the way in is changed on purpose: any other change of these numbers is a
fault.
"""

import json
from pathlib import Path

import numpy as np

from aldm.data.phantom_heads import simulate_head
from aldm.data.volume import Volume, to_ras
from aldm.default_model import default_model
from aldm.translate import Translator

FILE = Path(__file__).parent / "data" / "default_model_golden.json"
SEED, SPACING_MM, BLOCK = 2024, 4.0, 8
"""The model was trained on heads of another seed."""
SKULL_STRIPPED = 1
"""One box holds it."""


def subject(index: int = 0, seed: int = SEED) -> dict[str, Volume]:
    """Return a simulated head: every modality on a grid of its own."""
    volumes = simulate_head(seed, index, SPACING_MM)
    return {name: to_ras(one.data, one.affine) for name, one in volumes.items() if name != "seg"}


def block_means(data: np.ndarray) -> np.ndarray:
    """Return the means over blocks of 8 x 8 x 8 voxels; what is left at the ends is dropped."""
    x, y, z = (n // BLOCK for n in data.shape)
    cut = data[: x * BLOCK, : y * BLOCK, : z * BLOCK]
    return np.asarray(cut.reshape(x, BLOCK, y, BLOCK, z, BLOCK).mean(axis=(1, 3, 5)))


def answers() -> dict[str, list[list[list[float]]]]:
    """Return the block means of the T2 and FLAIR of a skull-stripped T1, in [0, 1], computed in fp32."""
    translator = Translator.load(default_model(), precision="fp32")
    volume = subject(SKULL_STRIPPED)["t1"]
    results = translator.translate_each(volume, "t1", ("t2", "flair"), intensity="unit")
    return {one.provenance["target"]: np.round(block_means(one.volume.data), 5).tolist() for one in results}


if __name__ == "__main__":
    FILE.write_text(json.dumps(answers()) + "\n")
    print(f"{FILE}: {FILE.stat().st_size} bytes")
