"""Patches of volumes: which are drawn, how they are stacked, and what augmentation may do to them."""

import math
from dataclasses import replace

import pytest
import torch
from small import OFF

from wmhlib.errors import InputError
from wmhlib.sections import Augment, Volume
from wmhlib.volumes import AIR, BRIGHTEST
from wmhlib.volumetric import patches
from wmhlib.volumetric.patches import augment_volumes, draw_patches, stack_patches
from wmhlib.volumetric.store import CaseVolume

SETTINGS = Volume("attention", spacing=4.0, box=(96, 64, 96), patch=(32, 48, 32), patches=6, lesion_share=0.5)


def case(name, lesion=True):
    images = torch.full((2, 96, 64, 96), AIR).half()
    images[:, 8:88, 8:56, 8:88] = torch.linspace(-1, 1, 48).half()[:, None]
    labels = torch.zeros(96, 64, 96, dtype=torch.uint8)
    labels[9:11, 50:53, 30] = int(lesion)
    labels[30, 20, 20] = 2
    return CaseVolume(name, images, labels)


def batch(n=3, side=24):
    generator = torch.Generator().manual_seed(3)
    images = torch.nn.functional.avg_pool3d(torch.randn(n, 1, side, side, side, generator=generator), 5, 1, 2)
    return images, (images > 0.1).byte()


def changed(settings, images, labels, seed=1, spacing=4.0):
    return augment_volumes(images.clone(), labels.clone(), settings, spacing, torch.Generator().manual_seed(seed))


def test_patches_lie_in_the_box_and_the_given_share_of_them_shows_a_lesion():
    cases = [case("a"), case("b", lesion=False)]
    drawn = [place for seed in range(20) for place in draw_patches(cases, SETTINGS, seed)]
    assert len(drawn) == 20 * 12 and all(0 <= at <= n - m for _, *place in drawn for at, n, m in zip(place, SETTINGS.box, SETTINGS.patch))
    _, labels = stack_patches(cases, [place for place in drawn if place[0] == 0], SETTINGS)
    assert 0.45 < (labels == 1).flatten(1).any(1).float().mean() < 0.75
    with_all = draw_patches(cases[:1], replace(SETTINGS, lesion_share=1.0), 0)
    assert (stack_patches(cases, with_all, SETTINGS)[1] == 1).flatten(1).any(1).all() and len(set(with_all)) > 3


def test_a_draw_depends_on_seed_and_case_alone():
    alone, together = draw_patches([case("b")], SETTINGS, 1), draw_patches([case("a"), case("b")], SETTINGS, 1)
    assert [place for _, *place in alone] == [place for i, *place in together if i == 1]
    assert alone != draw_patches([case("b")], SETTINGS, 2)


def test_a_case_without_a_head_is_refused():
    empty = CaseVolume("empty", torch.full((1, 96, 64, 96), AIR).half(), torch.zeros(96, 64, 96, dtype=torch.uint8))
    with pytest.raises(InputError, match="case empty shows no head"):
        draw_patches([empty], SETTINGS, 0)


def test_a_stack_holds_what_lies_at_its_places():
    cases = [case("a"), case("b")]
    images, labels = stack_patches(cases, [(1, 2, 10, 20), (0, 32, 16, 32)], SETTINGS)
    assert images.shape == (2, 2, 32, 48, 32) and images.dtype == torch.float32 and labels.shape == (2, 1, 32, 48, 32) and labels.dtype == torch.uint8
    assert torch.equal(images[0].half(), cases[1].images[:, 2:34, 10:58, 20:52]) and torch.equal(labels[0, 0], cases[1].labels[2:34, 10:58, 20:52])


def test_augmentation_off_is_the_identity():
    images, labels = batch()
    same, marked = changed(OFF, images, labels)
    torch.testing.assert_close(same, images)
    assert torch.equal(marked, labels)


