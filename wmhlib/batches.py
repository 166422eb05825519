"""Slices for training: canvases of each case, which of them an epoch draws, and their random changes on the device."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .settings import Augment, Inputs
from .volumes import AIR, BRIGHTEST, case_canvas, load_case, mask_canvas
from .workspace import stable_seed


@dataclass(frozen=True)
class CaseSlices:
    """A case on the canvas: images float16 M x D x S x S, labels uint8 D x S x S (0, 1, 2)."""

    case: str
    images: Tensor
    labels: Tensor

    def lesions(self) -> Tensor:
        """Numbers of the slices that hold a lesion."""
        return torch.nonzero((self.labels == 1).any(-1).any(-1)).flatten()

    def others(self) -> Tensor:
        """Numbers of the slices that show tissue but no lesion."""
        tissue = (self.images[0] > 0.5 * AIR).any(-1).any(-1)
        return torch.nonzero(tissue & ~(self.labels == 1).any(-1).any(-1)).flatten()


def load_slices(rows: pd.DataFrame, inputs: Inputs, progress: bool = True) -> list[CaseSlices]:
    """Every case of `rows` (columns case, flair, t1, mask) on the canvas."""
    slices = []
    for row in tqdm(rows.itertuples(), "reading cases", len(rows), disable=not progress, mininterval=5):
        case = load_case(row.flair, row.t1, row.mask, inputs)
        images = case_canvas(case, inputs.img_size).half()
        lesion, other = (mask_canvas(case.mask == label, case.grid, inputs.img_size) for label in (1, 2))
        slices.append(CaseSlices(row.case, images, lesion.byte() + 2 * (other & ~lesion).byte()))
    return slices


def draw_slices(cases: list[CaseSlices], negatives: float, seed: int) -> list[tuple[int, int]]:
    """(case, slice) of every slice with a lesion and of a share `negatives` of the others, drawn anew for each seed."""
    drawn = []
    for number, case in enumerate(cases):
        others = case.others()
        generator = torch.Generator().manual_seed(stable_seed(seed, case.case))
        some = others[torch.randperm(len(others), generator=generator)[: math.ceil(negatives * len(others))]]
        drawn += [(number, int(z)) for z in torch.cat([case.lesions(), some.sort().values])]
    return drawn


def stack_slices(cases: list[CaseSlices], places: list[tuple[int, int]], context: int) -> tuple[Tensor, Tensor]:
    """Images float32 B x C x S x S (modality by modality, neighbours in order) and labels uint8 B x 1 x S x S."""
    images = torch.stack([with_context(cases[i].images, z, context) for i, z in places])
    return images.float(), torch.stack([cases[i].labels[z] for i, z in places])[:, None]


def with_context(images: Tensor, z: int, context: int) -> Tensor:
    """M x D x S x S -> (M (2 context + 1)) x S x S: slice z and its neighbours, the outermost repeated at the ends."""
    near = torch.arange(z - context, z + context + 1).clamp(0, images.shape[1] - 1)
    return images[:, near].flatten(0, 1)


def augment(images: Tensor, labels: Tensor, settings: Augment, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random changes of a batch (B x C x S x S in [AIR, BRIGHTEST], labels B x 1 x S x S), on the device they lie on.

    One affine map a slice (rotation, scale, flips, quarter turns) moves image and labels; the grey values then change by
    gamma, contrast, a smooth bias field, brightness and noise. All settings at 0 or False give the batch back unchanged.
    """
    b, device = len(images), images.device
    absent = (images == 0).flatten(2).all(-1)[..., None, None]

    def uniform(limit: float, *shape: int) -> Tensor:
        return ((2 * torch.rand(b, *shape, generator=generator) - 1) * limit).to(device)

    angle, stretch = uniform(math.radians(settings.rotation)), torch.exp(uniform(math.log1p(settings.scale)))
    turns, mirror = (torch.randint(n, (b,), generator=generator).to(device) for n in (4, 4))
    angle = angle + turns * (math.pi / 2) * settings.rotate90
    flip_x, flip_y = (1 - 2 * (mirror >> bit & 1) * on for bit, on in enumerate((settings.flips, settings.flips_ap)))
    cos, sin, zero = torch.cos(angle) * stretch, torch.sin(angle) * stretch, torch.zeros(b, device=device)
    theta = torch.stack([torch.stack([cos * flip_x, -sin * flip_y, zero], 1), torch.stack([sin * flip_x, cos * flip_y, zero], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images - AIR, grid, align_corners=False)  # 0 is air from here on, and outside
    labels = F.grid_sample(labels.float(), grid, mode="nearest", align_corners=False).byte()

    images = images / -AIR  # brain tissue is 1
    if settings.gamma:
        images = images.clamp(min=0) ** torch.exp(uniform(settings.gamma, 1, 1, 1))
    if settings.bias_field:
        field = F.interpolate(uniform(settings.bias_field, 1, 4, 4), images.shape[-2:], mode="bicubic")
        images = images * torch.exp(field)
    images = -AIR * (images - 1)
    images = images * (1 + uniform(settings.contrast, 1, 1, 1)) + uniform(settings.brightness, 1, 1, 1)
    if settings.noise:
        deviation = uniform(settings.noise, 1, 1, 1).abs()
        images = images + deviation * torch.randn(images.shape, generator=generator).to(device)
    return images.clamp(AIR, BRIGHTEST).masked_fill(absent, 0), labels


def drop_modalities(images: Tensor, inputs: Inputs, generator: torch.Generator) -> Tensor:
    """Blank T1 (all its channels 0, as where it is absent) in a share `modality_dropout` of the slices."""
    if len(inputs.modalities) == 1:
        return images
    keep = torch.rand(len(images), 1, 1, 1, generator=generator) >= inputs.modality_dropout
    first = inputs.channels // len(inputs.modalities)
    return torch.cat([images[:, :first], images[:, first:] * keep.to(images)], 1)
