"""The challenge's scores against independent references and their limits; components, volumes and lesion tables."""

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from scipy.spatial import cKDTree

from wmhlib import InputError
from wmhlib.metrics import (
    bounding_box,
    challenge_scores,
    chosen,
    components,
    filter_components,
    lesion_table,
    mask_at,
    volume_ml,
    voxels,
)

SPACING = (0.9, 1.1, 3.0)
masks = arrays(np.uint8, (6, 5, 4), elements=st.sampled_from([0, 0, 0, 1]))


def blobs(seed, shape=(40, 36, 12), share=0.03):
    """Smooth random lesions touching the image's edges, about `share` of the volume."""
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), (2, 2, 1), mode="wrap")
    return smooth > np.quantile(smooth, 1 - share)


def sitk_scores(reference, result, spacing):
    """Dice, HD95, AVD, recall and F1 by SimpleITK's filters and brute-force distances."""
    def image(array):
        out = sitk.GetImageFromArray(np.ascontiguousarray(array.T, np.uint8))
        out.SetSpacing(spacing)
        return out

    result = np.where(reference == 2, 0, result)
    t, r = image(reference == 1), image(result)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(t, r)
    points = []
    for mask in (t, r):
        border = sitk.GetArrayFromImage(sitk.Subtract(mask, sitk.BinaryErode(mask, (1, 1, 0), sitk.sitkBox)))
        points.append(np.argwhere(border.T) * spacing)
    far = np.sqrt(((points[0][:, None] - points[1][None]) ** 2).sum(-1))

    def hit(mask, other):
        labels = sitk.GetArrayFromImage(sitk.ConnectedComponent(mask, True))
        return np.mean([(sitk.GetArrayFromImage(other)[labels == i] > 0).any() for i in range(1, labels.max() + 1)])

    recall, precision = hit(t, r), hit(r, t)
    size = (reference == 1).sum()
    return dict(dsc=overlap.GetDiceCoefficient(),
                hd95=max(np.percentile(far.min(1), 95), np.percentile(far.min(0), 95)),
                avd=100 * abs(int(size) - int(result.sum())) / size,
                recall=recall, f1=2 * recall * precision / (recall + precision))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_scores_equal_an_independent_reference(seed, dtype):
    reference = blobs(seed).astype(dtype)
    reference[blobs(seed + 50, share=0.01)] = 2
    result = blobs(seed) & (np.random.default_rng(seed).random(reference.shape) < 0.9) | blobs(seed + 100, share=0.005)
    expected = sitk_scores(reference, result, SPACING)
    assert challenge_scores(reference, result, SPACING) == pytest.approx(expected, abs=1e-6)


EMPTY = np.zeros((5, 5, 3), np.uint8)
FULL = np.pad(np.ones((2, 2, 1), np.uint8), ((1, 2), (1, 2), (1, 1)))


@pytest.mark.parametrize("reference, result, expected", [
    (EMPTY, EMPTY, (np.nan, np.nan, np.nan, 1, 1)),
    (EMPTY, FULL, (0, np.nan, np.nan, 1, 0)),
    (FULL, EMPTY, (0, np.nan, 100, 0, 0)),
    (2 * FULL, FULL, (np.nan, np.nan, np.nan, 1, 1)),
    (FULL, np.roll(FULL, 2, 0), (0, 2 * SPACING[0], 0, 0, 0)),
])
def test_limit_cases(reference, result, expected):
    scores = challenge_scores(reference, result, SPACING)
    assert list(scores.values()) == pytest.approx(list(expected), nan_ok=True)


@settings(max_examples=60, deadline=None)
@given(masks, masks)
def test_properties(a, b):
    scores, swapped = challenge_scores(a, b, SPACING), challenge_scores(b, a, SPACING)
    for name in ("dsc", "hd95"):
        assert scores[name] == pytest.approx(swapped[name], nan_ok=True)
    same = challenge_scores(a, a, SPACING)
    if a.any():
        assert (same["dsc"], same["avd"], same["recall"], same["f1"]) == (1, 0, 1, 1) and not same["hd95"] > 0
    kept = filter_components(a, 3)
    assert (kept <= a.astype(bool)).all() and (filter_components(kept, 3) == kept).all()


def laid_out(mask, layout):
    """The same mask in C or Fortran order, or with gaps between its voxels."""
    if layout != "gaps":
        return np.array(mask, order=layout)
    wide = np.ones([2 * n for n in mask.shape], bool)
    wide[::2, ::2, ::2] = mask
    return wide[::2, ::2, ::2]


@settings(max_examples=60, deadline=None)
@given(masks, st.sampled_from(["C", "F", "gaps"]), st.integers(1, 9))
def test_components_and_their_filter_equal_scipys_in_any_layout(mask, layout, smallest):
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    mask = laid_out(mask.astype(bool), layout)
    at, found, n = components(mask)
    assert n == count and len(found) == mask.sum() and np.array_equal(found, labels[at])
    kept = (np.bincount(labels.ravel()) >= smallest)[labels] & (labels > 0)
    assert np.array_equal(filter_components(mask, smallest), kept)


