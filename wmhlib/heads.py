"""The brain of one person, from a T1w scan of the head: what a synthetic patient is warped from in place of nilearn's MNI152 maps.

Those are the mean of many brains, whose folds are shallower and smoother than anybody's. A network that has seen no others takes folds for
lesions. Lengths are in mm, positions in MNI coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nibabel.affines import apply_affine, voxel_sizes
from nilearn import datasets
from scipy import ndimage, signal

from .errors import InputError
from .sections import Inputs
from .threads import one_thread
from .volumes import largest_part, load_case

HEAD_ORIGIN, _HEAD_SHAPE = (-112, -150, -180), (226, 280, 312)  # mm
_SIGMAS = (8.0, 4.0, 2.0)  # mm, of the blur that the registration begins and ends with
_STEPS, _EVERY = 120, 4  # of the registration at each of them; mm between the points it looks at
_ALIKE = 0.75  # correlation of the white matter of two heads that lie on each other
_PURE = 0.12  # of its brightness, by which white matter differs from its mode
_FIELD = 25.0  # mm, of the receive field


@dataclass(frozen=True)
class Brain:
    """Fractions of `grey` and `white` matter (float32, 0 to 1) and the brain with the CSF in it (`inside`, bool), X x Y x Z voxels of 1 mm in
    RAS order, the first at `origin`; and of one person the T1w brightness of the whole head in units of white matter (`head`, float32, on a larger
    grid of 1 mm from `HEAD_ORIGIN` on, -1 where the scan ends)."""

    grey: np.ndarray
    white: np.ndarray
    inside: np.ndarray
    origin: tuple[int, int, int]
    head: np.ndarray | None = None


def mni152() -> Brain:
    """The mean of 152 young adults, as nilearn brings it."""
    images = [load(resolution=1) for load in (datasets.load_mni152_gm_template, datasets.load_mni152_wm_template, datasets.load_mni152_brain_mask)]
    grey, white, inside = (np.asarray(image.dataobj, np.float32) for image in images)
    return Brain(grey, white, inside > 0, tuple(int(o) for o in images[0].affine[:3, 3]))


def brain_of(path: str | Path) -> Brain:
    """The brain of the T1w scan `path` of a healthy adult, with skull, in voxels of up to 2 mm, turned and stretched (12 parameters) onto the MNI152's white
    matter and on its grid. Raises InputError for a scan that cannot be read or does not come to lie on it."""
    case, mean = load_case(path, inputs=Inputs(modalities=("t1",))), mni152()
    image, affine = np.maximum(case.volume.data, 0), case.volume.affine
    level = _white_level(image[case.inner])
    moving = largest_part(ndimage.binary_opening(case.inner & (abs(image / level - 1) < _PURE)))
    to_scan, alike = np.eye(4), 0.0
    if moving.any():
        with one_thread():
            to_scan, alike = _register(moving.astype(np.float32), affine, (mean.white > 0.9).astype(np.float32), mean.origin)
    if not alike >= _ALIKE:
        raise InputError(f"the white matter of {path} does not come to lie on the MNI152's (correlation {alike:.2f}): expected a T1w scan of a "
                         "healthy adult's whole head")
    to_voxel = np.linalg.inv(affine) @ to_scan

    def resample(origin, shape, outside):
        corner = to_voxel[:3, 3] + to_voxel[:3, :3] @ origin
        return ndimage.affine_transform(image / level, to_voxel[:3, :3], corner, shape, order=1, cval=outside)

    head, image = resample(HEAD_ORIGIN, _HEAD_SHAPE, -1.0), resample(mean.origin, mean.grey.shape, 0.0)

    inner = ndimage.binary_erosion(mean.inside, iterations=4)
    pure = (abs(image - 1) < _PURE) & (mean.white > 0.7) & inner
    blurred = [ndimage.gaussian_filter(a.astype(np.float32), _FIELD) + 1e-3 for a in (image * pure, pure)]
    image = image * blurred[1] / blurred[0]
    cortex = float(np.median(image[inner & (mean.grey > 0.8) & (image > 0.45) & (image < 0.9)]))
    fluid = float(np.percentile(image[inner & (mean.grey + mean.white < 0.15)], 15))
    white, matter = (np.clip((image - low - 0.1 * (high - low)) / (0.8 * (high - low)), 0, 1) for low, high in ((cortex, 1), (fluid, cortex)))

    room = (matter > 0.5) & (image < 1.3) & ndimage.binary_dilation(mean.inside, iterations=4)
    core = largest_part(ndimage.binary_erosion(room, iterations=2))  # without the dura
    room &= ndimage.binary_dilation(core, iterations=3)
    inside = ndimage.binary_fill_holes(ndimage.binary_closing(np.pad(room, 8), iterations=6)[8:-8, 8:-8, 8:-8])
    rim = ndimage.binary_dilation(room)
    return Brain((matter - white) * rim, white * rim, inside, mean.origin, head)


def _white_level(values: np.ndarray) -> float:
    """The brightest mode of the brain's intensities."""
    top = np.percentile(values, 95)
    counts, edges = np.histogram(values[values > 0.3 * top], 80)
    counts = ndimage.gaussian_filter1d(counts.astype(float), 2)
    modes, _ = signal.find_peaks(counts, height=0.2 * counts.max())
    return float(edges[modes[-1] if len(modes) else counts.argmax()] + edges[1] / 2 - edges[0] / 2)


def _register(moving: np.ndarray, affine: np.ndarray, fixed: np.ndarray, origin: tuple[int, int, int]) -> tuple[np.ndarray, float]:
    """The 4 x 4 matrix that takes positions on the grid of `fixed` (1 mm) to those in the scan `moving` of that `affine`, by the correlation of the
    two, blurred less and less; and that correlation in the end."""
    spacing = voxel_sizes(affine)
    places = np.stack(np.meshgrid(*(np.arange(0, n, _EVERY) for n in fixed.shape), indexing="ij"), -1).reshape(-1, 3)
    points, inverse = (torch.tensor(v, dtype=torch.float32) for v in (places + origin, np.linalg.inv(affine)))
    there = torch.tensor(apply_affine(affine, ndimage.center_of_mass(moving)), dtype=torch.float32)
    here = torch.tensor(np.array(ndimage.center_of_mass(fixed)) + origin, dtype=torch.float32)
    turn, shift = torch.eye(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    for sigma in _SIGMAS:
        target = torch.from_numpy(ndimage.gaussian_filter(fixed, sigma)[tuple(places.T)])
        source = torch.from_numpy(ndimage.gaussian_filter(moving, sigma / spacing))
        optimiser = torch.optim.Adam([{"params": [turn], "lr": 0.01}, {"params": [shift], "lr": 0.5}])
        for _ in range(_STEPS):
            voxels = ((points - here) @ turn.T + there + shift) @ inverse[:3, :3].T + inverse[:3, 3]
            grid = (voxels * (2 / (torch.tensor(source.shape) - 1)) - 1).flip(-1)
            values = F.grid_sample(source[None, None], grid[None, None, None], align_corners=True).flatten()
            alike = torch.corrcoef(torch.stack([values, target]))[0, 1]
            optimiser.zero_grad()
            (-alike).backward()
            optimiser.step()
    matrix, turn = np.eye(4), turn.detach()
    matrix[:3, :3], matrix[:3, 3] = turn.numpy(), (there + shift.detach() - turn @ here).numpy()
    return matrix, alike.item()
