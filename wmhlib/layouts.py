"""The layouts scans may lie in: the WMH Challenge and its Kaggle mirror, BIDS (as ATLAS v2.0 is laid out), a CSV table, a plain folder."""

from __future__ import annotations

import errno
import os
import re
from collections import defaultdict
from pathlib import Path

from . import bids, bidslayout
from .errors import InputError, listed
from .naming import ROLES, candidate, clean, stem
from .tables import table_rows

TABLE = "cases.csv"  # a folder that holds a table of this name is read through it
_ENDINGS = (".nii", ".nii.gz", ".NII", ".NII.GZ", ".nii.GZ")  # that nibabel reads
_NO_DATA = ("sourcedata", "code")  # folders of a BIDS dataset that hold no scan of it
_GROUPS = {"": "", "train": "training", "training": "training", "test": "test"}
_CHALLENGE = {"FLAIR": "flair", "T1": "t1", "wmh": "mask", "ventricles": "ventricles"}
_NO_SCAN = {"t1", "t1w", "mask", "brainmask", "seg", "dseg", "label", "prob", "probseg", "wmh", "wml", "lesion", "lesions",
            "ventricle", "ventricles", "spread"}
_T1W = re.compile("t1(w|weighted|mprage|mpr|gd|c|ce)?")  # no map of T1


def candidates(place: str | Path, labelled: bool, contrast: str = "flair") -> list[dict]:
    """The scans at `place`, one dict each: case, subject, session, site, group ("training", "test" or ""), and for each of
    flair, t1, mask and ventricles the list of files that may be it (absolute paths; one is expected, none is possible). With the
    `contrast` "t1" the T1w scans are looked for in place of FLAIR and stand in `flair`, and there is no t1.

    `place` is a folder in the challenge's layout or BIDS (or both), any other folder of NIfTI files with FLAIR (T1) in their
    names, one NIfTI file, a table, or a folder with a `cases.csv`. A table has the columns subject, site, flair, mask, t1,
    and if wanted session, ventricles, group (a T1w scan may stand in either of flair and t1); its paths are absolute or
    start at its folder. Where the scans need not be
    `labelled`, masks are not looked at, and a table needs subject and flair alone: its files may be missing, an empty site
    is the folder's name and an empty subject the file's, and rows that cannot be used are left out and named.
    Hidden folders, `sourcedata` and `code` are passed over, and so is what this library wrote itself (`GeneratedBy` in
    dataset_description.json). Raises InputError for a place that is not there, and for a table of labelled cases with wrong
    rows, each named by its line.
    """
    place = Path(place).expanduser().absolute()
    if place.is_dir() and (place / TABLE).is_file():
        place = place / TABLE
    if place.is_dir():
        files = _files(place)
        found, plain = _challenge(files, place, contrast) + bidslayout.find(files, place, contrast, labelled), _plain(files, place, contrast)
        if found:
            _tell_left_out(found, plain, place)
        return found or plain
    if place.is_file() and place.suffix.lower() in (".csv", ".tsv"):
        return _table(place, labelled, contrast)
    if place.is_file() and place.name.endswith(_ENDINGS):
        return [candidate(clean(stem(place)), clean(stem(place)), place.parent.name, flair=[place])]
    raise InputError(f"{place} is not a folder, a CSV table or a NIfTI file: give the one that holds the cases")


def _tell_left_out(found: list[dict], plain: list[dict], place: Path) -> None:
    """Names the scans of a folder whose others are in a layout that these are not in: results and sources of those `found` aside."""
    cases = [path.parent.parent for row in found for path in row["flair"] if path.parent.name == "pre"]
    people = {(path.parent, path.name.partition("_")[0]) for row in found for path in row["flair"]}
    own = [path for row in plain for path in row["flair"]
           if (path.parent, path.name.partition("_")[0]) not in people and "derivatives" not in path.relative_to(place).parts]
    others = [str(path) for path in own if not any(case in path.parents for case in cases)]
    if others:
        print(f"left out {len(others)} scans of {place}, whose others are named as in BIDS or the challenge; give them by themselves, or all in a table:{listed(others)}", flush=True)


def _files(folder: Path) -> list[Path]:
    """NIfTI files below `folder`; linked folders are followed, each once."""
    found, seen = [], set()
    for root, folders, names in os.walk(folder, onerror=_unlisted, followlinks=True):
        real = os.path.realpath(root)
        if real in seen or _our_own(Path(root)):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NO_DATA)
        found += [Path(root, name) for name in sorted(names) if name.endswith(_ENDINGS) and not name.startswith(".")]
    return found


def _unlisted(error: OSError) -> None:
    """A folder that may not be read is named; one that cannot be (a Drive that has gone) would be scans that are missing: InputError."""
    if not isinstance(error, PermissionError):
        raise InputError(f"{error.filename} cannot be listed ({error.strerror}): run this again") from error
    print(f"left out {error.filename}, which may not be read", flush=True)


