import pytest
import torch
from monai.losses import DiceLoss, FocalLoss, TverskyLoss
from torch.nn.functional import binary_cross_entropy_with_logits, max_pool2d

from wmhlib.losses import boundary_loss, dice_loss, focal_loss, total_loss, tversky_loss
from wmhlib.sections import Loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 32, 32, generator=generator)
    labels = (torch.rand(2, 1, 32, 32, generator=generator) > 0.9).byte()
    return logits, labels, torch.ones_like(logits)


def test_focal_equals_monais(batch):
    logits, labels, valid = batch
    expected = FocalLoss(alpha=0.75, gamma=2.0)(logits, labels.float())
    torch.testing.assert_close(focal_loss(logits, labels.float(), valid, 0.75, 2.0), expected)


def test_focal_is_the_mean_over_valid_pixels_alone(batch):
    logits, labels, valid = batch
    valid[..., 16:] = 0
    half = (t[..., :16] for t in (logits, labels.float(), valid))
    torch.testing.assert_close(focal_loss(logits, labels.float(), valid, 0.75, 2.0), focal_loss(*half, 0.75, 2.0))


def test_dice_equals_monais_over_a_batch(batch):
    logits, labels, valid = batch
    expected = DiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)(logits, labels.float())
    torch.testing.assert_close(dice_loss(logits, labels.float(), valid), expected)


def test_dice_of_each_mask_is_the_mean_of_theirs(batch):
    logits, labels, valid = batch
    labels[0, :, 4:] = 0  # a small mask counts as much
    expected = DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)(logits, labels.float())
    torch.testing.assert_close(dice_loss(logits, labels.float(), valid, each=True), expected)


def test_boundary_loss_of_weight_one_is_plain_cross_entropy(batch):
    logits, labels, valid = batch
    expected = binary_cross_entropy_with_logits(logits, labels.float())
    torch.testing.assert_close(boundary_loss(logits, labels.float(), valid, 1.0), expected)


def test_boundary_pixels_weigh_more_on_both_sides_of_the_border():
    target = torch.zeros(1, 1, 9, 9)
    target[..., 2:7, 2:7] = 1

    def effect(row, column):
        logits = torch.zeros(1, 1, 9, 9)
        logits[..., row, column] = -3 if target[0, 0, row, column] else 3
        base = boundary_loss(torch.zeros_like(logits), target, torch.ones_like(target), 3.0)
        return float(boundary_loss(logits, target, torch.ones_like(target), 3.0) - base)

    middle, inside, outside, far = effect(4, 4), effect(2, 4), effect(1, 4), effect(0, 0)
    assert inside == pytest.approx(3 * middle, rel=1e-4) and outside == pytest.approx(inside, rel=1e-4)
    assert far == pytest.approx(middle, rel=1e-4)


