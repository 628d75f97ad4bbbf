"""How often the truth lies within a model's uncertainty, by tissue and by number of sources.

`python tests/coverage.py --store STORE MODEL ...` prints the table of docs/uncertainty.md: subjects of the test split,
models of several seeds pooled, the mean over subjects and half of its 95 % interval.
"""

import argparse
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

from aldm.calibration import STANDARD_DEVIATIONS
from aldm.data.labels import LESION, TISSUES, label_map
from aldm.data.store import SubjectRecord, VolumeStore
from aldm.translate import Translator
from aldm.uncertainty import translations_of

Key = tuple[str, str, str]
"""Region, sources (one or several), target."""


def regions(store: VolumeStore, record: SubjectRecord) -> dict[str, np.ndarray]:
    """Return the masks of a subject, (spatial_shape) bool."""
    labels = label_map(store, record.subject_id, (*TISSUES, LESION))
    found = {name: labels == label for label, name in enumerate((*TISSUES, LESION), start=1)}
    return {record.region: store.mask(record.subject_id)} | {name: mask for name, mask in found.items() if mask.any()}


def measure(translator: Translator, store: VolumeStore, record: SubjectRecord) -> dict[Key, np.ndarray]:
    """Return voxels within, voxels, sum of squared errors and of squared standard deviations."""
    masks = regions(store, record)
    found: dict[Key, np.ndarray] = defaultdict(lambda: np.zeros(4))
    for request, truth in translations_of(translator, store, record):
        (made,) = translator.translate_batch([request])
        assert made.half_width is not None, "a model with an uncertainty"
        error = np.abs(made.mean - truth)
        for region, mask in masks.items():
            e, half = error[mask], made.half_width[mask]
            sums = ((e <= half).sum(), e.size, (e**2).sum(), ((half / STANDARD_DEVIATIONS) ** 2).sum())
            for target in (request.target, "all"):
                found[region, "one" if len(request.codes) == 1 else "several", target] += sums
                found[region, "any", target] += sums
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("models", type=Path, nargs="+")
    args = parser.parse_args()
    store = VolumeStore.open(args.store)
    by_subject: dict[Key, dict[str, np.ndarray]] = defaultdict(lambda: defaultdict(lambda: np.zeros(4)))
    for folder in args.models:
        translator = Translator.load(folder)
        for record in store.subjects("test"):
            for key, sums in measure(translator, store, record).items():
                by_subject[key][record.subject_id] += sums
    targets = [*translator.modalities, "all"]
    print("| | sources |", " | ".join(f"-> {name}" for name in targets), "| error ratio, all |")
    print("|---" * (len(targets) + 3) + "|")
    for region in dict.fromkeys(region for region, _, _ in by_subject):
        for sources in ("one", "several", "any"):
            cells = [_cell(by_subject[region, sources, name]) for name in targets]
            total = sum(by_subject[region, sources, "all"].values())
            print(f"| {region} | {sources} |", " | ".join(cells), f"| {math.sqrt(total[2] / total[3]):.2f} |")


def _cell(subjects: dict[str, np.ndarray]) -> str:
    """Return the mean share within and half of its interval, percent."""
    shares = [100 * sums[0] / sums[1] for sums in subjects.values()]
    if not shares:
        return ""
    half = float(stats.t.ppf(0.975, len(shares) - 1)) * np.std(shares, ddof=1) / math.sqrt(len(shares))
    return f"{np.mean(shares):.1f} ± {half:.1f}"


if __name__ == "__main__":
    main()
