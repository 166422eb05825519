"""Every figure a notebook shows; colours that stay apart for colour-blind readers and in grey."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator
from nibabel.affines import voxel_sizes

from .errors import InputError
from .metrics import bland_altman, r_squared, reference_parts
from .search import plateau
from .slices import head_box, height_mm, label_row, mask_colour, name_sides, outline, show, to_display
from .workspace import atomic

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
_MARKERS = list(zip((BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY), "os^Dvp"))
_HIT, _FALSE, _MISSED = SKY, YELLOW, VERMILLION  # apart in lightness too
_STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
          "grid.color": "0.9", "axes.axisbelow": True}
_LEGEND = dict(frameon=False, fontsize=9)
_POINTS = dict(linestyle="", markersize=6, markeredgecolor="white", markeredgewidth=0.5)
_STAR = dict(color="white", marker="*", markersize=14, markeredgecolor="black", linestyle="")


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
            ax.text(1.01, agreement[name], f"{label}\n{agreement[name]:+z.1f} mL", va="center", color=colour,
                    fontsize=8.5, transform=ax.get_yaxis_transform())
    ax.set(title="Agreement", xlabel="mean of result and reference (mL)", ylabel="result - reference (mL)")
    return fig


def predictions_figure(rows: list[dict]) -> Figure:
    """FLAIR, ground truth, prediction and error map of one slice a case; `rows` are gallery rows of `report`.
    Raises InputError where there is none."""
    if not rows:
        raise InputError("no predictions to show: expected a case with a Dice and found none; check that the masks of "
                         "the test cases hold lesions")
    heights = [row["flair"].shape[0] * row["spacing"][0] / (row["flair"].shape[1] * row["spacing"][1]) for row in rows]
    fig, axes = _page(len(rows), 4, (10, 2.45 * sum(heights) + 0.7), height_ratios=heights)
    for line, row in zip(axes, rows):
        lesion, ignored = reference_parts(row["reference"])
        result = row["result"].astype(bool) & ~ignored
        for ax in line:
            show(ax, row["flair"], row["spacing"], dim=0.5 if ax is line[3] else 1)
        name_sides(line[0], row["spacing"], row["flair"].shape)
        outline(line[1], lesion, YELLOW)
        outline(line[1], ignored, "white", "dotted")
        outline(line[2], result, YELLOW)
        for part, colour in ((lesion & result, _HIT), (result & ~lesion, _FALSE), (lesion & ~result, _MISSED)):
            line[3].imshow(mask_colour(part, colour), aspect=line[3].get_aspect(), interpolation="nearest")
        rank = f"{row['rank']}: " if "rank" in row else ""
        label_row(line[0], f"{rank}{row['case']}\nDice {row['dsc']:.2f}")
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
    systems, sites = metrics.system.unique(), sorted(metrics.site.unique())
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
        box = head_box(flair[..., chosen].max(2))
        for ax, z in zip(line, chosen):
            show(ax, flair[..., z][box], spacing)
            outline(ax, reference_parts(reference)[0][..., z][box], YELLOW)
        name_sides(line[0], spacing, flair[..., 0][box].shape)
        size = " x ".join(f"{s:.2g}" for s in voxel_sizes(case["affine"]))
        label_row(line[0], f"{case['case']}\n{size} mm")
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
    box = head_box(flair[..., chosen].max(2))
    height = flair[..., 0][box].shape[0] * spacing[0] / (flair[..., 0][box].shape[1] * spacing[1])
    fig, axes = _page(2 + len(panels), len(chosen), (2.0 * len(chosen) + 0.9, 2.0 * height * (2 + len(panels)) + 0.3))
    for column, z in zip(axes.T, chosen):
        for ax in column:
            show(ax, flair[..., z][box], spacing, dim=1 if ax in column[:2] else 0.6)
        column[0].set_title(f"z = {height_mm(affine, prob.shape, z):.0f} mm", fontsize=9)
        outline(column[1], mask[..., z][box], YELLOW)
        for ax, volume, top in zip(column[2:], panels, (1.0, 0.5)):
            values = volume[..., z][box]
            image = ax.imshow(values, cmap="inferno", vmin=0, vmax=top, alpha=np.clip(values / top * 4, 0, 1),
                              aspect=ax.get_aspect(), interpolation="nearest")
            if z == chosen[-1]:
                fig.colorbar(image, ax=axes[list(column).index(ax)].tolist(), pad=0.01, aspect=12)
    name_sides(axes[0, 0], spacing, flair[..., 0][box].shape)
    for line, label in zip(axes, ("FLAIR", "lesions found", "probability", "spread over views")):
        label_row(line[0], label)
    return fig
