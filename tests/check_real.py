"""Real heads through `aldm prepare` and `aldm translate`, and what must hold of the results.

    python tests/check_real.py FOLDER [--write]

FOLDER holds two skull-stripped and one whole-head MS patient, an enhanced multi-frame series with dcm2niix's conversion
of it, and a sagittal head with its neck as a zip of DICOM slices; its README.md names sources and licences. Nothing of
it goes into the repository. Printed: a table of checks; --write puts it into docs/data.md. The exit code is 1 if a
check fails. The built-in model translates, in fp32, one thread: some minutes.
"""

import argparse
import csv
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import corruptions
import nibabel
import numpy as np

from aldm.cli import main as aldm
from aldm.data.dicom import read_series
from aldm.data.foreground import find_foreground
from aldm.data.preprocess import PreprocessRecord, prepare_volume
from aldm.data.store import VolumeStore
from aldm.data.volume import Volume, load_nifti, resample
from aldm.default_model import default_model
from aldm.translate import Translator

PAGE = Path(__file__).resolve().parent.parent / "docs" / "data.md"
BEGIN, END = "<!-- real heads: begin -->\n", "<!-- real heads: end -->"
UPPER_HEAD_MM = 90.0
MAX_OUTSIDE, MAX_UNITS, MAX_VIEW_DB, MAX_CLIPPED = 0.005, 0.01, 0.1, 0.05
NO_HEADS = ("noise alone", "two legs", "upside down (mirrored)", "turned by 180 degrees about the axis from ear to ear")
"""Of tests/corruptions.py: what a service is to refuse."""
HALF = ("--spacing-mm", 2, 2, 2, "--spatial-shape", 96, 96, 72)
"""The paper's 192 x 192 x 144 mm."""
CUT, AIR = 0.76, 0.1
"""Share of each axis that is left of a narrow field of view, and share of each axis that is air on either side."""


@dataclass(frozen=True)
class Scan:
    """A file or folder, the modality that it shows, and where there is one the same head in the other modality."""

    name: str
    path: Path
    source: str
    target: str
    truth: Path | None = None

    def load(self) -> Volume:
        """Return it as an RAS+ volume."""
        return load_nifti(self.path)[0] if self.path.suffix == ".gz" else read_series(self.path)[0]


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    measured: str
    wanted: str
    passed: bool


def share(what: str, value: float, most: float) -> Check:
    """Return the check of a share that has a limit."""
    return Check(what, f"{value:.2%}", f"at most {most:.1%}", value <= most)


def scans(folder: Path, unpacked: Path) -> list[Scan]:
    """Return every head, T1, T2 and FLAIR."""
    found = []
    for place, patients in (("ms-skull-stripped", ("ms07", "ms19")), ("ms-whole-head", ("ms01",))):
        for patient in patients:
            for source, target in (("t1", "t2"), ("t2", "t1"), ("flair", "t1")):
                path, truth = (folder / place / f"{patient}-{name}.nii.gz" for name in (source, target))
                found.append(Scan(f"{patient} {source}", path, source, target, truth))
    found.append(Scan("enhanced t1", folder / "xa30-enhanced" / "t1.dcm", "t1", "t2"))
    with zipfile.ZipFile(folder / "sag-anon.zip") as archive:
        archive.extractall(unpacked)
    series = {path.parent for path in unpacked.rglob("*.dcm")}
    return [*found, *(Scan("head and neck t1", path, "t1", "t2") for path in series)]


# -------------------------------------------------------------------------------------------------------- translation


def check_translation(scan: Scan, translator: Translator, out: Path) -> Iterator[Check]:
    """The grid, the tissue, the units and the field of view of one scan's translation."""
    volume = scan.load()
    made = out / f"{scan.name}.nii.gz"
    words = ["translate", scan.path, made, "--source", scan.source, "--target", scan.target, "--intensity", "unit"]
    code = aldm([*map(str, words), "--precision", "fp32", "--device", "cpu", "--log-level", "error"])
    yield Check(f"{scan.name}: translated", f"exit code {code}", "0", code == 0)
    if code:
        return
    result = load_nifti(made)[0]
    same = result.data.shape == volume.data.shape and np.allclose(result.affine, volume.affine, atol=1e-3)
    if scan.path.suffix == ".gz":  # the file's own axes too
        source, file = nibabel.load(scan.path), nibabel.load(made)
        same = same and source.shape == file.shape and np.allclose(source.affine, file.affine, atol=1e-3)
    yield Check(f"{scan.name}: shape and affine of the source", "same" if same else "differ", "same", same)
    outside, upper = outside_shares(volume, prepare_volume(volume, translator.config.preprocess)[1], translator)
    yield share(f"{scan.name}: tissue outside all boxes", outside, MAX_OUTSIDE)
    yield share(f"{scan.name}: tissue of the upper 90 mm outside", upper, MAX_OUTSIDE)

    def translated(changed: Volume) -> Volume:
        return translator.translate(changed, scan.source, scan.target, intensity="unit").volume

    mask = find_foreground(volume).mask
    difference = translated(z_scored(volume, mask)).data[mask] - result.data[mask]
    yield share(f"{scan.name}: z-scored against raw, RMS", float(np.sqrt(np.mean(difference**2))), MAX_UNITS)
    if scan.truth is not None:
        yield from check_views(scan, volume, mask, result, translated)


