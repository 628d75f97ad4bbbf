import errno
import hashlib
import os
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aldm.data.layouts import apply_splits, discover, split_of
from aldm.errors import UserError


def tree(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def found(root, layout):
    """subject_id -> role -> path relative to the root; no problems but what is only said."""
    subjects, problems = discover(root, layout)
    assert not any(problem.stops for problem in problems)
    base = root.parent if layout == "table" else root
    return {s.subject_id: {role: str(path.relative_to(base)) for role, path in s.files().items()} for s in subjects}


def brats(subject_id, *roles, folder=""):
    return [
        f"{folder}{subject_id}/{subject_id}_{role}.nii.gz"
        for role in roles or ("t1", "t1ce", "t2", "flair", "seg", "tissue")
    ]


# ------------------------------------------------------------------------------------------------------------- splits


@given(st.text(max_size=20))
def test_the_split_is_a_hash_of_the_subject_id_alone(subject_id):
    bucket = int(hashlib.sha256(subject_id.encode()).hexdigest()[:16], 16) % 100
    assert split_of(subject_id) == "train" * (bucket < 80) + "validation" * (80 <= bucket < 90) + "test" * (
        bucket >= 90
    )


def test_splits_are_80_10_10_and_the_same_everywhere():
    assert [split_of(f"BraTS2021_{i:05d}") for i in range(6)] == ["train", "train", "train", "train", "test", "test"]
    counts = Counter(split_of(f"BraTS2021_{i:05d}") for i in range(1251))
    assert abs(counts["train"] / 1251 - 0.8) < 0.03
    assert abs(counts["validation"] / 1251 - 0.1) < 0.03


def test_adding_subjects_moves_nobody(tmp_path):
    tree(tmp_path, *[name for i in range(20) for name in brats(f"S{i}", "t1")])
    before = {subject.subject_id: subject.split for subject in discover(tmp_path, "brats")[0]}
    tree(tmp_path, *[name for i in range(20, 60) for name in brats(f"S{i}", "t1")])
    after = {subject.subject_id: subject.split for subject in discover(tmp_path, "brats")[0]}
    assert len(after) == 60
    assert before.items() <= after.items()


def test_the_training_and_validation_folders_of_brats_are_honoured(tmp_path):
    ids = [f"BraTS2021_{i:05d}" for i in range(60)]
    training, validation = "BraTS2021_Training_Data/", "RSNA_ASNR_MICCAI_BraTS2021_ValidationData/"
    tree(tmp_path, *[name for i in ids[:40] for name in brats(i, folder=training)])
    tree(tmp_path, *[name for i in ids[40:] for name in brats(i, "t1", "t2", folder=validation)])
    splits = {subject.subject_id: subject.split for subject in discover(tmp_path, "brats")[0]}
    assert {splits[i] for i in ids[40:]} == {"test"}
    assert {splits[i] for i in ids[:40]} == {"train", "validation"}
    assert all((splits[i] == "validation") == (split_of(i) == "validation") for i in ids[:40])
    alone = {subject.subject_id: subject.split for subject in discover(tmp_path / training, "brats")[0]}
    assert alone == {i: split_of(i) for i in ids[:40]}


def test_a_split_file_wins(tmp_path):
    tree(tmp_path / "data", *brats("A"), *brats("B"))
    subjects, _ = discover(tmp_path / "data", "brats")
    file = tmp_path / "splits.csv"
    file.write_text("subject_id,split\nB, test\nA,validation\nelsewhere,train\n")
    assert {s.subject_id: s.split for s in apply_splits(subjects, file)} == {"A": "validation", "B": "test"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("subject_id,split\nA,train\n", "no split for 1 of 2 subjects \\(B\\)"),
        ("subject_id,split\nA,train\nB,train\nA,test\n", "line 4: subject A is in two splits"),
        ("subject_id,split\nA,dev\nB,train\n", "'dev', wanted one of train, validation, test"),
        ("id,split\nA,train\n", "the columns are id, split"),
        ("", "the columns are missing"),
        ("subject_id,split\nA,train,extra\n", "more values than columns"),
    ],
)
def test_a_bad_split_file_is_refused(tmp_path, text, reason):
    tree(tmp_path / "data", *brats("A"), *brats("B"))
    subjects, _ = discover(tmp_path / "data", "brats")
    (tmp_path / "splits.csv").write_text(text)
    with pytest.raises(UserError, match=reason):
        apply_splits(subjects, tmp_path / "splits.csv")


