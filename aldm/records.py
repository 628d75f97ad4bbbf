"""JSON files that this program wrote, read back with suspicion: whole, and with everything that their reader needs."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aldm.errors import UserError

Kinds = Mapping[str, type | tuple[type, ...]]
"""Dotted key -> what its value must be."""
_NAMES = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


def has_file(folder: str | os.PathLike[str], name: str) -> bool:
    """Say whether a file is there.

    Raises:
        UserError: the folder cannot be looked into.
    """
    try:
        return (Path(folder) / name).is_file()
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from error


def read_record(file: Path, kinds: Kinds, way_out: str) -> dict[str, Any]:
    """Return the JSON object in a file, checked by `check_record`.

    Raises:
        UserError: the file cannot be read, is not JSON, or lacks something.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:  # neither UTF-8 nor JSON
        raise UserError(f"{file} is damaged, it is not JSON ({error}): {way_out}") from error
    if not isinstance(record, dict):
        raise UserError(f"{file} is damaged, it holds no JSON object: {way_out}")
    check_record(record, kinds, file, way_out)
    return record


def check_record(record: Mapping[str, Any], kinds: Kinds, file: str | os.PathLike[str], way_out: str) -> None:
    """Check that keys are there and hold values of their kind.

    Args:
        record: what was read.
        kinds: dotted key, such as latents.mean, -> what its value must be.
        file: where it was read, for the message.
        way_out: what the user can do, for the message.

    Raises:
        UserError: all that is missing or of another kind in one message.
    """
    problems = []
    for key, kind in kinds.items():
        value: Any = record
        for part in key.split("."):
            value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
        if value is _MISSING:
            problems.append(f"it lacks {key}")
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            first = kind[0] if isinstance(kind, tuple) else kind
            problems.append(f"{key} is {value!r:.60}, wanted {_NAMES[first]}")
    if problems:
        raise UserError(f"{file} is damaged: {'; '.join(problems)}; {way_out}")


_MISSING = object()
