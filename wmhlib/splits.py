"""Splits: which cases train, validate and test. Subjects are dealt, never cases: whoever is scanned twice stays on one side."""

from __future__ import annotations

import os

import numpy as np
import pandas as pd

from .errors import InputError, RecipeError, some
from .files import read_table, table_bytes, write_table
from .seeds import stable_seed
from .settings import Recipe
from .workspace import RunFolder

PARTS = ("train", "val", "test")
_COLUMNS = ["case", "subject", "site", "lesion_ml"]


def split_cases(cohort: pd.DataFrame, recipe: Recipe) -> pd.DataFrame:
    """Train, validation and test cases by `recipe.split.protocol`: columns case, subject, site, lesion_ml, split.

    "stratified": test and validation subjects are drawn from every site, evenly over its lesion burden, at least one each.
    "challenge": the cohort's own `group` ("training" or "test"). "leave-one-site-out": the site `held_out` is the test.
    "k-fold": the subjects are dealt into `folds`, sites and burdens evenly; number `fold` is the test, and over all folds each
    subject is tested once. In these three the validation subjects are drawn from the others as in the first. "given": the cohort's `group`
    is the split ("training", "val" or "test"), and nothing is drawn.

    Sites of fewer subjects than there are parts to draw are pooled, so that none is lost. The result depends on
    seed and subjects, not on the order of rows. `cohort` needs case, subject, site, lesion_ml (and group for "challenge" and "given").
    Raises InputError for a cohort that cannot be split so, RecipeError for a held-out site that is not in it.
    """
    _need(cohort, _COLUMNS, "the cohort", "run notebook 01 again")
    unknown = cohort.loc[cohort["lesion_ml"].isna(), "case"]
    if len(unknown):
        raise InputError(f"the cohort has no lesion volume for {some(unknown)}: run notebook 01 again")
    how, units = recipe.split, _subjects(cohort)
    if how.protocol == "given":
        part = _given(cohort)
    elif how.protocol == "stratified":
        part = _drawn(units, {"test": how.test, "val": how.val}, recipe.seed)
    else:
        held = (_challenge(cohort) if how.protocol == "challenge" else
                _site(cohort, how.held_out) if how.protocol == "leave-one-site-out" else _fold(units, recipe))
        rest = units[~units.index.isin(held)]
        part = _drawn(rest, {"val": how.val}, recipe.seed).reindex(units.index, fill_value="test")
    return check_split(cohort[_COLUMNS].assign(split=cohort["subject"].map(part)).reset_index(drop=True), cohort)


def check_split(split: pd.DataFrame, cohort: pd.DataFrame) -> pd.DataFrame:
    """`split` itself, if no subject and no case of it is on two sides, every `split` is "train", "val" or "test", its cases are in the `cohort` it
    was made of (case, subject and, if there, the files flair and mask), under the same subjects, and no file serves two sides. Raises InputError
    naming the cases."""
    _need(split, [*_COLUMNS, "split"], "the split", "run notebook 02 again")
    wrong = split[~split["split"].isin(PARTS)]
    if len(wrong):
        raise InputError(f"the split puts {some(wrong['case'])} into {some(wrong['split'])}: expected train, val or test")
    twice = split.loc[split["case"].duplicated(), "case"]
    if len(twice):
        raise InputError(f"the split names {some(twice)} more than once: keep one row for each case")
    _one_side(split, "subject")
    _need(cohort, ["case", "subject"], "the cohort", "run notebook 01 again")
    strange = split.loc[split["case"].map(dict(zip(cohort["case"], cohort["subject"]))) != split["subject"], "case"]
    if len(strange):
        raise InputError(f"the split and the cohort differ in {some(strange)}: expected cases of the cohort under their own "
                         "subjects; run notebook 02 again")
    for role in [name for name in ("flair", "mask") if name in cohort]:
        files = {case: os.path.realpath(path) for case, path in zip(cohort["case"], cohort[role]) if path}
        _one_side(split.assign(**{role: split["case"].map(files)}), role)
    return split


