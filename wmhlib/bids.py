"""Names and places of results in a BIDS derivatives dataset, and the files that describe the dataset.

After the BIDS specification 1.10, https://bids-specification.readthedocs.io (derivatives: common data types, imaging).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from . import __version__
from .errors import InputError
from .files import write_atomic
from .naming import stem
from .sections import Inputs

TABLE, INDEX = "wmh_volumes.csv", "index.html"  # of all scans, at the top
_DESCRIPTION = "dataset_description.json"
# An entropy is no probability of a segmentation, and BIDS has no suffix for it; stat-<label>_statmap is that of BIDS Stats Models.
_ENDINGS = {"mask": "mask.nii.gz", "probability": "probseg.nii.gz", "entropy": "stat-entropy_statmap.nii.gz",
            "lesions": "lesions.tsv", "thumbnail": "thumbnail.jpg", "page": "report.html"}
_NOT_BIDS = "*_lesions.*\n*_statmap.*\n*_thumbnail.jpg\n*.html\n/*.csv\n"
_SCAN = re.compile(r"(sub-[A-Za-z0-9+]+)(_ses-[A-Za-z0-9+]+)?((?:_[a-z]+-[A-Za-z0-9+]+)*)_(?:FLAIR|T1w)")
_OWN_ENTITIES = re.compile(r"_(?:space|res|den|label|desc|stat)-[A-Za-z0-9+]+")  # results have their own
_NO_SUBJECT, _CONTRASTS = ("", "pre", "orig", "anat"), ("flair", "t1w", "t1")
_LESION_COLUMNS = {
    "lesion": ("", "26-connected component of the mask, largest first"), "voxels": ("", "voxels"),
    "volume_mm3": ("mm^3", "volume"), "volume_ml": ("mL", "volume"), "x_mm": ("mm", "centroid, to the patient's right (RAS)"),
    "y_mm": ("mm", "centroid, to anterior"), "z_mm": ("mm", "centroid, to superior"),
    "mean_prob": ("", "mean probability over its voxels"), "max_prob": ("", "highest probability")}
_README = """{lesions} found by wmhlib: mask, probability, entropy (bits) on each {scan}'s own grid, a table of
lesions and a page to look at. wmh_volumes.csv has a row for each scan, index.html shows them all. The JSON sidecar of a
mask says what it was made of and with. For research; not made by a medical device.
"""


@dataclass(frozen=True)
class Kind:
    """What the results of a dataset are of: the entities in their file names, and words."""

    entities: str
    scan: str
    lesion: str
    lesions: str


WMH = Kind("space-FLAIR_label-WMH", "FLAIR", "white matter hyperintensity", "White matter hyperintensities")
STROKE = Kind("space-T1w_label-lesion", "T1w", "stroke lesion", "Stroke lesions")


def kind_of(inputs: Inputs) -> Kind:
    """Of the results of a network with these `inputs`."""
    return STROKE if inputs.t1_alone else WMH


def paths(out: Path, name: str, kind: Kind) -> dict[str, Path]:
    """Where the results of the scan `name` (sub-01_ses-02_run-1) lie below `out`: mask, probability, entropy (NIfTI),
    lesions (TSV), thumbnail (JPEG) and page (HTML)."""
    session = re.search(r"_(ses-[^_]+)", name)
    folder = out / name.split("_")[0] / (session[1] if session else "") / "anat"
    return {key: folder / f"{name}_{kind.entities}_{ending}" for key, ending in _ENDINGS.items()}


def beside(page: Path) -> dict[str, Path]:
    """The same of the scan whose page is `page`."""
    start = page.name.removesuffix(_ENDINGS["page"])
    return {key: page.with_name(start + ending) for key, ending in _ENDINGS.items()}


def sidecar(image: Path) -> Path:
    """The JSON file that describes a NIfTI file."""
    return image.with_name(image.name.removesuffix(".nii.gz") + ".json")


def read_sidecars(out: Path, kind: Kind) -> dict[str, dict]:
    """The sidecar of every mask below `out`, by the scan's name; one that is no JSON object is passed over."""
    found = {}
    for path in sorted(out.glob(f"sub-*/**/anat/sub-*_{kind.entities}_mask.json")):
        try:
            content = json.loads(path.read_text())
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            found[path.name.split(f"_{kind.entities}")[0]] = content
    return found


def name_scans(scans: pd.DataFrame, taken: dict[str, str], made_of: Callable[[str, str], bool] = lambda name, flair: False) -> dict[str, str]:
    """The name of the results of each FLAIR of `scans` (columns flair, and subject, session where known).

    A file named as BIDS names it keeps its entities; another gets the subject it is listed with, else the letters and
    digits of its file name, else of the nearest folder. `taken` (name -> FLAIR) are results that exist. A FLAIR keeps its
    name, also where it has moved (`made_of` tells whether the results of a name are those of a FLAIR); of several that would have
    one name (case aside, as some disks see it) the first by path gets it, and to the subject of the others six digits of their
    path's sha256 are added.
    """
    names = {flair: name for name, flair in taken.items()}
    owners = {name.lower(): flair for name, flair in taken.items()}
    for scan in scans.fillna("").sort_values("flair").to_dict("records"):
        flair = scan["flair"]
        if flair not in names:
            subject, rest = _entities(scan)
            like = re.compile(f"{re.escape(subject)}([0-9a-f]{{6}})?{re.escape(rest)}")
            moved = next((name for name, old in taken.items() if like.fullmatch(name) and owners[name.lower()] == old and not os.path.exists(old)
                          and made_of(name, flair)), "")
            if not moved and f"{subject}{rest}".lower() in owners:
                subject += hashlib.sha256(flair.encode()).hexdigest()[:6]
            names[flair] = moved or subject + rest
        owners[names[flair].lower()] = flair
    return {flair: names[flair] for flair in scans["flair"]}


