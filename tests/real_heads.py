"""The built-in model's scores and pictures on real heads: docs/real_heads.md.

    python tests/real_heads.py FOLDER [--training-store STORE] [--baseline NAME=DIR] [--write]

FOLDER is that of tests/check_real.py. Its table goes through `aldm prepare` and `aldm evaluate` as a user's own would;
printed is a table per subject, a row per pair of modalities. --training-store, the store of the simulated heads that
the model was trained on, adds the rows training mean and intensity map; --baseline adds a plain network. --write puts
the tables and a picture per subject into docs/, and the mean of each subject into the model's card. Only sets whose
licence allows it are pictured (CC-BY, source named).
"""

import argparse
import csv
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from aldm.cli import main as aldm
from aldm.data.store import SubjectRecord, VolumeStore
from aldm.default_model import default_model
from aldm.files import atomic_path
from aldm.score_rows import ScoreRow, read_csv, translations
from aldm.translate import Translator

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "real_heads.md"
CARD = default_model() / "README.md"
MARKS = {
    PAGE: ("<!-- scores: begin -->\n", "<!-- scores: end -->"),
    CARD: ("<!-- real heads: begin -->\n", "<!-- real heads: end -->"),
}
METHODS = ("identity", "training-mean", "intensity-map")
SOURCES = {"t1": "t2", "t1ce": "t2", "t2": "t1", "flair": "t1", "pd": "t1"}
"""Target -> the source that pictures show."""
WANTED_DB = {"identity": 3.0, "intensity-map": 1.0}
"""How far the model is to be above these on every pair."""
WANTED_COVERAGE = 0.8
WORDS = {
    "ms07": "skull-stripped, MS (Lesjak et al. 2017, CC-BY)",
    "ms19": "skull-stripped, MS (Lesjak et al. 2017, CC-BY)",
    "ms01": "whole head, axial slices of 3 to 4 mm, MS (Lesjak et al. 2016, CC-BY)",
}


def prepare(folder: Path, model: Path, out: Path) -> VolumeStore:
    """Prepare the table of the folder as the model wants it, every subject in the test split."""
    with (folder / "table.csv").open(newline="") as stream:
        subjects = dict.fromkeys(row["subject_id"] for row in csv.DictReader(stream))
    splits = out / "splits.csv"
    splits.write_text("subject_id,split\n" + "".join(f"{name},test\n" for name in subjects))
    words = ("prepare", folder / "table.csv", out / "store", "--layout", "table", "--splits", splits)
    run(*words, "--like", model, "--log-level", "error")
    return VolumeStore.open(out / "store")


def run(*words: object) -> None:
    """Run an aldm command, or stop."""
    code = aldm([str(word) for word in words])
    if code:
        sys.exit(f"aldm {words[0]} ended with {code}")


def by_pair(rows: Iterable[ScoreRow], record: SubjectRecord) -> dict[tuple[str, str], dict[str, ScoreRow]]:
    """Return the rows of a subject's brain, or foreground: pair -> method -> row."""
    found: dict[tuple[str, str], dict[str, ScoreRow]] = defaultdict(dict)
    for row in translations(rows):
        if row.subject_id == record.subject_id and row.region == record.region:
            found[row.source, row.target][row.method] = row
    return found


def card_lines(rows: list[ScoreRow], store: VolumeStore) -> Iterator[str]:
    """Yield what the model's card says: a row per subject, means over its pairs."""
    yield from ("## Real heads", "")
    yield "PSNR in dB, mean over the pairs of each subject (docs/real_heads.md has all of them):"
    yield from (
        "",
        "| | a copy of the source | this model | SSIM | voxels within the uncertainty |",
        "|---|---|---|---|---|",
    )
    for record in store.subjects():
        found = by_pair(rows, record).values()
        copy, own, ssim, held = (
            float(np.mean([getattr(one[method], score) for one in found]))
            for method, score in (
                ("identity", "psnr_db"),
                ("aldm", "psnr_db"),
                ("aldm", "ssim"),
                ("aldm", "coverage"),
            )
        )
        name = f"{record.subject_id}, {WORDS.get(record.subject_id, '')}"
        yield f"| {name} | {copy:.1f} | {own:.1f} | {ssim:.2f} | {held:.0%} |"


def table(rows: Iterable[ScoreRow], record: SubjectRecord) -> Iterator[str]:
    """Yield the lines of a subject's table: per pair PSNR / PSNR after the gain of every method, SSIM and coverage."""
    found = by_pair(rows, record)
    methods = [name for name in METHODS if any(name in one for one in found.values())]
    methods += sorted({name for one in found.values() for name in one} - {*METHODS, "aldm", "histogram-matching"})
    methods.append("aldm")
    headings = [*methods, "SSIM, identity", "SSIM, aldm", "coverage"]
    yield f"| PSNR / after gain (dB) | {' | '.join(headings)} |"
    yield "|---" * (len(methods) + 4) + "|"
    for (source, target), one in found.items():
        cells = [f"{one[m].psnr_db:.1f} / {one[m].gain_psnr_db:.1f}" if m in one else "" for m in methods]
        own = one["aldm"]
        yield (
            f"| {source} to {target} | {' | '.join(cells)} | {one['identity'].ssim:.2f} | {own.ssim:.2f} | "
            f"{own.coverage:.0%} |"
        )

    def mean(method: str, score: str) -> float:
        return float(np.mean([getattr(one[method], score) for one in found.values()]))

    cells = [f"{mean(m, 'psnr_db'):.1f} / {mean(m, 'gain_psnr_db'):.1f}" for m in methods]
    ssim = f"{mean('identity', 'ssim'):.2f} | {mean('aldm', 'ssim'):.2f}"
    yield f"| mean | {' | '.join(cells)} | {ssim} | {mean('aldm', 'coverage'):.0%} |"