def outside_shares(volume: Volume, record: PreprocessRecord, translator: Translator) -> tuple[float, float]:
    """Return which share of the foreground's voxels lies in none of the boxes: of all, and of the upper 90 mm."""
    voxels = np.argwhere(find_foreground(volume).mask)
    world = voxels @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    to_grid = np.linalg.inv(np.array(record.grid_affine))
    places = world @ to_grid[:3, :3].T + to_grid[:3, 3]
    shape = np.array(translator.config.preprocess.spatial_shape)
    inside = np.zeros(len(places), bool)
    for box in record.boxes:
        inside |= ((places >= np.array(box) - 0.5) & (places <= np.array(box) + shape - 0.5)).all(axis=1)
    upper = world[:, 2] > world[:, 2].max() - UPPER_HEAD_MM
    return float(1 - inside.mean()), float(1 - inside[upper].mean())


def z_scored(volume: Volume, mask: np.ndarray) -> Volume:
    """Return a volume with mean 0 and deviation 1 over its foreground; a constant background becomes 0."""
    values = volume.data[mask]
    data = (volume.data - values.mean()) / values.std()
    outside = find_foreground(volume).outside
    if outside is not None:
        data[outside] = 0
    return Volume(data.astype(np.float32), volume.affine)


def check_likeness(scan: Scan, translator: Translator) -> Iterator[Check]:
    """A real head is taken; what is no head, or lies otherwise than its header says, is told."""
    volume = scan.load()
    found = corruptions.likeness(translator, volume, scan.source)
    yield Check(f"{scan.name}: likeness", f"{found.distance:.2f}", "at most 1", not found.is_unlike)
    for words in NO_HEADS:
        other = corruptions.likeness(translator, corruptions.CORRUPTIONS[words](volume), scan.source)
        yield Check(f"{scan.name}, {words}: likeness", f"{other.distance:.2f}", "above 1", other.is_unlike)


def check_views(
    scan: Scan, volume: Volume, mask: np.ndarray, result: Volume, translated: Callable[[Volume], Volume]
) -> Iterator[Check]:
    """PSNR against the real target where the fields of view overlap: as it is, with more air, cut to 76 % an axis."""
    assert scan.truth is not None
    truth = load_nifti(scan.truth)[0]
    inside = find_foreground(truth)
    low, high = np.percentile(truth.data[inside.mask], (0.5, 99.5))
    wanted = resample(truth, volume.affine, volume.data.shape, fill=float(low)).data
    wanted = np.clip((wanted - low) / (high - low), 0, 1)
    narrow = cut_around(mask)
    region = mask[narrow]

    def psnr(data: np.ndarray) -> float:
        return float(-10 * np.log10(np.mean((data[region] - wanted[narrow][region]) ** 2)))

    as_it_is = psnr(result.data[narrow])
    margins = [round(AIR * side) for side in volume.data.shape]
    air = float(volume.data[~mask].min())
    wide = Volume(
        np.pad(volume.data, [(m, m) for m in margins], constant_values=air), moved(volume.affine, [-m for m in margins])
    )
    back = tuple(slice(m, m + side) for m, side in zip(margins, volume.data.shape, strict=True))
    cut = Volume(volume.data[narrow], moved(volume.affine, [part.start for part in narrow]))
    for name, data in (("more air", translated(wide).data[back][narrow]), ("cut to 76 %", translated(cut).data)):
        change = psnr(data) - as_it_is
        words = f"{change:+.2f} dB of {as_it_is:.2f}"
        yield Check(f"{scan.name}: {name}", words, f"within {MAX_VIEW_DB} dB", abs(change) <= MAX_VIEW_DB)


def cut_around(mask: np.ndarray) -> tuple[slice, ...]:
    """Return the box of 76 % of each axis around the middle of a mask."""
    places = np.argwhere(mask)
    middle = (places.min(axis=0) + places.max(axis=0) + 1) / 2
    sides = [round(CUT * side) for side in mask.shape]
    starts = [
        int(np.clip(round(at - n / 2), 0, side - n)) for at, n, side in zip(middle, sides, mask.shape, strict=True)
    ]
    return tuple(slice(start, start + n) for start, n in zip(starts, sides, strict=True))


def moved(affine: np.ndarray, start: list[int]) -> np.ndarray:
    """Return the affine of a grid that begins at another voxel."""
    result = affine.copy()
    result[:3, 3] += affine[:3, :3] @ start
    return result


# ------------------------------------------------------------------------------------------------- reading, preparing


