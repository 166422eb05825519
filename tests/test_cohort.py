import numpy as np
import pandas as pd
import pytest

from wmhlib import cohort, volumes
from wmhlib.errors import InputError
from wmhlib.settings import Inputs, preset
from wmhlib.workspace import write_atomic


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


def test_the_challenge_layout(touch):
    folder = touch(*challenge("training/Utrecht/10"), *challenge("training/Utrecht/9"), *challenge("training/Amsterdam/GE3T/100"),
                   *challenge("test/Amsterdam/Philips_VU .PETMR_01./7"), "training/Utrecht/9/orig/FLAIR.nii.gz",
                   "additional_annotations/observer_o3/training/Utrecht/9/result.nii.gz")
    cases = cohort.find_cases(folder)
    assert cases.case.tolist() == ["GE3T_100", "Philips_VU_PETMR_01_7", "Utrecht_9", "Utrecht_10"]
    assert cases.site.tolist() == ["GE3T", "Philips_VU_PETMR_01", "Utrecht", "Utrecht"]
    assert cases.group.tolist() == ["training", "test", "training", "training"]
    assert cases.flair[2] == str(folder / "training/Utrecht/9/pre/FLAIR.nii.gz")
    assert cases.t1[2].endswith("9/pre/T1.nii.gz") and cases["mask"][2].endswith("9/wmh.nii.gz")


def test_the_kaggle_mirror_is_uncompressed_and_deeper(touch):
    folder = touch(*challenge("wmh_data/training/Singapore/50", ".nii"), *challenge("wmh_data/test/Amsterdam/GE1T5/1", ".nii"))
    assert cohort.find_cases(folder)[["case", "group"]].values.tolist() == [["GE1T5_1", "test"], ["Singapore_50", "training"]]


def test_bids_with_sessions_takes_the_lesion_mask_among_others(touch):
    names = [f"{folder}sub-01/ses-{s}/anat/sub-01_ses-{s}_{name}.nii.gz" for s in (1, 2) for folder, name in (
        ("", "FLAIR"), ("", "T1w"), ("", "space-FLAIR_T1w"), ("derivatives/manual/", "space-FLAIR_label-WMH_mask"),
        ("derivatives/manual/", "space-FLAIR_label-brain_mask"), ("derivatives/manual/", "space-FLAIR_label-WMH_dseg"))]
    cases = cohort.find_cases(touch(*names))
    assert cases.case.tolist() == ["sub-01_ses-1", "sub-01_ses-2"]
    assert all(m.endswith(f"sub-01_ses-{s}_space-FLAIR_label-WMH_mask.nii.gz") for m, s in zip(cases["mask"], (1, 2), strict=True))
    assert all("space-FLAIR_T1w" in t1 for t1 in cases.t1)


def test_a_brain_mask_is_no_lesion_mask_and_the_scan_without_one_is_named(touch, capsys):
    folder = touch("sub-1/anat/sub-1_FLAIR.nii.gz", "derivatives/x/sub-1/anat/sub-1_label-brain_mask.nii.gz")
    with pytest.raises(InputError, match="no labelled cases"):
        cohort.find_cases(folder)
    assert "left out 1 scans without a mask" in capsys.readouterr().out


@pytest.mark.parametrize(("names", "message"), [
    ([], "no labelled cases"),
    (challenge("a/Utrecht/1") + challenge("b/Utrecht/1"), "duplicate case Utrecht_1"),
    (challenge("Utrecht/1") + ["Utrecht/1/pre/FLAIR.nii"], "more than one candidate"),
])
def test_what_cannot_be_a_cohort_is_refused(touch, names, message):
    with pytest.raises(InputError, match=message):
        cohort.find_cases(touch("readme.txt", *names))


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="not a folder"):
        cohort.find_cases(tmp_path / "nowhere")


def case_on_disk(tiny_nifti, lesion=(), other=()):
    flair = tiny_nifti("Utrecht/1/pre/FLAIR.nii.gz", spacing=(2.0, 1.0, 3.0), axes="LAS")
    mask = np.zeros(volumes.load_volume(flair).data.shape, np.uint8)
    mask.flat[list(lesion)], mask.flat[list(other)] = 1, 2
    tiny_nifti("Utrecht/1/wmh.nii.gz", spacing=(2.0, 1.0, 3.0), axes="LAS", data=mask)
    return cohort.find_cases(flair.parents[2])