def test_other_pathology_has_no_gradient_at_any_scale(batch):
    fused = batch[0].clone().requires_grad_()
    scales = [torch.zeros(2, 1, 32 // f, 32 // f, requires_grad=True) for f in (1, 2, 4, 8)]
    labels = batch[1].clone()
    labels[..., :8, :8] = 2
    total_loss(fused, scales, labels, Loss())[0].backward()
    assert not fused.grad[..., :8, :8].any() and fused.grad[..., 8:, 8:].all()
    for factor, scale in zip((1, 2, 4, 8), scales, strict=True):
        assert not scale.grad[..., : 8 // factor, : 8 // factor].any() and scale.grad.any()


def test_a_lesion_of_one_pixel_is_a_target_at_every_scale():
    labels = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
    labels[..., 13, 21] = 1
    scales = [torch.zeros(1, 1, 32 // f, 32 // f, requires_grad=True) for f in (1, 2, 4, 8)]
    total_loss(torch.zeros(1, 1, 32, 32), scales, labels, Loss())[0].backward()
    for factor, scale in zip((1, 2, 4, 8), scales, strict=True):
        assert scale.grad[0, 0, 13 // factor, 21 // factor] < 0 and (scale.grad < 0).sum() == 1


def test_a_perfect_answer_costs_nothing(batch):
    _, labels, _ = batch
    sure = [40.0 * (2 * max_pool2d(labels.float(), f) - 1) for f in (1, 2, 4, 8)]
    assert float(total_loss(sure[0], sure, labels, Loss())[0]) < 1e-3


def test_every_part_has_the_weights_and_parameters_of_the_recipe(batch):
    fused, labels, valid = batch
    labels[..., :8, :8], valid[..., :8, :8] = 2, 0
    target, (edges, *scales) = (labels == 1).float(), (torch.randn(2, 1, 32 // f, 32 // f) for f in (1, 1, 2, 4, 8))
    coarse = [(logits, max_pool2d(target, f), valid[..., ::f, ::f]) for logits, f in zip(scales, (1, 2, 4, 8))]
    border = max_pool2d(target, 3, 1, 1) * max_pool2d(1 - target, 3, 1, 1)

    def both(*args):
        return focal_loss(*args, 0.6, 1.5) + dice_loss(*args)

    expected = {"focal": 0.5 * focal_loss(fused, target, valid, 0.6, 1.5), "dice": 0.7 * dice_loss(fused, target, valid),
                "boundary": 1.1 * boundary_loss(fused, target, valid, 4.0), "tversky": 0.9 * tversky_loss(fused, target, valid, 0.8),
                "scales": sum(weight * both(*one) for weight, one in zip((0.8, 0.4, 0.2, 0.1), coarse)), "edges": 1.3 * both(edges, border, valid)}
    settings = Loss(0.6, 1.5, boundary_weight=4.0, scale_weights=(0.8, 0.4, 0.2, 0.1), weights=(0.5, 0.7, 1.1), tversky=0.9, tversky_beta=0.8, edges=1.3)
    loss, parts = total_loss(fused, scales, labels, settings, edges)
    torch.testing.assert_close(parts, expected)
    torch.testing.assert_close(loss, sum(expected.values()))


def test_tversky_equals_monais(batch):
    logits, labels, valid = batch
    expected = TverskyLoss(sigmoid=True, batch=True, alpha=0.3, beta=0.7, smooth_nr=1.0, smooth_dr=1.0)(logits, labels.float())
    torch.testing.assert_close(tversky_loss(logits, labels.float(), valid, 0.7), expected)


def test_losses_of_a_volume_of_equal_slices_are_those_of_the_slice_away_from_its_ends(batch):
    logits, labels, valid = batch
    deep = [x.unsqueeze(2).repeat(1, 1, 8, 1, 1) for x in (logits, labels.float(), valid)]
    torch.testing.assert_close(boundary_loss(*deep, 4.0), boundary_loss(logits, labels.float(), valid, 4.0))
    torch.testing.assert_close(focal_loss(*deep, 0.75, 2.0), focal_loss(logits, labels.float(), valid, 0.75, 2.0))


def test_the_total_over_a_volume_is_the_sum_of_its_parts_at_all_scales():
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(2, 1, 16, 16, 16, generator=generator) > 0.95).byte()
    fused, *scales = (torch.randn(2, 1, *[16 // f] * 3, generator=generator).requires_grad_() for f in (1, 1, 2, 4))
    edges = torch.zeros(2, 1, 16, 16, 16, requires_grad=True)
    loss, parts = total_loss(fused, scales, labels, Loss(weights=(0.25, 0.35, 0.25), tversky=0.15, boundary_weight=4.0), edges)
    loss.backward()
    assert list(parts) == ["focal", "dice", "boundary", "tversky", "scales", "edges"] and float(sum(parts.values())) == pytest.approx(float(loss.detach()))
    assert all(float(x.grad.abs().sum()) > 0 for x in (fused, *scales, edges))


def test_borders_are_pulled_up_on_both_sides_and_everything_else_down():
    labels, edges = torch.zeros(1, 1, 12, 12, 12, dtype=torch.uint8), torch.zeros(1, 1, 12, 12, 12, requires_grad=True)
    labels[..., 3:8, 3:8, 3:8] = 1
    total_loss(torch.zeros_like(edges), [], labels, Loss(), edges)[0].backward()
    border = torch.zeros_like(labels, dtype=torch.bool)
    border[..., 2:9, 2:9, 2:9] = True
    border[..., 4:7, 4:7, 4:7] = False
    assert torch.equal(edges.grad < 0, border) and bool((edges.grad[~border] > 0).all())
