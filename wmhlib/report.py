"""What a report says: scores of every case, tables, the rows of its gallery, captions."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from .errors import WMHError
from .metrics import SCORES, bootstrap_ci, challenge_scores, filter_components, reference_parts, volume_ml
from .slices import head_box, height_mm, to_display
from .volumes import load_mask, load_volume, save_like

SYSTEMS = ("operating point", "network at 0.5", "FLAIR z-score")
_DECIMALS = dict(dsc=2, hd95=1, avd=1, recall=2, f1=2)
_HEADS = dict(dsc="Dice", hd95="HD95 (mm)", avd="AVD (%)", recall="lesion recall", f1="lesion F1")


def system_masks(case: dict, point: dict) -> dict[str, np.ndarray]:
    """The boolean masks of the three systems on one case: the network at the operating point `point` (`threshold`,
    `min_voxels`, `tta`), at 0.5 with one view and no filter, and `flair_z` above `point["zscore_threshold"]` within
    `inner`."""
    prob = case["prob_tta"] if point["tta"] else case["prob"]
    masks = (filter_components(prob >= point["threshold"], point["min_voxels"]), case["prob"] >= 0.5,
             (case["flair_z"] > point["zscore_threshold"]) & case["inner"])
    return dict(zip(SYSTEMS, masks))


def save_masks(cases: Iterable[dict], point: dict, folder: str | Path) -> Iterator[dict]:
    """The cases, each passed on once its mask at the operating point lies in `folder` as <case>_wmh.nii.gz: uint8, with
    the affine and header of its `volume`."""
    for case in cases:
        mask = system_masks(case, point)[SYSTEMS[0]].astype(np.uint8)
        save_like(mask, case["volume"], Path(folder) / f"{case['case']}_wmh.nii.gz")
        yield case


def score_cases(cases: Iterable[dict], point: dict) -> tuple[pd.DataFrame, list[dict]]:
    """Scores of the three systems on each case, and each case's `gallery_row` at the operating point.

    A case is a dict with `case`, `site`, `spacing`, `affine` and, on the scan's grid, `flair`, `flair_z`, `inner`,
    `reference` (0, 1, 2), `prob`, `prob_tta`; they are read one at a time. The table has one row per case and system:
    `case`, `site`, `system`, the challenge's `dsc hd95 avd recall f1`, `reference_ml`, `result_ml` (other pathology in
    neither).
    """
    rows, gallery = [], []
    for case in cases:
        ignored = reference_parts(case["reference"])[1]
        for system, mask in system_masks(case, point).items():
            scores = challenge_scores(case["reference"], mask, case["spacing"])
            rows.append(dict(case=case["case"], site=case["site"], system=system, **scores,
                             reference_ml=volume_ml(case["reference"], case["spacing"]),
                             result_ml=volume_ml(mask & ~ignored, case["spacing"])))
            if system == SYSTEMS[0]:
                gallery.append(gallery_row(case, mask, scores["dsc"]))
    return pd.DataFrame(rows), gallery


def results_table(metrics: pd.DataFrame, seed: int = 42) -> pd.DataFrame:
    """One row a system: `n`, each score as "mean [low, high]" (95 % bootstrap over cases), NaNs `left out`."""
    rows = {}
    for system in [s for s in SYSTEMS if s in set(metrics.system)]:
        cases = metrics[metrics.system == system]
        row, left_out = {"n": len(cases)}, []
        for score in SCORES:
            mean, low, high, nans = bootstrap_ci(cases[score], seed)
            d = _DECIMALS[score]
            row[score] = f"{mean:.{d}f}" + (f" [{low:.{d}f}, {high:.{d}f}]" if np.isfinite(low) else "")
            left_out += [f"{score} {nans}"] * (nans > 0)
        rows[system] = row | {"left out": ", ".join(left_out) or "none"}
    return pd.DataFrame(rows).T.rename_axis("system")


def results_text(metrics: pd.DataFrame, seed: int = 42) -> str:
    """`results_table` for a terminal."""
    table = results_table(metrics, seed).rename(columns=_HEADS).reset_index()
    columns = [[name, *table[name].astype(str)] for name in table]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in zip(*columns)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def score_files(flair: str | Path, reference: str | Path, result: str | Path) -> dict[str, float]:
    """The challenge's five scores and both volumes (mL) of a mask file against its reference, both on the grid of `flair`."""
    scan = load_volume(flair)
    reference, result = load_mask(reference, scan), load_mask(result, scan)
    return challenge_scores(reference, result == 1, scan.spacing) | {
        "reference_ml": volume_ml(reference, scan.spacing), "result_ml": volume_ml(result, scan.spacing)}


