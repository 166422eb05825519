"""Slices as they are shown: oriented, cropped, outlined and labelled.

Volumes come in as they lie in their files, H x W x D with their affine; slices are shown as radiologists look at them:
the patient's right on the left of the image, anterior up, pixels in their true proportions.
"""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patheffects import withStroke
from nibabel.affines import apply_affine
from nibabel.orientations import io_orientation

from .volumes import reorient


def to_display(affine: np.ndarray, *volumes: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The volumes with rows running to posterior, columns to the patient's left, slices to superior; and the voxel size
    in mm along these three axes."""
    return reorient(affine, "PLS", *volumes)


def height_mm(affine: np.ndarray, shape, z: int) -> float:
    """Height in the scan's world of the middle of the displayed slice `z`."""
    native = io_orientation(affine)
    axis = int(np.flatnonzero(native[:, 0] == 2)[0])
    middle = (np.asarray(shape) - 1) / 2
    middle[axis] = z if native[axis, 1] > 0 else shape[axis] - 1 - z
    return float(apply_affine(affine, middle)[2])


def head_box(image: np.ndarray, margin: int = 4) -> tuple[slice, slice]:
    """The rows and columns of a slice that show the head."""
    box = []
    for axis in (1, 0):
        share = _bright(image).mean(axis)
        found = np.flatnonzero(share > 0.04)
        low, high = (found[0], found[-1] + 1) if len(found) else (0, len(share))
        box.append(slice(max(0, low - margin), high + margin))
    return tuple(box)


def _bright(image: np.ndarray) -> np.ndarray:
    """Where a slice is clearly brighter than air."""
    low, high = np.percentile(image, (1, 99))
    return image > low + 0.15 * (high - low)


def show(ax, image: np.ndarray, spacing, dim: float = 1.0) -> None:
    """A FLAIR slice in grey, scalp fat saturated where it would darken the brain; `dim` below 1 darkens all of it."""
    low, high = np.percentile(image, (1, 99.7))
    bright = _bright(image)
    if bright.any():
        high = min(high, low + 2.1 * (np.median(image[bright]) - low))
    ax.imshow(image, cmap="gray", vmin=low, vmax=low + max(high - low, 1e-6) / dim, aspect=spacing[0] / spacing[1],
              interpolation="bilinear")
    ax.set_axis_off()


def outline(ax, mask: np.ndarray, colour: str, style: str = "solid") -> None:
    if mask.any():
        padded = np.pad(mask.astype(float), 1)
        rows, columns = (np.arange(-1, n + 1) for n in mask.shape)
        halo = [withStroke(linewidth=1.8, foreground="black")] if style == "solid" else []
        lines = ax.contour(columns, rows, padded, levels=[0.5], colors=[colour], linewidths=1, linestyles=style)
        lines.set_path_effects(halo)


def name_sides(ax, spacing, shape, bar_mm: float = 20.0) -> None:
    """R and L of the patient, and a scale bar, on a slice of `shape`."""
    text = dict(color="white", fontsize=8, fontweight="bold", va="top", transform=ax.transAxes)
    ax.text(0.03, 0.98, "R", ha="left", **text)
    ax.text(0.97, 0.98, "L", ha="right", **text)
    length = bar_mm / spacing[1]
    right, bottom = shape[1] * 0.96, shape[0] * 0.97
    ax.plot([right - length, right], [bottom, bottom], color="white", linewidth=2, solid_capstyle="butt")
    ax.text(right, bottom - 0.015 * shape[0], f"{bar_mm:g} mm", color="white", fontsize=7, ha="right", va="bottom")


def label_row(ax, text: str) -> None:
    ax.text(-0.04, 0.5, text, rotation=90, ha="right", va="center", multialignment="center", fontsize=8.5,
            transform=ax.transAxes)


def mask_colour(mask: np.ndarray, colour: str, alpha: float = 0.9) -> np.ndarray:
    """An RGBA image of one colour where the mask is."""
    return np.concatenate([np.broadcast_to(to_rgb(colour), (*mask.shape, 3)), alpha * mask[..., None]], axis=-1)
