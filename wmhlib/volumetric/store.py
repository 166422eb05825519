"""The volumes of a cohort as training reads them: in the box, in a file that memory maps."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from ..sections import Inputs, Volume
from ..slicestore import load_cases
from ..volumes import load_case
from .boxes import box_labels, case_box, place_box


@dataclass(frozen=True)
class CaseVolume:
    """A case in its box (see `boxes`): images float16 M x X x Y x Z, labels uint8 X x Y x Z (0, 1 lesion, 2 other pathology)."""

    case: str
    images: Tensor
    labels: Tensor

    @functools.cached_property
    def lesion(self) -> Tensor:
        """The voxels of lesions as int32 places in the flattened labels."""
        return torch.nonzero(self.labels.flatten() == 1).flatten().int()


def load_volumes(rows: pd.DataFrame, inputs: Inputs, settings: Volume, progress: bool = True) -> list[CaseVolume]:
    """Every case of `rows` (columns case, flair, t1, mask) in its box, in a file (`slicestore.load_cases`): 23 MB for 192 x 224 x 176 voxels."""
    return [CaseVolume(*case) for case in load_cases(rows, functools.partial(_prepared, inputs=inputs, settings=settings), progress)]


def _prepared(row, inputs: Inputs, settings: Volume) -> tuple[Tensor, Tensor]:
    """Images and labels of `CaseVolume`."""
    case = load_case(row.flair, row.t1, row.mask, inputs)
    box = place_box(case, settings)
    return case_box(case, box).half(), box_labels(case, box, row.mask)
