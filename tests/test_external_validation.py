"""`aldm evaluate` on a store that holds test subjects alone: those of another site, none of which was trained on."""

import csv
import logging
from pathlib import Path

import pytest
from jobs import run
from untrained import save_untrained

from aldm.data.store import VolumeStore
from aldm.errors import UserError
from aldm.score_rows import REFERENCES
from pipelines.evaluate import main

OF_TRAINING = {"training-mean", "intensity-map", "histogram-matching"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def test_store(ixi_store: VolumeStore, ixi_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> VolumeStore:
    """The subjects of `ixi_store`, all in the test split."""
    folder = tmp_path_factory.mktemp("external")
    names = [record.subject_id for record in ixi_store.subjects()]
    (folder / "splits.csv").write_text("subject_id,split\n" + "".join(f"{name},test\n" for name in names))
    words = ("prepare", ixi_tree, folder / "store", "--layout", "ixi", "--preset", "tiny", "--num-processes", 1)
    run(*words, "--splits", folder / "splits.csv", "--log-level", "warning")
    return VolumeStore.open(folder / "store")


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "scores.csv").read_text().splitlines()))


def test_test_subjects_alone_are_scored_without_what_is_made_of_training_subjects(
    test_store: VolumeStore, ixi_store: VolumeStore, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert {record.split for record in test_store.subjects()} == {"test"}
    words = ["--model", str(model), "--pictures", "0", "--device", "cpu"]
    with caplog.at_level(logging.WARNING):
        assert main([*words, "--store", str(test_store.path), "--out", str(tmp_path / "external")]) == 0
    (said,) = [record.getMessage() for record in caplog.records if "training" in record.getMessage()]
    assert "no training subject" in said
    assert all(name in said for name in OF_TRAINING)
    rows = rows_of(tmp_path / "external")
    assert {row["method"] for row in rows} == {"aldm", "identity", "reconstruction"}
    assert {row["subject_id"] for row in rows} == {record.subject_id for record in ixi_store.subjects()}
    assert main([*words, "--store", str(ixi_store.path), "--out", str(tmp_path / "own")]) == 0
    own = rows_of(tmp_path / "own")
    assert {row["method"] for row in own} == {"aldm", "reconstruction", *REFERENCES}
    kept = [row for row in own if row["method"] not in OF_TRAINING]
    of_the_same = [row for row in rows if row["subject_id"] in {row["subject_id"] for row in kept}]
    assert sorted(map(str, of_the_same)) == sorted(map(str, kept)), "every score that is left is as it was"


def test_a_training_store_of_its_own_gives_those_rows_back(
    test_store: VolumeStore, ixi_store: VolumeStore, model: Path, tmp_path: Path
) -> None:
    words = ["--model", str(model), "--pictures", "0", "--device", "cpu"]
    training = ["--training-store", str(ixi_store.path)]
    assert main([*words, "--store", str(test_store.path), "--out", str(tmp_path / "external"), *training]) == 0
    assert main([*words, "--store", str(ixi_store.path), "--out", str(tmp_path / "own")]) == 0
    own, external = rows_of(tmp_path / "own"), rows_of(tmp_path / "external")
    assert {row["method"] for row in external} == {"aldm", "reconstruction", *REFERENCES}
    of_the_same = [row for row in external if row["subject_id"] in {row["subject_id"] for row in own}]
    assert sorted(map(str, of_the_same)) == sorted(map(str, own))


def test_a_training_store_that_has_no_training_subject_is_refused(
    test_store: VolumeStore, ixi_store: VolumeStore, model: Path, tmp_path: Path
) -> None:
    words = ["--model", str(model), "--device", "cpu", "--store", str(ixi_store.path), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="has no training subject"):
        main([*words, "--training-store", str(test_store.path)])
    assert not (tmp_path / "out").exists()


def test_the_scores_react_without_training_subjects_too(test_store: VolumeStore, tmp_path: Path) -> None:
    words = ["--self-test", "--store", str(test_store.path), "--out", str(tmp_path / "out"), "--max-subjects", "1"]
    assert main(words) == 0
    assert rows_of(tmp_path / "out")


def test_a_modality_that_no_training_subject_has_lacks_those_rows_alone(
    ixi_tree: Path, model: Path, tmp_path: Path
) -> None:
    files = {path.name.split("-")[0]: path for path in sorted((ixi_tree / "IXI-T1").glob("*.nii.gz"))}
    lines, splits = ["subject_id,modality,path"], ["subject_id,split"]
    for name, split in zip(files, ("train", "test"), strict=False):
        splits.append(f"{name},{split}")
        for modality in ("t1", "t2") if split == "train" else ("t1", "t2", "pd"):
            (path,) = (ixi_tree / f"IXI-{modality.upper()}").glob(f"{name}-*.nii.gz")
            lines.append(f"{name},{modality},{path}")
    for file, rows in (("table.csv", lines), ("splits.csv", splits)):
        (tmp_path / file).write_text("\n".join(rows) + "\n")
    words = ("prepare", tmp_path / "table.csv", tmp_path / "store", "--layout", "table", "--preset", "tiny")
    run(*words, "--splits", tmp_path / "splits.csv", "--num-processes", 1, "--log-level", "warning")
    store = VolumeStore.open(tmp_path / "store")
    assert main(["--model", str(model), "--store", str(store.path), "--out", str(tmp_path / "out")]) == 0
    found = {(row["method"], row["target"]) for row in rows_of(tmp_path / "out")}
    assert {target for method, target in found if method == "training-mean"} == {"t1", "t2"}
    assert {target for method, target in found if method == "aldm"} == {"t1", "t2", "pd"}


def test_an_empty_split_is_refused_with_those_that_are_not(
    test_store: VolumeStore, model: Path, tmp_path: Path
) -> None:
    words = ["--model", str(model), "--store", str(test_store.path), "--split", "validation"]
    with pytest.raises(UserError, match="no subject in the split validation, only in test: give another `split`"):
        main([*words, "--out", str(tmp_path / "out")])
    assert list(tmp_path.iterdir()) == []
