"""One vocabulary for every way in: what names of real data sets mean, and what is told where they do not say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aldm.data.modalities import MODALITIES
from aldm.data.naming import ALIASES, NotAVolume, check_source, choose_source, read_name
from aldm.errors import UserError

NAMES = {
    "BraTS2021_00001_t1.nii.gz": "t1",
    "BraTS2021_00001_t1ce.nii.gz": "t1ce",
    "BraTS2021_00001_flair.nii.gz": "flair",
    "BraTS-GLI-00000-000-t1n.nii.gz": "t1",
    "BraTS-GLI-00000-000-t1c.nii.gz": "t1ce",
    "BraTS-GLI-00000-000-t2w.nii.gz": "t2",
    "BraTS-GLI-00000-000-t2f.nii.gz": "flair",
    "IXI002-Guys-0828-T2.nii.gz": "t2",
    "IXI002-Guys-0828-PD.nii.gz": "pd",
    "sub-01_T1w.nii.gz": "t1",
    "sub-01_ses-post_T1w.nii.gz": "t1",
    "sub-ce_ses-gd_T1w.nii.gz": "t1",
    "sub-t2_ses-flair_run-1_T1w.nii": "t1",
    "sub-01_ses-post_t1.nii.gz": "t1",
    "sub-01_ce-gad_T1w.nii.gz": "t1ce",
    "sub-01_acq-tirm_rec-norm_FLAIR.nii.gz": "flair",
    "post-surgery_T1w.nii.gz": "t1",
    "T1_post_op.nii": "t1",
    "t1_mprage_sag": "t1",
    "AX T1 POST GAD": "t1ce",
    "T1 post contrast": "t1ce",
    "SAG T1 WITHOUT CONTRAST": "t1",
    "t1_pre_contrast": "t1",
    "Gd_axial_T1": "t1ce",
    "T1+C ax": "t1ce",
    "t2_flair_tra": "flair",
    "FLAIR_MPR_sag": "flair",
    "mpr_sag": "t1",
}
UNSURE = {
    "CE_study_T1.nii.gz": ("t1", "t1ce"),
    "T1_FLAIR": ("t1", "flair"),
    "t1_and_t2": ("t1", "t2"),
    "PD_T2_dual": ("t2", "pd"),
    "sub-01_acq-gd_T1w.nii.gz": ("t1", "t1ce"),
}
REFUSED = [
    "t1_seg.nii.gz",
    "BraTS2021_00000_tissue.nii.gz",
    "t1_brain_pveseg.nii.gz",
    "BraTS-GLI-00000-000-seg.nii.gz",
    "W39_1998.09.19_Segm.nii",
    "desc-T1w_mask.nii.gz",
    "sub-01_desc-T1w_mask.nii.gz",
    "sub-01_label-lesion_T1w.nii.gz",
    "sub-01_part-phase_T1w.nii.gz",
    "sub-01_ce-gd_T2w.nii.gz",
    "sub-01_T1map.nii.gz",
    "sub-01_T2starw.nii.gz",
    "t2_map",
    "T2_SWI",
    "T2*_axial",
    "t1_rho_map",
    "synthetic-t2",
    "sub-01_T1w_synthetic-t2.nii.gz",
    "sub-01_desc-synthetic_T2w.nii.gz",
    "scan_synthetic-t2_std.nii.gz",
    "SYNTHETIC t2 from t1",
    "synthetic t2 from t1, aldm 0123abcd ddim 10 seed 7",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_its_modality(name):
    assert read_name(name).modality == NAMES[name]
    assert choose_source(name, "") == (NAMES[name], "file name")
    assert choose_source("scan.nii.gz", name) == (NAMES[name], "header")
    check_source(name, NAMES[name])
    for other in MODALITIES:
        if other != NAMES[name]:
            with pytest.raises(UserError, match=f"by its name it is {NAMES[name]}, and `source` is {other}"):
                check_source(name, other)
    with pytest.raises(NotAVolume, match=f"by its file name it is {NAMES[name]}, wanted one of"):
        choose_source(name, "", [modality for modality in MODALITIES if modality != NAMES[name]])


@pytest.mark.parametrize("name", UNSURE)
def test_an_unsure_name_lists_its_guesses_and_the_header_may_settle_it(name):
    guesses = UNSURE[name]
    assert read_name(name).guesses == guesses
    with pytest.raises(UserError, match=f"may mean {guesses[0]} or {guesses[1]}: give `source`"):
        choose_source(name, "")
    for guess in guesses:
        check_source(name, guess)
        assert choose_source(name, f"axial {guess}") == (guess, "header")
    with pytest.raises(UserError, match="may mean"):
        choose_source(name, "localised axial")


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_volume_of_a_modality_is_refused_with_the_word(name):
    reading = read_name(name)
    assert reading.guesses == ()
    assert reading.refused.split("'")[1].lower() in name.lower().replace("t2*", "t2star")
    with pytest.raises(UserError, match=r"by its name .* wanted a volume of t1"):
        check_source(name, "t1")
    with pytest.raises(NotAVolume, match="by its file name"):
        choose_source(name, "axial t1")
    with pytest.raises(NotAVolume, match="by its header"):
        choose_source("scan.nii.gz", name)


def test_a_name_that_says_nothing_needs_the_header_or_the_user():
    check_source("scan.nii.gz", "t2")
    assert choose_source("scan.nii.gz", "Ax T2") == ("t2", "header")
    with pytest.raises(
        UserError, match=r"neither its name nor its header says the modality: give `source`, one of t1, pd"
    ):
        choose_source("scan.nii.gz", "FSL5.0", ["t1", "pd"])


@settings(max_examples=50, deadline=None)
@given(
    subject=st.sampled_from(["01", "gd", "post", "t2", "mask", "CE01", "FLAIR7"]),
    session=st.sampled_from(["post", "gd", "ce", "t2", "flair", "mask", "seg", "T1w", "01"]),
    suffix=st.sampled_from([("T1w", "t1"), ("T2w", "t2"), ("PDw", "pd"), ("FLAIR", "flair")]),
)
def test_in_a_bids_name_neither_subject_nor_session_decides(subject, session, suffix):
    assert read_name(f"sub-{subject}_ses-{session}_{suffix[0]}.nii.gz").guesses == (suffix[1],)


def test_no_word_means_two_modalities():
    words = [word for aliases in ALIASES.values() for word in aliases]
    assert len(words) == len(set(words))
    assert set(ALIASES) == set(MODALITIES)
