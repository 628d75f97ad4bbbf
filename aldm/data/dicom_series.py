"""Which volumes the DICOM files of a folder make, and which of them is meant."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aldm.data.dicom_files import Slice
from aldm.errors import UserError

_SHOWN = 20
_REPEATED = {
    "TemporalPositionIndex": "temporal position",
    "TemporalPositionIdentifier": "temporal position",
    "EffectiveEchoTime": "echo time",
    "EchoTime": "echo time",
    "EchoNumbers": "echo",
    "InversionTimes": "inversion time",
    "InversionTime": "inversion time",
    "DiffusionBValue": "b-value",
    "DiffusionGradientOrientation": "gradient direction",
    "NominalCardiacTriggerDelayTime": "trigger delay",
    "TriggerTime": "trigger delay",
    "ComplexImageComponent": "component",
    "FrameType": "type",
    "ImageType": "type",
    "AcquisitionNumber": "acquisition",
}
"""Attributes in which slices at one place differ when a series holds several volumes."""
_WORDS = re.compile(
    r"\d+|\w{1,2}|[MPRI]_(FFE|SE|IR|B0|B1)|FFE|ORIGINAL|DERIVED|PRIMARY|SECONDARY|MAGNITUDE|PHASE|REAL|IMAGINARY|MIXED|NONE|"
    "WATER|FAT|IN_PHASE|OUT_PHASE|OPP_PHASE"
)
"""Codes that messages may repeat; other words may name anybody."""


@dataclass(frozen=True, eq=False)
class SeriesVolume:
    """One volume of a folder: a series, or one of the volumes that a series holds."""

    address: str
    """What chooses it: the Series Number, or #1, #2 ... where that is missing or doubled; .1, .2 ... for its parts."""
    uid: str = field(repr=False)
    """Series Instance UID."""
    description: str = field(repr=False)
    """Series Description: free text, which may name anybody."""
    modality: str
    size: tuple[int, int, int]
    """Columns, rows, slices; 0 where the headers do not say."""
    part: str
    """What tells it from other volumes of its series, such as "echo time 20"; empty where it is the only one."""
    slices: tuple[Slice, ...] = field(repr=False)

    def line(self, descriptions: bool = True) -> str:
        """Return it as a line of a list."""
        words = [self.description.strip()[:64]] if descriptions and self.description.strip() else []
        words += [self.part] if self.part else []
        return f"{self.address}: {', '.join([*words, self.modality, 'x'.join(map(str, self.size))])}"


def volumes_of(slices: Iterable[Slice]) -> list[SeriesVolume]:
    """Return the volumes that the slices make, by Series Number."""
    series: dict[str, list[Slice]] = {}
    for item in slices:
        series.setdefault(str(item.header.get("SeriesInstanceUID")), []).append(item)
    numbers = [_series_number(items) for items in series.values()]
    ordered = sorted(
        zip(series.items(), numbers, strict=True), key=lambda one: (one[1] is None, one[1] or 0, one[0][0])
    )
    volumes = []
    for rank, ((uid, items), number) in enumerate(ordered, start=1):
        address = f"#{rank}" if number is None or numbers.count(number) > 1 else str(number)
        header = items[0].header
        parts = _parts(items)
        for index, (part, members) in enumerate(parts, start=1):
            volumes.append(
                SeriesVolume(
                    address=f"{address}.{index}" if len(parts) > 1 else address,
                    uid=uid,
                    description=str(header.get("SeriesDescription") or ""),
                    modality=str(header.get("Modality") or "no modality")[:16],
                    size=(_size(header, "Columns"), _size(header, "Rows"), len(members)),
                    part=part,
                    slices=tuple(members),
                )
            )
    return volumes


def chosen_volume(volumes: Sequence[SeriesVolume], wanted: str | None, place: object, names: bool) -> SeriesVolume:
    """Return the volume that is meant.

    Args:
        volumes: of `volumes_of`.
        wanted: an address, a Series Instance UID or a part of a description; None where there is no choice to make.
        place: what holds them, for messages.
        names: whether messages may repeat descriptions, which are free text.

    Raises:
        UserError: none or several are meant; the message lists them.
    """
    if wanted is None:
        if len(volumes) == 1:
            return volumes[0]
        series = len({volume.uid for volume in volumes})
        what = f"{series} series in one folder" if series > 1 else f"{len(volumes)} volumes in one series"
        raise UserError(
            f"{place}: {what} ({_listed(volumes, names)}); choose one with `series`, or take the others out"
        )
    meant = _meant(volumes, wanted.strip())
    if len(meant) == 1:
        return meant[0]
    what = f"{len(meant)} volumes are meant by" if meant else "no volume is meant by"
    raise UserError(f"{place}: {what} `series` {wanted[:64]!r}; there are {_listed(meant or volumes, names)}")


