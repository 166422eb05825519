"""What notebook 09 compares: the three networks of volumes at equal budget, their ensemble, and one of them over folds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from .. import agreement, compare
from ..adapters import budget
from ..engine import WMHInferenceEngine
from ..ensemble import Ensemble
from ..errors import RecipeError
from ..figures import BLUE, GREEN, LEGEND, MARKERS, ORANGE, page
from ..files import read_table, write_table
from ..network import build_network, load_network
from ..presets import planned
from ..report import interval
from ..sections import NETWORKS
from ..settings import Recipe
from ..splits import split_cases
from ..workspace import RunFolder
from .export import check, check_format, export

ENSEMBLE = "ensemble"
CAPTIONS = {
    "networks":
        "The networks, counted: all of each is trained. Budget, cases, loss and augmentation are the same for all; mamba's loss has the terms of its map of "
        "lesions' borders besides, which lift it.",
    "curves":
        "Training against validation, a column a network, first seed. Above the loss of the patches of each epoch, training with augmentation, validation "
        "without; below the Dice of whole validation cases, and across the Dice that the kept weights reach on training and on test cases, equally "
        "many. Good: both losses fall together; a network overfits where the validation loss turns up while the training loss falls, and where "
        "training cases score far above test cases.",
    "overfitting":
        "The same in numbers, first seed (losses compare within a network: mamba's counts borders too): losses of the last epoch, Dice of the kept weights (one view at 0.5). Good: a small gap between training and test "
        "cases; a large one says that more cases would help more than more epochs.",
    "results":
        "Mean over {n} test cases ({data}) and {seeds}, in brackets the 95 % bootstrap interval over cases (none below five): one view at 0.5, "
        "weights of the epoch that was best on validation cases; the ensemble averages the probabilities. Good: high Dice, recall and F1, low HD95 "
        "and AVD; where intervals overlap, the paired tests below tell systems apart.",
    "tests":
        "Paired differences in Dice of the baseline against each other on the same {n} test cases ({data}): bootstrap interval over cases, Wilcoxon's "
        "signed-rank test, p adjusted after Holm. Good: a small p means more than these cases; a large one is no proof of equality.",
    "volumes":
        "Agreement of lesion volume on {n} test cases ({data}), result minus reference in mL: bias, limits of agreement (Bland-Altman), ICC(2,1) with "
        "95 % intervals, R2 about identity. Good: a bias whose interval holds 0, narrow limits, ICC near 1.",
    "folds":
        "Cross-validation: every one of {n} cases ({data}) is tested once, by the network of the fold that has not seen it; the last row pools all. "
        "Which of the networks it is was chosen on some of these cases. "
        "Good: folds level with each other, and with the split above.",
    "export":
        "The network that was best on validation cases, first seed, as files that need none of this library, for patches of the recipe's size; error: the largest "
        "difference of the logits from those of the network (relative to the largest logit where that is above 1), of which 1e-4 is the most that is let through.",
}


@dataclass(frozen=True)
class Plan:
    """How much notebook 09 measures for a preset: `tokens` of the two blocks, `side` of the cubes that the networks `raced` see, `repetitions`."""

    tokens: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    side: int = 64
    repetitions: int = 3
    raced: tuple[str, ...] = NETWORKS


PLANS = {"stroke": Plan(side=96), "stroke-demo": Plan(), "stroke-smoke": Plan((64, 128), 32, 1, ("attention",))}


def plan(preset: str) -> Plan:
    """The plan of `preset`; RecipeError for one that has none."""
    return planned(PLANS, preset, "09")


def systems(names: str = "") -> dict[str, str]:
    """The overrides of each network of `names` ("": all), by its name. RecipeError for an unknown one."""
    chosen = names.split() or list(NETWORKS)
    unknown = [name for name in chosen if name not in NETWORKS]
    if unknown:
        raise RecipeError(f"no network of volumes is called {', '.join(unknown)}: known are {', '.join(NETWORKS)}")
    return {name: f"volume.network={name}" for name in chosen}


def check_request(run: RunFolder, named: dict[str, str], folds: int, formats: str, overrides: str = "") -> None:
    """Raise RecipeError or InputError before hours of training for what would fail after them."""
    for more in named.values():
        run.recipe().with_overrides(f"{overrides} {more}")
    if folds == 1 or folds < 0:
        raise RecipeError(f"folds = {folds} is impossible: expected 0, or 2 or more")
    if folds:
        split_cases(read_table(run.cohort_csv), run.recipe().with_overrides(_fold(overrides, folds, 0)))
    for name in formats.split():
        check_format(Path(f"network.{name}"))


def network_table(recipe: Recipe, named: dict[str, str]) -> pd.DataFrame:
    """Parameters and the size of the weights file of each network."""
    rows = {}
    for name, overrides in named.items():
        with torch.device("meta"):
            counts = budget(build_network(recipe.with_overrides(overrides)))
        rows[name] = {"parameters": f"{counts['total']:,}", "weights in fp32 (MB)": f"{counts['trainable_mb_fp32']:.1f}"}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("network")


def with_ensemble(run: RunFolder, scores: pd.DataFrame, seeds: tuple[int, ...], folder: str | Path) -> pd.DataFrame:
    """`scores` of `compare.train` with rows of the mean of all its systems' networks, where there are two or more."""
    names = scores.system.unique().tolist()
    cases, found = run.cases().query("split == 'test'"), [scores]
    for seed in seeds if len(names) > 1 else ():
        engine = Ensemble([WMHInferenceEngine.from_run(compare.cell(folder, name, seed)) for name in names])
        found.append(compare.score_cases(engine, cases, ENSEMBLE, seed))
    return pd.concat(found, ignore_index=True)


