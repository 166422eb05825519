"""Segments one scan or many, and leaves them as a BIDS derivatives dataset with one table and a page to look at each.

    python -m wmhlib.derivatives RUN_FOLDER FLAIR OUT
    accelerate launch --num_processes 4 -m wmhlib.derivatives RUN_FOLDER FLAIR OUT   (four GPUs)
    torchrun --nproc-per-node 4 -m wmhlib.derivatives RUN_FOLDER FLAIR OUT            (GPUs that processes share, or a CPU)

A scan is done when its mask's sidecar is there: it is written last, says what the results were made of and with, and holds
the sha256 of every file beside it. So a run again makes only what is missing, damaged, or made of another input, with other
weights, by other code, in another precision (a GPU's fp16 is not a laptop's fp32) or at another operating point. A mask that was
edited by hand stays, and counts with its own volume.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from . import bids, cohort, layouts, provenance, scanpages
from .errors import InputError, WMHError, reason, some, told
from .files import sha256, write_atomic, write_table
from .metrics import chosen, lesion_table
from .naming import natural, stem
from .nifti import Volume, load_mask, load_volume, save_like
from .processes import main_speaks_first
from .sections import Inputs
from .uncertainty import entropy
from .volumes import load_case
from .workspace import RunFolder, split_paths

TABLE, INDEX = bids.TABLE, bids.INDEX
COLUMNS = ["scan", "subject", "session", "flair", "volume_ml", "lesions", "uncertainty", "unsure", "threshold", "min_voxels",
           "min_mm3", "tta", "warnings", "status", "reason", "page"]
_EDITED = "the mask was edited by hand: volume and lesions are its own; its page, probabilities and table of lesions are of the mask before"
_LONGEST = timedelta(days=30)  # that one process may wait for another
_DESCRIPTIONS = {
    "mask": "Mask of {lesion}: 1 where the probability reaches the threshold, small components left out",
    "probability": "Probability of {lesion}, 0 to 1",
    "entropy": "Binary entropy, 0 to 1 bit, of the mean probability over the views of test-time augmentation: where the model "
               "is unsure"}


def find(flair: str | Path | list, t1: str | Path = "", inputs: Inputs | None = None) -> pd.DataFrame:
    """The scans that an argument names: a file, a folder (any layout of `cohort.find_scans`), a CSV table, or several.

    A string that is no existing path is split as a shell would (`split_paths`). A file that does not exist stays in, for
    `predict_scans` to report. `t1` goes with a single FLAIR; where `inputs` are T1 alone, a folder or table is searched for T1w scans.
    Columns: case, subject, session, site, flair, t1 (text, "" if unknown). A scan whose name says T1w (FLAIR, where `inputs` are T1 alone) is left out,
    and named. Raises InputError if nothing is left, for a T1 with more than one FLAIR or beside a T1w scan, and where `inputs` are those of images.
    """
    inputs = inputs or Inputs()
    _need_scans(inputs)
    columns = ["case", "subject", "session", "site", "flair", "t1"]
    tables = [pd.DataFrame(columns=columns)]
    for item in [Path(name).expanduser() for name in flair if str(name)] if isinstance(flair, (list, tuple)) else split_paths(flair):
        if item.is_dir() or item.suffix.lower() in (".csv", ".tsv"):
            tables.append(cohort.find_scans(item, inputs)[columns])
        else:
            tables.append(pd.DataFrame([[stem(item), "", "", "", str(item.absolute()), ""]], columns=columns))
    scans, other = pd.concat(tables, ignore_index=True), "_FLAIR" if inputs.t1_alone else "_T1w"
    if scans.empty:
        raise InputError(f"no scan is named: give a {'T1w' if inputs.t1_alone else 'FLAIR'} file, several, a folder or a CSV table")
    wrong = scans["flair"].map(stem).str.endswith(other)
    if wrong.any():
        told = f"these weights look at {'T1w scans' if inputs.t1_alone else 'FLAIR'}, and {other} ends the name of {some(scans['flair'][wrong])}"
        if wrong.all():
            raise InputError(f"{told}: name scans of that kind, or other weights (RUN=...)")
        print(f"{told}: left out", flush=True)
        scans = scans[~wrong].reset_index(drop=True)
    own, others = ("t1", "flair") if inputs.t1_alone else ("flair", "t1")
    odd = [path for path in scans["flair"] if layouts.names(path, others) and not layouts.names(path, own)]
    if odd:
        print(f"taken for {'T1w scans' if inputs.t1_alone else 'FLAIR'}, though their names say otherwise: {some(odd)}", flush=True)
    if t1 and inputs.t1_alone:
        raise InputError(f"these weights look at T1w scans alone: name them in flair (FLAIR=... of make predict), and leave t1 ({t1}) empty")
    if t1 and len(scans) > 1:
        raise InputError(f"one T1 ({t1}) is given for {len(scans)} FLAIR: list them in a CSV table with subject, flair, t1")
    if t1 and not inputs.t1_beside:
        print(f"these weights look at FLAIR alone: {t1} is not used", flush=True)
    return scans.assign(t1=str(Path(t1).expanduser().absolute())) if t1 else scans


def _need_scans(inputs: Inputs) -> None:
    if inputs.images:
        raise InputError("these weights are for images, not for scans: wmhlib.album segments those (make predict FLAIR=folder RUN=... calls it)")


def predict_scans(engine, scans: pd.DataFrame, out: str | Path, progress: bool = True, processes: PartialState | None = None) -> pd.DataFrame:
    """Segments `scans` (columns flair, and t1, subject, session where known) with `engine`, one at a time, into `out`.

    Results are named by `bids.name_scans`. Those made before of the same files, with the same weights and code in the same precision, and at
    the same point, are kept, and so is a mask that was edited since, with its own volume and lesions. A scan that fails is reported, and the others go on; one that fails while its results are saved has none
    that count, and is made anew by the next call. Returns a row a scan (COLUMNS; status "done", "edited", or "failed" with its reason; `warnings` as `cohort.geometry_notes`;
    `unsure` NA where the point has no `unsure_above`). `wmh_volumes.csv` and `index.html` list them and those done before,
    paths relative to `out`; after an interruption (Ctrl-C) too. Of several `processes`, which all call this with the same scans, each segments
    every n-th one; all return the whole table, and the main one alone writes the two files, when every scan is done.
    Raises InputError if there is no scan, not one could be segmented, or `out` holds another dataset or one of the scans.
    """
    if scans.empty:
        raise InputError("no scan is given: expected one or more")
    _need_scans(engine.recipe.inputs)
    out = Path(os.path.abspath(Path(out).expanduser()))
    scans = scans.assign(flair=[os.path.abspath(path) for path in scans["flair"]]).drop_duplicates("flair").fillna("")
    for flair in map(Path, scans["flair"]):
        if out in flair.parents or Path(os.path.realpath(out)) in Path(os.path.realpath(flair)).parents:
            raise InputError(f"{out} holds the scan {flair}, which would count as a result from then on: choose a folder for the "
                             f"results alone, such as {out / 'derivatives' / 'wmhlib'}")
    kind = bids.kind_of(engine.recipe.inputs)
    before = provenance.done_before(out, kind)
    names = bids.name_scans(scans, {name: sidecar["FLAIR"] for name, sidecar in before.items()},
                            lambda name, flair: os.path.isfile(flair) and before[name]["MadeWith"].get("flair_sha256") == sha256(flair))
    links = bids.sources([*names, *(sidecar["FLAIR"] for sidecar in before.values())])
    bids.write_dataset(out, links, kind)
    first, step = (processes.process_index, processes.num_processes) if processes else (0, 1)
    if processes:
        processes.wait_for_everyone()  # until all have named the scans, by what was there
    made_with, rows, missing = provenance.made_with(engine), [], "outside the box" if engine.recipe.volume.network else "without brain"
    try:
        for number, scan in list(enumerate(scans.to_dict("records"), 1))[first::step]:
            name, start, spent = names[scan["flair"]], time.monotonic(), "done before"
            try:
                made_of, sidecar = provenance.made_of(scan, engine) | made_with, before.get(name)
                edited = provenance.is_edited(out, name, sidecar, kind)
                if edited and sidecar["MadeWith"].get("flair_sha256") != made_of["flair_sha256"]:
                    raise InputError(f"{scan['flair']} is another scan than when its mask was edited by hand: move {bids.paths(out, name, kind)['mask']} away, "
                                     "so that it can be segmented anew, or put the scan back")
                if not (edited or provenance.is_done(out, name, sidecar, scan["flair"], made_of, kind)):
                    sidecar = _segment(engine, scan, out, name, made_of, bids.uri(scan["flair"], links))
                    spent = f"{time.monotonic() - start:.0f} s, {sidecar['Result']['skipped_slices']} slices {missing} skipped"
                rows.append(_known(out, name, sidecar, kind))
            except Exception as error:  # whatever is wrong with one scan, the others go on
                rows.append(_failed(name, {"FLAIR": scan["flair"], "MadeWith": made_with}, kind, error) | {"t1": scan.get("t1")})
            if progress:
                print(f"[{number}/{len(scans)}] {_line(rows[-1], spent)}", flush=True)
        if processes:
            place = {flair: number for number, flair in enumerate(scans["flair"])}
            rows = sorted(gather_object(rows), key=lambda row: place[row["flair"]])
    finally:
        if first == 0:
            _write_overview(rows, out, kind)
    table = _table(rows)
    if (table["status"] == "failed").all():
        raise InputError(f"none of {len(table)} scans could be segmented; the first: {table['reason'][0]}")
    return table


def main(arguments: list[str] | None = None) -> int:
    """The command: segments scans with the weights of a run. Returns 1 where a scan failed or a WMHError stopped it."""
    parser = argparse.ArgumentParser(prog="python -m wmhlib.derivatives", description=main.__doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder with trained weights")
    parser.add_argument("flair", nargs="+", help="the scans: a file, several, a folder (BIDS or other) or a CSV table")
    parser.add_argument("out", help="folder for the results, a BIDS derivatives dataset")
    given = parser.parse_args(arguments)
    from .engine import WMHInferenceEngine
    processes = PartialState(cpu=True, timeout=_LONGEST)  # what they exchange needs no GPU, and several can share one
    gpus = torch.cuda.device_count()
    try:
        with main_speaks_first(processes.is_main_process):
            engine = WMHInferenceEngine.from_run(RunFolder(given.run), f"cuda:{processes.local_process_index % gpus}" if gpus else "cpu")
            table = predict_scans(engine, find(given.flair, inputs=engine.recipe.inputs), given.out, processes=processes)
    except WMHError as error:
        return told(error)
    processes.wait_for_everyone()  # until the table is written
    failed = (table["status"] == "failed").sum()
    if processes.is_main_process:
        print(f"{len(table) - failed} of {len(table)} scans are done: {Path(given.out) / INDEX}")
    processes.destroy_process_group()
    return int(failed > 0)


def worth_a_look(table: pd.DataFrame, out: str | Path, n: int = 3) -> Iterator[dict]:
    """The first `n` scans done in `table`, edited ones among them, unsure ones before others and then by volume, read back from `out`.

    What `scanpages.overlay` and `viewer.viewer` show: case, site (here the volume), affine, spacing, flair and, on its
    grid (H x W x D), result (bool), prob and entropy (float32, 0-1).
    """
    out, done = Path(out).expanduser(), table[table["status"] != "failed"]
    order = done.assign(unsure=done["unsure"].fillna(False)).sort_values(["unsure", "volume_ml"], ascending=False)
    for row in order.head(n).to_dict("records"):
        paths, scan = bids.beside(out / row["page"]), load_volume(out / row["flair"])
        maps = (np.asarray(nibabel.load(paths[key]).dataobj, np.float32) for key in ("probability", "entropy"))
        yield _shown(row, scan, load_mask(paths["mask"], scan) == 1, *maps)


def _segment(engine, scan: dict, out: Path, name: str, made_with: dict, source: str) -> dict:
    """Writes the results of one scan, the mask's sidecar last, and returns that sidecar."""
    kind = bids.kind_of(engine.recipe.inputs)
    prediction = engine.predict(load_case(scan["flair"], scan.get("t1"), inputs=engine.recipe.inputs))
    volume, mask = prediction.case.volume, engine.segment(prediction)
    prob = chosen(prediction.prob, prediction.prob_tta, engine.point)
    maps = {"mask": mask.astype(np.uint8), "probability": prob, "entropy": np.float32(entropy(prediction.prob_tta))}
    lesions = lesion_table(mask, prob, volume.affine)
    lesions.insert(2, "volume_mm3", 1000 * lesions["volume_ml"])
    uncertainty, limit = prediction.uncertainty, engine.point.get("unsure_above")
    result = {"volume_ml": float(lesions["volume_ml"].sum()), "lesions": len(lesions), "uncertainty": uncertainty,
              "unsure": None if limit is None else uncertainty > limit, "skipped_slices": prediction.skipped,
              "warnings": "; ".join(cohort.geometry_notes(volume, axial=not engine.recipe.inputs.t1_alone))}
    about = {key: {"Description": _DESCRIPTIONS[key].format(lesion=kind.lesion), "Sources": [source], "SpatialReference": source} for key in maps}
    about["mask"] |= {"Type": "Lesion", "Manual": False, "FLAIR": scan["flair"], "MadeWith": made_with, "Result": result}
    paths = bids.paths(out, name, kind)
    commit = bids.sidecar(paths["mask"])
    commit.unlink(missing_ok=True)
    for key, data in maps.items():
        save_like(data, volume, paths[key])
    for key in ("probability", "entropy"):
        write_atomic(bids.sidecar(paths[key]), json.dumps(about[key], indent=2) + "\n")
    write_atomic(paths["lesions"], lesions.to_csv(sep="\t", index=False, float_format="%.6g", na_rep="n/a", lineterminator="\n"))
    row = _relative(_row(name, about["mask"], kind), out)
    shown = _shown(row, volume, mask, prob, maps["entropy"])
    write_atomic(paths["thumbnail"], scanpages.thumbnail(shown))
    write_atomic(paths["page"], scanpages.scan_page(shown, row, lesions, paths, out / INDEX, kind))
    about["mask"]["Files"] = {path.name: sha256(path) for path in paths.values()}
    relative = {"FLAIR": os.path.relpath(scan["flair"], commit.parent)}  # so that scans and results can move together
    write_atomic(commit, json.dumps(about["mask"] | relative, indent=2) + "\n")
    return about["mask"]


