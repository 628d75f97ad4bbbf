"""What `aldm translate` takes its inputs for, and what it leaves alone because of its name."""

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from series import eight_times
from test_dicom import make_series
from test_translate_job import write
from untrained import save_untrained

from aldm.cli import main

AFFINE = np.diag([8.0, 8, 8, 1])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("translators") / "model", modalities=("t1", "t1ce", "t2", "flair"))


def run(source: Path, out: Path, *flags: object, model: Path) -> int:
    steps = ("--num-inference-steps", 1)
    return main(["translate", str(source), str(out), "--model", str(model), *map(str, (*steps, *flags))])


def folder_of(path: Path, *names: str) -> Path:
    path.mkdir()
    for name in names:
        write(path / name, affine=AFFINE)
    return path


def rows(folder: Path) -> dict[str, tuple[str, str, str]]:
    """Name of each input -> status, source, who said so."""
    lines = csv.DictReader((folder / "results.csv").open())
    return {Path(line["input"]).name: (line["status"], line["source"], line["source_from"]) for line in lines}


def test_of_a_subject_s_folder_only_the_source_is_translated(model, tmp_path):
    subject = "BraTS2021_00001"
    names = [f"{subject}_{role}.nii.gz" for role in ("flair", "seg", "t1", "t1ce", "t2")]
    folder = folder_of(tmp_path / subject, *names, "extra.nii")
    (folder / "._extra.nii").write_bytes(b"\0\5\26\7 what macOS keeps beside a file")
    (folder / f"._{subject}_t1.nii.gz").write_bytes(b"\0\5\26\7 what macOS keeps beside a file")
    assert run(folder, tmp_path / "out", "--source", "t1", "--target", "t2", model=model) == 0
    taken, left = ("ok", "t1", "request"), ("skipped", "", "")
    assert rows(tmp_path / "out") == {
        "extra.nii": taken,
        **{name: taken if name.endswith("_t1.nii.gz") else left for name in names},
    }
    messages = [line["message"] for line in csv.DictReader((tmp_path / "out" / "results.csv").open())]
    assert sum("by its name it is a segmentation or a mask ('seg'), wanted a volume of t1" in m for m in messages) == 1
    assert sum("by its name it is flair, and --source is t1" in m for m in messages) == 1
    assert len(list((tmp_path / "out").glob("*.nii*"))) == 2


def test_a_glob_passes_hidden_files_over(model, tmp_path, capsys):
    folder = folder_of(tmp_path / "in", "a_t1.nii")
    (folder / "._a_t1.nii").write_bytes(b"\0\5\26\7")
    flags = ("--source", "t1", "--target", "t2")
    assert run(folder / ".*.nii", tmp_path / "out", *flags, model=model) == 2
    assert "nothing matches" in capsys.readouterr().err
    assert run(folder / "*a_t1.nii", tmp_path / "out", *flags, model=model) == 0
    assert list(rows(tmp_path / "out")) == ["a_t1.nii"]


def test_auto_takes_names_then_headers_and_says_what_it_took(model, tmp_path, capsys):
    folder = folder_of(
        tmp_path / "in",
        "sub-01_ses-post_T1w.nii.gz",
        "sub-01_ce-gd_T1w.nii.gz",
        "sub-01_desc-T1w_mask.nii.gz",
        "a_T2_SWI.nii",
        "b_synthetic-t1.nii",
        "c_pd.nii",
        "CE_study_T1.nii",
        "d_t2.nii",
        "unsaid.nii",
    )
    write(folder / "e.nii", affine=AFFINE, descrip=b"t2_tirm_tra_dark-fluid")
    write(folder / "f.nii", affine=AFFINE, descrip=b"synthetic t1 from t2, aldm 01234567")
    expected = {
        "sub-01_ses-post_T1w.nii.gz": ("ok", "t1", "file name"),
        "sub-01_ce-gd_T1w.nii.gz": ("ok", "t1ce", "file name"),
        "sub-01_desc-T1w_mask.nii.gz": ("skipped", "", ""),
        "a_T2_SWI.nii": ("skipped", "", ""),
        "b_synthetic-t1.nii": ("skipped", "", ""),
        "c_pd.nii": ("skipped", "", ""),
        "CE_study_T1.nii": ("failed", "", ""),
        "d_t2.nii": ("skipped", "", ""),
        "e.nii": ("ok", "flair", "header"),
        "f.nii": ("skipped", "", ""),
        "unsaid.nii": ("failed", "", ""),
    }
    flags = ("--source", "auto", "--target", "t2")
    assert run(folder, tmp_path / "out", *flags, "--dry-run", model=model) == 2
    said = capsys.readouterr().out
    assert "CE_study_T1.nii: failed: its name may mean t1 or t1ce: give --source, or rename it" in said
    assert "flair -> t2" in said
    assert not (tmp_path / "out").exists()
    assert run(folder, tmp_path / "out", *flags, model=model) == 2
    assert rows(tmp_path / "out") == expected
    assert "3 of 11 inputs translated, 6 skipped" in capsys.readouterr().out
    made = json.loads((tmp_path / "out" / "e_synthetic-t2.json").read_text())
    assert made["source"] == "flair"


def test_one_input_that_is_something_else_stops(model, tmp_path, capsys):
    write(tmp_path / "x_seg.nii", affine=AFFINE)
    write(tmp_path / "x_t2.nii", affine=AFFINE)
    before = sorted(tmp_path.iterdir())
    for name, source, words in (
        ("x_seg.nii", "t1", "x_seg.nii: by its name it is a segmentation or a mask"),
        ("x_t2.nii", "t1", "x_t2.nii: by its name it is t2, and --source is t1"),
        ("x_seg.nii", "auto", "x_seg.nii: by its file name it is a segmentation or a mask"),
        ("x_t2.nii", "auto", "by its file name it is t2 already"),
    ):
        assert run(tmp_path / name, tmp_path / "o.nii", "--source", source, "--target", "t2", model=model) == 2
        assert words in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_auto_reads_what_a_series_says(model, tmp_path):
    def edit(index, dataset):
        eight_times(index, dataset)
        dataset.SeriesDescription = "Ax T1 +C"

    make_series(tmp_path / "series", edit=edit)
    assert run(tmp_path / "series", tmp_path / "o.nii", "--source", "auto", "--target", "t2", model=model) == 0
    assert json.loads((tmp_path / "o.json").read_text())["source"] == "t1ce"


def test_no_result_takes_another_one_s_sidecar(model, tmp_path, capsys):
    make_series(tmp_path / "series", edit=eight_times)
    write(tmp_path / "scan.nii", affine=AFFINE)
    flags = ("--source", "t1", "--target", "t2")
    assert run(tmp_path / "scan.nii", tmp_path / "out.nii.gz", *flags, model=model) == 0
    assert run(tmp_path / "series", tmp_path / "out", *flags, "--format", "dicom", model=model) == 0
    assert json.loads((tmp_path / "out.json").read_text())["output"] == "out.nii.gz"
    assert json.loads((tmp_path / "out.dicom.json").read_text())["output"] == "out"
    assert run(tmp_path / "scan.nii", tmp_path / "out.nii", *flags, "--overwrite", model=model) == 2
    assert "out.json says how" in capsys.readouterr().err
    assert not (tmp_path / "out.nii").exists()
    nibabel.load(tmp_path / "out.nii.gz")
    assert run(tmp_path / "scan.nii", tmp_path / "out.nii.gz", *flags, "--overwrite", model=model) == 0
