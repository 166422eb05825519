"""`WMHInferenceEngine`: from a scan to probabilities, a mask and a lesion table on the scan's own grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from .canvas import from_canvas, neighbours
from .cohort import load_ventricles
from .errors import CheckpointError, InputError
from .metrics import dice_of, filter_components, mask_at, reference_parts
from .network import load_network
from .precision import autocast, best_device, enough_memory, native_precision
from .sections import Inputs
from .trained import TrainedNet
from .uncertainty import case_uncertainty
from .volumes import Case, brain_slices, case_canvas, load_case
from .workspace import RunFolder, same_split

# The views of test-time augmentation as (quarter turns, mirrored, degrees, zoom): none, left-right, both flips, all of D4; and upright heads, mirrored or
# not, tilted and of other sizes.
_POSES = ((0.0, 1.0), (-12.0, 1.0), (12.0, 1.0), (0.0, 0.9), (0.0, 1.12))
VIEWS = {1: ((0, False),), 2: ((0, False), (0, True)), 4: tuple((turns, flip) for flip in (False, True) for turns in (0, 2)),
          8: tuple((turns, flip) for flip in (False, True) for turns in range(4)),
         10: tuple((0, flip, *pose) for flip in (False, True) for pose in _POSES)}


@dataclass(frozen=True)
class Prediction:
    """A case and its maps on the scan's own grid, float32 H x W x D: the probability of the plain view and its mean
    over all views (TTA; without it the plain view again). `skipped`: how many slices were not looked at, since they show no brain or lie outside
    the box of a network of volumes. `members`: of an ensemble, how unsure each member is. Raises InputError where a probability is no number."""

    case: Case
    prob: np.ndarray
    prob_tta: np.ndarray
    skipped: int
    members: tuple[float, ...] = ()

    def __post_init__(self):
        if not np.isfinite(self.prob_tta).all():
            raise InputError(f"{self.case.volume.path} got probabilities that are no numbers, as fp16 gives where values grow large: predict it on a processor, "
                             "or on a GPU with bf16")

    @property
    def uncertainty(self) -> float:
        """`case_uncertainty`; of an ensemble, whose limit is the mean of its members', the mean of theirs."""
        return float(np.mean(self.members)) if self.members else case_uncertainty(self.prob, self.prob_tta)


