"""The pages of batch prediction: one for each scan, and the index of them all. They need no network."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import bids, figures
from .captions import caption
from .pages import render
from .slices import fullest, head_box, outline, show, tallness, to_display
from .viewer import viewer

_INCHES, _DPI = 1.3, 100  # width of a thumbnail


def scan_page(case: dict, row: dict, lesions: pd.DataFrame, paths: dict[str, Path], index: Path, kind: bids.Kind) -> str:
    """HTML of one scan: figures of `row` (of the table of `derivatives.predict_scans`), overlays and slices of `case` (as
    `derivatives.worth_a_look` gives it), `lesions`, and links to its files (`paths`, by what they are) and to `index`."""
    files = {key: path.name for key, path in paths.items() if key not in ("thumbnail", "page")}
    figure = base64.b64encode(overlay(case)._repr_png_()).decode()
    return render("scan.html.j2", row=row, figure=figure, viewer=viewer([case]), files=files,
                   kind=kind, caption=caption("overlay", f"{kind.scan} scan {row['scan']}"), index=os.path.relpath(index, paths["page"].parent),
                   lesions=lesions.round(3).to_html(index=False, border=0))


def index_page(table: pd.DataFrame, out: Path, kind: bids.Kind) -> str:
    """HTML of that `table`: a row a scan with thumbnail, volume and flag, a link to its page; failures with reason."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    for row in rows:
        row["file"] = Path(row["flair"]).name
        thumbnail = bids.beside(Path(out) / (row["page"] or ""))["thumbnail"]
        if row["status"] == "done" and thumbnail.is_file():
            row["thumbnail"] = base64.b64encode(thumbnail.read_bytes()).decode()
    return render("scans.html.j2", rows=rows, kind=kind)


def overlay(case: dict) -> Figure:
    """Scan, lesions, probability and entropy of one scan on slices through its lesions."""
    return figures.overlay_figure(*(case[key] for key in ("flair", "result", "prob", "entropy", "affine")))


def thumbnail(case: dict) -> bytes:
    """JPEG of the slice with most lesion, lesions outlined."""
    (flair, mask), spacing = to_display(case["affine"], case["flair"], case["result"])
    z = fullest(mask)
    box = head_box(flair[..., z])
    image = flair[..., z][box]
    fig = Figure(figsize=(_INCHES, _INCHES * np.clip(tallness(image, spacing), 0.5, 2)), dpi=_DPI, facecolor="black")
    ax = fig.add_axes((0, 0, 1, 1))
    show(ax, image, spacing)
    outline(ax, mask[..., z][box], figures.YELLOW)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="jpg", pil_kwargs={"quality": 80})
    return buffer.getvalue()
