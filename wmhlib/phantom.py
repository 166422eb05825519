"""Synthetic FLAIR, T1 and lesion mask cohorts with the geometry, contrast and noise of the challenge's three sites.

A case is one patient of `anatomy`, computed on sub-slices of the site's grid and averaged over a slice profile, so
thin structures suffer partial volume as in a thick-slice scan. Lengths are in mm, intensities in units of normal white
matter.
"""

from __future__ import annotations

import gzip
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from .anatomy import CSF, FAT, SUB, Patient, rotation
from .atlas import template
from .cohort import find_cases
from .errors import InputError
from .workspace import stable_seed, write_atomic


@dataclass(frozen=True)
class Site:
    """A scanner: its grid and the ranges its cases are drawn from."""

    path: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    flips: tuple[int, int, int]  # direction of each array axis, 1 where it runs to right, anterior, superior
    centre: float  # MNI height of the middle slice
    thickness: tuple[float, float]  # width of the slice profile
    grey: tuple[float, float]  # grey matter on FLAIR
    fat: tuple[float, float]  # scalp fat on FLAIR
    noise: tuple[float, float]  # standard deviation
    blur: tuple[float, float]  # weight of each neighbouring pixel
    bias: float  # log range of the receive field
    defaced: float  # share of the cases


SITES = {
    "Utrecht": Site("Utrecht", (240, 240, 48), (0.96, 0.95, 3.0), (-1, 1, 1), centre=3, thickness=(2.5, 4),
                    defaced=0.1, grey=(1.12, 1.5), fat=(1.8, 3.2), noise=(0.02, 0.06), blur=(0.02, 0.16), bias=0.25),
    "Singapore": Site("Singapore", (232, 256, 48), (1.0, 1.0, 3.0), (1, 1, 1), centre=5, thickness=(2.5, 5),
                      defaced=0.1, grey=(1.04, 1.35), fat=(1.6, 2.8), noise=(0.03, 0.09), blur=(0.06, 0.22), bias=0.4),
    "GE3T": Site("Amsterdam/GE3T", (132, 256, 83), (1.2, 0.98, 3.0), (-1, -1, 1), centre=-12, thickness=(1, 3),
                 defaced=0.6, grey=(1.18, 1.6), fat=(1.5, 2.4), noise=(0.02, 0.07), blur=(0.03, 0.18), bias=0.3),
}

# Of each tissue of `anatomy`: range on FLAIR (of fat the site's own), range on T1, grain.
_FLAIR = [(0, 0), (.08, .3), (.03, .12), (.35, 1.1), (0, 0), (.4, .75), (.8, 1.4), (1, 1.9), (1.3, 2.6), (.06, .22)]
_T1 = [(0, 0), (.2, .32), (.05, .12), (.6, 1.2), (1.4, 2.1), (.45, .6), (.6, 1), (.7, 1), (.5, .7), (.2, .3)]
_GRAIN = [0, 0, 1, 1, 0.25, 1, 0.3, 0.8, 1, 0]


@dataclass(frozen=True)
class Case:
    """One synthetic case: `flair` and `t1` float32 of arbitrary positive scale, `mask` uint8 (0; 1 lesion; 2 other
    pathology), `ventricles` uint8 (1: lateral ventricles), all H x W x D, and the 4 x 4 voxel-to-world `affine` in mm."""

    flair: np.ndarray
    t1: np.ndarray
    mask: np.ndarray
    ventricles: np.ndarray
    affine: np.ndarray


