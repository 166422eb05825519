"""What a report shows: its tables ready to read, its figures with their captions."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import agreement, uncertainty
from .evaluation import SYSTEMS, ZERO_SHOT
from .figures import captioned, save_figure
from .metrics import SCORES
from .search import NEAR_BEST
from .wording import figure_in, of_images, of_strokes, words
from .workspace import RunFolder

DECIMALS = dict(dsc=2, hd95=1, avd=1, recall=2, f1=2)
HEADS = dict(dsc="Dice", hd95="HD95 (mm)", avd="AVD (%)", recall="lesion recall", f1="lesion F1")


def interval(mean: float, low: float, high: float, decimals: int, sign: str = "") -> str:
    """ "mean [low, high]", without the interval where there is none, "-" where there is no mean."""
    if not np.isfinite(mean):
        return "-"
    text = f"{mean:{sign}z.{decimals}f}"
    return text + (f" [{low:{sign}z.{decimals}f}, {high:{sign}z.{decimals}f}]" if np.isfinite(low) else "")


def results_table(metrics: pd.DataFrame, seed: int = 42) -> pd.DataFrame:
    """One row a system: `n`, each score as "mean [low, high]" (95 % bootstrap over cases), NaNs `left out`."""
    return _scores(metrics, "system", seed)


def group_table(own: pd.DataFrame, column: str, seed: int = 42) -> pd.DataFrame:
    """The same of one system's rows for each group of `column`: "site", or "burden" for thirds of the cases by volume."""
    return _scores(own.assign(burden=agreement.tertiles(own.reference_ml)), column, seed)


def results_text(metrics: pd.DataFrame, seed: int = 42, data: str = "") -> str:
    """`results_table` for a terminal, in the words of `data`."""
    table, word = results_table(metrics, seed).reset_index(), words(data)
    columns = [[word(str(cell)) for cell in (name, *table[name])] for name in table]
    widths = [max(map(len, column)) for column in columns]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in zip(*columns)]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def paired_table(metrics: pd.DataFrame, seed: int = 42, baseline: str = SYSTEMS[0]) -> pd.DataFrame:
    """`baseline` against each other system on the same cases: Dice gained, Wilcoxon's test, Holm's correction. One that sees the
    reference is not tested."""
    table = agreement.compare_systems(metrics[metrics.system != ZERO_SHOT], baseline, "dsc", seed)
    return pd.DataFrame({"n": table.n, "left out": table.left_out, "Dice gained": intervals(table, "difference", 3, "+"),
                         "equal pairs": table.zeros, "Wilcoxon W": table.w.map(_plain),
                         "p": table.p.map(_p), "p (Holm)": table.p_holm.map(_p)}).rename_axis(f"{baseline} against")


def comparison_table(compared: pd.DataFrame) -> pd.DataFrame:
    """`search.compare`, ready to read."""
    volume = {"mm3 at least": compared.min_mm3} if compared.min_mm3.any() else {}
    left_out = {"without Dice": compared.left_out} if compared.left_out.any() else {}
    return pd.DataFrame({"threshold": compared.threshold, "voxels at least": compared.min_voxels, **volume,
                         "TTA": compared.tta.map({True: "yes", False: "no"}), "validation Dice": intervals(compared, "dsc", 3),
                         "difference": intervals(compared, "difference", 3, "+"), **left_out}).set_axis(compared.point.rename("point"))


def volume_table(own: pd.DataFrame) -> pd.DataFrame:
    """Agreement of the volumes of one system's rows, in mL and as a ratio (from the log scale)."""
    table = agreement.agreement_table(own)
    names = dict(bias="bias", loa_low="lower limit of agreement", loa_high="upper limit of agreement", icc21="ICC(2,1)", icc31="ICC(3,1)")
    rows = {heading: intervals(table, name, 2) for name, heading in names.items()}
    rows |= {"R2 about identity": table.r2_identity.map(_plain), "R2 of the fit": table.r2_fit.map(_plain)}
    return pd.DataFrame({"n": table.n.astype(int), "left out (volume 0)": table.left_out.astype(int), **rows}).T.rename_axis(None)


def size_table(lesions: pd.DataFrame, seed: int = 42) -> pd.DataFrame:
    """Detection by lesion size: recall of the reference's lesions and precision of the result's."""
    table = agreement.size_table(lesions, seed)
    return pd.DataFrame({"reference lesions": table.reference, "found": table.found, "recall": intervals(table, "recall", 2),
                         "result lesions": table.result, "true": table.true,
                         "precision": intervals(table, "precision", 2)}).set_axis(table["size"].rename("lesion size"))


