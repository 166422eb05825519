"""Synthetic cohorts: FLAIR, T1 and lesion masks after the challenge's three sites, scans of scanners that there are once, or T1w scans with strokes."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from . import strokes
from .atlas import template
from .cohort import find_cases
from .errors import InputError
from .files import write_atomic
from .scan import SITES, Acquisition, Scan
from .scanners import KINDS, make_scan
from .sections import Inputs, head_name
from .seeds import stable_seed
from .slicestore import TISSUE

_DEALT = {"challenge": SITES, "stroke": strokes.SITES}


def write_cohort(folder: str | Path, cases: int, seed: int, scale: float = 1.0, progress: bool = True,
                 scanners: str = "challenge", heads: Sequence[str] = ()) -> pd.DataFrame:
    """Writes `cases` synthetic cases as the challenge lays its own out: `training/<site>/<id>/pre/FLAIR.nii.gz`, `pre/T1.nii.gz`,
    `wmh.nii.gz`, and `ventricles.nii.gz` beside it; strokes as ATLAS v2.0 does: `<site>/<subject>/ses-1/anat/*_T1w.nii.gz`,
    `*_label-L_desc-T1lesion_mask.nii.gz` and `*_label-ventricles_mask.nii.gz`. Returns the table of `cohort.find_cases`.

    `scanners`: "challenge" deals them over its three sites, "mixed" or one of `scanners.KINDS` makes each in a scanner of its own: no T1 then, but
    `synthetic_tissue.nii.gz`, "stroke" over the sites of `strokes`. Of scanners of their own every second, third, ... case has the brain of one of the T1w scans `heads`, at a
    site of that name (`sections.head_name`). The same seed gives the same files, and a case does not depend on how many others there are. `scale`
    coarsens the in-plane voxels, those of strokes along all axes. Raises InputError for fewer than one case, and for heads of no use.
    """
    if cases < 1:
        raise InputError(f"a cohort of {cases} cases was asked for: expected at least 1")
    brains = {head_name(head): head for head in heads}
    names, threads = [*_DEALT.get(scanners, [scanners]), *brains], torch.get_num_threads()
    for head in ("", *heads):  # read once, not by every thread
        template(head)

    def write(number: int) -> None:
        name, index = names[number % len(names)], number // len(names)
        site = scanners if name in brains else name
        case = make_case(site, stable_seed(seed, name, index), scale, brains.get(name, ""))
        place = Path(folder) / "training" / (SITES[site].path if site in SITES else name) / str(index)
        files = ("pre/FLAIR", "pre/T1", "wmh", "ventricles", TISSUE)
        if site in strokes.SITES:
            subject = f"sub-{site.lower()}s{index + 1:03d}"
            place = Path(folder) / site / subject / "ses-1" / "anat"
            files = (f"{subject}_ses-1_{name}" for name in ("T1w", "", "label-L_desc-T1lesion_mask", "label-ventricles_mask", ""))
        for name, data in zip(files, (case.flair, case.t1, case.mask, case.ventricles, case.tissue)):
            if data is None:
                continue
            image = nib.Nifti1Image(data, case.affine)
            image.header.set_xyzt_units("mm")
            image.set_data_dtype(np.uint8 if data.dtype == np.uint8 else np.int16)
            write_atomic(place / f"{name}.nii.gz", gzip.compress(image.to_bytes(), 1, mtime=0))

    # A case on each core is faster than one case on all; 4 cases at once hold about 5 GB.
    try:
        with ThreadPoolExecutor(min(threads, 4), initializer=torch.set_num_threads, initargs=(1,)) as workers:
            list(tqdm(workers.map(write, range(cases)), total=cases, desc="synthetic cases", disable=not progress))
    finally:
        torch.set_num_threads(threads)
    return find_cases(folder, Inputs(modalities=("t1",)) if scanners == "stroke" else None)


def make_case(site: str, seed: int, scale: float = 1.0, head: str = "") -> Acquisition:
    """One case of `site` ("Utrecht", "Singapore", "GE3T", one of `scanners.KINDS`, "mixed" or one of `strokes.SITES`); `scale` coarsens the in-plane voxels
    (of strokes all); `head` is that of `scanners.make_scan`. The result depends on the arguments alone."""
    known = (*SITES, *KINDS, "mixed", *strokes.SITES)
    if site not in known or not 1 <= scale <= 4:
        raise InputError(f"no synthetic case of site {site!r} at scale {scale}: expected one of {', '.join(known)}, at a scale of 1 to 4")
    if site in strokes.SITES:
        return strokes.StrokeScan(strokes.SITES[site], seed, scale).acquire()
    return Scan(SITES[site], seed, scale).acquire() if site in SITES else make_scan(site, seed, scale, head)