def write_cohort(folder: str | Path, cases: int, seed: int, scale: float = 1.0, progress: bool = True) -> pd.DataFrame:
    """Writes `cases` synthetic cases, dealt over the sites, as the challenge lays its own out:
    `training/<site>/<id>/pre/FLAIR.nii.gz`, `pre/T1.nii.gz`, `wmh.nii.gz`, and `ventricles.nii.gz` beside it. Returns the
    table of `cohort.find_cases`.

    The same seed gives the same files, and a case does not depend on how many others there are. `scale` coarsens the
    in-plane voxels. Raises InputError for fewer than one case.
    """
    if cases < 1:
        raise InputError(f"a cohort of {cases} cases was asked for: expected at least 1")
    names, threads = list(SITES), torch.get_num_threads()
    template()

    def write(number: int) -> None:
        site, index = names[number % len(names)], number // len(names)
        case = make_case(site, stable_seed(seed, site, index), scale)
        place = Path(folder) / "training" / SITES[site].path / str(index)
        for name, data in (("pre/FLAIR", case.flair), ("pre/T1", case.t1), ("wmh", case.mask), ("ventricles", case.ventricles)):
            image = nib.Nifti1Image(data, case.affine)
            image.header.set_xyzt_units("mm")
            image.set_data_dtype(np.int16 if name.startswith("pre") else np.uint8)
            write_atomic(place / f"{name}.nii.gz", gzip.compress(image.to_bytes(), 1, mtime=0))

    # A case on each core is faster than one case on all; 4 cases at once hold about 5 GB.
    try:
        with ThreadPoolExecutor(min(threads, 4), initializer=torch.set_num_threads, initargs=(1,)) as workers:
            list(tqdm(workers.map(write, range(cases)), total=cases, desc="synthetic cases", disable=not progress))
    finally:
        torch.set_num_threads(threads)
    return find_cases(folder)


def make_case(site: str, seed: int, scale: float = 1.0) -> Case:
    """One case of `site` ("Utrecht", "Singapore" or "GE3T"); `scale` coarsens the in-plane voxels. The result depends
    on the three arguments alone."""
    if site not in SITES or not 1 <= scale <= 4:
        raise InputError(f"no synthetic case of site {site!r} at scale {scale}: expected one of {', '.join(SITES)}, "
                         "at a scale of 1 to 4")
    return Scan(SITES[site], seed, scale).acquire()


