"""What a scanner sees of simulated heads: the tissues at 1.5 and 3 T, the pulse sequences and their protocols.

Times are in ms, angles in degrees, signals in units of the proton density of water.

Relaxation times, rounded: grey and white matter T1 from Rooney et al. 2007 (1.5 T) and Wansapura et al. 1999 (3 T), T2
from Stanisz et al. 2005 and Wansapura et al. 1999, T2* from Peters et al. 2007; fluid T1 from Rooney et al. 2007, T2
from Piechnik et al. 2009; blood from Stanisz et al. 2005; muscle, fat and marrow fat from Gold et al. 2004; marrow
water from de Bazelaire et al. 2004; cortical bone from Du and Bydder 2013; skin from Richard et al. 1991; cartilage
from Gold et al. 2004. Where nobody has measured all of it (lens, vitreous, mucosa, glands, lesions) the values are
ours, near those of tissues with as much water. Relaxivities of gadolinium from Rohrer et al. 2005.
"""

from dataclasses import dataclass, replace

import numpy as np

FIELDS_T = (1.5, 3.0)
RELAXIVITY = {1.5: (4.1, 4.6), 3.0: (3.7, 5.2)}
"""By which a mmol/l of gadolinium raises 1 / T1 and 1 / T2, 1/s (gadopentetate in plasma)."""


@dataclass(frozen=True)
class Tissue:
    """Proton density (water is 1) and relaxation times, ms."""

    proton_density: float
    t1_ms: float
    t2_ms: float
    t2_star_ms: float


TISSUES: dict[str, dict[float, Tissue]] = {
    name: {1.5: Tissue(density, t1[0], t2[0], star[0]), 3.0: Tissue(density, t1[1], t2[1], star[1])}
    for name, density, t1, t2, star in (
        ("grey", 0.82, (1188, 1331), (97, 95), (80, 60)),
        ("white", 0.71, (656, 832), (76, 73), (66, 52)),
        ("csf", 1.00, (4300, 4300), (2000, 1800), (1000, 600)),
        ("blood", 0.85, (1441, 1932), (200, 150), (120, 60)),
        ("bone", 0.15, (250, 250), (0.5, 0.4), (0.5, 0.4)),
        ("marrow", 0.80, (856, 898), (45, 40), (15, 10)),
        ("fat", 0.90, (288, 371), (130, 110), (40, 30)),
        ("muscle", 0.78, (1130, 1420), (35, 32), (28, 24)),
        ("skin", 0.65, (900, 1050), (32, 28), (20, 15)),
        ("gland", 0.85, (700, 850), (75, 65), (40, 30)),
        ("mucosa", 0.90, (1200, 1400), (90, 80), (40, 30)),
        ("cartilage", 0.70, (1000, 1200), (40, 37), (25, 20)),
        ("vitreous", 0.99, (4000, 4200), (1200, 1000), (600, 400)),
        ("lens", 0.65, (1000, 1150), (35, 30), (25, 20)),
        ("necrosis", 0.95, (2400, 2700), (300, 280), (150, 120)),
        ("edema", 0.86, (1400, 1600), (170, 160), (110, 90)),
        ("enhancing", 0.84, (1300, 1500), (120, 110), (80, 60)),
        ("plaque", 0.84, (1200, 1450), (160, 150), (110, 90)),
        ("stroke", 0.86, (1350, 1550), (165, 155), (110, 90)),
    )
}
"""Tissue -> field strength in T -> what it has there. Air gives nothing."""

FAT_SHARE = {"fat": 0.95, "marrow": 0.75, "gland": 0.35}
"""How much of a tissue's signal is fat's; the rest is water's."""

TRANSFER: dict[str, float] = {"white": 1.0, "muscle": 1.2, "grey": 0.6, "plaque": 0.5, "skin": 0.8, "cartilage": 1.2}
"""How much a tissue loses to magnetization transfer, next to white matter (ours, after Melki and Mulkern 1992)."""