def deal(run: RunFolder, cases: pd.DataFrame) -> pd.DataFrame:
    """The split of `cases` by the recipe of `run`, kept in split.csv. The split that weights or checkpoints of the run were made with stays as it is,
    though another was dealt, or it was changed by hand; that is said, and InputError raised where it is not sound (`check_split`)."""
    split = split_cases(cases, run.recipe())
    if run.split_csv.exists() and (run.best.exists() or run.checkpoints.exists()):
        kept = check_split(read_table(run.split_csv), cases)
        if table_bytes(kept) != table_bytes(split):
            print(f"{run.split_csv} is not what these cases are dealt now, and stays: the run was trained on it", flush=True)
        return kept
    write_table(split, run.split_csv)
    return split


def tell_unused(run: RunFolder) -> None:
    """Prints which cases came into the cohort of `run` after it was split, and are not used."""
    cohort, split = read_table(run.cohort_csv), read_table(run.split_csv)
    unused = cohort.loc[~cohort["case"].isin(split["case"]), "case"]
    if len(unused):
        print(f"{len(unused)} cases of the cohort are in no part of the split ({some(unused)}): run notebook 02 again to use them", flush=True)


def split_table(split: pd.DataFrame) -> pd.DataFrame:
    """Cases, subjects and lesion volume (median, least and most mL) of every site and part, and of each part over all sites."""
    whole = split.assign(site="all sites")
    rows = pd.concat([split, whole] if split["site"].nunique() > 1 else [split])
    order = [*sorted(split["site"].unique()), "all sites"]
    table = rows.groupby(["site", "split"]).agg(
        cases=("case", "size"), subjects=("subject", "nunique"), median_ml=("lesion_ml", "median"),
        least_ml=("lesion_ml", "min"), most_ml=("lesion_ml", "max"))
    return table.loc[[(site, part) for site in order for part in PARTS if (site, part) in table.index]].round(1)


def _subjects(cohort: pd.DataFrame) -> pd.DataFrame:
    """One row for each subject: the site it was mostly scanned at, and its mean burden; ordered by burden, then name."""
    rows = cohort.sort_values("case").groupby("subject")
    units = pd.DataFrame({"site": rows["site"].agg(lambda sites: sites.mode()[0]), "lesion_ml": rows["lesion_ml"].mean()})
    return units.sort_index().sort_values("lesion_ml", kind="stable")


def _drawn(units: pd.DataFrame, shares: dict[str, float], seed: int) -> pd.Series:
    """The part of each subject: of every site `shares` of them, at even steps of the burden from a seeded start; the rest train."""
    if len(units) <= len(shares):
        raise InputError(f"{len(units)} subjects are left to choose {' and '.join(shares)} cases from: expected at least "
                         f"{len(shares) + 1}, one for each part and one to train. Add cases")
    part = pd.Series("train", index=units.index)
    for site, rows in units.groupby(_strata(units["site"], len(shares) + 1)):
        rng, left = np.random.default_rng(stable_seed(seed, "split", site)), list(rows.index)
        most = (len(left) - 1) // len(shares)
        for name, share in shares.items():
            drawn = _even_steps(left, min(most, max(1, round(share * len(rows)))), rng)
            part[drawn] = name
            left = [subject for subject in left if subject not in drawn]
    return part


def _strata(site: pd.Series, least: int) -> pd.Series:
    """The sites, those of fewer than `least` subjects as one, with the smallest other site if that is still too few."""
    counts = site.value_counts().sort_index().sort_values(kind="stable")
    pool = list(counts.index[counts < least])
    if pool and counts[pool].sum() < least:
        pool = list(counts.index[: len(pool) + 1])
    return site.where(~site.isin(pool), "+".join(sorted(pool)))


def _even_steps(ordered: list, count: int, rng: np.random.Generator) -> list:
    start = rng.random()
    return [ordered[int((start + i) * len(ordered) / count)] for i in range(count)]


