import json
import re

import nibabel
import numpy as np
import pandas as pd
import pytest

from wmhlib import cohort, layouts, nifti
from wmhlib.errors import InputError
from wmhlib.sections import Inputs, Volume
from wmhlib.workspace import read_table, write_atomic, write_table


@pytest.fixture
def touch(tmp_path):
    """Makes empty files: finding cases looks at names alone."""

    def make(*names):
        for name in names:
            write_atomic(tmp_path / name, b"")
        return tmp_path

    return make


def challenge(case, suffix=".nii.gz"):
    return [f"{case}/pre/FLAIR{suffix}", f"{case}/pre/T1{suffix}", f"{case}/wmh{suffix}"]


def bids(subject, session="", dataset="", pipeline="manual", mask="space-FLAIR_label-WMH_mask"):
    """FLAIR and mask of a scan."""
    place, name = (f"sub-{subject}/ses-{session}", f"sub-{subject}_ses-{session}") if session else (f"sub-{subject}", f"sub-{subject}")
    return [f"{dataset}{place}/anat/{name}_FLAIR.nii.gz", f"{dataset}derivatives/{pipeline}/{place}/anat/{name}_{mask}.nii.gz"]


def table(folder, *lines, header="subject,site,flair,mask,t1", name="cases.csv"):
    write_atomic(folder / name, "\n".join([header, *lines]) + "\n")
    return folder / name


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


def test_two_bids_datasets_with_the_same_numbers_are_different_people(touch):
    cases = cohort.find_cases(touch(*bids("1", dataset="Lyon/"), *bids("1", dataset="Graz/"), *bids("2", dataset="Graz/")))
    assert cases.case.tolist() == cases.subject.tolist() == ["Graz_sub-1", "Graz_sub-2", "Lyon_sub-1"]
    assert cases.site.tolist() == ["Graz", "Graz", "Lyon"]


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


def test_people_scanned_at_several_sites_are_said(touch, capsys):
    cohort.find_cases(table(touch("a.nii", "b.nii", "m.nii", "n.nii"), "1,A,a.nii,m.nii,", "1,B,b.nii,n.nii,"))
    assert "1 subjects have scans at several sites, each taken as one person: 1 (A, B)" in capsys.readouterr().out


def test_a_brain_mask_is_no_lesion_mask_and_the_scan_without_one_is_named(touch, capsys):
    folder = touch("sub-1/anat/sub-1_FLAIR.nii.gz", "derivatives/x/sub-1/anat/sub-1_label-brain_mask.nii.gz",
                   "derivatives/fmriprep/sub-1/anat/sub-1_desc-brain_mask.nii.gz")
    with pytest.raises(InputError, match="no labelled cases"):
        cohort.find_cases(folder)
    assert "left out 1 scans without a mask" in capsys.readouterr().out


@pytest.mark.parametrize(("names", "message"), [
    ([], "no FLAIR scans"),
    (challenge("a/Utrecht/1") + challenge("b/Utrecht/1"), "duplicate case Utrecht_1"),
    (challenge("Utrecht/1") + ["Utrecht/1/pre/FLAIR.nii"], "more than one candidate for its flair"),
])
def test_what_cannot_be_a_cohort_is_refused(touch, names, message):
    with pytest.raises(InputError, match=message):
        cohort.find_cases(touch("readme.txt", *names))


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
    folder = touch("sub-01_FLAIR.nii.gz", "P2_FLAIR.nii.gz", *challenge("Utrecht/1")[:2], "Utrecht/1/orig/FLAIR.nii.gz", "derivatives/fsl/FLAIR_brain.nii.gz")
    assert cohort.find_scans(folder).case.tolist() == ["Utrecht_1", "sub-01"]
    printed = capsys.readouterr().out
    assert "left out 1 scans" in printed and "P2_FLAIR.nii.gz" in printed


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
    assert [layouts.stem(f"/x/{name}") for name in ("a.nii_b.nii.gz", "a.nii", "a.b")] == ["a.nii_b", "a", "a.b"]


def case_on_disk(tiny_nifti, lesion=(), other=(), case="Utrecht/1", **scan):
    scan = dict(spacing=(2.0, 1.0, 3.0), axes="LAS") | scan
    flair = tiny_nifti(f"{case}/pre/FLAIR.nii.gz", **scan)
    mask = np.zeros(nifti.load_volume(flair).data.shape, np.uint8)
    mask.flat[list(lesion)], mask.flat[list(other)] = 1, 2
    tiny_nifti(f"{case}/wmh.nii.gz", **scan | {"data": mask})
    return cohort.find_cases(flair.parents[2])


