"""The operating point: threshold x component size x test-time augmentation, on validation cases only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
from scipy import ndimage

from .agreement import bootstrap_ci
from .errors import InputError
from .metrics import bounding_box, components, dice_of, reference_parts, smallest
from .sections import Operating
from .uncertainty import case_uncertainty, unsure_limit

PER_CASE = "dsc "  # columns "dsc <case>" of the search table
ZSCORES = np.round(np.arange(0.5, 6.01, 0.1), 2)
ALIKE = 0.005  # of mean Dice: points closer than that are as good
NEAR_BEST = f"within one paired standard error, or {ALIKE:g}, of the best"
_AXES = ["unit", "tta", "threshold", "size"]


def search(cases: Iterable[dict], operating: Operating) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Dice of every grid point of `operating` on validation cases, which are read once and one at a time.

    Each case is a dict with `case`, `split`, `spacing` (mm), `reference` (uint8, H x W x D, labels 0, 1, 2), `prob` (float32
    in [0, 1], one view), `prob_tta` (the same over all views), `flair_z` (float32, normalised FLAIR) and `inner` (bool, where
    the baseline may fire). A point's mask is `prob >= threshold` without components below `size`, which counts voxels or
    mm3 (`unit`), scored as `metrics.challenge_scores` does. The recipe's own point is always on the grid.

    Returns two tables. One row a point: `threshold`, `size`, `unit`, `tta`, `dsc` (mean over cases), `se` (its standard
    error), `n`, `nans` (cases without a lesion in which the point finds nothing: they have no Dice and are left out), `dsc <case>` for each
    case, and `plateau`, whether it belongs to the `plateau`. One row a case:
    `case`, `uncertainty` and `z <t>`, the Dice of `(flair_z > t) & inner`. Raises InputError for a case of another split
    than "val", the same case twice, or no case with a lesion.
    """
    thresholds = sorted({*operating.thresholds, operating.threshold})
    sizes = [("voxels", float(s)) for s in sorted({*operating.sizes, operating.min_voxels})]
    sizes += [("mm3", float(s)) for s in sorted(set(operating.sizes_mm3))]
    scores, rows, lesions = {}, [], 0
    for case in _validation(cases):
        lesion, ignored = reference_parts(np.ascontiguousarray(case["reference"]))
        lesions += lesion.any()
        smallest_kept = [smallest(_size(unit, size), case["spacing"]) for unit, size in sizes]
        scores[PER_CASE + case["case"]] = np.concatenate(
            [_dice_grid(case[prob], lesion, ignored, thresholds, smallest_kept).ravel() for prob in ("prob", "prob_tta")])
        rows.append({"case": case["case"], "uncertainty": case_uncertainty(case["prob"], case["prob_tta"]),
                     **_dice_above(case["flair_z"], case["inner"] & ~ignored, lesion)})
    if not lesions:
        raise InputError("no validation case has a lesion: expected one at least, so that points differ in Dice")
    grid = pd.DataFrame([(threshold, size, unit, tta) for tta in (False, True) for threshold in thresholds for unit, size in sizes],
                        columns=["threshold", "size", "unit", "tta"])
    per_case = pd.DataFrame(scores)
    n = per_case.count(axis=1)
    summary = pd.DataFrame({"dsc": per_case.mean(axis=1), "se": per_case.std(axis=1) / np.sqrt(n), "n": n,
                            "nans": len(scores) - n})
    table = pd.concat([grid, summary, per_case], axis=1)
    return table.assign(plateau=plateau(table)), pd.DataFrame(rows)


def plateau(table: pd.DataFrame) -> pd.Series:
    """Which points of a search table form its plateau: the largest connected region of near-best points.

    Near-best: below the best mean by at most the standard error of the paired difference between the two points' Dice, or by ALIKE where
    that is more, and never by more than the best mean's own error: a point that ruins one case has a large error itself.
    Connected: neighbours in threshold or in size, with the same TTA and unit of size; of two regions of one extent the one with the
    higher mean Dice. A lone spike therefore loses to a plateau it does not clearly beat.
    """
    best = table.dsc.idxmax()
    per_case = table[[c for c in table if c.startswith(PER_CASE)]]
    paired = per_case.loc[best] - per_case
    error = np.fmin(np.fmax(paired.std(axis=1) / np.sqrt(paired.count(axis=1)), ALIKE), table.se[best])
    near = (table.dsc >= table.dsc[best] - error - 1e-12).to_numpy()
    cell = tuple(_steps(table).to_numpy().T)
    grid = np.zeros([axis.max() + 1 for axis in cell], bool)
    grid[cell] = near
    neighbours = np.zeros((3, 3, 3, 3), bool)
    neighbours[1, 1] = ndimage.generate_binary_structure(2, 1)
    region = ndimage.label(grid, neighbours)[0][cell]
    largest = max(sorted(set(region[near])), key=lambda r: ((region == r).sum(), table.dsc[region == r].mean()))
    return pd.Series(region == largest, index=table.index)