class Scan:
    """One patient in one scanner, all drawn from `seed`."""

    def __init__(self, site: Site, seed: int, scale: float):
        seed = stable_seed(site.path, seed)
        rng = np.random.default_rng(seed)
        self.site = site
        self.shape = (round(site.shape[0] / scale), round(site.shape[1] / scale), site.shape[2])
        self.spacing = tuple(d * n / m for d, n, m in zip(site.spacing, site.shape, self.shape))
        x, y, z = ((np.arange(n) - (n - 1) / 2) * d for n, d in zip(self.shape, self.spacing))
        self.columns = np.flatnonzero(abs(x) <= 94)  # the others hold air only
        offsets = ((np.arange(SUB) + 0.5) / SUB - 0.5) * rng.uniform(*site.thickness)
        axes = (x[self.columns], y, (z[:, None] + offsets).ravel())
        self.patient = Patient(axes, site.centre, rng, torch.Generator().manual_seed(seed))

    def acquire(self) -> Case:
        """The patient as the scanner sees it."""
        patient, brain, uniform = self.patient, self.patient.inner, self.patient.uniform
        grey, white = brain.brain()
        lesion, inner = brain.lesions(white, np.prod(self.spacing))
        (core, extent), labels = brain.other_pathology(), patient.head()
        core, extent, lesion = core * (grey + white), extent * (grey + white), lesion * (1 - extent)
        index, inside = labels.int(), labels[brain.box] == CSF
        grain = patient.field(3, 3, 6).mul_(0.16).add_(0.22 * patient.fine).mul_(torch.tensor(_GRAIN)[index]).exp_()

        def compose(tissue, fluid, values):
            image = torch.tensor(values)[index].mul_(grain)
            part = image[brain.box]
            part[inside] = (tissue * (1 - core) + (1 - grey - white + core) * fluid)[inside]
            return image

        values = [uniform(*r) for r in _FLAIR]
        values[FAT] = uniform(*self.site.fat)
        cortex = uniform(*self.site.grey)
        bright = max(uniform(1.5, 2.1), cortex + uniform(0.4, 0.7))
        tissue = grey * cortex * brain.grey_shades() + white * brain.white_shades()
        level = 1 + (bright - 1) * (0.85 + 0.3 * inner + 0.1 * brain.fine)
        tissue += lesion * (level * (grey + white) - tissue)
        tissue += 0.8 * extent * (bright * (grey + white) - tissue)
        flair = compose(tissue, values[CSF] + brain.fluid_shades(), values)
        values = [uniform(*r) for r in _T1]
        tissue = grey * uniform(0.66, 0.82) + white
        tissue *= 1 - uniform(0.05, 0.35) * torch.maximum(lesion, extent)
        t1 = compose(tissue, values[CSF], values)

        mask = (pool(lesion) >= 0.5).to(torch.uint8)
        mask[pool(extent) >= 0.5] = 2
        ventricles = (pool((1 - grey - white) * (brain.to_ventricles < 1)) >= 0.5).to(torch.uint8) * (mask == 0)
        keep = self.kept()
        return Case(self.finish(self.image(pool(flair), keep)), self.finish(self.image(pool(t1), keep)),
                    self.finish(self.around_brain(mask)), self.finish(self.around_brain(ventricles)), self.affine())

    def kept(self) -> torch.Tensor:
        """Voxels that are left: all, or the brain alone (skull-stripped), or without the face (defaced)."""
        patient, uniform = self.patient, self.patient.uniform
        outside = pool(patient.to_brain)
        if uniform(0, 1) < 0.15:
            return outside < 1
        if uniform(0, 1) > self.site.defaced:
            return torch.ones_like(outside, dtype=torch.bool)
        y, z = pool(patient.points[..., 1]), pool(patient.points[..., 2])
        return (y - uniform(0.2, 0.6) * (z + 20) < uniform(62, 80)) | (z > 5) | (outside < 6)

    def image(self, image: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Blur, gamma, receive field, Rician noise and an arbitrary scale, on the whole field of view."""
        patient, uniform = self.patient, self.patient.uniform
        for axis in (0, 1):
            weight = uniform(*self.site.blur)
            image = (1 - 2 * weight) * image + weight * (image.roll(1, axis) + image.roll(-1, axis))
        image = image ** uniform(0.82, 1.22)
        image *= torch.exp((pool(patient.field(90)) * uniform(0.2, 1) * self.site.bias).clamp_(-1, 1))
        sigma = uniform(*self.site.noise)
        real, imaginary = (sigma * torch.randn(self.shape, generator=patient.generator) for _ in range(2))
        margin = np.clip(np.arange(self.shape[0]) - self.columns[0], 0, len(self.columns) - 1)
        return torch.hypot(self.whole(image) + real, imaginary) * keep[margin] * patient.log_uniform(1, 2000)

    def whole(self, volume: torch.Tensor) -> torch.Tensor:
        """`volume` (columns of `self.columns`) on the site's whole field of view."""
        full = torch.zeros(self.shape, dtype=volume.dtype)
        full[self.columns] = volume
        return full

    def around_brain(self, part: torch.Tensor) -> torch.Tensor:
        """Slices of the part of the grid that holds the brain, on the whole field of view."""
        x, y, z = self.patient.inner.box
        full = torch.zeros(self.shape, dtype=part.dtype)
        full[self.columns[x], y, z.start // SUB : z.stop // SUB] = part
        return full

    def finish(self, volume: torch.Tensor) -> np.ndarray:
        """From RAS to the site's own order of voxels."""
        return volume.flip([axis for axis, sign in enumerate(self.site.flips) if sign < 0]).numpy()

    def affine(self) -> np.ndarray:
        """Voxel to world: slices tilted by a few degrees, somewhere near the middle of the magnet."""
        affine, rng = np.eye(4), self.patient.rng
        affine[:3, :3] = rotation(*rng.uniform(-4, 4, 3)) @ np.diag(np.array(self.spacing) * self.site.flips)
        affine[:3, 3] = rng.uniform(-20, 20, 3) - affine[:3, :3] @ ((np.array(self.shape) - 1) / 2)
        return affine


def pool(volume: torch.Tensor) -> torch.Tensor:
    """Sub-slices to slices."""
    first, *others = (volume[..., k::SUB] for k in range(SUB))
    return sum(others, first) / SUB