@pytest.mark.parametrize("shape", [(3, 1, 1), (1, 3, 1), (1, 1, 7), (3, 1, 5), (3, 3, 3), (9, 5, 7)])
def test_as_many_components_as_fit_in_a_box_are_told_apart(shape):
    mask = np.zeros((12, 12, 12), bool)
    mask[tuple(slice(2, 2 + n, 2) for n in shape)] = True
    assert components(mask)[2] == mask.sum() and not filter_components(mask, 2).any()


@settings(max_examples=40, deadline=None)
@given(masks, masks, st.integers(0, 2))
def test_a_bounding_box_is_as_small_as_can_be(a, b, margin):
    a, b = a.astype(bool), b.astype(bool)
    box = bounding_box(a, b, margin=margin)
    either, inside = np.argwhere(a | b), np.zeros(a.shape, bool)
    inside[box] = True
    expected = np.zeros(a.shape, bool)
    if len(either):
        expected[tuple(slice(max(0, low - margin), high + margin + 1) for low, high in zip(either.min(0), either.max(0)))] = True
    assert np.array_equal(inside, expected)


def test_voxels_come_as_they_lie_in_memory():
    mask = blobs(3)
    assert np.array_equal(np.stack(voxels(mask), 1), np.argwhere(mask))
    assert np.array_equal(np.stack(voxels(np.asfortranarray(mask)), 1), np.argwhere(mask.T)[:, ::-1])


@pytest.mark.parametrize("corner", [(0, 0, 0), (9, 4, 2), (11, 0, 5)])
def test_hd95_in_a_box_equals_that_of_the_whole_scan_to_the_last_digit(corner):
    masks = np.zeros((2, 51, 48, 18), bool)
    place = tuple(slice(start, start + n) for start, n in zip(corner, (40, 36, 12)))
    masks[0][place], masks[1][place] = blobs(4), blobs(5)
    borders = [m & ~ndimage.binary_erosion(m, np.ones((3, 3, 1)), border_value=1) for m in masks]
    a, b = (np.argwhere(border) * np.array(SPACING) for border in borders)
    whole = max(np.percentile(cKDTree(one).query(other)[0], 95) for one, other in ((a, b), (b, a)))
    assert challenge_scores(masks[0], masks[1], SPACING)["hd95"] == whole


def test_other_pathology_counts_neither_way():
    reference, result = blobs(1).astype(np.uint8), blobs(2)
    reference[:, :, :3] = 2
    emptied = result.copy()
    emptied[:, :, :3] = False
    assert challenge_scores(reference, result, SPACING) == challenge_scores(reference, emptied, SPACING)


@pytest.mark.parametrize("result, spacing", [(FULL[:-1], SPACING), (FULL, (1, 1)), (FULL, (1, 0, 1))])
def test_scores_refuse_what_cannot_be_compared(result, spacing):
    with pytest.raises(InputError, match="expected"):
        challenge_scores(FULL, result, spacing)


def test_small_components_go_and_diagonal_neighbours_stay_together():
    mask = np.zeros((6, 6, 4), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[2, 2, 2] = mask[5, 5, 0] = True
    assert filter_components(mask, 3).sum() == 3 and filter_components(mask, 1).sum() == 4
    assert not filter_components(mask, 4).any() and not filter_components(mask & False, 1).any()


@pytest.mark.parametrize("point, view", [(dict(tta=True, min_voxels=3), 1), (dict(tta=False, min_voxels=1, min_mm3=5.0), 0)])
def test_the_mask_at_a_point_is_of_its_own_view_from_its_threshold_on_without_small_components(point, view):
    plain, mean = maps = np.zeros((2, 6, 6, 4), np.float32)
    plain[0, 0, :2] = plain[0, 2, :3] = mean[5, 0, :2] = mean[5, 2, :3] = 0.5
    expected = maps[view] * (np.arange(6) == 2)[:, None]  # two voxels of 2 mm3 are too small, three are not
    assert chosen(plain, mean, point) is (plain, mean)[view]
    assert np.array_equal(mask_at(plain, mean, point | dict(threshold=0.5), (1, 1, 2)), expected > 0)
    assert not mask_at(plain, mean, point | dict(threshold=0.6), (1, 1, 2)).any()


def test_volume_counts_label_1_only():
    assert volume_ml(np.array([[[0, 1, 2, 1]]], np.uint8), (1, 2, 5)) == pytest.approx(0.02)


def test_lesion_table_gives_each_lesion_its_place_in_the_world():
    mask = np.zeros((8, 8, 4), bool)
    mask[1:3, 1, 0] = mask[4:7, 5, 2] = True
    prob = np.where(mask, 0.6, 0.1).astype(np.float32)
    prob[5, 5, 2] = 0.9
    affine = np.diag([-0.5, 1.0, 3.0, 1.0])
    affine[:3, 3] = 10, 20, 30
    table = lesion_table(mask, prob, affine)
    assert table.voxels.tolist() == [3, 2] and table.lesion.tolist() == [1, 2]
    assert table.loc[0, ["x_mm", "y_mm", "z_mm"]].tolist() == pytest.approx([7.5, 25, 36])
    assert table.loc[0, ["volume_ml", "mean_prob", "max_prob"]].tolist() == pytest.approx([0.0045, 0.7, 0.9])
    assert lesion_table(mask & False, prob, affine).empty
