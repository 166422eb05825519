"""Synthetic strokes: reproducible, where they should be, dark on T1w, of all sizes, and laid out as ATLAS v2.0."""

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage

from wmhlib import cohort, download, opening, phantom, strokes
from wmhlib.presets import preset
from wmhlib.splits import split_cases
from wmhlib.volumetric.store import load_volumes
from wmhlib.workspace import RunFolder

COARSE = 4.0
SMOKE = preset("stroke-smoke")


@pytest.fixture(scope="module")
def cases():
    torch.set_num_threads(1)
    return [phantom.make_case(list(strokes.SITES)[seed % 3], seed, COARSE) for seed in range(12)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strokes")
    return folder, phantom.write_cohort(folder, 6, seed=5, scale=COARSE, progress=False, scanners="stroke")


@pytest.fixture
def patient():
    torch.set_num_threads(1)
    scan = strokes.StrokeScan(strokes.SITES["R001"], 3, 3.0)
    return scan, *scan.patient.inner.brain()


def test_the_same_seed_gives_the_same_files_whatever_the_number_of_cases(made, tmp_path):
    few = phantom.write_cohort(tmp_path, 1, seed=5, scale=COARSE, progress=False, scanners="stroke")
    for name in ("flair", "mask", "ventricles"):
        assert open(few[name][0], "rb").read() == open(made[1][name][0], "rb").read() != open(made[1][name][1], "rb").read()


def test_a_cohort_lies_as_atlas_does_and_is_found_again(made):
    folder, cases = made
    assert cases.site.tolist() == ["R001", "R001", "R002", "R002", "R003", "R003"] and cases.subject.is_unique
    assert cases.flair[0] == str(folder / "R001/sub-r001s001/ses-1/anat/sub-r001s001_ses-1_T1w.nii.gz") and (cases.t1 == "").all()
    assert all(path.endswith("_label-L_desc-T1lesion_mask.nii.gz") for path in cases["mask"])
    assert all(path.endswith("_label-ventricles_mask.nii.gz") for path in cases.ventricles)
    checks = cohort.check_cases(cases, SMOKE.inputs)
    assert (checks.lesion_ml > 0).all() and (checks.warnings == "").all()
    assert set(split_cases(cases.merge(checks), SMOKE).split) == {"train", "val", "test"}
    volume, = load_volumes(cases[:1], SMOKE.inputs, SMOKE.volume, progress=False)
    assert abs(len(volume.lesion) * 4**3 / 1000 - checks.lesion_ml[0]) <= 0.1 * checks.lesion_ml[0] + 0.064


def test_the_grid_is_one_millimetre_and_coarsened_along_all_axes():
    for site in strokes.SITES.values():
        assert max(site.spacing) <= 1.25 and site.shape[0] * site.spacing[0] >= 176
    spacing = nib.affines.voxel_sizes(phantom.make_case("R001", 1, COARSE).affine)
    np.testing.assert_allclose(spacing, 4.0)


def test_every_case_has_a_lesion_in_the_brain_that_is_darker_than_white_matter(cases):
    for case in cases:
        assert case.t1 is None and case.flair.shape == case.mask.shape and np.isfinite(case.flair).all() and set(np.unique(case.mask)) == {0, 1}
        rim = ndimage.binary_dilation(case.mask, iterations=3) & (case.mask == 0) & (case.ventricles == 0)
        white = np.percentile(case.flair[rim & (case.flair > np.median(case.flair[rim]))], 50)  # the brighter half of what is around
        assert np.median(case.flair[case.mask == 1]) < 0.9 * white
        assert not (case.mask & case.ventricles).any()


def test_sizes_spread_over_orders_of_magnitude(cases):
    ml = np.array([case.mask.sum() * np.prod(nib.affines.voxel_sizes(case.affine)) / 1000 for case in cases])
    assert ml.min() < 2 and ml.max() > 20 and ml.max() <= 220
    several = [ndimage.label(case.mask, np.ones((3, 3, 3)))[1] for case in cases]
    assert 1 in several and max(several) > 1


def test_a_territorial_infarct_is_a_wedge_of_its_territory_and_widens_the_ventricle(patient):
    scan, grey, white = patient
    brain = scan.patient.inner
    for _ in range(3):
        stroke, away = scan.infarct("territorial", 60.0, grey, white)
        inside = torch.from_numpy(stroke.mask)
        assert 25 < stroke.mask.sum() * scan.voxel / 1000 <= 61
        assert (brain.points[inside][:, 0].sign() == brain.points[inside][0, 0].sign()).all()  # one hemisphere
        margin = torch.stack([scan.territory(name)[inside].median() for name in strokes._ARTERIES])
        assert margin.max() > 3
        deep = -brain.to_brain[inside]
        shallow, far = (inside & (-brain.to_brain > low) & (-brain.to_brain <= high) for low, high in ((0, 12), (20, 60)))
        assert shallow.sum() > 1.5 * far.sum() and deep.min() < 4
        assert 1 < away.max() <= 8 and away[inside].max() > 0 and (away[(brain.points[..., 0] * brain.points[inside][0, 0]) < 0] == 0).all()


def test_a_cortical_infarct_lies_at_the_surface_and_a_lacune_deep(patient):
    scan, grey, white = patient
    brain = scan.patient.inner
    for _ in range(4):
        cortical, away = scan.infarct("cortical", 3.0, grey, white)
        assert (-brain.to_brain[torch.from_numpy(cortical.mask)]).max() < 14 and not away.any()
        lacune, _ = scan.infarct("lacunar", 0.8, grey, white)
        places = brain.points[torch.from_numpy(lacune.mask)]
        assert 3 <= (places.amax(0) - places.amin(0)).max() <= 24 and (grey + white)[torch.from_numpy(lacune.mask)].min() > 0.6


def test_cavities_lie_inside_a_gliotic_rim(patient):
    scan, grey, white = patient
    stroke, _ = scan.infarct("territorial", 80.0, grey, white)
    depth = torch.from_numpy(ndimage.distance_transform_edt(stroke.mask, sampling=scan.spacing))
    inside = torch.from_numpy(stroke.mask)
    assert stroke.cavity[inside & (depth > 9)].mean() > stroke.cavity[inside & (depth < 4)].mean()
    assert (stroke.dark[inside] > 0.2).all() and stroke.cavity.max() <= 1


def test_what_looks_alike_is_no_lesion(patient):
    scan, grey, white = patient
    left, fluid = [], []
    for _ in range(4):
        left.append(float(scan.atrophy().min()))
        fluid.append(float(scan.perivascular().max()))
    assert min(left) < 0.7 and max(left) <= 1 and 0 < max(fluid) <= 1


def test_a_head_without_strokes_has_an_empty_mask(monkeypatch):
    monkeypatch.setattr(strokes.StrokeScan, "kinds", lambda self: [])
    assert not phantom.make_case("R001", 3, COARSE).mask.any()


@pytest.mark.parametrize("site", strokes.SITES)
def test_sides_of_the_body_agree_with_the_affine(site, monkeypatch):
    drawn, lacunar = [], strokes.StrokeScan.lacunar
    monkeypatch.setattr(strokes.StrokeScan, "kinds", lambda self: [("lacunar", 1.4)])
    monkeypatch.setattr(strokes.StrokeScan, "lacunar", lambda self, side, *rest: drawn.append(side) or lacunar(self, side, *rest))
    for number, place in enumerate([(24, 24, 18), (24, 24, 18), (20, -40, -30)]):  # frontal, frontal, cerebellar
        monkeypatch.setattr(strokes, "_DEEP", (place,))
        case = phantom.make_case(site, number, COARSE)
        lesion, ventricles = (nib.affines.apply_affine(case.affine, np.argwhere(part)).mean(0) for part in (case.mask, case.ventricles))
        x, y, z = lesion - ventricles  # mm to the right, to the front, up
        assert np.sign(x) == drawn[-1] and abs(x) > 8 and (z < -15 if place[2] < 0 else y > 15), (drawn, x, y, z)
    assert len(drawn) == 3


def test_a_run_of_the_preset_brings_its_own_cohort(tmp_path):
    recipe = preset("stroke-smoke", "cohort.synthetic_cases=3")
    run = opening.open_run(RunFolder(tmp_path / "run"), recipe)
    found = cohort.find_cases(download.get_cohort(run), recipe.inputs)
    assert found.origin.tolist() == ["synthetic"] * 3 and found.site.tolist() == ["R001", "R002", "R003"]
