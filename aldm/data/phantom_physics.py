"""MR signal equations and tissue parameters of the simulated subjects.

Times are in ms. The values are those of 1.5 T to 3 T reviews (Bojorquez et al. 2017, "What are normal relaxation times
of tissues at 3 T?"; Stanisz et al. 2005), rounded; docs/data.md has the table.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Tissue:
    """Proton density (CSF is 1) and relaxation times (ms) of one tissue; numbers, or arrays of one value a voxel."""

    proton_density: float | Array
    t1_ms: float | Array
    t2_ms: float | Array


TISSUES: dict[str, Tissue] = {
    "grey": Tissue(0.82, 1150.0, 95.0),
    "white": Tissue(0.70, 720.0, 75.0),
    "csf": Tissue(1.00, 4000.0, 1600.0),
    "necrosis": Tissue(0.95, 2500.0, 300.0),
    "edema": Tissue(0.88, 1500.0, 165.0),
    "enhancing": Tissue(0.85, 1350.0, 115.0),
}
CONTRAST_T1_FACTOR: dict[str, float] = {"enhancing": 0.28, "grey": 0.97, "white": 0.985}
"""What gadolinium leaves of a tissue's T1; tissues not named keep theirs (an intact blood-brain barrier, or no blood)."""


def spin_echo(tissue: Tissue, tr_ms: float, te_ms: float) -> float | Array:
    """Signal of a spin echo: PD (1 - exp(-TR / T1)) exp(-TE / T2)."""
    return tissue.proton_density * (1 - np.exp(-tr_ms / tissue.t1_ms)) * np.exp(-te_ms / tissue.t2_ms)


def inversion_recovery(tissue: Tissue, tr_ms: float, te_ms: float, ti_ms: float) -> float | Array:
    """Signal of an inversion-recovery spin echo, signed: PD (1 - 2 exp(-TI / T1) + exp(-TR / T1)) exp(-TE / T2)."""
    recovered = 1 - 2 * np.exp(-ti_ms / tissue.t1_ms) + np.exp(-tr_ms / tissue.t1_ms)
    return tissue.proton_density * recovered * np.exp(-te_ms / tissue.t2_ms)


@dataclass(frozen=True)
class Sequence:
    """Timing of one acquisition, ms; without an inversion time it is a plain spin echo."""

    tr_ms: float
    te_ms: float
    ti_ms: float | None = None

    def signal(self, tissue: Tissue) -> float | Array:
        """Signed signal of a tissue, in units of the proton density."""
        if self.ti_ms is None:
            return spin_echo(tissue, self.tr_ms, self.te_ms)
        return inversion_recovery(tissue, self.tr_ms, self.te_ms, self.ti_ms)


SEQUENCES: dict[str, Sequence] = {
    "t1": Sequence(tr_ms=2200, te_ms=4, ti_ms=900),
    "t1ce": Sequence(tr_ms=2200, te_ms=4, ti_ms=900),
    "t2": Sequence(tr_ms=4500, te_ms=95),
    "pd": Sequence(tr_ms=4500, te_ms=12),
    "flair": Sequence(tr_ms=9000, te_ms=115, ti_ms=2400),
}


def rician(signal: Array, sigma: float, generator: np.random.Generator) -> Array:
    """Magnitude of the signal after complex Gaussian noise of standard deviation `sigma` in both channels (float32)."""
    real = generator.standard_normal(signal.shape, dtype=np.float32)
    imaginary = generator.standard_normal(signal.shape, dtype=np.float32)
    real *= sigma
    real += signal
    imaginary *= sigma
    return np.hypot(real, imaginary)
