"""What a training of slices and one of volumes do in their own ways, each a plain class with the same few methods."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from .batches import augment, draw_slices, drop_modalities, few_slices, stack_slices
from .errors import InputError
from .losses import total_loss
from .seeds import stable_seed
from .settings import Recipe
from .slicestore import CaseSlices, load_slices

Forward = Callable[[Tensor], tuple[Tensor, list[Tensor], *tuple[Tensor, ...]]]  # images -> (logits, those at the scales, perhaps those of borders)
Sums = tuple[Tensor, Tensor, Tensor]  # validation loss over the places; of each case voxels in both masks, and in one plus in the other


class Slices:
    """Axial slices on the canvas; a place is (case, slice)."""

    one, many, stored = "slice", "slices", "slices"  # what messages call a place, several, and what is kept on disk
    smaller = "inputs.img_size, inputs.context or encoder"  # settings to lower where one does not fit
    batchnorm = True  # of the trained parts

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.size = f"{recipe.inputs.img_size} px"

    def shapes(self, batch_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the images and labels of a micro-batch."""
        side = self.recipe.inputs.img_size
        return (batch_size, self.recipe.inputs.channels, side, side), (batch_size, 1, side, side)

    def load(self, rows: pd.DataFrame, progress: bool) -> list[CaseSlices]:
        return load_slices(rows, self.recipe.inputs, progress)

    def places(self, cases: list[CaseSlices], epoch: int) -> list[tuple[int, int]]:
        """What `epoch` (from 1) trains on."""
        training, seed = self.recipe.training, self.recipe.seed
        if training.slices:
            return few_slices(cases, training.slices, training.train_negatives, seed)
        return draw_slices(cases, training.train_negatives, stable_seed(seed, "slices", epoch))

    def validation_places(self, train: list[CaseSlices], val: list[CaseSlices]) -> list[tuple[int, int]]:
        """What every validation looks at. Raises InputError where no case has a lesion there, or to train on, and where `pretext` wants
        tissue labels that no case to train on has."""
        for part, cases in (("training", train), ("validation", val)):
            if not any(len(case.lesions()) for case in cases):
                raise InputError(f"no {part} case has a lesion: add cases with lesions, or split these otherwise, in another run folder (seed, split.val)")
        if (self.recipe.pretext.tissue or self.recipe.pretext.prompts) and not any((case.labels > 2).any() for case in train):
            raise InputError("the training cases have no tissue labels, which pretext losses need: set cohort.scanners to 'mixed'")
        return draw_slices(val, self.recipe.training.val_negatives, self.recipe.seed)

    def batch(self, cases: list[CaseSlices], places: list[tuple[int, int]], device: torch.device, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and labels of a micro-batch on `device`, changed at random."""
        images, labels = (t.to(device) for t in stack_slices(cases, places, self.recipe.inputs.context))
        images, labels = augment(images, labels, self.recipe.augment, generator)
        return drop_modalities(images, self.recipe.inputs, generator), labels

    def validate(self, forward: Forward, cases: list[CaseSlices], places: list[tuple[int, int]], mine: Callable[[int], range],
                 device: torch.device) -> Sums:
        """The sums over `mine` of the micro-batches of `places`: Dice is that over a case's drawn slices."""
        batches = cut(places, self.recipe.training.batch_size)
        loss, overlap, both = (torch.zeros(n, dtype=torch.float64) for n in (1, len(cases), len(cases)))
        for i in mine(len(batches)):
            images, labels = (t.to(device) for t in stack_slices(cases, batches[i], self.recipe.inputs.context))
            fused, scales = forward(images)
            loss += len(batches[i]) * float(total_loss(fused, scales, labels, self.recipe.loss)[0])
            found, lesion = (fused > 0) & (labels != 2), labels == 1
            number = torch.tensor([case for case, _ in batches[i]])
            overlap.index_add_(0, number, (found & lesion).sum((1, 2, 3)).double().cpu())
            both.index_add_(0, number, (found.sum((1, 2, 3)) + lesion.sum((1, 2, 3))).double().cpu())
        return loss, overlap, both


def cut(places: list, size: int) -> list[list]:
    """`places` in batches of `size`; the last holds what is left."""
    return [places[first : first + size] for first in range(0, len(places), size)]


def task_of(recipe: Recipe):
    """`Slices`, or `volumetric.task.Patches` where the recipe has a network of volumes."""
    if not recipe.volume.network:
        return Slices(recipe)
    from .volumetric.task import Patches  # here, since nothing else needs MONAI

    return Patches(recipe)
