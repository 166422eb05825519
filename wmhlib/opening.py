"""Opens run folders: a new one for a recipe, one with cases of its own, and those in which weights are evaluated or tuned on other labelled cases."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from . import medsam
from .cohort import check_cases, find_cases
from .download import fetch_medsam, get_cohort
from .errors import InputError, RecipeError, listed, some
from .files import read_table, write_atomic, write_table
from .settings import Recipe
from .splits import split_cases
from .trained import read_weights
from .weights import tensors_bytes
from .workspace import RunFolder

_OF_SPLIT = ["case", "subject", "site", "lesion_ml"]


def open_run(run: RunFolder, recipe: Recipe, weights: str = "") -> RunFolder:
    """Opens `run` for `recipe`, its encoder starting from `weights`: "" the recipe's own, "zenodo" MedSAM (fetched once to
    `weights/` beside the run folders), or a file. Weights are loaded once as a check (CheckpointError if they do not fit)."""
    if weights:
        path = fetch_medsam(run.path.parent.absolute() / "weights") if weights == "zenodo" else Path(weights).expanduser().absolute()
        recipe = replace(recipe, encoder=replace(recipe.encoder, checkpoint=str(path)))
        medsam.build_encoder(recipe.encoder, recipe.seed)
    if not (recipe.volume.network or recipe.encoder.checkpoint or recipe.encoder.random):
        raise RecipeError(f"preset {recipe.name!r} adapts a trained encoder and none is named: set medsam to 'zenodo' or to a "
                          "checkpoint file (encoder.random=true trains on random weights)")
    return run.open(recipe)


def prepare(run: RunFolder, recipe: Recipe) -> RunFolder:
    """`run` with cohort and split: those it has, or what notebooks 01 and 02 make of a synthetic cohort of `recipe`. MissingStepError where the
    recipe has none."""
    if not recipe.cohort.synthetic_cases:
        run.need(run.split_csv, "02_split")
    if not run.split_csv.exists():
        open_run(run, recipe)
        run.write_cases(_checked(find_cases(get_cohort(run), recipe.inputs), recipe))
        write_table(split_cases(read_table(run.cohort_csv), recipe), run.split_csv)  # as notebook 02 reads it
    return run


def open_evaluation(run: RunFolder, data: str, out: str = "", root: str = "runs") -> RunFolder:
    """The folder to evaluate `run` in: the run itself on its own test cases where `data` is "", else on the labelled cases of `data`
    (`cohort.find_cases`), all of them test cases: `out`, or `RunFolder.elsewhere` below `root`. Raises InputError for a scan that the run was trained or
    chosen on, for a folder that holds a run, or an evaluation of other cases, and for the weights that come with the suite without `data`."""
    if not data:
        return _with_cases(run, "evaluate")
    folder = run.elsewhere("evaluations", data, out, root)
    if folder.best.exists() or folder.checkpoints.exists():
        raise InputError(f"{folder.path} holds a run: nothing is written over it; choose another folder for the evaluation")
    cases = find_cases(data, run.recipe().inputs)
    if folder.cohort_csv.exists() and not set(read_table(folder.cohort_csv).flair) & set(cases.flair):
        raise InputError(f"{folder.path} holds the evaluation of other cases: choose another folder, or delete it")
    cases = _unseen(run, cases, data)
    folder.open(run.recipe())
    write_table(cases, folder.cohort_csv)
    write_table(cases[_OF_SPLIT].assign(split="test"), folder.split_csv)
    return folder


def open_tuning(run: RunFolder, data: str, out: str = "", root: str = "runs") -> RunFolder:
    """Where notebook 04 chooses the operating point: `run` itself, on its own validation cases, where `data` is "", else a run folder with the weights and training cases of `run`
    and the labelled cases of `data` for validation (at the plateau's centre, since the weights are to be used there): `out`, or `RunFolder.elsewhere` below `root`. Its
    `earlier` cases are the others that the weights were trained or chosen on. Raises InputError for a scan that `run` has seen, for a folder that holds
    another run, and for the weights that come with the suite without `data`."""
    if not data:
        return _with_cases(run, "tune")
    folder, recipe = run.elsewhere("tuned", data, out, root), run.recipe()
    state, origin = read_weights(run.need(run.best, "03_train"))
    cases, own = _unseen(run, find_cases(data, recipe.inputs), data), run.scans()
    train = own[own["split"] == "train"].drop(columns="split")
    train = train.assign(case=[f"{name} (training)" if name in set(cases["case"]) else name for name in train["case"]])
    both = pd.concat([train, cases], ignore_index=True)
    split = both[_OF_SPLIT].assign(split=["train"] * len(train) + ["val"] * len(cases))
    content = tensors_bytes(state, origin | {"split": split[["case", "split"]].to_csv(index=False)})
    if folder.best.exists() and folder.best.read_bytes() != content or folder.checkpoints.exists():
        raise InputError(f"{folder.path} holds another run: nothing is written over it; choose another folder for these weights with the point of {data}")
    folder.open(replace(recipe, operating=replace(recipe.operating, prefer="centre"), split=replace(recipe.split, protocol="given", held_out="", fold=0)))
    seen = run.seen()
    write_table(seen[~seen["digest"].isin(train["digest"])], folder.earlier_csv)
    write_table(both, folder.cohort_csv)
    write_table(split, folder.split_csv)
    write_atomic(folder.history_csv, run.need(run.history_csv, "03_train").read_bytes())
    write_atomic(folder.best, content)
    return folder


def _with_cases(run: RunFolder, command: str) -> RunFolder:
    """`run`, unless it is the one that comes with the suite, whose scans do not."""
    if run.shipped:
        raise InputError(f"the cases of the weights that come with the suite are not at hand: name labelled cases (data_dir; DATA= of make {command})")
    return run


def _checked(cases: pd.DataFrame, recipe: Recipe) -> pd.DataFrame:
    """`cases` with what `cohort.check_cases` says of them."""
    return cases.merge(check_cases(cases, recipe.inputs, recipe.volume), on=["case", "site"])


def _unseen(run: RunFolder, cases: pd.DataFrame, data: str) -> pd.DataFrame:
    """The labelled `cases` found in `data` with what `cohort.check_cases` says of them, printed where it is odd. InputError where `run` was trained or chosen on some."""
    cases = _checked(cases, run.recipe())
    seen = cases.case[cases.digest.isin(run.seen().digest)]
    if len(seen):
        raise InputError(f"{len(seen)} of the cases of {data} were used to train {run.path} or to choose its operating point ({some(seen)}): name others")
    odd = [f"{case.case}: {case.warnings}" for case in cases.itertuples() if case.warnings]
    if odd:
        print(f"odd cases, {len(odd)} of {len(cases)}:{listed(odd)}", flush=True)
    return cases