class WMHInferenceEngine:
    """Runs a trained network, of slices or of volumes, over whole scans.

    model: the network, of which the engine runs a merged copy (`for_inference`); device: where it runs, the GPU if there is one;
    img_size: side of the canvas in pixels, the recipe's unless given; point: operating point (threshold, min_voxels, min_mm3, tta), the recipe's unless given.
    """

    def __init__(self, model: TrainedNet, device: str | torch.device | None = None, img_size: int | None = None,
                 point: dict | None = None):
        self.recipe = model.recipe
        self.device = best_device(device)
        self.model = model.eval()
        self.precision = native_precision(self.recipe.training.precision, self.device)
        self._network = model.for_inference(self.precision).to(self.device)
        self.img_size = img_size or self.recipe.inputs.img_size
        if self.img_size % 16:
            raise InputError(f"img_size {self.img_size} is impossible: expected a multiple of 16 pixels")
        self.point = self.recipe.operating.point | (point or {})

    @classmethod
    def from_run(cls, run: RunFolder | str | Path, device: str | torch.device | None = None, at_point: bool = True) -> WMHInferenceEngine:
        """The best weights of a run, with the views of its recipe.json, and (`at_point`) its operating point where 04_search has left one. Raises
        CheckpointError for weights that were trained on another split than the run's, whose test cases they may know, and for a point that was
        chosen with other weights."""
        run = run if isinstance(run, RunFolder) else RunFolder(run)
        model, split = load_network(run.need(run.best, "03_train"), run.recipe().encoder.checkpoint)
        if run.split_csv.exists() and split and not same_split(split, run.split_text()):
            raise CheckpointError(f"{run.best} was trained on another split than {run.split_csv} has now: its test cases may have "
                                  "been seen. Use another run folder, or delete checkpoints and weights of this one and train again")
        model.recipe = replace(model.recipe, operating=run.recipe().operating)
        point = run.point(model.fingerprint()) if at_point and run.operating_point.exists() else None
        return cls(model, device, point=point)

    @enough_memory("leave it to this prediction, or set operating.batch_size lower in recipe.json")
    def predict(self, case: Case, use_tta: bool = True) -> Prediction:
        """Probabilities of every voxel of `case`; slices that show no brain are 0 and skipped, and so is what lies outside the box of a network
        of volumes (`volumetric.windows.predict_box`).

        Slices are read, predicted and written back in groups: beside the scan's own arrays no more than `operating.batch_size`
        canvases are held (or those of one slice's views), whatever the number of slices.
        """
        if self.recipe.volume.network:
            from .volumetric.windows import predict_box  # here, since nothing else needs MONAI

            return Prediction(case, *predict_box(self._logits, case, self.recipe, self.recipe.operating.views if use_tta else 1, self.device))
        plain, mean = (np.zeros(case.grid.shape, np.float32) for _ in range(2))
        filled, context = brain_slices(case), self.recipe.inputs.context
        views = VIEWS[self.recipe.operating.views if use_tta else 1]
        for places in filled.split(max(1, self.recipe.operating.batch_size // len(views))):
            near, number = neighbours(places, context, case.grid.depth).unique(return_inverse=True)
            batch = case_canvas(case, self.img_size, near)[:, number].transpose(0, 1).flatten(1, 2)
            probabilities = self._views(batch.to(self.device), views)
            for out, canvas in ((plain, probabilities[0]), (mean, probabilities.mean(0))):
                from_canvas(canvas, case.grid, places, out)
        for out in (plain, mean):
            np.clip(out, 0, 1, out=out)  # the weights of a resize add up to 1 but for rounding
        return Prediction(case, plain, mean, case.grid.depth - len(filled))

    @torch.inference_mode()
    def _views(self, batch: Tensor, views: Sequence[tuple]) -> Tensor:
        """B x C x S x S -> probabilities views x B x S x S, each turned back; the first is the plain view."""
        turned = torch.cat([turn(batch, *view) for view in views])
        logits = [self._logits(some) for some in turned.split(self.recipe.operating.batch_size)]
        probabilities = torch.sigmoid(torch.cat(logits).float())[:, 0].unflatten(0, (len(views), -1))
        return torch.stack([unturn(x, *view) for x, view in zip(probabilities, views)])

    @torch.inference_mode()
    def _logits(self, batch: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            return self._network(batch)[0]

    def plain_mask(self, case: Case) -> np.ndarray:
        """The mask (bool) of one view at 0.5, nothing filtered or chosen: for comparisons that favour nobody."""
        return self.predict(case, use_tta=False).prob >= 0.5

    def predict_volume_probs(self, flair: str | Path, use_tta: bool = True,
                             t1: str | Path | None = None) -> tuple[np.ndarray, nib.Nifti1Image]:
        """Lesion probability (float32 H x W x D in [0, 1]) of a scan's file, and the image whose grid it lies on."""
        prediction = self.predict(load_case(flair, t1, inputs=self.recipe.inputs), use_tta)
        return prediction.prob_tta, prediction.case.volume.image

    @staticmethod
    def apply_threshold(prob: np.ndarray, threshold: float = 0.60) -> np.ndarray:
        """Boolean mask of the voxels with a probability of `threshold` or more."""
        return prob >= threshold

    @staticmethod
    def cc_filter(mask: np.ndarray, min_v: int = 3) -> np.ndarray:
        """The mask without its 26-connected components of fewer than `min_v` voxels."""
        return filter_components(mask, min_v)

    def segment(self, prediction: Prediction) -> np.ndarray:
        """The mask (bool) at the engine's operating point."""
        return mask_at(prediction.prob, prediction.prob_tta, self.point, prediction.case.volume.spacing)

    def cases(self, run: RunFolder, split: str, progress: bool = True) -> Iterator[dict]:
        """Each case of one side of the run's split, predicted: what `search` and `evaluation` read, one at a time."""
        rows = run.cases().query("split == @split")
        for row in tqdm(rows.itertuples(), f"predicting {split} cases", len(rows), disable=not progress, mininterval=10):
            case = load_case(row.flair, row.t1, row.mask, self.recipe.inputs)
            prediction = self.predict(case)
            contrast = np.abs(case.images.mean(0)) if self.recipe.inputs.images else case.images[0]  # vessels may be dark or bright
            contrast = -contrast if self.recipe.inputs.t1_alone else contrast
            yield {"case": row.case, "site": row.site, "split": split, "spacing": case.volume.spacing,
                   "affine": case.volume.affine, "volume": case.volume, "flair": case.volume.data, "flair_z": contrast, "normalised": case.images,
                   "inner": case.inner, "reference": case.mask, "prob": prediction.prob, "prob_tta": prediction.prob_tta,
                   "ventricles": load_ventricles(getattr(row, "ventricles", ""), case.volume), "grid": case.grid, "image": self.recipe.inputs.images}


def plain_dice(row, segment: Callable[[Case], np.ndarray], inputs: Inputs) -> float:
    """Dice of the mask (bool H x W x D) that `segment` makes of a case, a row with flair, t1 and mask; other pathology is left
    out, and NaN where reference and result are empty."""
    case = load_case(row.flair, row.t1, row.mask, inputs)
    lesion, ignored = reference_parts(case.mask)
    found = segment(case) & ~ignored
    return float(dice_of((lesion & found).sum(), lesion.sum() + found.sum()))


def turn(x: Tensor, turns: int, flip: bool, degrees: float = 0.0, zoom: float = 1.0) -> Tensor:
    """One element of D4, the symmetries of the square: mirror columns if `flip`, then `turns` quarter turns. Then, about the middle, by `degrees` and
    `zoom` times larger, bilinear."""
    return _pose(torch.rot90(x.flip(-1) if flip else x, turns, (-2, -1)), degrees, zoom)


def unturn(x: Tensor, turns: int, flip: bool, degrees: float = 0.0, zoom: float = 1.0) -> Tensor:
    """The inverse of `turn`, but for what has left the image and what a resize blurs."""
    x = torch.rot90(_pose(x, -degrees, 1 / zoom), -turns, (-2, -1))
    return x.flip(-1) if flip else x


def _pose(x: Tensor, degrees: float, zoom: float) -> Tensor:
    if (degrees, zoom) == (0, 1):
        return x
    cos, sin = (f(math.radians(degrees)) / zoom for f in (math.cos, math.sin))
    images = x.reshape(-1, 1, *x.shape[-2:])
    grid = F.affine_grid(x.new_tensor([[cos, -sin, 0], [sin, cos, 0]]).expand(len(images), -1, -1), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False).reshape(x.shape)
