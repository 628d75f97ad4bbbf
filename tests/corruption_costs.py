"""What each corruption of a source costs the built-in model, on simulated and on real heads: docs/real_heads.md.

    python tests/corruption_costs.py [FOLDER] [--num-simulated N] [--write]

FOLDER is that of tests/check_real.py; without it simulated heads alone are measured. Every source is translated as it
is and corrupted, both against the same truth inside the head, PSNR in dB on the source's own grid; printed is the
mean difference over the pairs of T1, T2 and FLAIR and over the subjects, below 0 where the corruption costs something.
A rotation turns the header, so that the head lies turned in the model's grid and the voxels stay comparable.
"""

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import corruptions
import numpy as np
from corruptions import with_data
from scipy import ndimage

from aldm.data.foreground import find_foreground
from aldm.data.phantom_heads import simulate_head
from aldm.data.volume import Volume, load_nifti, resample, to_ras
from aldm.default_model import default_model
from aldm.translate import Translator

PAGE = Path(__file__).resolve().parent.parent / "docs" / "real_heads.md"
BEGIN, END = "<!-- corruptions: begin -->\n", "<!-- corruptions: end -->"
SEED, SPACING_MM = 2024, 2.0
PAIRS = (("t1", "t2"), ("t2", "t1"), ("t1", "flair"), ("flair", "t1"))
TOP_MM = 30.0
Subject = Mapping[str, Volume]


def thick(volume: Volume, thickness_mm: float) -> Volume:
    """Return what slices of this thickness along z see, on the volume's own grid."""
    number = max(1, round(thickness_mm / volume.spacing_mm[2]))
    slices = ndimage.uniform_filter1d(volume.data, number, axis=2, mode="nearest")[:, :, number // 2 :: number]
    places = (np.arange(volume.data.shape[2]) - number // 2) / number
    grid = np.meshgrid(*(np.arange(side) for side in volume.data.shape[:2]), places, indexing="ij", sparse=True)
    return with_data(volume, ndimage.map_coordinates(slices, np.broadcast_arrays(*grid), order=1, mode="nearest"))


def shaded(volume: Volume, strength: float) -> Volume:
    """Multiply with a smooth gain: e to the power of +-strength at the sides, as of a coil at one of them."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, side) for side in volume.data.shape), indexing="ij", sparse=True)
    return with_data(volume, volume.data * np.exp(strength * (0.6 * x + 0.6 * y * y - 0.5 * z)))


def topless(volume: Volume) -> Volume:
    """Leave the upper 30 mm of the head out of the field of view."""
    top = int(np.flatnonzero(find_foreground(volume).mask.any(axis=(0, 1)))[-1])
    return Volume(volume.data[:, :, : top - round(TOP_MM / volume.spacing_mm[2])], volume.affine)


def with_gamma(volume: Volume, gamma: float) -> Volume:
    """Raise the intensities to a power: a contrast that no drawn sequence has."""
    bright = float(np.percentile(volume.data, 99.9))
    return with_data(volume, bright * (np.clip(volume.data, 0, None) / bright) ** gamma)


CORRUPTIONS: Mapping[str, Callable[[Volume], Volume]] = {
    "turned by 10 degrees (nodding)": lambda v: corruptions.tilted(v, 10),
    "slices of 6 mm": lambda v: thick(v, 6),
    "blurred, 4 mm": lambda v: corruptions.blurred(v, 4),
    "smooth gain, e^0.3": lambda v: shaded(v, 0.3),
    "smooth gain, e^0.6": lambda v: shaded(v, 0.6),
    "noise, 3 %": lambda v: corruptions.noisy(v, 0.03),
    "noise, 8 %": lambda v: corruptions.noisy(v, 0.08),
    "ghost (0.2)": lambda v: corruptions.ghosted(v, 0.2),
    "upper 30 mm missing": topless,
    "another contrast (gamma 0.6)": lambda v: with_gamma(v, 0.6),
    "another contrast (gamma 1.6)": lambda v: with_gamma(v, 1.6),
}


def simulated(number: int) -> Iterator[Subject]:
    """Yield heads that the model has not seen."""
    for index in range(number):
        head = simulate_head(SEED, index, SPACING_MM)
        yield {name: to_ras(one.data, one.affine) for name, one in head.items() if name in ("t1", "t2", "flair")}


def real(folder: Path) -> Iterator[Subject]:
    """Yield the subjects of the folder's table."""
    files: dict[str, dict[str, Path]] = defaultdict(dict)
    with (folder / "table.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            files[row["subject_id"]][row["modality"]] = folder / row["path"]
    for paths in files.values():
        yield {name: load_nifti(path)[0] for name, path in paths.items() if name in ("t1", "t2", "flair")}


def costs(translator: Translator, subject: Subject) -> dict[str, list[float]]:
    """Return the differences of PSNR, corrupted less as it is, dB, by corruption."""
    found: dict[str, list[float]] = defaultdict(list)
    for source, target in PAIRS:
        volume = subject[source]
        mask = find_foreground(volume).mask
        truth = resample(subject[target], volume.affine, volume.data.shape, fill=float(subject[target].data.min())).data
        low, high = (float(v) for v in np.percentile(truth[mask], (0.5, 99.5)))
        truth = np.clip((truth - low) / (high - low), 0, 1)

        def made(changed: Volume, source: str = source, target: str = target) -> np.ndarray:
            return translator.translate(changed, source, target, intensity="unit").volume.data

        def psnr(data: np.ndarray, truth: np.ndarray = truth, mask: np.ndarray = mask) -> float:
            part = np.s_[:, :, : data.shape[2]]
            x, y = data[mask[part]], truth[part][mask[part]]
            x = x * (float(x @ y) / float(x @ x))  # a unit is another thing for each percentile rule
            return float(-10 * np.log10(np.mean((x - y) ** 2)))

        clean = made(volume)
        for name, change in CORRUPTIONS.items():
            corrupted = made(change(volume))
            found[name].append(psnr(corrupted) - psnr(clean[:, :, : corrupted.shape[2]]))
    return found


def table(columns: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> Iterator[str]:
    """Yield the lines: a row per corruption, a column per group of subjects."""
    yield f"| | {' | '.join(f'{name} ({len(ones)})' for name, ones in columns.items())} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name in CORRUPTIONS:
        cells = []
        for ones in columns.values():
            values = [np.mean(one[name]) for one in ones]
            worst = min(value for one in ones for value in one[name])
            cells.append(f"{np.mean(values):+.2f} (worst {worst:+.2f})")
        yield f"| {name} | {' | '.join(cells)} |"


def main() -> int:
    """Measure, print, and where it is asked for write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--model", type=Path, default=default_model(), help="another model than the built-in one")
    parser.add_argument("--num-simulated", type=int, default=4)
    parser.add_argument("--write", action="store_true", help="put the table into docs/real_heads.md")
    args = parser.parse_args()
    translator = Translator.load(args.model)
    columns = {"simulated heads": [costs(translator, one) for one in simulated(args.num_simulated)]}
    if args.folder is not None:
        columns["real heads"] = [costs(translator, one) for one in real(args.folder)]
    lines = list(table(columns))
    print("\n".join(lines))
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        PAGE.write_text(before + "\n".join(lines) + "\n" + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