def _shown(row: dict, volume: Volume, mask: np.ndarray, prob: np.ndarray, unsure: np.ndarray) -> dict:
    return {"case": row["scan"], "site": f"{row['volume_ml']:.1f} mL", "affine": volume.affine, "spacing": volume.spacing,
            "flair": volume.data, "result": mask, "prob": prob, "entropy": unsure}


def _known(out: Path, name: str, sidecar: dict, kind: bids.Kind) -> dict:
    """The row of a scan whose results are there; of a mask that was edited since with the volume and lesions of that."""
    if not provenance.is_edited(out, name, sidecar, kind):
        return _row(name, sidecar, kind)
    scan = load_volume(sidecar["FLAIR"])
    mask = load_mask(bids.paths(out, name, kind)["mask"], scan) == 1
    lesions = lesion_table(mask, np.float32(mask), scan.affine)
    measured = {"volume_ml": float(lesions["volume_ml"].sum()), "lesions": len(lesions)}
    return _row(name, sidecar | {"Result": sidecar["Result"] | measured}, kind) | {"status": "edited", "reason": _EDITED}


def _failed(name: str, sidecar: dict, kind: bids.Kind, error: Exception) -> dict:
    return _row(name, sidecar | {"Result": {}}, kind) | {"status": "failed", "reason": reason(error), "page": ""}


