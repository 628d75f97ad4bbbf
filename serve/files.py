"""The files of a job, `WORK_DIR/jobs/ID/`: the accepted upload and what was made of it. Every name is ours.

`volume.nii.gz` is the upload as a NIfTI file that names nobody; of a DICOM series `series.json` keeps the grid as well.
Of several volumes the others lie alike in folders of their own, `beside-1` and so on.
"""

import json
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aldm.files import atomic_path

if TYPE_CHECKING:
    from aldm.data.dicom_header import DicomSource
    from aldm.data.nifti_header import NiftiSource
    from aldm.data.volume import Volume
    from aldm.translation import Translation

NIFTI, DICOM = "nii.gz", "dicom"
_VOLUME, _SERIES, _NOTES = "volume.nii.gz", "series.json", "notes.json"
_GEOMETRY = (
    *("sizeof_hdr", "magic", "dim", "pixdim", "datatype", "bitpix", "vox_offset", "scl_slope", "scl_inter"),
    *("xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)
"""The fields of a NIfTI header that are kept of an upload; every other may name a patient."""


def result_file(folder: Path, target: str, format: str) -> Path:
    """Return where a translation is: a NIfTI file, or a zip of a DICOM series."""
    return folder / (f"result_{target}.zip" if format == DICOM else f"result_{target}.nii.gz")


def map_file(folder: Path, kind: str, target: str) -> Path:
    """Return where what lies beside a translation is: its uncertainty or its spread."""
    return folder / f"{kind}_{target}.nii.gz"


def preview_file(folder: Path, target: str) -> Path:
    """Return where the picture of source and result is."""
    return folder / f"preview_{target}.png"


def volume_folders(folder: Path, count: int) -> list[Path]:
    """Return where the accepted volumes of a job are, in the form's order: the first one in the job's own folder."""
    return [folder, *(folder / f"beside-{number}" for number in range(1, count))]


def source_file(folder: Path) -> Path:
    """Return where the accepted upload is, a NIfTI file."""
    return folder / _VOLUME


def provenance_file(folder: Path, target: str) -> Path:
    """Return where it is said how a translation was made, JSON."""
    return folder / f"provenance_{target}.json"


def keep_nifti(folder: Path, volume: "Volume", source: "NiftiSource") -> None:
    """Keep an upload on its own grid, with nothing of its header but that grid."""
    from aldm.data.volume import save_nifti, to_source_orientation

    header = source.parsed_header()
    for name in header:
        if name not in _GEOMETRY:
            header[name] = np.zeros_like(header[name])
    nameless = replace(source, header=bytes(header.binaryblock))
    save_nifti(folder / _VOLUME, to_source_orientation(volume.data, nameless), nameless)
    if source.notes:
        (folder / _NOTES).write_text(json.dumps(source.notes))


def keep_series(folder: Path, volume: "Volume", source: "DicomSource") -> None:
    """Keep an uploaded series: the voxels on their RAS+ grid, and what a derived series needs of the headers."""
    from aldm.data.nifti_header import source_of
    from aldm.data.volume import save_nifti

    path = folder / _VOLUME
    save_nifti(path, volume.data, source_of(volume.affine, volume.data.shape, path))
    kept = asdict(source)
    del kept["images"]  # who has the original series could tell from these whose it is
    kept |= {"patient": (), "study_uid": "", "frame_of_reference_uid": "", "description": ""}
    kept |= {"folder": "", "affine": source.affine.tolist(), "volume_affine": volume.affine.tolist()}
    (folder / _SERIES).write_text(json.dumps(kept))


def is_series(folder: Path) -> bool:
    """Whether the upload was a DICOM series."""
    return (folder / _SERIES).exists()


def load_source(folder: Path) -> "tuple[Volume, NiftiSource | DicomSource]":
    """Return the accepted upload as `load_nifti` or `read_series` returned it."""
    from aldm.data.dicom_header import DicomSource
    from aldm.data.volume import Volume, load_nifti

    volume, source = load_nifti(folder / _VOLUME)
    if not is_series(folder):
        notes = folder / _NOTES
        return volume, replace(source, notes=tuple(json.loads(notes.read_text())) if notes.is_file() else ())
    kept: dict[str, Any] = json.loads((folder / _SERIES).read_text())
    affine = np.array(kept.pop("volume_affine"))
    for name in ("shape", "orientation_cosines", "pixel_spacing", "patient", "notes"):
        kept[name] = tuple(kept[name])
    kept |= {"folder": folder, "affine": np.array(kept["affine"]), "positions": tuple(map(tuple, kept["positions"]))}
    return Volume(volume.data, affine), DicomSource(**kept)


def write_translation(
    folder: Path,
    translation: "Translation",
    volume: "Volume",
    source: "NiftiSource | DicomSource",
    format: str,
    sources: Sequence[str],
) -> None:
    """Write a translation, its standard deviation, its picture and how it was made; replaces what is there.

    Args:
        folder: of the job.
        translation: on the grid of `volume`.
        volume, source: of the first volume, from `load_source`.
        format: nii.gz or dicom.
        sources: modalities of all volumes, in the form's order.

    Raises:
        UserError: the disk is full.
    """
    from aldm.data.nifti_header import NiftiSource, source_of
    from aldm.data.volume import save_nifti, to_source_orientation
    from aldm.provenance import MAPS, describe, describe_map

    made, result = translation.provenance, translation.volume
    if source.notes:
        made["notes"] = list(source.notes)
    if len(sources) > 1:
        made["sources"] = list(sources)
    target, words = made["target"], describe(made)
    path = result_file(folder, target, format)
    grid = source if isinstance(source, NiftiSource) else source_of(result.affine, result.data.shape, path)
    if format == DICOM:
        assert not isinstance(source, NiftiSource), "dicom is made of dicom"
        _write_series(path, translation, source)
    else:
        save_nifti(path, to_source_orientation(result.data, grid), grid, description=words, overwrite=True)
    for kind in MAPS:
        data = getattr(translation, kind)
        if data is not None:
            data = to_source_orientation(data, grid)
            about = describe_map(kind, made)
            save_nifti(map_file(folder, kind, target), data, grid, description=about, overwrite=True)
    _write_preview(preview_file(folder, target), translation, volume, sources)
    with atomic_path(provenance_file(folder, target), overwrite=True) as temporary:
        temporary.write_text(json.dumps(made, indent=2) + "\n")


def _write_series(path: Path, translation: "Translation", source: "DicomSource") -> None:
    from aldm.data.dicom import write_series

    made = translation.provenance
    series = path.with_suffix("")
    shutil.rmtree(series, ignore_errors=True)  # of a worker that died
    try:
        files = write_series(
            series,
            translation.volume.data,
            source,
            description=f"{made['target']} from {made['source']}",
            derivation=json.dumps(made),
        )
        with (
            atomic_path(path, overwrite=True) as temporary,
            zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        ):
            for file in files:
                archive.write(file, file.name)
    finally:
        shutil.rmtree(series, ignore_errors=True)


def _write_preview(path: Path, translation: "Translation", volume: "Volume", sources: Sequence[str]) -> None:
    from aldm.pictures import save_translation_panel

    low, high = (float(value) for value in np.percentile(volume.data, (0.5, 99.5)))
    made = translation.provenance
    dark, bright = made["intensity_range"]
    half_width = translation.uncertainty
    save_translation_panel(
        path,
        source=_unit(volume.data, low, high),
        prediction=_unit(translation.volume.data, dark, bright),
        uncertainty=None if half_width is None else half_width / (bright - dark),
        source_name=sources[0] if len(sources) == 1 else f"{sources[0]} (of {made['source']})",
        target_name=f"{made['target']}, synthetic",
        spacing_mm=volume.spacing_mm,
        title="synthetic, research use only",
    )


def _unit(data: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((data - low) / max(high - low, 1e-6), 0, 1)
