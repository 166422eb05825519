import json
import os
import re

import pandas as pd
import pytest
from trees import bids, challenge, table

from wmhlib import cohort, naming
from wmhlib.errors import InputError
from wmhlib.files import read_table, write_atomic, write_table
from wmhlib.sections import Inputs


def test_the_challenge_layout(touch):
    folder = touch(*challenge("training/Utrecht/10"), *challenge("training/Utrecht/9"), *challenge("training/Amsterdam/GE3T/100"),
                   *challenge("test/Amsterdam/Philips_VU .PETMR_01./7"), "training/Utrecht/9/orig/FLAIR.nii.gz",
                   "training/Utrecht/9/ventricles.nii.gz", "additional_annotations/observer_o3/training/Utrecht/9/result.nii.gz")
    cases = cohort.find_cases(folder)
    assert list(cases) == ["case", "subject", "site", "flair", "t1", "mask", "ventricles", "group", "origin"]
    assert cases.case.tolist() == cases.subject.tolist() == ["GE3T_100", "Philips_VU_PETMR_01_7", "Utrecht_9", "Utrecht_10"]
    assert cases.site.tolist() == ["GE3T", "Philips_VU_PETMR_01", "Utrecht", "Utrecht"]
    assert cases.group.tolist() == ["training", "test", "training", "training"]
    assert cases.flair[2] == str(folder / "training/Utrecht/9/pre/FLAIR.nii.gz")
    assert cases.t1[2].endswith("9/pre/T1.nii.gz") and cases["mask"][2].endswith("9/wmh.nii.gz")
    assert [path.endswith("Utrecht/9/ventricles.nii.gz") for path in cases.ventricles] == [False, False, True, False]


def test_the_kaggle_mirror_is_uncompressed_and_deeper(touch):
    folder = touch(*challenge("wmh_data/training/Singapore/50", ".nii"), *challenge("wmh_data/test/Amsterdam/GE1T5/1", ".nii"),
                   *challenge("wmh_data/test/Amsterdam/Philips_VU .PETMR_01./7", ".nii"))
    cases = cohort.find_cases(folder)
    assert cases[["case", "site", "group"]].values.tolist() == [
        ["GE1T5_1", "GE1T5", "test"], ["Philips_VU_PETMR_01_7", "Philips_VU_PETMR_01", "test"], ["Singapore_50", "Singapore", "training"]]


def test_a_group_is_a_folder_of_the_cohort_and_not_one_above_it(touch):
    touch(*challenge("test/mine/Utrecht/1"), *challenge("training/Utrecht/2"))
    folder = touch()
    assert cohort.find_cases(folder / "test/mine").group.tolist() == [""]
    assert cohort.find_cases(folder / "training").group.tolist() == ["training"]


def test_bids_with_sessions_takes_the_lesion_mask_among_others(touch):
    names = [f"{folder}sub-01/ses-{s}/anat/sub-01_ses-{s}_{name}.nii.gz" for s in (1, 2) for folder, name in (
        ("", "FLAIR"), ("", "T1w"), ("", "space-FLAIR_T1w"), ("derivatives/manual/", "space-FLAIR_label-WMH_mask"),
        ("derivatives/manual/", "space-T1w_label-WMH_mask"), ("derivatives/manual/", "space-FLAIR_label-brain_mask"),
        ("derivatives/manual/", "space-FLAIR_label-WMH_dseg"), ("derivatives/fmriprep/", "dseg"),
        ("derivatives/fmriprep/", "desc-brain_mask"), ("derivatives/other/", "space-FLAIR_label-CSFventricles_mask"))]
    cases = cohort.find_cases(touch(*names))
    assert cases.case.tolist() == ["sub-01_ses-1", "sub-01_ses-2"] and cases.subject.tolist() == ["sub-01"] * 2
    assert all(m.endswith(f"manual/sub-01/ses-{s}/anat/sub-01_ses-{s}_space-FLAIR_label-WMH_mask.nii.gz")
               for m, s in zip(cases["mask"], (1, 2), strict=True))
    assert all("space-FLAIR_T1w" in t1 for t1 in cases.t1) and all("CSFventricles" in path for path in cases.ventricles)