def gallery_row(case: dict, result: np.ndarray, dsc: float) -> dict:
    """The slice of a case with most lesion, cropped to the head: `case`, `site`, `dsc`, 2-D `flair`, `reference`,
    `result` as shown, `spacing` (mm, rows and columns), `z_mm`. Small, so that one can be kept of every case."""
    (flair, reference, result), spacing = to_display(case["affine"], case["flair"], case["reference"], result)
    lesion = reference_parts(reference)[0]
    z = _fullest(lesion if lesion.any() else result)
    box = head_box(flair[..., z])
    flair, reference, result = (volume[..., z][box].copy() for volume in (flair, reference, result))
    return dict(case=case["case"], site=case["site"], dsc=float(dsc), flair=flair, reference=reference, result=result,
                spacing=tuple(spacing[:2]), z_mm=height_mm(case["affine"], case["flair"].shape, z))


def best_median_worst(gallery: list[dict]) -> list[dict]:
    """Three of the gallery's rows by Dice, each with its `rank`; fewer where fewer cases have a Dice."""
    order = sorted((row for row in gallery if np.isfinite(row["dsc"])), key=lambda row: (-row["dsc"], row["case"]))
    places = {len(order) // 2: "median", len(order) - 1: "worst", 0: "best"}
    return [order[i] | dict(rank=places[i]) for i in sorted(places) if order]


def _fullest(mask: np.ndarray) -> int:
    """The slice with most of the mask; the middle one where it is empty."""
    area = mask.sum((0, 1))
    return int(area.argmax()) if area.any() else mask.shape[2] // 2


_CAPTIONS = {
    "training_curves":
        "Training on {n} {data}. Good: both losses fall together and level off, validation Dice climbs to a plateau; "
        "a validation loss that rises while the training loss falls means overfitting. The star is the epoch "
        "that was kept.",
    "search_heatmap":
        "Mean Dice at every operating point tried, over {n} {data} kept for validation. Good: a broad plateau with "
        "the chosen point (star) inside it; a narrow peak would not carry over to new cases. No test case is used "
        "here.",
    "bland_altman":
        "Lesion volumes of {n} {data} kept for testing: result against reference, and their difference against their "
        "mean, with bias and limits of agreement (bands: 95 % intervals). Good: points along the identity, a bias "
        "band that holds 0, narrow limits, no trend with volume.",
    "predictions":
        "Best, median and worst by Dice of {n} {data} kept for testing, each on its slice with most lesion, lesions "
        "outlined. Good: ground truth and prediction alike, an error map that is mostly 'found', errors only at "
        "lesion borders. R and L are the patient's.",
    "split":
        "Lesion burden of {n} {data} by site and split. Good: the train, validation and test cases of a site span a "
        "similar range.",
    "cohort":
        "FLAIR slices of some of {n} {data}, a case a row, lesions outlined where a reference is given. Good: heads "
        "upright with anterior up, the patient's right (R) on the left, outlines on bright white matter.",
    "sites":
        "Dice of {n} {data} kept for testing, by site and system; bars are means. Good: the operating point above "
        "both baselines at every site, and sites level with each other.",
    "results":
        "Mean and 95 % bootstrap interval over {n} {data} kept for testing; a score that is not defined for a case "
        "is left out of the mean and counted. Good: high Dice, recall and F1, low HD95 and AVD.",
    "overlay":
        "Prediction on {data}, slices through the lesions found. Good: outlines follow bright lesions and leave "
        "cortex, septum and choroid plexus alone; probability is high inside lesions; the views disagree (spread) "
        "only at borders.",
}


def caption(name: str, data: str, n: int = 1) -> str:
    """What figure `name` shows and what good looks like, on `n` of `data` ("synthetic cases", "real scans")."""
    return _CAPTIONS[name].format(data=data, n=n)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: python -m wmhlib.report FLAIR REFERENCE RESULT")
    try:
        print("  ".join(f"{name} {value:.3f}" for name, value in score_files(*sys.argv[1:]).items()))
    except WMHError as error:
        sys.exit(f"error: {error}")
