"""The evaluation of a run: predicted cases are read once, one at a time, and leave every table that a report is made of."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage

from .agreement import BINS
from .errors import InputError, WMHError, some, told
from .files import read_table, write_table
from .images import is_image
from .metrics import (
    bounding_box,
    case_scores,
    chosen,
    components,
    dice_of,
    mask_at,
    reference_parts,
    volume_ml,
    voxels,
)
from .nifti import load_mask, load_volume, save_like
from .sections import Operating
from .slices import fullest, head_box, height_mm, to_display
from .uncertainty import case_uncertainty, entropy, mean_entropy
from .workspace import RunFolder

SYSTEMS = ("operating point", "recipe's point", "network at 0.5", "FLAIR z-score")
ZERO_SHOT = "zero-shot, true boxes"  # sees the reference (see `prompting`), so that it is no system to be compared with
TABLES = {
    "metrics": ("case", "site", "system", "dsc", "hd95", "avd", "recall", "f1", "reference_ml", "result_ml"),
    "lesions": ("case", "site", "kind", "voxels", "volume_mm3", "hit", "zone"),
    "zones": ("case", "site", "zone", "dsc", "reference_ml", "result_ml"),
    "calibration": ("case", "site", "bin", "voxels", "probability", "lesion", "squared"),
    "uncertainty": ("case", "site", "dsc", "entropy", "uncertainty", "unsure"),
}
PERIVENTRICULAR_MM = 10.0
_RESULTS = ("_wmh.nii.gz", "_mask.png")  # endings of a scan's mask and of an image's
_POINT = ("threshold", "min_voxels", "tta", "dsc", "se", "n", "zscore_threshold", "unsure_above", "poor_below")


@dataclass(frozen=True)
class Evaluation:
    """What evaluated cases leave: the tables of `TABLES`, and of each case its `gallery_row`.

    metrics: a row per case and system, the challenge's five scores and both volumes (other pathology in neither).
    lesions: a row per 26-connected component of the reference (`kind` "reference") and of the result at the operating
    point ("result"); `hit`: the other touches it; `zone`: "periventricular" if a voxel of it is, else "deep", "" without
    ventricles. zones: a row per case with ventricles and zone, voxels apart by the 10 mm rule. calibration: a row per case
    and bin of the probability that the operating point thresholds, over the voxels of `inner`, reference lesions and
    probabilities from 0.01, without other pathology: `voxels`, sums of `probability`, `lesion` and `squared` error.
    uncertainty: a row per case, Dice at the operating point and how unsure the network was (`uncertainty.case_uncertainty`).
    """

    metrics: pd.DataFrame
    lesions: pd.DataFrame
    zones: pd.DataFrame
    calibration: pd.DataFrame
    uncertainty: pd.DataFrame
    gallery: list[dict]

    @property
    def own(self) -> pd.DataFrame:
        """The metrics of the operating point alone."""
        return self.metrics[self.metrics.system == SYSTEMS[0]]

    @property
    def systems(self) -> pd.DataFrame:
        """The metrics of the systems that find lesions by themselves: all but `ZERO_SHOT`."""
        return self.metrics[self.metrics.system != ZERO_SHOT]

    def write(self, run: RunFolder) -> None:
        """Each table as <name>.csv in the run folder."""
        for name in TABLES:
            write_table(getattr(self, name), run.path / f"{name}.csv")


def evaluate(cases: Iterable[dict], point: dict, operating: Operating) -> Evaluation:
    """Scores predicted cases, which are read one at a time, under four systems (`system_masks`), and under `ZERO_SHOT` where
    they have a mask `zero_shot`.

    A case is a dict with `case`, `site`, `spacing` (mm), `affine` and, H x W x D on the scan's grid, `flair`, `flair_z`,
    `inner`, `reference` (0, 1, 2), `prob`, `prob_tta` (0-1) and `ventricles` (bool, or None). `point` is the operating
    point of 04_search, `operating` the recipe's own. Raises InputError for a point without one of its values, and where there
    is no case.
    """
    missing = [name for name in _POINT if name not in point]
    if missing:
        raise InputError(f"the operating point has no {', '.join(missing)}: run notebook 04_search again")
    rows, gallery = {name: [] for name in TABLES}, []
    for case in cases:
        case = case | dict(reference=np.ascontiguousarray(case["reference"]))  # arrays in one order are faster to combine
        who, spacing = dict(case=case["case"], site=case["site"]), case["spacing"]
        masks, (lesion, ignored) = system_masks(case, point, operating), reference_parts(case["reference"])
        if "zero_shot" in case:
            masks[ZERO_SHOT] = case["zero_shot"]
        scores = {system: case_scores(case["reference"], mask, spacing) for system, mask in masks.items()}
        own, first = masks[SYSTEMS[0]] & ~ignored, scores[SYSTEMS[0]]
        near = periventricular(case.get("ventricles"), spacing)
        unsure = case_uncertainty(case["prob"], case["prob_tta"])
        found = dict(
            metrics=[dict(system=system) | row for system, row in scores.items()],
            lesions=_lesions(lesion, own, near, spacing), zones=_zones(lesion, own, near, spacing),
            calibration=_calibration(case, chosen(case["prob"], case["prob_tta"], point)),
            uncertainty=[dict(dsc=first["dsc"], entropy=mean_entropy(case["prob_tta"]), uncertainty=unsure,
                              unsure=unsure > point["unsure_above"])])
        for name, more in found.items():
            rows[name] += [who | row for row in more]
        gallery.append(gallery_row(case, masks[SYSTEMS[0]], first["dsc"]) | {name: first[name] for name in ("reference_ml", "result_ml")})
    if not gallery:
        raise InputError("no case to evaluate: expected one with a reference mask at least; a run of make tune has none of its own: name labelled ones (data_dir; DATA= of make evaluate)")
    return Evaluation(**{name: pd.DataFrame(rows[name], columns=TABLES[name]) for name in TABLES}, gallery=gallery)


def system_masks(case: dict, point: dict, operating: Operating) -> dict[str, np.ndarray]:
    """The boolean masks of the four systems on one case: the network at the operating point `point` (`threshold`,
    `min_voxels`, `tta`, `min_mm3` if any) and at the recipe's own, at 0.5 with one view and no filter, and `flair_z` above
    `point["zscore_threshold"]` within `inner`."""
    found = (mask_at(case["prob"], case["prob_tta"], at, case["spacing"]) for at in (point, operating.point))
    masks = (*found, case["prob"] >= 0.5, (case["flair_z"] > point["zscore_threshold"]) & case["inner"])
    return dict(zip(SYSTEMS, masks))


def periventricular(ventricles: np.ndarray | None, spacing) -> np.ndarray | None:
    """Where a voxel's centre lies within 10 mm of one of the ventricles' (bool, H x W x D; `spacing` in mm): the usual rule,
    after DeCarli et al. 2005 (doi 10.1161/01.STR.0000150668.58689.f2), who find no natural border between the zones. None
    without ventricles or where their mask is empty."""
    if ventricles is None or not ventricles.any():
        return None
    box = bounding_box(ventricles, margin=np.ceil(PERIVENTRICULAR_MM / np.asarray(spacing)).astype(int))
    near = np.zeros(ventricles.shape, bool)
    near[box] = ndimage.distance_transform_edt(~ventricles[box], sampling=spacing) <= PERIVENTRICULAR_MM
    return near


def _lesions(lesion: np.ndarray, mask: np.ndarray, near: np.ndarray | None, spacing) -> list[dict]:
    """Rows in the order of the components' first voxels in a file, where the first axis runs fastest: all is transposed."""
    rows, (lesion, mask, near) = [], (None if volume is None else volume.T for volume in (lesion, mask, near))
    for kind, one, other in (("reference", lesion, mask), ("result", mask, lesion)):
        at, labels, count = components(one)
        sizes, touched = (np.bincount(labels[some], minlength=count + 1)[1:] for some in (..., other[at]))
        if near is None:
            zones = [""] * count
        else:
            zones = np.where(np.bincount(labels[near[at]], minlength=count + 1)[1:] > 0, "periventricular", "deep")
        rows += [dict(kind=kind, voxels=int(n), volume_mm3=n * float(np.prod(spacing)), hit=bool(hit), zone=str(zone))
                 for n, hit, zone in zip(sizes, touched, zones)]
    return rows


