"""`aldm phantom`: write simulated subjects as a BraTS or IXI tree, or heads to train on."""

import logging
from collections.abc import Sequence
from pathlib import Path

from aldm.data.phantom import (
    PHANTOM_LAYOUTS,
    check_arguments,
    check_output,
    expected_memory_gib,
    subject_name,
    volume_path,
    write_phantom,
)
from aldm.words import counted
from pipelines.arguments import job_parser, resolve_config

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    parser = job_parser(
        "phantom",
        "Write simulated multi-contrast subjects as a tree of NIfTI files: in the layout of BraTS 2021 or IXI, or "
        "heads of all modalities, whole and skull-stripped, from scanners drawn at random, which aldm prepare takes as "
        "layout brats. The seed fixes every byte, and a larger set contains a smaller one.",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to make")
    parser.add_argument(
        "--layout",
        choices=PHANTOM_LAYOUTS,
        required=True,
        help="whose files, modalities and grids to imitate, or heads",
    )
    parser.add_argument("--num-subjects", type=int, default=24, metavar="N", help="how many subjects")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the whole set")
    parser.add_argument(
        "--spacing-mm",
        type=float,
        default=3.0,
        metavar="F",
        help="voxel size in mm (1 is BraTS's own; 0.9375 is IXI's own in the slice, whose slices are thicker; of heads "
        "the smallest side of a voxel)",
    )
    parser.add_argument("--num-processes", type=int, default=1, metavar="N", help="subjects made at a time")
    parser.add_argument("--overwrite", action="store_true", help="replace a tree that this job wrote before")
    args = parser.parse_args(argv)
    resolve_config(args)  # nothing here depends on it, but a wrong one is refused
    check_arguments(args.layout, args.num_subjects, args.seed, args.spacing_mm)
    check_output(args.out, overwrite=args.overwrite)
    if args.dry_run:
        first = volume_path(args.layout, subject_name(args.layout, 0), "t1")
        subjects = counted(args.num_subjects, "subject")
        print(f"would write {subjects} at {args.spacing_mm:g} mm, the first to {args.out / first}")
        each = " each process" if args.num_processes > 1 else ""
        print(f"memory: about {expected_memory_gib(args.layout, args.spacing_mm):.1f} GiB{each}")
        return 0
    write_phantom(
        args.out,
        args.layout,
        args.num_subjects,
        args.seed,
        args.spacing_mm,
        overwrite=args.overwrite,
        num_processes=args.num_processes,
    )
    logger.info("wrote %d simulated subjects to %s", args.num_subjects, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
