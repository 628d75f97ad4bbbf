"""`aldm evaluate --segmenter`: the fixed segmenter that is measured beside the scores of images."""

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aldm.errors import UserError

if TYPE_CHECKING:
    from aldm.data.store import SubjectRecord, VolumeStore
    from aldm.models.segmenter import Segmenter
    from aldm.score_rows import ScoreRow

logger = logging.getLogger(__name__)


def measured_segmenter(
    args: argparse.Namespace, store: "VolumeStore", subjects: Sequence["SubjectRecord"]
) -> tuple["Segmenter | None", str | None]:
    """Return the segmenter of --segmenter and its hash, if one is given.

    Raises:
        UserError: as `load_segmenter`, or no subject has labels to hold it against.
    """
    from aldm.data.labels import has_structure
    from aldm.segmenter_stage import load_segmenter

    if args.segmenter is None:
        return None, None
    segmenter, digest = load_segmenter(args.segmenter, store)
    names = segmenter.structures
    if not any(all(has_structure(record, name) for name in names) for record in subjects):
        raise UserError(
            f"no subject of the split {args.split} of {args.store} has labels of {', '.join(names)}: leave --segmenter "
            "out, or give another --split"
        )
    return segmenter, digest


def print_usefulness(rows: Sequence["ScoreRow"]) -> None:
    """Print what the segmenter found, its Dice on real volumes first; warn where that is poor."""
    from aldm import usefulness

    poor = [name for name, dice in usefulness.real_dice(rows).items() if not dice >= usefulness.LEAST_DICE]
    if poor:
        logger.warning("the segmenter is too poor to judge anything by it: %s", ", ".join(poor))
    print(f"\n{usefulness.verdict(rows)}\n\n{usefulness.table(rows)}")