def choose(table: pd.DataFrame, validation: pd.DataFrame, prefer: str = "centre") -> dict:
    """The operating point of the two tables of `search`: the point of the `plateau` nearest the plateau's centre.

    Distances count grid steps; of points equally near the one with the higher Dice. With `prefer` "sensitive" its threshold is then
    lowered as far as the mean Dice stays within one standard error of the best: for scanners that no validation case comes from,
    where a network's probabilities fall. Returns plain values: `threshold`,
    `min_voxels` and `min_mm3` (both must be reached), `tta`, `dsc` and `se` (mean validation Dice and its standard error; None
    for one case), `n`, `best_dsc` (of the best single point), `plateau_points`; `zscore_threshold`, the baseline's with the
    best mean Dice; `unsure_above` and `poor_below`, the limits of the flag for unsure cases (`uncertainty.unsure_limit`).
    """
    inside = table.index[plateau(table)]
    steps = _steps(table).loc[inside, ["threshold", "size"]]
    distance = ((steps - steps.mean()) ** 2).sum(axis=1).round(9)
    row = table.loc[inside].assign(distance=distance).sort_values(["distance", "dsc"], ascending=[True, False]).iloc[0]
    if prefer == "sensitive":
        best = table.loc[table.dsc.idxmax()]
        alike = (table[["unit", "size", "tta"]] == row[["unit", "size", "tta"]]).all(axis=1)
        row = table[alike & (table.dsc >= np.fmin(best.dsc - best.se, row.dsc))].sort_values("threshold").iloc[0]
    dice = row[[PER_CASE + case for case in validation.case]].to_numpy(float)
    zscores = validation[[c for c in validation if c.startswith("z ")]].mean().fillna(-1)
    return dict(threshold=float(row.threshold), **_size(row.unit, row["size"]), tta=bool(row.tta), dsc=float(row.dsc),
                se=float(row.se) if row.n > 1 else None, n=int(row.n), best_dsc=float(table.dsc.max()),
                plateau_points=len(inside), zscore_threshold=float(zscores.idxmax().removeprefix("z ")),
                **unsure_limit(validation.uncertainty.to_numpy(), dice))


def compare(table: pd.DataFrame, point: dict, operating: Operating, seed: int) -> pd.DataFrame:
    """The chosen `point` and the recipe's own on the same validation cases: mean Dice and its difference to the choice, each
    with its 95 % bootstrap interval over cases (`seed`). In the difference two empty masks count as Dice 1, as in `agreement.compare_systems`."""
    per_case = table[[c for c in table if c.startswith(PER_CASE)]]
    chosen, rows = per_case.loc[_row(table, point)], []
    for name, at in (("chosen", point), ("recipe", operating.point)):
        dice = per_case.loc[_row(table, at)]
        rows.append({"point": name, **{key: at[key] for key in operating.point},
                     **dict(zip(("dsc", "low", "high", "left_out"), bootstrap_ci(dice, seed))),
                     **dict(zip(("difference", "difference_low", "difference_high"), bootstrap_ci(dice.fillna(1) - chosen.fillna(1), seed)))})
    return pd.DataFrame(rows)


def _validation(cases: Iterable[dict]) -> Iterator[dict]:
    """The cases, checked to be different ones, all of the validation split, and at least one."""
    seen = set()
    for case in cases:
        if case["split"] != "val":
            raise InputError(f"case {case['case']} is of the split {case['split']!r}: the operating point is chosen on "
                             "validation cases ('val') only, so that the test cases stay unseen")
        if case["case"] in seen:
            raise InputError(f"case {case['case']} came twice: expected each validation case once")
        seen.add(case["case"])
        yield case
    if not seen:
        raise InputError("no validation case to search on: expected at least one case with split 'val'")


def _size(unit: str, size: float) -> dict:
    return dict(min_voxels=int(size) if unit == "voxels" else 1, min_mm3=float(size) if unit == "mm3" else 0.0)


def _row(table: pd.DataFrame, point: dict) -> int:
    """The row of the search table that is `point`."""
    unit, size = ("mm3", point["min_mm3"]) if point["min_mm3"] else ("voxels", point["min_voxels"])
    at = (table.unit == unit) & np.isclose(table["size"], size) & np.isclose(table.threshold, point["threshold"])
    return table.index[at & (table.tta == point["tta"])][0]


def _steps(table: pd.DataFrame) -> pd.DataFrame:
    """Each point's place on the grid, in steps along its axes."""
    steps = table[_AXES].assign(unit=table.unit == "mm3", tta=table.tta.astype(bool)).astype(float).rank(method="dense")
    return steps.assign(size=table.groupby("unit")["size"].rank(method="dense")).astype(int)


def _dice_grid(prob: np.ndarray, lesion: np.ndarray, ignored: np.ndarray, thresholds: list, sizes: list) -> np.ndarray:
    """Dice of one case, thresholds (ascending) x sizes (voxels), NaN where there is no lesion and none is found.

    Each threshold is labelled once, in the box of its own voxels. What a smallest size keeps follows from how many voxels
    each component has, of all, of the lesion and of those that count.
    """
    lesion_size = np.count_nonzero(lesion)
    dice = np.empty((len(thresholds), len(sizes)))
    box = bounding_box(prob >= thresholds[0])
    prob, lesion, counts, sizes = np.ascontiguousarray(prob[box]), lesion[box], ~ignored[box], np.asarray(sizes)
    for row, threshold in enumerate(thresholds):
        at, labels, count = components(prob >= threshold)
        whole, hit, counted = (np.bincount(labels[part], minlength=count + 1) for part in (..., lesion[at], counts[at]))
        kept = whole >= sizes[:, None]
        dice[row] = dice_of(kept @ hit, lesion_size + kept @ counted)
    return dice


def _dice_above(flair_z: np.ndarray, allowed: np.ndarray, lesion: np.ndarray) -> dict[str, float]:
    """Dice of `flair_z > t` within `allowed`, by "z <t>" for every t of ZSCORES."""
    levels = ZSCORES.astype(np.float32)

    def above(values: np.ndarray) -> np.ndarray:
        passed = np.bincount(np.searchsorted(levels, values[values > levels[0]]), minlength=len(levels) + 1)
        return np.cumsum(passed[::-1])[::-1][1:]

    dice = dice_of(above(flair_z[allowed & lesion]), int(lesion.sum()) + above(flair_z[allowed]))
    return dict(zip((f"z {t:g}" for t in ZSCORES), dice.tolist()))
