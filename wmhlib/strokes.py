"""Synthetic T1w heads with chronic strokes, for a demo and for tests of volumes."""

from __future__ import annotations

from dataclasses import replace

import torch

from .scan import Case, Scan, Site

SITES = {
    "R001": Site("R001", (192, 224, 176), (1.0, 1.0, 1.0), (1, 1, 1), centre=8, thickness=(0.8, 1.2), grey=(0.62, 0.72), fat=(1.4, 2.1),
                 noise=(0.01, 0.03), blur=(0.0, 0.06), bias=0.15, defaced=0.8, sub=1),
    "R002": Site("R002", (180, 236, 176), (1.0, 1.0, 1.0), (-1, -1, 1), centre=8, thickness=(0.8, 1.2), grey=(0.68, 0.8), fat=(1.2, 1.8),
                 noise=(0.02, 0.05), blur=(0.04, 0.16), bias=0.35, defaced=0.5, sub=1),
    "R003": Site("R003", (176, 224, 144), (1.05, 1.0, 1.25), (-1, 1, 1), centre=6, thickness=(1.0, 1.4), grey=(0.64, 0.78), fat=(1.5, 2.3),
                 noise=(0.02, 0.06), blur=(0.02, 0.12), bias=0.25, defaced=0.8, sub=1),
}


class StrokeScan(Scan):
    """One patient with strokes in one scanner, all drawn from `seed`; `scale` coarsens the voxels along all axes."""

    def __init__(self, site: Site, seed: int, scale: float):
        shape = tuple(round(n / scale) for n in site.shape)
        super().__init__(replace(site, shape=shape, spacing=tuple(d * n / m for d, n, m in zip(site.spacing, site.shape, shape))), seed, 1.0)

    def acquire(self) -> Case:
        anatomy, brain = self.anatomy(), self.patient.inner
        lesion = torch.sigmoid(8 * (1 - ((brain.points - torch.tensor([35.0, -10, 20])) / 18).square().sum(-1))) * (anatomy.grey + anatomy.white)
        anatomy = replace(anatomy, core=lesion, extent=lesion, lesion=0 * lesion)
        mask = (lesion >= 0.5).to(torch.uint8)
        ventricles = ((1 - anatomy.grey - anatomy.white) * (brain.to_ventricles < 1) >= 0.5).to(torch.uint8) * (mask == 0)
        return Case(self.finish(self.image(self.t1(anatomy), self.kept())), None, self.finish(self.around_brain(mask)),
                    self.finish(self.around_brain(ventricles)), self.affine())
