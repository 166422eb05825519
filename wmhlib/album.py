"""Segments images that are no scans, one or a folder of them: of each a mask and a probability as PNG, and of all a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from . import images
from .engine import WMHInferenceEngine
from .errors import InputError, reason
from .files import write_table
from .metrics import chosen, components
from .nifti import save_like
from .volumes import load_case

TABLE = "images.csv"


def segment_images(engine: WMHInferenceEngine, place: str | Path, out: str | Path, progress: bool = True) -> pd.DataFrame:
    """Segments the image `place`, or those that lie in this folder (of a set, in its `images/`), with `engine` into `out`: <name>_mask.png
    (0 and 255) and <name>_probability.png (0 to 255) of the image's own size, and images.csv.

    Returns its table: image, pixels and objects (8-connected) marked, uncertainty, unsure (where the operating point has a limit), status
    "done" or "failed", reason. An image that cannot be used is reported there, and the others go on. Raises InputError where there
    is no image, two would have one name, or `out` is the images' own folder.
    """
    paths, out, rows = _found(Path(place).expanduser()), Path(out).expanduser(), []
    if out.resolve() == paths[0].resolve().parent:
        raise InputError(f"{out} holds the images, and masks would count as images from then on: choose a folder for the results alone")
    try:
        for path in tqdm(paths, "images", disable=not progress):
            try:
                rows.append({"image": str(path)} | _segment(engine, path, out) | {"status": "done", "reason": ""})
            except Exception as error:  # whatever is wrong with one image, the others go on
                rows.append({"image": str(path), "status": "failed", "reason": reason(error)})
    finally:
        table = pd.DataFrame(rows, columns=["image", "pixels", "objects", "uncertainty", "unsure", "status", "reason"]).astype({"pixels": "Int64", "objects": "Int64"})
        write_table(table, out / TABLE)
    return table


def _segment(engine: WMHInferenceEngine, path: Path, out: Path) -> dict:
    """Writes mask and probability of one image; what the table says of them."""
    prediction = engine.predict(load_case(path, inputs=engine.recipe.inputs))
    mask, unsure = engine.segment(prediction), prediction.uncertainty
    for kind, data in (("probability", chosen(prediction.prob, prediction.prob_tta, engine.point)), ("mask", mask)):
        save_like(data, prediction.case.volume, out / f"{path.stem}_{kind}.png")
    return {"pixels": np.count_nonzero(mask), "objects": components(mask)[2], "uncertainty": unsure,
            "unsure": unsure > engine.point["unsure_above"] if "unsure_above" in engine.point else None}


def _found(place: Path) -> list[Path]:
    folder = place / "images" if images.is_set(place) else place
    paths = [place] if place.is_file() else sorted(path for path in folder.glob("*") if images.is_image(path) and not path.name.startswith("."))
    if not paths:
        raise InputError(f"{place} holds no image: expected a PNG, JPEG, TIFF or BMP file, or a folder of some")
    first = {}
    for path in paths:
        if first.setdefault(path.stem, path) != path:
            raise InputError(f"{path} and {first[path.stem].name} would have results of one name: rename one of them")
    return paths