def sources(flairs: list[str]) -> dict[Path, str]:
    """The datasets (or plain folders) that FLAIR files lie in, each with the name its BIDS URIs begin with."""
    roots = sorted({_root(Path(flair)) for flair in flairs})
    return {root: _plain(root.name) + hashlib.sha256(str(root).encode()).hexdigest()[:6] for root in roots}


def uri(flair: str, links: dict[Path, str]) -> str:
    """The BIDS URI of a FLAIR file in one of the datasets of `sources`."""
    root = _root(Path(flair))
    return f"bids:{links[root]}:{Path(flair).relative_to(root).as_posix()}"


def described(folder: Path) -> dict:
    """What dataset_description.json in `folder` says; nothing where there is none, or it is damaged."""
    try:
        content = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def made_by_us(folder: Path) -> bool:
    """Whether the dataset in `folder` names this library among what made it."""
    tools = described(folder).get("GeneratedBy")
    return isinstance(tools, list) and any(isinstance(tool, dict) and tool.get("Name") == "wmhlib" for tool in tools)


def write_dataset(out: Path, links: dict[Path, str], kind: Kind) -> None:
    """The files at the top of the dataset: description, README, the columns of the lesion tables, what is not BIDS.

    Raises InputError, and writes nothing, where `out` is a dataset that something else made, or one of another kind, or a folder with
    files of these names or with datasets in it.
    """
    def is_strange(path: Path) -> bool:
        holds_subjects = not path.name.startswith("sub-") and any(path.glob("sub-*"))
        return path.name in ("README", ".bidsignore", INDEX) or os.path.exists(path / _DESCRIPTION) or holds_subjects

    strange = sorted(path.name for path in out.glob("*") if is_strange(path))  # read first: another process may be writing
    before = (out / _DESCRIPTION).exists()
    other = next((each.lesions for each in (WMH, STROKE) if each != kind and described(out).get("Name") == each.lesions), "")
    if other:
        raise InputError(f"{out} holds results on another kind of scan ({other}): choose another folder for the results")
    if before and not made_by_us(out):
        raise InputError(f"{out} holds another dataset ({_DESCRIPTION} is not of wmhlib): choose another folder for the results")
    if strange and not before:
        raise InputError(f"{out} holds {', '.join(strange[:3])} of something else: choose a folder for the results alone, such as {out / 'wmhlib'}")
    places = {name: Path(os.path.relpath(root, out)).as_posix() for root, name in links.items()}
    description = {
        "Name": kind.lesions, "BIDSVersion": "1.10.0", "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "wmhlib", "Version": __version__, "CodeURL": "https://github.com/wmh-lora/wmh-lora"}],
        "SourceDatasets": [{"URL": place} for place in places.values()], "DatasetLinks": places}
    columns = {name: {"Description": text} | ({"Units": unit} if unit else {}) for name, (unit, text) in _LESION_COLUMNS.items()}
    for name, content in {_DESCRIPTION: json.dumps(description, indent=2) + "\n", "README": _README.format(lesions=kind.lesions, scan=kind.scan),
                          f"{kind.entities}_lesions.json": json.dumps(columns, indent=2) + "\n", ".bidsignore": _NOT_BIDS}.items():
        write_atomic(out / name, content)


def _entities(scan: dict) -> tuple[str, str]:
    """Subject (sub-01) and further entities (_ses-02_run-1) of the results of a scan."""
    path = Path(scan["flair"])
    if bids := _SCAN.fullmatch(stem(path)):
        return bids[1], (bids[2] or "") + _OWN_ENTITIES.sub("", bids[3])
    subject, session = (str(scan.get(key, "")).removeprefix(key[:3] + "-") for key in ("subject", "session"))
    parts = [re.split(r"[^A-Za-z0-9]+", part) for part in (subject, stem(path), *reversed(path.parent.parts))]
    labels = ["".join(word for word in words if word.lower() not in _CONTRASTS) for words in parts]
    subject, session = next((label for label in labels if label.lower() not in _NO_SUBJECT), "scan"), _plain(session)
    return f"sub-{subject}", f"_ses-{session}" if session else ""


def _plain(text: str) -> str:
    return re.sub("[^A-Za-z0-9]", "", text)


def _root(flair: Path) -> Path:
    described = [folder for folder in flair.parents if (folder / _DESCRIPTION).exists()]
    above = [folder.parent for folder in flair.parents if folder.name.startswith("sub-")]
    return (described or above[-1:] or [flair.parent])[0]
