"""The run folder: its paths, cases and manifest; stable seeds."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from .errors import CheckpointError, InputError, MissingStepError, RecipeError, some
from .files import is_number, read_json, read_table, read_text, sha256, table_bytes, write_atomic
from .sections import SHIPPED
from .settings import Recipe

REPOSITORY = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "numpy", "scipy", "pandas", "nibabel", "peft", "accelerate", "safetensors",
             "connected-components-3d", "nilearn", "monai", "transformers")


@dataclass(frozen=True)
class RunFolder:
    """The folder that holds everything of one run; a file's property is its path, whether it exists or not."""

    path: Path

    def __post_init__(self):
        object.__setattr__(self, "path", Path(self.path).expanduser())

    recipe_json = property(lambda self: self.path / "recipe.json")
    cohort_csv = property(lambda self: self.path / "cohort.csv")
    split_csv = property(lambda self: self.path / "split.csv")
    earlier_csv = property(lambda self: self.path / "earlier.csv")
    history_csv = property(lambda self: self.path / "history.csv")
    checkpoints = property(lambda self: self.path / "checkpoints")
    session = property(lambda self: self.path / ".session")  # who trains it now
    best = property(lambda self: self.path / "best.safetensors")
    search_csv = property(lambda self: self.path / "search.csv")
    operating_point = property(lambda self: self.path / "operating_point.json")
    metrics_csv = property(lambda self: self.path / "metrics.csv")
    predictions = property(lambda self: self.path / "predictions")
    figures = property(lambda self: self.path / "figures")
    notebooks = property(lambda self: self.path / "notebooks")
    manifest = property(lambda self: self.path / "manifest.json")

    def results(self, root: str = "runs") -> Path:
        """Where what is made with the run's weights goes: the folder itself, or minisam below `root` for those that come with the suite."""
        return Path(root, SHIPPED) if self.shipped else self.path

    @property
    def shipped(self) -> bool:
        """Whether it is the one that comes with the suite, however its path is written."""
        return self.path.resolve() == MINISAM.path.resolve()

    def open(self, recipe: Recipe) -> RunFolder:
        """Makes the folder and writes `recipe` into it; raises RecipeError where it holds the cohort of another recipe, InputError
        where no folder can be."""
        if any(path.is_file() for path in (self.path, *self.path.parents)):
            raise InputError(f"{self.path} is a file or lies below one: choose a run folder elsewhere")
        if not self.recipe_json.exists() or not self.cohort_csv.exists():
            write_atomic(self.recipe_json, recipe.to_json())
        there, here = _settings(self.recipe()), _settings(recipe)
        differing = [f"{name} is {there[name]!r} there and {here[name]!r} here" for name in here if there[name] != here[name]]
        if differing:
            raise RecipeError(f"run folder {self.path} belongs to another recipe: {some(differing)}. "
                              "Choose another run folder, or the settings of this one")
        return self

    def recipe(self, preset: str | None = None) -> Recipe:
        """The recipe of this run. Raises MissingStepError where there is none, RecipeError if it is not one of `preset`."""
        recipe = Recipe.from_json(read_text(self.need(self.recipe_json, "01_download")), self.recipe_json)
        if preset not in (None, recipe.name):
            raise RecipeError(f"run folder {self.path} belongs to another recipe: {recipe.name!r} there, {preset!r} asked for. "
                              f"Set preset to {recipe.name!r}, or choose another run folder")
        return recipe

    def write_cases(self, cases: pd.DataFrame) -> None:
        """Writes cohort.csv. Raises InputError where the run has weights or checkpoints, and cases of its split are not among these, or those that trained or
        chose had other scans or masks."""
        if self.cohort_csv.exists() and self.split_csv.exists() and (self.best.exists() or self.checkpoints.exists()):
            known = ["digest", "mask_digest"]
            before = self.cases().reindex(columns=["case", "split", *known]).fillna("")
            gone = before.case[~before.case.isin(cases["case"])]
            if len(gone):
                raise InputError(f"{self.path} was trained with {some(gone)} in its split, which is not among these cases: put it back, or choose another run folder")
            both = cases.merge(before[before.split != "test"], on="case", suffixes=("", "_then"))
            changed = both.case[sum(both[f"{name}_then"].ne("") & both[name].ne(both[f"{name}_then"]) for name in known) > 0]
            if len(changed):
                raise InputError(f"{self.path} was trained when {some(changed)} had other scans or masks: choose another run folder, or delete "
                                 "checkpoints and weights of this one and train again")
        write_atomic(self.cohort_csv, table_bytes(cases))

    def need(self, path: Path, notebook: str) -> Path:
        """`path`, or MissingStepError naming the notebook that makes it."""
        if not Path(path).exists():
            raise MissingStepError(f"{path} is missing: run notebook {notebook} first")
        return path

    def cases(self) -> pd.DataFrame:
        """The cohort with the column `split`, a row for each case of both tables. MissingStepError where one is missing,
        InputError where a column is, or where a case comes twice or has a name that no file can have."""
        cohort = _cases(self.need(self.cohort_csv, "01_download"), ("case", "site", "flair", "t1", "mask"))
        split = _cases(self.need(self.split_csv, "02_split"), ("case", "split"))
        return cohort.merge(split[["case", "split"]], on="case", validate="one_to_one")

    def scans(self) -> pd.DataFrame:
        """`cases`, each with the digest by which its scan is known elsewhere (`cohort.check_cases`); InputError where they have none."""
        cases = self.cases()
        if "digest" not in cases:
            raise InputError(f"{self.cohort_csv} does not say which scans were seen (column digest): run notebook 01 again")
        return cases

    def seen(self) -> pd.DataFrame:
        """The scans that the run's weights were trained or chosen on, `earlier` ones among them: columns case, site, digest."""
        cases = self.scans()
        return pd.concat([self.earlier(), cases.loc[cases["split"] != "test", ["case", "site", "digest"]]]).drop_duplicates("digest", ignore_index=True)

    def earlier(self) -> pd.DataFrame:
        """The scans that the weights which training started from were trained or chosen on, as `seen`; none without `training.start`.
        InputError where that has been lost."""
        if not self.earlier_csv.exists() and self.recipe().training.start:
            raise InputError(f"{self.earlier_csv} is missing: what the weights of training.start had seen is not known; train again in another folder")
        return read_table(self.earlier_csv) if self.earlier_csv.exists() else pd.DataFrame(columns=["case", "site", "digest"])

    def point(self, weights_sha256: str = "") -> dict:
        """The operating point that 04_search left. MissingStepError where there is none, InputError for impossible values, CheckpointError where it was
        chosen with other views than the recipe's, or with weights of another fingerprint than `weights_sha256`."""
        point = read_json(self.need(self.operating_point, "04_search"))
        wrong = [f"{name} is {point[name]!r}" for name, fits in _POINT.items() if name in point and not fits(point[name])]
        missing = [f"{name} is missing" for name in ("threshold", "min_voxels", "tta") if name not in point]
        if wrong or missing:
            raise InputError(f"{self.operating_point}: {', '.join(missing + wrong)}: run notebook 04_search again")
        if "views" in point and point["views"] != (views := self.recipe().operating.views):
            raise CheckpointError(f"{self.operating_point} was chosen with {point['views']} views, {self.recipe_json} has {views} now: run notebook 04_search again")
        if weights_sha256 and point.get("weights_sha256", weights_sha256) != weights_sha256:
            raise CheckpointError(f"{self.operating_point} was chosen with other weights than {self.best}: run notebook 04_search again")
        return point

    def elsewhere(self, what: str, data: str | Path, out: str | Path = "", root: str = "runs") -> RunFolder:
        """The folder of what is done with this run on the cases of `data`: `out`, or `what`/<name of the folder or table> in `results`."""
        data = Path(os.path.abspath(Path(data).expanduser()))
        return RunFolder(out or self.results(root) / what / (data.name if data.is_dir() else f"{data.parent.name}_{data.stem}"))

    def take_cases(self, run: RunFolder) -> RunFolder:
        """Gives this folder the cohort and the split of `run`. Raises InputError where it has others: other cases, scans, masks or sides."""
        if self.cohort_csv.exists() and self.split_csv.exists():
            ours, theirs = (folder.cases().reindex(columns=["case", "subject", "site", "digest", "mask_digest", "split"]).fillna("").sort_values("case").values.tolist()
                            for folder in (self, run))
            if ours != theirs:
                raise InputError(f"{self.cohort_csv} or its split.csv is not that of {run.path}: choose another folder")
        for ours, theirs in ((self.cohort_csv, run.cohort_csv), (self.split_csv, run.split_csv)):
            write_atomic(ours, table_bytes(read_table(theirs)))
        return self

    def split_text(self) -> str:
        """Which case is on which side of the split, as weights and checkpoints remember it (`same_split`)."""
        return self.cases()[["case", "split"]].to_csv(index=False)

    def write_manifest(self) -> Path:
        """manifest.json: versions, commit (null outside git), seed and the sha256 of each file but those of notebooks, data (cohort.csv has
        the scans' digests), evaluations, tuned, derivatives, TensorBoard and few-shot runs."""
        others = (self.notebooks, *(self.path / name for name in ("data", "evaluations", "tuned", "derivatives", "tensorboard", "fewshot")))
        files = sorted(p for p in self.path.rglob("*") if p.is_file() and not p.name.startswith(".")
                       and p != self.manifest and not any(folder in p.parents for folder in others))
        content = {
            "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
            "commit": _commit(),
            "seed": self.recipe().seed,
            "files": {p.relative_to(self.path).as_posix(): sha256(p) for p in files},
        }
        write_atomic(self.manifest, json.dumps(content, indent=2) + "\n")
        return self.manifest