@pytest.mark.parametrize(("names", "chosen"), [
    (["fmriprep/dseg", "fmriprep/desc-aseg_dseg", "fmriprep/desc-brain_mask", "fmriprep/label-GM_probseg"], ""),
    (["samseg/desc-samseg_dseg", "samseg/space-FLAIR_dseg", "samseg/label-L_probseg"], ""),
    (["samseg/desc-samseg_dseg", "samseg/label-lesion_dseg"], "samseg/label-lesion_dseg"),
    (["fmriprep/dseg", "fmriprep/desc-brain_mask", "bet/space-FLAIR_mask", "lst/space-FLAIR_desc-lesion_mask"], "lst/space-FLAIR_desc-lesion_mask"),
    (["bet/space-FLAIR_mask", "manual/label-WMH_mask"], "manual/label-WMH_mask"),
    (["lst/desc-wmh_mask", "lst/label-WMH_mask", "lst/mask"], "lst/label-WMH_mask"),
    (["fmriprep/dseg", "fmriprep/desc-brain_mask", "manual/mask"], "manual/mask")])
def test_tissue_and_brain_are_no_lesions_and_a_bare_mask_is_the_last_choice(touch, names, chosen):
    places = [f"derivatives/{pipeline}/sub-1/anat/sub-1_{name}.nii.gz" for pipeline, name in (name.split("/") for name in names)]
    folder = touch("sub-1/anat/sub-1_FLAIR.nii.gz", *bids("2"), *places)
    masks = cohort.find_cases(folder).set_index("case")["mask"].to_dict()
    assert masks.get("sub-1", "") == (str(folder / places[names.index(chosen)]) if chosen else "")


def test_a_t1_belongs_to_a_flair_of_another_acquisition_unless_one_of_its_own_is_there(touch):
    anat = "sub-1/anat/sub-1_"
    folder = touch(*(f"{anat}{name}.nii.gz" for name in ("acq-tse_FLAIR", "acq-mprage_space-FLAIR_T1w")))
    assert cohort.find_scans(folder).t1[0].endswith("acq-mprage_space-FLAIR_T1w.nii.gz")
    touch(f"{anat}acq-tse_space-FLAIR_T1w.nii.gz")
    assert cohort.find_scans(folder).t1[0].endswith("acq-tse_space-FLAIR_T1w.nii.gz")


@pytest.mark.parametrize("name", ["sourcedata", "code"])
def test_folders_that_bids_sets_aside_are_not_looked_into(touch, name):
    folder = touch(*bids("1"), f"{name}/sub-1/anat/sub-1_FLAIR.nii.gz", f"derivatives/fmriprep/{name}/sub-1/anat/sub-1_label-lesion_mask.nii.gz")
    assert cohort.find_cases(folder).case.tolist() == ["sub-1"]


def test_bids_runs_and_acquisitions_keep_to_their_masks(touch):
    anat, masks = "rawdata/sub-1/anat/sub-1_", "derivatives/manual/sub-1/anat/sub-1_"
    folder = touch(*(f"{anat}{scan}_FLAIR.nii.gz" for scan in ("acq-2D_run-1", "acq-2D_run-2", "acq-3D", "acq-old")),
                   *(f"{masks}{scan}_label-WMH_mask.nii.gz" for scan in ("acq-2D_run-1", "acq-2D_run-2", "acq-3D")))
    cases = cohort.find_cases(folder)
    assert cases.case.tolist() == ["sub-1_acq-2D_run-1", "sub-1_acq-2D_run-2", "sub-1_acq-3D"]
    assert all(case in mask for case, mask in zip(cases.case, cases["mask"])) and set(cases.site) == {folder.name}
    with pytest.raises(InputError, match="duplicate mask .*sub-2_space-FLAIR_label.*sub-2_run-1 and sub-2_run-2"):
        cohort.find_cases(touch("sub-2/anat/sub-2_run-1_FLAIR.nii.gz", "sub-2/anat/sub-2_run-2_FLAIR.nii.gz", bids("2")[1]))


