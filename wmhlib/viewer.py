"""A slice viewer in HTML: scans to browse in a report, a notebook or Colab, with reference, result and errors laid over them.

It holds all it needs: grey JPEG slices, outlines as vectors, one small script. Printed, it is a still of the slice shown.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable

import numpy as np
import pandas as pd
from contourpy import contour_generator
from PIL import Image

from .errors import InputError
from .images import is_image
from .nifti import load_mask, load_volume
from .pages import render
from .slices import bright, head_box, height_mm, to_display, window

_QUALITY = 82  # of the JPEGs


def viewer(cases: Iterable[dict]) -> str:
    """An HTML fragment in which to browse `cases`, the first one shown, on its slice with most lesion.

    A case: `case`, `site`, `affine`; as they lie in their files `flair` (H x W x D), `reference` (0, 1, 2) and `result`
    (boolean or 0/1), each of the two absent or None where there is none; if known, `dsc`; and `image`, True of an image, which has no
    heights and sides. Label 2 is neither hit nor
    error. Slices without head are left out, the rest is cropped to the head. Raises InputError where there is no case.
    """
    content = [_content(case) for case in cases]
    if not content:
        raise InputError("no case to view: expected at least one")
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    return render(
        "viewer.html.j2", cases=content, first=content[0], layers={name for case in content for name in case["layers"]}, data=data)


def case_files(rows: pd.DataFrame) -> list[dict]:
    """Cases for `viewer` from files: `rows` has `case`, `site`, `flair` and, "" where absent, the paths `mask` and `result`,
    and may have `dsc`. Raises InputError for files that are damaged or not on one grid."""
    cases = []
    for row in rows.to_dict("records"):
        scan = load_volume(row["flair"])
        reference, result = (load_mask(row[name], scan) if row.get(name) else None for name in ("mask", "result"))
        cases.append(dict(case=row["case"], site=row["site"], affine=scan.affine, flair=scan.data, reference=reference,
                          result=result, dsc=row.get("dsc"), image=is_image(row["flair"])))
    return cases


def _content(case: dict) -> dict:
    """What the viewer's script needs of one case: title, size in mm, layers' names, and for each slice its height, image and
    one vector path a layer."""
    reference, result = (case.get(name) for name in ("reference", "result"))
    given = {name: np.asarray(mask) == 1 for name, mask in (("reference", reference), ("result", result)) if mask is not None}
    if reference is not None and result is not None:
        given["ignored"] = np.asarray(reference) == 2
    (flair, *masks), spacing = to_display(case["affine"], np.asarray(case["flair"], np.float32), *given.values())
    box = head_box(flair.max(2))
    heights = [height_mm(case["affine"], np.shape(case["flair"]), z) for z in range(flair.shape[2])]
    flair, given = flair[box], {name: mask[box] for name, mask in zip(given, masks)}
    shown = np.flatnonzero(bright(flair).mean((0, 1)) > 0.02)
    shown = shown if len(shown) else np.arange(flair.shape[2])
    layers = _layers(given)
    grey = _grey(flair[..., shown[0] : shown[-1] + 1])
    burden = given.get("reference", given.get("result", flair > np.inf))[..., shown].sum((0, 1))
    dsc = case.get("dsc")
    return dict(scan=not case.get("image"), title=f"{case['case']} · {case['site']}" + (f" · Dice {dsc:.2f}" if dsc is not None and np.isfinite(dsc) else ""),
                size=[round(n * float(s), 2) for n, s in zip(flair.shape[1::-1], spacing[1::-1])],
                voxels=list(flair.shape[1::-1]), layers=list(layers),
                start=int(burden.argmax()) if burden.any() else len(shown) // 2,
                slices=[dict(z=round(heights[z]), image=_jpeg(grey[..., z - shown[0]]),
                             paths=[draw(mask[..., z]) for draw, mask in layers.values()]) for z in shown])


def _layers(given: dict[str, np.ndarray]) -> dict[str, tuple]:
    """Each layer's way of drawing and mask, by name."""
    if "ignored" not in given:
        return {name: (_outline, mask) for name, mask in given.items()}
    lesion, result = given["reference"], given["result"] & ~given["ignored"]
    return {"found": (_area, lesion & result), "false": (_area, result & ~lesion), "missed": (_area, lesion & ~result),
            "reference": (_outline, lesion), "result": (_outline, result)}


def _grey(flair: np.ndarray) -> np.ndarray:
    """uint8, one window for all slices."""
    low, high = window(flair)
    return (255 * np.clip((flair - low) / max(high - low, 1e-6), 0, 1)).round().astype(np.uint8)


def _jpeg(image: np.ndarray) -> str:
    """A grey image as base64 JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _outline(mask: np.ndarray) -> str:
    """SVG path of the outlines, in half voxels from the corner of the image."""
    if not mask.any():
        return ""
    lines = contour_generator(z=np.pad(mask.astype(np.float32), 1)).lines(0.5)
    path = ""
    for line in lines:
        points = np.round(2 * (line - 0.5)).astype(int)
        path += "M{} {}l".format(*points[0]) + " ".join(f"{x} {y}" for x, y in np.diff(points, axis=0)[:-1]) + "z"
    return path


def _area(mask: np.ndarray) -> str:
    """SVG path of the voxels themselves, a rectangle for each run in a row, in half voxels."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    (rows, starts), (_, ends) = np.nonzero(edges == 1), np.nonzero(edges == -1)
    return "".join(f"M{2 * x} {2 * y}h{2 * (end - x)}v2h{2 * (x - end)}z" for y, x, end in zip(rows, starts, ends))
