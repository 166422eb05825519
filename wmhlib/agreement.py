"""Statistics over cases: means with intervals, agreement of volumes, paired tests, strata and calibration.

Tables in and out are DataFrames of numbers. Every interval has 95 %; a figure that the cases do not support is NaN.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import scipy  # its statistics take half a second to import, and are, when first used

from .metrics import SCORES

RESAMPLES = 2000
FEWEST_CASES = 5  # with fewer, resampling them says too little: no interval
FEWEST_PAIRS = 6  # differences; with fewer, no two-sided Wilcoxon p can lie below 0.05
# Volumes of spheres 3, 5 and 10 mm across. Visual rating sets apart deep lesions below 3 mm, up to 10 mm, and above
# (Scheltens et al. 1993, doi 10.1016/0022-510X(93)90041-V); 5 mm divides the middle class.
SIZES_MM3 = (14.0, 65.0, 524.0)
BINS = 15  # of probability, as Guo et al. 2017


def bootstrap_ci(values, seed: int, n: int = RESAMPLES) -> tuple[float, float, float, int]:
    """Mean of `values` over cases, low and high of its bootstrap interval, and how many NaNs were left out.

    `n` resamples of the cases, percentiles expanded for their number (Hesterberg 2015, doi 10.1080/00031305.2015.1089789,
    section 5.3), since plain ones are too narrow for few cases. Fewer than five cases have a mean and no interval (NaN).
    """
    values = np.asarray(values, float)
    finite = values[np.isfinite(values)]
    nans = len(values) - len(finite)
    if len(finite) < FEWEST_CASES:
        return (float(finite.mean()) if len(finite) else np.nan), np.nan, np.nan, nans
    draws = np.random.default_rng(seed).integers(len(finite), size=(n, len(finite)))
    low, high = np.quantile(finite[draws].mean(axis=1), _tails(len(finite)))
    return float(finite.mean()), float(low), float(high), nans


def _tails(n: int) -> tuple[float, float]:
    """The expanded percentiles of a bootstrap over `n` cases: as wide as t is against the normal distribution."""
    low = float(scipy.stats.norm.cdf(-np.sqrt(n / (n - 1)) * scipy.stats.t.ppf(0.975, n - 1)))
    return low, 1 - low


def wilson(count: int, n: int) -> tuple[float, float]:
    """95 % interval of the proportion count / n (Wilson 1927); NaN for n = 0."""
    low, high = scipy.stats.binomtest(count, n).proportion_ci(method="wilson") if n else (np.nan, np.nan)
    return float(low), float(high)


def bland_altman(reference, result) -> dict:
    """Agreement of two measurements of the same cases, result minus reference, in their unit (mL, or log mL).

    Returns `n`, `bias`, `sd`, `loa_low`, `loa_high` (bias -+ 1.96 sd) and the 95 % intervals `bias_ci`, `loa_low_ci`,
    `loa_high_ci` as (low, high), from t with n - 1 degrees of freedom (Bland & Altman 1999, section 2.1). With fewer
    than two cases all but the bias is NaN.
    """
    difference = np.asarray(result, float) - np.asarray(reference, float)
    n = len(difference)
    bias = float(difference.mean()) if n else np.nan
    sd = float(difference.std(ddof=1)) if n > 1 else np.nan
    t = float(scipy.stats.t.ppf(0.975, n - 1)) if n > 1 else np.nan
    half_bias = t * sd / np.sqrt(max(n, 1))
    half_loa = t * sd * np.sqrt(1 / max(n, 1) + 1.96**2 / (2 * max(n - 1, 1)))
    out = dict(n=n, bias=bias, sd=sd, loa_low=bias - 1.96 * sd, loa_high=bias + 1.96 * sd)
    for name, half in (("bias", half_bias), ("loa_low", half_loa), ("loa_high", half_loa)):
        out[name + "_ci"] = (float(out[name] - half), float(out[name] + half))
    return out


def log_ml(volume) -> np.ndarray:
    """Natural logarithm of volumes in mL; a volume of 0 has none (NaN) and is left out and counted, not shifted.

    A difference of logarithms is the logarithm of a ratio: `exp` of a bias on this scale is result over reference.
    """
    volume = np.asarray(volume, float)
    return np.log(volume, out=np.full(volume.shape, np.nan), where=volume > 0)


def r_squared(reference, result) -> dict[str, float]:
    """Two figures both called R2: about identity and about the fitted line.

    `identity` is 1 minus squared errors over the reference's squared deviations: the result taken as it is, negative
    where the reference's mean would do better. `fit` is the squared correlation, which a result of half the volume
    everywhere passes with 1. NaN for fewer than three cases (a line fits any two), or where there is no variance to explain.
    """
    reference, result = np.asarray(reference, float), np.asarray(result, float)
    if len(reference) < 3:
        return dict(identity=np.nan, fit=np.nan)
    dx, dy = reference - reference.mean(), result - result.mean()
    xx, yy = float(dx @ dx), float(dy @ dy)
    return dict(identity=1 - float(((result - reference) ** 2).sum()) / xx if xx else np.nan,
                fit=float(dx @ dy) ** 2 / (xx * yy) if xx and yy else np.nan)


def icc(reference, result) -> dict:
    """Intraclass correlation of two measurements of the same cases, single measures: `icc21` (two-way random, absolute
    agreement; McGraw & Wong's A,1) and `icc31` (two-way mixed, consistency: a constant bias is forgiven; C,1), each with
    its 95 % interval `icc21_ci`, `icc31_ci` as (low, high).

    Shrout & Fleiss 1979 and McGraw & Wong 1996, table 7, for two raters. NaN for fewer than three cases or no variance.
    """
    reference, result = np.asarray(reference, float), np.asarray(result, float)
    n, nothing = len(reference), (np.nan, np.nan)
    if n < 3 or not (np.ptp(reference) or np.ptp(result)):
        return dict(icc21=np.nan, icc21_ci=nothing, icc31=np.nan, icc31_ci=nothing)
    difference = result - reference
    cases = 2 * float(((reference + result) / 2).var(ddof=1))  # mean squares: between cases, raters, and what is left
    raters, error = n * float(difference.mean()) ** 2 / 2, float(difference.var(ddof=1)) / 2
    icc21, icc31 = (cases - error) / (cases + error + 2 * (raters - error) / n), (cases - error) / (cases + error)
    q = scipy.stats.f.ppf(0.975, n - 1, n - 1)
    ci31 = (cases - q * error) / (cases + q * error), (q * cases - error) / (q * cases + error)
    a, b = 2 * icc21 * raters, (n * (1 + icc21) - 2 * icc21) * error
    freedom = (n - 1) * (a + b) ** 2 / ((n - 1) * a**2 + b**2) if a or b else 1.0
    upper, lower = scipy.stats.f.ppf(0.975, n - 1, freedom), scipy.stats.f.ppf(0.975, freedom, n - 1)
    rest = 2 * raters + (n - 2) * error
    ci21 = (n * (cases - upper * error) / (upper * rest + n * cases),
            n * (lower * cases - error) / (rest + n * lower * cases))
    return dict(icc21=icc21, icc21_ci=tuple(map(float, ci21)), icc31=icc31, icc31_ci=tuple(map(float, ci31)))


def agreement_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Volume agreement of one system's rows (`reference_ml`, `result_ml`): a row each on "mL", "log mL" and, the second
    taken back to a "ratio" of result to reference.

    Columns: `n`, `left_out` (cases with a volume of 0, on the log scale), `bias`, `loa_low`, `loa_high`, `icc21`, `icc31`,
    each with its interval (`bias_low`, `bias_high`, ...), `r2_identity` and `r2_fit`. A ratio has no R2 and no ICC.
    """
    rows = {}
    for scale, change in (("mL", np.asarray), ("log mL", log_ml)):
        pair = np.stack([change(metrics[name].to_numpy(float)) for name in ("reference_ml", "result_ml")])
        pair = pair[:, np.isfinite(pair).all(axis=0)]
        found = bland_altman(*pair) | icc(*pair)
        row = dict(n=pair.shape[1], left_out=len(metrics) - pair.shape[1])
        for name in ("bias", "loa_low", "loa_high", "icc21", "icc31"):
            row |= {name: found[name], name + "_low": found[name + "_ci"][0], name + "_high": found[name + "_ci"][1]}
        rows[scale] = row | {"r2_" + name: value for name, value in r_squared(*pair).items()}
    back = {name: np.exp(value) for name, value in rows["log mL"].items() if name.startswith(("bias", "loa"))}
    rows["ratio"] = {name: rows["log mL"][name] for name in ("n", "left_out")} | back
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("volume")


def compare_systems(metrics: pd.DataFrame, baseline: str = "operating point", score: str = "dsc",
                    seed: int = 42) -> pd.DataFrame:
    """Paired comparison of `baseline` with every other system of a metrics table, a row each, over the same cases.

    Columns: `n` pairs, `left_out` (a score is NaN), `difference` (mean of baseline minus other) with `low` and `high`
    (bootstrap over cases), `zeros` (equal pairs, which Wilcoxon's signed-rank test drops), its `w` and two-sided `p`
    (NaN with fewer than six other pairs), and `p_holm`, p adjusted for the number of systems tested (Holm 1979). Where there is no
    lesion and nothing is found, which has no Dice, 1 stands in for it: against a false alarm, whose Dice is 0, that is a gain, not a case left out.
    """
    if score == "dsc" and {"reference_ml", "result_ml"} <= set(metrics):
        metrics = metrics.assign(dsc=metrics.dsc.mask((metrics.reference_ml == 0) & (metrics.result_ml == 0), 1.0))
    table = metrics.pivot(index="case", columns="system", values=score)
    rows = {}
    for system in [s for s in metrics.system.unique() if s != baseline]:
        difference = (table[baseline] - table[system]).to_numpy()
        mean, low, high, nans = bootstrap_ci(difference, seed)
        moved = difference[np.isfinite(difference) & (difference != 0)]
        w, p = scipy.stats.wilcoxon(moved) if len(moved) >= FEWEST_PAIRS else (np.nan, np.nan)
        n = len(difference) - nans
        rows[system] = dict(n=n, left_out=nans, difference=mean, low=low, high=high, zeros=n - len(moved), w=float(w), p=float(p))
    columns = ["n", "left_out", "difference", "low", "high", "zeros", "w", "p"]
    out = pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("system")
    return out.assign(p_holm=holm(out.p))


def holm(p) -> np.ndarray:
    """P values adjusted for their number (Holm 1979); NaN stays NaN and counts as no test."""
    p = np.asarray(p, float)
    order = np.argsort(p)[:np.isfinite(p).sum()]  # NaN sorts last
    out = np.full(p.shape, np.nan)
    out[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return out


def by_group(metrics: pd.DataFrame, column: str, seed: int = 42) -> pd.DataFrame:
    """Mean scores of the groups of a column (`site`, `system`, a burden): one row a group and score with `n` cases,
    `mean`, `low`, `high` (bootstrap over cases) and `nans` left out; groups in the order they come, or of a categorical."""
    rows = [{column: group, "score": score, "n": len(cases),
             **dict(zip(("mean", "low", "high", "nans"), bootstrap_ci(cases[score], seed)))}
            for group, cases in metrics.groupby(column, sort=metrics[column].dtype == "category", observed=True)
            for score in SCORES]
    return pd.DataFrame(rows, columns=[column, "score", "n", "mean", "low", "high", "nans"])


def tertiles(reference_ml) -> pd.Categorical:
    """Lesion burden of each case, thirds of the cases given: "low (to 4.2 mL)", "middle (4.2 to 12 mL)", "high (above 12 mL)".

    The cut points are the quantiles at 1/3 and 2/3 of `reference_ml` (one value a case). Where they coincide, as with a
    single case, there is one class, "all".
    """
    volume = np.asarray(reference_ml, float)
    low, high = np.quantile(volume, [1 / 3, 2 / 3]) if len(volume) else (0.0, 0.0)
    if low == high:
        return pd.Categorical(["all"] * len(volume), ["all"], ordered=True)
    names = [f"low (to {low:.3g} mL)", f"middle ({low:.3g} to {high:.3g} mL)", f"high (above {high:.3g} mL)"]
    return pd.Categorical.from_codes(np.digitize(volume, [low, high], right=True), names, ordered=True)


def size_table(lesions: pd.DataFrame, seed: int = 42) -> pd.DataFrame:
    """Detection by lesion size over all cases: a row for each class between `SIZES_MM3`, and one for "all".

    `lesions` has a row each with `case`, `kind` ("reference" or "result"), `volume_mm3`, `hit`. Columns: `reference`
    lesions, `found` of them, `recall`; `result` lesions, `true` ones, `precision`, each with `_low` and `_high`. Lesions of
    one case are not independent, so whole cases are drawn for the intervals.
    """
    edges = [f"{edge:g}" for edge in SIZES_MM3]
    names = [f"< {edges[0]} mm3", *(f"{a} to {b} mm3" for a, b in zip(edges, edges[1:])), f">= {edges[-1]} mm3", "all"]
    size = np.digitize(lesions.volume_mm3.to_numpy(float), SIZES_MM3)
    case, cases = pd.factorize(lesions.case)
    counts = np.zeros((2, 2, len(cases), len(names)))  # all and hit; reference and result
    hit, result = lesions.hit.to_numpy(bool), (lesions.kind == "result").to_numpy()
    for chosen, out in ((np.ones_like(hit), counts[0]), (hit, counts[1])):
        np.add.at(out, (result[chosen].astype(int), case[chosen], size[chosen]), 1)
    counts[..., -1] = counts.sum(-1)
    rows = {"size": names}
    for k, (total, found, share) in enumerate((("reference", "found", "recall"), ("result", "true", "precision"))):
        rows[total], rows[found] = counts[:, k].sum(axis=1).astype(int)
        rows[share] = _ratio(rows[found], rows[total])
        drawn = np.stack([_resampled(part, seed) for part in counts[:, k]])
        rows[share + "_low"], rows[share + "_high"] = _interval(_ratio(drawn[1], drawn[0]), (counts[0, k] > 0).sum(axis=0))
    return pd.DataFrame(rows)


def reliability(calibration: pd.DataFrame) -> pd.DataFrame:
    """The reliability curve over all cases: per `bin` its `voxels`, their mean `probability` and the share of them that
    is `lesion` in the reference (NaN in an empty bin). `calibration` has a row per case and bin, see `evaluation`."""
    sums = calibration.groupby("bin")[["voxels", "probability", "lesion"]].sum().reindex(range(BINS), fill_value=0)
    return pd.DataFrame(dict(voxels=sums.voxels, probability=_ratio(sums.probability, sums.voxels),
                             lesion=_ratio(sums.lesion, sums.voxels))).reset_index()


def calibration_error(calibration: pd.DataFrame, seed: int = 42) -> dict:
    """How far the probability is off, over the voxels of all `n` cases together; each with its interval, whole cases drawn,
    as `ece_ci` and so on: (low, high).

    `ece`: distance between mean probability and share of lesion in a bin, averaged over the bins by their voxels (Guo et al.
    2017, eq. 3). Nearly all voxels are background in the first bin, so `ece_found` is the same without that bin, over
    probabilities from 1/15. `brier`: mean squared error of the probability (Brier 1950).
    """
    names = ["voxels", "probability", "lesion", "squared"]
    table = calibration.pivot(index="case", columns="bin", values=names).fillna(0)
    sums = table.to_numpy(float).reshape(len(table), len(names), -1)

    def scores(sums):
        voxels, probability, lesion, squared = np.moveaxis(sums, -2, 0)
        off = np.abs(probability - lesion)
        return dict(ece=_ratio(off.sum(-1), voxels.sum(-1)), ece_found=_ratio(off[..., 1:].sum(-1), voxels[..., 1:].sum(-1)),
                    brier=_ratio(squared.sum(-1), voxels.sum(-1)))

    drawn = scores(_resampled(sums.reshape(len(sums), -1), seed).reshape(-1, *sums.shape[1:]))
    intervals = {name + "_ci": tuple(map(float, _interval(draw, len(sums)))) for name, draw in drawn.items()}
    return dict(n=len(sums), **{name: float(value) for name, value in scores(sums.sum(axis=0)).items()}, **intervals)


def _ratio(part, whole) -> np.ndarray:
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _resampled(per_case: np.ndarray, seed: int) -> np.ndarray:
    """Sums over cases (cases x columns) in each bootstrap resample of the cases: resamples x columns."""
    n = len(per_case)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) if n else np.zeros((RESAMPLES, 0))
    return times @ per_case


def _interval(drawn: np.ndarray, cases) -> np.ndarray:
    """Low and high (2 x ...) of a statistic over resamples, along the first axis; NaN where too few cases bear it."""
    cases = np.broadcast_to(cases, drawn.shape[1:])
    ends = np.full((2, *cases.shape), np.nan)
    for place in np.ndindex(cases.shape):
        values = drawn[(slice(None), *place)]
        if cases[place] >= FEWEST_CASES and np.isfinite(values).any():
            ends[(slice(None), *place)] = np.nanquantile(values, _tails(int(cases[place])))
    return ends
