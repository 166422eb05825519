"""Figures of scans, training and search, and the page all figures share; colours that stay apart for colour-blind
readers and in grey."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator
from nibabel.affines import voxel_sizes

from .errors import InputError
from .files import atomic
from .metrics import reference_parts
from .search import NEAR_BEST, plateau
from .slices import (
    enlarge,
    head_box,
    height_mm,
    label_row,
    mask_colour,
    name_sides,
    outline,
    show,
    tallness,
    to_display,
)

BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442")
MARKERS = list(zip((BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY), "os^Dvp"))
_HIT, _FALSE, _MISSED = SKY, YELLOW, VERMILLION  # apart in lightness too
_STYLE = {"font.size": 10, "axes.titlesize": 10.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
          "grid.color": "0.9", "axes.axisbelow": True}
LEGEND = dict(frameon=False, fontsize=9.5)
POINTS = dict(linestyle="", markersize=6, markeredgecolor="white", markeredgewidth=0.5)
_STAR = dict(color="white", marker="*", markersize=14, markeredgecolor="black", linestyle="")
_RECIPE = _STAR | dict(marker="D", markersize=9)
_DPI = 150
_PNG = dict(format="png", dpi=_DPI, metadata={"Software": None}, pil_kwargs={"compress_level": 3})  # 6 takes 3 times as long for 0.3 % less


class _Page(Figure):
    """A figure that shows itself in a notebook without pyplot's global state."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, **_PNG)
        return buffer.getvalue()


def page(rows: int, columns: int, size: tuple[float, float], **grid) -> tuple[Figure, np.ndarray]:
    """A figure of `size` inches, and its axes, rows x columns; `grid`: what `Figure.subplots` takes besides."""
    with matplotlib.rc_context(_STYLE):
        fig = _Page(figsize=size, layout="constrained")
        return fig, fig.subplots(rows, columns, squeeze=False, **grid)


def save_figure(fig: Figure, path: str | Path) -> Path:
    """Write `fig` as PNG at 150 dpi, atomically and without date or version: the same figure gives the same bytes."""
    with atomic(path) as temporary:
        fig.savefig(temporary, **_PNG)
    return Path(path)


def captioned(shown: Figure | pd.DataFrame, words: str, path: str | Path = "") -> None:
    """Displays a figure, which is kept as `path` where one is given, or a table, of which nothing is cut, and `words` (Markdown, one paragraph)
    as its caption (see `pages`)."""
    from IPython.display import Markdown, display

    if path:
        save_figure(shown, path)
    with pd.option_context("display.max_rows", None, "display.max_colwidth", None):
        display(shown, Markdown(words))


def training_curves(history: pd.DataFrame) -> Figure:
    """Loss, its parts, validation Dice and learning rate over `epoch`; columns that are not there are left out."""
    fig, axes = page(2, 2, (8, 5.6), sharex=True)
    panels = {"Loss": dict(train_loss="training", val_loss="validation"),
              "Parts of the training loss": dict(focal="focal", dice="Dice", boundary="boundary", tversky="Tversky", scales="scales", edges="borders' map",
                                                tissue="tissues", prompts="prompts", orthogonality="orthogonality"),
              "Validation Dice at 0.5": dict(val_dice="validation"), "Learning rate": dict(lr="learning rate")}
    for ax, (title, columns) in zip(axes.flat, panels.items()):
        shown = {column: label for column, label in columns.items() if column in history}
        for (colour, marker), (column, label) in zip(itertools.cycle(MARKERS), shown.items()):
            line = history[["epoch", column]].dropna()
            ax.plot(line.epoch, line[column], color=colour, marker=marker, markersize=3.5, label=label)
        ax.set_title(title, loc="left")
        if len(ax.lines) > 1:
            ax.legend(**LEGEND)
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


