"""A base as it is, asked with points and boxes: SAM's promptable path over scans, and the zero-shot baseline of a report.

Nothing here was adapted to lesions. With the reference's own boxes it tells how far the base's features alone can go, once
somebody has said where every lesion lies: no competitor of a method that has to find them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from nibabel.orientations import apply_orientation, ornt_transform
from scipy import ndimage
from torch import Tensor

from .canvas import LPS, Grid, from_canvas
from .errors import CheckpointError, InputError
from .evaluation import ZERO_SHOT
from .medsam import PATCH, ImageEncoder, load_checkpoint
from .metrics import reference_parts
from .network import base_channel_adapter
from .precision import autocast, best_device, native_precision
from .promptable import Prompts, promptable_of, three_channels
from .settings import Recipe
from .volumes import Case, case_canvas

_MARGIN = 0.005  # of the canvas around a box: a pixel of 208, five of 1024
_SLICES, _PROMPTS = 4, 16  # of a forward pass


class PromptEngine:
    """The frozen base of `recipe`, before any adaptation, with its prompt encoder and mask decoder.

    It sees the FLAIR at its own size, `16 * encoder.grid` pixels. Raises CheckpointError, saying why, for a base that answers no prompts.
    """

    def __init__(self, recipe: Recipe, device: str | torch.device | None = None):
        path = recipe.encoder.checkpoint
        if not path:
            raise CheckpointError("the base has random weights, which answer no prompts")
        self.encoder = ImageEncoder(recipe.encoder)
        others = load_checkpoint(self.encoder, path)
        self.promptable, self.adapter = promptable_of(others, path), base_channel_adapter(others, 1, path)
        self.device = best_device(device)
        for part in filter(None, (self.promptable, self.adapter, self.encoder)):
            part.to(self.device).eval().requires_grad_(False)
        self.pixels = recipe.encoder.pixels
        self.size, self.precision = PATCH * recipe.encoder.grid, native_precision(recipe.training.precision, self.device)

    def zero_shot(self, case: Case) -> np.ndarray:
        """Bool H x W x D on the scan's grid: the masks of all lesions of `case.mask`, each asked for by its true box on each slice."""
        if case.mask is None:
            raise InputError(f"{case.volume.path} has no reference to take boxes from: give its mask")
        numbers, boxes = lesion_boxes(case.mask, case.grid)
        out = np.zeros(case.grid.shape, np.float32)
        if not len(numbers):
            return out > 0
        for places in torch.from_numpy(numbers).unique().split(_SLICES):
            asked = np.isin(numbers, places.numpy())
            image = torch.searchsorted(places, torch.from_numpy(numbers[asked]))
            prompts, features = Prompts.of_boxes(image, _box_pixels(boxes[asked], case.grid, self.size)), self._features(case, places)
            union = torch.full((len(places), self.size, self.size), -torch.inf)
            for some in torch.arange(len(prompts)).split(_PROMPTS):
                for number, logits in zip(image[some], self._ask(features, prompts[some])[0]):
                    torch.maximum(union[number], logits, out=union[number])
            from_canvas(torch.sigmoid(union), case.grid, places, out)
        return out >= 0.5

    def segment_prompted(self, case: Case, number: int, boxes: Sequence | None = None, points: Sequence | None = None,
                         labels: Sequence | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Masks of the objects that prompts on one axial slice ask for, and the base's own estimate of their IoU.

        number: the slice, counted along the array's axial axis; boxes: N x 4, first and last voxel of each object along the
        slice's two axes, (a0, b0, a1, b1); or points: N x P x 2 voxels (a, b), with labels N x P, 1 inside the object, 0 outside, -1 none
        (all inside unless given). Returns bool N x A x B, on the slice as it lies in the file, and float32 N. Raises InputError for a
        slice or a place that the scan does not have, and unless either boxes or points are given.
        """
        expected = "expected either boxes (N x 4) or points (N x P x 2), these with labels (N x P) if any"
        try:
            given, kinds = np.asarray(points if boxes is None else boxes, float), np.asarray(1 if labels is None else labels)
        except (TypeError, ValueError):  # ragged, or no numbers
            raise InputError(expected) from None
        fits = given.shape[1:] == (4,) if points is None else given.ndim == 3 and given.shape[2] == 2
        if (boxes is None) == (points is None) or not given.size or not fits or labels is not None and kinds.shape != given.shape[:2]:
            raise InputError(expected)
        if not np.isin(kinds, (-1, 0, 1)).all():
            raise InputError(f"labels of points are {', '.join(map(str, np.unique(kinds)))}: expected 1 (inside), 0 (outside) or -1 (none)")
        given = given.reshape(len(given), -1, 2)
        axis, turn = case.grid.axis, ornt_transform(case.grid.orientation, LPS).astype(int)
        shape = np.delete(case.grid.shape, axis)
        if number not in range(case.grid.depth) or not ((given >= 0) & (given < shape)).all():
            raise InputError(f"a prompt lies outside of the scan: expected a slice from 0 to {case.grid.depth - 1} and voxels "
                             f"of 0 to {' and '.join(str(n - 1) for n in shape)}")
        mirrored = turn[axis, 1] < 0
        place = torch.tensor([case.grid.depth - 1 - int(number) if mirrored else int(number)])
        voxels = _to_lps(given, np.delete(turn, axis, 0), shape)
        image = torch.zeros(len(given), dtype=torch.long)
        if boxes is None:
            kinds = torch.from_numpy(np.broadcast_to(kinds, given.shape[:2]).astype(int))
            prompts = Prompts.of_points(image, _pixels(voxels, case.grid, self.size), kinds)
        else:
            ends = np.concatenate([voxels.min(1), voxels.max(1)], 1)
            prompts = Prompts.of_boxes(image, _box_pixels(ends, case.grid, self.size))
        features = self._features(case, place)
        logits, iou = (torch.cat(parts) for parts in zip(*(self._ask(features, prompts[some]) for some in torch.arange(len(prompts)).split(_PROMPTS))))
        canvas = torch.sigmoid(logits)
        stack = replace(case.grid, shape=tuple(len(given) if i == axis else n for i, n in enumerate(case.grid.shape)))
        masks = np.moveaxis(from_canvas(canvas.flip(0) if mirrored else canvas, stack), axis, 0) >= 0.5
        return masks, iou.numpy()

    @torch.inference_mode()
    def _features(self, case: Case, places: Tensor) -> Tensor:
        """The base's map of the slices `places`."""
        x = case_canvas(replace(case, images=case.images[:1]), self.size, places).transpose(0, 1).to(self.device)
        with autocast(self.device, self.precision):
            return self.encoder(self.adapter(x) if self.adapter else three_channels(x, self.pixels))

    @torch.inference_mode()
    def _ask(self, features: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Logits N x size x size and IoU (N) of the prompts on a map, on the CPU."""
        with autocast(self.device, self.precision):
            logits, iou = self.promptable(features, prompts.to(self.device))
        return F.interpolate(logits.float(), (self.size, self.size), mode="bilinear")[:, 0].cpu(), iou.float().cpu()


def open_base(recipe: Recipe, device: str | torch.device | None = None) -> tuple[PromptEngine | None, str]:
    """The base of `recipe` for `with_zero_shot`, None if it answers no prompts; and a sentence for the report that says what the baseline
    is, or why there is none."""
    if recipe.inputs.images:
        return None, "There is no zero-shot baseline: it is one of scans."
    if recipe.volume.network:
        return None, "There is no zero-shot baseline: a network of volumes has no base that could be asked."
    try:
        base = PromptEngine(recipe, device)
    except CheckpointError as error:
        return None, f"There is no zero-shot baseline: {error}."
    return base, (f"*{ZERO_SHOT}* is no competitor: it was told from the reference where every lesion lies. The base "
                  f"({Path(recipe.encoder.checkpoint).name}), not adapted to anything here, was given the true box of each lesion on each "
                  "slice. No test compares it with the others.")


def with_zero_shot(cases: Iterable[dict], base: PromptEngine | None) -> Iterator[dict]:
    """The cases that `WMHInferenceEngine.cases` gives, each with `zero_shot` (bool H x W x D) for `evaluation`; unchanged without a base."""
    for case in cases:
        if base:
            case = case | dict(zero_shot=base.zero_shot(Case(case["volume"], case["normalised"], case["inner"], case["reference"], case["grid"])))
        yield case


def lesion_boxes(reference: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The 8-connected lesions (label 1 of H x W x D) of each axial slice: the numbers of their slices on the canvas (N, rising)
    and their boxes in LPS voxels, N x 4, first and last column and row as x0, y0, x1, y1."""
    lesion = apply_orientation(reference_parts(reference)[0], ornt_transform(grid.orientation, LPS))
    plane = np.zeros((3, 3, 3), bool)
    plane[..., 1] = True
    found = ndimage.find_objects(ndimage.label(lesion, plane)[0])
    rows = sorted((z.start, x.start, y.start, x.stop - 1, y.stop - 1) for x, y, z in found)
    table = np.array(rows, int).reshape(-1, 5)
    return table[:, 0], table[:, 1:]


def _pixels(voxels: np.ndarray, grid: Grid, size: int) -> Tensor:
    """Places (..., x and y in LPS voxels) in pixels of the canvas; whole numbers are the middles of both."""
    (left, width), (top, height) = grid.columns, grid.rows
    return torch.from_numpy((voxels - (left, top) + 0.5) * (size / width, size / height) - 0.5).float()


def _box_pixels(boxes: np.ndarray, grid: Grid, size: int) -> Tensor:
    """Boxes N x 4 from first to last voxel as boxes from first to last pixel, with a margin."""
    (_, width), (_, height) = grid.columns, grid.rows
    half = np.array([0.5 - 0.5 * width / size, 0.5 - 0.5 * height / size])  # from a voxel's middle to that of its outermost pixel
    ends = _pixels(np.stack([boxes[:, :2] - half, boxes[:, 2:] + half], 1), grid, size)
    return (ends + _MARGIN * size * torch.tensor([[-1], [1]])).clamp(0, size - 1).flatten(1)


def _to_lps(places: np.ndarray, turn: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Places (..., 2) along two axes of a file as x and y in LPS voxels; `turn`: of each axis, where it goes and in which direction."""
    lps = np.empty_like(places)
    for axis, (to, direction) in enumerate(turn):
        lps[..., to] = places[..., axis] if direction > 0 else shape[axis] - 1 - places[..., axis]
    return lps

