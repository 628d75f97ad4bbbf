"""`aldm prepare`: a data set of NIfTI files becomes a store of prepared volumes."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from aldm.config import Config, PreprocessConfig, Spacing
from aldm.data.clipping import clipping_report
from aldm.data.layouts import FIRST_RUN, LAYOUTS, TABLE_COLUMNS
from aldm.data.nifti_header import MAX_VOXELS
from aldm.data.outside import outside_report
from aldm.data.prepare_plan import Request
from aldm.data.preparing import plan_store, run_request
from aldm.errors import UserError
from aldm.words import counted
from pipelines.arguments import job_parser, resolve_config
from pipelines.ray_pool import WantedWorkers, add_worker_arguments, open_workers

logger = logging.getLogger(__name__)

DESCRIPTION = """Check every file of a data set, then resample, rescale and crop its volumes into a store. All problems
are reported together, before anything is written. An interrupted run goes on when it is run again, and ends with the
same bytes."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the job; raises UserError for everything that the user can fix."""
    args = _parser().parse_args(argv)
    config = _preprocess(args, resolve_config(args))
    source, store_path = Path(args.source), Path(args.store)
    if args.num_workers is not None:  # workers elsewhere have another working folder
        source, store_path = source.absolute(), store_path.absolute()
    request = Request(
        source=source,
        store=store_path,
        layout=args.layout,
        config=config,
        splits=None if args.splits is None else Path(args.splits),
        run=args.run,
        overwrite=args.overwrite,
        max_voxels=args.max_voxels,
    )
    with open_workers(WantedWorkers.of(args), use_gpus=False) as workers:
        if args.dry_run:
            plan = plan_store(request, args.num_processes, workers)
            print(plan.summary())
            settings = ", ".join(f"{key}={value}" for key, value in asdict(config).items())
            print(f"every file is usable; {args.store} would be written with {settings}")
            print(f"memory: about {plan.memory_per_process_gib:.1f} GiB a process")
            if workers is not None:
                print(workers.describe())
            return
        store = run_request(request, args.num_processes, workers)
    subjects = store.subjects()
    regions = ", ".join(sorted({record.region for record in subjects}))
    print(f"{args.store}: {counted(len(subjects), 'subject')} with {', '.join(store.modalities)}; masks: {regions}")
    lines, warnings = clipping_report(subjects)
    outside, more = outside_report(subjects)
    print("\n".join([*lines, outside]))
    for warning in [*warnings, *more]:
        logger.warning("%s", warning)


def _parser() -> argparse.ArgumentParser:
    parser = job_parser("prepare", DESCRIPTION)
    parser.add_argument("source", metavar="SOURCE", help="folder of the data set; with --layout table a CSV file")
    parser.add_argument("store", metavar="STORE", help="folder to write")
    parser.add_argument(
        "--layout",
        required=True,
        choices=LAYOUTS,
        help="how the files are named: BraTS (2020 to 2025), IXI, BIDS (T1w, T2w, PDw, FLAIR, ce-*_T1w), or a CSV "
        f"table with columns {', '.join(TABLE_COLUMNS)} (the last two may be missing; paths are relative to the table)",
    )
    parser.add_argument(
        "--like",
        metavar="MODEL",
        help="prepare as this model's data were: a translator folder, default (the built-in one) or a run folder; to "
        "score or fine-tune it (default: as the preset and the flags below say)",
    )
    parser.add_argument(
        "--spacing-mm",
        nargs="+",
        type=float,
        metavar="F",
        help="voxel size of the model's grid, mm: one number, or three for x y z (default: the preset's)",
    )
    parser.add_argument(
        "--spatial-shape",
        nargs=3,
        type=int,
        metavar=("X", "Y", "Z"),
        help="voxels of the model's grid after crop and padding, RAS order (default: the preset's)",
    )
    parser.add_argument(
        "--register",
        choices=("none", "rigid"),
        help="align a subject's volumes to its first modality by their affines alone, or by rigid registration too "
        "(default: the preset's)",
    )
    parser.add_argument(
        "--splits",
        metavar="FILE",
        help="CSV file of subject_id, split (train, validation, test) that wins (default: BraTS's folders; else a hash "
        "of the subject id, 80 / 10 / 10)",
    )
    parser.add_argument(
        "--run",
        default=FIRST_RUN,
        metavar="R",
        help="with --layout bids: which of several images of one modality and session counts, first, last or a number; "
        "those with the fewest entities beside run- go first (default: first)",
    )
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="subjects worked on at a time on this machine (default: as many as the cores and the free memory allow)",
    )
    parser.add_argument(
        "--max-voxels", type=int, default=MAX_VOXELS, metavar="N", help="largest volume, in voxels, read or resampled"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing store (to go on with an interrupted run, leave it out)",
    )
    add_worker_arguments(parser, "a subject")
    return parser


def _preprocess(args: argparse.Namespace, config: Config) -> PreprocessConfig:
    """Return the preset's preprocessing with what the flags change.

    Raises:
        UserError: a value out of range.
    """
    if args.num_processes is not None and args.num_processes < 1:
        raise UserError(f"--num-processes is {args.num_processes}, wanted at least 1")
    if args.num_processes is not None and args.num_workers is not None:
        raise UserError(
            "--num-processes and --num-workers were both given: the first works on this machine alone, the second on a "
            "Ray cluster; give one of them"
        )
    if args.max_voxels < 1:
        raise UserError(f"--max-voxels is {args.max_voxels}, wanted at least 1")
    if args.like is not None:
        return _like(args)
    preprocess = config.preprocess
    if args.spacing_mm is not None:
        preprocess = replace(preprocess, spacing_mm=_spacing(args.spacing_mm))
    if args.spatial_shape is not None:
        preprocess = replace(preprocess, spatial_shape=tuple(args.spatial_shape))
    if args.register is not None:
        preprocess = replace(preprocess, register=args.register)
    return preprocess


def _like(args: argparse.Namespace) -> PreprocessConfig:
    """Return the preprocessing of the model that --like names.

    Raises:
        UserError: no such model, or a flag that says something else of the preprocessing.
    """
    from aldm.checkpoint import config_of, read_checkpoint_record
    from aldm.starting_model import model_folder

    beside = [
        flag
        for flag, value in (
            ("--spacing-mm", args.spacing_mm),
            ("--spatial-shape", args.spatial_shape),
            ("--preset", args.preset),
            ("--set", args.set or None),
        )
        if value is not None
    ]
    if beside:
        raise UserError(
            f"--like {args.like} and {', '.join(beside)}: a model wants its own preprocessing; leave one of the two out"
        )
    folder = model_folder(args.like)
    preprocess = config_of(read_checkpoint_record(folder), folder).preprocess
    return preprocess if args.register is None else replace(preprocess, register=args.register)


def _spacing(values: list[float]) -> Spacing:
    if len(values) == 1:
        values = values * 3
    if len(values) != 3:
        raise UserError(f"--spacing-mm has {len(values)} values, wanted one or three (x y z)")
    x, y, z = values
    return x, y, z
