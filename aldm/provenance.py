"""What is said of a translation in the files that hold it; `made` is its provenance. No torch here."""

from collections.abc import Mapping
from typing import Any

from aldm.likeness import Likeness

MAPS = ("uncertainty", "spread")
"""What a translation may have beside it, as the fields of Translation are named; flags and files as well."""


def describe(made: Mapping[str, Any]) -> str:
    """Return the provenance in the 79 characters of a NIfTI header's `descrip`."""
    how = f" {made['sampler']} {made['num_inference_steps']} seed {made['seed']}" if "sampler" in made else ""
    return f"synthetic {made['target']} from {made['source']}, {made['model_kind']} {made['model_hash'][:8]}{how}"


def describe_map(kind: str, made: Mapping[str, Any]) -> str:
    """Return what a map of MAPS is and what it lies beside, whose provenance is `made`.

    It is short, so that the model's hash is still among the 79 characters of a NIfTI header's `descrip`.
    """
    what = "standard deviation of samples"
    if kind == "uncertainty":
        what = f"uncertainty ({made['uncertainty_level']:.0%} within +-)"
    return f"{what}: {describe(made)}"


def likeness_of(made: Mapping[str, Any]) -> Likeness | None:
    """Return the likeness in a provenance; None where it was not measured."""
    found = made.get("likeness")
    return Likeness(**found) if isinstance(found, dict) else None
