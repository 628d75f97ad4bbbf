"""The files of `aldm translate`: which inputs there are, where each result goes, and how one is read and written."""

import csv
import glob
import gzip
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aldm.data.nifti_header import is_input_name
from aldm.errors import UserError
from aldm.files import atomic_folder, atomic_path, check_folder
from aldm.provenance import describe, describe_map

if TYPE_CHECKING:
    import numpy as np

    from aldm.data.dicom_header import DicomSource
    from aldm.data.nifti_header import NiftiSource
    from aldm.data.volume import Volume
    from aldm.translation import Translation

RESULTS_FILE = "results.csv"
NIFTI, DICOM = "nifti", "dicom"
_SUFFIXES = (".nii.gz", ".nii")

NO_SPREAD = (
    "--spread is the standard deviation of several samples: give --num-samples of at least 2 as well; a model of "
    "objective regression has one answer, and none"
)
NO_UNCERTAINTY = (
    "--uncertainty needs a model that knows how far off it may be, sampled as it is by default: make one with aldm "
    "train uncertainty and aldm export --uncertainty; the standard deviation of several samples is --spread"
)


@dataclass(frozen=True)
class Output:
    """Where one translation of one input goes."""

    target: str
    path: Path
    """A NIfTI file, or with DICOM a folder."""
    maps: Mapping[str, Path] = field(default_factory=dict)
    """What is wanted beside it, of MAPS -> a NIfTI file."""

    @property
    def sidecar(self) -> Path:
        """The JSON file beside it that says how it was made: out.json of out.nii.gz, out.dicom.json of a folder out."""
        stem = _stem(self.path)
        return self.path.with_name(stem + (".dicom.json" if stem == self.path.name else ".json"))


@dataclass(frozen=True)
class Input:
    """One input and what it is taken for."""

    path: Path
    source: str = ""
    """Its modality."""
    source_from: str = ""
    """Who said so: request, file name or header."""
    targets: tuple[str, ...] = ()
    """Modalities that are made of it."""
    others: tuple[tuple[str, Path], ...] = ()
    """(modality, path) of what is taken beside it, of the same head."""
    name: str = ""
    """What its results in a folder are called after; empty: its file."""
    status: str = ""
    """skipped or failed where nothing is made of it."""
    message: str = ""
    """Why not."""


@dataclass(frozen=True)
class Task:
    """One input and all that is made of it."""

    path: Path
    is_series: bool
    source: str
    """Its modality."""
    source_from: str
    """Who said so: request, file name or header."""
    outputs: tuple[Output, ...]
    others: tuple[tuple[str, Path], ...] = ()
    """(modality, path) of what is taken beside it, of the same head."""

    @property
    def sources(self) -> str:
        """The modalities of all that is taken, in words."""
        return " + ".join((self.source, *(name for name, _ in self.others)))

    @property
    def inputs(self) -> dict[str, dict[str, str]]:
        """What a sidecar says of several volumes: `inputs`, modality -> name of its file; nothing of one."""
        files = {self.source: self.path, **dict(self.others)}
        return {"inputs": {name: path.name for name, path in files.items()}} if self.others else {}


@dataclass(frozen=True)
class Result:
    """One line of results.csv."""

    input: str
    source: str
    """What the input was taken for; empty where it was not translated because of its name."""
    source_from: str
    """request, file name or header."""
    target: str
    output: str
    status: str
    """ok, skipped or failed."""
    likeness: float | None
    """How unlike the training data the input is, 1 at the limit; None where that was not measured."""
    seconds: float
    message: str


def find_inputs(pattern: str) -> tuple[list[Path], bool]:
    """Return the inputs that INPUT names, sorted, and whether they are a batch (a folder of NIfTI files, or a glob).

    Raises:
        UserError: nothing is there.
    """
    from aldm.data.dicom import is_series_folder

    path = Path(pattern)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if is_input_name(file.name) and file.is_file())
        if files:
            return files, True
        if is_series_folder(path):
            return [path], False
        raise UserError(f"{path} holds no NIfTI file (.nii, .nii.gz) and no DICOM series")
    if path.exists():
        return [path], False
    if glob.has_magic(pattern):
        found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if not _is_hidden(name))
        if not found:
            raise UserError(f"nothing matches {pattern}")
        return found, True
    raise UserError(f"{path} does not exist")


def _is_hidden(name: str) -> bool:
    return Path(name).name.startswith(".")


