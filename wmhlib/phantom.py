"""Synthetic cohorts: FLAIR, T1 and lesion masks after the challenge's three sites, or scans of scanners that there are once."""

from __future__ import annotations

import gzip
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from .atlas import template
from .cohort import find_cases
from .errors import InputError
from .scan import SITES, Case, Scan
from .scanners import KINDS, make_scan
from .workspace import stable_seed, write_atomic


def write_cohort(folder: str | Path, cases: int, seed: int, scale: float = 1.0, progress: bool = True,
                 scanners: str = "challenge") -> pd.DataFrame:
    """Writes `cases` synthetic cases as the challenge lays its own out: `training/<site>/<id>/pre/FLAIR.nii.gz`, `pre/T1.nii.gz`,
    `wmh.nii.gz`, and `ventricles.nii.gz` beside it. Returns the table of `cohort.find_cases`.

    `scanners`: "challenge" deals them over its three sites, "mixed" or one of `scanners.KINDS` makes each in a scanner of its own: no T1 then, but
    `tissue.nii.gz`. The same seed gives the same files, and a case does not depend on how many others there are. `scale`
    coarsens the in-plane voxels. Raises InputError for fewer than one case.
    """
    if cases < 1:
        raise InputError(f"a cohort of {cases} cases was asked for: expected at least 1")
    names, threads = list(SITES) if scanners == "challenge" else [scanners], torch.get_num_threads()
    template()

    def write(number: int) -> None:
        site, index = names[number % len(names)], number // len(names)
        case = make_case(site, stable_seed(seed, site, index), scale)
        place = Path(folder) / "training" / (SITES[site].path if site in SITES else site) / str(index)
        for name, data in (("pre/FLAIR", case.flair), ("pre/T1", case.t1), ("wmh", case.mask), ("ventricles", case.ventricles),
                           ("tissue", case.tissue)):
            if data is None:
                continue
            image = nib.Nifti1Image(data, case.affine)
            image.header.set_xyzt_units("mm")
            image.set_data_dtype(np.int16 if name.startswith("pre") else np.uint8)
            write_atomic(place / f"{name}.nii.gz", gzip.compress(image.to_bytes(), 1, mtime=0))

    # A case on each core is faster than one case on all; 4 cases at once hold about 5 GB.
    try:
        with ThreadPoolExecutor(min(threads, 4), initializer=torch.set_num_threads, initargs=(1,)) as workers:
            list(tqdm(workers.map(write, range(cases)), total=cases, desc="synthetic cases", disable=not progress))
    finally:
        torch.set_num_threads(threads)
    return find_cases(folder)


def make_case(site: str, seed: int, scale: float = 1.0) -> Case:
    """One case of `site` ("Utrecht", "Singapore", "GE3T", one of `scanners.KINDS` or "mixed"); `scale` coarsens the in-plane voxels. The result
    depends on the three arguments alone."""
    known = (*SITES, *KINDS, "mixed")
    if site not in known or not 1 <= scale <= 4:
        raise InputError(f"no synthetic case of site {site!r} at scale {scale}: expected one of {', '.join(known)}, at a scale of 1 to 4")
    return Scan(SITES[site], seed, scale).acquire() if site in SITES else make_scan(site, seed, scale)
