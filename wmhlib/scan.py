"""One synthetic patient in one scanner: the geometry, contrast and noise of the challenge's three sites.

The patient of `anatomy` is computed on sub-slices of the scanner's grid and averaged over a slice profile, so thin structures
suffer partial volume as in a thick-slice scan. Lengths are in mm, intensities in units of normal white matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .anatomy import CSF, FAT, Patient, rotation
from .seeds import stable_seed


@dataclass(frozen=True)
class Site:
    """A scanner: its grid and the ranges its cases are drawn from."""

    path: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    flips: tuple[int, int, int]  # direction of each array axis, 1 where it runs to right, anterior, superior
    centre: float  # MNI height of the middle slice
    thickness: tuple[float, float]  # width of the slice profile
    grey: tuple[float, float]  # grey matter on FLAIR, on T1w where that is the main contrast (of strokes)
    fat: tuple[float, float]  # scalp fat, likewise
    noise: tuple[float, float]  # standard deviation
    blur: tuple[float, float]  # weight of each neighbouring pixel
    bias: float  # log range of the receive field
    defaced: float  # share of the cases
    sub: int = 2  # sub-slices averaged into a slice
    burden: tuple[float, float] = (0.5, 60)  # of lesions, mL
    softness: tuple[float, float] = (0.04, 0.1)  # of their edges
    folds: float = 1.0  # how far the folds of a brain are moved, times the usual


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
T1 = [(0, 0), (.2, .32), (.05, .12), (.6, 1.2), (1.4, 2.1), (.45, .6), (.6, 1), (.7, 1), (.5, .7), (.2, .3)]
_GRAIN = [0, 0, 1, 1, 0.25, 1, 0.3, 0.8, 1, 0]


@dataclass(frozen=True)
class Acquisition:
    """One synthetic case: `flair` and `t1` float32 of arbitrary positive scale, `mask` uint8 (0; 1 lesion; 2 other
    pathology), `ventricles` uint8 (1: lateral ventricles), all H x W x D, and the 4 x 4 voxel-to-world `affine` in mm.
    Those of `scanners` have no T1, and a map of tissues."""

    flair: np.ndarray
    t1: np.ndarray | None
    mask: np.ndarray
    ventricles: np.ndarray
    affine: np.ndarray
    tissue: np.ndarray | None = None


@dataclass(frozen=True)
class Anatomy:
    """What a scan is composed of: head tissues (`labels`, uint8, of the whole grid) with their `grain`, and of the part of it that
    holds the brain fractions of `grey`, `white`, `lesion` (`depth`: how deep inside, below 0 outside), and of an infarct's `core` and `extent`."""

    labels: torch.Tensor
    grain: torch.Tensor
    inside: torch.Tensor
    grey: torch.Tensor
    white: torch.Tensor
    lesion: torch.Tensor
    depth: torch.Tensor
    core: torch.Tensor
    extent: torch.Tensor


