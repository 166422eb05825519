"""Adapters, and parts of the recipe, on equal terms: the same base, cases, budget and seeds, one cell of a grid for each system and seed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.stats
from tqdm import tqdm

from .cohort import UNFIT
from .engine import WMHInferenceEngine
from .errors import InputError, RecipeError
from .files import read_table, write_table
from .metrics import SCORES, case_scores
from .presets import planned
from .report import missing_scores
from .sections import LOW_RANK
from .settings import Recipe
from .training import fit
from .volumes import load_case
from .workspace import RunFolder

RANKED = (*LOW_RANK, "qlora", "salt")  # the other methods have no rank
PLAIN = ("none", "bias", "ssam", "full")
VOLUMES = ("reference_ml", "result_ml")
BASELINE, WITH_T1, WITH_NEIGHBOURS = "recipe", "with T1", "with neighbours"  # of the ablations
ABLATIONS = {  # what each changes in the recipe
    BASELINE: "",
    "half the rank": "", "twice the rank": "",  # set in `ablations`, from the recipe's own
    "no LoRA on MLPs": "adapter.rank_mlp=0",
    "no image skip": "skip=false",
    "no focal loss": "loss.weights=[0,1,1]",
    "no Dice loss": "loss.weights=[1,0,1]",
    "no boundary loss": "loss.weights=[1,1,0]",
    "no deep supervision": "loss.scale_weights=[0,0,0,0]",
    WITH_T1: "inputs.modalities=['flair','t1']",
    WITH_NEIGHBOURS: "inputs.context=1",
    "no augmentation": "augment.rotation=0 augment.scale=0 augment.flips=false augment.flips_ap=false augment.rotate90=false augment.gamma=0 "
                       "augment.noise=0 augment.brightness=0 augment.contrast=0 augment.bias_field=0",
}
TTA = "with TTA"  # the baseline's own weights, all views


@dataclass(frozen=True)
class Plan:
    """How much of notebook 07 a preset does: overrides of the recipe whose `cases` are made ("": those of the preset's run folder) and
    of every cell (`each`); `methods`, `ranks` and `seeds` of the comparison; `ablations` and their seeds."""

    cases: str = ""
    each: str = ""
    methods: tuple[str, ...] = (*PLAIN, *RANKED)
    ranks: tuple[int, ...] = (8, 24, 64)
    seeds: tuple[int, ...] = (0, 1, 2)
    ablations: tuple[str, ...] = tuple(ABLATIONS)


PLANS = {
    "colab": Plan(),
    "demo": Plan("cohort.synthetic_cases=20", "training.slices=120 training.epochs=3 training.warmup_epochs=0 training.restart_epochs=3 training.checkpoint_epochs=3 "
                 "training.validate_epochs=3", ranks=(16,)),
    "vessels": Plan("cohort.synthetic_cases=36", "training.epochs=10 training.warmup_epochs=1 training.restart_epochs=9 training.validate_epochs=10",
                    ranks=(16,), ablations=(BASELINE, "no LoRA on MLPs", "no image skip")),
    "smoke": Plan("cohort.synthetic_cases=6", "training.epochs=1 training.warmup_epochs=0 training.slices=8", ("lora", "salt"), (2,), (0, 1), (BASELINE,)),
}


def plan(preset: str) -> Plan:
    """The plan of `preset`; RecipeError for one that has none."""
    return planned(PLANS, preset, "07")


def systems(methods: tuple[str, ...], ranks: tuple[int, ...]) -> dict[str, str]:
    """The overrides of each method, and of those with a rank at each of `ranks` on attention (half of it on the MLPs), by a name such as "lora 16"."""
    named = {}
    ranks = sorted(set(ranks))
    for method in methods:
        chosen = "encoder.bits=4 adapter.method=lora" if method == "qlora" else f"adapter.method={method}"
        if method in RANKED:
            named |= {f"{method} {rank}": f"{chosen} adapter.rank_attention={rank} adapter.rank_mlp={max(1, rank // 2)}" for rank in ranks}
        else:
            named[method] = chosen
    return named


def ablations(recipe: Recipe, cases: pd.DataFrame, names: tuple[str, ...] = tuple(ABLATIONS)) -> dict[str, str]:
    """The overrides of each of `names` that `cases` (a cohort table) allow: T1 only where every case has one on its grid, no neighbours of images;
    and that change `recipe`. What is left out is named."""
    own = recipe.adapter
    scaled = {f"{words} the rank": f"adapter.rank_attention={max(1, round(factor * own.rank_attention))} adapter.rank_mlp={round(factor * own.rank_mlp)}"
              for words, factor in (("half", 0.5), ("twice", 2))}
    changes = {name: (ABLATIONS | scaled)[name] for name in names}
    impossible = {WITH_T1} if (cases.t1 == "").any() or cases.warnings.str.contains(UNFIT, regex=False).any() else set()
    impossible |= {WITH_T1, WITH_NEIGHBOURS} if recipe.inputs.images else set()
    idle = {name for name, change in changes.items() if name != BASELINE and name not in impossible and recipe.with_overrides(change) == recipe}
    for left_out, why in ((impossible, "which these cases do not allow"), (idle, "which is the recipe's own")):
        for name in sorted(left_out.intersection(names)):
            print(f"left out: {name}, {why}")
    return {name: change for name, change in changes.items() if name not in impossible | idle}


def train(run: RunFolder, named: dict[str, str], seeds: tuple[int, ...], folder: str | Path, overrides: str = "", share: str = "1/1",
          progress: bool = True) -> pd.DataFrame:
    """Train and score the cells (system, seed) of the grid on the cases and split of `run`; what is finished is read, not done again.

    `named` gives each system's overrides of the recipe of `run`, after `overrides`, those of all. A cell is a run folder of its own in
    `folder`; one that was interrupted goes on. `share` "i/n" does every n-th cell from the i-th alone, so that n jobs share the grid; none
    waits for another. A system that changes nothing in the recipe, as LoRA at its own ranks, is not trained beside "recipe": it has the scores
    of that. Returns the scores of every system whose seeds are all finished, a row a test case, as `score_cases` gives it.

    Raises InputError where there are fewer cells than jobs, or `folder` holds cells of other cases; RecipeError where it holds those of
    another recipe.
    """
    mine, jobs = job_of(share)
    trained = {name: name for name in named}  # whose cells have a system's scores
    if BASELINE in named:
        recipe = run.recipe().afresh().with_overrides(overrides)
        trained |= {name: BASELINE for name, changes in named.items() if recipe.with_overrides(changes) == recipe}
    grid = [(name, seed) for name in named if trained[name] == name for seed in seeds]
    if jobs > len(grid):
        raise InputError(f"share {share} of {len(grid)} cells: expected at most {len(grid)} jobs")
    for name, seed in grid:
        cell(folder, name, seed).open(run.recipe().afresh().with_overrides(f"{overrides} {named[name]} seed={seed}")).take_cases(run)
    for name, seed in tqdm(grid[mine - 1 :: jobs], "cells", disable=not progress, mininterval=5):
        place = cell(folder, name, seed)
        if not (place.path / "scores.csv").exists():
            fit(place, progress=False)
            cases = place.cases().query("split == 'test'")
            write_table(score_cases(WMHInferenceEngine.from_run(place), cases, name, seed), place.path / "scores.csv")
    return _finished(trained, seeds, folder)


def cell(folder: str | Path, name: str, seed: int) -> RunFolder:
    """The run folder of a cell."""
    return RunFolder(Path(folder) / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}_seed_{seed}")


def _finished(trained: dict[str, str], seeds: tuple[int, ...], folder: str | Path) -> pd.DataFrame:
    found = [pd.DataFrame(columns=["system", "seed", "case", "site", *SCORES, *VOLUMES])]
    for name, own in trained.items():
        paths = [cell(folder, own, seed).path / "scores.csv" for seed in seeds]
        tables = map(read_table, paths) if all(path.exists() for path in paths) else ()
        found += tables if name == own else (table[table.system == own].assign(system=name) for table in tables)
    return pd.concat(found[1:] or found, ignore_index=True)


def score_cases(engine: WMHInferenceEngine, cases: pd.DataFrame, name: str, seed: int) -> pd.DataFrame:
    """A row for each of `cases` (columns case, site, flair, t1, mask): system (`name`), seed, case, site, the challenge's five and both volumes in
    mL, other pathology in neither; one view at 0.5, of the system "recipe" those of all views too, as "with TTA"."""
    rows = []
    for row in cases.itertuples():
        case = load_case(row.flair, row.t1, row.mask, engine.recipe.inputs)
        found = engine.predict(case, use_tta=name == BASELINE)
        for system, prob in ((name, found.prob), *([(TTA, found.prob_tta)] if name == BASELINE else [])):
            rows.append(dict(system=system, seed=seed, case=row.case, site=row.site) | case_scores(case.mask, prob >= 0.5, case.volume.spacing))
    return pd.DataFrame(rows)


def reference(scores: pd.DataFrame) -> str:
    """The system that the others are tested against: the recipe, or LoRA at the highest rank, or the first where there is neither."""
    names = scores.system.unique().tolist()
    return next((name for name in reversed(names) if name == BASELINE or name.startswith("lora ")), names[0] if names else "")


def job_of(text: str) -> tuple[int, int]:
    """The number of a job and how many there are, of "i/n"; InputError unless i is from 1 to n."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    mine, jobs = map(int, found.groups()) if found else (0, 0)
    if not 1 <= mine <= jobs:
        raise InputError(f"share {text!r} is impossible: expected i/n with i from 1 to n, such as 2/8 for the second of eight jobs")
    return mine, jobs


def summary(scores: pd.DataFrame, costs: pd.DataFrame | None = None) -> pd.DataFrame:
    """A row for each system: number of `seeds` and test cases (`n`), the mean of each score over cases and seeds with `<score>_low` and
    `<score>_high`, the 95 % t interval over the seeds' means (NaN with one seed), `left_out`, how many results lack a score (HD95
    where nothing was found; Dice, AVD and HD95 where nothing is there) and are left out of its mean, and its `costs`."""
    rows = []
    for system, part in scores.groupby("system", sort=False):
        means = part.groupby("seed")[list(SCORES)].mean()
        row = dict(system=system, seeds=len(means), n=part.case.nunique(), left_out=missing_scores(part[list(SCORES)].isna().sum()))
        for score, values in means.items():
            values = values.dropna()
            half = scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
            row |= {score: values.mean(), f"{score}_low": values.mean() - half, f"{score}_high": values.mean() + half}
        rows.append(row)
    table = pd.DataFrame(rows, columns=["system", "seeds", "n", "left_out", *(f"{score}{end}" for score in SCORES for end in ("", "_low", "_high"))])
    return table if costs is None else table.merge(costs, on="system", how="left")


def numbers(text: str | int, name: str) -> list[int]:
    """The whole numbers, each once, that the parameter `name` holds as "0 1 2", or as one number (which papermill makes of "1"). RecipeError for
    anything else."""
    text = str(text)
    if not re.fullmatch(r"\s*(\d+(\s+|$))*", text) or len(set(text.split())) < len(text.split()):
        raise RecipeError(f'{name} = "{text}" is impossible: expected whole numbers with spaces between them, each once, such as "0 1 2"')
    return [int(number) for number in text.split()]


def over_seeds(scores: pd.DataFrame) -> pd.DataFrame:
    """Each system's mean score, and volumes, of each case over the seeds: a metrics table for `agreement` and `report`. A score that a seed lacks
    is lacking in the mean; but for Dice where only some seeds find nothing in a case without a lesion, which counts as 1 (`agreement.compare_systems`)."""
    values = [name for name in (*SCORES, *VOLUMES) if name in scores]
    empty = scores.assign(empty=scores.dsc.isna()).groupby(["system", "case"]).empty.transform("all")
    scores = scores.assign(dsc=scores.dsc.where(empty, scores.dsc.fillna(1)))
    return scores.groupby(["system", "case"], sort=False, as_index=False)[values].agg(lambda seeds: seeds.mean(skipna=False))


def pareto(table: pd.DataFrame) -> pd.Series:
    """Whether no system with as few or fewer trained parameters has a higher Dice."""
    return pd.Series([not ((table.trainable <= row.trainable) & (table.dsc > row.dsc)).any() for row in table.itertuples()], table.index, dtype=bool)
