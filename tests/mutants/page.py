"""The page that says what was noticed: docs/mutants.md."""

from collections.abc import Sequence
from dataclasses import dataclass

from operators import Mutant

MOST_SURVIVE = 0.05
"""Share of the mutants, equivalent ones left out, that may survive."""


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    name: str
    """Of the table in named.py; empty where it was drawn."""
    noticed: bool
    reason: str
    """Why nothing could notice it; empty where something should."""


def share_survived(outcomes: Sequence[Outcome]) -> float:
    """Return the share that no test noticed, equivalent ones left out."""
    counted = [outcome for outcome in outcomes if not outcome.reason]
    return sum(not outcome.noticed for outcome in counted) / max(len(counted), 1)


def page(outcomes: Sequence[Outcome], per_file: int) -> str:
    """Return the page."""
    counted = [outcome for outcome in outcomes if not outcome.reason]
    survived = [outcome for outcome in counted if not outcome.noticed]
    equivalent = [outcome for outcome in outcomes if outcome.reason]
    lines = [
        "# Do the tests notice?",
        "",
        "<!-- Written by `make mutants`; edit tests/mutants/ instead. -->",
        "",
        "`make mutants` changes one line of a formula or a guard at a time (a sign, a comparison, a number, a",
        "condition, a call left out) and runs the quick tests that should notice. Of each file it takes the changes",
        f"that `tests/mutants/named.py` names, and up to {per_file} more, drawn with a fixed seed. Changes that",
        "nothing could notice are in `tests/mutants/equivalent.py` and below, each with its reason; they do not count.",
        "The tests were fixed for what this draw found: of changes that were never drawn, expect more to survive.",
        "",
        f"**{len(counted) - len(survived)} of {len(counted)} noticed, {len(survived)} survived "
        f"({100 * share_survived(outcomes):.1f} %)**, and {len(equivalent)} equivalent.",
        "",
        "| file | changes | noticed | survived | equivalent |",
        "|---|---|---|---|---|",
    ]
    for file in dict.fromkeys(outcome.mutant.file for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.mutant.file == file]
        same = sum(bool(outcome.reason) for outcome in own)
        seen = sum(outcome.noticed for outcome in own)
        lines.append(f"| {file} | {len(own)} | {seen} | {len(own) - seen - same} | {same} |")
    lines += ["", "## Survived", "", *_table(survived, "what"), "", "## Equivalent", "", *_table(equivalent, "why")]
    return "\n".join(lines) + "\n"


def _table(outcomes: Sequence[Outcome], last: str) -> list[str]:
    if not outcomes:
        return ["None."]
    rows = [
        f"| {one.mutant.file} | `{_cell(one.mutant.before)}` | `{_cell(one.mutant.after)}` | {one.reason or one.name} |"
        for one in outcomes
    ]
    return [f"| file | line | changed to | {last} |", "|---|---|---|---|", *rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")