def flag_table(cases: pd.DataFrame, point: dict, seed: int = 42) -> pd.DataFrame:
    """How often the flag of unsure cases (the evaluation's `uncertainty`) was right about a poor Dice."""
    table = uncertainty.flag_table(cases, point["poor_below"], seed)
    of = [f"{count} of {n}" if measure != "Spearman rho" else f"{n} cases" for measure, (count, n) in zip(table.index, table[["count", "n"]].to_numpy())]
    return pd.DataFrame({"value": intervals(table, "value", 2), "of": of}).rename_axis("measure")


def case_table(own: pd.DataFrame, flags: pd.DataFrame) -> pd.DataFrame:
    """Every case at the operating point, with its uncertainty and flag."""
    flag = flags.set_index("case")
    table = own.drop(columns="system").set_index("case").rename(columns=HEADS | dict(reference_ml="reference (mL)", result_ml="result (mL)"))
    table = table.round({"Dice": 3, "HD95 (mm)": 1, "AVD (%)": 1, "lesion recall": 2, "lesion F1": 2, "reference (mL)": 2, "result (mL)": 2})
    return table.assign(**{"entropy (bits)": flag.entropy.round(2), "uncertainty": flag.uncertainty.round(3),
                           "unsure": flag.unsure.map({True: "unsure", False: ""})})


def zone_table(zones: pd.DataFrame, lesions: pd.DataFrame, seed: int = 42) -> pd.DataFrame:
    """White matter within 10 mm of the ventricles and beyond: Dice over cases, those left out that have none there, lesions found, mean
    volumes (mL). No row where no case has a ventricle mask."""
    rows = {}
    for zone, cases in zones.groupby("zone", sort=False):
        found = lesions[(lesions.zone == zone) & (lesions.kind == "reference")].hit
        *dice, left_out = agreement.bootstrap_ci(cases.dsc, seed)
        rows[zone] = {"n": len(cases), "Dice": interval(*dice, 2), "left out": left_out, "reference lesions": len(found),
                      "found": int(found.sum()), "reference (mL)": f"{cases.reference_ml.mean():.2f}", "result (mL)": f"{cases.result_ml.mean():.2f}"}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("zone")


def tell(table: pd.DataFrame, name: str, data: str, n: int) -> None:
    """Displays `table` with its caption, in the words of `data`."""
    word = words(data)
    if word is not str:
        if table.empty:  # the zones around ventricles, where there are none
            return
        named = table.index if table.index.name == "case" else table.index.map(word)
        table = table.set_axis(named.rename(word(table.index.name or "")), axis=0).rename(columns=word)
    captioned(table, caption(name, data, n))


def show(figure: Figure, folder: RunFolder, name: str, data: str, n: int) -> None:
    """Keeps `figure` as figures/<name>.png in `folder` and displays it with its caption, in the words of `data`."""
    word = words(data)
    if word is not str:
        figure = figure_in(figure, word)
    save_figure(figure, folder.figures / f"{name}.png")
    captioned(figure, caption(name, data, n))


def _scores(metrics: pd.DataFrame, column: str, seed: int) -> pd.DataFrame:
    rows = {}
    for group, cases in agreement.by_group(metrics, column, seed).groupby(column, sort=False, observed=True):
        scores = cases.set_index("score")
        rows[group] = {"n": scores.n.iloc[0], **{HEADS[s]: interval(*scores.loc[s, ["mean", "low", "high"]], DECIMALS[s]) for s in SCORES},
                       "left out": missing_scores(scores.nans) or "none"}
    return pd.DataFrame(rows).T.rename_axis(column)


def missing_scores(missing: pd.Series) -> str:
    """How many rows lack each score (`missing`, by score) and are left out of its mean, in words; "" where none does."""
    return ", ".join(f"{HEADS[score]} {missing[score]}" for score in SCORES if missing[score])


def intervals(table: pd.DataFrame, name: str, decimals: int, sign: str = "") -> pd.Series:
    """Column `name` of each row with its interval, which lies in `<name>_low` and `<name>_high`."""
    ends = [f"{name}_{end}" if f"{name}_{end}" in table else end for end in ("low", "high")]
    return pd.Series([interval(*row, decimals, sign) for row in table[[name, *ends]].to_numpy(float)], table.index, dtype=object)


def _plain(value: float) -> str:
    return f"{value:.3g}" if np.isfinite(value) else "-"


