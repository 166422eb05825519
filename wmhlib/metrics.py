"""Scores of a mask against its reference: the WMH challenge's five, volumes, components and lesions.

Masks are H x W x D with the slices along the last axis; spacing is (mm, mm, mm) in that order. References hold
0 background, 1 lesion, 2 other pathology, which counts neither for nor against.
"""

from __future__ import annotations

import cc3d
import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.spatial import cKDTree

from .errors import InputError

SCORES = ("dsc", "hd95", "avd", "recall", "f1")
_IN_PLANE = np.ones((3, 3, 1), bool)


def reference_parts(reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lesion and other pathology of a reference of any dtype: where it is in [0.5, 1.5] and in [1.5, 2.5] (bool)."""
    reference = np.asarray(reference)
    if reference.dtype == bool:
        return reference, np.zeros_like(reference)
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
    result = (result >= 0.5) & ~ignored
    size, result_size = int(lesion.sum()), int(result.sum())
    both = lesion & result
    dsc = 2 * int(both.sum()) / (size + result_size) if size + result_size else np.nan
    avd = 100 * abs(size - result_size) / size if size else np.nan
    recall, precision = _share_hit(lesion, both), _share_hit(result, both)
    f1 = 2 * recall * precision / (recall + precision) if recall + precision else 0.0
    return dict(dsc=dsc, hd95=_hd95(lesion, result, spacing), avd=avd, recall=recall, f1=f1)


def _share_hit(mask: np.ndarray, both: np.ndarray) -> float:
    """Share of the components of `mask` with a voxel in `both`; 1 where there is none to hit."""
    labels, count = label_components(mask)
    return len(np.unique(labels[both])) / count if count else 1.0


def _hd95(a: np.ndarray, b: np.ndarray, spacing: np.ndarray) -> float:
    """95th percentile of the distances between in-plane borders, the larger of both ways, mm; NaN without borders."""
    # Outside the image counts as foreground: a lesion cut by the image's edge has no border there.
    borders = [m & ~ndimage.binary_erosion(m, _IN_PLANE, border_value=1) for m in (a, b)]
    points = [np.argwhere(border) * spacing for border in borders]
    if not all(map(len, points)):
        return np.nan
    here, there = points
    ways = (cKDTree(there).query(here)[0], cKDTree(here).query(there)[0])
    return float(max(np.percentile(distances, 95) for distances in ways))


def label_components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Labels 1..n of the 26-connected components of a boolean mask, 0 elsewhere; and n."""
    return cc3d.connected_components(np.asarray(mask, bool), connectivity=26, return_N=True)


def filter_components(mask: np.ndarray, min_voxels: int) -> np.ndarray:
    """A boolean mask without its 26-connected components of fewer than `min_voxels` voxels."""
    labels, _ = label_components(mask)
    keep = np.bincount(labels.ravel()) >= min_voxels
    keep[0] = False
    return keep[labels]


def smallest(point: dict, spacing) -> int:
    """The fewest voxels a component needs under the operating point `point`: its `min_voxels`, or as many as fill its
    `min_mm3` (0 unless given) on a grid of `spacing` (mm), whichever is more."""
    return max(point["min_voxels"], int(np.ceil(point.get("min_mm3", 0) / np.prod(spacing) - 1e-6)))


def volume_ml(mask: np.ndarray, spacing) -> float:
    """Volume of label 1 (or True) in mL; `spacing` in mm."""
    return int(reference_parts(mask)[0].sum()) * float(np.prod(spacing)) / 1000


def lesion_table(mask: np.ndarray, prob: np.ndarray, affine: np.ndarray) -> pd.DataFrame:
    """One row a 26-connected lesion of `mask` (bool, H x W x D), largest first.

    Columns: `lesion` (1, 2, ...), `voxels`, `volume_ml`, the centroid in world mm (RAS) `x_mm y_mm z_mm`, and
    `mean_prob` and `max_prob` of `prob` (H x W x D, 0-1) over its voxels; `affine` is 4 x 4.
    """
    labels, count = label_components(mask)
    places = np.nonzero(labels)
    lesion, inside = labels[places].astype(int) - 1, prob[places].astype(float)
    voxels = np.bincount(lesion, minlength=count)
    *centres, mean_prob = (np.bincount(lesion, values, count) / voxels for values in (*places, inside))
    max_prob = np.zeros(count)
    np.maximum.at(max_prob, lesion, inside)
    x, y, z = affine[:3, :3] @ np.stack(centres) + affine[:3, 3:]
    table = pd.DataFrame(dict(voxels=voxels, volume_ml=voxels * abs(np.linalg.det(affine[:3, :3])) / 1000,
                              x_mm=x, y_mm=y, z_mm=z, mean_prob=mean_prob, max_prob=max_prob))
    order = np.lexsort((z, y, x, -voxels))
    table = table.iloc[order].reset_index(drop=True)
    table.insert(0, "lesion", np.arange(1, count + 1))
    return table