def _zones(lesion: np.ndarray, mask: np.ndarray, near: np.ndarray | None, spacing) -> list[dict]:
    if near is None:
        return []
    at, rows = voxels(mask), []
    reference, result = near[voxels(lesion)], near[at]  # of each voxel, whether it is
    both = result[lesion[at]]
    for zone, inside in (("periventricular", True), ("deep", False)):
        sizes = [np.count_nonzero(part == inside) for part in (reference, result, both)]
        rows.append(dict(zone=zone, dsc=float(dice_of(sizes[2], sizes[0] + sizes[1])),
                         reference_ml=volume_ml(reference == inside, spacing), result_ml=volume_ml(result == inside, spacing)))
    return rows


def _calibration(case: dict, prob: np.ndarray) -> list[dict]:
    lesion, ignored = reference_parts(case["reference"])
    where = (case["inner"] | lesion | (prob >= 0.01)) & ~ignored
    p, y = prob[where].astype(float), lesion[where]
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    sums = (np.bincount(bins, weights, BINS) for weights in (None, p, y, (p - y) ** 2))
    return [dict(bin=b, voxels=int(n), probability=q, lesion=int(k), squared=s) for b, (n, q, k, s) in enumerate(zip(*sums))]


def save_masks(cases: Iterable[dict], point: dict, folder: str | Path) -> Iterator[dict]:
    """The cases, each passed on once its mask at the operating point lies in `folder` as <case>_wmh.nii.gz: uint8, with
    the affine and header of its `volume`; of an image as <case>_mask.png, 0 and 255. At the end masks of other cases, left by an earlier evaluation, are removed."""
    kept = set()
    for case in cases:
        path = _result(folder, case["case"], case["volume"].path)
        kept.add(path)
        save_like(mask_at(case["prob"], case["prob_tta"], point, case["spacing"]).astype(np.uint8), case["volume"], path)
        yield case
    for old in {path for ending in _RESULTS for path in Path(folder).glob(f"*{ending}")} - kept:
        old.unlink()