def search_heatmap(table: pd.DataFrame, chosen: dict, recipe_point: dict | None = None) -> Figure:
    """Mean validation Dice over threshold and smallest component kept, without and with TTA, a row of panels for each
    `unit` of component size; plateau outlined, choice marked, and the recipe's point (`threshold`, `min_voxels`, `tta`)
    where it is given."""
    table = table.assign(plateau=plateau(table))
    units = sorted(table.unit.unique(), reverse=True)
    fig, axes = page(len(units), 2, (8, 2.9 * len(units) + 0.8), sharex=True)
    low, high = np.nanpercentile(table.dsc, 20), np.nanmax(table.dsc)
    for line, unit in zip(axes, units):
        for ax, tta in zip(line, (False, True)):
            part = table[(table.unit == unit) & (table.tta == tta)]
            grid, inside = (part.pivot(index="size", columns="threshold", values=v) for v in ("dsc", "plateau"))
            image = ax.imshow(grid, origin="lower", aspect="auto", cmap="cividis", vmin=low, vmax=high)
            _cells(ax, inside.to_numpy(bool))
            step = -(-len(grid.columns) // 6)
            ax.set_xticks(range(0, len(grid.columns), step), [f"{t:g}" for t in grid.columns[::step]])
            ax.set_yticks(range(len(grid.index)), [f"{size:g}" for size in grid.index])
            ax.grid(False)
            for point, style in ((recipe_point, _RECIPE), (chosen, _STAR)):
                if point and (unit, tta) == (_unit(point), point["tta"]):
                    ax.plot(grid.columns.get_indexer([point["threshold"]], method="nearest"),
                            grid.index.get_indexer([point["min_" + unit]], method="nearest"), **style)
        line[0].set_ylabel("smallest component\nkept (" + unit.replace("mm3", "mm³") + ")")
    for ax, name in zip(axes[0], ("one view", "with TTA")):
        ax.set_title(name)
    for ax in axes[-1]:
        ax.set_xlabel("threshold")
    fig.colorbar(image, ax=axes, label="mean Dice", extend="min", pad=0.01, aspect=30)
    handles = [Line2D([], [], label="chosen", **_STAR), Line2D([], [], label="recipe's point", **_RECIPE),
               Line2D([], [], color=VERMILLION, linewidth=2, label=f"plateau: {NEAR_BEST}")]
    fig.legend(handles=handles if recipe_point else handles[::2], loc="outside lower center", ncols=3, **LEGEND)
    return fig


def _unit(point: dict) -> str:
    """The unit of size that an operating point goes by."""
    return "mm3" if point.get("min_mm3") else "voxels"


def _cells(ax, inside: np.ndarray) -> None:
    """The border of a set of heat-map cells."""
    padded = np.pad(inside, 1)
    sides = [[(column - 0.5 - (axis == 0), row - 0.5 - (axis == 1)), (column - 0.5, row - 0.5)]
             for axis in (0, 1) for row, column in np.argwhere(np.diff(padded, axis=axis))]
    for colour, width in (("black", 3.6), (VERMILLION, 2)):
        ax.add_collection(LineCollection(sides, colors=colour, linewidths=width, capstyle="round", clip_on=False))


def predictions_figure(rows: list[dict]) -> Figure:
    """A slice of each case: FLAIR whole, then ground truth, prediction, error map and entropy enlarged where lesions or
    alarms are (the frame in the FLAIR). `rows` are gallery rows: `case`, `dsc`, 2-D `flair`, `reference`, `result`, `entropy` as shown,
    `spacing` (mm, rows and columns), `z_mm` (None of an image, which has no sides either); and, named if there, `rank`, `reference_ml`,
    `result_ml`. Raises InputError where there is none."""
    if not rows:
        raise InputError("no predictions to show: expected at least one case")
    heights = [tallness(row["flair"], row["spacing"]) for row in rows]
    fig, axes = page(len(rows), 5, (8, 1.55 * sum(heights) + 0.35 * len(rows) + 0.4), height_ratios=heights)
    for line, row in zip(axes, rows):
        lesion, ignored = reference_parts(row["reference"])
        result = row["result"].astype(bool) & ~ignored
        for ax, name in zip(line, ("FLAIR", "ground truth", "prediction", "error map", "entropy")):
            show(ax, row["flair"], row["spacing"], dim=1 if ax in line[:3] else 0.5, name=name)
        outline(line[1], lesion, YELLOW)
        outline(line[1], ignored, "white", "dotted")
        outline(line[2], result, YELLOW)
        for part, colour in ((lesion & result, _HIT), (result & ~lesion, _FALSE), (lesion & ~result, _MISSED)):
            line[3].imshow(mask_colour(part, colour), aspect=line[3].get_aspect(), interpolation="nearest")
        line[4].imshow(row["entropy"], cmap="inferno", vmin=0, vmax=1, alpha=np.clip(4 * row["entropy"], 0, 1),
                       aspect=line[4].get_aspect(), interpolation="nearest")
        words = [f"Dice {row['dsc']:.2f}" if np.isfinite(row["dsc"]) else "no Dice"]
        if row["z_mm"] is not None:
            name_sides(line[0], row["spacing"])
            words.append(f"z = {row['z_mm']:z.0f} mm")
        enlarge(line[0], line[1:], lesion | result, row["spacing"])
        if "reference_ml" in row:
            words.insert(1, f"reference {row['reference_ml']:.1f} mL, result {row['result_ml']:.1f} mL")
        rank = f"{row['rank']}: " if "rank" in row else ""
        line[0].text(0, 1.03, f"{rank}{row['case']} ({'; '.join(words)})", transform=line[0].transAxes, in_layout=False)
        line[1].set_title(" ")  # the height of that text, which is wider than its panel
    handles = [Patch(facecolor=colour, edgecolor="black", linewidth=0.5, label=label) for colour, label in
               ((_HIT, "found"), (_FALSE, "false alarm"), (_MISSED, "missed"))]
    if any((row["reference"] == 2).any() for row in rows):
        handles.append(Line2D([], [], color="0.5", linestyle="dotted", label="other pathology, not scored"))
    fig.legend(handles=handles, loc="outside lower center", ncols=4, **LEGEND)
    return fig


def split_figure(split: pd.DataFrame) -> Figure:
    """Lesion burden (mL, log scale) of every case by site, in three columns for train, val and test."""
    fig, axes = page(1, 1, (8, 3.8))
    ax, sites = axes[0, 0], sorted(split.site.unique())
    for (colour, marker), (offset, name) in zip(MARKERS, enumerate(("train", "val", "test"), start=-1)):
        part = split[split.split == name].sort_values("lesion_ml")
        spread = part.groupby("site").cumcount() % 3 - 1
        ax.plot(part.site.map(sites.index) + 0.26 * offset + 0.05 * spread, part.lesion_ml, color=colour, marker=marker,
                label=f"{name} ({len(part)})", **POINTS)
    empty = (split.lesion_ml <= 0).any()
    ax.set_yscale("symlog" if empty else "log")
    if not empty:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xticks(range(len(sites)), [f"{site}\n{(split.site == site).sum()} cases" for site in sites])
    ax.set(ylabel="lesion volume (mL)", xlim=(-0.5, len(sites) - 0.5))
    ax.grid(axis="x", visible=False)
    fig.legend(loc="outside upper center", ncols=3, **LEGEND)
    return fig


def cohort_figure(cases: list[dict], slices: int = 6) -> Figure:
    """Slices of several cases from low to high, a row each: dicts with `case`, `flair`, `affine` (H x W x D and 4 x 4)
    and, if the lesions are to be outlined, `reference`. Of images, all with `image` True, a column each: as it is, and outlined."""
    if all(case.get("image") for case in cases):
        return _images_figure(cases)
    fig, axes = page(len(cases), slices, (1.3 * slices + 0.4, 1.6 * len(cases)))
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
        name_sides(line[0], spacing)
        size = " x ".join(f"{s:.2g}" for s in voxel_sizes(case["affine"]))
        label_row(line[0], f"{case['case']}\n{size} mm")
    return fig


def _images_figure(cases: list[dict]) -> Figure:
    fig, axes = page(2, len(cases), (1.6 * len(cases) + 0.4, 3.6))
    for column, case in zip(axes.T, cases):
        for ax in column:
            show(ax, case["flair"][..., 0], (1, 1))
        outline(column[1], reference_parts(case["reference"])[0][..., 0], YELLOW)
        column[0].set_title(case["case"], fontsize=8)
    return fig


def overlay_figure(flair: np.ndarray, mask: np.ndarray, prob: np.ndarray, entropy: np.ndarray, affine: np.ndarray,
                   slices: int = 5) -> Figure:
    """One scan's prediction on slices through its lesions: the scan, mask outline, probability (0-1) and entropy (bits, 0-1), all
    H x W x D on the scan's grid."""
    (flair, mask, *panels), spacing = to_display(affine, flair, np.asarray(mask, bool), prob, entropy)
    area = mask.sum((0, 1))
    share = np.cumsum(area) / max(area.sum(), 1) if area.any() else np.linspace(-0.2, 1.2, len(area))
    chosen = set(np.searchsorted(share[:-1], np.linspace(0.1, 0.9, slices)).tolist())
    others = sorted(set(range(len(area))) - chosen, key=lambda z: min(abs(z - c) for c in chosen))
    chosen = sorted(chosen | set(others[: slices - len(chosen)]))
    box = head_box(flair[..., chosen].max(2))
    fig, axes = page(4, len(chosen), (1.5 * len(chosen) + 0.8, 6 * tallness(flair[..., 0][box], spacing) + 0.3))
    for column, z in zip(axes.T, chosen):
        for ax in column:
            show(ax, flair[..., z][box], spacing, dim=1 if ax in column[:2] else 0.6)
        column[0].set_title(f"z = {height_mm(affine, prob.shape, z):z.0f} mm", fontsize=9)
        outline(column[1], mask[..., z][box], YELLOW)
        for ax, volume in zip(column[2:], panels):
            values = volume[..., z][box]
            image = ax.imshow(values, cmap="inferno", vmin=0, vmax=1, alpha=np.clip(4 * values, 0, 1),
                              aspect=ax.get_aspect(), interpolation="nearest")
            if z == chosen[-1]:
                fig.colorbar(image, ax=axes[list(column).index(ax)].tolist(), pad=0.01, aspect=12)
    name_sides(axes[0, 0], spacing)
    for line, label in zip(axes, ("scan", "lesions found", "probability", "entropy (bits)")):
        label_row(line[0], label)
    return fig
