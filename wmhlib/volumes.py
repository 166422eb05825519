"""A scan or an image as the network sees it: its head, its intensities normalised, its window; one preprocessing for training and inference.

A scan keeps its own voxels. A square window of `fov` millimetres centred on the head is taken from each of its axial slices,
and only that window is resized to the network's `canvas`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage

from . import images as pictures
from .canvas import LPS, Grid, to_canvas
from .errors import InputError
from .nifti import MAX_VOXELS, Volume, check_grid, load_mask, load_volume
from .sections import Inputs

AIR, BRIGHTEST = -5.0, 10.0  # range of the normalised intensities
_COARSE_MM = 4.0  # grid on which the head is found
_DARKER = 0.25  # of the way from air to bright tissue: tissue this much darker than air tells a z-scored scan, whose air is the brain's mean; the undershoot of a resampling is less
_AIR_PERCENT = 20  # of a scan, at least, are air
_RINGING = 0.1  # of the brightest tissue: where the darkest fifth lies this far below 0, the scan was rescaled around 0; what resampling or padding leaves there is less of the scan
_TISSUE = (0.15, 0.05)  # tissue is above this share of the brightest; the second where fat outshines the brain so far that the first finds only a shell
_SHELL_MM = 18.0  # scalp, skull and subarachnoid space below the head's surface
_MARGIN_MM = 12.0  # of brain around that inner part
_CEREBRUM_MM = 110.0  # from the vertex down
_BELOW_MM = 60.0  # of the cerebrum's lower end: cerebellum and brain stem


@dataclass(frozen=True)
class Case:
    """One scan ready for the network.

    images: float32 M x H x W x D, normalised to [AIR, BRIGHTEST] with brain tissue around 0 (an absent T1 is all 0);
    inner: bool, deeper than scalp and skull; mask: uint8 0/1/2 or None; all on the scan's own grid. Of an image: D is 1, the M channels
    are normalised as in `images`, and inner is its `field`.
    """

    volume: Volume
    images: np.ndarray
    inner: np.ndarray
    mask: np.ndarray | None
    grid: Grid


def load_case(flair: str | Path, t1: str | Path | None = None, mask: str | Path | None = None,
              inputs: Inputs | None = None) -> Case:
    """Read, check and normalise one case, of scans or, with `inputs.images`, of an image. T1 (beside FLAIR alone) and mask, where given, must lie on the scan's
    grid (else InputError)."""
    inputs = inputs or Inputs()
    if pictures.is_image(flair) != inputs.images:
        raise InputError(f"{flair} is {'an image' if pictures.is_image(flair) else 'no image'}, and inputs.modalities is {', '.join(inputs.modalities)}: "
                         "expected flair (and t1) for scans, grey or red, green and blue for images")
    if inputs.images:
        return _image_case(flair, mask, inputs)
    volume = load_volume(flair)
    grey = _with_dark_air(volume.data)
    head, inner = _head(replace(volume, data=grey))
    images = np.zeros((len(inputs.modalities), *volume.data.shape), np.float32)
    images[0] = normalise(grey, inner, flair)
    if t1 and inputs.t1_beside:
        second = load_volume(t1)
        check_grid(t1, second.image, volume)
        images[inputs.modalities.index("t1")] = normalise(_with_dark_air(second.data), inner, t1)
    labels = load_mask(mask, volume) if mask else None
    return Case(volume, images, inner, labels, _grid(volume, head, inner, inputs.fov))


def _image_case(path: str | Path, mask: str | Path | None, inputs: Inputs) -> Case:
    """An image as a case of one slice, which lies on the canvas in the middle of the smallest square around it."""
    pixels = pictures.read(path)
    grey = pixels.mean(-1)
    volume, inner = Volume(grey[..., None], nib.Nifti1Image(grey[..., None], pictures.AFFINE), Path(path)), pictures.field(grey)
    channels = pictures.normalise(pixels, inner, inputs.modalities, path)
    rows, columns = (((n - max(grey.shape)) // 2, max(grey.shape)) for n in grey.shape)
    return Case(volume, np.clip(channels, AIR, BRIGHTEST)[..., None], inner[..., None], load_mask(mask, volume) if mask else None,
                Grid(volume.data.shape, io_orientation(pictures.AFFINE), columns, rows))


def reorient(affine: np.ndarray, axes: str, *arrays: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Arrays of one grid turned so that their axes run to `axes` ("LPS", ...), and the voxel size in mm along these."""
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(axes)))
    spacing = np.empty(3)
    spacing[turn[:, 0].astype(int)] = voxel_sizes(affine)
    return tuple(apply_orientation(array, turn) for array in arrays), spacing


def normalise(data: np.ndarray, inner: np.ndarray, path: str | Path = "the scan") -> np.ndarray:
    """(data - centre) / scale, clipped to [AIR, BRIGHTEST]; centre and scale from the voxels of `inner` alone.

    They are those of the shortest interval that holds half of these voxels (the shorth, Rousseeuw & Leroy 1987, scaled to
    the standard deviation of a Gaussian): neither scalp and air outside, nor CSF and a brain full of lesions inside, move it.
    """
    values = np.sort(data[inner])
    half = len(values) // 2
    widths = values[half:] - values[: len(values) - half]
    start = int(widths.argmin()) if half else 0
    width = float(widths[start]) if half else 0.0
    if width == 0:
        raise InputError(f"{path} shows no tissue contrast inside the head ({len(values)} voxels looked at): "
                         "expected a head scan with grey values, not a mask or an empty image")
    centre = 0.5 * float(values[start] + values[start + half])
    return np.clip((data - centre) / (width / 1.349), AIR, BRIGHTEST).astype(np.float32)


