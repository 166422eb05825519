"""Whole boxes by a sliding window, in several views."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from ..sections import Volume
from ..settings import Recipe
from ..volumes import Case
from .boxes import case_box, from_box, place_box

# The axes that the views of test-time augmentation flip: left-right, front-back, and down-up.
FLIPS = {1: ((),), 2: ((), (0,)), 4: ((), (0,), (1,), (0, 1)), 8: ((), (0,), (1,), (0, 1), (2,), (0, 2), (1, 2), (0, 1, 2))}


def probabilities(logits: Callable[[Tensor], Tensor], images: Tensor, settings: Volume, batch_size: int) -> Tensor:
    """M x X x Y x Z -> float32 X x Y x Z: the mean of the probabilities that windows of `settings.patch` give a voxel, with Gaussian weights,
    highest in a window's middle; `batch_size` windows in one forward pass."""
    return sliding_window_inference(images[None], settings.patch, batch_size, lambda windows: torch.sigmoid(logits(windows).float()),
                                    overlap=settings.overlap, mode="gaussian")[0, 0]


def predict_box(logits: Callable[[Tensor], Tensor], case: Case, recipe: Recipe, views: int, device: torch.device) -> tuple[np.ndarray, np.ndarray, int]:
    """What `engine.Prediction` holds of a case: the probabilities of the plain view, their mean over `views` views (1, 2, 4 or 8), both
    on the scan's own grid, and how many slices the box leaves out. As many windows go through the network at once as patches in training."""
    box = place_box(case, recipe.volume)
    images = case_box(case, box).to(device)
    plain = total = None
    for axes in FLIPS[views]:
        turned = images.flip([axis + 1 for axis in axes])
        view = probabilities(logits, turned, recipe.volume, recipe.training.batch_size).flip(axes)
        plain, total = (view, view) if total is None else (plain, total + view)
    first, last = box.starts[2], box.starts[2] + round(box.sizes[2] * box.steps[2])
    inside = max(0, min(last, case.grid.depth) - max(first, 0))
    plain, mean = (from_box(prob, box).clip(0, 1) for prob in (plain, total / len(FLIPS[views])))  # the weights of a resize add up to 1 but for rounding
    return plain, mean, case.grid.depth - inside