def test_a_check_describes_the_scan_and_measures_label_1_alone(tiny_nifti):
    row = cohort.check_cases(case_on_disk(tiny_nifti, lesion=range(100, 110), other=range(200, 203))).iloc[0]
    assert row.lesion_ml == pytest.approx(10 * 2 * 1 * 3 / 1000)
    assert (row["shape"], row.spacing, row.orientation) == ("24 x 28 x 10", "2.00 x 1.00 x 3.00", "LAS")
    assert row.labels == "0: 6707, 1: 10, 2: 3" and row.warnings.startswith("no T1; 3 voxels of other pathology, ignored")


def test_an_empty_mask_is_legal(tiny_nifti):
    row = cohort.check_cases(case_on_disk(tiny_nifti)).iloc[0]
    assert row.lesion_ml == 0 and "no lesion" in row.warnings


def test_every_bad_file_is_named_at_once(tiny_nifti, tmp_path):
    for name in "123":
        cases = case_on_disk(tiny_nifti, case=f"Utrecht/{name}", shape=(24, 28, 8 + int(name)))
    tiny_nifti("Utrecht/1/wmh.nii.gz", shape=(5, 5, 5), data=np.zeros((5, 5, 5), np.uint8))
    (tmp_path / "Utrecht/3/pre/FLAIR.nii.gz").write_bytes(b"no scan")
    with pytest.raises(InputError, match=r"(?s)2 of 3 cases .*Utrecht_1: .*1/wmh.nii.gz.*Utrecht_3: .*3/pre/FLAIR.nii.gz") as error:
        cohort.check_cases(cases)
    assert "Utrecht_2" not in str(error.value)


def test_ten_bad_cases_are_listed_and_the_others_counted(tiny_nifti):
    cases = case_on_disk(tiny_nifti)
    many = pd.concat([cases.assign(case=f"Utrecht_{i}", flair=f"/gone/{i}.nii") for i in range(13)])
    with pytest.raises(InputError, match=r"(?s)13 of 13 cases.*Utrecht_9: .*\n  and 3 more$"):
        cohort.check_cases(many)


def test_the_checks_are_the_same_on_any_number_of_threads(split_cohort, monkeypatch):
    found = []
    for threads in (1, 5):
        monkeypatch.setattr(cohort.torch, "get_num_threads", lambda threads=threads: threads)
        found.append(cohort.check_cases(split_cohort[0]))
    pd.testing.assert_frame_equal(*found)
    assert found[0].case.tolist() == split_cohort[0].case.tolist() and found[0].digest.nunique() == 9


def test_one_scan_under_two_names_is_refused(tiny_nifti, tmp_path):
    case_on_disk(tiny_nifti)
    case_on_disk(tiny_nifti, case="Singapore/8")
    with pytest.raises(InputError, match="Utrecht_1: .* holds the same scan as case Singapore_8"):
        cohort.check_cases(cohort.find_cases(tmp_path))


def test_a_t1_on_another_grid_is_a_warning_and_an_error_where_t1_is_an_input(tiny_nifti):
    tiny_nifti("Utrecht/1/pre/T1.nii.gz", shape=(20, 20, 10))
    cases = case_on_disk(tiny_nifti)
    assert "T1 lies on another grid" in cohort.check_cases(cases).warnings[0]
    with pytest.raises(InputError, match="T1.nii.gz has shape"):
        cohort.check_cases(cases, Inputs(modalities=("flair", "t1")))


@pytest.mark.parametrize(("scan", "warning"), [
    (dict(spacing=(1.0, 1.0, 9.0)), "slices 9.0 mm apart"), (dict(spacing=(1.0, 1.0, 3.0)), "covers 30 mm high, 24 mm wide, 28 mm long"),
    (dict(axes="PSR"), "not acquired in axial slices"), (dict(spacing=(9.0, 8.0, 12.0), axes="LAS"), "outside the 100 mm")])
def test_an_odd_geometry_is_a_warning(tiny_nifti, scan, warning):
    cases = case_on_disk(tiny_nifti, lesion=[5], **scan)
    assert warning in cohort.check_cases(cases, Inputs(fov=100.0)).warnings[0]