GADOLINIUM_MM: dict[str, float] = {
    "blood": 0.9,
    "mucosa": 0.5,
    "enhancing": 0.55,
    "gland": 0.25,
    "muscle": 0.08,
    "skin": 0.15,
    "marrow": 0.1,
    "grey": 0.012,
    "white": 0.008,
    "necrosis": 0.02,
}
"""Concentration in a tissue minutes after a common dose, mmol/l; ours, between the blood's and none."""


# ---------------------------------------------------------------------------------------------------------- sequences


@dataclass(frozen=True)
class SpinEcho:
    """A 90 and a 180 degree pulse, after an inversion where there is an inversion time; a train of echoes is its te_ms.

    Between the pulses Mz relaxes towards 1; it starts from 0 after the excitation (Haacke et al. 1999, chapter 8):
    S = PD (1 - 2 exp(-(TR - TE/2) / T1) + exp(-TR / T1)) exp(-TE / T2), and with an inversion TI before the excitation
    S = PD (1 - 2 exp(-TI / T1) + 2 exp(-(TR - TE/2) / T1) - exp(-TR / T1)) exp(-TE / T2).
    """

    tr_ms: float
    te_ms: float
    ti_ms: float | None = None

    def signal(self, tissue: Tissue) -> float:
        """Return the signed signal."""
        recovered = np.exp(-(self.tr_ms - self.te_ms / 2) / tissue.t1_ms)
        repeated = np.exp(-self.tr_ms / tissue.t1_ms)
        if self.ti_ms is None:
            longitudinal = 1 - 2 * recovered + repeated
        else:
            longitudinal = 1 - 2 * np.exp(-self.ti_ms / tissue.t1_ms) + 2 * recovered - repeated
        return float(tissue.proton_density * longitudinal * np.exp(-self.te_ms / tissue.t2_ms))


@dataclass(frozen=True)
class GradientEcho:
    """A spoiled gradient echo in its steady state (Ernst and Anderson 1966).

    S = PD sin(a) (1 - E) / (1 - cos(a) E) exp(-TE / T2*), with E = exp(-TR / T1).
    """

    tr_ms: float
    te_ms: float
    flip_deg: float

    def signal(self, tissue: Tissue) -> float:
        """Return the signal."""
        e, a = np.exp(-self.tr_ms / tissue.t1_ms), np.deg2rad(self.flip_deg)
        longitudinal = np.sin(a) * (1 - e) / (1 - np.cos(a) * e)
        return float(tissue.proton_density * longitudinal * np.exp(-self.te_ms / tissue.t2_star_ms))


