"""Figures of notebook 08_distill, with their captions."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..figures import BLUE, GREEN, LEGEND, POINTS, VERMILLION, captioned, page
from .claims import TARGETS

_PANELS = {
    "Feature loss": {"feature": ("training", BLUE, "o"), "val_feature": ("validation", VERMILLION, "s")},
    "Mask loss": {"mask": ("training", BLUE, "o"), "val_mask": ("validation", VERMILLION, "s")},
    "Dice of prompted masks": {"val_agreement": ("student and teacher", BLUE, "o"), "val_dice": ("student and object", VERMILLION, "s"),
                               "val_teacher_dice": ("teacher and object", GREEN, "^")},
}


def distil_figure(history: pd.DataFrame) -> Figure:
    """Feature loss, mask loss and Dice of prompted masks over epochs; `history` as `distill.distill` gives it."""
    fig, axes = page(1, 3, (9, 3.2))
    for ax, (title, lines) in zip(axes.flat, _PANELS.items()):
        for column, (label, colour, marker) in lines.items():
            ax.plot(history.epoch, history[column], color=colour, marker=marker, markersize=4, label=label)
        ax.set(xlabel="epoch", ylim=(0, 1 if "Dice" in title else None))
        ax.set_title(title, loc="left")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(**LEGEND)
    return fig


def dice_figure(table: pd.DataFrame) -> Figure:
    """Each test case's Dice under the teacher and under the student; `table` as `minisam.scan_dice` gives it, columns "teacher" and "student"."""
    fig, axes = page(1, 1, (4.2, 4.2))
    ax = axes[0, 0]
    ax.plot([0, 1], [0, 1], color="0.4", linewidth=1, label="equal")
    ax.plot([0, 1], [0, 0.9], color="0.4", linewidth=1, linestyle="--", label="90 % of the teacher's")
    ax.plot(table.teacher, table.student, color=BLUE, marker="o", label="a test case", **POINTS)
    ax.set(xlabel="teacher's Dice", ylabel="student's Dice", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.legend(loc="upper left", **LEGEND)
    return fig


CAPTIONS = {
    "distil":
        "Phase 1 on {data}. The feature loss is the share of the variance of the teacher's embeddings that the student does not explain (MSE; 1 is "
        "what their mean would do). Prompted masks: boxes and points on lesions and tissues, the same in each epoch, through the teacher's own mask "
        "decoder. Good: both losses fall together, and the student's masks come as close to the objects as the teacher's.",
    "dice":
        "Dice of whole scans, {data}: one view at 0.5, no filter, nothing chosen on them. Teacher and student were adapted by the same recipe on the "
        "same cases, the student in NF4, as are teachers of the size of ViT-H and ViT-L; scans are predicted with these matrices unpacked once. Good: points above the dashed line.",
    "fewshot":
        "Dice over the number of labelled slices trained on, {data}. Lines across need no training, or all of it. Good: a curve that nears the level of all slices early.",
    "cross":
        "Mean Dice of each adapter (rows) on test cases of each modality (columns), {data}; all adapters on one frozen base, the frame marks the "
        "best of a column. Good: the frames lie on the diagonal.",
    "claims":
        "Image encoders, alone and without adapters, on {data}, batches of one image. Weights are counted from the tensors in memory, NF4's scales among them, and saved against ViT-H in fp32; the peak is that of all of a fresh process during one "
        "pass (on a GPU its tensors alone); operations as torch's FlopCounterMode counts them (a MAC is 2 of them), then with decoder and image skip; times are medians, all encoders in turns in one "
        "run, against the teacher at equal size and precision (NF4 against bf16). All have random weights here, which cost the same. Dice is that of teacher and student, adapted; "
        "it is empty elsewhere.",
    "reached":
        "Each claim in each row, in the order of the heads: " + "; ".join(TARGETS) + ". Empty where it was not measured or is not about this pair. "
        "Good: yes; a no says why.",
}


def show(figure: Figure, folder: str | Path, name: str, data: str) -> None:
    """Keeps `figure` as <folder>/<name>.png and displays it with its caption."""
    captioned(figure, CAPTIONS[name].format(data=data), Path(folder) / f"{name}.png")


def tell(table: pd.DataFrame, name: str, data: str) -> None:
    """Displays `table` with its caption."""
    captioned(table, CAPTIONS[name].format(data=data))
