"""The cohort: finds labelled cases on disk, checks each, and splits them by site and lesion burden."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd

from . import volumes
from .errors import InputError
from .settings import Inputs, Recipe
from .workspace import stable_seed

SYNTHETIC_NOTE = "synthetic.json"  # lies beside a synthetic cohort and says how it was made
_COLUMNS = ["case", "site", "flair", "t1", "mask", "group"]
_LESION_LABELS = ("WMH", "lesion", "L")  # BIDS label entities that name white matter lesions


def find_cases(folder: str | Path) -> pd.DataFrame:
    """The labelled cases below `folder`, one row each, ordered by site and case.

    Layouts: the WMH Challenge (`<site>/<id>/pre/FLAIR.nii.gz`, `pre/T1.nii.gz`, `wmh.nii.gz`; `.nii` as in the Kaggle
    mirror) and BIDS (`sub-*/[ses-*/]anat/*_FLAIR.nii.gz`, masks and FLAIR-space T1w also under `derivatives`).
    Columns: case (unique), site (the folder above the case; in BIDS the dataset's), flair, t1 ("" if none), mask
    (absolute paths), group ("training", "test" or ""). Scans without a mask are left out, and named.
    Raises InputError for a missing folder, no labelled case, two files for one role, or two cases of one name.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder: give the one that holds the cases")
    files = [p for p in sorted(folder.rglob("*")) if p.name.endswith((".nii", ".nii.gz")) and not p.name.startswith(".")]
    cases = pd.DataFrame(_challenge_cases(files) + _bids_cases(files), columns=_COLUMNS)
    unlabelled = cases.loc[cases["mask"] == "", "flair"]
    if len(unlabelled):
        print(f"left out {len(unlabelled)} scans without a mask: {', '.join(unlabelled[:3])} ...", flush=True)
    cases = cases[cases["mask"] != ""]
    if cases.empty:
        raise InputError(f"no labelled cases in {folder} ({len(files)} NIfTI files): expected <site>/<id>/pre/FLAIR.nii.gz with "
                         "<site>/<id>/wmh.nii.gz, or BIDS with masks under derivatives/")
    for name, rows in cases.groupby("case"):
        if len(rows) > 1:
            raise InputError(f"duplicate case {name}: {' and '.join(rows['flair'])}. Keep one of them")
    order = sorted(cases.index, key=lambda i: (cases["site"][i], _natural(cases["case"][i])))
    return cases.loc[order].reset_index(drop=True)


def check_cases(cases: pd.DataFrame, inputs: Inputs | None = None) -> pd.DataFrame:
    """Reads each case of `find_cases` as training with `inputs` (FLAIR alone unless given) will, and describes it, one row each: case, site, shape, spacing (mm),
    orientation, labels (voxels of each), lesion_ml (label 1 alone), warnings (none is fatal). Raises InputError naming the
    first file that cannot be used.
    """
    return pd.DataFrame([_check(row, inputs) for row in cases.to_dict("records")])


def examples(cases: pd.DataFrame) -> list[dict]:
    """The first case of each site, read for `figures.cohort_figure`: case, site, flair, affine, reference (0, 1, 2)."""
    loaded = [(row, volumes.load_volume(row["flair"])) for row in cases.groupby("site").head(1).to_dict("records")]
    return [{"case": row["case"], "site": row["site"], "flair": flair.data, "affine": flair.affine,
             "reference": volumes.load_mask(row["mask"], like=flair)} for row, flair in loaded]


def describe(cases: pd.DataFrame) -> str:
    """What the cases of a cohort table are, for captions: "synthetic cases" or "real scans"."""
    synthetic = any((folder / SYNTHETIC_NOTE).exists() for folder in Path(cases["flair"].iloc[0]).parents)
    return "synthetic cases" if synthetic else "real scans"


def split_cases(cohort: pd.DataFrame, recipe: Recipe) -> pd.DataFrame:
    """Train, validation and test cases: columns case, site, lesion_ml, split.

    In each site the subjects are ordered by lesion volume, and test and validation ones drawn at even steps from a seeded
    start, so that each split spans the burden; at least one of each, all sessions of a subject together.
    `cohort` needs case, site, lesion_ml. Raises InputError for a site of fewer than three subjects.
    """
    split = cohort[["case", "site", "lesion_ml"]].assign(split="train")
    subject = split["case"].str.replace(r"_ses-.*", "", regex=True)
    for site, rows in split.groupby("site"):
        burden = rows["lesion_ml"].groupby(subject).mean()
        ordered = sorted(burden.index, key=lambda name: (burden[name], name))
        if len(ordered) < 3:
            raise InputError(f"site {site} has {len(ordered)} subjects: a split needs 3, one each to train, validate and test. "
                             "Add cases or leave the site out")
        rng = np.random.default_rng(stable_seed(recipe.seed, "split", site))
        most = (len(ordered) - 1) // 2
        for part, share in (("test", recipe.split.test), ("val", recipe.split.val)):
            drawn = _even_steps(ordered, min(most, max(1, round(share * len(burden)))), rng)
            split.loc[rows.index[subject[rows.index].isin(drawn)], "split"] = part
            ordered = [name for name in ordered if name not in drawn]
    return split.reset_index(drop=True)


def _challenge_cases(files: list[Path]) -> list[dict]:
    by_folder = defaultdict(lambda: defaultdict(list))
    for path in files:
        role = path.name.split(".nii")[0]
        if path.parent.name == "pre" and role in ("FLAIR", "T1"):
            by_folder[path.parent.parent][role].append(path)
        elif role == "wmh":
            by_folder[path.parent][role].append(path)
    rows = []
    for folder, roles in by_folder.items():
        if not roles["FLAIR"]:
            continue
        site = _clean(folder.parent.name)
        group = [part for part in folder.parts[-5:-1] if part in ("training", "test")]
        flair, t1, mask = (_only(roles[role], folder) for role in ("FLAIR", "T1", "wmh"))
        rows.append({"case": f"{site}_{_clean(folder.name)}", "site": site, "flair": flair, "t1": t1, "mask": mask,
                     "group": group[-1] if group else ""})
    return rows


def _bids_cases(files: list[Path]) -> list[dict]:
    files = [path for path in files if path.name.startswith("sub-")]
    flairs = [path for path in files if _suffix(path) == "FLAIR" and "derivatives" not in path.parts]
    rows = []
    for flair in flairs:
        dataset = next((p.parent for p in flair.parents if p.name.startswith("sub-")), flair.parent)
        own = [path for path in files if path.is_relative_to(dataset) and _same_session(path, flair)]
        t1 = [path for path in own if _suffix(path) == "T1w" and _entities(path).get("space") == "FLAIR"]
        rows.append({"case": flair.name.split(".nii")[0].removesuffix("_FLAIR"), "site": _clean(dataset.name),
                     "flair": str(flair), "t1": _only(t1, flair), "mask": _only(_lesion_masks(own), flair), "group": ""})
    return rows


def _lesion_masks(files: list[Path]) -> list[Path]:
    """The masks of white matter lesions: those labelled so before unlabelled ones, `_mask` before `_dseg`."""
    for labels in (_LESION_LABELS, (None,)):
        for suffix in ("mask", "dseg"):
            found = [path for path in files if _suffix(path) == suffix and _entities(path).get("label") in labels]
            if found:
                return found
    return []


def _same_session(path: Path, flair: Path) -> bool:
    one, other = _entities(path), _entities(flair)
    return (all(one.get(key) == other.get(key) for key in ("sub", "ses"))
            and one.get("run", other.get("run")) == other.get("run"))


def _entities(path: Path) -> dict[str, str]:
    return dict(part.split("-", 1) for part in path.name.split(".nii")[0].split("_") if "-" in part)


def _suffix(path: Path) -> str:
    return path.name.split(".nii")[0].rsplit("_", 1)[-1]


def _only(paths: list[Path], owner: Path) -> str:
    if len(paths) > 1:
        raise InputError(f"{owner} has more than one candidate: {', '.join(map(str, paths))}. Keep one of them")
    return str(paths[0]) if paths else ""


def _clean(name: str) -> str:
    return re.sub(r"[^\w-]+", "_", name).strip("_")


def _natural(text: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]


def _even_steps(ordered: list, count: int, rng: np.random.Generator) -> list:
    start = rng.random()
    return [ordered[int((start + i) * len(ordered) / count)] for i in range(count)]


def _check(row: dict, inputs: Inputs | None) -> dict:
    case = volumes.load_case(row["flair"], row.get("t1"), row["mask"], inputs)
    flair = case.volume
    orientation = "".join(nibabel.aff2axcodes(flair.affine))
    labels, counts = np.unique(case.mask, return_counts=True)
    voxels = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    notes = _t1_notes(row.get("t1", ""), flair)
    notes += ["no lesion"] if not voxels.get(1) else []
    notes += [f"{voxels[2]} voxels of other pathology, ignored"] if voxels.get(2) else []
    notes += ["not acquired in axial slices"] if orientation[2] not in "SI" else []
    return {"case": row["case"], "site": row["site"], "shape": " x ".join(map(str, flair.data.shape)),
            "spacing": " x ".join(f"{s:.2f}" for s in flair.spacing), "orientation": orientation,
            "labels": ", ".join(f"{label}: {n}" for label, n in voxels.items()),
            "lesion_ml": voxels.get(1, 0) * float(np.prod(flair.spacing)) / 1000, "warnings": "; ".join(notes)}


def _t1_notes(t1: str, flair: volumes.Volume) -> list[str]:
    if not t1:
        return ["no T1"]
    image = volumes.load_volume(t1).image
    try:
        volumes.check_grid(t1, image, flair)
    except InputError:
        return ["T1 lies on another grid than the FLAIR: register it before training with it"]
    return []