def _row(name: str, sidecar: dict, kind: bids.Kind) -> dict:
    """The row of one scan in the table, as its sidecar tells it."""
    subject, *others = name.split("_")
    point = {key: sidecar["MadeWith"].get(key) for key in provenance.OF_MASKS}
    return {"scan": name, "subject": subject, "session": next((part for part in others if part.startswith("ses-")), ""),
            "flair": sidecar["FLAIR"], **sidecar["Result"], **point, "status": "done", "reason": "", "page": bids.paths(Path(), name, kind)["page"].as_posix()}


def _table(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=COLUMNS).astype({"lesions": "Int64", "unsure": "boolean"})


def _relative(row: dict, out: Path) -> dict:
    """The row without absolute paths, as it can be given away: those of the scan relative to `out`, also in the reason."""
    paths = {path: Path(os.path.relpath(path, out)).as_posix() for path in (row["flair"], row.get("t1")) if path}
    reason = row["reason"]
    for path, relative in (paths | {f"{out}{os.sep}": ""}).items():
        reason = reason.replace(path, relative)
    return row | {"flair": paths[row["flair"]], "reason": reason}


def _write_overview(rows: list[dict], out: Path, kind: bids.Kind) -> None:
    """Table and index of `rows` and of everything else that is done in `out`."""
    rows, new = list(rows), {row["scan"] for row in rows}
    for name, sidecar in provenance.done_before(out, kind).items():
        if name not in new:
            try:
                rows.append(_known(out, name, sidecar, kind))
            except WMHError as error:  # an edited mask, or its scan, that cannot be read
                rows.append(_failed(name, sidecar, kind, error))
    table = _table([_relative(row, out) for row in sorted(rows, key=lambda row: natural(row["scan"]))])
    write_table(table, out / TABLE)
    write_atomic(out / INDEX, scanpages.index_page(table, out, kind))


def _line(row: dict, spent: str) -> str:
    if row["status"] == "failed":
        return f"{row['scan']} failed: {row['reason']}"
    warnings = f"; {row['warnings']}" if row.get("warnings") else ""
    lesions = f"{row['lesions']} lesion{'s' * (row['lesions'] != 1)}{', unsure' * bool(row['unsure'])}"
    return f"{row['scan']}: {row['volume_ml']:.1f} mL in {lesions} ({spent}{', mask edited by hand' * (row['status'] == 'edited')}){warnings}"


if __name__ == "__main__":
    sys.exit(main())
