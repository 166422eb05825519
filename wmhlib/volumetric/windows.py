"""Whole boxes by a sliding window."""

from __future__ import annotations

import torch
from monai.inferers import sliding_window_inference
from torch import Tensor

from ..sections import Volume
from ..tasks import Forward


def probabilities(forward: Forward, images: Tensor, settings: Volume, batch_size: int) -> Tensor:
    """M x X x Y x Z -> float32 X x Y x Z: the mean of the probabilities that windows of `settings.patch` give a voxel, with Gaussian weights,
    highest in a window's middle; `batch_size` windows in one forward pass."""
    return sliding_window_inference(images[None], settings.patch, batch_size, lambda windows: torch.sigmoid(forward(windows)[0].float()),
                                    overlap=settings.overlap, mode="gaussian")[0, 0]
