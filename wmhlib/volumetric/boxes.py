"""The network's box: a grid of cubic voxels around the head, cut from a scan, and back onto the scan's own grid.

Axes are LPS: x runs to the patient's left, y to posterior, z to superior, so that a left-right flip is one of the first axis. Each
axis is resampled on its own by a matrix: linear interpolation, widened to a triangle of the coarser voxel's size where the result is
coarser than what it is made of (antialiasing), or the share of each voxel that another covers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from scipy import ndimage
from torch import Tensor

from ..canvas import LPS
from ..errors import InputError
from ..sections import Volume
from ..volumes import AIR, Case, reorient

_ABOVE_MM = 30.0  # of the head's inner part: scalp, skull and a margin
_SAME = 6  # decimals to which voxel sizes agree


@dataclass(frozen=True)
class Box:
    """Where the box lies on the scan: the scan's shape and orientation and, along the LPS axes, how many voxels the box has (`sizes`), where its
    first one begins (`starts`, in the scan's voxels, negative outside) and how many of the scan's voxels one of it is long (`steps`)."""

    shape: tuple[int, int, int]
    orientation: np.ndarray
    sizes: tuple[int, int, int]
    starts: tuple[int, int, int]
    steps: tuple[float, float, float]


def place_box(case: Case, settings: Volume) -> Box:
    """The box of `settings.box` voxels of `settings.spacing` mm on a case: all of the scan where that fits in, else around the middle of
    the head from left to right and front to back, and from its vertex down."""
    (inner,), spacing = reorient(case.volume.affine, "LPS", case.inner)
    steps = tuple(np.round(settings.spacing / spacing, _SAME).tolist())
    lengths = [round(n * step) for n, step in zip(settings.box, steps)]
    above = np.flatnonzero(inner.any((0, 1)))[-1] + 1 + round(_ABOVE_MM / spacing[2])
    middles = (start + n / 2 for start, n in (case.grid.columns, case.grid.rows))
    wanted = [round(middle - n / 2) for middle, n in zip(middles, lengths)] + [int(above) - lengths[2]]
    starts = (int(np.clip(start, min(0, n - length), max(0, n - length))) for start, length, n in zip(wanted, lengths, inner.shape))
    return Box(case.volume.data.shape, io_orientation(case.volume.affine), tuple(settings.box), tuple(starts), steps)


def to_box(volume: np.ndarray, box: Box, fill: float = 0.0) -> Tensor:
    """H x W x D on the scan's grid -> float32 X x Y x Z; `fill` outside the scan."""
    lps = _lps(volume, box)
    matrices = [interpolation(*axis) for axis in zip(box.sizes, lps.shape, box.starts, box.steps)]
    result = resample(lps, matrices)
    for axis, matrix in enumerate(matrices):
        result.movedim(axis, 0)[~matrix.any(1)] = fill
    return result


def case_box(case: Case, box: Box) -> Tensor:
    """Every modality of `case`: float32 M x X x Y x Z; air around the scan, an absent T1 all 0."""
    return torch.stack([to_box(image, box, AIR if image.any() else 0.0) for image in case.images])


def mask_box(mask: np.ndarray, box: Box) -> Tensor:
    """Boolean H x W x D -> boolean X x Y x Z: where at least half of a voxel is in the mask. Of a lesion (26 neighbours) that no such voxel
    shows there is the one with the largest share of it, if the box reaches it."""
    lps = _lps(mask, box)
    matrices = [shares(*axis) for axis in zip(box.sizes, lps.shape, box.starts, box.steps)]
    result = resample(lps, matrices) >= 0.5 - 1e-4
    parts, _ = ndimage.label(lps.numpy(), np.ones((3, 3, 3)))
    for number, place in enumerate(ndimage.find_objects(parts), 1):
        near = [matrix[:, along] for matrix, along in zip(matrices, place)]
        rows = [torch.nonzero(matrix.any(1)).flatten().tolist() for matrix in near]
        if all(rows):
            seen = tuple(slice(row[0], row[-1] + 1) for row in rows)
            share = resample(torch.from_numpy(parts[place] == number).float(), [matrix[some] for matrix, some in zip(near, seen)])
            if not (result[seen] & (share > 0)).any():
                result[seen][np.unravel_index(int(share.argmax()), share.shape)] = True
    return result


def box_labels(case: Case, box: Box, name: str) -> Tensor:
    """The labels of `case` as uint8 X x Y x Z. Raises InputError, which tells the mask's `name`, where the box holds none of its lesions."""
    labels = torch.zeros(box.sizes, dtype=torch.uint8)
    for label in (2, 1):
        labels[mask_box(case.mask == label, box)] = label
    if (case.mask == 1).any() and not (labels == 1).any():
        raise InputError(f"{name} marks lesions, none of them in the box of {' x '.join(map(str, box.sizes))} voxels around the head: set volume.box larger, or leave the case out")
    return labels


def from_box(prob: Tensor, box: Box) -> np.ndarray:
    """X x Y x Z -> float32 H x W x D on the scan's own grid and orientation, 0 outside the box."""
    lengths = [box.shape[axis] for axis in np.argsort(box.orientation[:, 0])]
    axes = zip(lengths, box.sizes, (-start / step for start, step in zip(box.starts, box.steps)), (1 / step for step in box.steps))
    lps = resample(prob.float().cpu(), [interpolation(*axis) for axis in axes]).numpy()
    return np.ascontiguousarray(apply_orientation(lps, ornt_transform(LPS, box.orientation)))


def interpolation(out: int, into: int, start: float, step: float) -> Tensor:
    """out x into: each of `out` voxels, `step` long in those of `into` and the first of them beginning at `start`, as a weighted mean of these;
    0 where its middle lies outside."""
    middles = start + (np.arange(out) + 0.5) * step
    weights = np.clip(1 - np.abs(middles[:, None] - np.arange(into) - 0.5) / max(1.0, step), 0, None)
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-9)
    return torch.from_numpy((weights * ((middles >= 0) & (middles <= into))[:, None]).astype(np.float32))


def splines(positions: np.ndarray) -> Tensor:
    """Cubic B-splines, positions x knots, which lie one apart from -1 on."""
    away = np.abs(positions[:, None] - np.arange(-1, int(positions.max()) + 3))
    return torch.from_numpy(np.where(away < 1, 2 / 3 - away**2 + away**3 / 2, np.clip(2 - away, 0, None) ** 3 / 6).astype(np.float32))


def shares(out: int, into: int, start: float, step: float) -> Tensor:
    """The same with the share of each voxel of `out` that one of `into` covers."""
    edges, old = (start + np.arange(out) * step)[:, None], np.arange(into)
    return torch.from_numpy((np.clip(np.minimum(edges + step, old + 1) - np.maximum(edges, old), 0, None) / step).astype(np.float32))


def resample(volume: Tensor, matrices: list[Tensor]) -> Tensor:
    """A volume with each of its axes multiplied by a matrix (out x into)."""
    for matrix in matrices:
        volume = torch.tensordot(volume, matrix, ([0], [1]))
    return volume


def _lps(array: np.ndarray, box: Box) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(apply_orientation(array, ornt_transform(box.orientation, LPS)), np.float32))
