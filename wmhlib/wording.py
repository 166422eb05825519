"""The words of a report: written for scans and their lesions, read for images and what is marked in them."""

from __future__ import annotations

import re

from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator

_OF_IMAGES = {"a volume": "an area", "lesion volume": "marked area", "lesion burden": "marked area", "mm³": "px", "mm3": "px", "mm": "px", "ml": "kpx", "flair": "image",
              "volume": "area", "lesion": "object", "voxel": "pixel", "slice": "image", "scan": "image"}
_WORDS = re.compile(rf"(?<![\w-])({'|'.join(_OF_IMAGES)})(s?)(?![\w-])", re.IGNORECASE)


def of_images(text: str) -> str:
    """`text` with pixels (px; kpx: 1000 of them) for mm, mm3 and mL, which are these where a voxel is a pixel, and objects for lesions.
    Parts of longer names, as of cases, stay."""
    def word(found: re.Match) -> str:
        new = _OF_IMAGES[found[1].lower()] + found[2]
        return new.capitalize() if found[1][0].isupper() and not found[1].isupper() else new

    return _WORDS.sub(word, text)


def figure_of_images(figure: Figure) -> Figure:
    """`figure`, all its texts through `of_images`."""
    for text in figure.findobj(Text):
        text.set_text(of_images(text.get_text()))
    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)):
        if isinstance(axis.get_major_locator(), FixedLocator):  # else its labels are numbers, and made anew in each drawing
            axis.set_ticklabels([of_images(label.get_text()) for label in axis.get_ticklabels()])
    return figure
