"""How far few labelled slices go: Dice over the number of slices trained on, beside what the base does without any."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from .batches import draw_slices
from .engine import WMHInferenceEngine, plain_dice
from .evaluation import ZERO_SHOT
from .figures import BLUE, LEGEND, ORANGE, POINTS, page
from .files import read_json, sha256, write_atomic, write_table
from .network import WMHNet
from .prompting import open_base
from .settings import Recipe
from .slicestore import load_slices
from .training import fit
from .volumes import Case
from .workspace import RunFolder

FEW, NONE, ALL = "few-shot", "no adaptation", "all slices"
COLUMNS = ("system", "slices", "seed", "val_dice", "test_dice")
_STEPS = 200
_LINES = {ZERO_SHOT: "--", NONE: ":", ALL: "-."}


def curve(run: RunFolder, counts: Iterable[int] = (1, 5, 20, 100), seeds: Iterable[int] = (0, 1), overrides: str = "",
          folder: str | Path = "") -> pd.DataFrame:
    """Train the recipe of `run` on few slices of its training cases, and score its validation and test cases.

    Each number of slices and each seed, which draws them, is a run folder of its own in `folder` (<run>/fewshot unless given), trained
    for about 200 steps however few slices there are, where the base brings a decoder at a tenth of the rate, for few slices soon undo
    a good start; `overrides` change the recipe of all. What is finished is read, not done again.

    Returns a row each: `system` ("few-shot"), `slices`, `seed`, `val_dice` and `test_dice`, the mean over cases of the Dice of the whole
    scan, one view at 0.5 (the epoch is chosen on validation cases; the test cases choose nothing). Levels to compare with follow, as far
    as there are any, with 0 slices: "zero-shot, true boxes" of a base that answers prompts, "no adaptation" of one that brings a decoder,
    and "all slices", the trained `run` itself. More slices than the training cases have are left out, which is printed. Written as fewshot.csv into `folder`. Raises RecipeError where `folder` holds points of
    another recipe, InputError where of other cases.
    """
    folder, recipe, rows, counts, seeds = Path(folder or run.path / "fewshot"), run.recipe(), [], tuple(counts), tuple(seeds)
    split, network = run.split_text(), WMHNet(recipe)
    if "decoder" in network.started:
        overrides = f"training.lr={recipe.training.lr / 10} {overrides}"
    train = load_slices(run.cases().query("split == 'train'"), recipe.inputs, progress=False)
    there = len(draw_slices(train, few_slices_recipe(recipe, 1, 0, overrides).training.train_negatives, 0))
    if more := [count for count in counts if count > there]:
        print(f"left out: {', '.join(map(str, more))} slices, of which the training cases have {there}", flush=True)
    for count, seed in tqdm([(count, seed) for count in counts if count <= there for seed in seeds], "few-shot runs", mininterval=5):
        point = RunFolder(folder / f"{count}_slices_seed_{seed}").open(few_slices_recipe(recipe, count, seed, overrides)).take_cases(run)
        scores = _kept(point.path / "scores.json", network.base_sha256 + split, partial(_trained, point))
        rows.append(dict(system=FEW, slices=count, seed=seed) | scores)
    for name, (origin, segment) in _levels(run, network).items():
        scores = _kept(folder / f"{name}.json", origin + split, partial(_scores, run, segment))
        rows.append(dict(system=name, slices=0, seed=recipe.seed) | scores)
    table = pd.DataFrame(rows, columns=COLUMNS)
    write_table(table, folder / "fewshot.csv")
    return table


def few_slices_recipe(recipe: Recipe, count: int, seed: int, overrides: str = "") -> Recipe:
    """`recipe` for `count` slices: as many epochs as make 200 steps, one cosine after a tenth of them as warm-up, ten validations."""
    recipe = recipe.afresh().with_overrides(overrides)
    per_epoch = -(-count // (recipe.training.batch_size * recipe.training.accumulation))
    epochs = -(-_STEPS // per_epoch)
    tenth = max(1, epochs // 10)
    settings = dict(slices=count, epochs=epochs, warmup_epochs=tenth, restart_epochs=epochs, validate_epochs=tenth, checkpoint_epochs=epochs)
    return recipe.with_overrides(" ".join(f"training.{name}={value}" for name, value in settings.items()) + f" seed={seed} {overrides}")


def figure(table: pd.DataFrame) -> Figure:
    """Test and validation Dice over the number of slices: a marker a seed, a line through their means; the levels across."""
    few = table[table.system == FEW]
    fig, axes = page(1, 1, (8, 4.4))
    ax = axes[0, 0]
    for column, name, colour, marker in (("test_dice", "test cases", BLUE, "o"), ("val_dice", "validation cases", ORANGE, "s")):
        spread = few.groupby("slices")[column].agg(["mean", "min", "max"])
        ax.fill_between(spread.index, spread["min"], spread["max"], color=colour, alpha=0.15, linewidth=0)
        ax.plot(spread.index, spread["mean"], color=colour, linewidth=1.5)
        ax.plot(few.slices, few[column], color=colour, marker=marker, label=name, **POINTS)
    for row in table[table.system != FEW].itertuples():
        ax.axhline(row.test_dice, color="0.3", linestyle=_LINES[row.system], linewidth=1.3, label=f"{row.system} (test cases): {row.test_dice:.2f}")
    counts = sorted(few.slices.unique())
    ax.set(xscale="log", xlabel="labelled slices trained on", ylabel="mean Dice", ylim=(-0.02, 1.02))
    ax.set_xticks(counts, [str(count) for count in counts])
    ax.minorticks_off()
    fig.legend(loc="outside lower center", ncols=2, **LEGEND)
    return fig


def _trained(point: RunFolder) -> dict[str, float]:
    fit(point, progress=False)
    return _scores(point, WMHInferenceEngine.from_run(point).plain_mask)


def _levels(run: RunFolder, network: WMHNet) -> dict[str, tuple[str, Callable[[Case], np.ndarray]]]:
    """What each level depends on, and its function from a case to a mask."""
    levels, (base, _) = {}, open_base(network.recipe)
    origin = network.recipe.to_json() + network.fingerprint()
    if base:
        levels[ZERO_SHOT] = origin, base.zero_shot
    if "decoder" in network.started:
        levels[NONE] = origin, WMHInferenceEngine(network).plain_mask
    if run.best.exists():
        levels[ALL] = sha256(run.best), WMHInferenceEngine.from_run(run).plain_mask
    return levels


def _scores(run: RunFolder, segment: Callable[[Case], np.ndarray]) -> dict[str, float]:
    """Mean Dice of what `segment` makes of the cases of each side; a case without lesions and result has none."""
    scores = {"val": [], "test": []}
    for row in run.cases().query("split != 'train'").itertuples():
        scores[row.split].append(plain_dice(row, segment, run.recipe().inputs))
    return {f"{split}_dice": float(np.nanmean(dice)) if np.isfinite(dice).any() else np.nan for split, dice in scores.items()}


def _kept(path: Path, origin: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The scores at `path` if they were made from `origin`; else what `make` gives, which is kept there."""
    if path.exists() and read_json(path).get("origin") == origin:
        return read_json(path)["scores"]
    scores = make()
    write_atomic(path, json.dumps({"origin": origin, "scores": scores}, indent=2) + "\n")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return scores
