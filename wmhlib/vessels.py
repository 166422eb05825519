"""Synthetic images of vessels, for a demo and for tests: trees that branch and taper, photographed as a retina or an angiogram is.

Lengths are in pixels. A vessel of radius r parts into two whose r^3 add up to its own (Murray 1926, doi 10.1073/pnas.12.3.207).
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from scipy import ndimage
from tqdm import tqdm

from .cohort import find_cases
from .errors import InputError
from .files import write_atomic
from .images import TABLE
from .seeds import stable_seed

_PARTS = ("train", "val", "train", "test", "train")  # by turns; an odd number, so that each part has both kinds
_FINE = 4  # sub-pixels along each axis, in which vessels are drawn
_THINNEST = 0.7
_RETINA, _BLOOD = np.array([0.72, 0.34, 0.14]), np.array([0.35, 0.7, 0.5])  # its colour; the share of each colour that vessels take


def write_images(folder: str | Path, count: int, seed: int, side: int = 224, progress: bool = True) -> pd.DataFrame:
    """Writes `count` images in the layout of `images.candidates`, a retina in colour and an angiogram in grey by turns, of about
    `side` pixels, with a mask (0 and 255) and a part of the split each. Returns the table of `cohort.find_cases`.

    The same seed gives the same files, and an image does not depend on how many others there are. Raises InputError for fewer than
    one image, or a side below 32.
    """
    if count < 1 or side < 32:
        raise InputError(f"{count} images of {side} pixels were asked for: expected at least 1, of 32 or more")
    folder, lines = Path(folder), ["image,split"]
    for number in tqdm(range(count), "synthetic images", disable=not progress):
        image, mask = make_image(stable_seed(seed, "vessels", number), side, retina=number % 2 == 0)
        name = f"vessels_{number}.png"
        for role, data in (("images", image), ("masks", 255 * mask.astype(np.uint8))):
            buffer = io.BytesIO()
            Image.fromarray(data).save(buffer, "PNG")
            write_atomic(folder / role / name, buffer.getvalue())
        lines.append(f"{name},{_PARTS[number % len(_PARTS)]}")
    write_atomic(folder / TABLE, "\n".join(lines) + "\n")
    return find_cases(folder)


def make_image(seed: int, side: int = 224, retina: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """An image, uint8 H x W x 3 of a retina or H x W of an angiogram, and its vessels, bool H x W. The result depends on the three
    arguments alone."""
    rng = np.random.default_rng(stable_seed(seed, side, retina))
    shape = tuple(int(side * rng.uniform(0.75, 1.15)) for _ in range(2))
    y, x = np.mgrid[: shape[0], : shape[1]]
    centre, radius = (np.array(shape) - 1) / 2, 0.48 * min(shape)
    root = centre + rng.uniform(-0.25, 0.25, 2) * shape if retina else centre + (np.array([0.5, rng.uniform(-0.3, 0.3)]) * shape)
    headings = rng.uniform(0, 2 * np.pi) + np.arange(4) * np.pi / 2 if retina else -np.pi / 2 + rng.uniform(-0.4, 0.4, 2)
    coverage = _drawn(_grown(rng, root, headings, side * rng.uniform(0.011, 0.016), shape), shape)
    light = np.exp(_smooth(rng, shape, 3) * 0.18)
    texture = 1 + 0.05 * _smooth(rng, shape, 12)
    if retina:
        inside = np.hypot(y - centre[0], x - centre[1]) < radius
        disc = 0.7 * np.exp(-((np.hypot(*(axis - at for axis, at in zip((y, x), root))) / (0.09 * side)) ** 4))
        plane = _RETINA * (light * texture + disc)[..., None] * (1 - _BLOOD * rng.uniform(0.5, 0.9) * coverage[..., None]) * inside[..., None]
    else:
        inside = np.ones(shape, bool)
        plane = (rng.uniform(0.5, 0.75) * light * (texture + 0.1 * _smooth(rng, shape, 5)) * (1 - rng.uniform(0.3, 0.6) * coverage))[..., None]
    blur = rng.uniform(0.4, 0.9)
    plane = ndimage.gaussian_filter(plane, (blur, blur, 0)) + rng.normal(0, rng.uniform(0.01, 0.03), plane.shape) * inside[..., None]
    return np.round(255 * np.clip(plane, 0, 1)).astype(np.uint8).squeeze(), (coverage >= 0.5) & inside


def _grown(rng: np.random.Generator, root: np.ndarray, headings: np.ndarray, radius: float, shape: tuple[int, int]) -> list[tuple]:
    """The pieces (y, x, next y, next x, radius) of vessels that start at `root` (y, x), each on its heading."""
    pieces, tips = [], [(root, float(heading), radius * rng.uniform(0.8, 1)) for heading in headings]
    while tips:
        place, heading, radius = tips.pop()
        for _ in range(rng.integers(6, 14)):
            heading += rng.normal(0, 0.15)
            ahead = place + 1.5 * (1 + radius) * np.array([np.sin(heading), np.cos(heading)])
            pieces.append((*place, *ahead, radius))
            place, radius = ahead, 0.985 * radius
        share, turn = rng.uniform(0.15, 0.5), rng.choice((-1, 1))
        for part, angle in ((share, 0.9 - share), (1 - share, -0.5 * share)):
            thinner = radius * part ** (1 / 3)
            if thinner >= _THINNEST and ((place >= 0) & (place < shape)).all():
                tips.append((place, heading + turn * angle * rng.uniform(0.8, 1.4), thinner))
    return pieces


def _drawn(pieces: list[tuple], shape: tuple[int, int]) -> np.ndarray:
    """The share of each pixel that the pieces cover, H x W."""
    canvas = Image.new("L", (shape[1] * _FINE, shape[0] * _FINE))
    pen = ImageDraw.Draw(canvas)
    for *ends, radius in pieces:
        y0, x0, y1, x1, r = (_FINE * length for length in (*ends, radius))
        pen.line((x0, y0, x1, y1), 255, max(1, round(2 * r)))
        pen.ellipse((x1 - r, y1 - r, x1 + r, y1 + r), 255)
    return np.asarray(canvas, float).reshape(shape[0], _FINE, shape[1], _FINE).mean((1, 3)) / 255


def _smooth(rng: np.random.Generator, shape: tuple[int, int], waves: int) -> np.ndarray:
    """A smooth field of unit deviation, `waves` bumps across."""
    field = ndimage.gaussian_filter(rng.normal(size=shape), max(shape) / (4 * waves), mode="reflect")
    return (field - field.mean()) / field.std()