def test_a_scan_without_acquisition_and_one_with_keep_to_their_masks(touch):
    anat, masks = "sub-1/anat/sub-1_", "derivatives/manual/sub-1/anat/sub-1_"
    folder = touch(f"{anat}FLAIR.nii.gz", f"{anat}acq-low_FLAIR.nii.gz", f"{masks}label-WMH_mask.nii.gz")
    assert cohort.find_cases(folder).case.tolist() == ["sub-1"]
    touch(f"{masks}acq-low_label-WMH_mask.nii.gz")
    assert cohort.find_cases(folder)["mask"].str.contains("acq-low").tolist() == cohort.find_cases(folder).case.str.contains("acq-low").tolist() == [False, True]


def test_several_t1_that_nobody_asked_for_are_no_trouble(touch):
    folder = touch(*bids("1"), *(f"sub-1/anat/sub-1_space-FLAIR_desc-{name}_T1w.nii.gz" for name in ("brain", "preproc")))
    assert cohort.find_scans(folder).t1.tolist() == cohort.find_cases(folder).t1.tolist() == [""]
    with pytest.raises(InputError, match="more than one candidate for its t1"):
        cohort.find_scans(folder, Inputs(modalities=("flair", "t1")))


def test_endings_in_capitals_are_endings(touch):
    assert cohort.find_scans(touch("Head_FLAIR.NII.GZ", "Other_FLAIR.NII")).case.tolist() == ["Head_FLAIR", "Other_FLAIR"]


@pytest.mark.parametrize("error, outcome", [(PermissionError(13, "no"), "left out .*sub-2, which may not be read"), (OSError(5, "I/O error"), "cannot be listed .I/O error")])
def test_a_folder_that_cannot_be_listed_is_not_passed_over_in_silence(touch, monkeypatch, capsys, error, outcome):
    folder, scandir = touch(*bids("1"), *bids("2")), os.scandir

    def failing(path):
        if str(path).endswith("sub-2"):
            error.filename = str(path)
            raise error
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    if isinstance(error, PermissionError):
        assert cohort.find_scans(folder).case.tolist() == ["sub-1"] and re.search(outcome, capsys.readouterr().out)
    else:
        with pytest.raises(InputError, match=outcome):
            cohort.find_scans(folder)


def test_masks_of_two_pipelines_are_left_to_the_user_and_every_such_case_is_named(touch):
    folder = touch(*bids("1"), *bids("1", pipeline="samseg", mask="label-lesion_dseg"), *bids("2"), *bids("3"), *bids("3", pipeline="bianca"))
    with pytest.raises(InputError, match=r"(?s)sub-1 has .*derivatives/manual/.*derivatives/samseg/.*sub-3 .*derivatives/bianca.*cases\.csv") as error:
        cohort.find_cases(folder)
    assert "sub-2" not in str(error.value) and cohort.find_scans(folder).case.tolist() == ["sub-1", "sub-2", "sub-3"]


@pytest.mark.parametrize("place", ["derivatives/wmhlib/", "derivatives/ours/", "predictions/"])
def test_what_this_library_predicted_is_no_reference(touch, place):
    folder = touch(*bids("1"), f"{place}sub-1/anat/sub-1_space-FLAIR_label-WMH_mask.nii.gz", f"{place}sub-2/anat/sub-2_FLAIR.nii.gz")
    if "wmhlib" not in place:
        write_atomic(folder / place / "dataset_description.json", json.dumps({"GeneratedBy": [{"Name": "wmhlib", "Version": "0.1"}]}))
    assert ["/manual/" in path for path in cohort.find_cases(folder)["mask"]] == [True]
    assert cohort.find_scans(folder).case.tolist() == ["sub-1"]


