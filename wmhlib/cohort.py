"""The cohort: the labelled cases of a place as one table, each of them read and checked."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import torch

from . import images, layouts, nifti, volumes
from .errors import InputError, listed, some
from .naming import ROLES, natural
from .sections import Inputs, Volume
from .volumetric.boxes import box_labels, place_box

UNFIT = "register it before training with it"  # how the warning of a T1 that cannot be an input ends
SYNTHETIC_NOTE = "synthetic.json"  # lies beside a synthetic cohort and says how it was made
_THICK_MM, _ANISOTROPY = 8.0, 6.0  # from here on a scan's slices count as thick, its voxels as long
_EXTENT_MM = (80.0, 140.0, 140.0)  # a head's height, width and length are longer
_MOST_ML = {"flair": 200.0, "t1": 500.0}  # of lesion, in the worst of cases: white matter, stroke
_STRETCH = 0.02  # between voxels in pixdim and in the affine, before they count as different
_SHARED = 0.1  # of the lesion that may lie in the ventricle mask, since borders are drawn twice


def find_cases(place: str | Path, inputs: Inputs | None = None) -> pd.DataFrame:
    """The labelled cases at `place` (any layout of `layouts.candidates`, or images of `images.candidates`), one row each, ordered by site and case.

    Columns, all text: case (unique), subject (who was scanned: `sub-*` in BIDS, the case itself in the challenge, as given in
    a table), site (the folder above the case; in BIDS the participant's site, or the dataset's name), flair, t1, mask and
    ventricles (absolute paths, "" if none; flair is the image where it is one, and the T1w scan where `inputs` are T1 alone),
    group ("training", "val", "test" or ""), origin ("synthetic" or "real"). Scans without a mask are left out, and named.
    Raises InputError, with every case it concerns, for no labelled case, two files for one role, two cases of one name or file.
    """
    contrast = _contrast(inputs)
    cases = _resolved(images.candidates(place) if images.is_set(place) else layouts.candidates(place, True, contrast), ROLES, place, inputs)
    unlabelled = cases.loc[cases["mask"] == "", "flair"]
    if len(unlabelled):
        print(f"left out {len(unlabelled)} scans without a mask: {some(unlabelled)}", flush=True)
    cases = cases[cases["mask"] != ""].reset_index(drop=True)
    if cases.empty:
        beside = "_label-L_desc-T1lesion_mask beside each _T1w" if contrast == "t1" else "<site>/<id>/wmh.nii.gz with <site>/<id>/pre/FLAIR.nii.gz"
        raise InputError(f"no labelled cases in {place} ({len(unlabelled)} scans without a mask): expected {beside}, "
                         "BIDS with masks under derivatives/ (label-WMH, -WML, -lesion or -L, or desc-*lesion* or -*wmh*, ending in _mask), or a table cases.csv")
    sites = cases.groupby("subject")["site"].unique()
    shared = [f"{subject} ({', '.join(found)})" for subject, found in sites.items() if len(found) > 1]
    if shared:
        print(f"{len(shared)} subjects have scans at several sites, each taken as one person: {some(shared)}", flush=True)
    cases["origin"] = ["synthetic" if any((folder / SYNTHETIC_NOTE).exists() for folder in Path(flair).parents) else "real"
                       for flair in cases["flair"]]
    return cases[["case", "subject", "site", *ROLES, "group", "origin"]]


def find_scans(place: str | Path, inputs: Inputs | None = None) -> pd.DataFrame:
    """The scans at `place`, labelled or not, in any layout of `layouts.candidates`, one row each, ordered by site and case.

    Columns, all text: case (unique), subject, session ("" if none), site, flair, t1 (absolute paths; "" if no T1 on the
    FLAIR's grid is known; where `inputs` are T1 alone, flair is the T1w scan). Raises InputError where there is no scan, or two of one name.
    """
    contrast = _contrast(inputs)
    scans = _resolved(layouts.candidates(place, False, contrast), ("flair", "t1"), place, inputs)
    return scans[["case", "subject", "session", "site", "flair", "t1"]]


def check_cases(cases: pd.DataFrame, inputs: Inputs | None = None, volume: Volume | None = None) -> pd.DataFrame:
    """Reads each case of `find_cases` as training with `inputs` (FLAIR alone unless given), of whole volumes where `volume` names a network, will,
    and describes it, one row each: case, site, shape, spacing (mm), orientation, labels (voxels of each), lesion_ml (label 1 alone), warnings
    (none is fatal), digest (of the FLAIR's voxels, by which the same scan is known elsewhere), mask_digest.

    Raises InputError with every case that cannot be used and the file to mend; one scan under two names is such a case.
    """
    rows, problems, scans = cases.to_dict("records"), [], {}
    # Unpacking, sorting and filtering leave Python to the other threads; 8 cases at once hold about 1 GB.
    with ThreadPoolExecutor(min(torch.get_num_threads(), 8)) as workers:
        checked = list(workers.map(partial(_checked, inputs=inputs or Inputs(), volume=volume or Volume()), rows))
    for row, found in zip(rows, checked):
        if isinstance(found, InputError):
            problems.append(f"{row['case']}: {found}")
        elif found["digest"] in scans:
            problems.append(f"{row['case']}: {row['flair']} holds the same scan as case {scans[found['digest']]}: keep one of them")
        else:
            scans[found["digest"]] = row["case"]
    if problems:
        raise InputError(f"{len(problems)} of {len(cases)} cases cannot be used:{listed(problems)}")
    return pd.DataFrame(checked)


def load_ventricles(path: str, like: nifti.Volume) -> np.ndarray | None:
    """The ventricle mask at `path` (every voxel above 0), bool H x W x D; None where there is none that can be read on the grid
    of `like` (`check_cases` warns of those)."""
    mask, _ = _beside(path, like)
    return None if mask is None else mask.data > 0


def examples(cases: pd.DataFrame) -> list[dict]:
    """The first case of each site (of eight sites at most), or the first eight images, read for `figures.cohort_figure`: case, site, flair,
    affine, reference (0, 1, 2), image (whether it is one)."""
    shown = cases if cases["flair"].map(images.is_image).all() else cases.groupby("site").head(1)
    loaded = [(row, nifti.load_volume(row["flair"])) for row in shown.head(8).to_dict("records")]
    return [{"case": row["case"], "site": row["site"], "flair": flair.data, "affine": flair.affine,
             "reference": nifti.load_mask(row["mask"], like=flair), "image": images.is_image(row["flair"])} for row, flair in loaded]


def describe(cases: pd.DataFrame, inputs: Inputs | None = None) -> str:
    """What the cases of a cohort table are, for captions: "synthetic cases", "real scans" or both; of images "synthetic images" or "images"; where
    `inputs` are T1 alone "synthetic T1w scans", "real T1w scans" or both."""
    origins = tuple(cases["origin"].unique())
    if cases["flair"].map(images.is_image).all():
        return "synthetic images" if origins == ("synthetic",) else "images"
    if _contrast(inputs) == "t1":
        return {("synthetic",): "synthetic T1w scans", ("real",): "real T1w scans"}.get(origins, "real and synthetic T1w scans")
    return {("synthetic",): "synthetic cases", ("real",): "real scans"}.get(origins, "real and synthetic cases")


def _contrast(inputs: Inputs | None) -> str:
    return "t1" if inputs and inputs.t1_alone else "flair"


def _resolved(rows: list[dict], roles: tuple[str, ...], place: str | Path, inputs: Inputs | None) -> pd.DataFrame:
    """The candidates as a table, one file for each role; raises InputError where that cannot be. Of several T1 that `inputs` do not ask for none is taken."""
    contrast = _contrast(inputs)
    if not (inputs or Inputs()).t1_beside:
        rows = [row | {"t1": row["t1"] * (len(row["t1"]) == 1)} for row in rows]
    if not rows and contrast == "t1":
        raise InputError(f"no T1w scans in {place}: expected BIDS (sub-*/ses-*/anat/*_T1w.nii.gz, in folders of sites or not), "
                         "a table cases.csv, or NIfTI files with T1 in their names")
    if not rows:
        raise InputError(f"no FLAIR scans in {place}: expected <site>/<id>/pre/FLAIR.nii.gz, BIDS (sub-*/anat/*_FLAIR.nii.gz), "
                         "a table cases.csv, or NIfTI files with FLAIR in their names; of images the folders images and masks with data_split.csv")
    rows = sorted(rows, key=lambda row: (row["site"], natural(row["case"])))
    problems = [f"{row['case']} has more than one candidate for its {role}: {', '.join(map(str, row[role]))}"
                for row in rows for role in roles if len(row[role]) > 1]
    table = pd.DataFrame([row | {role: str(row[role][0]) if row[role] else "" for role in roles} for row in rows])
    for column in ("case", *(role for role in ("flair", "mask") if role in roles)):
        for name, same in table[table[column] != ""].groupby(column):
            if len(same) > 1:
                others = same["flair" if column == "case" else "case"]
                problems.append(f"duplicate {column} {name}: {' and '.join(others)}")
    if problems:
        raise InputError(f"{place} leaves open which files belong together:{listed(problems)}\n"
                         "Keep one of each, or list the cases in a table cases.csv")
    return table


def _checked(row: dict, inputs: Inputs, volume: Volume) -> dict | InputError:
    """The row of one case in the table of checks, or what keeps the case from being used."""
    try:
        loaded = volumes.load_case(row["flair"], row.get("t1"), row["mask"], inputs)
        if volume.network:
            box_labels(loaded, place_box(loaded, volume), row["mask"])
    except InputError as error:
        return error
    digests = [hashlib.sha256(f"{array.shape}".encode() + array.tobytes()).hexdigest() for array in (loaded.volume.data, loaded.mask)]
    return _description(row, loaded, inputs, volume) | dict(zip(("digest", "mask_digest"), digests))


def _description(row: dict, case: volumes.Case, inputs: Inputs, volume: Volume) -> dict:
    flair = case.volume
    voxels = {label: count for label in range(3) if (count := int(np.count_nonzero(case.mask == label)))}
    lesion_ml = voxels.get(1, 0) * float(np.prod(flair.spacing)) / 1000
    if inputs.images:
        notes = [] if voxels.get(1) else ["nothing is marked"]
    else:
        _, misfit = _beside(row.get("t1", ""), flair)
        notes = [f"T1 {misfit}: {UNFIT}"] if misfit else ["no T1"] * (inputs.t1_beside and not row.get("t1"))
        notes += _mask_notes(case, voxels, lesion_ml, inputs, volume) + _ventricle_notes(row.get("ventricles", ""), case)
        notes += geometry_notes(flair, axial=not inputs.t1_alone)
    return {"case": row["case"], "site": row["site"], "shape": " x ".join(map(str, flair.data.shape)),
            "spacing": " x ".join(f"{s:.2f}" for s in flair.spacing), "orientation": "" if inputs.images else _codes(flair),
            "labels": ", ".join(f"{label}: {n}" for label, n in voxels.items()), "lesion_ml": lesion_ml,
            "warnings": "; ".join(notes)}


def _codes(flair: nifti.Volume) -> str:
    return "".join(nibabel.aff2axcodes(flair.affine))


def _beside(path: str, flair: nifti.Volume) -> tuple[nifti.Volume | None, str]:
    """The image at `path` if it lies on the FLAIR's grid, or what keeps it from being used ("" where there is none)."""
    if not path:
        return None, ""
    try:
        other = nifti.load_volume(path)
    except InputError:
        return None, "cannot be read or is empty"
    try:
        nifti.check_grid(path, other.image, flair)
    except InputError:
        return None, "lies on another grid than the scan"
    return other, ""


def _mask_notes(case: volumes.Case, voxels: dict[int, int], lesion_ml: float, inputs: Inputs, volume: Volume) -> list[str]:
    (lesion,), _ = volumes.reorient(case.volume.affine, "LPS", case.mask == 1)
    seen, where = (case.grid.columns, case.grid.rows), f"the {inputs.fov:g} mm that are looked at: set inputs.fov higher"
    if volume.network:
        box = place_box(case, volume)
        seen = [(start, round(n * step)) for start, n, step in zip(box.starts, box.sizes, box.steps)]
        where = "the box that is looked at: set volume.box larger"
    outside = int(lesion.sum() - lesion[tuple(slice(max(0, start), max(0, start + length)) for start, length in seen)].sum())
    notes = ["no lesion"] if not voxels.get(1) else []
    notes += [f"{voxels[2]} voxels of other pathology, ignored"] if voxels.get(2) else []
    notes += [f"{lesion_ml:.0f} mL of lesion: is this a mask of lesions?"] if lesion_ml > _MOST_ML[_contrast(inputs)] else []
    notes += [f"{outside} lesion voxels outside {where}"] if outside else []
    return notes


def _ventricle_notes(path: str, case: volumes.Case) -> list[str]:
    ventricles, misfit = _beside(path, case.volume)
    if misfit:
        return [f"ventricle mask {misfit}: not used"]
    lesion = case.mask == 1
    share = (ventricles.data[lesion] > 0).mean() if ventricles and lesion.any() else 0
    return [f"{share:.0%} of the lesion voxels lie in the ventricle mask"] if share > _SHARED else []


def _header_notes(header: nibabel.Nifti1Header) -> list[str]:
    if not header["sform_code"] and not header["qform_code"]:
        return ["no orientation in its header: left and right are a guess"]
    try:
        named = {nibabel.aff2axcodes(affine) for affine in (header.get_sform(coded=True)[0], header.get_qform(coded=True)[0]) if affine is not None}
    except (ValueError, nibabel.spatialimages.HeaderDataError):  # a qform that is none
        return []
    return ["sform and qform name different orientations: sform is used"] * (len(named) > 1)


def geometry_notes(flair: nifti.Volume, axial: bool) -> list[str]:
    """What is odd about a scan's grid and header: sagittal or coronal slices where they should be `axial`, thick ones, an orientation that is missing or told
    twice, voxels of two sizes, less than a head. None is fatal."""
    codes, spacing = _codes(flair), np.array(flair.spacing)
    extent = dict(zip(("LRPAIS".index(code) // 2 for code in codes), spacing * flair.data.shape))
    notes = ["not acquired in axial slices"] if axial and codes[2] not in "SI" else []
    if spacing.max() >= _THICK_MM or spacing.max() >= _ANISOTROPY * spacing.min():
        notes.append(f"slices {spacing.max():.1f} mm apart: small lesions fall between them")
    notes += _header_notes(flair.image.header)
    volume = abs(np.linalg.det(flair.affine[:3, :3])) / np.prod(spacing)
    if abs(volume - 1) > _STRETCH:
        notes.append(f"sheared axes, as of a registration: a voxel holds {volume:.2f} times what its edges tell; resample it onto a grid of its own")
    told = flair.image.header.get_zooms()[:3]
    if not np.allclose(told, spacing, rtol=_STRETCH):
        named = (" x ".join(f"{mm:.3g}" for mm in voxel) for voxel in (told, spacing))
        notes.append("voxels of {} mm in its header, of {} mm by its affine, which counts: is that one to a template?".format(*named))
    least = zip((2, 0, 1), ("high", "wide", "long"), _EXTENT_MM)
    short = [f"{extent[axis]:.0f} mm {name}" for axis, name, mm in least if extent[axis] < mm]
    return notes + ([f"covers {', '.join(short)}: less than a head"] if short else [])