def plan_tasks(
    inputs: Sequence[Input],
    output: Path,
    *,
    into_folder: bool,
    format: str,
    maps: Mapping[str, Path],
) -> list[Task]:
    """Return what is made of each input, and where.

    Into a folder, the results of scan.nii.gz are scan_synthetic-t2.nii.gz and, of MAPS,
    scan_synthetic-t2_uncertainty.nii.gz and scan_synthetic-t2_spread.nii.gz; those of an input that has a name are
    called after that.

    Args:
        inputs: files or series folders, those that are translated.
        output: OUTPUT; a folder with `into_folder`.
        into_folder: whether OUTPUT (and `maps`) name folders that hold all results.
        format: nifti or dicom.
        maps: what of MAPS is wanted, and where it goes.

    Raises:
        UserError: a name that is not a NIfTI file's, two results by one name, a result that would replace an input, or
            DICOM from something else than a series.
    """
    from aldm.data import dicom

    tasks = []
    for given in inputs:
        path = given.path
        is_series = dicom.is_series(path)
        if format == DICOM and not is_series:
            raise UserError(f"--format dicom needs a DICOM series folder as INPUT, and {path} is none: leave it out")
        outputs = []
        for target in given.targets:
            suffix = ".nii.gz" if is_series else path.name[len(_stem(path)) :]
            name = f"{given.name or _stem(path)}_synthetic-{target}"
            place, beside = output, maps
            if into_folder:
                place = output / (name if format == DICOM else name + suffix)
                beside = {kind: folder / f"{name}_{kind}{suffix}" for kind, folder in maps.items()}
            outputs.append(Output(target, place, beside))
        tasks.append(Task(path, is_series, given.source, given.source_from, tuple(outputs), given.others))
    if not into_folder:
        _check_suffixes([*maps.values()] if format == DICOM else [output, *maps.values()])
    _check_names(tasks)
    return tasks


def _check_suffixes(paths: Sequence[Path]) -> None:
    for path in paths:
        if not path.name.lower().endswith(_SUFFIXES) or not _stem(path):
            raise UserError(f"{path}: wanted a name that ends in .nii or .nii.gz")


def _check_names(tasks: Sequence[Task]) -> None:
    """Refuse results that would replace each other or an input."""
    written: dict[Path, Path] = {}
    read = {path.resolve() for task in tasks for path in (task.path, *(other for _, other in task.others))}
    for task in tasks:
        for output in task.outputs:
            for path in (output.path, output.sidecar, *output.maps.values()):
                if path.resolve() in read:
                    raise UserError(f"{path} is an input and would be replaced: give another OUTPUT")
                if path.resolve() in written:
                    raise UserError(
                        f"{task.path} and {written[path.resolve()]} would both be written to {path}: translate them "
                        "apart, or rename one"
                    )
                written[path.resolve()] = task.path


def read_input(task: Task, max_voxels: int, series: str | None = None) -> tuple["Volume", "NiftiSource | DicomSource"]:
    """Read and check an input; `series` chooses among several. Raises UserError for all that makes it unusable."""
    return _read(task.path, max_voxels, series)


def read_others(
    task: Task, max_voxels: int, series: str | None = None
) -> dict[str, tuple["Volume", "NiftiSource | DicomSource"]]:
    """Read and check what is taken beside the input, by modality. Raises UserError as `read_input`."""
    return {name: _read(path, max_voxels, series) for name, path in task.others}


def _read(path: Path, max_voxels: int, series: str | None) -> tuple["Volume", "NiftiSource | DicomSource"]:
    from aldm.data.dicom import is_series, read_series
    from aldm.data.volume import load_nifti

    if is_series(path):
        return read_series(path, series=series, max_voxels=max_voxels)
    if series is not None:
        raise UserError(f"{path}: `series` chooses among DICOM series, and this is none: leave it out")
    return load_nifti(path, max_voxels=max_voxels)


class _NothingToWrite(Exception):
    """Leaves a file's context without the file."""


def check_outputs(task: Task, *, format: str, overwrite: bool) -> None:
    """Refuse what `writing` would refuse at its start, without leaving a trace.

    Raises:
        UserError: as `writing`.
    """
    try:
        with writing(task, format=format, overwrite=overwrite, keep_patient=False):
            raise _NothingToWrite
    except _NothingToWrite:
        pass


def make_folder(path: Path) -> bool:
    """Make a folder where there is none and say whether it is new.

    Raises:
        UserError: a file is there, its parent folder is missing or cannot be written to.
    """
    if path.is_dir():
        return False
    if path.exists():
        raise UserError(f"{path} is a file, wanted a folder for several results")
    check_folder(path)
    try:
        path.mkdir()
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror}") from error
    return True


@contextmanager
def writing(task: Task, *, format: str, overwrite: bool, keep_patient: bool) -> Iterator["Writer"]:
    """Check that all results of a task can be written, take them, and let all appear at the end, or none.

    Raises:
        UserError: a result exists and `overwrite` is False, a folder is missing or read-only, or the disk is full.
    """
    from aldm.data.dicom import FIRST_FILE

    with ExitStack() as stack:
        temporary: dict[Path, Path] = {}
        for output in task.outputs:
            _check_sidecar(output)
            if format == DICOM:
                check_folder(output.path, overwrite, marker=FIRST_FILE)
            own = [] if format == DICOM else [output.path]
            for path in (*own, output.sidecar, *output.maps.values()):
                temporary[path] = stack.enter_context(atomic_path(path, overwrite))
        writer = Writer(temporary, format, overwrite, keep_patient)
        yield writer
        writer.finish()


