"""Slices as they are shown: oriented, cropped, outlined and labelled.

Volumes come in as they lie in their files, H x W x D with their affine; slices are shown as radiologists look at them:
the patient's right on the left of the image, anterior up, pixels in their true proportions.
"""

from __future__ import annotations

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from nibabel.affines import apply_affine
from nibabel.orientations import io_orientation

from .volumes import reorient

_INSIDE = dict(color="white", fontsize=8, fontweight="bold", path_effects=[withStroke(linewidth=1.5, foreground="black")])


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


def head_box(image: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns of a slice that show the head, and four around."""
    box = []
    for axis in (1, 0):
        share = bright(image).mean(axis)
        found = np.flatnonzero(share > 0.04)
        low, high = (found[0], found[-1] + 1) if len(found) else (0, len(share))
        box.append(slice(max(0, low - 4), high + 4))
    return tuple(box)


def bright(image: np.ndarray) -> np.ndarray:
    """Where a slice, or a scan, is clearly brighter than air."""
    low, high = np.percentile(image, (1, 99))
    return image > low + 0.15 * (high - low)


def window(image: np.ndarray) -> tuple[float, float]:
    """The values of a slice, or a scan, to show as black and as white; scalp fat is saturated where it would darken the brain."""
    low, high = np.percentile(image, (1, 99.7))
    head = image[bright(image)]
    return low, min(high, low + 2.1 * (np.median(head) - low)) if len(head) else high


def fullest(mask: np.ndarray) -> int:
    """The slice with most of a mask H x W x D; the middle one where it is empty."""
    area = mask.sum((0, 1))
    return int(area.argmax()) if area.any() else mask.shape[2] // 2


def tallness(image: np.ndarray, spacing) -> float:
    """Height over width of a slice of that `spacing` (mm, of rows and columns)."""
    return image.shape[0] * spacing[0] / (image.shape[1] * spacing[1])


def show(ax, image: np.ndarray, spacing, dim: float = 1.0, name: str = "") -> None:
    """A slice in grey (`window`); `dim` below 1 darkens all of it;
    `name` stands in a lower corner."""
    low, high = window(image)
    ax.imshow(image, cmap="gray", vmin=low, vmax=low + max(high - low, 1e-6) / dim, aspect=spacing[0] / spacing[1],
              interpolation="bilinear")
    ax.set_axis_off()
    ax.text(0.03, 0.02, name, ha="left", va="bottom", transform=ax.transAxes, **_INSIDE)


def outline(ax, mask: np.ndarray, colour: str, style: str = "solid") -> None:
    """The border of a mask H x W; a solid one has a dark halo."""
    if mask.any():
        padded = np.pad(mask.astype(float), 1)
        rows, columns = (np.arange(-1, n + 1) for n in mask.shape)
        halo = [withStroke(linewidth=1.8, foreground="black")] if style == "solid" else []
        lines = ax.contour(columns, rows, padded, levels=[0.5], colors=[colour], linewidths=1, linestyles=style)
        lines.set_path_effects(halo)


def enlarge(whole, panels, mask: np.ndarray, spacing) -> None:
    """Let `panels` show the part of the slice within 8 mm of a mask, and frame that part in the panel `whole`.

    The part has the slice's proportions, is at least a third of it and never beyond it; all of it where the mask is
    empty. `spacing` in mm, rows and columns; the first panel gets a scale bar."""
    shape = np.array(mask.shape)
    found = np.argwhere(mask) if mask.any() else np.array([[0, 0], shape])
    low, high = found.min(0) - 8 / np.asarray(spacing), found.max(0) + 8 / np.asarray(spacing)
    size = shape * np.clip(((high - low) / shape).max(), 1 / 3, 1)
    top, left = np.clip((low + high - size) / 2, -0.5, shape - 0.5 - size)
    whole.add_patch(Rectangle((left, top), *size[::-1], fill=False, edgecolor="white", linewidth=0.8))
    for ax in panels:
        ax.set(xlim=(left, left + size[1]), ylim=(top + size[0], top))
    _scale_bar(panels[0], spacing, 10)


def name_sides(ax, spacing) -> None:
    """R and L of the patient in the upper corners, a scale bar in a lower one; `spacing` in mm, rows and columns."""
    for x, side in ((0.03, "R"), (0.97, "L")):
        ax.text(x, 0.98, side, ha="left" if side == "R" else "right", va="top", transform=ax.transAxes, **_INSIDE)
    _scale_bar(ax, spacing, 20)


def _scale_bar(ax, spacing, bar_mm: float) -> None:
    left, right = ax.get_xlim()
    across, end = ax.get_xaxis_transform(), right - 0.04 * (right - left)
    bar, = ax.plot([end - bar_mm / spacing[1], end], [0.03, 0.03], color="white", linewidth=2, transform=across,
                   solid_capstyle="butt")
    bar.set_path_effects(_INSIDE["path_effects"])
    ax.set_xlim(left, right)
    ax.text(end, 0.05, f"{bar_mm:g} mm", ha="right", va="bottom", transform=across, **_INSIDE)


def label_row(ax, text: str) -> None:
    """`text`, upright, left of the first panel of a row."""
    ax.text(-0.04, 0.5, text, rotation=90, ha="right", va="center", multialignment="center", fontsize=8.5,
            transform=ax.transAxes)


def mask_colour(mask: np.ndarray, colour: str) -> np.ndarray:
    """An RGBA image of one colour, nearly opaque, where the mask is."""
    return np.concatenate([np.broadcast_to(to_rgb(colour), (*mask.shape, 3)), 0.9 * mask[..., None]], axis=-1)