def _meant(volumes: Sequence[SeriesVolume], wanted: str) -> list[SeriesVolume]:
    number = str(int(wanted)) if wanted.isdecimal() else wanted
    exact = [one for one in volumes if number in (one.address, one.address.partition(".")[0]) or wanted == one.uid]
    words = wanted.casefold()
    if exact or wanted.isdecimal() or not words:
        return exact
    return [one for one in volumes if words in f"{one.description}, {one.part}".casefold()]


def _listed(volumes: Sequence[SeriesVolume], names: bool) -> str:
    more = f"; and {len(volumes) - _SHOWN} more" if len(volumes) > _SHOWN else ""
    return "; ".join(volume.line(names) for volume in volumes[:_SHOWN]) + more


def _series_number(items: Sequence[Slice]) -> int | None:
    value = items[0].header.get("SeriesNumber")
    return int(value) if isinstance(value, int) else None


def _size(header: Any, keyword: str) -> int:
    value = header.get(keyword)
    return int(value) if isinstance(value, int) else 0


# ------------------------------------------------------------------------------------------ several volumes in a series


def _parts(items: Sequence[Slice]) -> list[tuple[str, list[Slice]]]:
    """Split a series that holds several volumes; return (what tells it apart, its slices) of each.

    Stacks are volumes of their own. Otherwise there are several only where two slices lie at one place; then they are
    told apart by every attribute in which slices at one place differ.
    """
    stacks = _grouped(items, lambda item: _value(item.header, "StackID"))
    parts = []
    for stack, members in stacks:
        telling = _telling(members)
        for values, slices in _grouped(members, lambda item, telling=telling: _values(item, telling)):
            words = [f"stack {_text(stack)}"] if len(stacks) > 1 else []
            words += [f"{name} {_text(value)}" for (name, _), value in zip(telling.items(), values, strict=True)]
            parts.append((", ".join(words), slices))
    return parts


def _grouped(items: Sequence[Slice], key: Any) -> list[tuple[Any, list[Slice]]]:
    groups: dict[Any, list[Slice]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return sorted(groups.items(), key=lambda group: _sortable(group[0]))


def _telling(items: Sequence[Slice]) -> dict[str, Any]:
    """Return name -> keyword (or the number of a dimension) of what tells slices at one place apart."""
    places: dict[Any, list[Slice]] = {}
    for item in items:
        places.setdefault(_place(item.header), []).append(item)
    crowded = [members for place, members in places.items() if place is not None and len(members) > 1]
    if not crowded:
        return {}
    found: dict[str, Any] = {}
    for keyword, name in _REPEATED.items():
        if name not in found and any(len({_value(item.header, keyword) for item in place}) > 1 for place in crowded):
            found[name] = keyword
    if found:
        return found
    for dimension in range(8):
        if any(len({_dimension(item.header, dimension) for item in place}) > 1 for place in crowded):
            found[f"dimension {dimension + 1}"] = dimension
    return found


def _values(item: Slice, telling: dict[str, Any]) -> tuple[Any, ...]:
    read = (
        _dimension(item.header, one) if isinstance(one, int) else _value(item.header, one) for one in telling.values()
    )
    return tuple(read)


def _place(header: Any) -> tuple[float, ...] | None:
    """Return where a slice lies and how it is turned, rounded; None where it does not say."""
    try:
        numbers = [float(value) for key in ("ImagePositionPatient", "ImageOrientationPatient") for value in header[key]]
    except (KeyError, TypeError, ValueError):
        return None
    return tuple(np.round(numbers, 2) + 0.0) if np.isfinite(numbers).all() else None


def _value(header: Any, keyword: str) -> Any:
    """Return a value that compares as a number where it is one; None where there is none."""
    value = header.get(keyword)
    if value is None or value == "":
        return None
    many = [value] if isinstance(value, (str, int, float)) else list(value)
    try:
        return tuple(round(float(one), 4) for one in many)
    except (TypeError, ValueError):
        return tuple(str(one) for one in many)


def _dimension(header: Any, index: int) -> Any:
    values = _value(header, "DimensionIndexValues")
    return values[index] if values is not None and index < len(values) else None


def _sortable(value: Any) -> tuple[tuple[int, float, str], ...]:
    items = value if isinstance(value, tuple) else (value,)
    flat = [part for item in items for part in (item if isinstance(item, tuple) else (item,))]
    return tuple((1, part, "") if isinstance(part, float) else (0, 0.0, str(part)) for part in flat)


def _text(value: Any) -> str:
    """Return a value for a message."""
    items = value if isinstance(value, tuple) else (value,)
    if all(isinstance(item, str) for item in items):
        words = [item for item in items if _WORDS.fullmatch(item)]
        return "/".join(words) or "other"
    return "/".join("none" if item is None else f"{item:g}" for item in items)