class Scan:
    """One patient in one scanner, all drawn from `seed`."""

    def __init__(self, site: Site, seed: int, scale: float, head: str = ""):
        seed = stable_seed(site.path, seed)
        rng = np.random.default_rng(seed)
        self.site = site
        self.shape = (round(site.shape[0] / scale), round(site.shape[1] / scale), site.shape[2])
        self.spacing = tuple(d * n / m for d, n, m in zip(site.spacing, site.shape, self.shape))
        x, y, z = ((np.arange(n) - (n - 1) / 2) * d for n, d in zip(self.shape, self.spacing))
        self.columns = np.flatnonzero(abs(x) <= 94)  # the others hold air only
        offsets = ((np.arange(site.sub) + 0.5) / site.sub - 0.5) * rng.uniform(*site.thickness)
        axes = (x[self.columns], y, (z[:, None] + offsets).ravel())
        self.patient = Patient(axes, site.centre, rng, torch.Generator().manual_seed(seed), site.sub, site.burden, site.softness, site.folds, head)

    def acquire(self) -> Acquisition:
        """The patient as the scanner sees it."""
        anatomy = self.anatomy()
        flair = self.flair(anatomy)
        t1 = self.t1(anatomy)
        mask = (self.pool(anatomy.lesion) >= 0.5).to(torch.uint8)
        mask[self.pool(anatomy.extent) >= 0.5] = 2
        keep = self.kept()
        return Acquisition(self.finish(self.image(self.pool(flair), keep)), self.finish(self.image(self.pool(t1), keep)),
                           self.finish(self.around_brain(mask)), self.finish(self.around_brain(self.ventricles(anatomy, mask))), self.affine())

    def anatomy(self) -> Anatomy:
        patient, brain = self.patient, self.patient.inner
        grey, white = brain.brain()
        lesion, depth = brain.lesions(white, np.prod(self.spacing))
        (core, extent), labels = brain.other_pathology(), patient.head()
        core, extent, lesion = core * (grey + white), extent * (grey + white), lesion * (1 - extent)
        return Anatomy(labels, self.grain(labels), labels[brain.box] == CSF, grey, white, lesion, depth, core, extent)

    def ventricles(self, anatomy: Anatomy, mask: torch.Tensor) -> torch.Tensor:
        """Where slices show the lateral ventricles (uint8) and `mask` nothing."""
        fluid = (1 - anatomy.grey - anatomy.white) * (self.patient.inner.to_ventricles < 1)
        return (self.pool(fluid) >= 0.5).to(torch.uint8) * (mask == 0)

    def grain(self, labels: torch.Tensor) -> torch.Tensor:
        """Texture of the head's tissues."""
        return self.patient.field(3, 3, 6).mul_(0.16).add_(0.22 * self.patient.fine).mul_(torch.tensor(_GRAIN)[labels.int()]).exp_()

    def flair(self, anatomy: Anatomy) -> torch.Tensor:
        """Brightness of every sub-slice."""
        brain, uniform = self.patient.inner, self.patient.uniform
        values = [uniform(*r) for r in _FLAIR]
        values[FAT] = uniform(*self.site.fat)
        cortex = uniform(*self.site.grey)
        bright = max(uniform(1.5, 2.1), cortex + uniform(0.4, 0.7))
        brains = anatomy.grey + anatomy.white
        tissue = anatomy.grey * cortex * brain.grey_shades() + anatomy.white * brain.white_shades()
        level = 1 + (bright - 1) * (0.85 + 0.3 * anatomy.depth.clamp(min=0) + 0.1 * brain.fine)
        tissue += anatomy.lesion * (level * brains - tissue)
        tissue += 0.8 * anatomy.extent * (bright * brains - tissue)
        return self.compose(anatomy, tissue, values[CSF] + brain.fluid_shades(), values)

    def t1(self, anatomy: Anatomy) -> torch.Tensor:
        uniform = self.patient.uniform
        values = [uniform(*r) for r in T1]
        tissue = anatomy.grey * uniform(0.66, 0.82) + anatomy.white
        tissue *= 1 - uniform(0.05, 0.35) * torch.maximum(anatomy.lesion, anatomy.extent)
        return self.compose(anatomy, tissue, values[CSF], values)

    def compose(self, anatomy: Anatomy, tissue: torch.Tensor, fluid: torch.Tensor | float, values: list[float]) -> torch.Tensor:
        """The head in the brightness `values` of its tissues, in it the brain's `tissue` and its `fluid`."""
        image = torch.tensor(values)[anatomy.labels.int()].mul_(anatomy.grain)
        part, inside = image[self.patient.inner.box], anatomy.inside
        part[inside] = (tissue * (1 - anatomy.core) + (1 - anatomy.grey - anatomy.white + anatomy.core) * fluid)[inside]
        return image

    def kept(self) -> torch.Tensor:
        """Voxels that are left: all, or the brain alone (skull-stripped), or without the face (defaced)."""
        patient, uniform = self.patient, self.patient.uniform
        outside = self.pool(patient.to_brain)
        if uniform(0, 1) < 0.15:
            return outside < 1
        if uniform(0, 1) > self.site.defaced:
            return torch.ones_like(outside, dtype=torch.bool)
        return self.without_face(outside, uniform)

    def without_face(self, outside: torch.Tensor, uniform: Callable[[float, float], float]) -> torch.Tensor:
        """Voxels that defacing leaves; `outside`: mm to the brain."""
        y, z = (self.pool(self.patient.points[..., axis]) for axis in (1, 2))
        return (y - uniform(0.2, 0.6) * (z + 20) < uniform(62, 80)) | (z > 5) | (outside < 6)

    def image(self, image: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Blur, gamma, receive field, Rician noise and an arbitrary scale, on the whole field of view."""
        patient, uniform = self.patient, self.patient.uniform
        for axis in (0, 1):
            weight = uniform(*self.site.blur)
            image = (1 - 2 * weight) * image + weight * (image.roll(1, axis) + image.roll(-1, axis))
        image = image ** uniform(0.82, 1.22)
        image *= torch.exp((self.pool(patient.field(90)) * uniform(0.2, 1) * self.site.bias).clamp_(-1, 1))
        sigma = uniform(*self.site.noise)
        real, imaginary = (sigma * torch.randn(self.shape, generator=patient.generator) for _ in range(2))
        return torch.hypot(self.whole(image) + real, imaginary) * self.over_air(keep) * patient.log_uniform(1, 2000)

    def whole(self, volume: torch.Tensor) -> torch.Tensor:
        """`volume` (columns of `self.columns`) on the site's whole field of view."""
        full = torch.zeros(self.shape, dtype=volume.dtype)
        full[self.columns] = volume
        return full

    def around_brain(self, part: torch.Tensor) -> torch.Tensor:
        """Slices of the part of the grid that holds the brain, on the whole field of view."""
        columns = torch.zeros(len(self.columns), *self.shape[1:], dtype=part.dtype)
        columns[self.slices()] = part
        return self.whole(columns)

    def slices(self) -> tuple[slice, slice, slice]:
        """Columns, rows and slices of the part of the grid that holds the brain."""
        x, y, z = self.patient.inner.box
        return x, y, slice(z.start // self.site.sub, z.stop // self.site.sub)

    def over_air(self, keep: torch.Tensor) -> torch.Tensor:
        """`keep` on the whole field of view, its outermost columns repeated."""
        return keep[np.clip(np.arange(self.shape[0]) - self.columns[0], 0, len(self.columns) - 1)]

    def finish(self, volume: torch.Tensor) -> np.ndarray:
        """From RAS to the site's own order of voxels."""
        return volume.flip([axis for axis, sign in enumerate(self.site.flips) if sign < 0]).numpy()

    def affine(self) -> np.ndarray:
        """Voxel to world: slices tilted by a few degrees, somewhere near the middle of the magnet."""
        affine, rng = np.eye(4), self.patient.rng
        affine[:3, :3] = rotation(*rng.uniform(-4, 4, 3)) @ np.diag(np.array(self.spacing) * self.site.flips)
        affine[:3, 3] = rng.uniform(-20, 20, 3) - affine[:3, :3] @ ((np.array(self.shape) - 1) / 2)
        return affine

    def pool(self, volume: torch.Tensor) -> torch.Tensor:
        """Sub-slices to slices."""
        first, *others = (volume[..., k :: self.site.sub] for k in range(self.site.sub))
        return sum(others, first) / self.site.sub
