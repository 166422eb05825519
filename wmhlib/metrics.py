"""Scores of a mask against its reference: the WMH challenge's five, volumes, components and lesions.

Masks are H x W x D with the slices along the last axis; spacing is (mm, mm, mm) in that order. References hold
0 background, 1 lesion, 2 other pathology, which counts neither for nor against.
"""

from __future__ import annotations

import cc3d
import numpy as np
import pandas as pd
from nibabel.affines import voxel_sizes
from scipy.spatial import cKDTree

from .errors import InputError

SCORES = ("dsc", "hd95", "avd", "recall", "f1")


def reference_parts(reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lesion and other pathology of a reference of any dtype: where it is in [0.5, 1.5] and in [1.5, 2.5] (bool)."""
    reference = np.asarray(reference)
    if reference.dtype == bool:
        return reference, np.zeros_like(reference)
    if np.issubdtype(reference.dtype, np.integer):
        return reference == 1, reference == 2
    return (reference >= 0.5) & (reference <= 1.5), (reference >= 1.5) & (reference <= 2.5)


def challenge_scores(reference: np.ndarray, result: np.ndarray, spacing) -> dict[str, float]:
    """The five scores of the WMH Segmentation Challenge (Kuijf et al. 2019, doi 10.1109/TMI.2019.2905770).

    `reference` (H x W x D, labels 0, 1, 2) and `result` (same shape, lesion where 0.5 or more) may have any dtype;
    `spacing` is in mm. The result is emptied where the reference is 2, before everything else. Returns `dsc` 0-1;
    `hd95` in mm; `avd` in % of the reference's volume; `recall` and `f1` over 26-connected lesions, 0-1.
    An empty reference or result has no `hd95`, an empty reference no `avd`, two empty masks no `dsc`: these are NaN.
    Raises InputError for arrays of different shapes or a spacing that is not three lengths above 0.
    """
    reference, result = np.asarray(reference), np.asarray(result)
    if reference.shape != result.shape or reference.ndim != 3:
        raise InputError(f"the reference has shape {reference.shape} and the result {result.shape}: "
                         "expected the same H x W x D, so resample one onto the other's grid")
    spacing = np.asarray(spacing, float)
    if spacing.shape != (3,) or not (spacing > 0).all():
        raise InputError(f"spacing {spacing.tolist()} is impossible: expected three lengths in mm")
    lesion, ignored = reference_parts(reference)
    result = result if result.dtype == bool else result >= 0.5
    box = bounding_box(lesion, result, margin=1)
    lesion, result = lesion[box], result[box] & ~ignored[box]
    size, result_size = np.count_nonzero(lesion), np.count_nonzero(result)
    both = lesion & result
    dsc = float(dice_of(np.count_nonzero(both), size + result_size))
    avd = 100 * abs(size - result_size) / size if size else np.nan
    recall, precision = _share_hit(lesion, both), _share_hit(result, both)
    f1 = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
    hd95 = _hd95(lesion, result, [part.start for part in box], spacing)
    return dict(dsc=dsc, hd95=hd95, avd=avd, recall=recall, f1=f1)


def case_scores(reference: np.ndarray, result: np.ndarray, spacing) -> dict[str, float]:
    """`challenge_scores` of a boolean `result`, and the volumes of both in mL (`reference_ml`, `result_ml`), other pathology in neither."""
    lesion, ignored = reference_parts(reference)
    return challenge_scores(reference, result, spacing) | dict(
        reference_ml=volume_ml(lesion, spacing), result_ml=volume_ml(result & ~ignored, spacing))


def dice_of(both: np.ndarray | int, total: np.ndarray | int) -> np.ndarray:
    """Dice of masks with `both` voxels in common and `total` in all; NaN for two empty ones."""
    return np.divide(2 * np.asarray(both), total, out=np.full(np.shape(total), np.nan), where=np.asarray(total) > 0)


def _share_hit(mask: np.ndarray, both: np.ndarray) -> float:
    """Share of the components of `mask` with a voxel in `both`; 1 where there is none to hit."""
    at, labels, count = components(mask)
    return np.count_nonzero(np.bincount(labels[both[at]])) / count if count else 1.0


def _hd95(a: np.ndarray, b: np.ndarray, corner: list[int], spacing: np.ndarray) -> float:
    """95th percentile of the distances between in-plane borders, the larger of both ways, mm; NaN without borders. `corner` is
    where the arrays begin in the scan: distances come out to the last digit as on the whole of it."""
    here, there = ((np.stack(voxels(_border(mask)), axis=1) + corner) * spacing for mask in (a, b))
    if not len(here) or not len(there):
        return np.nan
    ways = (cKDTree(there).query(here)[0], cKDTree(here).query(there)[0])
    return float(max(np.percentile(distances, 95) for distances in ways))


def _border(mask: np.ndarray) -> np.ndarray:
    """The mask without its erosion by 3 x 3 x 1 voxels. Outside the array counts as foreground: a lesion cut by the image's
    edge has no border there."""
    inside = mask.copy()
    for view in (inside, inside.swapaxes(0, 1)):
        before = view.copy()
        view[1:] &= before[:-1]
        view[:-1] &= before[1:]
    return mask & ~inside


def voxels(mask: np.ndarray) -> tuple[np.ndarray, ...]:
    """Where a boolean mask is True: an array of coordinates an axis, in the order in which the voxels lie in memory."""
    if mask.flags.f_contiguous and not mask.flags.c_contiguous:
        return voxels(mask.T)[::-1]
    return np.unravel_index(np.flatnonzero(mask), mask.shape)


def bounding_box(*masks: np.ndarray, margin=0) -> tuple[slice, ...]:
    """Slices of the smallest box with every True voxel of the masks (one shape) and `margin` voxels around them (one number
    or one an axis), as far as the arrays reach; empty slices where all is False."""
    spans = np.array([_span(at) for at in map(voxels, masks) if len(at[0])])
    if not len(spans):
        return (slice(0, 0),) * masks[0].ndim
    low, high = spans[:, 0].min(axis=0) - margin, spans[:, 1].max(axis=0) + margin
    return tuple(slice(max(0, start), stop) for start, stop in zip(low.tolist(), high.tolist()))


def components(mask: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray, int]:
    """The 26-connected components of a boolean mask, told by its N voxels: their coordinates as `voxels` gives them, the
    component of each (N integers from 1 to n), and n. Components are numbered by their first voxels, the last axis running fastest."""
    at = voxels(mask)
    if not len(at[0]):
        return at, np.zeros(0, int), 0
    low, high = _span(at)
    places = tuple(axis - start for axis, start in zip(at, low))
    # One empty plane more along each axis: cc3d 4.1 raises an error where single voxels fill an array to the brim, as [1, 0, 1] does.
    box = np.zeros([stop - start + 1 for start, stop in zip(low, high)], bool)
    box[places] = True
    labels, count = cc3d.connected_components(box, connectivity=26, return_N=True)
    return at, labels[places], count


def _span(at: tuple[np.ndarray, ...]) -> tuple[list[int], list[int]]:
    """Lowest and highest coordinate, the latter plus 1, along each axis."""
    return [int(axis.min()) for axis in at], [int(axis.max()) + 1 for axis in at]


def filter_components(mask: np.ndarray, min_voxels: int) -> np.ndarray:
    """A boolean mask without its 26-connected components of fewer than `min_voxels` voxels."""
    mask = np.asarray(mask, bool)
    at, labels, _ = components(mask)
    kept = np.zeros_like(mask)
    kept[at] = (np.bincount(labels) >= min_voxels)[labels]
    return kept


def smallest(point: dict, spacing) -> int:
    """The fewest voxels a component needs under the operating point `point`: its `min_voxels`, or as many as fill its
    `min_mm3` (0 unless given) on a grid of `spacing` (mm), whichever is more."""
    return max(point["min_voxels"], int(np.ceil(point.get("min_mm3", 0) / np.prod(spacing) - 1e-6)))


def chosen(plain: np.ndarray, mean: np.ndarray, point: dict) -> np.ndarray:
    """The probabilities that the operating point `point` thresholds: with `tta` the `mean` over all views, else those of the `plain` one."""
    return mean if point["tta"] else plain


def mask_at(plain: np.ndarray, mean: np.ndarray, point: dict, spacing) -> np.ndarray:
    """The mask (bool, H x W x D) of probabilities (same shape, 0-1; the `plain` view and the `mean` over all) at the operating point `point`:
    those `chosen`, from its `threshold` on, without components below the `smallest`; `spacing` in mm."""
    return filter_components(chosen(plain, mean, point) >= point["threshold"], smallest(point, spacing))


def volume_ml(mask: np.ndarray, spacing) -> float:
    """Volume of label 1 (or True) in mL; `spacing` in mm."""
    return np.count_nonzero(reference_parts(mask)[0]) * float(np.prod(spacing)) / 1000


def lesion_table(mask: np.ndarray, prob: np.ndarray, affine: np.ndarray) -> pd.DataFrame:
    """One row a 26-connected lesion of `mask` (bool, H x W x D), largest first.

    Columns: `lesion` (1, 2, ...), `voxels`, `volume_ml`, the centroid in world mm (RAS) `x_mm y_mm z_mm`, and
    `mean_prob` and `max_prob` of `prob` (H x W x D, 0-1) over its voxels; `affine` is 4 x 4.
    """
    places, labels, count = components(mask)
    lesion, inside = labels.astype(int) - 1, prob[places].astype(float)
    sizes = np.bincount(lesion, minlength=count)
    *centres, mean_prob = (np.bincount(lesion, values, count) / sizes for values in (*places, inside))
    max_prob = np.zeros(count)
    np.maximum.at(max_prob, lesion, inside)
    x, y, z = affine[:3, :3] @ np.stack(centres) + affine[:3, 3:]
    table = pd.DataFrame(dict(voxels=sizes, volume_ml=sizes * voxel_sizes(affine).prod() / 1000,
                              x_mm=x, y_mm=y, z_mm=z, mean_prob=mean_prob, max_prob=max_prob))
    order = np.lexsort((z, y, x, -sizes))
    table = table.iloc[order].reset_index(drop=True)
    table.insert(0, "lesion", np.arange(1, count + 1))
    return table