def test_a_head_in_full_has_no_warning(tiny_nifti):
    tiny_nifti("Utrecht/1/pre/T1.nii.gz", spacing=(7.0, 7.0, 9.0), axes="LPS", shape=(24, 28, 16))
    data = np.random.default_rng(1).normal(5, 2, (24, 28, 16)).astype(np.float32)
    data[4:20, 4:24, 2:14] += 100
    cases = case_on_disk(tiny_nifti, lesion=[24 // 2 * 28 * 16 + 14 * 16 + 8], spacing=(7.0, 7.0, 7.0), axes="LPS", data=data, shape=data.shape)
    image = nibabel.load(cases.flair[0])
    nibabel.save(nibabel.Nifti1Image(data[::-1].copy(), image.affine), cases.t1[0])
    assert cohort.check_cases(cases).warnings[0] == ""


def test_a_ventricle_mask_is_used_on_the_grid_of_its_scan_alone(tiny_nifti, tmp_path):
    case_on_disk(tiny_nifti, lesion=range(100, 110))
    ventricles = np.zeros((24, 28, 10), np.int16)
    ventricles.flat[106:130] = 43
    path = tiny_nifti("Utrecht/1/ventricles.nii.gz", spacing=(2.0, 1.0, 3.0), axes="LAS", data=ventricles)
    cases = cohort.find_cases(tmp_path)
    flair = nifti.load_volume(cases.flair[0])
    assert np.array_equal(cohort.load_ventricles(cases.ventricles[0], flair), ventricles > 0) and cohort.load_ventricles("", flair) is None
    assert "40% of the lesion voxels lie in the ventricle mask" in cohort.check_cases(cases).warnings[0]
    tiny_nifti("Utrecht/1/ventricles.nii.gz", shape=(24, 28, 9), data=ventricles[..., :9])
    assert "ventricle mask lies on another grid than the scan: not used" in cohort.check_cases(cases).warnings[0]
    assert cohort.load_ventricles(str(path), flair) is None


def test_real_scans_are_found_and_measured(real_scans):
    cases = cohort.find_cases(real_scans)
    checks = cohort.check_cases(cases).set_index("case")
    assert checks.lesion_ml.round(1).to_dict() == {"sub-openms26": 8.2, "sub-simvent104252": 14.6, "sub-simvent105074": 16.8}
    assert [bool(path) for path in cases.ventricles] == [False, True, True] and cases.subject.tolist() == cases.case.tolist()
    assert "slices 8.0 mm apart" in checks.warnings["sub-simvent105074"] and "ventricle" not in " ".join(checks.warnings)


T1W = Inputs(modalities=("t1",))


def atlas(subject, place="", space="space-MNI152NLin2009aSym_", mask="label-L_desc-T1lesion_mask", masks=""):
    """T1w scan and lesion mask of a subject as ATLAS v2.0 names them, the mask below `masks`."""
    anat, name = f"sub-{subject}/ses-1/anat/", f"sub-{subject}_ses-1_{space}"
    return [f"{place}{anat}{name}T1w.nii.gz", f"{place}{masks}{anat}{name}{mask}.nii.gz"]


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


def test_large_strokes_on_sagittal_t1w_scans_call_for_no_warning(tiny_nifti):
    names = [name.replace(".gz", "") for name in atlas("1", "R001/")]
    lesion = np.zeros((64, 56, 44), np.float32)
    lesion[20:44, 15:45, 10:32] = 1  # 1,014 mL
    flair = tiny_nifti(names[0], lesion.shape, (4.0, 4.0, 4.0), "PSR")
    tiny_nifti(names[1], lesion.shape, (4.0, 4.0, 4.0), "PSR", lesion)
    folder = flair.parents[4]
    assert cohort.check_cases(cohort.find_cases(folder, T1W), T1W).warnings[0] == "1014 mL of lesion: is this a mask of lesions?"
    lesion[:, :, 20:] = 0  # 461 mL
    tiny_nifti(names[1], lesion.shape, (4.0, 4.0, 4.0), "PSR", lesion)
    row = cohort.check_cases(cohort.find_cases(folder, T1W), T1W).iloc[0]
    assert row.warnings == "" and row.lesion_ml == pytest.approx(460.8)
    lesion[:2, :2, :2] = 1
    tiny_nifti(names[1], lesion.shape, (4.0, 4.0, 4.0), "PSR", lesion)
    box = Volume("attention", spacing=4.0, box=(32, 32, 32), patch=(32, 32, 32))
    assert "lesion voxels outside the box that is looked at: set volume.box larger" in cohort.check_cases(cohort.find_cases(folder, T1W), T1W, box).warnings[0]


def test_maps_of_t1_and_t2w_scans_are_no_t1w_scans(touch):
    folder = touch("p1_T1w.nii.gz", "p1_T1map.nii.gz", "p2-T1.nii.gz", "p2_T12_T2w.nii.gz", "p3_T1_MPRAGE.nii.gz")
    assert cohort.find_scans(folder, T1W).case.tolist() == ["p1_T1w", "p2-T1", "p3_T1_MPRAGE"]