def _check_sidecar(output: Output) -> None:
    """Refuse to replace the sidecar of another result, such as that of scan.nii by that of scan.nii.gz."""
    try:
        other = json.loads(output.sidecar.read_text())["output"]
        belongs_to = output.sidecar.with_name(str(other))
    except (OSError, ValueError, TypeError, KeyError):
        return  # none is there, or not one of ours: whether it may be replaced is the user's word
    if other != output.path.name and belongs_to.exists():
        raise UserError(f"{output.sidecar} says how {belongs_to} was made: give {output.path.name} another name")


class Writer:
    """Writes the results of one input."""

    def __init__(self, temporary: dict[Path, Path], format: str, overwrite: bool, keep_patient: bool) -> None:
        self._temporary, self._format, self._overwrite, self._keep_patient = temporary, format, overwrite, keep_patient
        self._series: list[Callable[[], object]] = []

    def write(
        self,
        output: Output,
        result: "Translation",
        source: "NiftiSource | DicomSource",
        others: Sequence["NiftiSource | DicomSource"] = (),
    ) -> None:
        """Write one translation, what is wanted beside it, and its sidecar.

        Args:
            output: where.
            result: the translation.
            source: of the volume whose grid it has.
            others: of what it was made of beside it.
        """
        made = result.provenance
        if self._format == DICOM:
            self._later(output, result, source, others)
        else:
            self._write_nifti(output.path, result.volume.data, result.volume, source, describe(made))
        record = {"output": output.path.name, **made}
        for kind, path in output.maps.items():
            data = getattr(result, kind)
            assert data is not None, "the model gives what was asked for"
            self._write_nifti(path, data, result.volume, source, describe_map(kind, made))
            record[kind] = path.name
        self._temporary[output.sidecar].write_text(json.dumps(record, indent=2) + "\n")

    def put(self, output: Output, files: "Files") -> None:
        """Write one translation that was made elsewhere."""
        record = {"output": output.path.name, **files.provenance}
        if self._format == DICOM:
            self._series.append(lambda: _unpack(files.result, output.path, self._overwrite))
        else:
            self._put_nifti(output.path, files.result)
        for kind, path in output.maps.items():
            self._put_nifti(path, files.maps[kind])
            record[kind] = path.name
        self._temporary[output.sidecar].write_text(json.dumps(record, indent=2) + "\n")

    def finish(self) -> None:
        """Write the DICOM series, which appear at once, after everything else has been computed."""
        for write in self._series:
            write()

    def _put_nifti(self, path: Path, content: bytes) -> None:
        is_compressed = path.name.lower().endswith(".gz")
        self._temporary[path].write_bytes(content if is_compressed else gzip.decompress(content))

    def _write_nifti(
        self, path: Path, data: "np.ndarray", volume: "Volume", source: "NiftiSource | DicomSource", description: str
    ) -> None:
        from aldm.data.nifti_header import NiftiSource, source_of
        from aldm.data.volume import save_nifti, to_source_orientation

        grid = source if isinstance(source, NiftiSource) else source_of(volume.affine, data.shape, path)
        save_nifti(self._temporary[path], to_source_orientation(data, grid), grid, description=description)

    def _later(
        self,
        output: Output,
        result: "Translation",
        source: "NiftiSource | DicomSource",
        others: Sequence["NiftiSource | DicomSource"],
    ) -> None:
        from aldm.data.dicom import write_series
        from aldm.data.dicom_header import DicomSource

        assert isinstance(source, DicomSource)
        made = result.provenance
        self._series.append(
            lambda: write_series(
                output.path,
                result.volume.data,
                source,
                description=f"{made['target']} from {made['source']}",
                derivation=json.dumps(made),
                keep_patient=self._keep_patient,
                others=[other for other in others if isinstance(other, DicomSource)],
                overwrite=self._overwrite,
            )
        )


@dataclass(frozen=True)
class Files:
    """One translation as files of a translation service."""

    result: bytes
    """A .nii.gz file, or a zip of a DICOM series."""
    maps: Mapping[str, bytes]
    """What was asked for beside it, of MAPS -> a .nii.gz file."""
    provenance: dict[str, Any]


def _unpack(content: bytes, folder: Path, overwrite: bool) -> None:
    """Write the files of a zip into a folder, which appears at once."""
    from aldm.data.dicom import FIRST_FILE

    with (
        atomic_folder(folder, overwrite, marker=FIRST_FILE) as temporary,
        zipfile.ZipFile(io.BytesIO(content)) as archive,
    ):
        for entry in archive.infolist():
            (temporary / Path(entry.filename).name).write_bytes(archive.read(entry))


def write_results_csv(path: Path, results: Sequence[Result]) -> None:
    """Write results.csv, a line per translation asked for; replaces what is there."""
    with atomic_path(path, overwrite=True) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow([field.name for field in fields(Result)])
        writer.writerows(astuple(result) for result in results)


def _stem(path: Path) -> str:
    """Return the name without .nii, .nii.gz or .dcm."""
    for suffix in (*_SUFFIXES, ".dcm"):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name
