"""The cases of a cohort as training reads them, in a file that memory maps: their slices on the canvas, or what else is made of them."""

from __future__ import annotations

import functools
import mmap
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd
import torch
from torch import Tensor, distributed
from tqdm import tqdm

from .canvas import mask_canvas, to_canvas
from .errors import InputError, WMHError
from .nifti import load_volume
from .sections import Inputs
from .volumes import AIR, Case, case_canvas, load_case

TISSUE = "synthetic_tissue"  # the map of tissues beside a synthetic case's mask: a name that no data set has


@dataclass(frozen=True)
class CaseSlices:
    """A case on the canvas: images float16 M x D x S x S, labels uint8 D x S x S (0, 1, 2; above these the tissues of a synthetic
    case that has them, see `pretext.LABELS`)."""

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
    """Every case of `rows` (columns case, flair, t1, mask) on the canvas, in a file (`load_cases`): 47 MB for 60 slices of 512 px."""
    return [CaseSlices(*case) for case in load_cases(rows, functools.partial(_prepared, inputs=inputs), progress)]


def load_cases(rows: pd.DataFrame, prepare: Callable[[Any], tuple[Tensor, Tensor]], progress: bool = True) -> list[tuple[str, Tensor, Tensor]]:
    """Case, images (float16, M x ...) and labels (uint8, ...) of every one of `rows` (column case), as `prepare` makes them of it, in a file
    instead of memory.

    The tensors are maps of a temporary file (in `tempfile.gettempdir()`, which TMPDIR moves) of 2 M + 1 bytes a voxel. The system keeps of it in memory
    what there is room for. Where that folder is itself memory (tmpfs) they stay there. The file has no name, so that nothing is left however this
    process ends. Processes that train together read a share of the cases each, and those on one machine map each other's files (on Linux;
    elsewhere each reads all). Raises InputError, in each of them, where a case cannot be used or the disk has no room.
    """
    near = _on_this_machine(os.getpid())
    with tempfile.TemporaryFile() as file:
        try:
            written, failed = _write(rows.iloc[near.index(os.getpid()) :: len(near)], prepare, file, progress), None
        except WMHError as error:
            written, failed = [], error
        cases: list = [None] * len(rows)
        for i, (path, places, error) in enumerate(_on_this_machine((f"/proc/{os.getpid()}/fd/{file.fileno()}", written, failed))):
            if error:
                raise error
            cases[i :: len(near)] = _mapped(path if len(near) > 1 else file.fileno(), places)
        _on_this_machine(None)  # until all have opened it
    return cases


def _write(rows: pd.DataFrame, prepare: Callable, file: BinaryIO, progress: bool) -> list[tuple[str, torch.Size, int]]:
    """Append the images and labels of each case to `file`. Gives case, shape of the images, and bytes before them."""
    places = []
    for row in tqdm(rows.itertuples(), "reading cases", len(rows), disable=not progress, mininterval=5):
        images, labels = prepare(row)
        places.append((row.case, images.shape, file.tell()))
        try:
            for tensor in (images, labels):
                file.write(tensor.contiguous().numpy())
            file.flush()
        except OSError as error:
            raise InputError(f"{tempfile.gettempdir()} has no room for the images of {len(rows)} cases ({error}; those of {len(places) - 1} took "
                             f"{places[-1][2] / 1e9:.3g} GB): free space there, or set TMPDIR to a folder with more") from None
    return places


def _prepared(row, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Images and labels of `CaseSlices`."""
    case = load_case(row.flair, row.t1, row.mask, inputs)
    lesion, other = (mask_canvas(case.mask == label, case.grid, inputs.img_size) for label in (1, 2))
    labels = _tissues(row.mask, case, inputs.img_size)
    labels[other], labels[lesion] = 2, 1
    return case_canvas(case, inputs.img_size).half(), labels


def _tissues(mask: str, case: Case, size: int) -> Tensor:
    """The tissues that lie beside a synthetic case's mask, D x size x size, or zeros."""
    path = Path(mask).with_name(f"{TISSUE}.nii.gz")
    tissue = load_volume(path).data if path.is_file() else np.zeros((1, 1, 1))
    labels = torch.zeros(case.grid.depth, size, size, dtype=torch.uint8)
    for kind in np.unique(tissue)[1:]:
        labels[to_canvas(tissue == kind, case.grid, size) > 0.5] = int(kind)
    return labels


def _mapped(path: str | int, places: list[tuple[str, torch.Size, int]]) -> list[tuple[str, Tensor, Tensor]]:
    if not places:
        return []
    with open(path, "r+b", closefd=isinstance(path, str)) as file:
        data = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
    sizes = [(start, start + 2 * shape.numel(), start + 2 * shape.numel() + shape[1:].numel()) for _, shape, start in places]
    return [(case, data[a:b].view(torch.float16).view(shape), data[b:c].view(shape[1:]))
            for (case, shape, _), (a, b, c) in zip(places, sizes)]


def _on_this_machine(value) -> list:
    """What each process on this machine gives, those that train together, in the same order in all of them."""
    if sys.platform != "linux" or not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    values, host = [None] * distributed.get_world_size(), _machine()
    distributed.all_gather_object(values, (host, value))
    return [value for place, value in values if place == host]


def _machine() -> tuple[str, str]:
    """What processes have in common that see each other's /proc: names of machines and containers may repeat."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")