def histories(named: dict[str, str], seed: int, folder: str | Path) -> pd.DataFrame:
    """The histories of the networks of one seed, with the column system."""
    return pd.concat([read_table(compare.cell(folder, name, seed).history_csv).assign(system=name) for name in named], ignore_index=True)


def overfitting(scores: pd.DataFrame, curves: pd.DataFrame, seed: int, folder: str | Path) -> pd.DataFrame:
    """How much better each network of `curves` (`histories`) does on what it has seen: a row each with system, epoch (the kept one), train_loss and
    val_loss of the last validated epoch, and train_dice and test_dice, the mean over as many training as test cases."""
    rows = []
    for name, history in curves.groupby("system", sort=False):
        place, test = compare.cell(folder, name, seed), scores[(scores.system == name) & (scores.seed == seed)]
        some = place.cases().query("split == 'train'")
        some = some.iloc[np.linspace(0, len(some) - 1, min(len(test), len(some))).round().astype(int)]  # of all sites
        seen = compare.score_cases(WMHInferenceEngine.from_run(place), some, name, seed)
        validated = history.dropna(subset="val_loss")
        kept = validated.val_dice.idxmax() if validated.val_dice.notna().any() else validated.index[-1]
        rows.append(dict(system=name, epoch=int(history.epoch[kept]), train_loss=validated.train_loss.iloc[-1], val_loss=validated.val_loss.iloc[-1],
                         train_dice=seen.dsc.mean(), test_dice=test.dsc.mean()))
    return pd.DataFrame(rows)


def overfitting_table(table: pd.DataFrame) -> pd.DataFrame:
    """`overfitting`, ready to read."""
    shown = {"kept epoch": table.epoch, "training loss": table.train_loss.map("{:.3f}".format), "validation loss": table.val_loss.map("{:.3f}".format),
             "Dice, training cases": table.train_dice.map("{:.3f}".format), "Dice, test cases": table.test_dice.map("{:.3f}".format),
             "gap": (table.train_dice - table.test_dice).map("{:+.3f}".format)}
    return pd.DataFrame(shown).set_axis(table.system.rename("network"))


