"""Images that are no scans, as SALT's 2-D sets hold them: the folder they lie in, their pixels, and how these are normalised.

An image is a case of one slice: a volume H x W x 1 whose voxels are its pixels, each 1 mm wide. Whatever counts mm or mm3 therefore
counts pixels, and mL are thousands of pixels.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage

from .errors import InputError, listed
from .naming import candidate, clean
from .tables import table_rows

TABLE = "data_split.csv"  # a folder that holds a table of this name is a set of images
AFFINE = np.array([[0.0, -1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])  # rows and columns are shown as they are stored
_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_NAMES = ("imgs", "img", "images", "image", "names", "name", "filename", "file")  # columns that may name the images
_GROUPS = {"train": "training", "training": "training", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_MOST_PIXELS = 1 << 26
_DARK = 0.05  # of the way from the darkest to the brightest: below it lies what surrounds a photograph's field


def is_image(path: str | Path) -> bool:
    """Whether the name is that of an image, not of a scan."""
    return Path(path).suffix.lower() in _SUFFIXES


def is_set(place: str | Path) -> bool:
    """Whether `place` is a folder of images with their split."""
    return Path(place).expanduser().joinpath(TABLE).is_file()


def candidates(place: str | Path) -> list[dict]:
    """The images that data_split.csv names, as `layouts.candidates` gives scans: each a case of its own, of the site that is the
    folder's name, with its file in `images/`, the file of the same name (whatever its ending) in `masks/`, and as group its split,
    "training", "val" or "test".

    The table has a column with names (one of imgs, img, image, name, ..., with or without ending) and a column `split` (train,
    val, test). Raises InputError for other columns, and with every row that names no image, one without a mask or with two, one named before, or
    another split.
    """
    place = Path(place).expanduser().absolute()
    table = place / TABLE
    lines, columns = table_rows(table)
    named = [name for name in columns if name in _NAMES]
    if len(named) != 1 or columns.count("split") != 1:
        raise InputError(f"{table} has the columns {', '.join(columns)}: expected one of {', '.join(_NAMES)} with the images' names, and split")
    pictures, masks = defaultdict(list), defaultdict(list)
    for folder, by_name in (("images", pictures), ("masks", masks)):
        for path in _files(place / folder):
            by_name[path.stem].append(path)
    rows, problems, first = [], [], {}
    for line, cells in lines:
        name, part = Path(cells[named[0]].replace("\\", "/")).name, cells["split"]
        stem = Path(name).stem if is_image(name) else name
        found, mask = [path for path in pictures[stem] if name in (path.name, stem)], masks[stem]
        wrong = [] if len(found) == 1 else [f"images/ has {_some(found)} of this name"]
        wrong += [] if len(mask) == 1 else [f"masks/ has {_some(mask)} of this name"]
        wrong += [] if part.lower() in _GROUPS else [f"its split is {part!r}, not train, val or test"]
        wrong += [f"it is also in line {first[stem]}"] if stem in first else []
        problems += [f"line {line}, image {name!r}: {', '.join(wrong)}"] if wrong else []
        first.setdefault(stem, line)
        case = clean(stem)
        rows.append(candidate(case, case, place.name, group=_GROUPS.get(part.lower(), ""), flair=found, mask=mask))
    if problems or not rows:
        raise InputError(f"{table} " + (f"has {len(problems)} wrong rows:{listed(problems)}" if rows else "names no image"))
    return rows


def read(path: str | Path) -> np.ndarray:
    """The pixels of an image, float32 H x W x 3 (red, green, blue; all the same of a grey one), upright where its EXIF says how. Raises InputError for what cannot
    be read, and for an image of one value."""
    pixels = _values(path, "RGB")
    if not np.isfinite(pixels).all() or pixels.min() == pixels.max():
        raise InputError(f"{path} is constant or holds pixels that are no numbers: expected an image")
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)


def read_mask(path: str | Path) -> np.ndarray:
    """A mask, bool H x W: True where the file is not 0. Raises InputError for more values than 0 and one other; a JPEG, which
    blurs them, is cut at 128 of 255."""
    values = _values(path, "L")
    if not np.isfinite(values).all():
        raise InputError(f"{path} holds pixels that are no numbers: expected a mask, 0 and one other value")
    levels = np.unique(values)
    lossy = Path(path).suffix.lower() in (".jpg", ".jpeg")
    if 0 < levels[-1] < 128 if lossy else levels[0] != 0 or len(levels) > 2:
        raise InputError(f"{path} holds {len(levels)} values from {levels[0]:g} to {levels[-1]:g}: expected a mask, 0 and one other value"
                         f"{' (255 in a JPEG)' if lossy else ''}")
    return values >= 128 if lossy else values > 0


def field(grey: np.ndarray) -> np.ndarray:
    """Where a photograph shows something, bool H x W: all but the darkness, below 5 % of its 99th percentile, that begins at the edges."""
    low, high = float(grey.min()), float(np.percentile(grey, 99))
    return ndimage.binary_fill_holes(grey > low + _DARK * (high - low))


def normalise(pixels: np.ndarray, inner: np.ndarray, channels: tuple[str, ...], path: str | Path = "the image") -> np.ndarray:
    """H x W x 3 -> float32 of each of `channels` ("grey", the mean of the others, "red", "green", "blue"), M x H x W: minus its median in
    `inner`, over the standard deviation there of the grey image. One scale for all keeps a channel that shows little (blue, in a photograph of
    a retina) from being nothing but its noise. Raises InputError where that image is constant."""
    grey = pixels.mean(-1)
    if not inner.any() or np.ptp(grey[inner]) == 0:
        raise InputError(f"{path} shows one value in all of its {np.count_nonzero(inner)} pixels that are not dark: expected an image, not a mask")
    planes = dict(zip(("red", "green", "blue", "grey"), (*np.moveaxis(pixels, -1, 0), grey)))
    return np.stack([(planes[name] - np.median(planes[name][inner])) / grey[inner].std() for name in channels]).astype(np.float32)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} does not exist: expected the folders images and masks beside {TABLE}")
    return sorted(path for path in folder.iterdir() if is_image(path) and not path.name.startswith("."))


def _some(paths: list[Path]) -> str:
    return " and ".join(path.name for path in paths) or "no file"


def _values(path: str | Path, mode: str) -> np.ndarray:
    """The pixels as float32, in `mode` unless they are numbers of 16 bits or more, which have no other."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    try:
        with Image.open(path, formats=_FORMATS) as file:
            if file.width * file.height > _MOST_PIXELS:
                raise InputError(f"{path} has {file.width} x {file.height} pixels: expected {_MOST_PIXELS} at most; make it smaller, and its mask")
            if file.format == "TIFF" and file.n_frames > 1:
                raise InputError(f"{path} holds {file.n_frames} images: expected one; export each to a file of its own")
            upright = ImageOps.exif_transpose(file)
        return np.asarray(upright if upright.mode.startswith(("I", "F")) else upright.convert(mode), np.float32)
    except InputError:
        raise
    except Exception as error:  # Pillow raises a dozen types for a damaged or hostile file
        raise InputError(f"{path} is no PNG, JPEG, TIFF or BMP image that can be read ({error or type(error).__name__}): copy or export it again") from None
