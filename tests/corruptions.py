"""Ways in which a volume may be unlike the training data, and how well the model that ships tells them.

`python tests/corruptions.py` prints a table: AUROC of the likeness by corruption, on simulated
subjects that the model was not trained on.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
from scipy import ndimage

from aldm.data.foreground import find_foreground
from aldm.data.phantom_heads import simulate_head
from aldm.data.preprocess import prepare_volume
from aldm.data.volume import Volume, to_ras
from aldm.default_model import default_model
from aldm.likeness import Likeness
from aldm.translate import Translator

SEED, SPACING_MM = 2024, 2.0
"""The model was trained on heads of another seed at 2 mm."""


def subject(index: int, spacing_mm: float = SPACING_MM) -> dict[str, Volume]:
    """Return a simulated head that the model has not seen."""
    simulated = simulate_head(SEED, index, spacing_mm)
    return {name: to_ras(volume.data, volume.affine) for name, volume in simulated.items() if name != "seg"}


def likeness(translator: Translator, volume: Volume, source: str) -> Likeness:
    """Return what the model says of a volume."""
    _, record = prepare_volume(volume, translator.config.preprocess, stride=translator.box_step)
    found = translator.likeness(record, (source,))
    assert found is not None
    return found


def turned(volume: Volume, *axes: int) -> Volume:
    """Turn the voxels and leave the affine: what a header that lies does."""
    return with_data(volume, np.flip(volume.data, axes))


def tilted(volume: Volume, degrees: float) -> Volume:
    """Turn the patient about the axis from ear to ear."""
    angle, middle = np.radians(degrees), np.append((np.array(volume.data.shape) - 1) / 2, 1)
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    centre = volume.affine @ middle
    turn[:3, 3] = centre[:3] - turn[:3, :3] @ centre[:3]
    return Volume(volume.data, turn @ volume.affine)


def noisy(volume: Volume, share: float) -> Volume:
    """Add Rician noise, its deviation a share of the brightest intensity."""
    real, imaginary = _random().normal(0, share * _brightest(volume), (2, *volume.data.shape))
    return with_data(volume, np.hypot(volume.data + real, imaginary))


def ghosted(volume: Volume, strength: float) -> Volume:
    """Weaken every second line of k-space along y: a ghost half a field of view away."""
    lines = np.fft.fft(volume.data, axis=1)
    lines[:, ::2] *= 1 - strength
    return with_data(volume, np.abs(np.fft.ifft(lines, axis=1)))


def moved(volume: Volume) -> Volume:
    """Let the head move, 3 voxels at a time, while three in ten lines of k-space are read."""
    generator, lines = _random(), np.fft.fftn(volume.data)
    frequencies = np.meshgrid(*map(np.fft.fftfreq, lines.shape), indexing="ij")
    for line in range(lines.shape[1]):
        if generator.random() < 0.3:
            shift = generator.normal(0, 3, 3)
            phase = sum(step * one[:, line] for step, one in zip(shift, frequencies, strict=True))
            lines[:, line] *= np.exp(-2j * np.pi * phase)
    return with_data(volume, np.abs(np.fft.ifftn(lines)))


def blurred(volume: Volume, width_mm: float) -> Volume:
    """Smooth with a Gaussian of that full width at half maximum."""
    return with_data(volume, ndimage.gaussian_filter(volume.data, width_mm / 2.355 / np.array(volume.spacing_mm)))


def shaded(volume: Volume, strength: float) -> Volume:
    """Brighten from one corner to the other by e to the power of twice the strength."""
    x, z = np.linspace(-1, 1, volume.data.shape[0])[:, None, None], np.linspace(-1, 1, volume.data.shape[2])
    return with_data(volume, volume.data * np.exp(strength * (x + z) / 2))


def inverted(volume: Volume) -> Volume:
    """Make what is bright in the head dark."""
    data = np.clip(1.1 * _brightest(volume) - volume.data, 0, None)
    return with_data(volume, np.where(find_foreground(volume).mask, data, volume.data))


def stripped(volume: Volume) -> Volume:
    """Set to 0 what lies less than 15 mm below the skin: scalp and skull."""
    depth = ndimage.distance_transform_edt(find_foreground(volume).mask, sampling=volume.spacing_mm)
    return with_data(volume, np.where(depth > 15, volume.data, 0))


def half(volume: Volume) -> Volume:
    """Leave the lower half as zeros."""
    data = volume.data.copy()
    data[:, :, : data.shape[2] // 2] = 0
    return with_data(volume, data)


def holed(volume: Volume) -> Volume:
    """Set a ball of 35 mm radius in the head to 0: a signal void."""
    mask = np.argwhere(find_foreground(volume).mask)
    places = np.stack(np.indices(volume.data.shape), axis=-1) - mask.mean(axis=0)
    distance = np.linalg.norm(places * np.array(volume.spacing_mm), axis=-1)
    return with_data(volume, np.where(distance < 35, 0, volume.data))


def smaller(volume: Volume, factor: float) -> Volume:
    """Scale the affine: a wrong voxel size."""
    affine = volume.affine.copy()
    affine[:3, :3] *= factor
    return Volume(volume.data, affine)


def legs(volume: Volume) -> Volume:
    """Replace the head by two legs: skin and fat, muscle, bone, marrow, as upright cylinders."""
    x, y, _ = np.meshgrid(*(np.linspace(-1, 1, n) for n in volume.data.shape), indexing="ij")
    data = np.zeros(volume.data.shape)
    for centre in (-0.4, 0.4):
        radius = np.hypot((x - centre) / 0.35, y / 0.45)
        for below, value in ((1.0, 0.8), (0.85, 0.4), (0.35, 0.1), (0.25, 0.9)):
            data[radius < below] = value * _brightest(volume)
    data = ndimage.gaussian_filter(data * _random().normal(1, 0.05, data.shape), 0.7)
    return with_data(volume, data + np.abs(_random().normal(0, 0.01 * _brightest(volume), data.shape)))


def white(volume: Volume) -> Volume:
    """Replace everything by noise."""
    return with_data(volume, np.abs(_random().normal(0, 1, volume.data.shape)))


def with_data(volume: Volume, data: np.ndarray) -> Volume:
    """Return a volume with other intensities."""
    return Volume(np.ascontiguousarray(data, np.float32), volume.affine)


def _brightest(volume: Volume) -> float:
    return float(np.percentile(volume.data, 99.5))


def _random() -> np.random.Generator:
    return np.random.default_rng(0)


CORRUPTIONS: Mapping[str, Callable[[Volume], Volume]] = {
    "turned by 180 degrees about the body's axis": lambda v: turned(v, 0, 1),
    "turned by 180 degrees about the axis from ear to ear": lambda v: turned(v, 1, 2),
    "turned by 180 degrees about the axis from nose to neck": lambda v: turned(v, 0, 2),
    "upside down (mirrored)": lambda v: turned(v, 2),
    "left and right exchanged": lambda v: turned(v, 0),
    "axes y and z exchanged": lambda v: with_data(v, np.swapaxes(v.data, 1, 2)),
    "two legs": legs,
    "noise alone": white,
    "lower half zeros": half,
    "skull-stripped": stripped,
    "contrast inverted": inverted,
    "a hole of 35 mm radius": holed,
    "0.7 times the size": lambda v: smaller(v, 0.7),
    "noise, 10 %": lambda v: noisy(v, 0.1),
    "noise, 2 %": lambda v: noisy(v, 0.02),
    "ghost, strong (0.6)": lambda v: ghosted(v, 0.6),
    "ghost, weak (0.3)": lambda v: ghosted(v, 0.3),
    "motion": moved,
    "blurred, 6 mm": lambda v: blurred(v, 6),
    "shading, strong (1)": lambda v: shaded(v, 1),
    "shading, weak (0.3)": lambda v: shaded(v, 0.3),
}
HARMLESS: Mapping[str, Callable[[Volume], Volume]] = {
    "head tilted by 15 degrees": lambda v: tilted(v, 15),
    "3 times as bright": lambda v: with_data(v, 3 * v.data),
}


def auroc(kept: np.ndarray, corrupted: np.ndarray) -> float:
    """Return how often a corrupted volume is further away than one as it should be; a tie counts half."""
    return float((corrupted[:, None] > kept).mean() + 0.5 * (corrupted[:, None] == kept).mean())


def table(num_subjects: int) -> list[str]:
    """Return the lines of the table."""
    translator = Translator.load(default_model())
    subjects = [subject(index) for index in range(num_subjects)]
    names = translator.modalities

    def measured(change: Callable[[Volume], Volume], said: Callable[[str], str]) -> dict[str, list[Likeness]]:
        return {name: [likeness(translator, change(one[name]), said(name)) for one in subjects] for name in names}

    kept = measured(lambda v: v, lambda name: name)
    following = dict(zip(names, (*names[1:], names[0]), strict=True))
    rows = {"another contrast than said": measured(lambda v: v, following.__getitem__)}
    rows |= {name: measured(change, lambda one: one) for name, change in CORRUPTIONS.items()}
    rows |= {"as it should be": kept} | {name: measured(change, lambda one: one) for name, change in HARMLESS.items()}
    lines = [
        "| | AUROC | likeness, median | above 1 | most of all in | looks like its own |",
        "|---|---|---|---|---|---|",
    ]
    for row, found in rows.items():
        areas = [auroc(_distances(kept[name]), _distances(found[name])) for name in names]
        together = np.concatenate([_distances(found[name]) for name in names])
        group = Counter(one.differs_in for each in found.values() for one in each).most_common(1)[0][0]
        own = np.mean([one.looks_like == name for name, each in found.items() for one in each])
        area = "-" if row == "as it should be" else f"{np.mean(areas):.2f}"
        lines.append(
            f"| {row} | {area} | {np.median(together):.2f} | {(together > 1).mean():.0%} | {group} | {own:.0%} |"
        )
    return lines


def _distances(found: list[Likeness]) -> np.ndarray:
    return np.array([one.distance for one in found])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-subjects", type=int, default=8, help="held-out heads, five volumes each")
    print("\n".join(table(parser.parse_args().num_subjects)))
