"""Kubernetes' quantities, such as 250m and 64Gi, as numbers: those of the units that manifests are written in."""

import math
import re

_UNITS = {"": 1.0, "m": 1e-3, **{unit: 1000.0 ** (n + 1) for n, unit in enumerate("kMGTPE")}}
_UNITS |= {f"{unit}i": 1024.0 ** (n + 1) for n, unit in enumerate("KMGTPE")}


def quantity(text: str) -> float:
    """Return the number that a quantity stands for: bytes, CPUs, GPUs."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(m|k|[MGTPE]i?|Ki)?", text)
    assert match is not None, text
    return float(match[1]) * _UNITS[match[2] or ""]


def said(value: float, *, like: str) -> str:
    """Return a number as a quantity in the unit of another one, rounded up."""
    unit = re.sub(r"[0-9.]", "", like)
    return f"{math.ceil(value / _UNITS[unit])}{unit}"
