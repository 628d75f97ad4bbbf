"""What a file's name, or the words of its header, say of its modality: the one vocabulary for every way in.

A name may say one modality, several (then nobody can know without being told), none, or something that is no volume of
a modality at all: a label map, a parameter map, another sequence, a result of this program.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aldm.data.modalities import MODALITIES, sort_modalities
from aldm.errors import UserError

SaidBy = Literal["request", "file name", "header"]
"""Who said what modality a volume is."""
ALIASES: dict[str, frozenset[str]] = {
    "t1": frozenset({"t1", "t1w", "t1n", "mprage", "bravo", "fspgr", "t1mprage", "t1mpr", "t1spgr"}),
    "t1ce": frozenset(
        {"t1ce", "t1c", "t1gd", "t1post", "t1wce", "t1wc", "t1wgd", "t1wpost", "t1contrast", "t1km", "t1gad", "t1cw"}
    ),
    "t2": frozenset({"t2", "t2w", "t2n", "t2tse", "t2fse"}),
    "flair": frozenset({"flair", "t2flair", "t2wflair", "t2f", "tirm"}),
    "pd": frozenset({"pd", "pdw"}),
}
"""Modality -> words of names that mean it, lower case. BraTS 2023 and later write t1n, t1c, t2w and t2f."""
SEG_WORDS = frozenset({"seg", "segm", "segmentation", "dseg"})
"""Words for a map of labels that belongs to a subject's volumes."""
TISSUE_WORDS = frozenset({"tissue", "tissues", "pveseg"})
"""Words for a map of tissues that belongs to a subject's volumes. FSL FAST writes pveseg."""

_WEAK = {"mpr": "t1"}  # a T1 (MP-RAGE), unless another word says what was reformatted
_OTHER = {
    "a segmentation or a mask": SEG_WORDS
    | TISSUE_WORDS
    | {"aseg", "aparc", "probseg", "parc", "parcellation", "label", "labels", "labelmap", "mask", "brainmask", "masks"}
    | {"lesion", "lesions", "roi"},
    "a map": frozenset({"map", "t1map", "t2map", "pdmap", "r1map", "r2map", "t2starmap", "r2starmap", "rho", "t1rho"})
    | {"adc", "fa", "cbf", "cbv", "mtt", "qsm", "prob", "bias", "biasfield", "fieldmap", "warp", "jacobian", "std"},
    "another sequence": frozenset({"swi", "swan", "t2star", "t2starw", "star", "t2s", "stir", "dwi", "dti", "bold"})
    | {"fmri", "asl", "perf", "dsc", "dce", "mra", "tof", "angio", "mrv", "phase", "scout", "localizer", "localiser"},
    "a synthetic result": frozenset({"synthetic"}),
}
_CERTAIN_CONTRAST = frozenset({"gd", "gad", "gadolinium", "postcontrast", "postgd", "postgad", "gadovist", "dotarem"})
_CONTRAST = _CERTAIN_CONTRAST | {"ce", "post", "contrast", "km", "enhanced"}
_NO_CONTRAST = frozenset({"pre", "precontrast", "pregd", "native", "nativ", "noncontrast", "unenhanced"})
_NEGATIONS = frozenset({"pre", "no", "non", "without", "wo"})
_AFTER_WHAT = frozenset(
    {"op", "operation", "operative", "surgery", "surgical", "resection", "treatment", "therapy", "rt", "radiation"}
)  # "post surgery" is no contrast agent
BIDS_SUFFIXES = {"T1w": "t1", "T2w": "t2", "PDw": "pd", "FLAIR": "flair"}
_BIDS_NAME = re.compile(r"(?P<entities>sub-[A-Za-z0-9]+(_[a-z]+-[A-Za-z0-9]+)*)_(?P<suffix>[A-Za-z0-9]+)")
_WHO = re.compile(r"(?<![A-Za-z0-9])(sub|ses)-[A-Za-z0-9]+")


@dataclass(frozen=True)
class NameReading:
    """What a name says."""

    guesses: tuple[str, ...] = ()
    """Modalities that it may mean, in the vocabulary's order: one, or several where it is unsure, or none."""
    refused: str = ""
    """Where it says that this is no volume of a modality: what it says, such as "a map ('map')"."""

    @property
    def modality(self) -> str | None:
        """The modality, where the name says one and no other."""
        return self.guesses[0] if len(self.guesses) == 1 else None


@dataclass(frozen=True)
class BidsName:
    """A name as BIDS spells it: sub-01_ses-a_run-2_T1w."""

    entities: dict[str, str]
    suffix: str


def role_of_word(word: str) -> str | None:
    """Return what one word of a name means: a modality, seg or tissue for a map of labels; None where it means none."""
    if word.lower() in SEG_WORDS:
        return "seg"
    if word.lower() in TISSUE_WORDS:
        return "tissue"
    return next((modality for modality, aliases in ALIASES.items() if word.lower() in aliases), None)


def bids_name(name: str) -> BidsName | None:
    """Return the parts of a BIDS file name (its ending may be missing); None where it is none."""
    match = _BIDS_NAME.fullmatch(_stem(name))
    if match is None:
        return None
    return BidsName(dict(entity.split("-", 1) for entity in match["entities"].split("_")), match["suffix"])


