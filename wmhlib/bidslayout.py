"""The BIDS layout, raw and derived data (as ATLAS v2.0 has them): which scan, T1 and masks of a session belong together."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

from .errors import InputError, some
from .naming import candidate, clean, stem
from .tables import table_rows

SUFFIXES = {"flair": "FLAIR", "t1": "T1w"}  # of the contrasts that are segmented
_APART = ("acq", "ce", "rec", "run")  # entities by which the scans of a session differ
_LESIONS = ("wmh", "wml", "lesion", "lesions", "l")  # label entities, lower case
_VENTRICLES = ("ventricle", "ventricles", "csfventricles", "ventriclescsf")


def find(files: list[Path], root: Path, contrast: str, labelled: bool) -> list[dict]:
    """The scans among `files` (NIfTI, below `root`) that are named as BIDS names them, as `layouts.candidates` gives scans."""
    sessions, datasets = defaultdict(list), defaultdict(set)
    for path in files:
        entities = _entities(path)
        if path.name.startswith("sub-"):
            sessions[_dataset(path, root), entities["sub"], entities.get("ses", "")].append(path)
            if _suffix(path) == SUFFIXES[contrast]:
                datasets[entities["sub"]].add(_dataset(path, root))
    for dataset, subject, session in [place for place in sessions if not place[2]]:
        named = [place for place in sessions if place[:2] == (dataset, subject) and place[2]]
        own = sessions[dataset, subject, session]
        if len(named) == 1 and not any(_suffix(path) == SUFFIXES[contrast] for path in own):  # masks of the only session, which they do not name
            sessions[named[0]] += sessions.pop((dataset, subject, session))
    again = [f"sub-{subject}" for subject, found in datasets.items() if len(found) > 1]
    if again and labelled:
        print(f"{len(again)} subject labels occur in several datasets, each taken for another person ({some(again)}): where they are one person, list the "
              "cases in a table cases.csv with one subject", flush=True)
    keys = (*_APART, "space") if contrast == "t1" else _APART
    sites = {dataset: _sites(dataset, labelled) for dataset in dict.fromkeys(dataset for dataset, _, _ in sessions)}
    names = Counter(dataset.name for dataset in sites)
    named = {dataset: dataset.name if names[dataset.name] == 1 else "_".join(dataset.relative_to(root).parts) or dataset.name for dataset in sites}
    rows = []
    for (dataset, subject, session), own in sessions.items():
        prefix = f"{clean(named[dataset])}_" if again else ""
        on_flair = [path for path in own if _suffix(path) == "T1w" and _entities(path).get("space") == "FLAIR"]
        scans = [path for path in own if _suffix(path) == SUFFIXES[contrast] and "derivatives" not in path.relative_to(root).parts
                 and not (contrast == "t1" and path in on_flair)]
        for flair in scans:
            beside = [path for path in own if _agree(path, flair, keys) and (_same(path, flair) or not any(_same(path, scan) for scan in scans))]
            t1 = [] if contrast == "t1" else [path for path in on_flair if path in beside] or [path for path in on_flair if _agree(path, flair, ("ce", "rec", "run"))]
            space = "FLAIR" if contrast == "flair" else _entities(flair).get("space")
            case, site = prefix + stem(flair).removesuffix(f"_{SUFFIXES[contrast]}"), sites[dataset].get(subject, named[dataset])
            rows.append(candidate(
                case, f"{prefix}sub-{subject}", site, session, flair=[flair], t1=t1,
                mask=_chosen([path for path in beside if _shows_lesions(path)], space),
                ventricles=_chosen([path for path in beside if _entities(path).get("label", "").lower() in _VENTRICLES], space)))
    return rows


def _dataset(path: Path, root: Path) -> Path:
    """The dataset of a BIDS file, raw or derived: the folder that holds its `sub-*`, `rawdata` or `derivatives` folder."""
    parts = path.relative_to(root).parts[:-1]
    ends = [i for i, part in enumerate(parts) if part.startswith("sub-") or part in ("derivatives", "rawdata")]
    return root.joinpath(*parts[: ends[0]] if ends else parts)


def _sites(dataset: Path, labelled: bool) -> dict[str, str]:
    """Site by subject (without `sub-`) from participants.tsv, where it has a column for that. One that cannot be read is an InputError of
    `labelled` cases, which are split by site; of others it is named."""
    for path in (dataset / "participants.tsv", dataset / "rawdata" / "participants.tsv"):
        if path.is_file():
            try:
                rows, columns = table_rows(path, "\t")
            except InputError as error:
                if labelled:
                    raise
                print(f"no sites: {error}", flush=True)
                return {}
            column = next((name for name in ("site", "site_id", "scanner") if name in columns), "")
            return {row["participant_id"].removeprefix("sub-"): row[column] for _, row in rows
                    if column and row.get("participant_id") and clean(row[column]) and row[column] != "n/a"}
    return {}


def _agree(path: Path, flair: Path, keys: tuple) -> bool:
    """Whether two files of a session may belong together: an entity that only one of them has does not part them."""
    one, other = _entities(path), _entities(flair)
    return all(one.get(key, other.get(key)) == other.get(key, one.get(key)) for key in keys)


def _same(path: Path, scan: Path) -> bool:
    """Whether two files of a session name the same entities, which leaves no other scan to belong to."""
    one, other = _entities(path), _entities(scan)
    return all(one.get(key) == other.get(key) for key in _APART)


def _shows_lesions(path: Path) -> bool:
    """Labelled so, or a mask described so or not at all; a segmentation without label is one of tissues."""
    label, desc = (_entities(path).get(key, "").lower() for key in ("label", "desc"))
    return label in _LESIONS or not label and _suffix(path) == "mask" and bool(re.search("^$|lesion|wmh", desc))


def _chosen(masks: list[Path], space: str | None) -> list[Path]:
    """Of the masks of one thing: those with label or description before bare ones (which may be of the brain); in one
    pipeline labelled ones before others, `_mask` before `_dseg`, those of the scan's `space` before others."""
    masks = [path for path in masks if _suffix(path) in ("mask", "dseg")]
    masks = [path for path in masks if {"label", "desc"} & set(_entities(path))] or masks
    if len({_pipeline(path) for path in masks}) > 1:
        return masks
    found = {path: _entities(path) for path in masks}
    rank = {path: ("label" not in has, _suffix(path) == "dseg", has.get("space") != space, "space" in has) for path, has in found.items()}
    return [path for path in masks if rank[path] == min(rank.values())]


def _pipeline(path: Path) -> Path:
    return next((folder.parent for folder in path.parents if folder.name.startswith("sub-")), path.parent)


def _entities(path: Path) -> dict[str, str]:
    return dict(part.split("-", 1) for part in stem(path).split("_") if "-" in part)


def _suffix(path: Path) -> str:
    return stem(path).rsplit("_", 1)[-1]