def _our_own(folder: Path) -> bool:
    nameless = (folder.parent.name, folder.name) == ("derivatives", "wmhlib") and "GeneratedBy" not in bids.described(folder)
    return nameless or bids.made_by_us(folder)


def _challenge(files: list[Path], root: Path, contrast: str) -> list[dict]:
    cases = defaultdict(lambda: defaultdict(list))
    for path in files:
        role = _CHALLENGE.get(stem(path))
        if role in ("flair", "t1") and path.parent.name == "pre":
            cases[path.parent.parent][role].append(path)
        elif role in ("mask", "ventricles"):
            cases[path.parent][role].append(path)
    rows = []
    for folder, roles in cases.items():
        if contrast == "t1":
            roles["flair"] = roles.pop("t1", [])
        if roles["flair"]:
            above = (root.name, *folder.parts[len(root.parts):])[-4:-2]  # <group>/<site> or <group>/Amsterdam/<site>
            group = [part for part in above if part in ("training", "test")]
            case = f"{clean(folder.parent.name)}_{clean(folder.name)}"
            rows.append(candidate(case, case, folder.parent.name, group=group[-1] if group else "", **roles))
    return rows


def _plain(files: list[Path], root: Path, contrast: str) -> list[dict]:
    rows, others = [], _NO_SCAN if contrast == "flair" else _NO_SCAN - {"t1", "t1w"}
    for path in files:
        if names(path, contrast) and not others & set(_words(path)):
            case = clean("_".join((*path.relative_to(root).parts[:-1], stem(path))))
            rows.append(candidate(case, case, root.name, flair=[path]))
    return rows


def names(path: str | Path, contrast: str) -> bool:
    """Whether the name of the file `path` says that it is a scan of `contrast` ("flair" or "t1")."""
    return any(_T1W.fullmatch(word) if contrast == "t1" else "flair" in word for word in _words(path))


def _words(path: str | Path) -> list[str]:
    return re.split(r"[^a-z0-9]+", stem(path).lower())


def _table(path: Path, labelled: bool, contrast: str) -> list[dict]:
    lines, columns = table_rows(path)
    if contrast == "t1" and "t1" in columns and ("flair" not in columns or any(cells["t1"] for _, cells in lines)):
        columns = ["flair" if name == "t1" else name for name in columns if name != "flair"]
        lines = [(line, cells | {"flair": cells["t1"], "t1": ""}) for line, cells in lines]
    needed = ("subject", "site", "flair", "mask") if labelled else ("subject", "flair")
    if not set(needed) <= set(columns) or len(set(columns)) < len(columns):
        raise InputError(f"{path} has the columns {', '.join(columns)}: expected {', '.join(needed)}, each once (and "
                         f"{'ventricles, group, ' if labelled else 'site, '}t1, session where there are any)")
    rows, problems, first = [], [], {}
    for line, cells in lines:
        files = {role: _place(path.parent, cells[role]) for role in ROLES
                 if cells.get(role) and (labelled or role in ("flair", "t1"))}
        subject, session, group = cells["subject"], cells.get("session", "").removeprefix("ses-"), cells.get("group", "")
        site = cells.get("site", "")
        if not labelled:
            site, subject, group = clean(site) or path.parent.name, subject or stem(cells["flair"]), ""
        case = clean("_".join((site, subject, *([f"ses-{session}"] if session else []))))
        wrong = [f"{name} is empty" for name, text in dict(subject=subject, site=site, flair=cells["flair"]).items() if not text]
        wrong += [f"{role} file {file} does not exist" for role, file in files.items() if labelled and not os.path.isfile(file)]
        wrong += [f"group is {group!r}, not training, test or empty"] if group.lower() not in _GROUPS else []
        wrong += ["more cells than columns"] if None in cells else []
        if not labelled and case in first:
            case += f"_line-{line}"
        alone = {case: f"case {case}"} | {file.resolve(): f"{role} file {file}" for role, file in files.items() if role in ("flair", "mask")}
        wrong += [f"{name} is also that of line {first[key]}" for key, name in alone.items() if key in first]
        problems += [f"line {line}: {', '.join(wrong)}"] if wrong else []
        if labelled or not wrong:
            first = dict.fromkeys(alone, line) | first
            group = _GROUPS.get(group.lower(), "")
            rows.append(candidate(case, subject, site, session, group, **{role: [file] for role, file in files.items()}))
    if problems and labelled:
        raise InputError(f"{path} has {len(problems)} wrong rows:{listed(problems)}")
    if problems:
        print(f"left out {len(problems)} rows of {path}:{listed(problems)}", flush=True)
    return rows


def _place(folder: Path, name: str) -> Path:
    """The path `name` in a table that lies in `folder`; what no path can be stays below it, where no file is."""
    try:
        path = folder / Path(name).expanduser()
        path.stat()
    except (OSError, RuntimeError, ValueError) as error:  # too long, the home of nobody, a NUL in it
        if not isinstance(error, OSError) or error.errno == errno.ENAMETOOLONG:
            return folder / clean(name)[:100]
    return path
