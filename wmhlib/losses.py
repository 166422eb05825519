"""The recipe's loss: focal, soft Dice, boundary-weighted cross-entropy and Tversky loss, with deep supervision; label 2 is ignored.

Logits are B x 1 x h x w; labels are B x 1 x H x W with 0 background, 1 lesion, 2 other pathology (no gradient, no score). Of volumes both
have one axis more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .sections import Loss

_SMOOTH = 1.0  # pixels


def focal_loss(logits: Tensor, target: Tensor, valid: Tensor, alpha: float, gamma: float) -> Tensor:
    """Mean of -alpha_t (1 - p_t)^gamma log p_t over valid pixels (Lin et al. 2017, eq. 5); target and valid are 0 or 1."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    alpha_t = target * alpha + (1 - target) * (1 - alpha)
    return _mean(alpha_t * (1 - torch.exp(-cross_entropy)) ** gamma * cross_entropy, valid)


def dice_loss(logits: Tensor, target: Tensor, valid: Tensor, each: bool = False) -> Tensor:
    """1 - (2 |p t| + 1) / (|p| + |t| + 1) over all valid pixels of the batch (Milletari et al. 2016, without squares); with `each`,
    the mean of that of every mask, so that small ones count as much as large ones."""
    probability = torch.sigmoid(logits) * valid
    target = target * valid
    axes = tuple(range(int(each), logits.dim()))
    return (1 - (2 * (probability * target).sum(axes) + _SMOOTH) / (probability.sum(axes) + target.sum(axes) + _SMOOTH)).mean()


def tversky_loss(logits: Tensor, target: Tensor, valid: Tensor, beta: float) -> Tensor:
    """1 - (|p t| + 1) / (|p t| + (1 - beta) |p (1 - t)| + beta |(1 - p) t| + 1) over all valid pixels of the batch (Salehi et al. 2017, eq. 3)."""
    probability, target = torch.sigmoid(logits) * valid, target * valid
    hit = (probability * target).sum()
    false, missed = probability.sum() - hit, target.sum() - hit
    return 1 - (hit + _SMOOTH) / (hit + (1 - beta) * false + beta * missed + _SMOOTH)


def boundary_loss(logits: Tensor, target: Tensor, valid: Tensor, weight: float) -> Tensor:
    """Cross-entropy in which pixels on either side of a lesion's border (3 x 3 neighbourhood; of volumes 3 x 3 x 3) weigh `weight`."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return _mean(cross_entropy, valid * (1 + (weight - 1) * _border(target)))


def total_loss(fused: Tensor, scales: list[Tensor], labels: Tensor, settings: Loss, edges: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum that is minimised and its parts (focal, dice, boundary, tversky where it weighs anything, scales, edges where given), all detached.

    fused, scales (finest first) and edges, a map of the borders that `boundary_loss` weighs, are logits; coarse targets are max-pooled, so
    that a small lesion stays a lesion.
    """
    target, valid = (labels == 1).float(), (labels != 2).float()
    fused = fused.float()
    focal, dice, boundary = settings.weights
    parts = {
        "focal": focal * focal_loss(fused, target, valid, settings.focal_alpha, settings.focal_gamma),
        "dice": dice * dice_loss(fused, target, valid),
        "boundary": boundary * boundary_loss(fused, target, valid, settings.boundary_weight),
    }
    if settings.tversky:
        parts["tversky"] = settings.tversky * tversky_loss(fused, target, valid, settings.tversky_beta)
    parts["scales"], pool = fused.new_zeros(()), F.max_pool2d if labels.dim() == 4 else F.max_pool3d
    for weight, logits in zip(settings.scale_weights, scales):
        if not weight:
            continue
        factor = labels.shape[-1] // logits.shape[-1]
        small = pool(target, factor) if factor > 1 else target
        known = torch.maximum(small, 1 - pool(1 - valid, factor)) if factor > 1 else valid
        parts["scales"] = parts["scales"] + weight * _focal_and_dice(logits.float(), small, known, settings)
    if edges is not None:
        parts["edges"] = settings.edges * _focal_and_dice(edges.float(), _border(target).float(), valid, settings)
    return sum(parts.values()), {name: part.detach() for name, part in parts.items()}


def _focal_and_dice(logits: Tensor, target: Tensor, valid: Tensor, settings: Loss) -> Tensor:
    return focal_loss(logits, target, valid, settings.focal_alpha, settings.focal_gamma) + dice_loss(logits, target, valid)


def _border(target: Tensor) -> Tensor:
    return _near(target > 0.5) & _near(target < 0.5)


def _near(mask: Tensor) -> Tensor:
    """Whether a pixel of the 3 x 3 (x 3) neighbourhood is True. Twelve times faster than max_pool2d, which also looks for where."""
    axes = range(2, mask.dim())
    mask = F.pad(mask, (1, 1) * len(axes))
    for axis in axes:
        size = mask.shape[axis] - 2
        mask = mask.narrow(axis, 0, size) | mask.narrow(axis, 1, size) | mask.narrow(axis, 2, size)
    return mask


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1)