def test_the_same_seed_gives_the_same_batch_and_an_absent_modality_stays_absent():
    images, labels = batch()
    images = torch.cat([images, torch.zeros_like(images)], 1)
    everything = Augment(bias_field=0.3, elastic=4.0, resolution=3.0)
    one, again, other = (changed(everything, images, labels, seed) for seed in (1, 1, 2))
    assert torch.equal(one[0], again[0]) and torch.equal(one[1], again[1]) and not torch.equal(one[0], other[0])
    assert not one[0][:, 1].any() and AIR <= one[0].min() and one[0].max() <= BRIGHTEST and set(one[1].unique().tolist()) <= {0, 1}


def test_flips_are_along_their_own_axis_alone():
    images, labels = batch()
    for switch, axis in (("flips", 2), ("flips_ap", 3)):
        seen = set()
        for seed in range(6):
            flipped, marked = changed(replace(OFF, **{switch: True}), images, labels, seed)
            for one, mask, image, label in zip(flipped, marked, images, labels):
                turned = bool((one - image).abs().max() > 1e-3)
                seen.add(turned)
                torch.testing.assert_close(one, image.flip(axis - 1) if turned else image, atol=1e-4, rtol=0)
                assert torch.equal(mask, label.flip(axis - 1) if turned else label)
        assert seen == {True, False}


def test_image_and_labels_move_together():
    x = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 32)] * 3, indexing="ij"))
    images = torch.exp(-3 * (x - 0.2).square().sum(0))[None, None] * 4
    moved, marked = changed(replace(OFF, rotation=40.0, scale=0.2, flips=True, elastic=8.0), images, (images > 2).byte())
    assert (moved - images).abs().max() > 0.5
    assert ((moved > 2) != marked.bool()).sum() < 0.15 * marked.sum()


def test_rotation_tilts_a_third_of_what_it_turns(monkeypatch):
    angles = {}
    monkeypatch.setattr(patches, "_turn", lambda angle, *plane: angles.setdefault(plane, []).extend(angle.tolist()) or torch.eye(3).repeat(len(angle), 1, 1))
    for seed in range(40):
        changed(replace(OFF, rotation=30.0), *batch(side=5), seed=seed)
    most = {plane: math.degrees(max(map(abs, found))) for plane, found in angles.items()}
    assert 27 < most[0, 1] <= 30 and 8.5 < most[1, 2] <= 10 and 8.5 < most[0, 2] <= 10


@pytest.mark.parametrize("elastic", [4.0, 12.0, 40.0])
def test_the_elastic_field_never_folds(elastic):
    images, _ = batch(n=2, side=40)

    def uniform(limit, *shape):  # the worst there may be: every knot at its limit
        return torch.where(torch.rand(2, *shape) < 0.5, -1.0, 1.0) * limit

    for _ in range(4):
        grid = patches._grid(images, replace(OFF, elastic=elastic), 4.0, uniform).flip(-1) * 80.0  # mm
        jacobian = torch.stack([torch.stack(torch.gradient(grid[..., axis], spacing=4.0, dim=(1, 2, 3)), -1) for axis in range(3)], -2)
        assert torch.linalg.det(jacobian).min() > 0
        still = patches._grid(images, OFF, 4.0, uniform).flip(-1) * 80.0
        assert 0.2 * elastic < (grid - still).norm(dim=-1).max() <= elastic


def test_resolution_smooths_one_axis_and_leaves_the_labels():
    images, labels = torch.randn(8, 1, 24, 24, 24), torch.ones(8, 1, 24, 24, 24, dtype=torch.uint8)
    coarse, marked = changed(replace(OFF, resolution=4.0), images, labels)
    lost = torch.stack([coarse.diff(dim=axis).square().mean((1, 2, 3, 4)) / images.diff(dim=axis).square().mean((1, 2, 3, 4)) for axis in (2, 3, 4)], 1)
    assert torch.equal(marked, labels) and set(lost.argmin(1).tolist()) == {0, 1, 2}
    ratios = lost.min(1).values / lost.median(1).values
    assert (ratios < 1.01).all() and ratios.min() < 0.5
    flat = torch.full((2, 1, 24, 24, 24), 1.5)
    torch.testing.assert_close(changed(replace(OFF, resolution=3.0), flat, flat.byte())[0], flat)