def case_canvas(case: Case, size: int, places: torch.Tensor | None = None) -> torch.Tensor:
    """Every modality of `case` on the canvas: float32 M x D x size x size, or the slices `places` of it; air around the scan,
    an absent T1 all 0."""
    return torch.stack([to_canvas(image, case.grid, size, AIR if image.any() else 0.0, places) for image in case.images])


def brain_slices(case: Case) -> torch.Tensor:
    """Numbers, on the canvas, of the slices that may show brain: with tissue, and not below the cerebellum."""
    (image, inner), spacing = reorient(case.volume.affine, "LPS", case.images[0], case.inner)
    lowest = np.flatnonzero(inner.any((0, 1)))[0] - _BELOW_MM / spacing[2]
    shown = (image > 0.5 * AIR).any((0, 1)) & (np.arange(image.shape[2]) >= lowest)
    return torch.from_numpy(np.flatnonzero(shown))


def _with_dark_air(data: np.ndarray) -> np.ndarray:
    """`data` with its air made the darkest where some tissue is darker: in a scan without skull whose brain alone was z-scored, air is 0 and so is
    the brain's mean."""
    edge = np.concatenate([side.ravel() for axis in range(3) for side in (data.take(0, axis), data.take(-1, axis))])
    air, darkest = np.median(edge), data.min()
    if np.mean(edge == air) < 0.5 or darkest >= air:
        return data
    low, high = np.percentile(data[data != air], (5, 95))
    return data if air - low < _DARKER * (high - air) else np.where(data == air, 0, data - darkest)


def largest_part(mask: np.ndarray, structure: np.ndarray | None = None) -> np.ndarray:
    """The largest connected part of a boolean array (by faces, unless `structure` says how else); nothing where there is none."""
    parts, _ = ndimage.label(mask, structure)
    return parts == 1 + np.bincount(parts.flat, minlength=2)[1:].argmax()


def _head(volume: Volume) -> tuple[np.ndarray, np.ndarray]:
    """Two boolean volumes: the head with its holes filled, and the part of it that scalp and skull do not reach."""
    (data,), spacing = reorient(volume.affine, "LPS", volume.data)
    step = np.maximum(1, np.round(_COARSE_MM / spacing)).astype(int)
    coarse = ndimage.uniform_filter(data, step)[tuple(slice(min(s, n) // 2, None, s) for s, n in zip(step, data.shape))]
    air, dark, bright = np.percentile(coarse, (0, _AIR_PERCENT, 99))
    if dark > -_RINGING * bright:
        air = max(0.0, air)
    for share in _TISSUE:
        head = largest_part(coarse > air + share * (bright - air))
        if not head.any():
            raise InputError(f"{volume.path} shows no head: expected a FLAIR or T1w scan of the head")
        for z in range(head.shape[2]):
            head[..., z] = ndimage.binary_fill_holes(head[..., z])
        depth = ndimage.distance_transform_edt(head, sampling=spacing * step)
        inner = depth > min(_SHELL_MM, 0.5 * depth.max())
        vertex = np.flatnonzero(head.any((0, 1))).max()
        inner[..., : max(0, vertex - int(_CEREBRUM_MM / (spacing[2] * step[2])))] = False
        if inner.any() and depth.max() > _SHELL_MM:
            break
    index = np.ix_(*(np.minimum(np.arange(n) // s, m - 1) for n, s, m in zip(data.shape, step, head.shape)))
    back = ornt_transform(LPS, io_orientation(volume.affine))
    return apply_orientation(head[index], back), apply_orientation(inner[index], back)


def _grid(volume: Volume, head: np.ndarray, inner: np.ndarray, fov: float) -> Grid:
    """The window of `fov` mm (more where the brain is larger) around the middle of the head's upper part, without nose and neck."""
    (lps, inside), spacing = reorient(volume.affine, "LPS", head, inner)
    vertex = np.flatnonzero(lps.any((0, 1))).max()
    upper = lps[..., max(0, vertex - int(_CEREBRUM_MM / spacing[2])) :]
    spans = [[np.flatnonzero(part.any((1 - axis, 2)))[[0, -1]] for axis in (0, 1)] for part in (upper, inside)]
    brain = [(last + 1 - first) * s + 2 * _MARGIN_MM for (first, last), s in zip(spans[1], spacing)]
    lengths = [round(max(fov, *brain) / s) for s in spacing[:2]]
    if lengths[0] * lengths[1] * lps.shape[2] > MAX_VOXELS:
        raise InputError(f"{volume.path} has voxels of {' x '.join(f'{s:.3g}' for s in volume.spacing)} mm: {fov:g} mm of them, "
                         f"{lps.shape[2]} slices, do not fit into memory; resample it first")
    starts = [(int(first + last) + 1 - n) // 2 for (first, last), n in zip(spans[0], lengths)]
    return Grid(volume.data.shape, io_orientation(volume.affine), (starts[0], lengths[0]), (starts[1], lengths[1]))
