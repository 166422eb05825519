import nibabel
import numpy as np
import pandas as pd
import pytest
from trees import T1W, atlas, challenge, table

from wmhlib import cohort, nifti
from wmhlib.errors import InputError
from wmhlib.sections import Inputs, Volume


def test_people_scanned_at_several_sites_are_said(touch, capsys):
    cohort.find_cases(table(touch("a.nii", "b.nii", "m.nii", "n.nii"), "1,A,a.nii,m.nii,", "1,B,b.nii,n.nii,"))
    assert "1 subjects have scans at several sites, each taken as one person: 1 (A, B)" in capsys.readouterr().out


@pytest.mark.parametrize(("names", "message"), [
    ([], "no FLAIR scans"),
    (challenge("a/Utrecht/1") + challenge("b/Utrecht/1"), "duplicate case Utrecht_1"),
    (challenge("Utrecht/1") + ["Utrecht/1/pre/FLAIR.nii"], "more than one candidate for its flair"),
])
def test_what_cannot_be_a_cohort_is_refused(touch, names, message):
    with pytest.raises(InputError, match=message):
        cohort.find_cases(touch("readme.txt", *names))


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
    assert row.labels == "0: 6707, 1: 10, 2: 3" and row.warnings.startswith("3 voxels of other pathology, ignored")


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
    both = Inputs(modalities=("flair", "t1"))
    with pytest.raises(InputError, match="T1.nii.gz has shape"):
        cohort.check_cases(cases, both)
    assert cohort.check_cases(cases.assign(t1=""), both).warnings[0].startswith("no T1")


@pytest.mark.parametrize(("scan", "warning"), [
    (dict(spacing=(1.0, 1.0, 9.0)), "slices 9.0 mm apart"), (dict(spacing=(1.0, 1.0, 3.0)), "covers 30 mm high, 24 mm wide, 28 mm long"),
    (dict(axes="PSR"), "not acquired in axial slices"), (dict(spacing=(9.0, 8.0, 12.0), axes="LAS"), "outside the 100 mm")])
def test_an_odd_geometry_is_a_warning(tiny_nifti, scan, warning):
    cases = case_on_disk(tiny_nifti, lesion=[5], **scan)
    assert warning in cohort.check_cases(cases, Inputs(fov=100.0)).warnings[0]


@pytest.mark.parametrize("sform, qform, found", [(0, 0, "no orientation in its header"), (1, 1, "different orientations: sform is used"), (1, 0, ""), (0, 1, "")])
def test_an_orientation_that_is_missing_or_told_twice_is_a_warning(sform, qform, found):
    header = nibabel.Nifti1Header()
    header.set_sform(np.eye(4), sform)
    header.set_qform(np.diag([-1.0, 1, 1, 1]), qform)
    assert [found in note for note in cohort._header_notes(header)] == [True] * bool(found)


def test_an_affine_that_stretches_the_voxels_is_a_warning(tiny_nifti):
    cases = case_on_disk(tiny_nifti)
    for path in (cases.flair[0], cases["mask"][0]):
        image = nibabel.load(path)
        image.set_qform(image.affine)
        image.set_sform(image.affine @ np.diag([1.2, 1.2, 1.1, 1]), 4)
        nibabel.save(image, path)
    assert "2 x 1 x 3 mm in its header, of 2.4 x 1.2 x 3.3 mm by its affine" in cohort.check_cases(cases).warnings[0]


def test_sheared_axes_are_a_warning(tiny_nifti):
    cases = case_on_disk(tiny_nifti)
    for path in (cases.flair[0], cases["mask"][0]):
        image = nibabel.load(path)
        shear = np.eye(4)
        shear[0, 1] = 0.5
        image.set_sform(shear @ image.affine, 4)
        nibabel.save(image, path)
    assert "a voxel holds 0.89 times what its edges tell" in cohort.check_cases(cases).warnings[0]


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
