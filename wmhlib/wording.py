"""The words of a report: written for FLAIR scans and their lesions, read for T1w scans with strokes, and for images and what is marked in them."""

from __future__ import annotations

import re
from collections.abc import Callable

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator

_OF_IMAGES = {"a volume": "an area", "lesion volume": "marked area", "lesion burden": "marked area", "mm³": "px", "mm3": "px", "mm": "px", "ml": "kpx", "flair": "image",
              "volume": "area", "lesion": "object", "voxel": "pixel", "slice": "image", "scan": "image"}
_OF_STROKES = {"flair": "T1w", "white matter hyperintensity": "stroke lesion", "white matter hyperintensitie": "stroke lesion"}


def of_images(text: str) -> str:
    """`text` with pixels (px; kpx: 1000 of them) for mm, mm3 and mL, which are these where a voxel is a pixel, and objects for lesions.
    Parts of longer names, as of cases, stay."""
    return _replaced(text, _OF_IMAGES)


def of_strokes(text: str) -> str:
    """`text` with T1w for FLAIR and stroke lesions for white matter hyperintensities."""
    return _replaced(text, _OF_STROKES)


def words(data: str) -> Callable[[str], str]:
    """What turns a text into one on `data`, as `cohort.describe` names it: `of_images`, `of_strokes`, or str, which leaves it as it is."""
    return of_images if data in ("images", "synthetic images") else of_strokes if "T1w scan" in data else str


def figure_in(figure: Figure, word: Callable[[str], str]) -> Figure:
    """`figure`, all its texts through `word`."""
    for text in figure.findobj(Text):
        text.set_text(word(text.get_text()))
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        if isinstance(axis.get_major_locator(), FixedLocator):  # else its labels are numbers, and made anew in each drawing
            axis.set_ticklabels([word(label.get_text()) for label in axis.get_ticklabels()])
    return figure


def _replaced(text: str, names: dict[str, str]) -> str:
    def word(found: re.Match) -> str:
        new = names[found[1].lower()] + found[2]
        return new[0].upper() + new[1:] if found[1][0].isupper() and not found[1].isupper() else new

    return re.sub(rf"(?<![\w-])({'|'.join(names)})(s?)(?![\w-])", word, text, flags=re.IGNORECASE)
