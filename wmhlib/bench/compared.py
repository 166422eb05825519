"""Tables and figures of notebook 07_compare, with their captions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..adapters import budget
from ..compare import pareto
from ..figures import BLUE, LEGEND, ORANGE, POINTS, captioned, page
from ..metrics import SCORES
from ..precision import best_device
from ..report import DECIMALS, HEADS, intervals
from ..settings import Recipe
from ..trained import weights_bytes
from ..wording import words as in_words
from .steps import Step, step_memories
from .table import alternate

_DECIMALS = DECIMALS | dict(dsc=3)  # methods lie close together


def shown(table: pd.DataFrame, data: str = "") -> pd.DataFrame:
    """The scores of `compare.summary`, ready to read, in the words of `data`."""
    columns = {HEADS[score]: intervals(table, score, _DECIMALS[score]) for score in SCORES}
    if table.left_out.any():
        columns["left out"] = table.left_out.map(in_words(data)).replace("", "none")
    return pd.DataFrame(columns).set_axis(table.system.rename("system")).rename(columns=in_words(data))


def shown_costs(table: pd.DataFrame) -> pd.DataFrame:
    """The costs of `compare.summary`, ready to read."""
    parts = (("trainable", "trained", "{:,.0f}", 1), ("adapter", "in the adapter", "{:,.0f}", 1), ("share_percent", "of all", "{:.2f} %", 1), ("file_mb", "file (MB)", "{:.1f}", 1),
             ("peak_mb", "peak (MB)", "{:.0f}", 1), ("step_s", "step (ms)", "{:.0f}", 1e3), ("step_ratio", "step ratio", "{:.2f}", 1))
    return pd.DataFrame({head: (table[name] * scale).map(form.format) for name, head, form, scale in parts}).set_axis(table.system.rename("system"))


def costs(recipe: Recipe, named: dict[str, str], repetitions: int = 5) -> pd.DataFrame:
    """What each system costs, a row each: `trainable` parameters, of them the `adapter`'s, `share_percent` of all parameters of the
    network (encoder, adapter, decoder, channel adapter, skip), `file_mb` of its weights file, `step_s` (median of a training step on a
    batch, on a GPU where there is one), `step_ratio` to LoRA's at the ranks of `recipe`, with which it takes turns, and `peak_mb` of a fresh
    process on the CPU in which one runs."""
    device = best_device()
    recipes = {name: recipe.with_overrides(overrides) for name, overrides in named.items()}
    rows, lora = [], Step(recipe.with_overrides("adapter.method=lora"), "ours", device)
    for (name, own), memory in zip(recipes.items(), step_memories(list(recipes.values()), "ours")):
        step = Step(own, "ours", device)
        spent, _ = alternate({"lora": lora.run, "own": step.run}, repetitions, warm=True)
        counts, seconds = budget(step.network), float(np.median(spent["own"]))
        rows.append(dict(system=name, trainable=counts["trainable"], adapter=counts["adapter"], share_percent=counts["share_percent"],
                         file_mb=1e-6 * len(weights_bytes(step.network, {"recipe": own.to_json()})), peak_mb=sum(memory.values()), step_s=seconds,
                         step_ratio=seconds / float(np.median(spent["lora"]))))
    return pd.DataFrame(rows, columns=["system", "trainable", "adapter", "share_percent", "file_mb", "peak_mb", "step_s", "step_ratio"])


def pareto_figure(table: pd.DataFrame) -> Figure:
    """Mean Dice of each system, with its interval over seeds, against what it trains of the encoder or beside it; `table` as `summary` gives it
    with costs."""
    fig, axes = page(1, 1, (8, 4.6))
    ax, best = axes[0, 0], table[pareto(table)].sort_values("adapter")
    ax.step(best.adapter, best.dsc, where="post", color=ORANGE, linewidth=1.3, label="no better with as few")
    ax.errorbar(table.adapter, table.dsc, yerr=[table.dsc - table.dsc_low, table.dsc_high - table.dsc], fmt="none", ecolor="0.6", elinewidth=1)
    ax.plot(table.adapter, table.dsc, color=BLUE, marker="o", label="a system: mean and interval over seeds", **POINTS)
    for _, near in table.sort_values("dsc").groupby(np.log10(table.adapter + 1).round(1)):
        for i, row in enumerate(near.itertuples()):
            ax.annotate(row.system, (near.adapter.max(), near.dsc.mean()), (7, 6 + 10 * (i - (len(near) - 1) / 2)), textcoords="offset points", va="center", fontsize=8)
    ax.set_xscale("symlog", linthresh=1000)  # the decoder alone has none
    ax.set(xlabel="trained parameters of the encoder or beside it", ylabel="mean Dice", xlim=(-200, None), xticks=[0, *(10**k for k in range(3, 9) if 10**k < table.adapter.max())])
    fig.legend(loc="outside lower center", ncols=2, **LEGEND)
    return fig


CAPTIONS = {
    "methods":
        "Mean over {n} test cases ({data}) and {seeds} seeds, in brackets the 95 % t interval over the seeds: one view at 0.5, weights of the epoch that was best "
        "on validation cases. The same base, cases, budget and rate for all, those of the LoRA recipe. Left out of a mean: results without that score, since nothing "
        "was found, or nothing is there. Good: intervals that do not overlap; those that do say that the seeds matter as much.",
    "costs":
        "What each costs. Trained: adapter, decoder, channel adapter and skip; its share is of all parameters of the network, the frozen encoder included and nothing besides. "
        "File: the weights a run leaves. Step: a batch on {machine}, its ratio to that of LoRA at the recipe's ranks, with which it took turns; peak: the whole of a "
        "fresh process on the CPU. Good: few parameters, a ratio near 1.",
    "pareto":
        "What a parameter buys, {n} test cases ({data}), {seeds} seeds. Decoder, channel adapter and skip are trained by all and not counted here. Good: a point on the line, "
        "to the left; where bars overlap, the paired tests below tell systems apart. Names of systems with about as many parameters stand in the order of their Dice.",
    "tests":
        "Paired differences in Dice between the first-named system and each other over the same {n} test cases ({data}), each the mean of {seeds} seeds: bootstrap "
        "interval over cases, Wilcoxon's signed-rank test, p adjusted after Holm. Good: a small p means more than these cases; a large one is no proof of equality.",
    "ablations":
        "The recipe with one thing changed at a time, mean over {n} test cases ({data}) and {seeds} seeds with the 95 % t interval over the seeds. Where T1 or neighbours "
        "come in, channel adapter and skip begin at random instead of the base's. A part pays where leaving it out costs Dice, or adding it gains some; the paired tests "
        "below say which differences are more than these cases.",
}


def caption(name: str, data: str, table: pd.DataFrame, machine: str = "") -> str:
    """What figure or table `name` shows and what good looks like; `table` as `compare.summary` gives it, `machine` what steps ran on."""
    return CAPTIONS[name].format(data=data, n=table.n.max(), seeds=table.seeds.max(), machine=machine)


def show(figure: Figure, folder: str | Path, name: str, words: str) -> None:
    """Keeps `figure` as <folder>/<name>.png and displays it with its caption."""
    captioned(figure, words, Path(folder) / f"{name}.png")


def tell(table: pd.DataFrame, words: str) -> None:
    """Displays `table` with its caption, or that there is nothing to show yet."""
    if table.empty:
        print("Nothing to show yet: a system counts when all of its seeds are finished, a test needs two systems.")
    else:
        captioned(table, words)
