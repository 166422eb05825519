"""Patches of volumes for training: which of them an epoch draws, how they are stacked, and their random changes on the device."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..batches import change_greys
from ..errors import InputError
from ..sections import Augment, Volume
from ..seeds import stable_seed
from ..volumes import AIR
from .boxes import interpolation, shares, splines
from .store import CaseVolume

_INJECTIVE = 2.48  # a cubic B-spline whose coefficients lie below its knots' distance divided by this has no fold (Choi & Lee 2000, K3)
_KNOTS_MM = 32.0  # between the knots of the elastic field, at least
_TILT = 1 / 3  # of the rotation in the axial plane
_BUMPS = 4  # of the bias field, along an axis of a patch

Place = tuple[int, int, int, int]


def draw_patches(cases: list[CaseVolume], settings: Volume, seed: int) -> list[Place]:
    """(case, x, y, z) of `settings.patches` patches a case, the last three the first voxel: of those, `settings.lesion_share` have a voxel of a
    lesion in their middle half, the others (all, in a case without lesions) a voxel of the head. Drawn anew for each seed, whatever the
    other cases. Raises InputError for a case that shows no head."""
    drawn = []
    for number, case in enumerate(cases):
        generator = torch.Generator().manual_seed(stable_seed(seed, case.case))
        around = int((torch.rand(settings.patches, generator=generator) < settings.lesion_share).sum()) if len(case.lesion) else 0
        centres = [case.lesion[torch.randint(max(1, len(case.lesion)), (around,), generator=generator)].long(),
                   _in_head(case, settings.patches - around, generator)]
        centres = torch.stack(torch.unravel_index(torch.cat(centres), case.labels.shape), 1)
        patch, room = torch.tensor(settings.patch), torch.tensor(case.labels.shape) - torch.tensor(settings.patch)
        before = ((0.25 + 0.5 * torch.rand(centres.shape, generator=generator)) * patch).long()
        drawn += [(number, *place) for place in (centres - before).clamp(min=torch.zeros(3, dtype=torch.long), max=room).tolist()]
    return drawn


def stack_patches(cases: list[CaseVolume], places: list[Place], settings: Volume) -> tuple[Tensor, Tensor]:
    """Images float32 B x M x patch and labels uint8 B x 1 x patch."""
    boxes = [(i, tuple(slice(at, at + n) for at, n in zip(place, settings.patch))) for i, *place in places]
    return (torch.stack([cases[i].images[(slice(None), *box)] for i, box in boxes]).float(),
            torch.stack([cases[i].labels[box] for i, box in boxes])[:, None])


def augment_volumes(images: Tensor, labels: Tensor, settings: Augment, spacing: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random changes of a batch (B x C x X x Y x Z in [AIR, BRIGHTEST], labels B x 1 x X x Y x Z), on the device they lie on; `spacing` in mm.

    One map a patch moves image and labels, mirrored beyond the patch: rotation in the axial plane and a third of it about the two other
    axes, scale, flips, after an elastic field of up to `settings.elastic` mm. The grey values then change as slices do in
    `batches.augment`, and at last one axis is averaged to voxels up to `settings.resolution` times as long, and interpolated back. Quarter
    turns are not made. All settings at 0 or False, and a resolution of 1, give the batch back unchanged.

    The elastic field is a cubic B-spline on knots at least 2.48 times as far apart as its largest coefficient, which cannot fold (Choi & Lee
    2000, Injectivity conditions of 2D and 3D uniform cubic B-spline functions); its Jacobian is positive, and so is that of the rest but for flips.
    """
    present = images.flatten(2).any(-1)[..., None, None, None]

    def uniform(limit: float, *shape: int) -> Tensor:
        return ((2 * torch.rand(len(images), *shape, generator=generator) - 1) * limit).to(images.device)

    if settings.rotation or settings.scale or settings.flips or settings.flips_ap or settings.elastic:
        grid = _grid(images, settings, spacing, uniform)
        images = F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
        labels = F.grid_sample(labels.float(), grid, mode="nearest", padding_mode="reflection", align_corners=False).byte()

    def bias() -> Tensor:
        field = uniform(settings.bias_field, 1, _BUMPS, _BUMPS, _BUMPS)
        return F.interpolate(field, images.shape[2:], mode="trilinear")

    images = change_greys(images - AIR, settings, uniform, bias, generator)
    if settings.resolution > 1:
        factors = 1 + uniform(settings.resolution - 1).abs()
        axes = torch.randint(3, (len(images),), generator=generator).tolist()
        images = torch.stack([_coarsened(image, axis + 1, factor) for image, axis, factor in zip(images, axes, factors.tolist())])
    return images.mul_(present), labels