def read_name(text: str) -> NameReading:
    """Return what a file's name, a folder's name or a header's description says.

    In a BIDS name the suffix decides, `ce-` says whether a contrast agent was given, and `sub-` and `ses-` never decide
    (Gorgolewski et al. 2016, The brain imaging data structure). Elsewhere the words between other characters do.
    """
    bids = bids_name(text)
    if bids is not None and bids.suffix in BIDS_SUFFIXES:
        return _read_bids(bids)
    plain = re.sub(r"(?i)(t1w?)\s*\+\s*c\b", r"t1ce", _WHO.sub(" ", _stem(text)))
    plain = re.sub(r"(?i)t2w?\*", "t2star", plain)
    words = [word for word in re.split(r"[^a-z0-9]+", plain.lower()) if word]
    refused = _refused(words)
    if refused:
        return NameReading(refused=refused)
    found = {name for name, aliases in ALIASES.items() if aliases.intersection(words)}
    if not found:
        found = {_WEAK[word] for word in words if word in _WEAK}
    if found == {"flair", "t2"}:  # T2-weighted FLAIR
        found = {"flair"}
    if "t1" in found and "t1ce" not in found:
        found = (found - {"t1"}) | _with_contrast(words)
    return NameReading(sort_modalities(found))


def check_source(name: str, source: str) -> None:
    """Refuse a volume whose name says that it is something else than a volume of the modality `source`.

    The message is about the file and does not name it.

    Raises:
        NotAVolume: the name says a map, a mask or the like, or another modality.
    """
    reading = read_name(name)
    if reading.refused:
        raise NotAVolume(f"by its name it is {reading.refused}, wanted a volume of {source}: rename it if it is one")
    if reading.guesses and source not in reading.guesses:
        raise NotAVolume(
            f"by its name it is {' or '.join(reading.guesses)}, and `source` is {source}: give what it is, or rename it"
        )


def choose_source(name: str, header: str, known: Sequence[str] = MODALITIES) -> tuple[str, SaidBy]:
    """Return the modality that a volume's name says, or else its header, and which of the two: file name or header.

    The message is about the volume and does not name it.

    Args:
        name: of the file or folder.
        header: words of its header, such as the Series Description.
        known: modalities that may come out.

    Raises:
        UserError: something else than a volume of a modality, several modalities (they are listed), none, or one that
            is not known.
    """
    choices = ", ".join(known)
    guesses: tuple[str, ...] = ()
    texts: dict[SaidBy, str] = {"file name": name, "header": header}
    for place, text in texts.items():
        reading = read_name(text)
        if reading.refused:
            raise NotAVolume(f"by its {place} it is {reading.refused}, wanted a volume of {choices}")
        if guesses and not set(reading.guesses) & set(guesses):
            continue  # the name is unsure, and the header does not help
        guesses = tuple(guess for guess in guesses if guess in reading.guesses) or reading.guesses
        if len(guesses) == 1:
            if guesses[0] not in known:
                raise NotAVolume(f"by its {place} it is {guesses[0]}, wanted one of {choices}")
            return guesses[0], place
    if guesses:
        raise UserError(f"its name may mean {' or '.join(guesses)}: give `source`, or rename it")
    raise UserError(f"neither its name nor its header says the modality: give `source`, one of {choices}")


class NotAVolume(UserError):
    """By its name or header a file is none of the volumes that are wanted."""


def _read_bids(name: BidsName) -> NameReading:
    modality = BIDS_SUFFIXES[name.suffix]
    described = [name.entities.get(key, "").lower() for key in ("desc", "label", "rec")]
    refused = _refused(described)
    if refused:
        return NameReading(refused=refused)
    if name.entities.get("part", "mag") != "mag":
        return NameReading(refused=f"part of a complex image ('part-{name.entities['part']}')")
    if "ce" in name.entities:
        if modality != "t1":  # a contrast agent in another sequence is none of the modalities
            return NameReading(refused=f"a {modality} after contrast agent ('ce-{name.entities['ce']}')")
        return NameReading(("t1ce",))
    if modality == "t1" and name.entities.get("acq", "").lower() in _CONTRAST | ALIASES["t1ce"]:
        return NameReading(("t1", "t1ce"))  # BIDS says so with ce-
    return NameReading((modality,))


def _refused(words: Sequence[str]) -> str:
    """Return what the words say where it is no volume of a modality, and the word."""
    for word in words:
        for kind, known in _OTHER.items():
            if word in known:
                return f"{kind} ('{word}')"
    return ""


def _with_contrast(words: Sequence[str]) -> set[str]:
    """Return whether the words around a T1 say that a contrast agent was given: t1ce, t1, or both where unsure."""
    said, perhaps = False, False
    for i, word in enumerate(words):
        before = words[i - 1] if i else ""
        after = words[i + 1] if i + 1 < len(words) else ""
        if word in _NO_CONTRAST or (word in _CONTRAST and before in _NEGATIONS):
            return {"t1"}
        if word not in _CONTRAST or (word == "post" and after in _AFTER_WHAT):
            continue
        beside = {before, after}
        perhaps = True
        said = said or word in _CERTAIN_CONTRAST or bool(beside & (ALIASES["t1"] | _CONTRAST))
    return {"t1ce"} if said else {"t1", "t1ce"} if perhaps else {"t1"}


def _stem(text: str) -> str:
    """Return a file name without .nii or .nii.gz."""
    return re.sub(r"(?i)\.nii(\.gz)?$", "", text)
