"""The box and back: orientation, spacing, place, labels of small lesions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from wmhlib.errors import InputError
from wmhlib.sections import Inputs, Volume
from wmhlib.volumes import AIR, load_case
from wmhlib.volumetric.boxes import Box, case_box, from_box, mask_box, place_box, to_box
from wmhlib.volumetric.store import load_volumes

T1 = Inputs(modalities=("t1",))
SETTINGS = Volume("attention", spacing=4.0, box=(48, 64, 48), patch=(32, 32, 32))
RAS = np.array([[0, 1], [1, 1], [2, 1.0]])


def dice(a, b):
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.fixture
def ball(tiny_nifti):
    """Makes a case with a ball for a head, and a lesion on its left side, in front and above."""

    def make(axes="LPS", spacing=(4.0, 4.0, 4.0), shape=(48, 56, 44), radius=70.0):
        lps = np.stack(np.meshgrid(*((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing)), indexing="ij"))
        lesion = np.linalg.norm(lps - np.array([30, -20, 15]).reshape(3, 1, 1, 1), axis=0) < 18
        head = (np.linalg.norm(lps, axis=0) < radius) * 100.0 - 60.0 * lesion + np.random.default_rng(0).normal(0, 2, shape)
        order = ["LR PA SI".split().index(next(pair for pair in "LR PA SI".split() if code in pair)) for code in axes]
        flips = [axis for axis, code in enumerate(axes) if code not in "LPS"]
        stored = [np.flip(np.transpose(data, order), flips) for data in (head.astype(np.float32), lesion.astype(np.uint8))]
        spacing = [spacing[axis] for axis in order]
        paths = [tiny_nifti(f"{axes}_{name}.nii.gz", data.shape, spacing, axes, data) for name, data in zip(("T1w", "mask"), stored)]
        return load_case(paths[0], mask=paths[1], inputs=T1)

    return make


@pytest.mark.parametrize("axes", ["LPS", "RAS", "ASR", "SLP"])
def test_a_scan_in_any_orientation_lies_in_the_same_box(ball, axes):
    case, like = ball(axes), ball("LPS")
    box = place_box(case, SETTINGS)
    images, labels = case_box(case, box), mask_box(case.mask == 1, box)
    assert images.shape == (1, 48, 64, 48) and torch.equal(images, case_box(like, place_box(like, SETTINGS)))
    x, y, z = (places.double().mean() for places in torch.nonzero(labels, as_tuple=True))
    assert x > 24 and y < 32 and z > 24  # left, in front, above
    assert (images[0, :, 0] == AIR).all()  # beside the scan
    np.testing.assert_array_equal(from_box(labels, box) > 0.5, case.mask == 1)
    np.testing.assert_array_equal(from_box(images[0], box), case.images[0])


@pytest.mark.parametrize(("axes", "spacing", "shape", "least"), [
    ("RAS", (2.0, 2.0, 2.0), (96, 112, 88), 0.93), ("ASR", (3.1, 2.7, 5.0), (60, 80, 36), 0.9), ("LPS", (1.5, 1.5, 8.0), (120, 140, 22), 0.9)])
def test_a_mask_comes_back_on_a_grid_of_another_spacing(ball, axes, spacing, shape, least):
    case = ball(axes, spacing, shape)
    box = place_box(case, SETTINGS)
    back = from_box(mask_box(case.mask == 1, box).float(), box)
    assert back.shape == case.mask.shape and back.dtype == np.float32 and dice(back > 0.5, case.mask == 1) > least


def test_what_is_finer_than_the_grid_is_averaged_and_what_is_coarser_is_interpolated():
    box = Box((32, 4, 4), RAS, (16, 4, 4), (0, 0, 0), (2.0, 1.0, 1.0))
    stripes = np.zeros((32, 4, 4), np.float32)
    stripes[::2] = 1
    assert to_box(stripes, box)[2:-2].sub(0.5).abs().max() < 1e-6
    ramp = np.broadcast_to(np.arange(32, dtype=np.float32)[:, None, None], (32, 4, 4))
    assert torch.allclose(to_box(ramp, box)[1:-1, 0, 0].flip(0), 2 * torch.arange(1, 15) + 0.5)
    np.testing.assert_allclose(from_box(to_box(ramp, box), box)[3:-3], ramp[3:-3], atol=1e-4)


def test_a_scan_larger_than_the_box_is_centred_on_the_head_and_is_nothing_outside(ball):
    case = ball("RAS", shape=(80, 90, 70))
    small = replace(SETTINGS, box=(32, 32, 32), patch=(32, 32, 32))
    box = place_box(case, small)
    middle = [start + n / 2 - m / 2 for start, n, m in zip(box.starts, box.sizes, (80, 90, 70))]
    assert abs(middle[0]) <= 1 and abs(middle[1]) <= 1 and box.starts[2] + 32 >= 35 + 70 / 4
    back = from_box(torch.ones(32, 32, 32), box)
    assert back.sum() == 32**3 and set(np.unique(back)) == {0, 1}
    np.testing.assert_array_equal(back * case.images[0], from_box(case_box(case, box)[0], box))


def test_a_lesion_below_half_a_voxel_keeps_the_voxel_with_most_of_it_and_a_larger_one_its_size():
    box = Box((32, 32, 32), RAS, (16, 16, 16), (0, 0, 0), (2.0, 2.0, 2.0))
    mask = np.zeros((32, 32, 32), bool)
    mask[5, 5, 5] = mask[21:23, 9, 9] = True  # the second reaches over two voxels
    mask[8:16, 8:16, 8:16] = True
    found = mask_box(mask, box)
    flat = found.flip(0, 1)  # RAS order
    assert found.sum() == 1 + 1 + 64 and flat[2, 2, 2] and flat[4:8, 4:8, 4:8].all() and flat[10:12, 4, 4].sum() == 1
    beyond = Box((32, 32, 32), RAS, (8, 8, 8), (0, 0, 16), (2.0, 2.0, 2.0))
    mask[:] = False
    mask[5, 5, 5] = True
    assert not mask_box(mask, beyond).any()


def test_volumes_of_a_cohort_lie_in_a_file_as_their_boxes(split_cohort):
    volumes = load_volumes(split_cohort[0][:2], Inputs(), SETTINGS, progress=False)
    for volume, row in zip(volumes, split_cohort[0].itertuples()):
        case = load_case(row.flair, mask=row.mask)
        box = place_box(case, SETTINGS)
        assert volume.case == row.case and torch.equal(volume.images, case_box(case, box).half())
        assert torch.equal(volume.labels == 1, mask_box(case.mask == 1, box)) and volume.labels.dtype == torch.uint8
        assert torch.equal(volume.lesion.long(), torch.nonzero(volume.labels.flatten() == 1).flatten())


def test_a_case_that_cannot_be_read_is_named(split_cohort):
    rows = split_cohort[0][:1].assign(mask="nowhere.nii.gz")
    with pytest.raises(InputError, match="nowhere.nii.gz does not exist"):
        load_volumes(rows, Inputs(), SETTINGS, progress=False)
