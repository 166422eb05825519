"""How sure the network is: entropy of each voxel, one score and one flag for each case, and how often the flag is right."""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy
from scipy import special

from .agreement import FEWEST_CASES, RESAMPLES, wilson
from .errors import InputError

FAINTEST = 0.05  # probability below which a voxel says nothing about lesions


def entropy(prob: np.ndarray) -> np.ndarray:
    """Binary entropy of probabilities in bits, same shape: 0 where they are 0 or 1, 1 at 0.5."""
    return (special.entr(prob) + special.entr(1 - prob)) / np.log(2)


def mean_entropy(prob: np.ndarray) -> float:
    """Mean entropy in bits of the voxels with a probability of 0.05 or more; 0 without any."""
    shown = prob[prob >= FAINTEST]
    return float(entropy(shown).mean()) if shown.size else 0.0


def case_uncertainty(prob: np.ndarray, prob_tta: np.ndarray) -> float:
    """How much the plain prediction `prob` and its mean over all views `prob_tta` (same shape, 0-1) differ, from 0 to 1.

    It is 1 minus their soft Dice, 1 - 2 sum(min(p, q)) / sum(p + q) (the dissimilarity of Bray & Curtis 1957), over voxels
    where one of them is 0.05 or more: a share of the lesion found, so neither the size of the head nor the burden drives it,
    and no threshold enters. Disagreement between predictions of one scan tells a poor segmentation (Roy et al. 2019,
    doi 10.1016/j.neuroimage.2019.03.042). Where nothing is found it is 1; with a single view it is 0 and tells nothing.
    """
    shown = (prob >= FAINTEST) | (prob_tta >= FAINTEST)
    p, q = prob[shown].astype(float), prob_tta[shown].astype(float)
    return float(np.abs(p - q).sum() / (p + q).sum()) if shown.any() else 1.0


def unsure_limit(uncertainty, dsc) -> dict[str, float]:
    """The limits of the flag, from validation cases: `poor_below`, the Dice below which a case counts as poor, and
    `unsure_above`, the uncertainty above which a case is flagged.

    Poor is a Dice below the first quartile, the worst quarter of these cases. The flag's limit tells poor from other cases
    best: halfway between two neighbouring uncertainties where sensitivity + specificity is highest (Youden 1950), the
    lowest such. Where no limit tells them apart, as with one case, it is the highest uncertainty seen. Cases without a Dice
    do not count; raises InputError where none has one.
    """
    uncertainty, dsc = np.asarray(uncertainty, float), np.asarray(dsc, float)
    uncertainty, dsc = uncertainty[np.isfinite(dsc)], dsc[np.isfinite(dsc)]
    if not len(dsc):
        raise InputError("no validation case has a Dice: expected at least one with a lesion or a result")
    poor_below = float(np.quantile(dsc, 0.25))
    poor, levels = dsc < poor_below, np.unique(uncertainty)
    limits = np.append((levels[:-1] + levels[1:]) / 2, levels[-1])
    above = uncertainty > limits[:, None]
    gain = above[:, poor].mean(1) - above[:, ~poor].mean(1) if poor.any() else np.zeros(len(limits))
    best = int(gain.argmax()) if gain.max() > 0 else -1
    return dict(unsure_above=float(limits[best]), poor_below=poor_below)


def flag_table(uncertainty: pd.DataFrame, bar: float, seed: int = 42) -> pd.DataFrame:
    """How often the flag was right: a case is poor with a `dsc` below `bar`, flagged where `unsure`.

    Rows: "flagged" of all cases, "sensitivity" (of the poor ones flagged), "specificity" (of the others not flagged),
    "positive predictive value" (of the flagged ones poor), "negative predictive value" (of the others not poor), each with
    `count`, `n`, `value` and its Wilson interval `low`, `high`; and "Spearman rho" of uncertainty and Dice (NaN below three cases) with a
    bootstrap interval over cases (none below five). A case without a Dice, where there is no lesion and nothing is found, is not poor, and
    has no part in the correlation.
    """
    flagged, poor = uncertainty.unsure.to_numpy(bool), uncertainty.dsc.to_numpy(float) < bar
    parts = {"flagged": (flagged, np.ones_like(poor)), "sensitivity": (flagged, poor), "specificity": (~flagged, ~poor),
             "positive predictive value": (poor, flagged), "negative predictive value": (~poor, ~flagged)}
    rows = {}
    for name, (what, among) in parts.items():
        count, n = int((what & among).sum()), int(among.sum())
        rows[name] = (count, n, count / n if n else np.nan, *wilson(count, n))
    cases = uncertainty[np.isfinite(uncertainty.dsc.to_numpy(float))]
    rho = _spearman(*cases[["uncertainty", "dsc"]].to_numpy(float).T, seed)
    rows["Spearman rho"] = (len(cases), len(cases), *rho)
    return pd.DataFrame.from_dict(rows, orient="index", columns=["count", "n", "value", "low", "high"]).rename_axis("measure")


def _spearman(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Rank correlation with the percentile interval of resampled cases; resamples of one value only are left out."""
    n = len(x)
    if n < 3:
        return np.nan, np.nan, np.nan
    draws = np.vstack([np.arange(n), np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))])
    a, b = (scipy.stats.rankdata(values[draws], axis=1) - (n + 1) / 2 for values in (x, y))
    spread = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    rho = np.divide((a * b).sum(1), spread, out=np.full(len(draws), np.nan), where=spread > 0)
    if not np.isfinite(rho[0]) or n < FEWEST_CASES:
        return float(rho[0]), np.nan, np.nan
    return float(rho[0]), *map(float, np.nanquantile(rho[1:], [0.025, 0.975]))
