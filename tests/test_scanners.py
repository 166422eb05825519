"""Domain-randomised scans: every kind is known, reproducible, labelled whole, and as different as its ranges say."""

import nibabel as nib
import numpy as np
import pytest
import torch

from wmhlib import phantom, scanners, sections
from wmhlib.slicestore import load_slices

COARSE = 4.0


@pytest.fixture(scope="module")
def cases():
    torch.set_num_threads(1)
    return {kind: [phantom.make_case(kind, seed, COARSE) for seed in range(3)] for kind in scanners.KINDS}


def test_settings_know_the_kinds_there_are():
    assert sections.SCANNERS == ("challenge", *scanners.KINDS, "mixed", "vessels", "stroke") and sum(scanners._MIXED.values()) == pytest.approx(1)


def test_the_same_seed_gives_the_same_scan_and_another_one_another_grid():
    one, again, other = (phantom.make_case("mixed", seed, COARSE) for seed in (4, 4, 5))
    for name in ("flair", "mask", "ventricles", "tissue", "affine"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert one.t1 is None and one.flair.shape != other.flair.shape


def test_scans_are_finite_and_every_label_is_known(cases):
    for case in (case for some in cases.values() for case in some):
        assert case.flair.dtype == np.float32 and np.isfinite(case.flair).all() and case.flair.min() >= 0 < case.flair.max()
        assert case.flair.shape == case.mask.shape == case.tissue.shape
        assert set(np.unique(case.mask)) <= {0, 1, 2} and {3, 4, 5} <= set(np.unique(case.tissue)) <= {0, 3, 4, 5, 6, 7}
        assert (case.tissue[case.mask == 1] >= 3).mean() > 0.99  # a lesion lies in the head


def test_flair_lesions_are_bright_and_those_of_t1_and_ct_dark(cases):
    for kind, sign in (("flair", 1), ("ultrasound", 1), ("t1", -1), ("ct", -1)):
        for case in cases[kind]:
            inside = np.median(case.flair[case.mask == 1]) / np.median(case.flair[(case.tissue == 5) & (case.mask == 0)])
            assert sign * (inside - 1) > 0.02, kind


def test_slices_are_thick_and_thin_and_some_heads_are_stripped():
    torch.set_num_threads(1)
    made = [phantom.make_case("flair", seed, COARSE) for seed in range(10, 18)]
    steps = [nib.affines.voxel_sizes(case.affine)[2] for case in made]
    assert min(steps) < 4 < 5 < max(steps) <= 8.5
    assert 0 < sum(scanners.SOFT_LABEL in case.tissue for case in made) < len(made)


def test_a_cohort_carries_its_tissues_into_the_labels_of_its_slices(tmp_path):
    cases = phantom.write_cohort(tmp_path, 1, seed=3, scale=COARSE, progress=False, scanners="flair")
    assert cases.site.tolist() == ["flair"] and cases.t1.tolist() == [""]
    inputs = sections.Inputs(img_size=64)
    slices = load_slices(cases, inputs, progress=False)[0]
    assert {0, 1, 3, 4, 5} <= set(slices.labels.unique().tolist()) <= set(range(8))
    plain = tmp_path / "training" / "flair" / "0" / "synthetic_tissue.nii.gz"
    plain.unlink()
    assert set(load_slices(cases, inputs, progress=False)[0].labels.unique().tolist()) <= {0, 1, 2}