def _p(value: float) -> str:
    return "-" if not np.isfinite(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"


_CAPTIONS = {
    "training_curves":
        "Training on {n} {data}. Good: both losses fall together and level off, validation Dice climbs to a plateau; "
        "a validation loss that rises while the training loss falls means overfitting. The star is the epoch "
        "that was kept.",
    "search_heatmap":
        "Mean Dice at every operating point tried, over {n} {data} kept for validation; the smallest component counts voxels "
        f"above, mm3 below. Good: a broad plateau (outlined: {NEAR_BEST}) with the chosen point "
        "(star) inside it, or at a lower threshold where the recipe prefers sensitivity; a narrow peak would not carry over to new cases. The diamond is the recipe's own point. No test "
        "case is used here.",
    "comparison":
        "The chosen point and the recipe's own on the {n} {data} kept for validation, mean Dice and difference with 95 % bootstrap "
        "intervals (recipe's minus chosen). The choice was made on these cases, which favours it. Good: the choice at least level with "
        "the recipe's; a difference whose interval holds 0 is no difference.",
    "results":
        "Mean and 95 % bootstrap interval over {n} {data}; a score that is not defined for a case "
        "is left out of the mean and counted (HD95 needs a result), and there is no interval below five cases. By the challenge's rule a "
        "case without lesions counts as recall 1. Good: high Dice, recall and F1, low HD95 and AVD.",
    "paired":
        "Dice of the operating point minus that of each other system on the same {n} {data}, mean and 95 % bootstrap interval; "
        "two-sided Wilcoxon signed-rank test, p corrected for their number after Holm. Good: gains whose interval lies above 0. With fewer than "
        "six differing cases no test is made.",
    "sites":
        "Dice of {n} {data}, by site, a row of points a system; bars are means with 95 % intervals. Good: the "
        "operating point above the baselines at every site, and sites level with each other.",
    "bland_altman":
        "Lesion volumes of {n} {data}: result against reference, their difference against their mean, and "
        "their ratio (cases of 0 mL left out there), with bias and limits of agreement (bands: 95 % intervals). Good: points "
        "along the identity, a bias band that holds 0 (a ratio of 1), narrow limits, no trend with volume.",
    "strata":
        "Where {n} {data} are hard, at the operating point: Dice by lesion burden, detection by lesion size, "
        "and, where a ventricle mask is given, Dice within 10 mm of the ventricles and beyond, with 95 % intervals. Sizes are those of spheres 3, 5 and 10 mm across; their shares pool the lesions of all cases, and "
        "n counts lesions there. Good: level curves; small burdens, small and deep lesions are usually worse.",
    "calibration":
        "How often a voxel of a given probability is a lesion, in {n} {data}. Good: points on the diagonal. "
        "Below it the network is overconfident, above it too cautious. Voxels of all cases count alike: those "
        "deeper than scalp and skull, and others that are lesion or have a probability of 0.01 or more. Nearly all are plain background, so the second "
        "expected calibration error (ECE) leaves the lowest bin out.",
    "uncertainty":
        "Dice against how much the plain prediction and the mean over all views differ (1 minus their soft Dice; 0 with a single view), in {n} "
        "{data}, those without a Dice left out; cases right of the line are flagged as unsure. The line and what counts as poor come from validation cases: poor is a Dice as low as in their "
        "worst quarter. Good: poor cases on the right, flagged, good ones on the left. Rings mark the three lowest Dice.",
    "predictions":
        "Best, median and worst by Dice of {n} {data}, each on its slice with most lesion, lesions outlined; "
        "the frame is enlarged in the panels beside it. Good: ground truth and prediction alike, an error map that is mostly "
        "'found', errors only at lesion borders, entropy (the network's doubt, 0 to 1 bit) where the errors are. R and L are the patient's.",
    "groups":
        "The operating point's scores in groups of the {n} {data}, as in the table above; no interval below five cases.",
    "volumes":
        "Agreement of lesion volume in {n} {data}, result minus reference, with 95 % intervals: bias and limits of agreement (Bland-Altman) in mL, on "
        "the natural logarithm, and taken back from it as a ratio. Good: a bias whose interval holds 0 (a ratio of 1), narrow limits, ICC near 1. R2 "
        "about identity takes the result as it is, R2 of the fit forgives any scale and offset.",
    "sizes":
        "Lesions of {n} {data} by size, pooled over cases: how many of the reference's are touched by the result (recall), and of the result's by the "
        "reference (precision). Whole cases are redrawn for the intervals.",
    "zones":
        "Those of {n} {data} that have a ventricle mask, within 10 mm of the ventricles (periventricular) and beyond (deep). Dice (mean, 95 % interval; left out "
        "where a zone holds neither reference nor result) and volumes part at 10 mm, voxel by voxel; a lesion counts whole, as periventricular where any of it is near.",
    "flag":
        "How often the flag of unsure cases was right in {n} {data}, with 95 % intervals (Wilson's; rho's bootstrap): a case is poor below the Dice that bounds the worst quarter "
        "of the validation cases. Good: poor cases flagged (sensitivity), others not (specificity), rho near -1.",
    "cases":
        "Every one of {n} {data} at the operating point; entropy is the mean over voxels with a probability of 0.05 or more. A click on a column's head sorts by it.",
    "viewer":
        "Every slice of the best, median and worst of {n} {data}. Good: the two outlines run together; what is missed or false sits at borders, not in lesions of its own.",
    "fewshot":
        "Mean Dice of the {n} {data} kept for testing (one view at 0.5), and of the validation cases, after training on a few labelled slices, a marker a "
        "seed. Lines across: the trained run, the base without any training, and the base told where each lesion lies. Good: a curve that rises "
        "early towards the trained run; seeds far apart at few slices mean that it matters which.",
    "split":
        "Lesion burden of {n} {data} by site and split. Good: the train, validation and test cases of a site span a "
        "similar range; a site that is left out is all test.",
    "cohort":
        "FLAIR slices of some of {n} {data}, a case a row, lesions outlined where a reference is given. Good: heads "
        "upright with anterior up, the patient's right (R) on the left, outlines on bright white matter.",
    "overlay":
        "Prediction on {data}, slices through the lesions found. Good: outlines follow bright lesions and leave "
        "cortex, septum and choroid plexus alone; probability is high inside lesions; entropy, the "
        "network's doubt, only at borders.",
}


_IMAGE_CAPTIONS = {
    "search_heatmap":
        "Mean Dice at every operating point tried, over {n} {data} kept for validation; the smallest object counts pixels. Good: a broad plateau "
        f"(outlined: {NEAR_BEST}) with the chosen point (star) inside it; a narrow peak would not carry over to new images. "
        "The diamond is the recipe's own point. No test image is used here.",
    "strata":
        "Where {n} {data} are hard, at the operating point: Dice by marked area (kpx: 1000 pixels), detection by the size of connected objects, "
        "with 95 % intervals. Their shares pool the objects of all images, and n counts objects there. Good: level curves.",
    "calibration":
        "How often a pixel of a given probability is marked, in {n} {data}. Good: points on the diagonal. Below it the network is overconfident, above it "
        "too cautious. Pixels of all images count alike, without what is dark from the edges on. Nearly all are plain background, so the second "
        "expected calibration error (ECE) leaves the lowest bin out.",
    "predictions":
        "Best, median and worst by Dice of {n} {data}; the frame is enlarged in the panels beside it. Good: ground truth and prediction alike, an error map "
        "that is mostly 'found', errors only at borders, entropy (the network's doubt, 0 to 1 bit) where the errors are.",
    "viewer":
        "The best, median and worst of {n} {data}. Good: the two outlines run together; what is missed or false sits at borders.",
    "cohort":
        "Some of {n} {data}, shown in grey, above as they are and below with what is marked outlined. Good: outlines on what is to be found.",
    "split":
        "Marked area (kpx: 1000 pixels) of {n} {data} by split, as the data bring it. Good: train, validation and test images span a similar range.",
}


_STROKE_CAPTIONS = {
    "strata":
        "Where {n} {data} are hard, at the operating point: Dice by lesion burden, detection by lesion size, "
        "and, where a ventricle mask is given, Dice within 10 mm of the ventricles and beyond, with 95 % intervals. Sizes are those of spheres 3, 5 and 10 mm across; their shares pool the lesions of all cases, and "
        "n counts lesions there. Good: level curves; small strokes are usually found worse than large ones.",
    "cohort":
        "T1w slices of some of {n} {data}, a case a row, lesions outlined where a reference is given. Good: heads "
        "upright with anterior up, the patient's right (R) on the left, outlines on tissue that is darker than the other side's.",
    "overlay":
        "Prediction on {data}, slices through the lesions found. Good: outlines follow dark lesions and leave ventricles and sulci "
        "alone; probability is high inside lesions; entropy, the network's doubt, only at borders.",
}
_OTHER_CAPTIONS = {of_images: _IMAGE_CAPTIONS, of_strokes: _STROKE_CAPTIONS, str: {}}


def caption(name: str, data: str, n: int = 1) -> str:
    """What figure or table `name` shows and what good looks like, on `n` of `data` (as `cohort.describe` names them, or one scan's name)."""
    word = words(data)
    return (_OTHER_CAPTIONS[word].get(name) or word(_CAPTIONS[name])).format(data=data, n=n)
