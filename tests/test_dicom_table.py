"""A table of `aldm prepare` names DICOM series as well as NIfTI files."""

from pathlib import Path

import nibabel
import numpy as np
import pytest
from series import add_other_object, make_series

from aldm.config import PreprocessConfig
from aldm.data.dicom import read_series
from aldm.data.integrity import load_subject, subject_key
from aldm.data.layouts import SubjectFiles, discover


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """A folder with series 3 and 4 in one folder, and a NIfTI file of the same space."""
    for number in (3, 4):
        make_series(tmp_path / "one", edit=lambda k, header, number=number: setattr(header, "SeriesNumber", number))
        for path in (tmp_path / "one").iterdir():
            (tmp_path / "dicom").mkdir(exist_ok=True)
            path.rename(tmp_path / "dicom" / f"{number}-{path.name}")
    volume, _ = read_series(tmp_path / "dicom", series="3")
    nibabel.save(nibabel.Nifti1Image(volume.data, volume.affine), tmp_path / "t2.nii.gz")
    return tmp_path


def subject(study: Path, series: str) -> SubjectFiles:
    table = study / "table.csv"
    table.write_text(f"subject_id,modality,path,series\nx,t1,dicom,{series}\nx,t2,t2.nii.gz,\n")
    (found,), problems = discover(table, "table")
    assert not problems
    return found


def test_a_row_may_name_a_dicom_series(study: Path) -> None:
    loaded, problems = load_subject(subject(study, "3"))
    assert not problems
    assert np.array_equal(loaded.volumes["t1"].data, loaded.volumes["t2"].data)
    assert np.allclose(loaded.sources["t1"].affine, read_series(study / "dicom", series="3")[1].affine)
    assert loaded.sources["t1"].shape == (7, 6, 5)


def test_what_is_left_out_of_a_series_is_said_and_stops_nothing(study: Path) -> None:
    add_other_object(study / "dicom", "AA", "1.2.840.10008.5.1.4.1.1.66")
    loaded, problems = load_subject(subject(study, "3"))
    assert set(loaded.volumes) == {"t1", "t2"}
    assert [(problem.stops, problem.message) for problem in problems] == [
        (False, "left out what holds no image: 1 Raw Data")
    ]


def test_what_is_wrong_with_a_series_is_a_problem_of_its_row(study: Path) -> None:
    for series, said in (("", "2 series in one folder"), ("5", "no volume is meant by `series` '5'")):
        _, problems = load_subject(subject(study, series))
        assert [problem.path.name for problem in problems] == ["dicom"]
        assert problems[0].message.startswith(said)
    (study / "table.csv").write_text("subject_id,modality,path,series\nx,t2,t2.nii.gz,3\n")
    _, problems = load_subject(discover(study / "table.csv", "table")[0][0])
    assert "this is none: leave it out" in problems[0].message


def test_the_content_key_follows_every_file_of_a_series(study: Path) -> None:
    config = PreprocessConfig()
    keys = {subject_key(subject(study, series), config, study) for series in ("3", "4")}
    path = study / "dicom" / "3-IM0.dcm"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    keys.add(subject_key(subject(study, "3"), config, study))
    assert len(keys) == 3
