"""Slices for training: canvases of each case, which of them an epoch draws, and their random changes on the device."""

from __future__ import annotations

import functools
import math
import mmap
import os
import socket
import sys
import tempfile
from dataclasses import dataclass
from typing import BinaryIO

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, distributed
from tqdm import tqdm

from .errors import InputError, WMHError
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
        return self._kinds[0]

    def others(self) -> Tensor:
        """Numbers of the slices that show tissue but no lesion."""
        return self._kinds[1]

    @functools.cached_property
    def _kinds(self) -> tuple[Tensor, Tensor]:
        lesion = (self.labels == 1).flatten(1).any(-1)
        tissue = (self.images[0] > 0.5 * AIR).flatten(1).any(-1)
        return torch.nonzero(lesion).flatten(), torch.nonzero(tissue & ~lesion).flatten()


def load_slices(rows: pd.DataFrame, inputs: Inputs, progress: bool = True) -> list[CaseSlices]:
    """Every case of `rows` (columns case, flair, t1, mask) on the canvas, in a file instead of memory.

    The tensors are maps of a temporary file (in `tempfile.gettempdir()`, which TMPDIR moves) of 2 M + 1 bytes a pixel: 47 MB
    for 60 slices of 512 px. The system keeps of it in memory what there is room for. The file has no name, so that nothing is left
    however this process ends. Processes that train together read a share of the cases each, and those on one machine map each
    other's files (on Linux; elsewhere each reads all). Raises InputError, in each of them, where a case cannot be used or the
    disk has no room.
    """
    near = _on_this_machine(os.getpid())
    with tempfile.TemporaryFile() as file:
        try:
            written, failed = _write_slices(rows.iloc[near.index(os.getpid()) :: len(near)], inputs, file, progress), None
        except WMHError as error:
            written, failed = [], error
        cases: list = [None] * len(rows)
        for i, (path, places, error) in enumerate(_on_this_machine((f"/proc/{os.getpid()}/fd/{file.fileno()}", written, failed))):
            if error:
                raise error
            cases[i :: len(near)] = _mapped(path if len(near) > 1 else file.fileno(), places)
        _on_this_machine(None)  # until all have opened it
    return cases


def _write_slices(rows: pd.DataFrame, inputs: Inputs, file: BinaryIO, progress: bool) -> list[tuple[str, torch.Size, int]]:
    """Append the images and labels of each case to `file`. Gives case, shape of the images, and bytes before them."""
    places = []
    for row in tqdm(rows.itertuples(), "reading cases", len(rows), disable=not progress, mininterval=5):
        case = load_case(row.flair, row.t1, row.mask, inputs)
        images = case_canvas(case, inputs.img_size).half()
        lesion, other = (mask_canvas(case.mask == label, case.grid, inputs.img_size) for label in (1, 2))
        places.append((row.case, images.shape, file.tell()))
        try:
            for tensor in (images, lesion.byte() + 2 * (other & ~lesion).byte()):
                file.write(tensor.numpy())
            file.flush()
        except OSError as error:
            raise InputError(f"{tempfile.gettempdir()} has no room for the slices of {len(rows)} cases ({error}; those of {len(places) - 1} took "
                             f"{places[-1][2] / 1e9:.3g} GB): free space there, or set TMPDIR to a folder with more") from None
    return places


def _mapped(path: str | int, places: list[tuple[str, torch.Size, int]]) -> list[CaseSlices]:
    if not places:
        return []
    with open(path, "r+b", closefd=isinstance(path, str)) as file:
        data = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    sizes = [(start, start + 2 * shape.numel(), start + 2 * shape.numel() + shape[1:].numel()) for _, shape, start in places]
    return [CaseSlices(case, data[a:b].view(torch.float16).view(shape), data[b:c].view(shape[1:]))
            for (case, shape, _), (a, b, c) in zip(places, sizes)]


def _on_this_machine(value) -> list:
    """What each process on this machine gives, those that train together, in the same order in all of them."""
    if sys.platform != "linux" or not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values, host = [None] * distributed.get_world_size(), socket.gethostname()
    distributed.all_gather_object(values, (host, value))
    return [value for place, value in values if place == host]


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

    images /= -AIR  # brain tissue is 1
    if settings.gamma:
        images.clamp_(min=0).pow_(torch.exp(uniform(settings.gamma, 1, 1, 1)))
    if settings.bias_field:
        widen = F.interpolate(torch.eye(4, device=device)[None, None], (side, 4), mode="bicubic")
        images *= torch.exp(widen @ uniform(settings.bias_field, 1, 4, 4) @ widen.mT)
    contrast, brightness = 1 + uniform(settings.contrast, 1, 1, 1), uniform(settings.brightness, 1, 1, 1)
    images.mul_(-AIR * contrast).add_(AIR * contrast + brightness)
    if settings.noise:
        deviation = uniform(settings.noise, 1, 1, 1).abs()
        own = torch.Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
        images += deviation * torch.randn(images.shape, generator=own, device=device)
    return images.clamp_(AIR, BRIGHTEST).mul_(present), labels


def drop_modalities(images: Tensor, inputs: Inputs, generator: torch.Generator) -> Tensor:
    """Blank T1 (all its channels 0, as where it is absent) in a share `modality_dropout` of the slices."""
    if len(inputs.modalities) == 1:
        return images
    keep = torch.rand(len(images), 1, 1, 1, generator=generator) >= inputs.modality_dropout
    first = inputs.channels // len(inputs.modalities)
    return torch.cat([images[:, :first], images[:, first:] * keep.to(images)], 1)
