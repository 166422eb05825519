"""What the figures and tables of a report show, and what good looks like."""

from __future__ import annotations

from .search import NEAR_BEST
from .wording import of_images, of_strokes, words

_STRATA = (
    "Where {n} {data} are hard, at the operating point: Dice by lesion burden, detection by lesion size, "
    "and, where a ventricle mask is given, Dice within 10 mm of the ventricles and beyond, with 95 % intervals. Size classes are bounded by spheres 3, 5 and 10 mm across; "
    "there lesions of all cases are pooled, and n counts lesions. Good: level curves; ")
CAPTIONS = {
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
        "the recipe's; where the interval holds 0 the two cannot be told apart.",
    "results":
        "Mean and 95 % bootstrap interval over {n} {data}; a score that is not defined for a case "
        "is left out of the mean and counted (HD95 needs a result), and there is no interval below five cases. By the challenge's rule a "
        "case without lesions counts as recall 1. Good: high Dice, recall and F1, low HD95 and AVD.",
    "paired":
        "Dice of the operating point minus that of each other system on the same {n} {data}, mean and 95 % bootstrap interval; "
        "two-sided Wilcoxon signed-rank test, p corrected for their number after Holm; where there is no lesion and nothing is found, Dice counts as 1 here. Good: gains whose interval lies above 0. With fewer than "
        "six differing cases no test is made.",
    "sites":
        "Dice of {n} {data}, by site, a row of points a system; bars are means with 95 % intervals. Good: the "
        "operating point above the baselines at every site, and sites level with each other.",
    "bland_altman":
        "Lesion volumes of {n} {data}: result against reference, their difference against their mean, and "
        "their ratio (cases of 0 mL left out there), with bias and limits of agreement (bands: 95 % intervals). Good: points "
        "along the identity, a bias band that holds 0 (a ratio of 1), narrow limits, no trend with volume.",
    "strata": _STRATA + "small burdens, small and deep lesions are usually worse.",
    "calibration":
        "How often a voxel of a given probability is a lesion, in {n} {data}. Good: points on the diagonal. "
        "Below it the network is overconfident, above it too cautious. Voxels of all cases count alike: those "
        "deeper than scalp and skull, and others that are lesion or have a probability of 0.01 or more. Nearly all are plain background, so the second "
        "expected calibration error (ECE) leaves the lowest bin out.",
    "uncertainty":
        "Dice against how much the plain prediction and the mean over all views differ (1 minus their soft Dice; 0 with a single view), in {n} "
        "{data}, those without a Dice left out; cases right of the line are flagged as unsure. The line and what counts as poor come from validation cases: a case is poor if its Dice is as low as "
        "in the worst quarter of those. Good: poor cases on the right, flagged, good ones on the left. Rings mark the three lowest Dice.",
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
    "strata": _STRATA + "small strokes are usually found worse than large ones.",
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
    return (_OTHER_CAPTIONS[word].get(name) or word(CAPTIONS[name])).format(data=data, n=n)
