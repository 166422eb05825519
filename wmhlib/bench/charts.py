"""Figures of notebook 10_benchmark, with their captions: ratios, roofline, growth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from ..figures import BLUE, LEGEND, POINTS, VERMILLION, captioned, page

_WHO = {"ours": (BLUE, "ours"), "segment_anything": (VERMILLION, "segment_anything, eager"), "eager": (VERMILLION, "straightforward")}
_PARTS = {"encoder": "o", "MLP": "s", "attention": "^", "decoder": "D"}
_AXES = {"cases": "cases", "slices": "slices with eight views", "px": "pixels a side", "views": "views of a case"}
_STYLES = (("o", "-"), ("s", "--"), ("^", ":"))


def roofline_figure(points: pd.DataFrame, machine: dict) -> Figure:
    """GFLOP/s over operations a byte, log scales: what the machine's memory and its matrix rates allow (lines), and what each part
    reached (points, open where they computed in fp32). `points` as `roofline.points` gives them, `machine` as `roofline.machine`."""
    fig, axes = page(1, 1, (8, 5))
    ax, bandwidth = axes[0, 0], machine["bandwidth"]
    low, high = 0.4 * min(points.intensity.min(), machine["fp32"] / bandwidth), 4 * max(points.intensity.max(), machine["bf16"] / bandwidth)
    x = np.geomspace(low, high, 200)
    for name, style in (("fp32", "--"), ("bf16", "-")):
        ax.plot(x, np.minimum(x * bandwidth, machine[name]), color="0.35", linestyle=style, linewidth=1.4)
        ax.text(high, machine[name] * 1.05, f"{name}, {machine[name]:.0f} GFLOP/s", ha="right", va="bottom", fontsize=9)
    ax.text(low * 1.6, low * bandwidth * 1.2, f"memory, {bandwidth:.0f} GB/s", ha="left", va="top", fontsize=9)
    for point in points.itertuples():
        colour, _ = _WHO[point.who]
        ax.plot(point.intensity, point.gflops, marker=_PARTS[point.part], color=colour, **POINTS | dict(markersize=9, markeredgecolor=colour,
                markerfacecolor="white" if point.precision == "fp32" else colour, markeredgewidth=1.5))
    ax.set(xscale="log", yscale="log", xlabel="operations a byte that must move (FLOP/byte)", ylabel="useful GFLOP/s", xlim=(low, high))
    ax.set_ylim(min(points.gflops.min(), low * bandwidth) * 0.6, machine["bf16"] * 2)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_minor_formatter("")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    plain = dict(linestyle="", color="0.35", markersize=8)
    keys = [Line2D([], [], marker=marker, label=part, **plain) for part, marker in _PARTS.items() if part in set(points.part)]
    keys += [Line2D([], [], linestyle="", marker="o", markersize=8, color=_WHO[who][0], markerfacecolor="white" if precision == "fp32" else _WHO[who][0],
                    label=f"{_WHO[who][1]}, {precision}") for who, precision in points[["who", "precision"]].drop_duplicates().to_numpy()]
    fig.legend(handles=keys, loc="outside upper center", ncols=4, **LEGEND)
    return fig


def growth_figure(growth: pd.DataFrame) -> Figure:
    """Seconds over cases, slices, pixels and views, a panel each, log scales; every point was measured. `growth` as
    `growth.growth` gives it. Panels without a point stay away."""
    kinds = [name for name in _AXES if (growth.along == name).any()]
    fig, axes = page(-(-len(kinds) // 2), min(2, len(kinds)), (8, 3.2 * -(-len(kinds) // 2)))
    for ax, along in zip(axes.flat, kinds):
        part = growth[growth.along == along]
        for (marker, style), ((what, who), line) in zip(_STYLES, part.groupby(["what", "who"], sort=False)):
            label = _WHO[who][1] if part.who.nunique() > 1 else what
            colour = _WHO[who][0] if part.who.nunique() > 1 else BLUE if marker == "o" else VERMILLION
            ax.plot(line.n, line.seconds, color=colour, marker=marker, linestyle=style, markersize=5, label=f"{label} {_slope(line)}")
        ax.set(xscale="log", yscale="log", xlabel=_AXES[along], ylabel="seconds", title=f"by {_AXES[along].split()[0]}")
        ax.set_xticks(sorted(part.n.unique()), [f"{n:g}" for n in sorted(part.n.unique())])
        ax.minorticks_off()
        ax.set_ylim(part.seconds.min() / 2, part.seconds.max() * 4)
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if part.seconds.max() < 100 * part.seconds.min() else (1,)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.legend(loc="upper left", **LEGEND)
    for ax in axes.flat[len(kinds) :]:
        ax.set_axis_off()
    return fig


def _slope(line: pd.DataFrame) -> str:
    """The exponent of growth: slope of the straight line through the points on log scales."""
    if len(line) < 2:
        return ""
    return f"(n^{np.polyfit(np.log(line.n.astype(float)), np.log(line.seconds), 1)[0]:.2f})"


def ratio_figure(table: pd.DataFrame) -> Figure:
    """How many times faster each row of the benchmark's table is (log scale), with what it must be."""
    rows = table[table.ratio.notna()].iloc[::-1].reset_index(drop=True)
    fig, axes = page(1, 1, (8, 0.34 * len(rows) + 1.2))
    ax = axes[0, 0]
    ax.hlines(rows.index, 1, rows.ratio, color=BLUE, linewidth=2)
    ax.plot(rows.ratio, rows.index, color=BLUE, marker="o", label="measured", **POINTS | dict(markersize=8))
    ax.plot(rows.target, rows.index, color=VERMILLION, marker="|", linestyle="", markersize=14, markeredgewidth=2, label="must be")
    ax.axvline(1, color="0.4", linewidth=1)
    ax.set(xscale="log", xlabel="times faster\n(the matrix rate: share of it)", ylim=(-0.7, len(rows) - 0.3))
    ax.set_yticks(rows.index, rows.what)
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(axis="y", visible=False)
    fig.legend(loc="outside upper center", ncols=2, **LEGEND)
    return fig


