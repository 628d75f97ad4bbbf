"""Names of real data sets that a layout has to take, to choose among, or to speak of."""

import pytest
from test_layouts import brats, found, tree

from aldm.data.layouts import discover, split_of
from aldm.errors import UserError


def notes(root, layout, **more):
    """What is said of the tree and stops nothing, the file's name first."""
    _, problems = discover(root, layout, **more)
    assert not any(problem.stops for problem in problems)
    return [f"{problem.path.name}: {problem.message}" for problem in problems]


def test_brats_of_2023_and_later(tmp_path):
    words = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "seg": "seg"}
    scan = "BraTS-GLI-00008-000"
    tree(tmp_path, *[f"{scan}/{scan}-{word}.nii.gz" for word in words.values()])
    assert found(tmp_path, "brats") == {scan: {role: f"{scan}/{scan}-{word}.nii.gz" for role, word in words.items()}}
    assert notes(tmp_path, "brats") == []


def test_all_scans_of_a_brats_patient_share_a_split(tmp_path):
    scans = [f"BraTS-GLI-{patient:05d}-{time:03d}" for patient in range(30) for time in (0, 1, 100)]
    tree(tmp_path, *[f"{scan}/{scan}-t1n.nii.gz" for scan in scans])
    splits = {subject.subject_id: subject.split for subject in discover(tmp_path, "brats")[0]}
    assert len(splits) == 90
    assert all(splits[scan] == split_of(scan[:-4]) for scan in scans)
    assert set(splits.values()) == {"train", "validation", "test"}


def test_a_misnamed_segmentation_is_named_with_the_way_out(tmp_path):
    subject = "BraTS20_Training_355"
    tree(tmp_path, *brats(subject, "t1", "t1ce", "t2", "flair"), f"{subject}/W39_1998.09.19_Segm.nii")
    (note,) = notes(tmp_path, "brats")
    assert note.startswith("W39_1998.09.19_Segm.nii: passed over")
    assert f"if it is the segmentation of {subject}, rename it to {subject}_seg.nii" in note
    assert "seg" not in found(tmp_path, "brats")[subject]


def test_files_with_other_names_are_counted(tmp_path):
    tree(tmp_path, *brats("A"), "A/A_adc.nii.gz", *[f"atlas/{i}.nii.gz" for i in range(3)])
    assert notes(tmp_path, "brats") == [
        "A_adc.nii.gz: passed over, its name is none of layout brats",
        "0.nii.gz: passed over, its name is none of layout brats (and 2 more such files)",
    ]
    tree(tmp_path / "ixi", "T1/IXI002-Guys-0828-T1.nii.gz", "MRA/IXI002-Guys-0828-MRA.nii.gz")
    assert notes(tmp_path / "ixi", "ixi") == [
        "IXI002-Guys-0828-MRA.nii.gz: passed over, its name is none of layout ixi"
    ]


def test_of_two_runs_of_a_participant_one_is_taken_and_said(tmp_path):
    tree(
        tmp_path,
        *[f"sub-01/anat/sub-01_run-{run}_T1w.nii.gz" for run in ("01", "02", "10")],
        "sub-01/anat/sub-01_acq-mprage_T1w.nii.gz",
        "sub-01/anat/sub-01_run-2_T2w.nii.gz",
        "sub-02/anat/sub-02_T1w.nii.gz",
    )
    for run, taken in (("first", "run-01"), ("last", "run-10"), ("2", "run-02"), ("10", "run-10"), ("7", "run-01")):
        subjects, problems = discover(tmp_path, "bids", run)
        files = {subject.subject_id: subject.volumes for subject in subjects}
        assert files["sub-01"]["t1"].name == f"sub-01_{taken}_T1w.nii.gz"
        assert files["sub-01"]["t2"].name == "sub-01_run-2_T2w.nii.gz"
        assert files["sub-02"]["t1"].name == "sub-02_T1w.nii.gz"
        assert len(problems) == 3
        for problem in problems:
            assert not problem.stops
            assert f"sub-01_{taken}_T1w.nii.gz is taken as t1 of sub-01" in problem.message


def test_each_session_is_a_subject_with_its_own_choice(tmp_path):
    names = [f"sub-01/ses-{s}/anat/sub-01_ses-{s}_run-{run}_T1w.nii.gz" for s in ("pre", "post") for run in (1, 2)]
    tree(tmp_path, *names)
    subjects, _ = discover(tmp_path, "bids", "last")
    assert {s.subject_id: s.volumes["t1"].name for s in subjects} == {
        f"sub-01_ses-{s}": f"sub-01_ses-{s}_run-2_T1w.nii.gz" for s in ("pre", "post")
    }
    assert len({subject.split for subject in subjects}) == 1


def test_the_same_image_twice_stays_a_problem(tmp_path):
    tree(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_T1w.nii")
    assert ["a second t1 of subject sub-01" in p.message for p in discover(tmp_path, "bids")[1]] == [True]


def test_an_image_that_may_be_two_modalities_is_left_out_and_said(tmp_path):
    tree(tmp_path, "sub-01/anat/sub-01_acq-gd_T1w.nii.gz", "sub-01/anat/sub-01_T2w.nii.gz")
    (note,) = notes(tmp_path, "bids")
    assert note.startswith("sub-01_acq-gd_T1w.nii.gz: passed over, its name may mean t1 or t1ce: say it with ce-")
    assert list(found(tmp_path, "bids")["sub-01"]) == ["t2"]


@pytest.mark.parametrize(
    ("layout", "run", "words"), [("bids", "second", "wanted first, last or"), ("ixi", "2", "no runs")]
)
def test_a_run_that_means_nothing_is_refused(tmp_path, layout, run, words):
    with pytest.raises(UserError, match=words):
        discover(tmp_path, layout, run)


def test_a_table_that_contradicts_a_file_name_is_told(tmp_path):
    file = tmp_path / "data.csv"
    file.write_text("subject_id,modality,path\nA,t1,A_t2.nii.gz\nA,t2,A_x.nii.gz\n")
    (note,) = notes(file, "table")
    assert note.startswith("A_t2.nii.gz: taken as t1, as line 2 of data.csv says; by its name it is t2")
