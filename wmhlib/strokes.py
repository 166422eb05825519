"""Synthetic T1w heads with chronic strokes, for a demo and for tests of volumes: the patients of `anatomy`, some months after.

An infarct is dark on T1w: part of it has become a cavity that CSF fills, the rest, its rim above all, is gliotic. Three kinds are made:
territorial (a wedge of an artery's territory, from the cortex towards the ventricle, which it widens), cortical (of a gyrus or two) and lacunar
(3 to 15 mm, of deep grey and white matter). Beside them lie what looks alike and is none: enlarged perivascular spaces, dark spots of white matter and
wide sulci. Lengths are in mm, positions in MNI coordinates, brightness relative to normal white matter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from .anatomy import CSF, FAT
from .scan import T1, Acquisition, Anatomy, Scan, Site
from .volumes import largest_part

SITES = {
    "R001": Site("R001", (192, 224, 176), (1.0, 1.0, 1.0), (1, 1, 1), centre=8, thickness=(0, 0), grey=(0.6, 0.72), fat=(1.4, 2.1),
                 noise=(0.01, 0.03), blur=(0.0, 0.06), bias=0.15, defaced=0.8, sub=1, burden=(0.1, 30)),
    "R002": Site("R002", (180, 236, 176), (1.0, 1.0, 1.0), (-1, -1, 1), centre=8, thickness=(0, 0), grey=(0.68, 0.8), fat=(1.2, 1.8),
                 noise=(0.02, 0.05), blur=(0.04, 0.16), bias=0.35, defaced=0.5, sub=1, burden=(0.1, 30)),
    "R003": Site("R003", (176, 224, 144), (1.05, 1.0, 1.25), (-1, 1, 1), centre=6, thickness=(0, 0), grey=(0.64, 0.78), fat=(1.5, 2.3),
                 noise=(0.02, 0.06), blur=(0.02, 0.12), bias=0.25, defaced=0.8, sub=1, burden=(0.1, 30)),
}
# Of each artery places in its territory, on the right: what is nearer to them than to those of the others belongs to it.
_ARTERIES = {
    "middle": ((50, -5, 10), (45, 28, 12), (54, -40, 18), (44, -58, 32), (48, -8, -20), (38, 12, 42), (44, -22, 45), (26, 0, 6), (38, 30, 28)),
    "anterior": ((6, 54, 2), (8, 38, 34), (8, 6, 58), (8, -24, 62), (7, -46, 44), (12, 60, 20)),
    "posterior": ((12, -84, 4), (26, -62, -14), (10, -62, 8), (30, -32, -20), (10, -20, 4), (20, -90, 18)),
}
_CALIBRE = (0.72, 0.12, 0.16)  # share of the territorial infarcts that each has
_DEEP = ((24, 2, 4), (27, -8, 2), (13, -18, 8), (20, -6, 12), (24, -4, 26), (26, -28, 28), (24, 24, 18), (5, -28, -30))  # where lacunes lie
_KINDS = {"territorial": (0.45, 3.0, 200.0), "cortical": (0.25, 0.2, 8.0), "lacunar": (0.3, 0.05, 1.5)}  # share; least and most mL


@dataclass(frozen=True)
class Stroke:
    """One infarct: where it is (bool, in the part of the grid that holds the brain), the share of CSF in it, and how much
    darker its tissue is, as a share."""

    mask: np.ndarray
    cavity: Tensor
    dark: Tensor


class StrokeScan(Scan):
    """One patient with strokes in one scanner, all drawn from `seed`; `scale` coarsens the voxels along all axes."""

    def __init__(self, site: Site, seed: int, scale: float):
        shape = tuple(round(n / scale) for n in site.shape)
        super().__init__(replace(site, shape=shape, spacing=tuple(d * n / m for d, n, m in zip(site.spacing, site.shape, shape))), seed, 1.0)
        self.voxel = float(np.prod(self.spacing))  # mm3

    def acquire(self) -> Acquisition:
        """A T1w scan (`flair`), its lesions and lateral ventricles."""
        patient, brain, uniform = self.patient, self.patient.inner, self.patient.uniform
        grey, white = brain.brain()
        spots, _ = brain.lesions(white, self.voxel)
        keep = self.atrophy()
        mask, cavity, dark, lost = np.zeros(grey.shape, bool), self.perivascular(), uniform(0.05, 0.35) * spots, torch.zeros_like(grey)
        for kind, ml in self.kinds():
            stroke, widened = self.infarct(kind, ml, grey, white)
            mask, lost = mask | stroke.mask, torch.maximum(lost, widened)
            cavity, dark = torch.maximum(cavity, stroke.cavity), torch.maximum(dark, stroke.dark)
        keep *= 1 - torch.sigmoid((lost - brain.to_ventricles) / 0.5) * (lost > 0.1)
        mask &= (brain.to_ventricles > lost).numpy()
        grey, white, labels = grey * keep, white * keep, patient.head()
        ventricles = ((1 - grey - white) * (brain.to_ventricles < 1 + lost) >= 0.5) & ~torch.from_numpy(mask)
        anatomy = Anatomy(labels, self.grain(labels), labels[brain.box] == CSF, grey, white, dark, spots, cavity * (grey + white), torch.from_numpy(mask))
        image = self.image(self.t1(anatomy), self.kept())
        mask, ventricles = (self.finish(self.around_brain(part.to(torch.uint8))) for part in (torch.from_numpy(mask), ventricles))
        return Acquisition(self.finish(image), None, mask, ventricles, self.affine())

    def t1(self, anatomy: Anatomy) -> Tensor:
        uniform, brain = self.patient.uniform, self.patient.inner
        values = [uniform(*r) for r in T1]
        values[FAT] = uniform(*self.site.fat)
        tissue = anatomy.grey * uniform(*self.site.grey) * (1 + 0.03 * brain.field(20)) + anatomy.white * (1 + 0.02 * brain.field(25))
        return self.compose(anatomy, tissue * (1 - anatomy.lesion), values[CSF], values)

    def kinds(self) -> list[tuple[str, float]]:
        """Kind and volume (mL) of each infarct of this patient: one, or up to four of which the others are small."""
        patient, names = self.patient, list(_KINDS)
        count = int(patient.rng.choice([1, 2, 3, 4], p=[0.6, 0.2, 0.12, 0.08]))
        chosen = [str(patient.rng.choice(names, p=[share for share, _, _ in _KINDS.values()]))]
        chosen += [str(patient.rng.choice(names[1:])) for _ in range(count - 1)]
        return [(kind, patient.log_uniform(*_KINDS[kind][1:])) for kind in chosen]

    def infarct(self, kind: str, ml: float, grey: Tensor, white: Tensor) -> tuple[Stroke, Tensor]:
        """An infarct of `ml` mL, and how many mm of the tissue around its ventricle are lost with it."""
        brain, side = self.patient.inner, 1 if self.patient.uniform(0, 1) < 0.5 else -1
        draw = {"lacunar": self.lacunar, "cortical": self.cortical, "territorial": self.territorial}[kind]
        score, room, lost = draw(side, ml, grey, white)
        room &= (brain.to_brain < -0.5) & (brain.to_ventricles > 1.5)
        return self.infarcted(self.grown(score, room, ml), kind), lost

    def lacunar(self, side: int, ml: float, grey: Tensor, white: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score of each place, room and loss of a small one at the end of a deep artery on a `side` (1: right, -1: left)."""
        brain, rng = self.patient.inner, self.patient.rng
        centre = np.array(_DEEP[rng.integers(len(_DEEP))]) * (side, 1, 1) + rng.normal(0, 3, 3)
        radii = _radius(ml) * np.exp(rng.normal(0, 0.25, 3))
        score = -((brain.points - _at(centre)) / _at(radii)).square().sum(-1) + 0.25 * brain.fine
        return score, grey + white > 0.6, torch.zeros_like(grey)

    def cortical(self, side: int, ml: float, grey: Tensor, white: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of one of a gyrus or two, on either side."""
        brain, radius, deep = self.patient.inner, _radius(ml), -self.patient.inner.to_brain
        centre = self.pick((deep > 2) & (deep < 8) & (grey > 0.5) & (brain.points[..., 2] > -50))
        distance = (brain.points - centre).square().sum(-1).sqrt()
        score = -distance / (1.3 * radius + 2) + 0.4 * (grey - white) + 0.3 * brain.field(9) + 0.05 * brain.fine
        return score, (deep < 14) & (distance < 3 * radius + 6), torch.zeros_like(grey)

    def territorial(self, side: int, ml: float, grey: Tensor, white: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a wedge of an artery's territory."""
        patient, brain, x = self.patient, self.patient.inner, side * self.patient.inner.points[..., 0]
        margin, deep = self.territory(str(patient.rng.choice(list(_ARTERIES), p=_CALIBRE))), -brain.to_brain
        centre = self.pick((margin > 3) & (deep > 2) & (deep < 8) & (x > 4) & (brain.points[..., 2] > -32))
        apex = _at((side * 17.0, 0.4 * float(centre[1]) - 8, 0.3 * float(centre[2]) + 6))
        ray = brain.points - apex
        length = ray.square().sum(-1).sqrt().clamp_(min=1e-3)
        angle = torch.acos(((ray @ ((centre - apex) / (centre - apex).norm())) / length).clamp(-1, 1))
        score = -angle / 0.7 + 0.3 * brain.field(22) + 0.12 * brain.field(7) + 0.04 * brain.fine
        score = torch.minimum(score, (margin + 4 * brain.field(15)) / 8)
        score += ((length - patient.uniform(4, 16)) / 10).clamp_(max=0)
        near = torch.exp(-ray.square().sum(-1) / (2 * 30**2)) * (x > 1)
        return score, x > 2, near * patient.uniform(2, 8) * min(1.0, ml / 50)

    def grown(self, score: Tensor, room: Tensor, ml: float) -> np.ndarray:
        """Where `score` is highest in `room`: the largest connected part of the `ml` mL that lead."""
        wanted = min(max(1, round(1000 * ml / self.voxel)), max(1, int(room.sum()) // 2))
        score = score.masked_fill(~room, -torch.inf)
        return largest_part((score >= score.flatten().kthvalue(score.numel() - wanted + 1).values).numpy(), np.ones((3, 3, 3)))

    def infarcted(self, mask: np.ndarray, kind: str) -> Stroke:
        """What has become of the tissue in `mask`: cavities away from its edge, gliosis that fades at it."""
        brain, uniform = self.patient.inner, self.patient.uniform
        (box,) = ndimage.find_objects(np.pad(mask, 1).astype(np.uint8))
        box = tuple(slice(max(0, s.start - 4), s.stop + 2) for s in box)
        depth = torch.from_numpy(ndimage.distance_transform_edt(np.pad(mask[box], 1), sampling=self.spacing)[1:-1, 1:-1, 1:-1].astype(np.float32))
        soft = torch.from_numpy(np.maximum(ndimage.gaussian_filter(mask[box].astype(np.float32), 0.6), 0.85 * mask[box]))
        rim, most, gliosis = uniform(0, 1.5) if kind == "lacunar" else uniform(0.5, 5), uniform(0.5, 1), uniform(0.25, 0.5)
        texture = (1.2 * brain.field(10) + 0.7 * brain.field(4))[box]
        cavity, dark = torch.zeros(2, *mask.shape)
        share = torch.sigmoid((depth - 0.5 * min(self.spacing) + rim * texture.clamp(-1.5, 1) - rim) / 0.8)
        cavity[box] = most * share * soft
        dark[box] = gliosis * soft
        return Stroke(mask, cavity, dark)

    def territory(self, artery: str) -> Tensor:
        """How many mm a place is nearer to the territory of `artery`, of either side, than to another's."""
        places = torch.cat([self.patient.inner.points[..., :1].abs(), self.patient.inner.points[..., 1:]], -1)
        nearest = {name: torch.stack([(places - _at(seed)).square().sum(-1) for seed in seeds]).amin(0).sqrt_() for name, seeds in _ARTERIES.items()}
        return torch.stack([away for name, away in nearest.items() if name != artery]).amin(0) - nearest[artery]

    def pick(self, where: Tensor) -> Tensor:
        """A random one of the places that `where` marks."""
        places = self.patient.inner.points[where]
        return places[self.patient.rng.integers(len(places))]

    def perivascular(self) -> Tensor:
        """The share of CSF that enlarged perivascular spaces have: thin, upright, below the putamen and in the white matter above."""
        patient, brain = self.patient, self.patient.inner
        fluid = torch.zeros_like(brain.fine)
        for _ in range(int(patient.log_uniform(4, 60))):
            low = patient.uniform(0, 1) < 0.5
            centre = np.array((24, 4, -5) if low else (25, -12, 34)) + patient.rng.normal(0, 1, 3) * ((3, 5, 3) if low else (4, 22, 6))
            centre[0] *= patient.rng.choice((-1, 1))
            radii = patient.uniform(0.6, 1.3) * np.array((1, 1, patient.uniform(1.5, 4)))
            box, radius = brain.ellipsoid(centre, np.maximum(radii, 0.5 * np.array(self.spacing)), 0)
            part = min(1.0, 4 / 3 * np.pi * float(np.prod(radii)) / self.voxel)  # of a voxel
            fluid[box] = torch.maximum(fluid[box], 0.8 * part * torch.sigmoid((1 - radius) / 0.3))
        return fluid

    def atrophy(self) -> Tensor:
        """What is left of the tissue where sulci have widened for reasons of their own, on both sides or on one."""
        patient, brain = self.patient, self.patient.inner
        left = torch.ones_like(brain.fine)
        for _ in range(patient.rng.integers(0, 3)):
            centre, both = self.pick((brain.to_brain > -6) & (brain.to_brain < -2) & (brain.points[..., 2] > -10)), patient.uniform(0, 1) < 0.6
            near = sum(torch.exp(-(brain.points - centre * _at((side, 1, 1))).square().sum(-1) / (2 * 18**2)) for side in ((1, -1) if both else (1,)))
            sulci = torch.exp(-(brain.field(10) / 0.2).square()) * torch.sigmoid((brain.to_brain + 15) / 2)
            left *= 1 - patient.uniform(0.4, 1) * near.clamp_(max=1) * sulci
        return left


def _radius(ml: float) -> float:
    """Of a sphere of that volume."""
    return (3000 * ml / (4 * np.pi)) ** (1 / 3)


def _at(place) -> Tensor:
    return torch.tensor(np.asarray(place), dtype=torch.float32)
