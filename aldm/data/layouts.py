"""Where the files of a data set lie: BraTS 2021, IXI, BIDS or a CSV table -> the files of each subject and its split.

Nothing is opened here but the CSV files. What is wrong with a tree is collected, not raised, so that it can be reported
together with what is wrong inside the files (integrity.py).
"""

import csv
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from aldm.data.modalities import MODALITIES, sort_modalities
from aldm.data.nifti_header import is_nifti_name
from aldm.data.store import SPLITS
from aldm.errors import UserError

LAYOUTS = ("brats", "ixi", "bids", "table")
TABLE_COLUMNS = ("subject_id", "modality", "path", "mask", "seg")

_BRATS_NAME = re.compile(r"(?P<subject>.+)_(?P<role>t1|t1ce|t2|flair|seg)\.nii(\.gz)?")
_IXI_NAME = re.compile(r"(?P<subject>IXI\d+-\w+-\w+)-(?P<role>T1|T2|PD)\.nii(\.gz)?")
_BIDS_NAME = re.compile(
    r"(?P<entities>sub-[A-Za-z0-9]+(_[a-z]+-[A-Za-z0-9]+)*)_(?P<suffix>T1w|T2w|PDw|FLAIR)\.nii(\.gz)?"
)
_BIDS_ROLES = {"T1w": "t1", "T2w": "t2", "PDw": "pd", "FLAIR": "flair"}
_SUBJECT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_WANTED = {
    "brats": "BraTS2021_00000/BraTS2021_00000_t1.nii.gz (and t1ce, t2, flair, seg)",
    "ixi": "IXI-T1/IXI002-Guys-0828-T1.nii.gz (and T2, PD)",
    "bids": "sub-01/anat/sub-01_T1w.nii.gz (and T2w, PDw, FLAIR, ce-*_T1w)",
    "table": f"a CSV file with the columns {', '.join(TABLE_COLUMNS)}",
}


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file of the data set."""

    path: Path
    message: str


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

    def files(self) -> dict[str, Path]:
        """Return every file under its role: a modality, mask or seg."""
        extra = {"mask": self.mask, "seg": self.seg}
        return {**self.volumes, **{role: path for role, path in extra.items() if path is not None}}


def split_of(subject_id: str) -> str:
    """Return train, validation or test (80 / 10 / 10) from a hash of the subject id alone.

    The same on every machine, and the same after other subjects come or go.
    """
    bucket = int.from_bytes(hashlib.sha256(subject_id.encode()).digest()[:8], "big") % 100
    return "train" if bucket < 80 else "validation" if bucket < 90 else "test"


def discover(source: str | Path, layout: str) -> tuple[list[SubjectFiles], list[Problem]]:
    """Find the subjects of a data set, sorted by subject_id, and what is wrong with its tree.

    Splits: in `brats`, a folder below `source` with "validation" in its name is the test split, as in the paper, and
    the subjects of one with "training" in its name are train or validation (90 / 10, by split_of with its test share in
    train); everything else goes by split_of. In `bids` all sessions of a participant share a split.

    Raises:
        UserError: the source is missing or of the wrong kind, or no file in it has a name of this layout.
    """
    source = Path(source)
    if layout not in LAYOUTS:
        raise UserError(f"layout is {layout!r}, wanted one of: {', '.join(LAYOUTS)}")
    if not source.exists():
        raise UserError(f"{source} does not exist; wanted {_WANTED[layout]}")
    if source.is_dir() == (layout == "table"):
        kind = "folder" if source.is_dir() else "file"
        raise UserError(f"{source} is a {kind}; layout {layout} wants {_WANTED[layout]}")
    problems: list[Problem] = []
    if layout == "table":
        found = list(_table_rows(source, problems))
    else:
        find = {"brats": _brats_files, "ixi": _ixi_files, "bids": _bids_files}[layout]
        found = list(find(source, _nifti_names(source, problems)))
    subjects = _grouped(found, problems)
    if not subjects and not problems:
        raise UserError(f"{source}: no file has a name of layout {layout}; wanted names like {_WANTED[layout]}")
    return subjects, problems


def _nifti_names(source: Path, problems: list[Problem]) -> list[Path]:
    """Return what has a NIfTI file's name below a folder, sorted; a folder that cannot be read is a problem."""

    def unreadable(error: OSError) -> None:
        problems.append(Problem(Path(error.filename), f"the folder cannot be read: {error.strerror}"))

    names = []
    for folder, folders, files in os.walk(source, onerror=unreadable):
        names += [Path(folder, name) for name in (*folders, *files) if is_nifti_name(name) and not name.startswith(".")]
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
    """A modality, mask or seg."""
    path: Path
    split: str


def _brats_files(source: Path, names: Iterable[Path]) -> Iterator[_Found]:
    for path in names:
        match = _BRATS_NAME.fullmatch(path.name)
        if match and match["subject"] == path.parent.name:
            folders = " ".join(path.relative_to(source).parts[:-2]).lower()
            split = split_of(match["subject"])
            if "validation" in folders:
                split = "test"
            elif "training" in folders and split == "test":
                split = "train"
            yield _Found(match["subject"], match["role"], path, split)


def _ixi_files(source: Path, names: Iterable[Path]) -> Iterator[_Found]:
    for path in names:
        match = _IXI_NAME.fullmatch(path.name)
        if match:
            yield _Found(match["subject"], match["role"].lower(), path, split_of(match["subject"]))


def _bids_files(source: Path, names: Iterable[Path]) -> Iterator[_Found]:
    for path in names:
        match = _BIDS_NAME.fullmatch(path.name)
        outside = {"derivatives", "sourcedata", "code"} & set(path.relative_to(source).parts)
        if not match or outside or path.parent.name != "anat":
            continue
        entities = dict(entity.split("-", 1) for entity in match["entities"].split("_"))
        role = _BIDS_ROLES[match["suffix"]]
        if "ce" in entities:
            if role != "t1":
                continue  # a contrast agent in another sequence is none of the modalities
            role = "t1ce"
        session = f"_ses-{entities['ses']}" if "ses" in entities else ""
        participant = f"sub-{entities['sub']}"
        yield _Found(participant + session, role, path, split_of(participant))


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
            yield _Found(subject_id, modality, source.parent / row["path"], split)
            for role in ("mask", "seg"):
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
        repeated_extra = item.role in ("mask", "seg") and other.path == item.path
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
        extra = {role: paths.pop(role, None) for role in ("mask", "seg")}
        if not paths:
            first = next(iter(roles.values()))
            problems.append(Problem(first.path, f"subject {subject_id} has no volume of any modality"))
            continue
        volumes = {name: paths[name] for name in sort_modalities(paths)}
        splits = {item.split for item in roles.values()}
        subjects.append(SubjectFiles(subject_id, min(splits), volumes, mask=extra["mask"], seg=extra["seg"]))
    return subjects