def _in_head(case: CaseVolume, count: int, generator: torch.Generator) -> Tensor:
    """Random voxels of the head, as places in the flattened labels."""
    first = case.images[0].flatten()
    for _ in range(100):
        places = torch.randint(len(first), (64 * count,), generator=generator)
        found = places[first[places] > 0.5 * AIR]
        if len(found) >= count:
            return found[:count]
    raise InputError(f"case {case.case} shows no head in its box: set volume.box larger, or leave the case out")


def _grid(images: Tensor, settings: Augment, spacing: float, uniform) -> Tensor:
    """Where each voxel of the batch comes from, as grid_sample takes it: B x X x Y x Z x (z, y, x), each from -1 to 1."""
    sizes, device = images.shape[2:], images.device
    places = [(torch.arange(n, device=device) - (n - 1) / 2) * spacing for n in sizes]  # mm from the middle
    points = torch.stack(torch.meshgrid(*places, indexing="ij"), -1).expand(len(images), *sizes, 3)
    if settings.elastic:
        apart = max(_KNOTS_MM, 1.01 * _INJECTIVE * settings.elastic)
        bases = [splines(np.arange(n) * spacing / apart).to(device) for n in sizes]
        field = uniform(settings.elastic / 3**0.5, 3, *(basis.shape[1] for basis in bases)) * uniform(1, 1, 1, 1, 1).abs()
        for basis in bases:
            field = torch.tensordot(field, basis, ([2], [1]))
        points = points + field.movedim(1, -1)
    yaw, pitch, roll = (uniform(math.radians(settings.rotation * part)) for part in (1, _TILT, _TILT))
    matrix = _turn(yaw, 0, 1) @ _turn(pitch, 1, 2) @ _turn(roll, 0, 2) * torch.exp(uniform(math.log1p(settings.scale), 1, 1))
    mirror = torch.ones(len(images), 1, 3, device=device)
    for axis, on in enumerate((settings.flips, settings.flips_ap)):
        if on:
            mirror[:, 0, axis] = torch.where(uniform(1) < 0, -1.0, 1.0)
    points = torch.einsum("bxyzj,bij->bxyzi", points, matrix * mirror)
    return (points * (2 / spacing / torch.tensor(sizes, device=device))).flip(-1)


def _turn(angles: Tensor, first: int, second: int) -> Tensor:
    """Rotations in the plane of two axes: B x 3 x 3."""
    matrix = torch.eye(3, device=angles.device).repeat(len(angles), 1, 1)
    matrix[:, first, first] = matrix[:, second, second] = torch.cos(angles)
    matrix[:, first, second], matrix[:, second, first] = -torch.sin(angles), torch.sin(angles)
    return matrix


def _coarsened(image: Tensor, axis: int, factor: float) -> Tensor:
    """An image whose voxels were `factor` times as long along one axis."""
    n = image.shape[axis]
    m = math.ceil(n / factor)
    coarse = shares(m, n, 0, factor)
    matrix = interpolation(n, m, 0, 1 / factor) @ (coarse / coarse.sum(1, keepdim=True))
    return torch.tensordot(image, matrix.to(image), ([axis], [1])).movedim(-1, axis)
