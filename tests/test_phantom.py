"""The synthetic cohort: reproducible files, the sites' geometry, plausible lesions and heads."""

import nibabel as nib
import numpy as np
import pytest
import torch

from wmhlib import phantom
from wmhlib.errors import InputError

COARSE = 3.0


@pytest.fixture(scope="module")
def scans():
    """Nine pairs of the simulation and the case it gave."""
    torch.set_num_threads(1)
    made = [phantom.Scan(phantom.SITES[name], seed, COARSE) for seed in range(3) for name in phantom.SITES]
    return [(scan, scan.acquire()) for scan in made]


def region(scan, voxels):
    """Slices that lie wholly inside `voxels` (sub-slices of the grid, or of the part with the brain), in the case's own order of voxels."""
    whole = scan.whole if voxels.shape == scan.patient.fine.shape else scan.around_brain
    return scan.finish(whole(scan.pool(voxels.float()) == 1))


def test_same_seed_gives_the_same_files_however_many_cases(tmp_path):
    few = phantom.write_cohort(tmp_path / "few", 1, seed=5, scale=4, progress=False)
    many = phantom.write_cohort(tmp_path / "many", 4, seed=5, scale=4, progress=False).set_index("case")
    other = phantom.write_cohort(tmp_path / "other", 1, seed=6, scale=4, progress=False)
    assert sorted(many["site"]) == ["GE3T", "Singapore", "Utrecht", "Utrecht"] and set(many["group"]) == {"training"}
    for column in ("flair", "t1", "mask"):
        one, again = (open(path, "rb").read() for path in (few[column][0], many.loc[few["case"][0], column]))
        assert one == again
        assert one != open(other[column][0], "rb").read()


def test_challenge_layout_and_what_was_made_is_what_is_read(tmp_path):
    row = phantom.write_cohort(tmp_path, 3, seed=1, scale=4, progress=False).set_index("site").loc["GE3T"]
    assert row["flair"].endswith("training/Amsterdam/GE3T/0/pre/FLAIR.nii.gz")
    assert row["mask"].endswith("training/Amsterdam/GE3T/0/wmh.nii.gz")
    case = phantom.make_case("GE3T", phantom.stable_seed(1, "GE3T", 0), 4)
    for path, made in ((row["flair"], case.flair), (row["t1"], case.t1), (row["mask"], case.mask),
                       (row["ventricles"], case.ventricles)):
        image = nib.load(path)
        np.testing.assert_allclose(image.affine, case.affine, atol=1e-4)
        np.testing.assert_allclose(image.get_fdata(), made, atol=made.max() / 2e4)


@pytest.mark.parametrize("name", phantom.SITES)
def test_grid_is_the_sites_own_and_scale_coarsens_it_in_plane(name):
    site = phantom.SITES[name]
    case = phantom.make_case(name, 0, 2)
    assert case.flair.shape == (site.shape[0] // 2, site.shape[1] // 2, site.shape[2])
    assert case.t1.shape == case.mask.shape == case.ventricles.shape == case.flair.shape
    voxel = nib.affines.voxel_sizes(case.affine)
    np.testing.assert_allclose(voxel, (2 * site.spacing[0], 2 * site.spacing[1], site.spacing[2]), rtol=1e-6)
    codes = nib.aff2axcodes(case.affine)
    assert codes == tuple("RAS"[a] if f > 0 else "LPI"[a] for a, f in enumerate(site.flips))


def test_volumes_are_finite_and_labels_are_known(scans):
    for _, case in scans:
        assert case.flair.dtype == case.t1.dtype == np.float32 and case.mask.dtype == np.uint8
        assert np.isfinite(case.flair).all() and np.isfinite(case.t1).all() and case.flair.min() >= 0
    assert set(np.concatenate([np.unique(case.mask) for _, case in scans])) == {0, 1, 2}


def test_burden_is_the_volume_drawn_and_spread_over_the_range(scans):
    for scan, case in scans:
        lesions = (case.mask == 1).sum() * np.prod(scan.spacing) / 1000
        assert lesions == pytest.approx(scan.patient.burden, rel=0.15, abs=0.1)
    burdens = [scan.patient.burden for scan, _ in scans]
    assert 0.5 <= min(burdens) < 3 and 10 < max(burdens) <= 60


def test_lesions_are_bright_white_matter_outside_the_ventricles(scans):
    for scan, case in scans:
        patient = scan.patient
        ventricles, white = (region(scan, v) for v in (patient.to_ventricles < -1.5, patient.inner.template_white > 0.95))
        assert ventricles.any() and not case.mask[ventricles].any()
        assert not case.mask[region(scan, patient.to_brain > 3)].any()
        assert case.ventricles[ventricles].mean() > 0.9 and not case.mask[case.ventricles == 1].any()
        assert np.median(case.flair[case.mask == 1]) > 1.15 * np.median(case.flair[white & (case.mask == 0)])


def test_scalp_is_brighter_than_brain_unless_the_skull_is_stripped(scans):
    heads = 0
    for scan, case in scans:
        to_brain, upper = scan.patient.to_brain, scan.patient.points[..., 2] > 20
        brain = region(scan, (to_brain < -6) & upper)
        scalp = np.percentile(case.flair[region(scan, (to_brain > 4) & (to_brain < 22) & upper)], 97)
        heads += scalp > 0
        assert scalp == 0 or scalp > 1.1 * np.median(case.flair[brain])
    assert 5 <= heads < 9


@pytest.mark.parametrize("wrong", [("Nowhere", 0, 1.0), ("Utrecht", 0, 0.5)])
def test_unknown_site_or_scale_is_an_error(wrong):
    with pytest.raises(InputError, match="synthetic case"):
        phantom.make_case(*wrong)


def test_a_cohort_needs_a_case(tmp_path):
    with pytest.raises(InputError, match="0 cases"):
        phantom.write_cohort(tmp_path, 0, seed=1)


def test_torch_keeps_its_threads_when_a_case_fails(tmp_path, monkeypatch):
    counts, before = [], torch.get_num_threads()
    monkeypatch.setattr(phantom.torch, "set_num_threads", counts.append)
    monkeypatch.setattr(phantom, "make_case", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        phantom.write_cohort(tmp_path, 1, seed=1, progress=False)
    assert counts == [1, before]