def _challenge(cohort: pd.DataFrame) -> set:
    groups = cohort.get("group", pd.Series("", index=cohort.index))
    for group in ("training", "test"):
        if not (groups == group).any():
            raise InputError(f"the challenge's protocol needs cases of both groups, and none of this cohort is in {group}: give "
                             "the folder that holds training/ and test/ (or a table with a column group), or set another split.protocol")
    none = cohort.loc[~groups.isin(("training", "test")), "case"]
    if len(none):
        raise InputError(f"the challenge's protocol needs the group of every case, and {some(none)} have none: expected training "
                         "or test")
    _one_side(cohort.assign(split=groups), "subject")
    return set(cohort.loc[groups == "test", "subject"])


def _given(cohort: pd.DataFrame) -> pd.Series:
    """The part of each subject as the data bring it."""
    parts = cohort.get("group", pd.Series("", index=cohort.index)).map({"training": "train", "val": "val", "test": "test"})
    if parts.isna().any() or set(parts) != set(PARTS):
        raise InputError(f"the data bring no split of their own into training, val and test (found: {some(parts.dropna()) or 'none'}; {parts.isna().sum()} cases "
                         "without): give images with a data_split.csv that has all three, or set another split.protocol")
    _one_side(cohort.assign(split=parts), "subject")
    return parts.groupby(cohort["subject"]).first()


def _site(cohort: pd.DataFrame, name: str) -> set:
    sites = cohort["site"]
    if name not in set(sites):
        raise RecipeError(f"setting split.held_out = {name!r} is no site of this cohort: expected one of "
                          f"{', '.join(sorted(set(sites)))}")
    held = set(cohort.loc[sites == name, "subject"])
    elsewhere = cohort.loc[(sites != name) & cohort["subject"].isin(held), "case"]
    if len(elsewhere):
        raise InputError(f"site {name} cannot be left out alone: its subjects were also scanned elsewhere ({some(elsewhere)}). "
                         "Leave those cases out, or give persons who only share a number names of their own")
    return held


def _fold(units: pd.DataFrame, recipe: Recipe) -> set:
    """Subjects of one site and alike in burden go to different folds, in a seeded order; the smallest folds are filled first."""
    folds, size = recipe.split.folds, np.zeros(recipe.split.folds, int)
    if len(units) < folds:
        raise InputError(f"{len(units)} subjects do not fill {folds} folds: set split.folds (in notebook 09 folds) to {len(units)} or less")
    fold = pd.Series(0, index=units.index)
    for site, rows in units.groupby("site"):
        rng = np.random.default_rng(stable_seed(recipe.seed, "folds", site))
        for start in range(0, len(rows), folds):
            alike, order = rows.index[start : start + folds], rng.permutation(folds)
            chosen = order[np.argsort(size[order], kind="stable")][: len(alike)]
            fold[alike] = rng.permutation(chosen)
            size[chosen] += 1
    return set(fold.index[fold == recipe.split.fold])


def _one_side(rows: pd.DataFrame, column: str) -> None:
    sides = rows.groupby(column)["split"].nunique()
    found = rows[rows[column].isin(sides.index[sides > 1])]
    if len(found):
        named = [f"{case} ({part})" for case, part in zip(found["case"], found["split"])]
        raise InputError(f"{column} {found[column].iloc[0]} is on two sides of the split: {some(named)}. Put all its cases into "
                         "one part")


def _need(table: pd.DataFrame, columns: list[str], what: str, then: str) -> None:
    missing = [name for name in columns if name not in table]
    if missing:
        raise InputError(f"{what} has no column {', '.join(missing)}: expected {', '.join(columns)}; {then}")
    empty = table.loc[table["subject"].isin(("", None)) | table["subject"].isna(), "case"]
    if len(empty):
        raise InputError(f"{what} has no subject for {some(empty)}: expected who was scanned")
