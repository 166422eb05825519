"""The operating point: threshold x component size x test-time augmentation, on validation cases only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
from scipy import ndimage

from .errors import InputError
from .metrics import label_components, reference_parts
from .settings import Operating

PER_CASE = "dsc "  # columns "dsc <case>" of the search table
ZSCORES = np.round(np.arange(0.5, 6.01, 0.1), 2)


def search(cases: Iterable[dict], operating: Operating) -> pd.DataFrame:
    """Dice of every grid point of `operating` (thresholds x sizes x with and without TTA) on validation cases.

    Each case is a dict with `case`, `split`, `reference` (uint8, H x W x D, labels 0, 1, 2), `prob` (float32 in [0, 1],
    one view) and `prob_tta` (the same over all views); they are read one at a time. A point's mask is
    `prob >= threshold` without components below `min_voxels`, scored as `metrics.challenge_scores` does.

    Returns one row a point: `threshold`, `min_voxels`, `tta`, `dsc` (mean over cases), `se` (its standard error), `n`,
    `nans` (cases with neither lesion nor result, left out) and `dsc <case>` for each case. Raises InputError for a case
    of another split than "val", the same case twice, or no case at all.
    """
    scores = {}
    for case in _validation(cases):
        reference = reference_parts(case["reference"])
        scores[PER_CASE + case["case"]] = np.concatenate(
            [_dice_grid(case[prob], *reference, operating).ravel() for prob in ("prob", "prob_tta")])
    grid = pd.MultiIndex.from_product([(False, True), sorted(operating.thresholds), sorted(operating.sizes)],
                                      names=["tta", "threshold", "min_voxels"])
    table, per_case = grid.to_frame(index=False), pd.DataFrame(scores)
    n = per_case.count(axis=1)
    summary = pd.DataFrame({"dsc": per_case.mean(axis=1), "se": per_case.std(axis=1) / np.sqrt(n), "n": n,
                            "nans": len(scores) - n})
    return pd.concat([table[["threshold", "min_voxels", "tta"]], summary, per_case], axis=1)


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


def _dice_grid(prob: np.ndarray, lesion: np.ndarray, ignored: np.ndarray, operating: Operating) -> np.ndarray:
    """Dice of one case, thresholds x sizes (both ascending); each threshold's components are labelled once."""
    thresholds, sizes = sorted(operating.thresholds), sorted(operating.sizes)
    lesion_size = int(lesion.sum())
    dice = np.full((len(thresholds), len(sizes)), np.nan)
    box = (ndimage.find_objects((prob >= thresholds[0]).astype(np.uint8)) or [None])[0] or np.s_[:0, :0, :0]
    prob, lesion, ignored = prob[box], lesion[box], ignored[box]
    for row, threshold in enumerate(thresholds):
        mask = prob >= threshold
        labels, count = label_components(mask) if mask.any() else (np.zeros(mask.shape, int), 0)
        whole = np.bincount(labels[mask], minlength=count + 1)[1:]
        counted = np.bincount(labels[mask & ~ignored], minlength=count + 1)[1:]
        hit = np.bincount(labels[mask & lesion], minlength=count + 1)[1:]
        # Components in order of size: what a minimum size leaves is the tail of a cumulative sum.
        order = np.argsort(whole)
        tails = [np.append(np.cumsum(x[order][::-1])[::-1], 0) for x in (hit, counted)]
        both, result = (tail[np.searchsorted(whole[order], sizes)] for tail in tails)
        np.divide(2 * both, lesion_size + result, out=dice[row], where=lesion_size + result > 0)
    return dice


def plateau(table: pd.DataFrame) -> pd.Series:
    """Which points of a search table form its plateau: the largest connected region of near-best points.

    Near-best: at most one standard error below the best mean, the error taken on the paired differences between the
    two points' Dice over cases. Connected: neighbours in threshold or in size, with the same TTA; of two regions of one
    extent the one with the higher mean Dice. A lone spike therefore loses to a plateau it does not clearly beat.
    """
    best = table.dsc.idxmax()
    per_case = table[[c for c in table if c.startswith(PER_CASE)]]
    paired = per_case.loc[best] - per_case
    error = (paired.std(axis=1) / np.sqrt(paired.count(axis=1))).fillna(0)
    near = (table.dsc >= table.dsc[best] - error - 1e-12).to_numpy()
    cell = tuple(table[["tta", "threshold", "min_voxels"]].astype(float).rank(method="dense").astype(int).to_numpy().T)
    grid = np.zeros([axis.max() + 1 for axis in cell], bool)
    grid[cell] = near
    neighbours = ndimage.generate_binary_structure(3, 1)
    neighbours[[0, 2]] = False
    region = ndimage.label(grid, neighbours)[0][cell]
    largest = max(set(region[near]), key=lambda r: ((region == r).sum(), table.dsc[region == r].mean()))
    return pd.Series(region == largest, index=table.index)


def choose(table: pd.DataFrame) -> dict:
    """The operating point of a search table: the point of its `plateau` nearest the plateau's centre.

    Distances count grid steps; of points equally near the one with the higher Dice. Returns plain values: `threshold`,
    `min_voxels`, `tta`, `dsc` and `se` (mean validation Dice and its standard error; None for one case), `n`,
    `best_dsc` (of the best single point) and `plateau_points`. Raises InputError where no point has a Dice.
    """
    if not table.dsc.notna().any():
        raise InputError("no point of the search table has a Dice: no validation case has a lesion")
    steps = table[["threshold", "min_voxels"]].rank(method="dense")
    inside = table.index[plateau(table)]
    distance = ((steps.loc[inside] - steps.loc[inside].mean()) ** 2).sum(axis=1).round(9)
    row = table.loc[inside].assign(distance=distance).sort_values(["distance", "dsc"], ascending=[True, False]).iloc[0]
    return dict(threshold=float(row.threshold), min_voxels=int(row.min_voxels), tta=bool(row.tta), dsc=float(row.dsc),
                se=float(row.se) if row.n > 1 else None, n=int(row.n), best_dsc=float(table.dsc.max()),
                plateau_points=len(inside))


def tune_zscore(cases: Iterable[dict], thresholds=ZSCORES) -> float:
    """The FLAIR z-score baseline: the t of the best mean Dice of `(flair_z > t) & inner` on validation cases.

    Each case is a dict with `case`, `split`, `reference` (H x W x D, labels 0, 1, 2), `flair_z` (float32, normalised
    FLAIR) and `inner` (bool, where the baseline may fire). `thresholds` ascend. Raises InputError as `search` does.
    """
    levels = np.asarray(thresholds, np.float32)

    def above(values: np.ndarray) -> np.ndarray:
        """How many of the values lie above each level."""
        passed = np.bincount(np.searchsorted(levels, values[values > levels[0]]), minlength=len(levels) + 1)
        return np.cumsum(passed[::-1])[::-1][1:]

    dice = []
    for case in _validation(cases):
        lesion, ignored = reference_parts(case["reference"])
        allowed = case["inner"] & ~ignored
        both, result = above(case["flair_z"][allowed & lesion]), above(case["flair_z"][allowed])
        total = int(lesion.sum()) + result
        dice.append(np.divide(2 * both, total, out=np.full(len(levels), np.nan), where=total > 0))
    mean = pd.DataFrame(dice).mean().fillna(-1)
    return float(thresholds[int(mean.to_numpy().argmax())])
