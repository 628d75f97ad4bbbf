"""Where the files of a data set lie: BraTS, IXI, BIDS or a CSV table -> the files of each subject and its split.

Nothing is opened here but the CSV files. What is wrong with a tree is collected, not raised, so that it can be reported
together with what is wrong inside the files (integrity.py).
"""

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from aldm.data.modalities import MODALITIES, sort_modalities
from aldm.data.naming import BIDS_SUFFIXES, BidsName, bids_name, check_source, read_name, role_of_word
from aldm.data.nifti_header import is_input_name
from aldm.data.store import SPLITS
from aldm.errors import UserError

LAYOUTS = ("brats", "ixi", "bids", "table")
LABEL_MAPS = ("mask", "seg", "tissue")
"""Roles of the files that hold labels: what is patient, lesions, and tissues (1 CSF, 2 grey, 3 white matter)."""
TABLE_COLUMNS = ("subject_id", "modality", "path", *LABEL_MAPS, "series")

FIRST_RUN, LAST_RUN = "first", "last"
_BRATS_NAME = re.compile(r"(?P<subject>.+)[_-](?P<word>[A-Za-z0-9]+)\.nii(\.gz)?")
_BRATS_SCAN = re.compile(r"(?P<patient>BraTS-[A-Za-z]+-\d+)-\d+")
_IXI_NAME = re.compile(r"(?P<subject>IXI\d+-\w+-\w+)-(?P<role>T1|T2|PD)\.nii(\.gz)?")
_SUBJECT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_WANTED = {
    "brats": "BraTS2021_00000/BraTS2021_00000_t1.nii.gz (and t1ce, t2, flair, seg), or -t1n, -t1c, -t2w, -t2f, -seg",
    "ixi": "IXI-T1/IXI002-Guys-0828-T1.nii.gz (and T2, PD)",
    "bids": "sub-01/anat/sub-01_T1w.nii.gz (and T2w, PDw, FLAIR, ce-*_T1w)",
    "table": f"a CSV file with the columns {', '.join(TABLE_COLUMNS)}",
}


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file of the data set."""

    path: Path
    message: str
    stops: bool = True
    """Whether it has to be fixed first; otherwise it is only said."""


def stopping(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems that have to be fixed first."""
    return [problem for problem in problems if problem.stops]


@dataclass(frozen=True)
class SubjectFiles:
    """The files of one subject."""

    subject_id: str
    split: str
    """train, validation or test."""
    volumes: dict[str, Path] = field(default_factory=dict)
    """Modality -> file, in the vocabulary's order."""
    mask: Path | None = None
    seg: Path | None = None
    series: dict[str, str] = field(default_factory=dict)
    """Modality -> which DICOM series of its path, where that is said."""
    tissue: Path | None = None

    def files(self) -> dict[str, Path]:
        """Return every file under its role: a modality, or one of LABEL_MAPS."""
        extra = {role: getattr(self, role) for role in LABEL_MAPS}
        return {**self.volumes, **{role: path for role, path in extra.items() if path is not None}}


