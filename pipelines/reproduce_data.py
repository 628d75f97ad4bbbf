"""The folder of IXI that `aldm reproduce ixi` reads: what is in it, and the paper's splits."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aldm.data.layouts import SubjectFiles, discover, stopping
from aldm.data.prepare_plan import report
from aldm.data.store import SPLITS
from aldm.errors import UserError
from aldm.words import counted

LAYOUT, MODALITIES = "ixi", ("t1", "t2", "pd")
PAPER_SUBJECTS, PAPER_TRAIN, PAPER_TEST = 574, 459, 115
"""Of the supplement, section B."""
LEAST_COMPLETE = 3
"""Fewer subjects leave nobody to test on, at the paper's share of them."""
SOURCE = "https://brain-development.org/ixi-dataset"
WANTED = f"wanted IXI-T1, IXI-T2 and IXI-PD in it, unpacked, from {SOURCE} (IXI-T1.tar, IXI-T2.tar, IXI-PD.tar)"


@dataclass(frozen=True)
class Data:
    """The subjects of the folder.

    Attributes:
        counts: modality -> subjects that have it.
        complete: subjects with all three.
        incomplete: the others.
    """

    counts: dict[str, int]
    complete: tuple[str, ...]
    incomplete: tuple[str, ...]

    def volumes(self, subjects: Iterable[str] | None = None) -> int:
        """Return the number of volumes, of complete subjects where they are named."""
        return sum(self.counts.values()) if subjects is None else len(MODALITIES) * len(tuple(subjects))

    def describe(self) -> str:
        """Return a line that says what is there and what is missing."""
        counts = ", ".join(f"{self.counts[name]} {name}" for name in MODALITIES)
        text = f"{counted(len(self.complete), 'subject')} with t1, t2 and pd ({counts} in all)"
        return text + (f"; {_shown(self.incomplete)} lack one" if self.incomplete else "")


def find_subjects(folder: Path) -> Data:
    """Find IXI's subjects.

    Raises:
        UserError: there is no such folder, it holds no IXI or not all of it, or something is wrong with its tree; one
            message.
    """
    if not folder.is_dir():
        raise UserError(f"--data {folder} is {'a file' if folder.exists() else 'not there'}: {WANTED}")
    packed = sorted(path.name for path in folder.glob("IXI-*.tar*"))
    try:
        subjects, problems = discover(folder, LAYOUT)
    except UserError as error:
        unpack = f"; unpack {', '.join(packed)} first" if packed else ""
        raise UserError(f"{error}; --data: {WANTED}{unpack}") from error
    if wrong := stopping(problems):
        raise UserError(report(folder, wrong))
    data = _data(subjects)
    missing = [name for name in MODALITIES if not data.counts[name]]
    if missing or len(data.complete) < LEAST_COMPLETE:
        lacking = f"no {' and no '.join(missing)}" if missing else "too few subjects with all of t1, t2 and pd"
        unpack = f"; {', '.join(packed)} may not be unpacked yet" if packed else ""
        raise UserError(
            f"--data {folder} has {lacking}: {data.describe()}, wanted at least {LEAST_COMPLETE} complete ones (the "
            f"paper has {PAPER_SUBJECTS}); {WANTED}{unpack}"
        )
    return data


def _data(subjects: Sequence[SubjectFiles]) -> Data:
    counts = Counter(name for subject in subjects for name in subject.volumes)
    complete = {subject.subject_id for subject in subjects if set(MODALITIES) <= set(subject.volumes)}
    every = [subject.subject_id for subject in subjects]
    return Data(
        {name: counts[name] for name in MODALITIES},
        tuple(name for name in every if name in complete),
        tuple(name for name in every if name not in complete),
    )


def paper_splits(data: Data) -> dict[str, str]:
    """Return subject -> split, in the paper's sizes: 459 for training, 115 for the test.

    The paper does not say which subjects. Here the complete ones are ordered by the SHA-256 of their names: the first
    115 are the test split, the next 459 the training split. The paper has no validation split, by which the best
    checkpoint is chosen: whoever is left is in it, subjects that lack a modality too. Where there are fewer than 574
    complete subjects the test split is the same share of them.
    """
    ranked = sorted(data.complete, key=lambda name: hashlib.sha256(name.encode()).digest())
    used = min(len(ranked), PAPER_SUBJECTS)
    test = round(used * PAPER_TEST / PAPER_SUBJECTS)
    splits = dict.fromkeys(data.incomplete, "validation")
    for index, name in enumerate(ranked):
        splits[name] = "test" if index < test else "train" if index < used else "validation"
    return dict(sorted(splits.items()))


def splits_csv(splits: dict[str, str]) -> str:
    """Return the text of the file that `aldm prepare --splits` reads."""
    return "".join(f"{name},{split}\n" for name, split in {"subject_id": "split", **splits}.items())


def splits_text(data: Data, splits: dict[str, str]) -> str:
    """Say whether the split sizes are the paper's, and if not why."""
    sizes = Counter(splits.values())
    ours = ", ".join(f"{sizes[split]} {split}" for split in SPLITS)
    if (sizes["train"], sizes["test"]) == (PAPER_TRAIN, PAPER_TEST):
        verdict = f"the paper's sizes, {PAPER_TRAIN} and {PAPER_TEST}"
    else:
        verdict = (
            f"NOT the paper's {PAPER_TRAIN} and {PAPER_TEST}: it has {PAPER_SUBJECTS} subjects and here are "
            f"{len(data.complete)} complete ones, so the test split is the same share of these"
        )
    if sizes["validation"]:
        extra = sizes["validation"] - len(data.incomplete)
        parts = [f"{extra} beyond the paper's {PAPER_SUBJECTS}"] if extra else []
        parts += [f"{len(data.incomplete)} that lack a modality"] if data.incomplete else []
        chosen = f"Validation: {' and '.join(parts)}"
    else:
        chosen = "Nobody is left for validation, so the last checkpoint of each training counts"
    return f"{ours}: {verdict}. Which subjects, the paper does not say: by the SHA-256 of their names. {chosen}"


def _shown(names: Sequence[str]) -> str:
    return f"{counted(len(names), 'subject')} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
