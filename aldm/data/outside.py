"""How much of the subjects of a store lies outside the model's box, for whoever prepares it."""

from collections.abc import Sequence

from aldm.data.boxes import MAX_OUTSIDE
from aldm.data.store import SubjectRecord

_SHOWN = 5


def outside_report(records: Sequence[SubjectRecord]) -> tuple[str, list[str]]:
    """Return a line on all subjects, and a warning about those with more than 0.5 % outside."""
    shares = {record.subject_id: record.share_outside for record in records if record.share_outside is not None}
    if not shares:
        return "outside the box: not measured", []
    line = f"outside the box: {sum(shares.values()) / len(shares):.2%} (at most {max(shares.values()):.2%})"
    above = sorted((name for name in shares if shares[name] > MAX_OUTSIDE), key=lambda name: (-shares[name], name))
    if not above:
        return line, []
    named = ", ".join(f"{name} {shares[name]:.1%}" for name in above[:_SHOWN])
    more = ", ..." if len(above) > _SHOWN else ""
    return line, [
        f"more than {MAX_OUTSIDE:.1%} of the subject lies outside the model's box, so a training does not see it, in "
        f"{len(above)} of {len(shares)} subjects ({named}{more}): a larger preprocess.spatial_shape holds more"
    ]