def test_a_missing_split_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        apply_splits([], tmp_path / "nowhere.csv")


# ------------------------------------------------------------------------------------------------------------ layouts


def test_brats(tmp_path):
    tree(tmp_path, *brats("BraTS2021_00000"), *brats("BraTS2021_00002", "flair", "t1", folder="part2/"))
    tree(tmp_path, "BraTS2021_00000/._BraTS2021_00000_t1.nii.gz", "other/BraTS2021_00000_t1.nii.gz", "readme.txt")
    assert found(tmp_path, "brats") == {
        "BraTS2021_00000": {
            role: f"BraTS2021_00000/BraTS2021_00000_{role}.nii.gz"
            for role in ("t1", "t1ce", "t2", "flair", "seg", "tissue")
        },
        "BraTS2021_00002": {role: f"part2/BraTS2021_00002/BraTS2021_00002_{role}.nii.gz" for role in ("t1", "flair")},
    }


def test_ixi(tmp_path):
    tree(tmp_path, *[f"IXI-{m}/IXI002-Guys-0828-{m}.nii.gz" for m in ("PD", "T1", "T2")])
    tree(tmp_path, "IXI-T2/IXI012-HH-1211-T2.nii", "IXI-MRA/IXI002-Guys-0828-MRA.nii.gz")
    assert found(tmp_path, "ixi") == {
        "IXI002-Guys-0828": {m.lower(): f"IXI-{m}/IXI002-Guys-0828-{m}.nii.gz" for m in ("T1", "T2", "PD")},
        "IXI012-HH-1211": {"t2": "IXI-T2/IXI012-HH-1211-T2.nii"},
    }


def test_bids(tmp_path):
    tree(tmp_path, *[f"sub-01/anat/sub-01_{suffix}.nii.gz" for suffix in ("T1w", "T2w", "PDw", "FLAIR", "T2starw")])
    tree(
        tmp_path,
        "sub-01/anat/sub-01_ce-gd_T1w.nii.gz",
        "sub-01/anat/sub-01_ce-gd_T2w.nii.gz",
        "sub-01/func/sub-01_T1w.nii",
    )
    tree(tmp_path, "sub-02/ses-a/anat/sub-02_ses-a_acq-mprage_T1w.nii", "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz")
    tree(tmp_path, "derivatives/x/sub-01/anat/sub-01_T1w.nii.gz")
    assert found(tmp_path, "bids") == {
        "sub-01": {
            "t1": "sub-01/anat/sub-01_T1w.nii.gz",
            "t1ce": "sub-01/anat/sub-01_ce-gd_T1w.nii.gz",
            "t2": "sub-01/anat/sub-01_T2w.nii.gz",
            "flair": "sub-01/anat/sub-01_FLAIR.nii.gz",
            "pd": "sub-01/anat/sub-01_PDw.nii.gz",
        },
        "sub-02_ses-a": {"t1": "sub-02/ses-a/anat/sub-02_ses-a_acq-mprage_T1w.nii"},
        "sub-02_ses-b": {"t1": "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz"},
    }