def check_enhanced(folder: Path) -> Iterator[Check]:
    """The enhanced series, voxel by voxel, against dcm2niix's conversion."""
    ours = read_series(folder / "xa30-enhanced" / "t1.dcm")[0]
    theirs = load_nifti(folder / "xa30-enhanced" / "t1-by-dcm2niix.nii.gz")[0]
    if ours.data.shape != theirs.data.shape:
        yield Check("enhanced against dcm2niix", f"{ours.data.shape}", f"{theirs.data.shape}", False)
        return
    wrong = int(np.count_nonzero(ours.data != theirs.data))
    yield Check("enhanced against dcm2niix: voxels that differ", f"{wrong:,} of {ours.data.size:,}", "0", wrong == 0)
    corners = np.array([[0, 0, 0, 1], [*theirs.data.shape, 1]], float).T
    apart = float(np.abs((ours.affine - theirs.affine) @ corners)[:3].max())
    yield Check("enhanced against dcm2niix: corners apart", f"{apart:.1e} mm", "at most 1e-3 mm", apart <= 1e-3)


def check_prepare(folder: Path, dicom: list[Scan], out: Path) -> Iterator[Check]:
    """All sets through `aldm prepare` in the paper's field of view: what is outside the box or clipped of lesions."""
    table, store = out / "table.csv", out / "store"
    with (folder / "table.csv").open(newline="") as stream:
        rows = [
            row | {key: str(folder / row[key]) for key in ("path", "mask", "seg") if row[key]}
            for row in csv.DictReader(stream)
        ]
    empty = dict.fromkeys(rows[0], "")
    rows += [empty | {"subject_id": f"dicom{i}", "modality": "t1", "path": str(s.path)} for i, s in enumerate(dicom)]
    with table.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    words = ["prepare", table, store, "--layout", "table", "--preset", "brats", "--log-level", "error", *HALF]
    code = aldm([*map(str, words)])
    yield Check("prepare, the paper's field of view at 2 mm", f"exit code {code}", "0", code == 0)
    if code:
        return
    names = {f"dicom{i}": scan.name for i, scan in enumerate(dicom)}
    opened = VolumeStore.open(store)
    for record in opened.subjects():
        name = names.get(record.subject_id, record.subject_id)
        upper = upper_outside(opened, record.subject_id)
        yield share(f"{name}: upper 90 mm outside the store's box", upper, MAX_OUTSIDE)
        for modality, (_, lesion) in record.clipped.items():
            if lesion is not None:
                yield share(f"{name} {modality}: clipped of the lesions", lesion, MAX_CLIPPED)


def upper_outside(store: VolumeStore, subject: str) -> float:
    """Return which share of the upper 90 mm of a stored subject's mask lies outside its box."""
    record = next(one for one in store.subjects() if one.subject_id == subject)
    whole = store.whole_mask(subject)
    top = int(np.flatnonzero(whole.any(axis=(0, 1)))[-1])
    rows = max(0, top + 1 - round(UPPER_HEAD_MM / store.preprocess.spacing_mm[2]))
    upper = whole[:, :, rows:]
    parts = [
        slice(max(start, 0), max(start + side, 0))
        for start, side in zip(record.crop_start, store.preprocess.spatial_shape, strict=True)
    ]
    inside = np.zeros_like(whole)
    inside[tuple(parts)] = True
    return float(1 - np.count_nonzero(upper & inside[:, :, rows:]) / np.count_nonzero(upper))


# --------------------------------------------------------------------------------------------------------------- page


def main() -> int:
    """Check, print, and where it is asked for write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only", metavar="TEXT", default="", help="dcm2niix, prepare, or scans whose name has this in it"
    )
    parser.add_argument("--write", action="store_true", help="put the table into docs/data.md")
    args = parser.parse_args()
    if not (args.folder / "table.csv").is_file():
        parser.error(f"{args.folder} is not the folder of real heads (no table.csv): make check-real DIR=FOLDER")
    folder, checks = args.folder.resolve(), []
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        found = scans(folder, out / "unpacked")
        translator = Translator.load(default_model(), precision="fp32")
        series = [scan for scan in found if scan.truth is None]
        parts = {"dcm2niix": check_enhanced(folder), "prepare": check_prepare(folder, series, out)}
        parts |= {scan.name: check_translation(scan, translator, out) for scan in found}
        parts |= {f"likeness {scan.name}": check_likeness(scan, translator) for scan in found}
        for part in [checking for name, checking in parts.items() if args.only in name]:
            for check in part:
                checks.append(check)
                print(
                    f"{'ok    ' if check.passed else 'FAILED'} {check.what}: {check.measured} ({check.wanted})",
                    flush=True,
                )
    lines = ["| check | measured | wanted | |", "|---|---|---|---|"]
    lines += [f"| {c.what} | {c.measured} | {c.wanted} | {'' if c.passed else 'FAILED'} |" for c in checks]
    failed = sum(not check.passed for check in checks)
    print(f"{len(checks) - failed} of {len(checks)} checks passed")
    if args.write:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
        PAGE.write_text(before + "\n".join(lines) + "\n" + after, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
