"""Every table and figure a notebook shows.

Volumes come in as they lie in their files, H x W x D with their affine; slices are shown as radiologists look at them:
the patient's right on the left of the image, anterior up, pixels in their true proportions.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from .metrics import (
    SCORES,
    bland_altman,
    bootstrap_ci,
    challenge_scores,
    filter_components,
    r_squared,
    reference_parts,
    volume_ml,
)
from .search import plateau
from .workspace import atomic

SYSTEMS = ("operating point", "network at 0.5", "FLAIR z-score")
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
_MARKERS = list(zip((BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY), "os^Dvp"))
_HIT, _FALSE, _MISSED = SKY, YELLOW, VERMILLION  # apart in lightness too
_DECIMALS = dict(dsc=2, hd95=1, avd=1, recall=2, f1=2)
_HEADS = dict(dsc="Dice", hd95="HD95 (mm)", avd="AVD (%)", recall="lesion recall", f1="lesion F1")
_STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
          "grid.color": "0.9", "axes.axisbelow": True}
_LEGEND = dict(frameon=False, fontsize=9)
_POINTS = dict(linestyle="", markersize=6, markeredgecolor="white", markeredgewidth=0.5)
_STAR = dict(color="white", marker="*", markersize=14, markeredgecolor="black", linestyle="")


# Scores and tables


def system_masks(case: dict, point: dict) -> dict[str, np.ndarray]:
    """The boolean masks of the three systems on one case: the network at the operating point `point` (`threshold`,
    `min_voxels`, `tta`), at 0.5 with one view and no filter, and `flair_z` above `point["zscore_threshold"]` within
    `inner`."""
    prob = case["prob_tta"] if point["tta"] else case["prob"]
    masks = (filter_components(prob >= point["threshold"], point["min_voxels"]), case["prob"] >= 0.5,
             (case["flair_z"] > point["zscore_threshold"]) & case["inner"])
    return dict(zip(SYSTEMS, masks))


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


# Slices as they are shown


def to_display(affine: np.ndarray, *volumes: np.ndarray) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """The volumes with rows running to posterior, columns to the patient's left, slices to superior; and the voxel size
    in mm along these three axes."""
    native = io_orientation(affine)
    turn = ornt_transform(native, axcodes2ornt(("P", "L", "S")))
    spacing = np.empty(3)
    spacing[turn[:, 0].astype(int)] = voxel_sizes(affine)
    return tuple(apply_orientation(volume, turn) for volume in volumes), spacing


def gallery_row(case: dict, result: np.ndarray, dsc: float) -> dict:
    """The slice of a case with most lesion, cropped to the head: `case`, `site`, `dsc`, 2-D `flair`, `reference`,
    `result` as shown, `spacing` (mm, rows and columns), `z_mm`. Small, so that one can be kept of every case."""
    (flair, reference, result), spacing = to_display(case["affine"], case["flair"], case["reference"], result)
    lesion = reference_parts(reference)[0]
    z = _fullest(lesion if lesion.any() else result)
    box = _head_box(flair[..., z])
    flair, reference, result = (volume[..., z][box].copy() for volume in (flair, reference, result))
    return dict(case=case["case"], site=case["site"], dsc=float(dsc), flair=flair, reference=reference, result=result,
                spacing=tuple(spacing[:2]), z_mm=_z_mm(case["affine"], case["flair"].shape, z))


def best_median_worst(gallery: list[dict]) -> list[dict]:
    """Three of the gallery's rows by Dice, each with its `rank`; fewer where fewer cases have a Dice."""
    order = sorted((row for row in gallery if np.isfinite(row["dsc"])), key=lambda row: (-row["dsc"], row["case"]))
    places = {len(order) // 2: "median", len(order) - 1: "worst", 0: "best"}
    return [order[i] | dict(rank=places[i]) for i in sorted(places) if order]


def _fullest(mask: np.ndarray) -> int:
    """The slice with most of the mask; the middle one where it is empty."""
    area = mask.sum((0, 1))
    return int(area.argmax()) if area.any() else mask.shape[2] // 2


def _z_mm(affine: np.ndarray, shape, z: int) -> float:
    """Height in the scan's world of the middle of the displayed slice `z`."""
    native = io_orientation(affine)
    axis = int(np.flatnonzero(native[:, 0] == 2)[0])
    middle = (np.asarray(shape) - 1) / 2
    middle[axis] = z if native[axis, 1] > 0 else shape[axis] - 1 - z
    return float(apply_affine(affine, middle)[2])


def _head_box(image: np.ndarray, margin: int = 4) -> tuple[slice, slice]:
    """The rows and columns of a slice that show the head."""
    box = []
    for axis in (1, 0):
        share = _bright(image).mean(axis)
        found = np.flatnonzero(share > 0.04)
        low, high = (found[0], found[-1] + 1) if len(found) else (0, len(share))
        box.append(slice(max(0, low - margin), high + margin))
    return tuple(box)


def _bright(image: np.ndarray) -> np.ndarray:
    """Where a slice is clearly brighter than air."""
    low, high = np.percentile(image, (1, 99))
    return image > low + 0.15 * (high - low)


def _show(ax, image: np.ndarray, spacing, dim: float = 1.0) -> None:
    """A FLAIR slice in grey, scalp fat saturated where it would darken the brain; `dim` below 1 darkens all of it."""
    low, high = np.percentile(image, (1, 99.7))
    bright = _bright(image)
    if bright.any():
        high = min(high, low + 2.1 * (np.median(image[bright]) - low))
    ax.imshow(image, cmap="gray", vmin=low, vmax=low + max(high - low, 1e-6) / dim, aspect=spacing[0] / spacing[1],
              interpolation="bilinear")
    ax.set_axis_off()


def _outline(ax, mask: np.ndarray, colour: str, style: str = "solid") -> None:
    if mask.any():
        padded = np.pad(mask.astype(float), 1)
        rows, columns = (np.arange(-1, n + 1) for n in mask.shape)
        halo = [withStroke(linewidth=1.8, foreground="black")] if style == "solid" else []
        lines = ax.contour(columns, rows, padded, levels=[0.5], colors=[colour], linewidths=1, linestyles=style)
        lines.set_path_effects(halo)


def _sides(ax, spacing, shape, bar_mm: float = 20.0) -> None:
    """R and L of the patient, and a scale bar, on a slice of `shape`."""
    text = dict(color="white", fontsize=8, fontweight="bold", va="top", transform=ax.transAxes)
    ax.text(0.03, 0.98, "R", ha="left", **text)
    ax.text(0.97, 0.98, "L", ha="right", **text)
    length = bar_mm / spacing[1]
    right, bottom = shape[1] * 0.96, shape[0] * 0.97
    ax.plot([right - length, right], [bottom, bottom], color="white", linewidth=2, solid_capstyle="butt")
    ax.text(right, bottom - 0.015 * shape[0], f"{bar_mm:g} mm", color="white", fontsize=7, ha="right", va="bottom")


def _row_label(ax, text: str) -> None:
    ax.text(-0.04, 0.5, text, rotation=90, ha="right", va="center", multialignment="center", fontsize=8.5,
            transform=ax.transAxes)


def _mask_colour(mask: np.ndarray, colour: str, alpha: float = 0.9) -> np.ndarray:
    """An RGBA image of one colour where the mask is."""
    return np.concatenate([np.broadcast_to(to_rgb(colour), (*mask.shape, 3)), alpha * mask[..., None]], axis=-1)


# Figures


class _Page(Figure):
    """A figure that shows itself in a notebook without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        return buffer.getvalue()


def _page(rows: int, columns: int, size: tuple[float, float], **grid) -> tuple[Figure, np.ndarray]:
    with matplotlib.rc_context(_STYLE):
        fig = _Page(figsize=size, layout="constrained")
        return fig, fig.subplots(rows, columns, squeeze=False, **grid)


def save_figure(fig: Figure, path: str | Path) -> Path:
    """Write `fig` as PNG at 150 dpi, atomically and without date or version: the same figure gives the same bytes."""
    with atomic(path) as temporary:
        fig.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
    return Path(path)


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss, its parts, validation Dice and learning rate over `epoch`; columns that are not there are left out."""
    fig, axes = _page(2, 2, (9, 5.6), sharex=True)
    panels = {"Loss": dict(train_loss="training", val_loss="validation"),
              "Parts of the training loss": dict(focal="focal", dice="Dice", boundary="boundary", scales="scales"),
              "Validation Dice at 0.5": dict(val_dice="validation"), "Learning rate": dict(lr="learning rate")}
    for ax, (title, columns) in zip(axes.flat, panels.items()):
        for (colour, marker), (column, label) in zip(_MARKERS, columns.items()):
            if column in history:
                line = history[["epoch", column]].dropna()
                ax.plot(line.epoch, line[column], color=colour, marker=marker, markersize=3.5, label=label)
        ax.set_title(title, loc="left")
        if len(ax.lines) > 1:
            ax.legend(**_LEGEND)
    if "val_dice" in history and history.val_dice.notna().any():
        best = history.loc[history.val_dice.idxmax()]
        ax = axes[1, 0]
        ax.plot(best.epoch, best.val_dice, **_STAR)
        ax.text(0.98, 0.05, f"best {best.val_dice:.3f}, epoch {best.epoch:g}", ha="right", transform=ax.transAxes)
    axes[1, 1].set_yscale("log")
    for ax in axes[1]:
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
    return fig


def search_heatmap(table: pd.DataFrame, chosen: dict) -> Figure:
    """Mean validation Dice over threshold and component size, without and with TTA; plateau outlined, choice marked."""
    table = table.assign(plateau=plateau(table))
    fig, axes = _page(1, 2, (10, 3.4), sharey=True)
    low, high = np.nanpercentile(table.dsc, 20), table.dsc.max()
    for ax, tta in zip(axes.flat, (False, True)):
        half = table[table.tta == tta]
        grid, inside = (half.pivot(index="min_voxels", columns="threshold", values=v) for v in ("dsc", "plateau"))
        image = ax.imshow(grid, origin="lower", aspect="auto", cmap="cividis", vmin=low, vmax=high)
        _cells(ax, inside.to_numpy(bool))
        step = -(-len(grid.columns) // 10)
        ax.set_xticks(range(0, len(grid.columns), step), [f"{t:g}" for t in grid.columns[::step]])
        ax.set_yticks(range(len(grid.index)), grid.index)
        ax.set(title="with TTA" if tta else "one view", xlabel="threshold")
        ax.grid(False)
        if tta == chosen["tta"]:
            column = grid.columns.get_indexer([chosen["threshold"]], method="nearest")
            ax.plot(column, grid.index.get_loc(chosen["min_voxels"]), **_STAR)
    axes[0, 0].set_ylabel("smallest component kept (voxels)")
    fig.colorbar(image, ax=axes, label="mean Dice", extend="min", pad=0.01)
    fig.legend(handles=[Line2D([], [], label="chosen", **_STAR),
                        Line2D([], [], color=VERMILLION, label="plateau: within one standard error of the best")],
               loc="outside lower center", ncols=2, **_LEGEND)
    return fig


def _cells(ax, inside: np.ndarray) -> None:
    """The border of a set of heat-map cells."""
    padded = np.pad(inside, 1)
    for axis in (0, 1):
        for row, column in np.argwhere(np.diff(padded, axis=axis)):
            x, y = column - 0.5, row - 0.5
            ax.plot([x - (axis == 0), x], [y - (axis == 1), y], color=VERMILLION, linewidth=2, solid_capstyle="round")


def bland_altman_figure(reference_ml, result_ml, site) -> Figure:
    """Volumes of n cases in mL: result over reference with the line of identity, and their difference over their mean
    with bias and limits of agreement, each with its 95 % interval as a band. `site` gives each case's marker."""
    reference_ml, result_ml, site = (np.asarray(x) for x in (reference_ml, result_ml, site))
    agreement, r2 = bland_altman(reference_ml, result_ml), r_squared(reference_ml, result_ml)
    fig, axes = _page(1, 2, (10.5, 4.2))
    scatter, ax = axes.flat
    mean, difference = (reference_ml + result_ml) / 2, result_ml - reference_ml
    top = 1.06 * max(reference_ml.max(), result_ml.max(), 0.1)
    scatter.plot([0, top], [0, top], color="0.4", linewidth=1, label="identity")
    for (colour, marker), name in zip(_MARKERS * 9, sorted(set(site))):
        of_site = site == name
        style = dict(color=colour, marker=marker, **_POINTS)
        scatter.plot(reference_ml[of_site], result_ml[of_site], label=f"{name} ({of_site.sum()})", **style)
        ax.plot(mean[of_site], difference[of_site], **style)
    scatter.set(title="Volumes", xlabel="reference (mL)", ylabel="result (mL)", xlim=(0, top), ylim=(0, top),
                aspect="equal")
    scatter.text(0.97, 0.04, f"R² about identity {r2['identity']:.3f}\nR² of the fit {r2['fit']:.3f}", ha="right",
                 va="bottom", transform=scatter.transAxes)
    scatter.legend(loc="upper left", **_LEGEND)
    ax.axhline(0, color="0.4", linewidth=1)
    for name, label, colour, style in (("loa_high", "+1.96 SD", VERMILLION, "--"), ("bias", "bias", BLUE, "-"),
                                       ("loa_low", "-1.96 SD", VERMILLION, "--")):
        if np.isfinite(agreement[name + "_ci"]).all():
            ax.axhspan(*agreement[name + "_ci"], color=colour, alpha=0.12, linewidth=0)
            ax.axhline(agreement[name], color=colour, linestyle=style, linewidth=1.3)
            ax.text(1.01, agreement[name], f"{label}\n{agreement[name]:+.1f} mL", va="center", color=colour,
                    fontsize=8.5, transform=ax.get_yaxis_transform())
    ax.set(title="Agreement", xlabel="mean of result and reference (mL)", ylabel="result - reference (mL)")
    return fig


def predictions_figure(rows: list[dict]) -> Figure:
    """FLAIR, ground truth, prediction and error map of one slice a case; `rows` are gallery rows."""
    heights = [row["flair"].shape[0] * row["spacing"][0] / (row["flair"].shape[1] * row["spacing"][1]) for row in rows]
    fig, axes = _page(len(rows), 4, (10, 2.45 * sum(heights) + 0.7), height_ratios=heights)
    for line, row in zip(axes, rows):
        lesion, ignored = reference_parts(row["reference"])
        result = row["result"].astype(bool) & ~ignored
        for ax in line:
            _show(ax, row["flair"], row["spacing"], dim=0.5 if ax is line[3] else 1)
        _sides(line[0], row["spacing"], row["flair"].shape)
        _outline(line[1], lesion, YELLOW)
        _outline(line[1], ignored, "white", "dotted")
        _outline(line[2], result, YELLOW)
        for part, colour in ((lesion & result, _HIT), (result & ~lesion, _FALSE), (lesion & ~result, _MISSED)):
            line[3].imshow(_mask_colour(part, colour), aspect=line[3].get_aspect(), interpolation="nearest")
        rank = f"{row['rank']}: " if "rank" in row else ""
        _row_label(line[0], f"{rank}{row['case']}\nDice {row['dsc']:.2f}")
    for ax, title in zip(axes[0], ("FLAIR", "ground truth", "prediction", "error map")):
        ax.set_title(title)
    handles = [Patch(color=colour, label=label) for colour, label in
               ((_HIT, "found"), (_FALSE, "false alarm"), (_MISSED, "missed"))]
    if any((row["reference"] == 2).any() for row in rows):
        handles.append(Line2D([], [], color="0.5", linestyle="dotted", label="other pathology, not scored"))
    fig.legend(handles=handles, loc="outside lower center", ncols=4, **_LEGEND)
    return fig


def split_figure(split: pd.DataFrame) -> Figure:
    """Lesion burden (mL, log scale) of every case by site, in three columns for train, val and test."""
    fig, axes = _page(1, 1, (8, 3.8))
    ax, sites = axes[0, 0], sorted(split.site.unique())
    for (colour, marker), (offset, name) in zip(_MARKERS, enumerate(("train", "val", "test"), start=-1)):
        part = split[split.split == name].sort_values("lesion_ml")
        spread = part.groupby("site").cumcount() % 3 - 1
        ax.plot(part.site.map(sites.index) + 0.26 * offset + 0.05 * spread, part.lesion_ml, color=colour, marker=marker,
                label=f"{name} ({len(part)})", **_POINTS)
    empty = (split.lesion_ml <= 0).any()
    ax.set_yscale("symlog" if empty else "log")
    if not empty:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xticks(range(len(sites)), [f"{site}\n{(split.site == site).sum()} cases" for site in sites])
    ax.set(ylabel="lesion volume (mL)", xlim=(-0.5, len(sites) - 0.5))
    ax.grid(axis="x", visible=False)
    fig.legend(loc="outside upper center", ncols=3, **_LEGEND)
    return fig


def site_figure(metrics: pd.DataFrame) -> Figure:
    """Dice of each case by site and system, with the mean of each group as a bar."""
    systems, sites = [s for s in SYSTEMS if s in set(metrics.system)], sorted(metrics.site.unique())
    fig, axes = _page(1, 1, (8, 3.8))
    ax = axes[0, 0]
    for (colour, marker), (i, system) in zip(_MARKERS, enumerate(systems)):
        for j, site in enumerate(sites):
            values = metrics[(metrics.system == system) & (metrics.site == site)].dsc.dropna().sort_values()
            x = j + 0.26 * (i - (len(systems) - 1) / 2)
            ax.plot(x + 0.04 * (np.arange(len(values)) % 3 - 1), values, color=colour, marker=marker, alpha=0.85,
                    label=system if j == 0 else None, **_POINTS)
            ax.plot([x - 0.1, x + 0.1], [values.mean()] * 2, color="black", linewidth=1.6)
    ax.set_xticks(range(len(sites)), [f"{s}\n{metrics[metrics.site == s].case.nunique()} cases" for s in sites])
    ax.set(ylabel="Dice", ylim=(-0.02, 1), xlim=(-0.5, len(sites) - 0.5))
    ax.grid(axis="x", visible=False)
    fig.legend(loc="outside upper center", ncols=3, **_LEGEND)
    return fig


def cohort_figure(cases: list[dict], slices: int = 6) -> Figure:
    """Slices of several cases from low to high, a row each: dicts with `case`, `flair`, `affine` (H x W x D and 4 x 4)
    and, if the lesions are to be outlined, `reference`."""
    fig, axes = _page(len(cases), slices, (1.75 * slices + 0.4, 2.1 * len(cases)))
    for line, case in zip(axes, cases):
        reference = case.get("reference", np.zeros(case["flair"].shape, np.uint8))
        (flair, reference), spacing = to_display(case["affine"], case["flair"], reference)
        head = np.flatnonzero((flair > 0.2 * np.percentile(flair, 99)).mean((0, 1)) > 0.05)
        low, high = (head[0], head[-1]) if len(head) else (0, flair.shape[2] - 1)
        chosen = np.linspace(low + 0.25 * (high - low), low + 0.9 * (high - low), slices).round().astype(int)
        box = _head_box(flair[..., chosen].max(2))
        for ax, z in zip(line, chosen):
            _show(ax, flair[..., z][box], spacing)
            _outline(ax, reference_parts(reference)[0][..., z][box], YELLOW)
        _sides(line[0], spacing, flair[..., 0][box].shape)
        size = " x ".join(f"{s:.2g}" for s in voxel_sizes(case["affine"]))
        _row_label(line[0], f"{case['case']}\n{size} mm")
    return fig


def overlay_figure(flair: np.ndarray, mask: np.ndarray, prob: np.ndarray, spread: np.ndarray | None, affine: np.ndarray,
                   slices: int = 5) -> Figure:
    """One scan's prediction on slices through its lesions: FLAIR, mask outline, probability and, unless None, its
    spread over the test-time views (standard deviation). All H x W x D on the scan's grid."""
    panels = [volume for volume in (prob, spread) if volume is not None]
    (flair, mask, *panels), spacing = to_display(affine, flair, np.asarray(mask, bool), *panels)
    area = mask.sum((0, 1))
    share = np.cumsum(area) / max(area.sum(), 1) if area.any() else np.linspace(-0.2, 1.2, len(area))
    chosen = set(np.searchsorted(share, np.linspace(0.1, 0.9, slices)).tolist())
    others = sorted(set(range(len(area))) - chosen, key=lambda z: min(abs(z - c) for c in chosen))
    chosen = sorted(chosen | set(others[: slices - len(chosen)]))
    box = _head_box(flair[..., chosen].max(2))
    height = flair[..., 0][box].shape[0] * spacing[0] / (flair[..., 0][box].shape[1] * spacing[1])
    fig, axes = _page(2 + len(panels), len(chosen), (2.0 * len(chosen) + 0.9, 2.0 * height * (2 + len(panels)) + 0.3))
    for column, z in zip(axes.T, chosen):
        for ax in column:
            _show(ax, flair[..., z][box], spacing, dim=1 if ax in column[:2] else 0.6)
        column[0].set_title(f"z = {_z_mm(affine, prob.shape, z):.0f} mm", fontsize=9)
        _outline(column[1], mask[..., z][box], YELLOW)
        for ax, volume, top in zip(column[2:], panels, (1.0, 0.5)):
            values = volume[..., z][box]
            image = ax.imshow(values, cmap="inferno", vmin=0, vmax=top, alpha=np.clip(values / top * 4, 0, 1),
                              aspect=ax.get_aspect(), interpolation="nearest")
            if z == chosen[-1]:
                fig.colorbar(image, ax=axes[list(column).index(ax)].tolist(), pad=0.01, aspect=12)
    _sides(axes[0, 0], spacing, flair[..., 0][box].shape)
    for line, label in zip(axes, ("FLAIR", "lesions found", "probability", "spread over views")):
        _row_label(line[0], label)
    return fig


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