@dataclass(frozen=True)
class Mprage:
    """An inversion, then a train of small excitations whose middle one, at TI, decides (Mugler and Brookeman 1990).

    Each part of a repetition maps Mz to a Mz + b: free recovery over a time t has a = exp(-t / T1) and b = 1 - a;
    excitations by an angle f every s have a = (cos(f) exp(-s / T1))^n and the spoiled gradient echo's steady state as
    their fixed point (Deichmann et al. 2000). Mz repeats itself where the maps of a whole repetition meet.
    """

    tr_ms: float
    te_ms: float
    ti_ms: float
    flip_deg: float
    spacing_ms: float
    num_pulses: int

    def signal(self, tissue: Tissue) -> float:
        """Return the signed signal."""
        before = self.ti_ms - self.spacing_ms * (self.num_pulses // 2)
        after = self.tr_ms - before - self.spacing_ms * self.num_pulses
        assert before >= 0, "the train begins after the inversion"
        assert after >= 0, "the train ends before the next one"
        e, cosine = np.exp(-self.spacing_ms / tissue.t1_ms), np.cos(np.deg2rad(self.flip_deg))

        def recovery(time_ms: float) -> tuple[float, float]:
            a = float(np.exp(-time_ms / tissue.t1_ms))
            return a, 1 - a

        def train(pulses: int) -> tuple[float, float]:
            a = float((cosine * e) ** pulses)
            return a, float((1 - e) / (1 - cosine * e)) * (1 - a)

        to_middle = _after((-1.0, 0.0), recovery(before), train(self.num_pulses // 2))
        rest = _after(train(self.num_pulses - self.num_pulses // 2), recovery(after))
        a, b = _after(rest, to_middle)
        middle = b / (1 - a)
        sine = float(np.sin(np.deg2rad(self.flip_deg)))
        return float(tissue.proton_density * sine * middle * np.exp(-self.te_ms / tissue.t2_star_ms))


def _after(*maps: tuple[float, float]) -> tuple[float, float]:
    """Return the map x -> a x + b that applies maps one after another."""
    a, b = 1.0, 0.0
    for slope, offset in maps:
        a, b = slope * a, slope * b + offset
    return a, b


Sequence = SpinEcho | GradientEcho | Mprage


# ---------------------------------------------------------------------------------------------------------- protocols


def draw_sequence(modality: str, field_t: float, generator: np.random.Generator) -> Sequence:
    """Draw a sequence that clinics use for a modality.

    Args:
        modality: t1, t1ce, t2, flair or pd.
        field_t: 1.5 or 3.
        generator: draws it.
    """
    u = generator.uniform
    if modality in ("t1", "t1ce"):
        kind = generator.choice(["mprage", "gradient", "spin", "inversion"], p=[0.45, 0.2, 0.25, 0.1])
        if kind == "mprage":
            pulses, spacing = int(generator.integers(96, 193)), u(6, 9)
            ti = max(u(800, 1050), spacing * (pulses // 2) + 20)
            tr = max(u(1700, 2500), ti + spacing * (pulses - pulses // 2) + 200)
            return Mprage(tr, u(2, 4.5), ti, u(7, 11), spacing, pulses)
        if kind == "gradient":
            return GradientEcho(u(8, 25), u(2, 5), u(16, 30))
        if kind == "inversion":
            return SpinEcho(u(1900, 2600), u(8, 20), u(900, 1000) if field_t < 2 else u(1000, 1100))
        return SpinEcho(u(400, 650), u(8, 14))
    if modality == "t2":
        return SpinEcho(u(3000, 7000), u(70, 125))
    if modality == "pd":
        return SpinEcho(u(2500, 5000), u(8, 28))
    tr, te, t1 = u(4800, 11000), u(85, 140), TISSUES["csf"][field_t].t1_ms
    null = t1 * np.log(2 / (1 + 2 * np.exp(-(tr - te / 2) / t1) - np.exp(-tr / t1)))  # where fluid gives nothing
    return SpinEcho(tr, te, float(null * u(0.96, 1.02)))


@dataclass(frozen=True)
class Subject:
    """The tissues as one subject has them at one field strength."""

    field_t: float
    tissues: dict[str, Tissue]
    gadolinium_mm: dict[str, float]

    @classmethod
    def draw(cls, field_t: float, generator: np.random.Generator) -> "Subject":
        """Draw a subject: T1 and T2 vary by 6 % all together, as published means do, and by 2 % tissue by tissue.

        The T1 of fluid, which is nearly water, varies by 2 % alone, proton density by 1 %, concentrations of gadolinium
        by 30 % together and 15 % each (log-normal, cut at two standard deviations).
        """
        t1_all, t2_all = np.exp(0.06 * np.clip(generator.normal(size=2), -2, 2))
        tissues = {}
        for name, at in TISSUES.items():
            one, watery = at[field_t], at[field_t].t1_ms > 3000
            density, t1, t2 = np.exp(np.clip(generator.normal(size=3), -2, 2) * (0.01, 0.02, 0.02))
            tissues[name] = Tissue(
                min(one.proton_density * float(density), 1.0),
                one.t1_ms * float(t1 if watery else t1 * t1_all),
                one.t2_ms * float(t2 * t2_all),
                min(one.t2_star_ms * float(t2 * t2_all), one.t2_ms * float(t2 * t2_all)),
            )
        dose = float(np.exp(0.3 * np.clip(generator.normal(), -2, 2)))
        own = np.exp(0.15 * np.clip(generator.normal(size=len(GADOLINIUM_MM)), -2, 2))
        enhanced = {name: mm * dose * float(f) for (name, mm), f in zip(GADOLINIUM_MM.items(), own, strict=True)}
        return cls(field_t, tissues, enhanced)

    def with_contrast(self) -> "Subject":
        """Return the subject after contrast agent: 1 / T = 1 / T + r c for both relaxation times."""
        r1, r2 = RELAXIVITY[self.field_t]
        tissues = dict(self.tissues)
        for name, mm in self.gadolinium_mm.items():
            one = tissues[name]
            t2, star = (1 / (1 / time + r2 * mm / 1000) for time in (one.t2_ms, one.t2_star_ms))
            tissues[name] = replace(one, t1_ms=1 / (1 / one.t1_ms + r1 * mm / 1000), t2_ms=t2, t2_star_ms=star)
        return replace(self, tissues=tissues)


@dataclass(frozen=True)
class Contrast:
    """A modality as it is scanned: its sequence, what is left of fat, and what is left of blood that flows."""

    sequence: Sequence
    fat: float = 1.0
    """1, or about 0.1 where fat is suppressed."""
    flow: float = 1.0
    """0 where blood leaves before its echo, above 1 where fresh blood flows in."""
    transfer: float = 0.0
    """What white matter loses as the pulses of the other slices saturate its macromolecules."""
    fat_t2: float = 1.0
    """By how much fat's T2 is longer in a train of echoes, whose pulses undo its J-coupling (Henkelman et al. 1992)."""

    @classmethod
    def draw(cls, modality: str, field_t: float, generator: np.random.Generator) -> "Contrast":
        """Draw a sequence; fat is suppressed in 8 % of t1, 20 % of t1ce and pd, 25 % of t2 and 55 % of flair.

        Spin echoes of many slices lose up to 12 % of white matter's signal to magnetization transfer. Those of t2,
        flair and pd are trains of echoes: fat's T2 is 1.1 to 2 times as long there.
        """
        sequence = draw_sequence(modality, field_t, generator)
        share = {"t1": 0.08, "t1ce": 0.2, "pd": 0.2, "t2": 0.25, "flair": 0.55}[modality]
        fat, left = generator.uniform(size=2)
        low, high = (0.0, 0.35) if isinstance(sequence, SpinEcho) else (0.8, 1.3)
        flow = float(generator.uniform(low, high)) if modality != "t1ce" else float(generator.uniform(0.6, 1.0))
        transfer = float(generator.uniform(0, 0.12)) if isinstance(sequence, SpinEcho) else 0.0
        fat_t2 = 1.0 if modality in ("t1", "t1ce") else float(generator.uniform(1.1, 2.0))
        return cls(sequence, 0.05 + 0.25 * float(left) if fat < share else 1.0, flow, transfer, fat_t2)

    def signal(self, name: str, tissue: Tissue) -> float:
        """Return the signed signal of a tissue."""
        if name in ("fat", "marrow"):
            tissue = replace(tissue, t2_ms=tissue.t2_ms * self.fat_t2)
        value = self.sequence.signal(tissue) * (1 - self.transfer * TRANSFER.get(name, 0.0))
        if name == "blood":
            return value * self.flow
        return value * (1 - FAT_SHARE.get(name, 0.0) * (1 - self.fat))


def derivatives(contrast: Contrast, name: str, tissue: Tissue) -> tuple[float, float, float]:
    """Return the signal, and how it changes with the logarithms of T1 and of T2 (with T2*): central differences."""
    step = 0.05

    def change(**factors: float) -> float:
        up, down = (
            contrast.signal(
                name, replace(tissue, **{key: getattr(tissue, key) * np.exp(sign * step) for key in factors})
            )
            for sign in (1, -1)
        )
        return (up - down) / (2 * step)

    return contrast.signal(name, tissue), change(t1_ms=1), change(t2_ms=1, t2_star_ms=1)
