"""Charts of results, each from a table of the run: agreement, sites, calibration, strata, uncertainty."""

from __future__ import annotations

import textwrap
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator

from . import agreement
from .evaluation import SYSTEMS
from .figures import BLUE, GREEN, LEGEND, MARKERS, ORANGE, POINTS, SKY, VERMILLION, page
from .report import interval

_LABEL = 0.13  # of an axis' height: a label of two lines
_SYSTEMS = list(zip((BLUE, ORANGE, GREEN, SKY), "os^D"))
_SITES = "os^DvpX<Ph>d8"  # more markers than colours: no two of 13 * 6 sites look alike
_MEAN = dict(color="black", linewidth=1.6, marker="|", markersize=7, markeredgewidth=1.6, markevery=[1])
_MEAN_KEY = Line2D([], [], label="mean, 95 % interval", **_MEAN | dict(markevery=None))


def bland_altman_figure(reference_ml, result_ml, site) -> Figure:
    """Volumes of n cases in mL: result over reference with the line of identity, and the agreement of both in mL and as
    a ratio (on log volume, cases with a volume of 0 left out): bias and limits of agreement, each with its 95 % interval
    as a band. `site` gives each case's marker."""
    table = pd.DataFrame(dict(site=np.asarray(site), reference=np.asarray(reference_ml, float),
                              result=np.asarray(result_ml, float)))
    both = table[(table.reference > 0) & (table.result > 0)]
    logs = np.log2(both[["reference", "result"]])
    fig, axes = page(2, 2, (8, 7.2))
    scatter, words, in_ml, as_ratio = axes.flat
    top = 1.06 * max(table.reference.max(), table.result.max(), 0.1)
    scatter.plot([0, top], [0, top], color="0.4", linewidth=1, label="identity")
    _by_site(scatter, table, table.reference, table.result)
    scatter.set(title="Volumes", xlabel="reference (mL)", ylabel="result (mL)", xlim=(0, top), ylim=(0, top), aspect="equal")
    words.set_axis_off()
    words.legend(*scatter.get_legend_handles_labels(), loc="upper left", **LEGEND)
    words.text(0.05, 0, "\n".join(_agreement_lines(table, len(both))), va="bottom", transform=words.transAxes, linespacing=1.5)
    _by_site(in_ml, table, (table.reference + table.result) / 2, table.result - table.reference)
    in_figures = agreement.bland_altman(table.reference, table.result)
    decimals = min(3, max(1, 1 - int(np.floor(np.log10(in_figures["sd"]))))) if in_figures["sd"] > 0 else 1  # two figures of the spread, a microlitre at least
    _limits(in_ml, in_figures, f"{{:+z.{decimals}f}} mL".format)
    in_ml.set(title="Agreement in mL", xlabel="mean of result and reference (mL)", ylabel="result - reference (mL)")
    _by_site(as_ratio, both, np.sqrt(both.reference * both.result), logs.result - logs.reference)
    _limits(as_ratio, agreement.bland_altman(logs.reference, logs.result), _times)
    as_ratio.set(title="Agreement on log volume", xlabel="geometric mean (mL)", ylabel="result / reference", xscale="log")
    low, high = np.log10(as_ratio.get_xlim())
    as_ratio.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high - low < 2 else (1,)))
    as_ratio.xaxis.set_major_formatter("{x:g}")
    as_ratio.xaxis.set_minor_formatter("")
    span = np.ptp(as_ratio.get_ylim())
    ratios = np.array([1 / 2, 2 / 3, 4 / 5, 1, 5 / 4, 3 / 2, 2]) if span < 2.5 else 2.0 ** (np.arange(-16, 17) * -(-span // 8))
    as_ratio.yaxis.set_major_locator(FixedLocator(np.log2(ratios)))
    as_ratio.yaxis.set_major_formatter(lambda value, _: _times(value))
    return fig


def _times(log2_ratio: float) -> str:
    return f"x {2.0**log2_ratio:.3g}"


def _agreement_lines(table: pd.DataFrame, above_zero: int) -> list[str]:
    """The figures of agreement, each by its full name."""
    r2, single = agreement.r_squared(table.reference, table.result), agreement.icc(table.reference, table.result)
    lines = [f"n = {len(table)}", f"R² about identity {interval(r2['identity'], np.nan, np.nan, 3)}",
             f"R² of the fitted line {interval(r2['fit'], np.nan, np.nan, 3)}",
             f"ICC(2,1) {interval(single['icc21'], *single['icc21_ci'], 3)}"]
    if above_zero < len(table):
        lines.append(f"left out of the log panel\n(a volume of 0 mL): {len(table) - above_zero} of {len(table)}")
    return lines


def _by_site(ax, table: pd.DataFrame, x: pd.Series, y: pd.Series) -> None:
    for colour, marker, (name, part) in zip(cycle(colour for colour, _ in MARKERS), cycle(_SITES), table.groupby("site")):
        ax.plot(x[part.index], y[part.index], color=colour, marker=marker, label=f"{name} ({len(part)})", alpha=0.85,
                **POINTS)


def _limits(ax, found: dict, write) -> None:
    """Zero, bias and limits of agreement with their bands; `write` puts a value into words."""
    ax.axhline(0, color="0.4", linewidth=1)
    if not found["sd"] > 0:
        ax.text(0.5, 0.75, f"no limits of agreement (n = {found['n']})", ha="center", transform=ax.transAxes)
    lines = [line for line in (("loa_high", "+1.96 SD", VERMILLION, "--"), ("bias", "bias", BLUE, "-"), ("loa_low", "-1.96 SD", VERMILLION, "--"))
             if np.isfinite(found[line[0]]) and (line[0] == "bias" or found["sd"] > 0)]
    for name, _, colour, style in lines:
        if found["sd"] > 0:
            ax.axhspan(*found[name + "_ci"], color=colour, alpha=0.12, linewidth=0)
        ax.axhline(found[name], color=colour, linestyle=style, linewidth=1.3)
    apart = _LABEL * np.ptp(ax.get_ylim())
    places = {"bias": found["bias"], "loa_high": max(found["loa_high"], found["bias"] + apart), "loa_low": min(found["loa_low"], found["bias"] - apart)}
    for name, label, colour, _ in lines:
        ax.text(1.01, places[name], f"{label}\n{write(found[name])}", va="center", color=colour, fontsize=9, transform=ax.get_yaxis_transform())


def _beside(ax, place: float, words: str) -> None:
    ax.text(1.02, place, words, va="center", fontsize=9, transform=ax.get_yaxis_transform())


def _group(ax, place: float, values, colour: str, marker: str, seed: int, label: str | None = None) -> None:
    """The values of a group of cases in a row of the chart, below them their mean and its 95 % bootstrap interval, and
    these in words at its end."""
    values = np.sort(np.asarray(values, float))
    values = values[np.isfinite(values)]
    mean, low, high, _ = agreement.bootstrap_ci(values, seed)
    ax.plot(values, place + 0.16 * (np.arange(len(values)) % 3) - 0.3, color=colour, marker=marker, alpha=0.85, label=label,
            **POINTS | dict(markersize=6 if len(values) < 30 else 4))
    if len(values) > 1:
        ax.plot([low, mean, high], [place + 0.32] * 3, **_MEAN)
    _beside(ax, place, f"{interval(mean, low, high, 2)}, n = {len(values)}")


def _rows(ax, names, places, bottom: float) -> None:
    """A row of the chart for each name, from the top down to `bottom`; scores from 0 to 1 along it."""
    ax.set_yticks(places, names)
    ax.set(xlim=(-0.02, 1.02), ylim=(bottom, -0.7))
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)


def site_figure(metrics: pd.DataFrame, seed: int = 42) -> Figure:
    """Dice of each case by site and system, with mean and 95 % bootstrap interval (`seed`) of each group, drawn and in words."""
    systems, sites = list(metrics.system.unique()), sorted(metrics.site.unique())
    step = len(systems) + 0.6
    fig, axes = page(1, 1, (8, 0.28 * step * len(sites) + 1.3))
    ax = axes[0, 0]
    for j, site in enumerate(sites):
        for i, (system, style) in enumerate(zip(systems, _SYSTEMS * len(systems))):
            values = metrics[(metrics.system == system) & (metrics.site == site)].dsc
            _group(ax, j * step + i, values, *style, seed, label=system if j == 0 else None)
    _rows(ax, sites, np.arange(len(sites)) * step + (len(systems) - 1) / 2, step * len(sites) - 0.7)
    for edge in range(1, len(sites)):
        ax.axhline(edge * step - 0.7, color="0.6", linewidth=0.8)
    ax.set_xlabel("Dice")
    fig.legend(handles=[*ax.get_legend_handles_labels()[0], _MEAN_KEY], loc="outside upper center", ncols=3, **LEGEND)
    return fig


def strata_figure(metrics: pd.DataFrame, lesions: pd.DataFrame, zones: pd.DataFrame, seed: int = 42) -> Figure:
    """Where the operating point fails: Dice of each case by lesion burden (thirds of the cases), lesion recall and
    precision by lesion size, and Dice in periventricular and deep white matter, this left out where `zones` is empty.

    `metrics` as in the run folder, `lesions` as `agreement.size_table` takes them, `zones`
    with a row a case and zone: `case`, `zone`, `dsc`. Means with 95 % bootstrap intervals over cases (`seed`)."""
    own, sizes = metrics[metrics.system == SYSTEMS[0]], agreement.size_table(lesions, seed)
    burden = agreement.tertiles(own.reference_ml)
    groups = [("Dice by lesion burden", [(name, own.dsc[burden == name]) for name in burden.categories])]
    if len(zones):
        groups.append(("Dice by zone", [(name, part.dsc) for name, part in zones.groupby("zone", sort=False)]))
    heights = [len(groups[0][1]), 1.4 * len(sizes), *(len(rows) for _, rows in groups[1:])]
    fig, axes = page(len(heights), 1, (8, 0.36 * sum(heights) + 0.6 * len(heights) + 0.6), sharex=True, height_ratios=heights)
    by_size, *by_case = axes[[1, 0, *range(2, len(heights))], 0]
    for ax, (title, rows) in zip(by_case, groups):
        for place, (_, values) in enumerate(rows):
            _group(ax, place, values, BLUE, "o", seed, label="case")
        _rows(ax, [name for name, _ in rows], range(len(rows)), len(rows) - 0.4)
        ax.set_title(title, loc="left")
    for shift, share, total, colour, marker in ((-0.2, "recall", "reference", GREEN, "^"), (0.2, "precision", "result", ORANGE, "s")):
        places, shares = sizes.index + shift, sizes[share]
        by_size.hlines(places, sizes[share + "_low"], sizes[share + "_high"], color="black", linewidth=1.6)
        by_size.plot(shares, places, color=colour, marker=marker, label=f"{share} (of {total} lesions)",
                     **POINTS | dict(markersize=8))
        for place, *row in zip(places, shares, sizes[share + "_low"], sizes[share + "_high"], sizes[total]):
            _beside(by_size, place, f"{interval(*row[:3], 2)}, n = {row[3]}")
    _rows(by_size, sizes["size"].str.replace("mm3", "mm³"), sizes.index, len(sizes) - 0.4)
    by_size.set_title("Lesion recall and precision by lesion size", loc="left")
    keys = [by_case[0].get_legend_handles_labels()[0][0], *by_size.get_legend_handles_labels()[0], _MEAN_KEY]
    fig.legend(handles=keys, loc="outside lower center", ncols=4, **LEGEND)
    return fig


def calibration_figure(calibration: pd.DataFrame, seed: int = 42) -> Figure:
    """Reliability of the voxels' probability over all cases: the share that is lesion over the mean probability of each
    bin, the diagonal, the expected calibration error (ECE; over all voxels, and without the first bin, which is nearly all
    background) and Brier score with their intervals, and below how many voxels lie in a bin. `calibration` has a row a case
    and bin, as `agreement.reliability` takes it."""
    bins, error = agreement.reliability(calibration), agreement.calibration_error(calibration, seed)
    filled = bins[bins.voxels > 0]
    fig, (ax, strip) = page(2, 1, (5.4, 5.8), sharex=True, height_ratios=(4, 1))
    ax, strip = ax[0], strip[0]
    ax.plot([0, 1], [0, 1], color="0.4", linewidth=1, label="calibrated")
    ax.plot(filled.probability, filled.lesion, color=BLUE, marker="o", markersize=6, label=f"observed (n = {error['n']})")
    ax.set(ylabel="share of voxels that are lesion", xlim=(-0.01, 1.01), ylim=(-0.01, 1.03))
    ax.text(0.98, 0.04, "\n".join(f"{name} {interval(error[key], *error[key + '_ci'], 4)}" for name, key in
                                  (("ECE", "ece"), (f"ECE from {1 / agreement.BINS:.2f} up", "ece_found"), ("Brier", "brier"))), ha="right", transform=ax.transAxes, linespacing=1.5)
    ax.legend(loc="upper left", **LEGEND)
    strip.bar((filled.bin + 0.5) / agreement.BINS, filled.voxels, width=0.9 / agreement.BINS, color="0.55")
    strip.set(xlabel="predicted probability", ylabel="voxels", yscale="log")
    return fig


def uncertainty_figure(uncertainty: pd.DataFrame, point: dict) -> Figure:
    """Dice of each case over its uncertainty, with the limit above which the model calls itself unsure
    (`point["unsure_above"]`) and the Dice below which a case counts as poor (`poor_below`); the worst three cases are named.
    `uncertainty` has a row a case: `case`, `dsc` (NaN: left out), `uncertainty`, `unsure`."""
    cases = uncertainty.dropna(subset=["dsc", "uncertainty"])
    fig, axes = page(1, 1, (8, 4.8))
    ax, limit, poor = axes[0, 0], point["unsure_above"], point["poor_below"]
    for flagged, name, colour, marker in ((False, "sure", BLUE, "o"), (True, "flagged as unsure", ORANGE, "s")):
        part = cases[cases.unsure == flagged]
        ax.plot(part.uncertainty, part.dsc, color=colour, marker=marker, label=f"{name} ({len(part)})", **POINTS)
    ax.axvline(limit, color=VERMILLION, linestyle="--", linewidth=1.3, label=f"limit {limit:.3g}")
    ax.axhline(poor, color="0.3", linestyle=":", linewidth=1.3, label=f"poor: Dice below {poor:.2f}")
    worst = cases.nsmallest(3, "dsc")
    ax.plot(worst.uncertainty, worst.dsc, color="none", marker="o", markersize=12, markeredgecolor="black", linestyle="")
    names = ", ".join(f"{row.case} {row.dsc:.2f}" for row in worst.itertuples())
    ax.set_title(textwrap.fill(f"lowest Dice (ringed): {names}", 90), loc="left", fontsize=9.5)
    ax.set(xlabel="uncertainty of the case", ylabel="Dice", ylim=(-0.04, 1.02))
    fig.legend(loc="outside upper center", ncols=4, **LEGEND)
    return fig
