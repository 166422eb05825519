from dataclasses import replace

import pytest
import torch
from small import OFF

from wmhlib.batches import augment, draw_slices, drop_modalities, few_slices, stack_slices
from wmhlib.errors import InputError
from wmhlib.sections import Augment, Inputs
from wmhlib.slicestore import CaseSlices
from wmhlib.volumes import AIR, BRIGHTEST


def case(name, depth=40, lesions=(3, 4, 20), modalities=1):
    images = torch.arange(depth * modalities).view(modalities, depth, 1, 1).expand(-1, -1, 16, 16).half()
    labels = torch.zeros(depth, 16, 16, dtype=torch.uint8)
    labels[list(lesions), 5, 6] = 1
    labels[10, 2, 2] = 2
    return CaseSlices(name, images, labels)


def batch(n=4, channels=1):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(n, channels, 32, 32, generator=generator)
    return images, (images[:, :1] > 1).byte()


def test_every_lesion_slice_is_drawn_and_the_given_share_of_the_others():
    drawn = draw_slices([case("a"), case("b")], 0.1, seed=1)
    for number in (0, 1):
        slices = {z for i, z in drawn if i == number}
        assert {3, 4, 20} <= slices and len(slices) == 3 + 4


def test_drawing_depends_on_seed_and_case_alone():
    alone, together = draw_slices([case("b")], 0.2, 1), draw_slices([case("a"), case("b")], 0.2, 1)
    assert [z for _, z in alone] == [z for i, z in together if i == 1]
    assert alone != draw_slices([case("b")], 0.2, 2)


def test_few_slices_begin_with_a_lesion_and_more_of_them_with_the_same():
    cases = [case("a"), case("b", lesions=(1, 2, 5, 7))]
    two, five = (few_slices(cases, count, 0.5, seed=4) for count in (2, 5))
    assert five[:2] == two and len(set(five)) == 5 and five != few_slices(cases, 5, 0.5, seed=5)
    assert set(five) < set(draw_slices(cases, 0.5, seed=4))
    for seed in range(20):
        (i, z), = few_slices(cases, 1, 1.0, seed)
        assert z in cases[i].lesions()
    assert all(z in cases[i].lesions() for i, z in few_slices(cases, 5, 0, seed=4))
    with pytest.raises(InputError, match="8 slices"):
        few_slices(cases, 8, 0, seed=4)


def test_slices_of_air_are_never_drawn():
    empty = case("a")
    empty.images[:, 25:] = AIR
    assert max(z for _, z in draw_slices([empty], 1.0, 0)) == 24


def test_neighbours_come_in_order_and_repeat_at_the_ends():
    images, labels = stack_slices([case("a", modalities=2)], [(0, 0), (0, 39)], context=1)
    assert images[:, :, 0, 0].tolist() == [[0, 0, 1, 40, 40, 41], [38, 39, 39, 78, 79, 79]]
    assert labels.shape == (2, 1, 16, 16)


def test_augmentation_off_is_the_identity():
    images, labels = batch()
    found, found_labels = augment(images, labels, OFF, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, images, atol=1e-4, rtol=1e-4)
    assert torch.equal(found_labels, labels)


@pytest.mark.parametrize("setting", ["flips", "flips_ap", "rotate90"])
def test_flips_and_quarter_turns_move_image_and_labels_as_one_and_lose_nothing(setting):
    images, labels = batch(64)
    found, found_labels = augment(images, labels, replace(OFF, **{setting: True}), torch.Generator().manual_seed(0))
    assert not torch.allclose(found, images)
    torch.testing.assert_close(found.flatten(1).sort().values, images.flatten(1).sort().values, atol=1e-4, rtol=1e-4)
    sure = (found - 1).abs() > 1e-3
    assert torch.equal((found > 1)[sure], found_labels.bool()[sure])


def test_rotation_turns_by_up_to_its_degrees_either_way():
    x, y = torch.arange(64) - 31.5, torch.arange(64)[:, None] - 31.5
    blob = AIR + 4 * torch.exp(-((x - 18) ** 2 + y**2) / 20).expand(200, 1, 64, 64)
    found, _ = augment(blob, blob.byte(), replace(OFF, rotation=15), torch.Generator().manual_seed(0))
    angle = torch.rad2deg(torch.atan2(((found - AIR) * y).sum((1, 2, 3)), ((found - AIR) * x).sum((1, 2, 3))))
    assert 13 < angle.max() < 15.2 and -15.2 < angle.min() < -13


@pytest.mark.parametrize("setting", ["gamma", "noise", "contrast", "brightness", "bias_field", "scale"])
def test_each_setting_changes_each_sample_in_its_own_way_and_only_scale_the_labels(setting):
    images, labels = (t.expand(4, -1, -1, -1) for t in batch(1))
    found, found_labels = augment(images, labels, replace(OFF, **{setting: 0.3}), torch.Generator().manual_seed(0))
    every = [images[0], *found]
    assert all((one - other).abs().max() > 0.01 for i, one in enumerate(every) for other in every[:i])
    assert torch.equal(found_labels, labels) == (setting != "scale")


def test_noise_is_drawn_for_each_sample_up_to_its_deviation():
    images = torch.ones(200, 1, 16, 16)
    found, _ = augment(images, images, replace(OFF, noise=0.1), torch.Generator().manual_seed(0))
    assert 0.09 < found.flatten(1).std(1).max() < 0.12 and torch.corrcoef(found.flatten(1)).triu(1).abs().max() < 0.5


def test_the_same_generator_gives_the_same_batch_within_the_range():
    images, labels = batch(channels=3)
    first, second = (augment(images, labels, Augment(bias_field=0.3), torch.Generator().manual_seed(5))[0] for _ in range(2))
    assert torch.equal(first, second) and first.min() >= AIR and first.max() <= BRIGHTEST
    assert not torch.allclose(first[0] - images[0], first[1] - images[1])


def test_an_absent_modality_stays_blank():
    images, labels = batch(channels=2)
    images[0, 1] = 0
    found, _ = augment(images, labels, Augment(), torch.Generator().manual_seed(0))
    assert not found[0, 1].any() and found[1, 1].any()


def test_modality_dropout_blanks_t1_alone_in_the_given_share():
    inputs = Inputs(modalities=("flair", "t1"), context=1, modality_dropout=0.3)
    images = torch.ones(2000, 6, 1, 1)
    found = drop_modalities(images, inputs, torch.Generator().manual_seed(0))
    assert found[:, :3].all() and torch.equal(found[:, 3], found[:, 5])
    assert found[:, 3].mean().item() == pytest.approx(0.7, abs=0.04)
    assert drop_modalities(images, Inputs(), torch.Generator()) is images
