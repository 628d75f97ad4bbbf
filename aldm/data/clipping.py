"""How much of the contrast of a store's volumes was clipped, in words."""

from collections.abc import Sequence

from aldm.data.intensity import MAX_CLIPPED
from aldm.data.modalities import sort_modalities
from aldm.data.store import SubjectRecord

_SHOWN = 5


def clipping_report(records: Sequence[SubjectRecord]) -> tuple[list[str], list[str]]:
    """Return a line for each modality, and warnings about what is clipped by more than 1 %.

    Mean and largest share over the subjects, of the region that scores are taken over and of the segmentation.
    """
    lines, warnings = [], []
    for modality in sort_modalities({name for record in records for name in record.modalities}):
        having = [record for record in records if modality in record.modalities]
        parts = []
        for index, region in enumerate(("/".join(sorted({record.region for record in having})), "segmentation")):
            shares = {record.subject_id: record.clipped[modality][index] for record in having}
            known = {subject: share for subject, share in shares.items() if share is not None}
            if not known:
                continue
            mean, most = sum(known.values()) / len(known), max(known.values())
            parts.append(f"{region} {mean:.2%} (at most {most:.2%})")
            above = sorted((s for s in known if known[s] > MAX_CLIPPED), key=lambda s: (-known[s], s))
            if above:
                named = ", ".join(f"{subject} {known[subject]:.1%}" for subject in above[:_SHOWN])
                more = ", ..." if len(above) > _SHOWN else ""
                warnings.append(
                    f"{modality}: more than {MAX_CLIPPED:.0%} of the {region} is clipped, so its contrast is lost, in "
                    f"{len(above)} of {len(known)} subjects ({named}{more})"
                )
        lines.append(f"clipped of {modality}: {', '.join(parts)}")
    return lines, warnings