@pytest.mark.parametrize("column", ["site", "SITE_ID", "scanner"])
def test_the_site_of_a_participant_is_taken_from_its_table(touch, column):
    folder = touch(*bids("1"), *bids("2"), *bids("3"), *bids("4"))
    lines = ["sub-1\t70\tPrisma 3T", "sub-2\t71\tn/a", '5\t"60\t??', '3\t"66\tSkyra']
    write_atomic(folder / "participants.tsv", "\n".join([f"participant_id\tage\t{column}", *lines]) + "\n")
    touch(*bids("5"))
    sites = cohort.find_cases(folder).set_index("case").site.to_dict()
    assert sites == {"sub-1": "Prisma_3T", "sub-2": folder.name, "sub-3": "Skyra", "sub-4": folder.name, "sub-5": folder.name}


def test_sites_that_cannot_be_read_stop_no_prediction(touch, capsys):
    folder = touch(*bids("1"))
    (folder / "participants.tsv").write_bytes("participant_id\tsite\nsub-1\tZürich\n".encode("latin-1"))
    assert cohort.find_scans(folder).site.tolist() == [folder.name] and "no sites: " in capsys.readouterr().out
    with pytest.raises(InputError, match="participants.tsv"):
        cohort.find_cases(folder)


def test_two_bids_datasets_with_the_same_numbers_are_different_people(touch, capsys):
    cases = cohort.find_cases(touch(*bids("1", dataset="Lyon/"), *bids("1", dataset="Graz/"), *bids("2", dataset="Graz/")))
    assert cases.case.tolist() == cases.subject.tolist() == ["Graz_sub-1", "Graz_sub-2", "Lyon_sub-1"]
    assert cases.site.tolist() == ["Graz", "Graz", "Lyon"]
    assert "1 subject labels occur in several datasets, each taken for another person (sub-1)" in capsys.readouterr().out


def test_datasets_of_one_name_are_sites_of_their_own(touch):
    cases = cohort.find_cases(touch(*bids("1", dataset="Lyon/bids/"), *bids("1", dataset="Graz/bids/"), *bids("2", dataset="Paris/")))
    assert cases.site.tolist() == ["Graz_bids", "Lyon_bids", "Paris"]
    assert cases.subject.tolist() == ["Graz_bids_sub-1", "Lyon_bids_sub-1", "Paris_sub-2"]


def test_linked_folders_are_followed_once_and_hidden_ones_not_at_all(touch):
    folder = touch("store/Utrecht/1/pre/FLAIR.nii.gz", "store/Utrecht/1/wmh.nii.gz", *challenge("cohort/.trash/Utrecht/2"))
    (folder / "cohort/training").mkdir()
    (folder / "cohort/training/Utrecht").symlink_to(folder / "store/Utrecht")
    (folder / "cohort/training/Utrecht/loop").symlink_to(folder / "cohort")
    assert cohort.find_cases(folder / "cohort")[["case", "group"]].values.tolist() == [["Utrecht_1", "training"]]


def test_a_table_in_any_dialect_of_csv(touch):
    folder = touch("scans/a.nii.gz", "scans/b c.nii.gz", "m/a.nii", "m/b.nii", "m/v.nii", "t1.nii")
    line = f"07;Basel;scans/b c.nii.gz;{folder}/m/b.nii;t1.nii;2;m/v.nii;train"
    path = table(folder, "07;Basel;scans/a.nii.gz;m/a.nii;;1;;", "", ";;;;;;;", line,
                 header="\ufeffSubject; SITE;FLAIR;Mask;T1;session;ventricles;group", name="mine.csv")
    cases = cohort.find_cases(path)
    assert cases.case.tolist() == ["Basel_07_ses-1", "Basel_07_ses-2"] and cases.subject.tolist() == ["07", "07"]
    assert cases.iloc[1].tolist()[2:] == ["Basel", *(str(folder / name) for name in ("scans/b c.nii.gz", "t1.nii", "m/b.nii", "m/v.nii")), "training", "real"]
    write_table(cases, folder / "again.csv")
    pd.testing.assert_frame_equal(read_table(folder / "again.csv"), cases, check_dtype=False)


