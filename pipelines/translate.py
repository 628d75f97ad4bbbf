"""`aldm translate`: NIfTI files or DICOM series in, the same anatomy in another modality out, on the same grid."""

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from aldm.cli import with_flags
from aldm.config import SAMPLERS
from aldm.data.modalities import MODALITIES, check_modality
from aldm.data.nifti_header import MAX_VOXELS
from aldm.errors import UserError
from aldm.likeness import Likeness
from aldm.provenance import MAPS
from aldm.words import counted
from pipelines.arguments import JobParser, job_parser
from pipelines.translate_files import (
    DICOM,
    NIFTI,
    RESULTS_FILE,
    Input,
    Result,
    Task,
    check_outputs,
    find_inputs,
    make_folder,
    plan_tasks,
    read_input,
    read_others,
    write_results_csv,
)
from pipelines.translate_local import LocalModel
from pipelines.translate_remote import TOKEN_VARIABLE, RemoteService
from pipelines.translate_sources import (
    ALL,
    AUTO,
    TABLE_SUFFIX,
    Pairs,
    choose_inputs,
    named_sources,
    several_sources,
    table_inputs,
)
from pipelines.translator_arguments import add_translator_arguments, check_seed

if TYPE_CHECKING:
    from aldm.data.volume import Volume

logger = logging.getLogger(__name__)