def same_split(one: str, other: str) -> bool:
    """Whether two `split_text` put the same cases on the same sides, in whatever order."""
    return sorted(one.splitlines()) == sorted(other.splitlines())


def split_paths(text: str | Path) -> list[Path]:
    """The paths that `text` names: one that exists, or several as a shell would split them (in quotes where one has spaces). InputError for what
    cannot be split."""
    try:
        names = [text] if isinstance(text, Path) or text and os.path.exists(os.path.expanduser(text)) else shlex.split(text)
    except ValueError as error:
        raise InputError(f"{text} cannot be split into paths ({error}): put a path with spaces in quotes") from None
    return [Path(name).expanduser() for name in names if str(name)]


def run_folders(text: str) -> list[RunFolder]:
    """The run folders that `text` names, as `split_paths` reads it."""
    return [RunFolder(path) for path in split_paths(text)]


MINISAM = RunFolder(REPOSITORY / "assets" / SHIPPED)  # the weights that come with the suite, laid out as a run


def version(name: str) -> str | None:
    """The version of an installed distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


_POINT = {  # what the values of an operating point must be
    "threshold": lambda v: is_number(v) and 0 < v <= 1, "min_voxels": lambda v: type(v) is int and v >= 1,
    "min_mm3": lambda v: is_number(v) and v >= 0, "tta": lambda v: isinstance(v, bool),
    **dict.fromkeys(("n", "views"), lambda v: type(v) is int and v >= 1), "se": lambda v: v is None or is_number(v),
    **dict.fromkeys(("dsc", "zscore_threshold", "unsure_above", "poor_below"), is_number)}


def _cases(path: Path, columns: tuple[str, ...]) -> pd.DataFrame:
    """The table at `path`, if it has the `columns` and names each case once, as a file can be named."""
    table = read_table(path)
    missing = [name for name in columns if name not in table]
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}: delete it and run the notebook that writes it")
    wrong = [f"{name!r} twice" for name in table.loc[table["case"].duplicated(), "case"]]
    wrong += [f"{name!r}, which no file can be named after" for name in table["case"] if not re.fullmatch(r"\w[^/\\\x00-\x1f]*|-[\w-]+", name)]
    if wrong:
        raise InputError(f"{path} has the case {wrong[0]}: delete it and run the notebook that writes it")
    return table


def _settings(recipe: Recipe) -> dict:
    flat = {}
    for name, value in dataclasses.asdict(recipe).items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _commit() -> str | None:
    try:
        return subprocess.run(["git", "-C", str(REPOSITORY), "rev-parse", "--verify", "HEAD"], capture_output=True, text=True,
                              check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