def test_a_folder_is_read_through_its_table(touch):
    folder = touch(*challenge("Utrecht/1"), "f.nii", "m.nii")
    table(folder, "x,A,f.nii,m.nii,")
    assert cohort.find_cases(folder).case.tolist() == ["A_x"]


def test_every_wrong_row_of_a_table_is_named_by_its_line(touch):
    folder = touch("a.nii", "b.nii", "m.nii", "n.nii")
    path = table(folder, "1,A,a.nii,m.nii,", "2,A,gone.nii,n.nii,", "1,A,b.nii,n.nii,", ",A,b.nii,n.nii,", "5,A,a.nii,n.nii,x.nii", "6,A,b.nii,m.nii,,9")
    with pytest.raises(InputError) as error:
        cohort.find_cases(path)
    lines = str(error.value).splitlines()
    assert "cases.csv has 5 wrong rows" in lines[0] and [line.split(":")[0].strip() for line in lines[1:]] == [f"line {n}" for n in (3, 4, 5, 6, 7)]
    for line, reason in zip(lines[1:], ("gone.nii does not exist", "case A_1 is also that of line 2", "subject is empty",
                                        "flair file .*a.nii is also that of line 2", "more cells than columns")):
        assert re.search(reason, line), (reason, line)


@pytest.mark.parametrize(("header", "message"), [
    ("subject,site,flair", "columns subject, site, flair: expected subject, site, flair, mask"),
    ("subject,site,flair,mask,flair", "each once"), ("", "has the columns")])
def test_a_table_without_its_columns_is_refused(touch, header, message):
    with pytest.raises(InputError, match=message):
        cohort.find_cases(table(touch("a.nii"), "1,A,a.nii", header=header))


def test_a_table_in_another_encoding_or_with_an_unknown_group_is_refused(touch):
    folder = touch("a.nii", "m.nii")
    (folder / "old.csv").write_bytes("subject,site,flair,mask\n1,Zürich,a.nii,m.nii\n".encode("latin-1"))
    with pytest.raises(InputError, match="old.csv is not UTF-8"):
        cohort.find_cases(folder / "old.csv")
    with pytest.raises(InputError, match="line 2: group is 'patients'"):
        cohort.find_cases(table(folder, "1,A,a.nii,m.nii,patients", header="subject,site,flair,mask,group"))


def test_a_brain_mask_is_no_lesion_mask_and_the_scan_without_one_is_named(touch, capsys):
    folder = touch("sub-1/anat/sub-1_FLAIR.nii.gz", "derivatives/x/sub-1/anat/sub-1_label-brain_mask.nii.gz",
                   "derivatives/fmriprep/sub-1/anat/sub-1_desc-brain_mask.nii.gz")
    with pytest.raises(InputError, match="no labelled cases"):
        cohort.find_cases(folder)
    assert "left out 1 scans without a mask" in capsys.readouterr().out


def test_masks_that_name_no_session_are_those_of_the_only_one(touch):
    folder = touch("sub-1/ses-a/anat/sub-1_ses-a_FLAIR.nii.gz", "derivatives/x/sub-1/anat/sub-1_label-WMH_mask.nii.gz")
    assert cohort.find_cases(folder)[["case", "subject"]].values.tolist() == [["sub-1_ses-a", "sub-1"]]
    touch("sub-1/ses-b/anat/sub-1_ses-b_FLAIR.nii.gz")
    with pytest.raises(InputError, match="no labelled cases"):
        cohort.find_cases(folder)


