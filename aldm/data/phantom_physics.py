"""The signal of the simulated subjects: tissue parameters, pulse sequences, coil and noise. Times are in ms."""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray


@dataclass(frozen=True)
class Tissue:
    """Proton density (csf is 1) and relaxation times of a tissue; numbers, or arrays with one value a voxel."""

    proton_density: float | Array
    t1_ms: float | Array
    t2_ms: float | Array


TISSUES: dict[str, Tissue] = {
    "grey": Tissue(0.82, 1150.0, 95.0),
    "white": Tissue(0.69, 720.0, 75.0),
    "csf": Tissue(1.00, 4000.0, 1600.0),
    "necrosis": Tissue(0.95, 2500.0, 300.0),
    "edema": Tissue(0.88, 1550.0, 180.0),
    "enhancing": Tissue(0.85, 1350.0, 115.0),
}
"""Rounded from reviews of healthy brain at 1.5 T and 3 T (Stanisz et al. 2005; Bojorquez et al. 2017); lesions ours."""

CONTRAST_T1_FACTOR: dict[str, float] = {"enhancing": 0.28, "grey": 0.97, "white": 0.985}
"""What gadolinium leaves of a tissue's T1; tissues that are not named keep theirs (no blood reaches them)."""


@dataclass(frozen=True)
class Sequence:
    """Timing of a spin echo, or of an inversion-recovery spin echo where there is an inversion time."""

    tr_ms: float
    te_ms: float
    ti_ms: float | None = None

    def signal(self, tissue: Tissue) -> float | Array:
        """Signed signal in units of the proton density.

        Spin echo: PD (1 - exp(-TR / T1)) exp(-TE / T2).
        Inversion recovery: PD (1 - 2 exp(-TI / T1) + exp(-TR / T1)) exp(-TE / T2).
        """
        remains = np.exp(-self.tr_ms / tissue.t1_ms)
        if self.ti_ms is None:
            longitudinal = 1 - remains
        else:
            longitudinal = 1 - 2 * np.exp(-self.ti_ms / tissue.t1_ms) + remains
        return tissue.proton_density * longitudinal * np.exp(-self.te_ms / tissue.t2_ms)


SEQUENCES: dict[str, Sequence] = {
    "t1": Sequence(tr_ms=2200, te_ms=4, ti_ms=900),
    "t1ce": Sequence(tr_ms=2200, te_ms=4, ti_ms=900),
    "t2": Sequence(tr_ms=4500, te_ms=95),
    "flair": Sequence(tr_ms=9000, te_ms=115, ti_ms=2400),
    "pd": Sequence(tr_ms=4500, te_ms=12),
}
"""How each modality is acquired; t1ce is t1 after contrast agent."""


def tissues_of_subject(generator: np.random.Generator) -> dict[str, Tissue]:
    """Return the tissues as one subject has them: proton density varies by 1.5 %, T1 and T2 by 3.5 % (log-normal)."""
    result = {}
    for name, tissue in TISSUES.items():
        density, t1, t2 = np.exp(generator.normal(0, (0.015, 0.035, 0.035)))
        result[name] = Tissue(tissue.proton_density * density, tissue.t1_ms * t1, tissue.t2_ms * t2)
    return result


def magnitude(
    modality: str, fractions: Array, tissues: dict[str, Tissue], texture: tuple[Array, Array, Array]
) -> Array:
    """Noise-free magnitude image, float32: partial volumes add up as signed signals before the magnitude is taken.

    Args:
        modality: a key of SEQUENCES.
        fractions: (T, N) of the first T tissues.
        tissues: the subject's.
        texture: (N,) factors of proton density, T1 and T2: what varies slowly inside a tissue.
    """
    total = np.zeros(fractions.shape[1], np.float32)
    for (name, tissue), fraction in zip(tissues.items(), fractions, strict=False):
        some = np.flatnonzero(fraction > 1e-4)
        contrast = CONTRAST_T1_FACTOR.get(name, 1.0) if modality == "t1ce" else 1.0
        density, t1, t2 = (factor[some] for factor in texture)
        local = Tissue(tissue.proton_density * density, tissue.t1_ms * contrast * t1, tissue.t2_ms * t2)
        total[some] += fraction[some] * SEQUENCES[modality].signal(local)
    return np.abs(total)


def coil_profile(head_mm: Array, generator: np.random.Generator) -> Array:
    """Receive sensitivity (N,) around 1: exp of a random quadratic of the position, each term 0.08 (std) at 10 cm."""
    x, y, z = head_mm / 100
    terms = (x, y, z, x * y, x * z, y * z, x * x, y * y, z * z)
    weights = generator.normal(0, 0.08, len(terms))
    exponent = np.zeros(head_mm.shape[1])
    for weight, term in zip(weights, terms, strict=True):
        exponent += weight * term
    return np.exp(exponent)


def rician(signal: Array, sigma: float, generator: np.random.Generator) -> Array:
    """Magnitude of `signal` after complex Gaussian noise of standard deviation `sigma` in each channel (float32)."""
    real = generator.standard_normal(signal.shape, dtype=np.float32)
    imaginary = generator.standard_normal(signal.shape, dtype=np.float32)
    real *= np.float32(sigma)
    imaginary *= np.float32(sigma)
    real += signal
    return np.hypot(real, imaginary)