def verdict(rows: list[ScoreRow], store: VolumeStore) -> Iterator[str]:
    """Yield a line per thing that is wanted of every pair: on how many it holds, and where it is missed most."""
    region = {record.subject_id: record.region for record in store.subjects()}
    own = [row for row in translations(rows) if row.region == region[row.subject_id]]
    scores = {(row.method, row.subject_id, row.source, row.target): row for row in own}
    model = {key[1:]: row for key, row in scores.items() if key[0] == "aldm"}
    for method, wanted in WANTED_DB.items():
        gains = {
            place: row.psnr_db - scores[method, *place].psnr_db
            for place, row in model.items()
            if (method, *place) in scores
        }
        if gains:
            worst = min(gains, key=gains.__getitem__)
            yield (
                f"- {wanted:g} dB or more above {method}: on {sum(g >= wanted for g in gains.values())} of "
                f"{len(gains)} pairs; mean {np.mean(list(gains.values())):+.1f} dB, least {gains[worst]:+.1f} dB "
                f"({worst[0]}, {worst[1]} to {worst[2]})."
            )
    held = [row.coverage for row in model.values() if np.isfinite(row.coverage)]
    if held:
        yield (
            f"- Uncertainty, which is to hold 90 % of the voxels: {np.mean(held):.0%} in the mean, {min(held):.0%} at "
            f"least; {WANTED_COVERAGE:.0%} or more on {sum(h >= WANTED_COVERAGE for h in held)} of {len(held)} pairs."
        )


def draw(store: VolumeStore, record: SubjectRecord, translator: Translator, path: Path) -> None:
    """Draw a subject: per target the source, what the model makes of it, the truth."""
    subject, lines = record.subject_id, []
    for target in record.modalities:
        source = SOURCES[target]
        if source not in record.modalities:
            continue
        volume, truth = (store.volume(subject, name) for name in (source, target))
        made = translator.translate_encoded(translator.encode(volume), source, target, seed=0)
        lines.append((source, target, volume, made.mean, truth))
    planes = (2, 0)  # axial, sagittal
    inside = np.argwhere(store.mask(subject))
    at = [int(np.median(inside[:, axis])) + (4 if axis == 0 else 0) for axis in range(3)]
    figure = Figure(figsize=(11, 2.05 * len(lines) + 0.5), facecolor="black")
    axes = figure.subplots(len(lines), 3 * len(planes) + 1, squeeze=False)
    for row, (source, target, volume, made, truth) in zip(axes, lines, strict=True):
        shown = [(source, volume), (f"{target}, made", made), (f"{target}, true", truth)]
        panels = [(f"{words}", np.take(x, at[axis], axis)) for axis in planes for words, x in shown]
        error = np.abs(np.take(made, at[2], 2) - np.take(truth, at[2], 2)) - 1  # grey like the others, from black
        for cell, (words, plane) in zip(row, [*panels[:3], ("error", error), *panels[3:]], strict=True):
            cell.imshow(plane.T[::-1], cmap="gray", vmin=-1, vmax=0.25)
            cell.set_title(words, color="white", fontsize=9, pad=2)
            cell.axis("off")
    figure.suptitle(f"{subject}: {WORDS[subject]}; synthetic, research use only", color="white", fontsize=10)
    figure.subplots_adjust(0.005, 0.005, 0.995, 1 - 0.45 / figure.get_figheight(), 0.02, 0.12)
    with atomic_path(path, overwrite=True) as temporary:
        FigureCanvasAgg(figure).print_png(temporary)


def main() -> int:
    """Prepare, evaluate, print, and where it is asked for write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, default=default_model(), help="another model than the built-in one")
    parser.add_argument("--training-store", type=Path)
    parser.add_argument("--baseline", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="write the pictures here (default: none)")
    parser.add_argument("--write", action="store_true", help="put tables and pictures into docs/")
    args = parser.parse_args()
    if not (args.folder / "table.csv").is_file():
        parser.error(f"{args.folder} is not the folder of real heads (no table.csv): make check-real DIR=FOLDER")
    with tempfile.TemporaryDirectory() as place:
        store = prepare(args.folder.resolve(), args.model, Path(place))
        words = ["evaluate", "--model", args.model, "--store", store.path, "--out", Path(place) / "scores"]
        words += ["--pictures", 0, "--log-level", "error"]
        words += [] if args.training_store is None else ["--training-store", args.training_store.resolve()]
        run(*words, *(word for one in args.baseline for word in ("--baseline", one)))
        rows = read_csv(Path(place) / "scores" / "scores.csv")
        lines = [*verdict(rows, store), ""]
        for record in store.subjects():
            lines += [f"**{record.subject_id}**, {WORDS.get(record.subject_id, '')}", "", *table(rows, record), ""]
        print("\n".join(lines))
        pictures = DOCS / "images" if args.write else args.pictures
        if pictures is not None:
            translator = Translator.load(args.model)
            for record in store.subjects():
                if record.subject_id in WORDS:
                    draw(store, record, translator, pictures / f"real_{record.subject_id}.png")
        card = [*card_lines(rows, store), ""]
    for page, block in ((PAGE, lines), (CARD, card)) if args.write else ():
        text = page.read_text(encoding="utf-8")
        begin, end = MARKS[page]
        before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
        page.write_text(before + "\n".join(block) + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