CAPTIONS = {
    "benchmark":
        "Each row: two ways to the same result on {machine}, in one run, taken in turns where the note names no other way; medians (range) of their seconds, `ratio` baseline over "
        "ours. Error: the largest difference relative to the largest value unless the note says otherwise. Memory: baseline / ours. Good: every "
        "`reached` a yes.",
    "ratios":
        "How many times faster than the straightforward way, measured on {machine}; the bar is what each must be. Good: every point right of its bar.",
    "roofline":
        "What each part reaches of what {machine} allows: on the slope its memory limits, on the level its arithmetic (both measured here). Operations "
        "and bytes are counted, padding and norms left out, so that a part which wastes either lies lower. Good: points near the roof of their "
        "precision (open: fp32). The decoder also moves maps through norms and GELUs between its convolutions, which is not counted.",
    "growth":
        "Seconds on {machine} as the work grows, every point measured (the encoder's are the faster of two), with the exponent of the line through them. Good: straight "
        "lines of exponent 1 for cases, slices and views; 2 for pixels a side is the number of tokens, more is global attention. By now the process keeps its memory pages, "
        "which a fresh one asks the system for anew: segment_anything's encoder is faster here than in the table above.",
    "tokens":
        "One block of 256 channels over the number of tokens on {machine}, forward, fp32, the fastest of several runs, with the exponent of the line through the upper half of the points. Operations "
        "are products (counted), memory the tensors held at once but for weights. Good: the state space near exponent 1 (its seconds lie above where "
        "tensors outgrow the caches), and faster than softmax attention from some number of tokens on, whose operations go towards exponent 2. Attention's memory grows linearly too, since torch's fused kernel never holds the whole matrix, and is less: "
        "the state space in plain torch keeps what a CUDA kernel would compute again.",
    "volumes":
        "The networks of volumes against MONAI's UNet and SegResNet of as many parameters on {machine}, in one run, taken in turns: medians (range) of their seconds, `ratio` MONAI's "
        "over ours; memory (tensors held at once, counted): MONAI's / ours. Above 1 ours is faster. MONAI's UNet halves the resolution in its first convolution and "
        "so leaves out most of the work at full resolution.",
    "memory":
        "The most memory that the search (arrays, the case in hand and the one before among them) and prediction (tensors) held at once on {machine}. Good: "
        "no more from three cases on, and the same however many slices come.",
    "around":
        "Each step around the network on {machine}, the least of three runs on one synthetic case of 240 x 240 x 48. Good: small beside the "
        "seconds of one scan in the table above, and beside what the network takes of them.",
    "gpu":
        "Our training step on {machine} at several batch sizes. MFU is the share of its measured matrix rate that useful operations reach; the recipe's hours are "
        "extrapolated.",
}


def caption(name: str, machine: str) -> str:
    """What figure or table `name` shows and what good looks like; `machine` as `roofline.named` gives it."""
    return CAPTIONS[name].format(machine=machine)


def show(figure: Figure, folder: str | Path, name: str, machine: str) -> None:
    """Keeps `figure` as <folder>/<name>.png and displays it with its caption."""
    captioned(figure, caption(name, machine), Path(folder) / f"{name}.png")


def tell_gpu(found: tuple[pd.DataFrame, dict] | None) -> None:
    """Displays what `steps.gpu_rates` found, or that nothing was measured."""
    from IPython.display import Markdown, display

    if found is None:
        display(Markdown("No GPU is at hand here: samples a second, MFU, memory and the recipe's hours on a GPU were **not measured**. "
                         "The same notebook measures them where there is one."))
    else:
        rates, gpu = found
        tell(rates.round({"step_s": 3, "samples_per_s": 1, "mfu": 3, "peak_mb": 0, "recipe_hours": 2}).set_index("batch"), "gpu", gpu["name"])


def tell(table: pd.DataFrame, name: str, machine: str) -> None:
    """Displays `table` with its caption."""
    captioned(table, caption(name, machine))