def test_a_place_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        cohort.find_cases(tmp_path / "nowhere")


def test_scans_to_predict_need_no_mask(touch):
    folder = touch("bids/sub-1/ses-2/anat/sub-1_ses-2_FLAIR.nii.gz", "bids/sub-1/ses-2/anat/sub-1_ses-2_space-FLAIR_T1w.nii.gz",
                   *challenge("wmh/Utrecht/1")[:2])
    scans = cohort.find_scans(folder)
    assert scans[["case", "subject", "session", "site"]].values.tolist() == [
        ["Utrecht_1", "Utrecht_1", "", "Utrecht"], ["sub-1_ses-2", "sub-1", "2", "bids"]]
    assert scans.t1[0].endswith("pre/T1.nii.gz") and scans.t1[1].endswith("space-FLAIR_T1w.nii.gz")


def test_scans_in_another_layout_than_the_others_are_named(touch, capsys):
    folder = touch("sub-01_FLAIR.nii.gz", "sub-01_FLAIR_reg.nii.gz", "sub-77_flair.nii.gz", "P2_FLAIR.nii.gz", *challenge("Utrecht/1")[:2], "Utrecht/1/orig/FLAIR.nii.gz", "derivatives/fsl/FLAIR_brain.nii.gz")
    assert cohort.find_scans(folder).case.tolist() == ["Utrecht_1", "sub-01"]
    printed = capsys.readouterr().out
    assert "left out 2 scans" in printed and "P2_FLAIR.nii.gz" in printed and "sub-77_flair.nii.gz" in printed


def test_a_plain_folder_gives_its_flair_files_and_not_their_results(touch):
    folder = touch("anna_FLAIR.nii.gz", "bert/t2flair.nii", "anna_FLAIR_wmh.nii.gz", "FLAIR_prob.nii.gz", "anna_T1.nii.gz",
                   "anna_space-FLAIR_T1w.nii.gz", "FLAIR.json")
    scans = cohort.find_scans(folder)
    assert scans.case.tolist() == scans.subject.tolist() == ["anna_FLAIR", "bert_t2flair"] and set(scans.site) == {folder.name}
    assert cohort.find_scans(folder / "anna_T1.nii.gz").case.tolist() == ["anna_T1"]
    with pytest.raises(InputError, match="no FLAIR scans"):
        cohort.find_scans(touch("empty/x.nii.gz") / "empty")


def test_a_table_of_scans_needs_no_site_and_leaves_missing_files_to_the_reader(touch):
    scans = cohort.find_scans(table(touch("a.nii"), "1,a.nii,no.nii", "2,gone.nii,", header="subject,flair,mask"))
    assert scans.subject.tolist() == ["1", "2"] and scans.flair[1].endswith("gone.nii")


def test_a_bad_row_in_a_table_of_scans_leaves_the_others(touch, capsys):
    folder = touch("a.nii", "b_FLAIR.nii.gz", "c.nii")
    scans = cohort.find_scans(table(folder, "1,??,a.nii", "9,A,a.nii", ",A,b_FLAIR.nii.gz", "3,A,", "1,,c.nii", "4,A,c,d.nii", header="subject,site,flair"))
    assert scans[["subject", "site"]].values.tolist() == [["b_FLAIR", "A"], ["1", folder.name], ["1", folder.name]]
    assert scans.case.is_unique and [path.rsplit("/")[-1] for path in scans.flair] == ["b_FLAIR.nii.gz", "a.nii", "c.nii"]
    printed = capsys.readouterr().out
    assert "left out 3 rows" in printed and re.findall(r"line (\d): (?:flair|more)", printed) == ["3", "5", "7"]


def test_only_the_ending_is_cut_from_a_name():
    assert [naming.stem(f"/x/{name}") for name in ("a.nii_b.nii.gz", "a.nii", "a.b")] == ["a.nii_b", "a", "a.b"]
