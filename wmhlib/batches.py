"""Batches for training: which slices an epoch draws, how they are stacked, and their random changes on the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .canvas import neighbours
from .errors import InputError
from .sections import Augment, Inputs
from .seeds import stable_seed
from .slicestore import CaseSlices
from .volumes import AIR, BRIGHTEST


def draw_slices(cases: list[CaseSlices], negatives: float, seed: int) -> list[tuple[int, int]]:
    """(case, slice) of every slice with a lesion and of a share `negatives` of the others, drawn anew for each seed."""
    drawn = []
    for number, case in enumerate(cases):
        others = case.others()
        generator = torch.Generator().manual_seed(stable_seed(seed, case.case))
        some = others[torch.randperm(len(others), generator=generator)[: math.ceil(negatives * len(others))]]
        drawn += [(number, int(z)) for z in torch.cat([case.lesions(), some.sort().values])]
    return drawn


def few_slices(cases: list[CaseSlices], count: int, negatives: float, seed: int) -> list[tuple[int, int]]:
    """`count` of the slices of `draw_slices`, drawn once from `seed`, the first with a lesion: the first of a longer draw are a
    shorter one. Raises InputError where there are fewer, or none has a lesion."""
    places = draw_slices(cases, negatives, seed)
    lesions = set(draw_slices(cases, 0, seed))
    if len(places) < count or not lesions:
        raise InputError(f"{count} slices are asked for (training.slices): {len(cases)} training cases have {len(places)}, {len(lesions)} of them with a lesion")
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(stable_seed(seed, "few"))).tolist()
    first = next(i for i in order if places[i] in lesions)
    return [places[i] for i in (first, *(i for i in order if i != first))][:count]


def stack_slices(cases: list[CaseSlices], places: list[tuple[int, int]], context: int) -> tuple[Tensor, Tensor]:
    """Images float32 B x C x S x S (modality by modality, neighbours in order) and labels uint8 B x 1 x S x S."""
    images = torch.stack([with_context(cases[i].images, z, context) for i, z in places])
    return images.float(), torch.stack([cases[i].labels[z] for i, z in places])[:, None]


def with_context(images: Tensor, z: int, context: int) -> Tensor:
    """M x D x S x S -> (M (2 context + 1)) x S x S: slice z and its `canvas.neighbours`."""
    return images[:, neighbours(z, context, images.shape[1])].flatten(0, 1)


def augment(images: Tensor, labels: Tensor, settings: Augment, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random changes of a batch (B x C x S x S in [AIR, BRIGHTEST], labels B x 1 x S x S), on the device they lie on.

    One affine map a slice (rotation, scale, flips, quarter turns) moves image and labels; the grey values then change by
    gamma, contrast, a smooth bias field, brightness and noise. All settings at 0 or False give the batch back unchanged.
    """
    b, side, device = len(images), images.shape[-1], images.device
    present = images.flatten(2).any(-1)[..., None, None]

    def uniform(limit: float, *shape: int) -> Tensor:
        return ((2 * torch.rand(b, *shape, generator=generator) - 1) * limit).to(device)

    angle, stretch = uniform(math.radians(settings.rotation)), torch.exp(uniform(math.log1p(settings.scale)))
    turns, mirror = (torch.randint(n, (b,), generator=generator).to(device) for n in (4, 4))
    angle = angle + turns * (math.pi / 2) * settings.rotate90
    flip_x, flip_y = (1 - 2 * (mirror >> bit & 1) * on for bit, on in enumerate((settings.flips, settings.flips_ap)))
    cos, sin = torch.cos(angle) * stretch, torch.sin(angle) * stretch
    along_x, along_y = (torch.stack(column, 1)[:, None, None] for column in ((cos * flip_x, sin * flip_x), (-sin * flip_y, cos * flip_y)))
    place = (2 * torch.arange(side, device=device) + 1) / side - 1
    grid = place[:, None] * along_x + place[:, None, None] * along_y  # B x S x S x (x, y)
    images = F.grid_sample(images - AIR, grid, align_corners=False)  # 0 is air from here on, and outside
    labels = F.grid_sample(labels.float(), grid, mode="nearest", align_corners=False).byte()

    def bias() -> Tensor:
        widen = F.interpolate(torch.eye(4, device=device)[None, None], (side, 4), mode="bicubic")
        return widen @ uniform(settings.bias_field, 1, 4, 4) @ widen.mT

    return change_greys(images, settings, uniform, bias, generator).mul_(present), labels


def change_greys(images: Tensor, settings: Augment, uniform: Callable[..., Tensor], bias: Callable[[], Tensor], generator: torch.Generator) -> Tensor:
    """Gamma, bias field, contrast, brightness and noise of a batch (B x C x ..., less AIR: air is 0), in place; the result in [AIR, BRIGHTEST].

    `uniform(limit, *shape)` draws numbers up to `limit`, either way, for each of the batch, `bias()` the logarithm of a smooth field."""
    one = (1,) * (images.ndim - 1)
    images /= -AIR  # brain tissue is 1
    if settings.gamma:
        images.clamp_(min=0).pow_(torch.exp(uniform(settings.gamma, *one)))
    if settings.bias_field:
        images *= torch.exp(bias())
    contrast, brightness = 1 + uniform(settings.contrast, *one), uniform(settings.brightness, *one)
    images.mul_(-AIR * contrast).add_(AIR * contrast + brightness)
    if settings.noise:
        deviation = uniform(settings.noise, *one).abs()
        own = torch.Generator(images.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        images += deviation * torch.randn(images.shape, generator=own, device=images.device)
    return images.clamp_(AIR, BRIGHTEST)


def drop_modalities(images: Tensor, inputs: Inputs, generator: torch.Generator) -> Tensor:
    """Blank T1 (all its channels 0, as where it is absent) in a share `modality_dropout` of the slices, or patches."""
    if not inputs.t1_beside:
        return images
    keep = torch.rand(len(images), *[1] * (images.dim() - 1), generator=generator) >= inputs.modality_dropout
    first = inputs.channels // len(inputs.modalities)
    return torch.cat([images[:, :first], images[:, first:] * keep.to(images)], 1)
