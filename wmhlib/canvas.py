"""The network's canvas: square axial slices cut from a scan, and back onto the scan's own grid.

Slices lie in LPS order (rows run to posterior, columns to the patient's left, as radiologists look at them). A window of the
scan, told by its `Grid`, is resized to the canvas; `from_canvas` undoes exactly this.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from nibabel.orientations import apply_orientation, axcodes2ornt, ornt_transform

LPS = axcodes2ornt(("L", "P", "S"))


@dataclass(frozen=True)
class Grid:
    """Where the canvas lies on the scan: orientation and, in LPS voxels, the window (start, length) of columns and rows."""

    shape: tuple[int, int, int]
    orientation: np.ndarray
    columns: tuple[int, int]
    rows: tuple[int, int]

    @property
    def axis(self) -> int:
        """The one of the array along which axial slices follow each other."""
        return int(np.flatnonzero(self.orientation[:, 0] == 2)[0])

    @property
    def depth(self) -> int:
        """Axial slices."""
        return self.shape[self.axis]


def to_canvas(array: np.ndarray, grid: Grid, size: int, fill: float = 0.0, places: torch.Tensor | None = None) -> torch.Tensor:
    """H x W x D on the scan's grid -> float32 D x size x size; `fill` outside the scan. With `places` only these slices."""
    lps = apply_orientation(array, ornt_transform(grid.orientation, LPS))
    lps = lps if places is None else lps[..., places.numpy()]
    window = torch.full((lps.shape[2], grid.rows[1], grid.columns[1]), fill)
    (x0, x1, cx), (y0, y1, cy) = (_overlap(w, n) for w, n in zip((grid.columns, grid.rows), lps.shape))
    window[:, cy : cy + y1 - y0, cx : cx + x1 - x0] = torch.from_numpy(
        np.ascontiguousarray(lps[x0:x1, y0:y1].transpose(2, 1, 0), dtype=np.float32))
    return F.interpolate(window[:, None], (size, size), mode="bilinear", antialias=True)[:, 0]


def neighbours(places: torch.Tensor | int, context: int, depth: int) -> torch.Tensor:
    """The numbers (... x (2 context + 1)) of the slices `places` (0 to depth - 1) and of `context` more on each side, in order; the outermost
    repeated at the ends."""
    return (torch.as_tensor(places)[..., None] + torch.arange(-context, context + 1)).clamp(0, depth - 1)


def mask_canvas(mask: np.ndarray, grid: Grid, size: int) -> torch.Tensor:
    """Boolean H x W x D -> boolean D x size x size; every voxel of the mask in the window keeps a pixel, however small."""
    canvas = to_canvas(mask, grid, size) > 0.5
    x, y, z = np.nonzero(apply_orientation(mask, ornt_transform(grid.orientation, LPS)))
    columns, rows = ((2 * (v - start) + 1) * size // (2 * n) for v, (start, n) in ((x, grid.columns), (y, grid.rows)))
    seen = (columns >= 0) & (columns < size) & (rows >= 0) & (rows < size)
    canvas[z[seen], rows[seen], columns[seen]] = True
    return canvas


def from_canvas(canvas: torch.Tensor, grid: Grid, places: torch.Tensor | None = None, out: np.ndarray | None = None) -> np.ndarray:
    """D x size x size -> float32 H x W x D on the scan's own grid and orientation, 0 outside the window. With `places` the
    canvas holds these slices only, which are written into `out`."""
    out = np.zeros(grid.shape, np.float32) if out is None else out
    window = F.interpolate(canvas[:, None].float().cpu(), (grid.rows[1], grid.columns[1]), mode="bilinear", antialias=True)
    lps = apply_orientation(out, ornt_transform(grid.orientation, LPS))  # a view
    (x0, x1, cx), (y0, y1, cy) = (_overlap(w, n) for w, n in zip((grid.columns, grid.rows), lps.shape))
    part = window[:, 0, cy : cy + y1 - y0, cx : cx + x1 - x0].numpy().transpose(2, 1, 0)
    lps[x0:x1, y0:y1, slice(None) if places is None else places.numpy()] = part
    return out


def _overlap(window: tuple[int, int], size: int) -> tuple[int, int, int]:
    """Start and stop in the scan, and start in the window, of what a window (start, length) shares with `size` voxels."""
    start, stop = max(0, window[0]), min(size, window[0] + window[1])
    return start, max(start, stop), start - window[0]
