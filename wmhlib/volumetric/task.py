"""What a training of volumes does in its own way (`tasks.Slices` does the same for slices)."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from ..batches import drop_modalities
from ..errors import InputError
from ..losses import total_loss
from ..seeds import stable_seed
from ..settings import Recipe
from ..tasks import Forward, Sums, cut
from .patches import Place, augment_volumes, draw_patches, stack_patches
from .store import CaseVolume, load_volumes
from .windows import probabilities


class Patches:
    """Patches of volumes in their boxes; a place is (case, x, y, z), the first voxel."""

    one, many, stored = "patch", "patches", "volumes"
    smaller = "volume.patch"
    batchnorm = False

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.size = f"{' x '.join(map(str, recipe.volume.patch))} voxels"

    def shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the images and labels of a micro-batch."""
        return tuple((batch_size, channels, *self.recipe.volume.patch) for channels in (self.recipe.inputs.channels, 1))

    def load(self, rows: pd.DataFrame, progress: bool) -> list[CaseVolume]:
        return load_volumes(rows, self.recipe.inputs, self.recipe.volume, progress)

    def places(self, cases: list[CaseVolume], epoch: int) -> list[Place]:
        """What `epoch` (from 1) trains on."""
        return draw_patches(cases, self.recipe.volume, stable_seed(self.recipe.seed, "patches", epoch))

    def validation_places(self, train: list[CaseVolume], val: list[CaseVolume]) -> list[Place]:
        """The patches of every validation loss, drawn as those of training are, so that the two losses can be compared. Raises InputError where
        no case of either part has a lesion in its box."""
        for part, cases in (("train", train), ("val", val)):
            if not any(len(case.lesion) for case in cases):
                raise InputError(f"no {part} case has a lesion in its box: split the cases anew, or add some with lesions")
        return draw_patches(val, self.recipe.volume, self.recipe.seed)

    def batch(self, cases: list[CaseVolume], places: list[Place], device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and labels of a micro-batch on `device`, changed at random."""
        images, labels = (t.to(device) for t in stack_patches(cases, places, self.recipe.volume))
        images, labels = augment_volumes(images, labels, self.recipe.augment, self.recipe.volume.spacing, generator)
        return drop_modalities(images, self.recipe.inputs, generator), labels

    def validate(self, forward: Forward, cases: list[CaseVolume], places: list[Place], mine: Callable[[int], range], device: torch.device) -> Sums:
        """The sums over `mine` of the patches, and of the cases: Dice is that over a case's whole box."""
        recipe, size = self.recipe, self.recipe.training.batch_size
        batches = cut(places, size)
        loss, overlap, both = (torch.zeros(n, dtype=torch.float64) for n in (1, len(cases), len(cases)))
        for i in mine(len(batches)):
            images, labels = (t.to(device) for t in stack_patches(cases, batches[i], recipe.volume))
            fused, scales, *edges = forward(images)
            loss += len(batches[i]) * float(total_loss(fused, scales, labels, recipe.loss, *edges)[0])
        for i in mine(len(cases)):
            labels = cases[i].labels.to(device)
            found = (probabilities(lambda windows: forward(windows)[0], cases[i].images.float().to(device), recipe.volume, size) > 0.5) & (labels != 2)
            overlap[i], both[i] = (found & (labels == 1)).sum(), found.sum() + (labels == 1).sum()
        return loss, overlap, both