def split_of(subject_id: str) -> str:
    """Return train, validation or test (80 / 10 / 10) from a hash of the subject id alone.

    The same on every machine, and the same after other subjects come or go.
    """
    bucket = int.from_bytes(hashlib.sha256(subject_id.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 80 else "validation" if bucket < 90 else "test"


def discover(source: str | Path, layout: str, run: str = FIRST_RUN) -> tuple[list[SubjectFiles], list[Problem]]:
    """Find the subjects of a data set, sorted by subject_id, and what is wrong with its tree or worth saying.

    Splits: in `brats`, a folder below `source` with "validation" in its name is the test split, as in the paper, and
    the subjects of one with "training" in its name are train or validation (90 / 10, by split_of with its test share in
    train); everything else goes by split_of. All scans of a BraTS patient and all sessions of a BIDS participant share
    a split.

    Args:
        source: folder of the data set, or the CSV file of layout table.
        layout: brats, ixi, bids or table.
        run: which of several images of one modality and session counts in `bids`: first, last, or a number. Those with
            the fewest entities beside `run-` go first, then the lowest run (a name without one is run 0).

    Raises:
        UserError: the source is missing or of the wrong kind, no file in it has a name of this layout, or no such run.
    """
    source = Path(source)
    if layout not in LAYOUTS:
        raise UserError(f"layout is {layout!r}, wanted one of: {', '.join(LAYOUTS)}")
    if run not in (FIRST_RUN, LAST_RUN) and not re.fullmatch(r"[0-9]{1,4}", run):
        raise UserError(f"`run` is {run!r}, wanted {FIRST_RUN}, {LAST_RUN} or a number such as 2")
    if run != FIRST_RUN and layout != "bids":
        raise UserError(f"`run` is {run}, and layout {layout} has no runs: leave it out")
    if not source.exists():
        raise UserError(f"{source} does not exist; wanted {_WANTED[layout]}")
    if source.is_dir() == (layout == "table"):
        kind = "folder" if source.is_dir() else "file"
        raise UserError(f"{source} is a {kind}; layout {layout} wants {_WANTED[layout]}")
    problems: list[Problem] = []
    if layout == "table":
        found = list(_table_rows(source, problems))
    else:
        names = _nifti_names(source, problems)
        if layout == "bids":
            found = list(_bids_files(source, names, run, problems))
        else:
            found = list({"brats": _brats_files, "ixi": _ixi_files}[layout](source, names))
        used = {item.path for item in found} | {problem.path for problem in problems}
        problems += _passed_over(layout, [path for path in names if path not in used], found)
    subjects = _grouped(found, problems)
    if not subjects and not stopping(problems):
        raise UserError(f"{source}: no file has a name of layout {layout}; wanted names like {_WANTED[layout]}")
    return subjects, problems


def _nifti_names(source: Path, problems: list[Problem]) -> list[Path]:
    """Return what has a NIfTI file's name below a folder, sorted; a folder that cannot be read is a problem."""

    def unreadable(error: OSError) -> None:
        problems.append(Problem(Path(error.filename), f"the folder cannot be read: {error.strerror}"))

    names = []
    for folder, folders, files in os.walk(source, onerror=unreadable):
        names += [Path(folder, name) for name in (*folders, *files) if is_input_name(name)]
    return sorted(names)


def apply_splits(subjects: Iterable[SubjectFiles], file: str | Path) -> list[SubjectFiles]:
    """Return the subjects with the splits of a CSV file of subject_id, split; it wins over everything else.

    Raises:
        UserError: the file is missing or has other columns, a split that is not train, validation or test, a subject
            twice, or not every subject.
    """
    file = Path(file)
    splits: dict[str, str] = {}
    for line, row in _csv_rows(file, required=("subject_id", "split"), known=("subject_id", "split")):
        if row["split"] not in SPLITS:
            raise UserError(f"{file} line {line}: split is {row['split']!r}, wanted one of {', '.join(SPLITS)}")
        if splits.setdefault(row["subject_id"], row["split"]) != row["split"]:
            raise UserError(f"{file} line {line}: subject {row['subject_id']} is in two splits")
    subjects = list(subjects)
    missing = [subject.subject_id for subject in subjects if subject.subject_id not in splits]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(f"{file} gives no split for {len(missing)} of {len(subjects)} subjects ({shown}): add them")
    return [replace(subject, split=splits[subject.subject_id]) for subject in subjects]


@dataclass(frozen=True)
class _Found:
    """One file (or one row of a table) of a subject."""

    subject_id: str
    role: str
    """A modality, or one of LABEL_MAPS."""
    path: Path
    split: str
    series: str = ""
    """Which DICOM series of the path; empty where it holds one, or is no DICOM."""


def _brats_files(source: Path, names: Iterable[Path]) -> Iterator[_Found]:
    for path in names:
        match = _BRATS_NAME.fullmatch(path.name)
        role = role_of_word(match["word"]) if match else None
        if match and role and match["subject"] == path.parent.name:
            folders = " ".join(path.relative_to(source).parts[:-2]).lower()
            scan = _BRATS_SCAN.fullmatch(match["subject"])
            split = split_of(scan["patient"] if scan else match["subject"])
            if "validation" in folders:
                split = "test"
            elif "training" in folders and split == "test":
                split = "train"
            yield _Found(match["subject"], role, path, split)


def _ixi_files(source: Path, names: Iterable[Path]) -> Iterator[_Found]:
    for path in names:
        match = _IXI_NAME.fullmatch(path.name)
        if match:
            yield _Found(match["subject"], match["role"].lower(), path, split_of(match["subject"]))


def _bids_files(source: Path, names: Iterable[Path], run: str, problems: list[Problem]) -> Iterator[_Found]:
    images: dict[tuple[str, str, str], list[tuple[BidsName, Path]]] = {}
    for path in names:
        name, modality = bids_name(path.name), read_name(path.name).modality
        if _is_outside(source, path) or name is None or name.suffix not in BIDS_SUFFIXES or modality is None:
            continue
        session = f"_ses-{name.entities['ses']}" if "ses" in name.entities else ""
        images.setdefault((f"sub-{name.entities['sub']}", session, modality), []).append((name, path))
    for (participant, session, modality), several in images.items():
        several.sort(key=lambda image: _preference(image[0], run))
        taken, first = several[0]
        rule = {FIRST_RUN: "the lowest run", LAST_RUN: "the highest run"}.get(run, f"run {run} where there is one")
        for name, path in several:
            if name == taken:  # two where one is .nii and one .nii.gz
                yield _Found(participant + session, modality, path, split_of(participant))
                continue
            words = f"passed over: {first.name} is taken as {modality} of {participant + session}"
            words += f" (of several the fewest entities, then {rule}; `run` chooses, and a table can name any)"
            problems.append(Problem(path, words, stops=False))


def _is_outside(source: Path, path: Path) -> bool:
    """Whether a file of a BIDS tree is none of its anatomical images as they were scanned."""
    kept_apart = {"derivatives", "sourcedata", "code"} & set(path.relative_to(source).parts)
    return bool(kept_apart) or path.parent.name != "anat"


def _preference(name: BidsName, run: str) -> tuple[bool, int, int, str]:
    """Return what sorts the images of one modality and session, the one to be taken first."""
    number = int(re.sub(r"\D", "", name.entities.get("run", "")) or 0)
    another = run.isdigit() and number != int(run)
    others = {key: value for key, value in name.entities.items() if key != "run"}
    return another, len(others), -number if run == LAST_RUN else number, "_".join(others.values())


def _passed_over(layout: str, names: Iterable[Path], found: Sequence[_Found]) -> list[Problem]:
    """Say which NIfTI files are not used because of their names: one by one where a subject may lack them."""
    subjects = {item.path.parent: item.subject_id for item in found if layout == "brats"}
    with_seg = {item.subject_id for item in found if item.role == "seg"}
    said, others = [], []
    for path in names:
        reading, subject = read_name(path.name), subjects.get(path.parent)
        if subject is not None:
            words = "passed over, its name is none of layout brats"
            if subject not in with_seg and reading.refused:
                name = f"{subject}_seg{path.name[path.name.lower().rindex('.nii') :]}"
                words += f"; if it is the segmentation of {subject}, rename it to {name}"
        elif layout == "bids" and path.parent.name == "anat" and len(reading.guesses) > 1:
            words = (
                f"passed over, its name may mean {' or '.join(reading.guesses)}: say it with ce-, or name it in a table"
            )
        else:
            others.append(path)
            continue
        said.append(Problem(path, words, stops=False))
    if others:
        more = f" (and {len(others) - 1} more such files)" if len(others) > 1 else ""
        said.append(Problem(others[0], f"passed over, its name is none of layout {layout}{more}", stops=False))
    return said


def _table_rows(source: Path, problems: list[Problem]) -> Iterator[_Found]:
    for line, row in _csv_rows(source, required=("subject_id", "modality", "path"), known=TABLE_COLUMNS):
        subject_id, modality = row["subject_id"], row["modality"]
        if not _SUBJECT_ID.fullmatch(subject_id):
            problems.append(
                Problem(source, f"line {line}: subject_id {subject_id!r}, wanted letters, digits, '.', '_', '-'")
            )
        elif modality not in MODALITIES:
            problems.append(
                Problem(source, f"line {line}: unknown modality {modality!r}, known are {', '.join(MODALITIES)}")
            )
        elif not row["path"]:
            problems.append(Problem(source, f"line {line}: no path"))
        else:
            split = split_of(subject_id)
            try:
                check_source(Path(row["path"]).name, modality)
            except UserError as error:
                words = f"taken as {modality}, as line {line} of {source.name} says; {error}"
                problems.append(Problem(source.parent / row["path"], words, stops=False))
            yield _Found(subject_id, modality, source.parent / row["path"], split, row.get("series", ""))
            for role in LABEL_MAPS:
                if row.get(role):
                    yield _Found(subject_id, role, source.parent / row[role], split)


def _csv_rows(file: Path, required: tuple[str, ...], known: tuple[str, ...]) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Yield (line number, row) of a CSV file whose header has these columns."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, restval="", skipinitialspace=True)
            columns = tuple(reader.fieldnames or ())
            if not set(required) <= set(columns) <= set(known):
                raise UserError(
                    f"{file}: the columns are {', '.join(columns) or 'missing'}, wanted {', '.join(required)}"
                    + ("".join(f" and perhaps {name}" for name in known if name not in required))
                )
            for row in reader:
                if None in row:
                    raise UserError(f"{file} line {reader.line_num}: more values than columns")
                yield reader.line_num, {key: value.strip() for key, value in row.items()}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as CSV: {error}") from error


def _grouped(found: Iterable[_Found], problems: list[Problem]) -> list[SubjectFiles]:
    """Collect the files of each subject; a role with two files is a problem, as is a subject without a modality."""
    by_subject: dict[str, dict[str, _Found]] = {}
    for item in found:
        roles = by_subject.setdefault(item.subject_id, {})
        other = roles.setdefault(item.role, item)
        repeated_extra = item.role in LABEL_MAPS and other.path == item.path
        if other is not item and not repeated_extra:
            problems.append(
                Problem(
                    item.path,
                    f"a second {item.role} of subject {item.subject_id}, beside {other.path}: "
                    "remove one, or say which with `layout` table",
                )
            )
        elif next(iter(roles.values())).split != item.split:
            problems.append(Problem(item.path, f"subject {item.subject_id} is in a training and a validation folder"))
    subjects = []
    for subject_id, roles in sorted(by_subject.items()):
        paths = {role: item.path for role, item in roles.items()}
        extra = {role: paths.pop(role, None) for role in LABEL_MAPS}
        if not paths:
            first = next(iter(roles.values()))
            problems.append(Problem(first.path, f"subject {subject_id} has no volume of any modality"))
            continue
        volumes = {name: paths[name] for name in sort_modalities(paths)}
        splits = {item.split for item in roles.values()}
        series = {name: roles[name].series for name in volumes if roles[name].series}
        subjects.append(SubjectFiles(subject_id, min(splits), volumes, series=series, **extra))
    return subjects
