"""`aldm translate --source t1=a.nii.gz --source t2=b.nii.gz`: several volumes of one head make one result."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from series import in_the_head, make_series
from test_any_sources import ANY, head
from untrained import save_untrained

from aldm.cli import main
from aldm.data.dicom import MR_IMAGE_STORAGE
from aldm.presets import small


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translators") / "model"
    return save_untrained(folder, config=replace(ANY, codec=small().codec))


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {}
    for seed, name in enumerate(("t1", "t2")):
        volume = head(seed)
        paths[name] = tmp_path / f"scan_{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(volume.data, volume.affine), paths[name])
    return paths


def run(*arguments: object) -> int:
    return main(["translate", *map(str, arguments)])


def test_the_result_and_its_sidecar_are_of_both_sources_in_either_order(
    model: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [f"--source={name}={path}" for name, path in files.items()]
    made = []
    for number, order in enumerate((sources, sources[::-1])):
        out = tmp_path / f"out{number}.nii.gz"
        assert run(out, *order, "--target", "pd", "--model", model) == 0
        assert "pd from t1 + t2" in capsys.readouterr().out or number
        made.append(nibabel.load(out))
    np.testing.assert_array_equal(made[0].get_fdata(), made[1].get_fdata())
    record = json.loads((tmp_path / "out0.json").read_text())
    assert record["source"] == "t1+t2"
    assert record["inputs"] == {"t1": "scan_t1.nii.gz", "t2": "scan_t2.nii.gz"}
    assert run(files["t1"], tmp_path / "alone.nii.gz", "--source", "t1", "--target", "pd", "--model", model) == 0
    same = tmp_path / "same.nii.gz"
    assert run(same, sources[0], "--target", "pd", "--model", model) == 0
    np.testing.assert_array_equal(nibabel.load(same).get_fdata(), nibabel.load(tmp_path / "alone.nii.gz").get_fdata())
    assert "inputs" not in json.loads((tmp_path / "same.json").read_text())


def test_all_is_what_is_missing(
    model: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [f"--source={name}={path}" for name, path in files.items()]
    assert run(tmp_path / "out", *sources, "--target", "all", "--model", model, "--dry-run") == 0
    assert "t1 + t2 -> pd" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out", *sources, "--target", "all", "--model", model) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["scan_t1_synthetic-pd.nii.gz"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("out.nii.gz", "--source=t1={t1}", "--source=t2"), "--source t2: wanted MODALITY=PATH, as the others have it"),
        (("{t1}", "out.nii.gz", "--source=t1", "--source=t2"), "--source is given 2 times: once for an INPUT,"),
        (("out.nii.gz", "--source=t1={t1}", "--source=t1={t2}"), "--source names t1 twice: give each modality once"),
        (
            ("{t1}", "out.nii.gz", "--source=t1={t1}"),
            "--source names the files, so OUTPUT alone is wanted, got 2 names",
        ),
        (("out.nii.gz", "--source=t1={t1}", "--source=t2=nowhere.nii"), "nowhere.nii does not exist"),
        (("out.nii.gz", "--source=t1={t2}", "--source=t2={t1}"), "by its name it is t2"),
        (("out.nii.gz", "--source=t1={t1}", "--source=pd={t2}"), "by its name it is t2"),
        (("{t1}", "--source=t1={t1}", "--source=t2={t2}"), "is an input and would be replaced"),
        (("{t1}", "--source=t1"), "wanted one INPUT and one OUTPUT, got 1 name"),
    ],
)
def test_wrong_words_are_told_apart(
    arguments: tuple[str, ...], words: str, model: Path, files: dict[str, Path], tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    filled = [one.format(**files) for one in arguments]
    assert run(*filled, "--target", "pd", "--model", model) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.iterdir()) == before


def test_a_target_among_the_sources_and_a_model_of_pairs_are_refused(
    model: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = [f"--source={name}={path}" for name, path in files.items()]
    assert run(tmp_path / "out.nii.gz", *sources, "--target", "t2", "--model", model) == 2
    assert "the target t2 is among the sources t1 and t2" in " ".join(capsys.readouterr().err.split())
    pairs = save_untrained(tmp_path / "pairs")
    assert run(tmp_path / "out.nii.gz", *sources, "--target", "pd", "--model", pairs) == 2
    assert "this aldm model takes one source" in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_reads_every_source(
    model: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files["t2"].write_bytes(b"no volume")
    sources = [f"--source={name}={path}" for name, path in files.items()]
    assert run(tmp_path / "out.nii.gz", *sources, "--target", "pd", "--model", model, "--dry-run") == 2
    assert "scan_t2.nii.gz" in capsys.readouterr().out


def inverted(header: pydicom.Dataset) -> None:
    """Make it another volume."""
    header.RescaleSlope, header.RescaleIntercept = -float(header.RescaleSlope), 4000


def table_of(folder: Path, *rows: str) -> Path:
    path = folder / "subjects.csv"
    path.write_text("\n".join(("subject_id,modality,path", *rows)) + "\n")
    return path


def test_each_subject_of_a_table_is_translated_from_all_that_it_has(
    model: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / files["t1"].name).write_bytes(files["t2"].read_bytes())  # the same name in another folder
    rows = (f"a,{name},{path.name}" for name, path in files.items())
    more = ("b,t1,other/scan_t1.nii.gz", "c,pd,scan.nii.gz", "d,t1,missing.nii", "e,t1,scan_t2.nii.gz", "b,flair,f.nii")
    table = table_of(tmp_path, *rows, *more)
    assert run(table, tmp_path / "out", "--source", "auto", "--target", "pd", "--model", model) == 2
    done = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    told = {(row["status"], row["source"], Path(row["output"]).name) for row in done}
    made = {("ok", "t1+t2", "a_synthetic-pd.nii.gz"), ("ok", "t1", "b_synthetic-pd.nii.gz")}
    assert told == made | {("skipped", "", ""), ("failed", "", "")}
    assert sorted(row["status"] for row in done) == ["failed", "failed", "ok", "ok", "skipped"]
    wanted = tmp_path / "wanted.nii.gz"
    assert run(wanted, *(f"--source={n}={p}" for n, p in files.items()), "--target", "pd", "--model", model) == 0
    got = nibabel.load(tmp_path / "out" / "a_synthetic-pd.nii.gz")
    np.testing.assert_array_equal(got.get_fdata(), nibabel.load(wanted).get_fdata())
    table = table_of(tmp_path, *(f"a,{name},{path.name}" for name, path in files.items()))
    assert run(table, tmp_path / "one", "--source", "t2", "--target", "pd", "--model", model) == 0
    assert json.loads((tmp_path / "one" / "a_synthetic-pd.json").read_text())["source"] == "t2"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("a,swi,scan_t1.nii.gz", "line 2: unknown modality 'swi'"),
        ("a,t1,scan_t1.nii.gz,5", "line 2: more values than columns"),
    ],
)
def test_a_table_that_is_none_is_refused(row: str, words: str, model: Path, tmp_path: Path, capsys) -> None:
    table = table_of(tmp_path, row)
    assert run(table, tmp_path / "out", "--source", "auto", "--target", "pd", "--model", model) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_a_derived_series_that_joins_the_study_refers_to_every_series_it_is_made_of(
    model: Path, tmp_path: Path
) -> None:
    make_series(tmp_path / "t1", edit=in_the_head)
    make_series(tmp_path / "t2", edit=lambda k, header: in_the_head(k, header) or inverted(header))
    sources = [f"--source={name}={tmp_path / name}" for name in ("t1", "t2")]
    flags = (*sources, "--target", "pd", "--model", model, "--format", "dicom")
    assert run(tmp_path / "kept", *flags, "--keep-patient") == 0
    assert run(tmp_path / "nobody", *flags) == 0
    wanted = {pydicom.dcmread(path).SOPInstanceUID for name in ("t1", "t2") for path in (tmp_path / name).iterdir()}
    for path in (tmp_path / "kept").iterdir():
        items = pydicom.dcmread(path).SourceImageSequence
        assert {item.ReferencedSOPInstanceUID for item in items} == wanted
        assert {item.ReferencedSOPClassUID for item in items} == {MR_IMAGE_STORAGE}
    assert not any("SourceImageSequence" in pydicom.dcmread(path) for path in (tmp_path / "nobody").iterdir())