DESCRIPTION = """Translate 3D MR volumes into another modality. The result has exactly the input's grid: shape, affine,
qform and sform codes, units. It is synthetic, for research use only, and a JSON file beside it says how it was made."""
EXIT_FAILED = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aldm translate ARGUMENTS`; 2 when some inputs of a batch failed.

    Raises:
        UserError: everything that the user can fix.
    """
    args = _parser().parse_args(argv)
    named = named_sources(args.source)
    places = [place for place in (args.input, args.output, *args.surplus) if place is not None]
    args.input, args.output = _places(places, named)
    check_seed(args.seed)
    if args.max_voxels < 1:
        raise UserError(f"--max-voxels is {args.max_voxels}, wanted at least 1")
    maker: Maker = RemoteService(args) if args.server is not None else LocalModel(args)
    inputs, is_batch = _inputs(args, named, maker)
    into_folder = is_batch or args.target == ALL
    maps = {kind: getattr(args, kind) for kind in MAPS if getattr(args, kind) is not None}
    tasks = plan_tasks(
        [one for one in inputs if not one.status],
        args.output,
        into_folder=into_folder,
        format=args.format,
        maps=maps,
    )
    if is_batch and (args.output / RESULTS_FILE).exists() and not args.overwrite:
        raise UserError(f"{args.output} holds the results of an earlier batch: give another OUTPUT, or --overwrite")
    folders = [args.output, *maps.values()] if into_folder else []
    new = [folder for folder in folders if make_folder(folder)]
    try:
        if not is_batch:
            check_outputs(tasks[0], format=args.format, overwrite=args.overwrite)
        maker.load()
        if args.dry_run:
            return _dry_run(inputs, tasks, maker, args)
        if is_batch:
            return _translate_batch(inputs, tasks, maker, args)
        maker.make(tasks[0])
        for output in tasks[0].outputs:
            made = f"{output.target} from {tasks[0].sources}"
            print(f"{output.path}: {made}, synthetic; made as {output.sidecar.name} says")
        return 0
    finally:
        for folder in new:
            if not any(folder.iterdir()):
                folder.rmdir()


def _places(places: Sequence[str], named: Sequence[tuple[str, Path]]) -> tuple[str | None, Path]:
    """Return INPUT and OUTPUT; where --source names the files there is no INPUT."""
    wanted = 1 if named else 2
    if len(places) == wanted:
        return (None if named else places[0]), Path(places[-1])
    if named:
        raise UserError(f"--source names the files, so OUTPUT alone is wanted, got {len(places)} names")
    raise UserError(
        f"wanted one INPUT and one OUTPUT, got {counted(len(places), 'name')}"
        + (": put a glob into quotes, such as 'scans/*_t1.nii.gz', or the shell expands it" if len(places) > 2 else "")
    )


def _inputs(args: argparse.Namespace, named: Sequence[tuple[str, Path]], maker: "Maker") -> tuple[list[Input], bool]:
    """Return what is translated, and whether it is a batch."""
    targets = maker.modalities if args.target == ALL else (args.target,)
    for name in targets:
        check_modality("target", name, maker.modalities)
    if named:
        return [several_sources(named, args.target, maker)], False
    (source,) = args.source
    if args.input.lower().endswith(TABLE_SUFFIX):
        return table_inputs(Path(args.input), source, args.target, maker), True
    if source != AUTO:
        for name in [name for name in targets if maker.translates(source, name)] or targets:
            maker.check_pair(source, name)
    paths, is_batch = find_inputs(args.input)
    inputs = choose_inputs(
        paths, source, args.target, maker, is_batch=is_batch, series=args.series, max_voxels=args.max_voxels
    )
    return inputs, is_batch


class Maker(Pairs, Protocol):
    """What translates inputs: a model here, or a service."""

    def load(self) -> None:
        """Get ready; raises UserError for what every input would fail with."""

    def make(self, task: Task) -> Likeness | None:
        """Translate one input into every target; all results appear, or none. Return how unlike the training it is."""

    def count_boxes(self, volume: "Volume") -> int | None:
        """Return how many boxes of the model's shape a volume takes; None where that is not known here."""

    def describe(self) -> list[str]:
        """Return lines that say how it would translate."""


def _translate_batch(inputs: Sequence[Input], tasks: Sequence[Task], maker: Maker, args: argparse.Namespace) -> int:
    """Translate one input after another, whatever happens to each; results.csv grows line by line."""
    results: list[Result] = []
    for one in inputs:
        if one.status:
            logger.warning("%s %s: %s", one.path, one.status, one.message)
            results.append(Result(str(one.path), "", "", args.target, "", one.status, None, 0, one.message))
    not_made = [one.status for one in inputs if one.status]
    write_results_csv(args.output / RESULTS_FILE, results)
    failed = 0
    for task in tasks:
        start, message, likeness = time.perf_counter(), "", None
        try:
            likeness = maker.make(task)
        except UserError as error:
            message = with_flags(str(error))
            logger.error("%s failed: %s", task.path, message)
        except Exception as error:  # one bad file must not stop a night's work; the log keeps the traceback
            message = f"internal error: {type(error).__name__}: {error}"
            logger.exception("%s failed", task.path)
        failed += bool(message)
        seconds, status = round(time.perf_counter() - start, 3), "failed" if message else "ok"
        for output in task.outputs:
            path = str(output.path) if not message else ""
            taken = (task.sources.replace(" ", ""), task.source_from, output.target)
            distance = None if likeness is None else likeness.distance
            results.append(Result(str(task.path), *taken, path, status, distance, seconds, message))
        write_results_csv(args.output / RESULTS_FILE, sorted(results, key=lambda result: result.input))
    done = len(tasks) - failed
    words = f", {not_made.count('skipped')} skipped" if "skipped" in not_made else ""
    print(f"{done} of {len(inputs)} inputs translated{words}; see {args.output / RESULTS_FILE}")
    return EXIT_FAILED if failed or "failed" in not_made or not done else 0


def _dry_run(inputs: Sequence[Input], tasks: Sequence[Task], maker: Maker, args: argparse.Namespace) -> int:
    """Read every input, say what would be written and how."""
    failed = sum(one.status == "failed" for one in inputs)
    for one in inputs:
        if one.status:
            print(f"{one.path}: {one.status}: {one.message}")
    for task in tasks:
        try:
            check_outputs(task, format=args.format, overwrite=args.overwrite)
            volume, _ = read_input(task, args.max_voxels, args.series)
            read_others(task, args.max_voxels, args.series)
            boxes = maker.count_boxes(volume)
        except UserError as error:
            failed += 1
            print(f"cannot be translated: {with_flags(str(error))}")
            continue
        spacing = " x ".join(f"{side:.3g}" for side in volume.spacing_mm)
        words = {None: "", 1: ", 1 box"}.get(boxes, f", {boxes} boxes")
        print(f"{task.path}: {' x '.join(map(str, volume.data.shape))} voxels of {spacing} mm{words}")
        for output in task.outputs:
            print(f"  {task.sources} -> {output.target}: {output.path}")
    print("\n".join(maker.describe()))
    return EXIT_FAILED if failed else 0


def _parser() -> JobParser:
    parser = job_parser("translate", DESCRIPTION, default_preset="the model's own configuration")
    parser.add_argument(
        "input",
        metavar="INPUT",
        help="a NIfTI file (.nii, .nii.gz), a DICOM series folder or an enhanced (multi-frame) DICOM file, a folder of "
        "NIfTI files, or a quoted glob; a table (.csv) with the columns subject_id, modality, path, each subject of "
        "which is one input; left out where --source names the files",
    )
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        nargs="?",
        help="the NIfTI file to write (with --format dicom a folder); a folder for several inputs or --target all, "
        f"made if it is missing, with {RESULTS_FILE} beside the results of several inputs",
    )
    parser.add_argument("surplus", nargs="*", default=[], help=argparse.SUPPRESS)  # what an unquoted glob leaves over
    add_translator_arguments(parser)
    parser.add_argument(
        "--server",
        metavar="URL",
        help="let a service (aldm serve) do it, such as the one at http://127.0.0.1:8000 (default: this machine)",
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"with --server: file that holds its token (default: {TOKEN_VARIABLE} of the environment)",
    )
    names = ", ".join(MODALITIES)
    parser.add_argument(
        "--source",
        required=True,
        action="append",
        metavar="MODALITY[=PATH]",
        help=f"modality of the input ({names}; the model may know fewer), or {AUTO}: what its name says, or else its "
        "header; of several inputs those whose names say another one, a mask or a map are skipped. For a model that "
        "takes any sources say it once a file, such as --source t1=a.nii.gz --source t2=b.nii.gz: they are brought to "
        f"the first one's grid by their affines. Of a table, one modality of each subject, or {AUTO}: all of them that "
        "the model knows but the target, the grid is that of the first in the order above",
    )
    parser.add_argument(
        "--series",
        metavar="SERIES",
        help="which DICOM series of a folder that holds several: its number (5; 5.2 for the second volume of it), its "
        "UID, or a part of its description (default: the only one; the message for several lists them)",
    )
    parser.add_argument("--target", required=True, help=f"wanted modality, or {ALL} for every one that the model knows")
    parser.add_argument(
        "--sampler", metavar="S", help=f"{', '.join(SAMPLERS)}; those that go with the model (default: the model's)"
    )
    parser.add_argument(
        "--num-inference-steps", type=int, metavar="N", help="network evaluations per sample (default: the model's)"
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        metavar="K",
        help="samples; the result is their mean; objective regression takes 1 (default: the model's)",
    )
    parser.add_argument(
        "--eta",
        type=float,
        help="stochasticity of ddim, 0 to 1 (default: the model's)",
    )
    parser.add_argument(
        "--uncertainty",
        type=Path,
        metavar="FILE",
        help="write here, in the result's units, how far it may be from the truth: at most so far in 90 %% of the "
        "voxels of subjects like those of the calibration. Needs a model that learnt it (aldm train uncertainty); a "
        "folder where OUTPUT is one (default: not written)",
    )
    parser.add_argument(
        "--spread",
        type=Path,
        metavar="FILE",
        help="write the voxelwise standard deviation of the samples here, in the result's units; it is not calibrated; "
        "a folder where OUTPUT is one (default: not written)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample; sample i has seed + i")
    parser.add_argument(
        "--intensity",
        choices=("median", "unit"),
        default="median",
        help="median scales the result to the training set's median percentiles of the target; unit to [0, 1]",
    )
    parser.add_argument(
        "--format",
        choices=(NIFTI, DICOM),
        default=NIFTI,
        help="nifti, or dicom: a derived MR series marked as synthetic (INPUT is a series then too)",
    )
    parser.add_argument(
        "--keep-patient",
        action="store_true",
        help="with --format dicom: join the input's study and copy who the patient is",
    )
    parser.add_argument(
        "--max-voxels", type=int, default=MAX_VOXELS, metavar="N", help="largest volume, in voxels, that is read"
    )
    parser.add_argument(
        "--accept-unlike",
        action="store_true",
        help="translate volumes that are unlike the model's training data (likeness above 1 in the sidecar) without a "
        "warning; with --server at all: a service refuses them",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing results")
    return parser
