"""What a report shows: its tables ready to read, its figures with their captions."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import agreement, uncertainty
from .captions import caption
from .evaluation import SYSTEMS, ZERO_SHOT
from .figures import captioned
from .metrics import SCORES
from .wording import figure_in, words
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


def as_text(table: pd.DataFrame, data: str = "") -> str:
    """A table of this module for a terminal, in the words of `data`."""
    table, word = table.reset_index(names=table.index.name or ""), words(data)
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
    """Displays `table` with its caption, in the words of `data`; nothing where it has no row, as the zones where no case has a ventricle mask."""
    if table.empty:
        return
    word = words(data)
    if word is not str:
        named = table.index if table.index.name == "case" else table.index.map(word)
        table = table.set_axis(named.rename(word(table.index.name or "")), axis=0).rename(columns=word)
        if "left out" in table:  # names scores and their units
            table = table.assign(**{"left out": [word(str(cell)) for cell in table["left out"]]})
    captioned(table, caption(name, data, n))


def show(figure: Figure, folder: RunFolder, name: str, data: str, n: int) -> None:
    """Keeps `figure` as figures/<name>.png in `folder` and displays it with its caption, in the words of `data`."""
    word = words(data)
    if word is not str:
        figure = figure_in(figure, word)
    captioned(figure, caption(name, data, n), folder.figures / f"{name}.png")


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
