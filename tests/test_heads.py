"""A person's brain and head out of a T1w scan: it comes to lie on the MNI152's, makes cases of its own, and what is no head is refused."""

import nibabel as nib
import numpy as np
import pytest
import torch

from wmhlib import atlas, heads, phantom, scanners
from wmhlib.errors import InputError, RecipeError
from wmhlib.presets import preset

COARSE = 4.0


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    """A synthetic T1w head of 2 mm, somewhere in the magnet, as the scan of a person."""
    torch.set_num_threads(1)
    case = phantom.make_case("R001", 7, 2.0)
    path = tmp_path_factory.mktemp("heads") / "someone.nii.gz"
    nib.save(nib.Nifti1Image(case.flair if case.t1 is None else case.t1, case.affine), path)
    return str(path)


@pytest.fixture(scope="module")
def brain(scan):
    return heads.brain_of(scan)


def test_a_brain_comes_to_lie_on_the_mni152_and_keeps_its_tissues_apart(brain):
    mean = heads.mni152()
    for name, least in (("white", 0.7), ("grey", 0.55), ("inside", 0.9)):
        found, expected = (getattr(b, name).astype(float).ravel() for b in (brain, mean))
        assert found.shape == expected.shape and np.corrcoef(found, expected)[0, 1] > least, name
    assert brain.grey.min() >= 0 and brain.white.min() >= 0 and (brain.grey + brain.white).max() <= 1 + 1e-6
    part = tuple(slice(a - b, a - b + n) for a, b, n in zip(brain.origin, heads.HEAD_ORIGIN, brain.white.shape))
    assert mean.head is None and brain.head.min() == -1  # where the scan ends
    assert np.median(brain.head[part][brain.white > 0.9]) == pytest.approx(1, abs=0.05)


def test_a_registration_finds_the_turn_and_shift_it_was_given():
    mean = heads.mni152()
    fixed = (mean.white > 0.9).astype(np.float32)
    affine = np.eye(4)
    affine[:3, :3] = 2 * np.array([[0.98, -0.17, 0.1], [0.17, 0.98, 0.0], [-0.1, 0.0, 1.0]])
    affine[:3, 3] = np.array(mean.origin) + (5, -12, 9)
    there = nib.affines.apply_affine(affine, np.stack(np.meshgrid(*map(np.arange, (96, 110, 90)), indexing="ij"), -1))
    voxels = np.round(there - mean.origin).astype(int)
    inside = ((voxels >= 0) & (voxels < fixed.shape)).all(-1)
    moving = np.where(inside, fixed[tuple(np.clip(voxels, 0, np.array(fixed.shape) - 1).reshape(-1, 3).T)].reshape(inside.shape), 0)
    matrix, alike = heads._register(moving.astype(np.float32), affine, fixed, mean.origin)
    assert alike > 0.95
    places = np.argwhere(fixed)[::997] + mean.origin
    assert np.abs(nib.affines.apply_affine(matrix, places) - places).max() < 1.5  # mm: it lies where it lay


def test_a_brain_does_not_depend_on_the_number_of_threads(scan, brain):
    torch.set_num_threads(2)
    again = heads.brain_of(scan)
    torch.set_num_threads(1)
    np.testing.assert_array_equal(again.white, brain.white)


def test_cases_have_the_brains_of_the_heads_by_turns_and_those_of_the_mean_stay(scan, tmp_path):
    cases = phantom.write_cohort(tmp_path / "with", 4, seed=1, scale=COARSE, progress=False, scanners="flair", heads=[scan])
    assert sorted(cases.site) == ["flair", "flair", "someone", "someone"]
    plain = phantom.write_cohort(tmp_path / "without", 2, seed=1, scale=COARSE, progress=False, scanners="flair")
    for one, other in zip(cases[cases.site == "flair"].flair, plain.flair):
        assert open(one, "rb").read() == open(other, "rb").read()
    again = phantom.make_case("flair", phantom.stable_seed(1, "someone", 0), COARSE, scan)
    kept = nib.load(cases[cases.site == "someone"].sort_values("case").flair.iloc[0])
    assert kept.shape == again.flair.shape and np.abs(kept.get_fdata() - again.flair).max() <= again.flair.max() / 1000


def test_around_its_brain_a_case_shows_the_persons_own_head_and_labels_it(scan, monkeypatch):
    made = [phantom.make_case("flair", seed, COARSE, scan) for seed in range(6)]
    monkeypatch.setattr(scanners.RandomScan, "_own_head", lambda *_: None)
    drawn = [phantom.make_case("flair", seed, COARSE, scan) for seed in range(6)]
    own = [not np.array_equal(case.flair, other.flair) for case, other in zip(made, drawn)]
    assert 0 < sum(own) < 6  # more often than not
    for case, other, shown in zip(made, drawn, own):
        outside = ~np.isin(case.tissue, (3, 4, 5)) & ~np.isin(other.tissue, (3, 4, 5))
        assert shown == (case.tissue != other.tissue)[outside].any()
        np.testing.assert_array_equal(case.mask, other.mask)
        assert np.isfinite(case.flair).all() and {3, 4, 5} <= set(np.unique(case.tissue)) <= {0, 3, 4, 5, 6, 7}
        bright = case.flair > np.percentile(case.flair, 80)
        assert (case.tissue[bright] > 0).mean() > 0.8  # labels lie where the image shows something


def test_what_is_no_head_is_refused_by_name(tmp_path, monkeypatch):
    ball = np.zeros((60, 60, 60), np.float32)
    ball[10:50, 10:50, 10:50] = 100 + np.random.default_rng(0).normal(0, 5, (40, 40, 40))
    nib.save(nib.Nifti1Image(ball, np.diag([4, 4, 4, 1])), tmp_path / "ball.nii.gz")
    with pytest.raises(InputError, match="ball.nii.gz does not come to lie"):
        heads.brain_of(tmp_path / "ball.nii.gz")
    with monkeypatch.context() as patch:
        patch.setattr(heads.ndimage, "binary_opening", np.zeros_like)  # no white matter at all
        with pytest.raises(InputError, match="ball.nii.gz does not come to lie"):
            heads.brain_of(tmp_path / "ball.nii.gz")
    solid = heads.mni152()
    monkeypatch.setattr(atlas, "brain_of", lambda path: heads.Brain(solid.grey * 0, solid.white * 0 + 1, solid.inside, solid.origin, solid.grey))
    with pytest.raises(InputError, match="solid.nii.gz shows 0 mL of lateral ventricles"):
        atlas.template(str(tmp_path / "solid.nii.gz"))


def test_settings_know_which_cohorts_take_heads():
    assert preset("flair", "cohort.heads=['a/x.nii.gz','b/y.nii']").cohort.heads == ("a/x.nii.gz", "b/y.nii")
    for preset_name, given in (("demo", "['a.nii']"), ("flair", "['a/x.nii','b/x.nii.gz']")):
        with pytest.raises(RecipeError, match="cohort.heads"):
            preset(preset_name, f"cohort.heads={given}")
