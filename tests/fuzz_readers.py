"""How inputs are read: each reader takes the path and the seeds, and checks what it gets. `TARGETS` says what is attacked."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import nibabel
import numpy as np
import torch
from fuzz_inputs import (
    ENCODER,
    Seeds,
    changed_header,
    checkpoint_input,
    json_input,
    mutated,
    scan_input,
    text_input,
    weights_input,
)

from wmhlib import bids, canvas, cohort, derivatives, layouts, medsam, nifti, splits, storage, volumes
from wmhlib.errors import CheckpointError
from wmhlib.files import read_table
from wmhlib.network import load_network
from wmhlib.sections import Inputs
from wmhlib.workspace import RunFolder


def _read_scan(path: Path, seeds: Seeds) -> None:
    case = volumes.load_case(path, inputs=Inputs(img_size=32))
    assert np.isfinite(case.images).all() and case.images.shape[1:] == case.volume.data.shape == case.inner.shape
    shown = volumes.case_canvas(case, 32)
    back = canvas.from_canvas(shown[0], case.grid)
    assert back.shape == case.volume.data.shape and np.isfinite(back).all()
    saved = nifti.save_like(case.inner.astype(np.uint8), case.volume, path.with_name("saved.nii.gz"))
    assert np.array_equal(np.asarray(nibabel.load(saved).dataobj), case.inner)
    saved.unlink()


def _read_mask(path: Path, seeds: Seeds) -> None:
    good = path.with_name("good.nii")
    good.write_bytes(seeds.scans[0])
    try:
        like = nifti.load_volume(good)
        mask = nifti.load_mask(path, like)
        assert mask.dtype == np.uint8 and mask.shape == like.data.shape and set(np.unique(mask)) <= {0, 1, 2}
        cohort.load_ventricles(str(path), like)
    finally:
        good.unlink()


def _read_cases(path: Path, seeds: Seeds) -> None:
    files = [path.with_name(name) for name in ("FLAIR.nii", "wmh.nii", "other.nii", "other_wmh.nii")]
    for file in files:
        file.touch()
    try:
        rows = layouts.candidates(path, labelled=False)
        cohort.find_scans(path)
        rows += layouts.candidates(path, labelled=True)
        assert not any("/" in row["case"] or ".." in row["case"] for row in rows)
        cohort.find_cases(path)
    finally:
        for file in files:
            file.unlink()


def _read_participants(path: Path, seeds: Seeds) -> None:
    scan = path.parent / "sub-01" / "anat" / "sub-01_FLAIR.nii"
    scan.parent.mkdir(parents=True)
    scan.touch()
    try:
        assert cohort.find_scans(path.parent).case[0] == "sub-01"
    finally:
        shutil.rmtree(scan.parents[1])


def _read_run(path: Path, seeds: Seeds) -> None:
    run = RunFolder(path.parent)
    other = run.split_csv if path.name == "cohort.csv" else run.cohort_csv
    other.write_text(seeds.split if path.name == "cohort.csv" else seeds.cohort)
    try:
        cases = run.cases()
        splits.check_split(read_table(run.split_csv), cases)
        assert all(Path(case).name == case for case in cases.case)
        run.split_text()
    finally:
        other.unlink()


def _read_sidecar(path: Path, seeds: Seeds) -> None:
    mask = bids.sidecar(bids.paths(path.parent, "sub-01", bids.WMH)["mask"])
    mask.parent.mkdir(parents=True)
    shutil.copy(path, mask)
    try:
        derivatives._write_overview([], path.parent, bids.WMH)
    finally:
        for name in (derivatives.TABLE, derivatives.INDEX):
            (path.parent / name).unlink(missing_ok=True)
        shutil.rmtree(path.parent / "sub-01")


def _read_description(path: Path, seeds: Seeds) -> None:
    layouts._our_own(path.parent)
    bids.write_dataset(path.parent / "none", {}, bids.WMH)
    shutil.rmtree(path.parent / "none")
    before = path.read_bytes()
    try:
        bids.write_dataset(path.parent, {}, bids.WMH)
    finally:
        for name in ("README", f"{bids.WMH.entities}_lesions.json", ".bidsignore"):
            (path.parent / name).unlink(missing_ok=True)
        path.write_bytes(before)


def _read_checkpoint(path: Path, seeds: Seeds) -> None:
    with contextlib.suppress(CheckpointError):
        assert isinstance(storage.load_checkpoint(path), dict)
    encoder = medsam.ImageEncoder(ENCODER)
    medsam.load_checkpoint(encoder, path)
    assert all(torch.isfinite(value).all() for value in encoder.state_dict().values())


def _read_weights(path: Path, seeds: Seeds) -> None:
    network, split = load_network(path)
    assert all(torch.isfinite(value).all() for value in network.trained_state().values()) and isinstance(split, str)


TARGETS = {  # share of the inputs: name, how it is made, how it is read
    "scan": (0.34, scan_input, _read_scan),
    "mask": (0.08, lambda s, r: (changed_header(s.mask, r) if r.random() < 0.5 else mutated(s.mask, r), ".nii"), _read_mask),
    "cases.csv": (0.09, lambda s, r: text_input(s.cases, r), _read_cases),
    "cohort.csv": (0.07, lambda s, r: text_input(s.cohort, r), _read_run),
    "split.csv": (0.07, lambda s, r: text_input(s.split, r), _read_run),
    "history.csv": (0.04, lambda s, r: text_input(s.history, r), lambda path, seeds: read_table(path)),
    "participants.tsv": (0.03, lambda s, r: text_input(s.participants, r), _read_participants),
    "recipe.json": (0.08, lambda s, r: json_input(s.recipe, r), lambda path, seeds: RunFolder(path.parent).recipe()),
    "operating_point.json": (0.05, lambda s, r: json_input(s.point, r), lambda path, seeds: RunFolder(path.parent).point()),
    "sidecar.json": (0.03, lambda s, r: json_input(s.sidecar, r), _read_sidecar),
    "dataset_description.json": (0.02, lambda s, r: json_input(s.description, r), _read_description),
    "checkpoint.pt": (0.06, checkpoint_input, _read_checkpoint),
    "best.safetensors": (0.04, weights_input, _read_weights),
}
