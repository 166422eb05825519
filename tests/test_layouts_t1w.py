import pytest
from trees import T1W, atlas, bids, challenge, table

from wmhlib import cohort
from wmhlib.errors import InputError
from wmhlib.files import write_atomic


def test_atlas_has_t1w_scans_in_the_folders_of_its_sites(touch, capsys):
    folder = touch(*atlas("r001s001", "Training/R001/"), *atlas("r001s002", "Training/R001/"), *atlas("r048s001", "Training/R048/"),
                   atlas("r100s001", "Testing/R100/")[0])
    cases = cohort.find_cases(folder, T1W)
    assert cases.subject.tolist() == ["sub-r001s001", "sub-r001s002", "sub-r048s001"] and cases.site.tolist() == ["R001", "R001", "R048"]
    assert cases.case[0] == "sub-r001s001_ses-1_space-MNI152NLin2009aSym" and cases.case.is_unique
    assert all(path.endswith("_T1w.nii.gz") for path in cases.flair) and all(path.endswith("desc-T1lesion_mask.nii.gz") for path in cases["mask"])
    assert (cases.t1 == "").all() and "left out 1 scans without a mask" in capsys.readouterr().out
    assert len(cohort.find_scans(folder, T1W)) == 4
    with pytest.raises(InputError, match="no FLAIR scans"):
        cohort.find_cases(folder)


def test_masks_of_t1w_scans_may_lie_under_derivatives_and_are_of_their_own_space(touch):
    folder = touch(*atlas("1", masks="derivatives/manual/"), *atlas("1", space="", masks="derivatives/manual/"),
                   "sub-1/ses-1/anat/sub-1_ses-1_FLAIR.nii.gz", "sub-1/ses-1/anat/sub-1_ses-1_space-FLAIR_T1w.nii.gz")
    write_atomic(folder / "participants.tsv", "participant_id\tsite\nsub-1\tLyon\n")
    cases = cohort.find_cases(folder, T1W)
    assert cases.case.tolist() == ["sub-1_ses-1", "sub-1_ses-1_space-MNI152NLin2009aSym"] and set(cases.site) == {"Lyon"}
    assert ["space-MNI" in path for path in cases["mask"]] == ["space-MNI" in path for path in cases.flair] == [False, True]


def test_a_t1w_scan_stands_in_either_column_of_a_table(touch):
    folder = touch("f.nii", "t.nii", "m.nii")
    for header, line in (("subject,site,t1,mask", "1,A,t.nii,m.nii"), ("subject,site,flair,mask", "1,A,t.nii,m.nii"),
                         ("subject,site,flair,t1,mask", "1,A,f.nii,t.nii,m.nii"), ("subject,site,flair,t1,mask", "1,A,t.nii,,m.nii")):
        row = cohort.find_cases(table(folder, line, header=header), T1W).iloc[0]
        assert row.flair.endswith("/t.nii") and row.t1 == ""
    assert cohort.find_scans(table(folder, "t.nii,1", header="t1,subject"), T1W).flair[0].endswith("/t.nii")


def test_the_challenge_and_a_plain_folder_have_t1w_scans_too(touch):
    folder = touch(*challenge("training/Utrecht/1"), "plain/anna_T1w.nii.gz", "plain/bert_t1.nii", "plain/bert_FLAIR.nii", "plain/set1.nii", "plain/anna_T1w_mask.nii")
    row = cohort.find_cases(folder / "training", T1W).iloc[0]
    assert row.flair.endswith("pre/T1.nii.gz") and row.t1 == "" and row["mask"].endswith("wmh.nii.gz")
    assert cohort.find_scans(folder / "plain", T1W).case.tolist() == ["anna_T1w", "bert_t1"]


def test_what_is_no_cohort_of_t1w_scans_is_said_in_their_terms(touch):
    with pytest.raises(InputError, match="no T1w scans in .*_T1w.nii.gz"):
        cohort.find_cases(touch(*bids("1")), T1W)
    with pytest.raises(InputError, match="no labelled cases in .*_label-L_desc-T1lesion_mask beside each _T1w"):
        cohort.find_cases(touch(atlas("1")[0]), T1W)


def test_maps_of_t1_and_t2w_scans_are_no_t1w_scans(touch):
    folder = touch("p1_T1w.nii.gz", "p1_T1map.nii.gz", "p2-T1.nii.gz", "p2_T12_T2w.nii.gz", "p3_T1_MPRAGE.nii.gz")
    assert cohort.find_scans(folder, T1W).case.tolist() == ["p1_T1w", "p2-T1", "p3_T1_MPRAGE"]
