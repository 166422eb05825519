"""The template that synthetic patients are warped from: a brain's maps, and what follows from them for the head around.

Lengths are in mm, positions in MNI coordinates (x to the right, y to anterior, z to superior).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from .errors import InputError
from .heads import HEAD_ORIGIN, brain_of, mni152

_VENTRICLES = 4, 80  # mL, of the lateral ventricles


@dataclass(frozen=True)
class Maps:
    """Channels x X x Y x Z on a regular grid: `origin` is the position of the first voxel, `step` the voxel size."""

    channels: torch.Tensor
    origin: tuple[int, int, int]
    step: int

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        """Linear interpolation at `points` (... x 3), clamped at the border: channels x ..."""
        last = torch.tensor(self.channels.shape[1:]) - 1
        grid = (points.flatten(0, -2) - torch.tensor(self.origin)) * (2 / (self.step * last)) - 1
        grid = grid.flip(-1)[None, None, None]
        values = F.grid_sample(self.channels[None], grid, padding_mode="border", align_corners=True)
        return values.reshape(-1, *points.shape[:-1])


@cache  # some 0.1 GB a head
def template(head: str = "") -> tuple[Maps, Maps, Maps | None]:
    """Brain maps at 1 mm (grey, white matter) and wide maps at 2 mm: distance to the lateral ventricles and to the
    brain (negative inside), depth below the skin of face and neck, 3 components pointing away from the ventricles. Of the MNI152, or of the T1w scan
    `head` (InputError where that shows no lateral ventricles), and then a map of its whole head too (`heads.Brain.head`)."""
    found = brain_of(head) if head else mni152()
    grey, white, brain, origin = found.grey, found.white, found.inside.astype(np.float32), found.origin

    def box(*ranges):
        return tuple(slice(low - o, high - o) for o, (low, high) in zip(origin, ranges))

    deep = box((-48, 48), (-60, 48), (-12, 42))
    room = np.zeros_like(brain)
    room[box((-40, 40), (-52, 40), (-4, 33))] = 1
    labels, _ = ndimage.label((1 - grey - white > 0.5)[deep] * brain[deep] * room[deep])
    ventricles = np.zeros(brain.shape, bool)
    ventricles[deep] = (labels > 0) & np.isin(labels, labels[[39, 40, 41, 55, 56, 57], 70, 28])  # y = 10, z = 16
    if not _VENTRICLES[0] <= ventricles.sum() / 1000 <= _VENTRICLES[1]:
        raise InputError(f"{head} shows {ventricles.sum() / 1000:.0f} mL of lateral ventricles where the MNI152 has them, expected {_VENTRICLES[0]} to "
                         f"{_VENTRICLES[1]} mL: is it the T1w scan of a healthy adult?")
    core = ndimage.grey_opening(grey[deep], (5, 5, 5))  # caudate and thalamus; the rest of the rim is partial volume
    rim = np.clip(grey[deep] - core, 0, 1) * ndimage.binary_dilation(ventricles[deep], iterations=5)
    grey[deep] -= rim
    white[deep] += rim

    wide_origin, shape = HEAD_ORIGIN, (113, 140, 156)
    x, y, z = np.ogrid[tuple(slice(o, o + 2 * n, 2) for o, n in zip(wide_origin, shape))]

    def wide(mask):
        padded = np.zeros(shape, bool)
        low = [(a - b) // 2 for a, b in zip(origin, wide_origin)]
        padded[tuple(slice(a, a + (n + 1) // 2) for a, n in zip(low, mask.shape))] = mask[::2, ::2, ::2]
        return padded

    def distance(mask):
        (inside,) = ndimage.find_objects(mask.astype(np.uint8))
        near = tuple(slice(max(0, s.start - 1), s.stop + 1) for s in inside)  # with what lies outside on each side
        away = ndimage.distance_transform_edt(~mask)
        away[near] -= ndimage.distance_transform_edt(mask[near])
        return 2 * away

    def ellipsoid(centre, radii):
        return sum((abs(a - c) / r) ** 2.4 for a, c, r in zip((x, y, z), centre, radii)) < 1

    to_ventricles = ndimage.gaussian_filter(distance(wide(ndimage.binary_dilation(ventricles))), 0.6)
    close, far = (distance(distance(wide(brain > 0)) < r) + r for r in (5, 16))  # closed by balls of these radii
    to_brain = ndimage.gaussian_filter(close + (far - close) / (1 + np.exp(-(z + 2) / 5)), 1.0)
    outward = np.gradient(ndimage.gaussian_filter(to_ventricles, 1.0), 2.0) * np.exp(-np.maximum(to_ventricles, 0) / 14)
    face = ellipsoid((0, 34, -66), (70, 56, 88)) | ellipsoid((0, 92, -60), (13, 20, 22))
    neck = ((x / 60) ** 2 + ((y + 26) / 60) ** 2 < 1) & (z < -35) | ellipsoid((0, -26, -42), (73, 80, 46))
    depth = ndimage.gaussian_filter(-distance(face | neck), 1.5)

    def stack(*arrays):
        return torch.from_numpy(np.stack(arrays).astype(np.float32))

    whole = Maps(stack(found.head), wide_origin, 1) if found.head is not None else None
    return Maps(stack(grey, white), origin, 1), Maps(stack(to_ventricles, to_brain, depth, *outward), wide_origin, 2), whole