def _result(folder: str | Path, case: str, source: str | Path) -> Path:
    return Path(folder, case + _RESULTS[is_image(source)])


def result_files(run: RunFolder, gallery: list[dict]) -> pd.DataFrame:
    """The files of the gallery's cases, for `viewer.case_files`: case, site, dsc and the paths flair, mask, result."""
    cases = run.cases().set_index("case")
    return pd.DataFrame([{"case": row["case"], "site": row["site"], "dsc": row["dsc"], **cases.loc[row["case"], ["flair", "mask"]],
                          "result": _result(run.predictions, row["case"], cases.loc[row["case"], "flair"])} for row in gallery])


def score_files(flair: str | Path, reference: str | Path, result: str | Path) -> dict[str, float]:
    """The challenge's five scores and both volumes (mL, other pathology in neither) of a mask file, lesion where it is not 0, against its
    reference, both on the grid of `flair`."""
    scan = load_volume(flair)
    return case_scores(load_mask(reference, scan), load_mask(result, scan) > 0, scan.spacing)


def gallery_row(case: dict, result: np.ndarray, dsc: float) -> dict:
    """The slice of a case with most lesion, of reference or result, cropped to the head: `case`, `site`, `dsc`, 2-D `flair`,
    `reference`, `result` and `entropy` (bits, of `prob_tta`) as shown, `spacing` (mm, rows and columns), `z_mm` (None of an `image`). Small, so that one
    can be kept of every case."""
    (flair, reference, result, prob), spacing = to_display(case["affine"], case["flair"], case["reference"], result, case["prob_tta"])
    z = fullest(reference_parts(reference)[0] | result)
    box = head_box(flair[..., z])
    flair, reference, result, prob = (volume[..., z][box].copy() for volume in (flair, reference, result, prob))
    return dict(case=case["case"], site=case["site"], dsc=float(dsc), flair=flair, reference=reference, result=result, entropy=entropy(prob),
                spacing=tuple(spacing[:2]), z_mm=None if case.get("image") else height_mm(case["affine"], case["flair"].shape, z))


def pooled(runs: Sequence[RunFolder]) -> pd.DataFrame:
    """The metrics of several runs of one recipe, such as the folds of a cross-validation, as one table that has each test case once; `run` is its run
    folder. Folds that are not among them are named. MissingStepError where a run has no metrics, InputError where recipes differ in more than
    the split, or a case was tested twice."""
    recipes = [run.recipe() for run in runs]
    strange = [run.path for run, recipe in zip(runs, recipes) if replace(recipe, split=recipes[0].split) != recipes[0]]
    if strange:
        raise InputError(f"{some(strange)} has another recipe than {runs[0].path}: expected runs that differ in their split alone; compare their recipe.json, where the path encoder.checkpoint counts too")
    table = pd.concat([read_table(run.need(run.metrics_csv, "05_report")).assign(run=str(run.path)) for run in runs], ignore_index=True)
    twice = table.loc[table.duplicated(["case", "system"]), "case"]
    if len(twice):
        raise InputError(f"{some(twice)} was tested in several of the runs: expected folds, which test each case once")
    missing = set(range(recipes[0].split.folds)) - {recipe.split.fold for recipe in recipes}
    if recipes[0].split.protocol == "k-fold" and missing:
        print(f"of {recipes[0].split.folds} folds there are no runs of {', '.join(map(str, sorted(missing)))}", flush=True)
    return table


def best_median_worst(gallery: list[dict]) -> list[dict]:
    """Three of the gallery's rows by Dice, each with its `rank`; fewer where fewer cases have a Dice, of all where none has."""
    order = sorted([row for row in gallery if np.isfinite(row["dsc"])] or gallery, key=lambda row: (-row["dsc"], row["case"]))
    places = {len(order) // 2: "median", len(order) - 1: "worst", 0: "best"}
    return [order[i] | dict(rank=places[i]) for i in sorted(places) if order]


def main(arguments: list[str] | None = None) -> int:
    """The command: the challenge's metrics of a mask file. Returns 1 where a WMHError stopped it."""
    parser = argparse.ArgumentParser(prog="python -m wmhlib.evaluation", description=main.__doc__.splitlines()[0])
    for name in ("flair", "reference", "result"):
        parser.add_argument(name, metavar=name.upper())
    given = vars(parser.parse_args(arguments))
    missing = [name.upper() for name, path in given.items() if not path]
    if missing:
        parser.error(f"{', '.join(missing)} not given: name the three files")
    try:
        print("  ".join(f"{name} {value:.3f}" for name, value in score_files(**given).items()))
    except WMHError as error:
        return told(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