def curves_figure(curves: pd.DataFrame, table: pd.DataFrame) -> Figure:
    """Losses and Dice over the epochs, a column a network; `table` as `overfitting` gives it."""
    fig, axes = page(2, len(table), (1.2 + 3.1 * len(table), 5.4), sharex=True, sharey="row")
    for (above, below), row in zip(axes.T, table.itertuples()):
        history = curves[curves.system == row.system]
        for (colour, marker), (column, label) in zip(MARKERS, (("train_loss", "training loss"), ("val_loss", "validation loss"))):
            line = history[["epoch", column]].dropna()
            above.plot(line.epoch, line[column], color=colour, marker=marker, markersize=3.5, label=label)
        line = history[["epoch", "val_dice"]].dropna()
        below.plot(line.epoch, line.val_dice, color=GREEN, marker="^", markersize=3.5, label="Dice, validation cases")
        for value, style, colour, label in ((row.train_dice, "--", BLUE, "Dice, training cases"), (row.test_dice, ":", ORANGE, "Dice, test cases")):
            below.axhline(value, color=colour, linestyle=style, linewidth=1.4, label=label)
        below.axvline(row.epoch, color="0.7", linewidth=1, label="kept epoch")
        above.set_title(row.system, loc="left")
        below.set(xlabel="epoch", ylim=(0, 1))
        below.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("mean Dice")
    handles = [handle for ax in axes[:, 0] for handle in ax.get_legend_handles_labels()[0]]
    fig.legend(handles=handles, loc="outside lower center", ncols=3, **LEGEND)
    return fig


def volume_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Agreement of the volumes of each system, in mL (`agreement.agreement_table`), ready to read."""
    rows = {}
    for system, own in metrics.groupby("system", sort=False):
        found = agreement.agreement_table(own).loc["mL"]
        parts = {"bias": ("bias", 2, "+"), "lower limit": ("loa_low", 1, "+"), "upper limit": ("loa_high", 1, "+"), "ICC(2,1)": ("icc21", 2, "")}
        shown = {head: interval(*found[[name, f"{name}_low", f"{name}_high"]], decimals, sign) for head, (name, decimals, sign) in parts.items()}
        rows[system] = {"n": int(found.n)} | shown | {"R2 about identity": interval(found.r2_identity, np.nan, np.nan, 2)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("system")


def cross_validate(run: RunFolder, network: str, folds: int, folder: str | Path, overrides: str = "", seed: int = 0) -> pd.DataFrame:
    """Train `network` on the cases of `run` once for each of `folds`, in run folders of their own in `folder`; the scores of every case by the
    network that has not seen it, as `compare.train` gives them, with the column fold (from 1)."""
    cohort, found = read_table(run.cohort_csv), []
    for fold in range(folds):
        place = RunFolder(Path(folder) / f"fold_{fold + 1}_of_{folds}").open(
            run.recipe().with_overrides(_fold(overrides, folds, fold)))
        write_table(cohort, place.cohort_csv)
        write_table(split_cases(cohort, place.recipe()), place.split_csv)
        found.append(compare.train(place, systems(network), (seed,), place.path / "cells", _fold(overrides, folds, fold), progress=False).assign(fold=fold + 1))
    return pd.concat(found, ignore_index=True)


def _fold(overrides: str, folds: int, fold: int) -> str:
    return f"{overrides} split.protocol=k-fold split.held_out= split.folds={folds} split.fold={fold}"


def fold_metrics(scores: pd.DataFrame) -> pd.DataFrame:
    """`cross_validate` as a metrics table whose systems are the folds and, last, all cases."""
    folds = scores.assign(system=scores.fold.map("fold {}".format))
    return pd.concat([folds, scores.assign(system="all cases")], ignore_index=True)


def best(curves: pd.DataFrame) -> str:
    """The network of the highest validation Dice; `curves` as `histories` gives them."""
    return curves.groupby("system", sort=False).val_dice.max().fillna(-1).idxmax()


def exported(place: RunFolder, folder: str | Path, formats: str = "pt2") -> pd.DataFrame:
    """The best weights of `place` as <network>.<format> in `folder`, for patches of its recipe's size; a row a file with its size and error
    (`export.check`)."""
    network, _ = load_network(place.best)
    recipe, rows = network.recipe, {}
    shape = (recipe.inputs.channels, *recipe.volume.patch)
    for name in formats.split():
        path = export(network, Path(folder) / f"{recipe.volume.network}.{name}", shape)
        rows[path.name] = {"size (MB)": f"{1e-6 * path.stat().st_size:.1f}", "input": f"1 x {' x '.join(map(str, shape))}",
                           "error": f"{check(network, path, shape):.1e}"}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("file")


def caption(name: str, data: str = "", n: int = 0, seeds: int = 1) -> str:
    """What figure or table `name` shows and what good looks like."""
    return CAPTIONS[name].format(data=data, n=n, seeds=f"{seeds} seed{'s' * (seeds > 1)}")