def test_a_check_describes_the_scan_and_measures_label_1_alone(tiny_nifti):
    row = cohort.check_cases(case_on_disk(tiny_nifti, lesion=range(100, 110), other=range(200, 203))).iloc[0]
    assert row.lesion_ml == pytest.approx(10 * 2 * 1 * 3 / 1000)
    assert (row["shape"], row.spacing, row.orientation) == ("24 x 28 x 10", "2.00 x 1.00 x 3.00", "LAS")
    assert row.labels == "0: 6707, 1: 10, 2: 3" and row.warnings == "no T1; 3 voxels of other pathology, ignored"


def test_an_empty_mask_is_legal(tiny_nifti):
    row = cohort.check_cases(case_on_disk(tiny_nifti)).iloc[0]
    assert row.lesion_ml == 0 and "no lesion" in row.warnings


def test_a_bad_file_is_named(tiny_nifti):
    cases = case_on_disk(tiny_nifti)
    tiny_nifti("Utrecht/1/wmh.nii.gz", shape=(5, 5, 5), data=np.zeros((5, 5, 5), np.uint8))
    with pytest.raises(InputError, match="wmh.nii.gz"):
        cohort.check_cases(cases)


def test_a_t1_on_another_grid_is_a_warning_and_an_error_where_t1_is_an_input(tiny_nifti):
    tiny_nifti("Utrecht/1/pre/T1.nii.gz", shape=(20, 20, 10))
    cases = case_on_disk(tiny_nifti)
    assert "T1 lies on another grid" in cohort.check_cases(cases).warnings[0]
    with pytest.raises(InputError, match="T1.nii.gz has shape"):
        cohort.check_cases(cases, Inputs(modalities=("flair", "t1")))


def made_up(sites):
    rng = np.random.default_rng(3)
    return pd.DataFrame([{"case": f"{site}_{i}", "site": site, "lesion_ml": rng.lognormal(1.5, 1.2)}
                         for site, n in sites.items() for i in range(n)])


def test_every_site_gives_to_every_part_in_the_shares_asked_for():
    cases = made_up({"Utrecht": 20, "Singapore": 20, "GE3T": 3})
    split = cohort.split_cases(cases, preset("colab"))
    counts = split.groupby(["site", "split"]).size().unstack()
    assert counts.loc["Utrecht"].to_dict() == {"test": 3, "train": 14, "val": 3}
    assert counts.loc["GE3T"].to_dict() == {"test": 1, "train": 1, "val": 1}
    assert split.case.tolist() == cases.case.tolist()


def test_the_test_cases_span_the_burden():
    split = cohort.split_cases(made_up({"Utrecht": 40}), preset("demo", "split.test=0.3"))
    ranks = split.lesion_ml.rank()[split.split == "test"]
    thirds = np.histogram(ranks, [0, 40 / 3, 80 / 3, 41])[0]
    assert ranks.size == 12 and thirds.min() >= 4 and thirds.max() <= 4


def test_the_seed_decides_and_the_order_of_rows_does_not():
    cases, seeded = made_up({"A": 15, "B": 12}), lambda seed: preset("demo", f"seed={seed}")
    first = cohort.split_cases(cases, seeded(1))
    shuffled = cohort.split_cases(cases.sample(frac=1, random_state=0), seeded(1))
    assert first.set_index("case").split.to_dict() == shuffled.set_index("case").split.to_dict()
    assert (first.split != cohort.split_cases(cases, seeded(2)).split).any()


def test_the_sessions_of_a_subject_stay_together():
    cases = pd.DataFrame([{"case": f"sub-{i}_ses-{s}", "site": "A", "lesion_ml": i + s / 2} for i in range(9) for s in (1, 2)])
    split = cohort.split_cases(cases, preset("demo"))
    assert (split.groupby(split.case.str[:5]).split.nunique() == 1).all()


def test_a_site_too_small_to_split_is_named():
    with pytest.raises(InputError, match="site B has 2 subjects"):
        cohort.split_cases(made_up({"A": 9, "B": 2}), preset("demo"))


def test_real_scans_are_found_and_measured(real_scans):
    cases = cohort.find_cases(real_scans)
    checks = cohort.check_cases(cases).set_index("case")
    assert checks.lesion_ml.round(1).to_dict() == {"sub-openms26": 8.2, "sub-simvent104252": 14.6, "sub-simvent105074": 16.8}