def test_all_sessions_of_a_participant_share_a_split(tmp_path):
    tree(tmp_path, *[f"sub-{i}/ses-{s}/anat/sub-{i}_ses-{s}_T1w.nii.gz" for i in range(30) for s in (1, 2, 3)])
    by_participant = {}
    for subject in discover(tmp_path, "bids")[0]:
        by_participant.setdefault(subject.subject_id.split("_")[0], set()).add(subject.split)
    assert len(by_participant) == 30
    assert all(len(splits) == 1 for splits in by_participant.values())
    assert set.union(*by_participant.values()) == {"train", "validation", "test"}


def test_table(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text(
        "\ufeffmodality,subject_id,path,mask,seg,tissue\n"
        "t2,A,in/a_t2.nii,in/a_mask.nii,,\n"
        "t1,A,in/a_t1.nii,in/a_mask.nii,in/a_seg.nii,in/a_fast.nii\n"
        "pd,B,in/b.nii.gz,,,\n"
    )
    assert found(file, "table") == {
        "A": {
            "t1": "in/a_t1.nii",
            "t2": "in/a_t2.nii",
            "mask": "in/a_mask.nii",
            "seg": "in/a_seg.nii",
            "tissue": "in/a_fast.nii",
        },
        "B": {"pd": "in/b.nii.gz"},
    }
    file.write_text("subject_id,modality,path\nA,t1,/elsewhere/x.nii\n")
    (subject,), _ = discover(file, "table")
    assert str(subject.volumes["t1"]) == "/elsewhere/x.nii"


# ----------------------------------------------------------------------------------------------------------- problems


def messages(source, layout):
    return [problem.message for problem in discover(source, layout)[1]]


def test_every_problem_of_a_table_is_collected(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text(
        "subject_id,modality,path,mask\nA,t1,a.nii,m.nii\nA,T1,b.nii,\n../up,t1,c.nii,\nA,t1,d.nii,\nA,t2,,\nA,pd,e.nii,n.nii\n"
    )
    reported = messages(file, "table")
    for reason in (
        "line 3: unknown modality 'T1'",
        "line 4: subject_id '../up'",
        "a second t1 of subject A",
        "line 6: no path",
        "a second mask of subject A",
    ):
        assert sum(reason in message for message in reported) == 1, reason
    assert len(reported) == 5


def test_two_files_for_one_role_and_a_subject_without_volumes_are_problems(tmp_path):
    tree(tmp_path, *brats("A", "t1"), "A/A_t1.nii", *brats("B", "seg"))
    first, second = sorted(messages(tmp_path, "brats"))
    assert "a second t1 of subject A" in first
    assert "subject B has no volume" in second


def test_a_subject_in_both_folders_is_a_problem(tmp_path):
    tree(tmp_path, *brats("A", "t1", folder="training/"), *brats("A", "t2", folder="validation/"))
    assert messages(tmp_path, "brats") == ["subject A is in a training and a validation folder"]


def test_a_source_of_the_wrong_kind_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.csv").write_text("subject_id,modality,path\n")
    for source, layout, reason in (
        (tmp_path / "nowhere", "brats", "does not exist"),
        (tmp_path / "empty", "ixi", "wanted names like IXI-T1"),
        (tmp_path / "empty", "table", "is a folder"),
        (tmp_path / "data.csv", "bids", "is a file"),
        (tmp_path / "data.csv", "table", "no file"),
        (tmp_path, "dicom", "wanted one of: brats, ixi, bids, table"),
    ):
        with pytest.raises(UserError, match=reason):
            discover(source, layout)


def test_a_folder_that_cannot_be_read_is_a_problem(tmp_path, monkeypatch):
    names = [f"IXI-{role}/IXI002-Guys-0828-{role}.nii.gz" for role in ("T1", "T2")]
    tree(tmp_path, *names)
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("IXI-T2"):
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    subjects, problems = discover(tmp_path, "ixi")
    assert [list(subject.volumes) for subject in subjects] == [["t1"]]
    assert [(problem.path, problem.message) for problem in problems] == [
        (tmp_path / "IXI-T2", "the folder cannot be read: Permission denied")
    ]
