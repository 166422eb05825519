"""Scans and masks as files: NIfTI, or images as volumes of one slice. What cannot be segmented is refused by name, and results are written
with the scan's own affine and header."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from PIL import Image

from . import images as pictures
from .errors import InputError, some
from .files import atomic, disk_error

MAX_VOXELS, _MAX_SLICES = 1 << 28, 2048
_SHIFT_MM = 0.1  # between grids that count as one
_MM, _EXTENT_MM = (0.1, 30.0), 1500.0  # of a voxel; of a scan
_GRAY = 1e12  # a grey value is smaller than
_INFLATES = 1032  # times, at most, by deflate


@dataclass(frozen=True)
class Volume:
    """A scan as it lies in its file: `data` float32 H x W x D, and the image whose header outputs copy."""

    data: np.ndarray
    image: nib.spatialimages.SpatialImage
    path: Path

    @property
    def affine(self) -> np.ndarray:
        return self.image.affine

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along the three array axes."""
        return tuple(float(s) for s in voxel_sizes(self.affine))


def load_volume(path: str | Path) -> Volume:
    """Read a 3-D NIfTI scan, or an image (H x W x 1, the mean of its colours). Raises InputError, naming the file, for whatever cannot be segmented."""
    image, data = _read(path)
    if not np.isfinite(data).all():
        raise InputError(f"{path} holds {np.count_nonzero(~np.isfinite(data))} voxels that are NaN or infinite: "
                         "put 0 there ('fslmaths in -nan out' does for NaN) or export the scan again")
    if data.min() == data.max():
        raise InputError(f"{path} is constant (every voxel is {data.flat[0]:g}): expected a scan")
    if max(-data.min(), data.max()) > _GRAY:
        raise InputError(f"{path} holds values from {data.min():g} to {data.max():g}: expected grey values; export the scan again")
    return Volume(data, image, Path(path))


def load_mask(path: str | Path, like: Volume) -> np.ndarray:
    """Read a label mask (uint8, 0 background, 1 lesion, 2 other pathology; of an image `images.read_mask`) on the grid of `like`, else InputError."""
    if pictures.is_image(path):
        mask = pictures.read_mask(path)[..., None]
        if mask.shape != like.data.shape:
            raise InputError(f"{path} has {mask.shape[1]} x {mask.shape[0]} pixels, {like.path} {' x '.join(map(str, like.data.shape[1::-1]))}: "
                             "expected an image and its mask of one size; export one of them again")
        return mask.astype(np.uint8)
    image, data = _read(path)
    check_grid(path, image, like)
    labels = np.rint(data)  # a scaled integer file holds 1 as 1.00002
    if not np.isin(labels, (0, 1, 2)).all() or np.abs(data - labels).max() > 0.01:
        raise InputError(f"{path} holds the labels {some(f'{label:g}' for label in np.unique(data))}: expected only 0, 1 (lesion) and 2 (other pathology); save it with these values")
    return labels.astype(np.uint8)


def need_file(path: str | Path) -> None:
    """Raise InputError unless `path` is a file whose content is here."""
    if not Path(path).is_file():
        raise InputError(f"{path} " + ("is a link whose content is not here: 'datalad get' or 'git annex get' it first"
                                       if Path(path).is_symlink() else "does not exist"))


def check_grid(path: str | Path, image: nib.spatialimages.SpatialImage, like: Volume) -> None:
    """Raise InputError unless `image`, read from `path`, has the shape of `like` and its corners at the same places in mm."""
    if image.shape != like.data.shape:
        raise InputError(f"{path} has shape {image.shape}, its scan {like.path} {like.data.shape}: expected one grid; "
                         "register or resample it first")
    corners = np.array(np.meshgrid(*((0, n - 1) for n in image.shape), indexing="ij")).reshape(3, -1).T
    shift = np.abs(apply_affine(image.affine, corners) - apply_affine(like.affine, corners)).max()
    if shift > _SHIFT_MM:
        raise InputError(f"{path} lies elsewhere in space than its scan {like.path} (by up to {shift:.3g} mm): "
                         "expected one grid; register or resample it first")


def save_like(array: np.ndarray, volume: Volume, path: str | Path) -> Path:
    """Write `array` (uint8 or float32, H x W x D) with the affine and header of `volume`, atomically; as an image, where `path` is one's,
    of 0 to 255 for 0 to 1."""
    if pictures.is_image(path):
        with atomic(path) as temporary:
            Image.fromarray(np.round(255.0 * array[..., 0]).astype(np.uint8)).save(temporary)
        return Path(path)
    header = volume.image.header.copy()
    header.set_data_dtype(array.dtype)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0
    with atomic(path) as temporary:
        nib.save(nib.Nifti1Image(array, volume.affine, header), temporary)
    return Path(path)


def _read(path: str | Path) -> tuple[nib.spatialimages.SpatialImage, np.ndarray]:
    """The image without its trailing axes of length one, and its voxels as float32."""
    if pictures.is_image(path):
        grey = pictures.read(path).mean(-1)[..., None]
        return nib.Nifti1Image(grey, pictures.AFFINE), grey
    try:
        need_file(path)
        _refuse_bomb(path)
        image = nib.load(path)
        if not isinstance(image, nib.spatialimages.SpatialImage):
            raise InputError(f"{path} is not a NIfTI file but a {type(image).__name__}: expected a 3-D scan")
        shape = image.shape
        if len(shape) < 3 or any(n != 1 for n in shape[3:]):
            raise InputError(f"{path} has shape {shape}: expected one 3-D volume (fslroi in out 0 1 takes the first of several)")
        if min(shape) < 1 or max(shape) > _MAX_SLICES or np.prod(shape, dtype=float) > MAX_VOXELS:
            raise InputError(f"{path} has shape {shape}: expected 1 to {MAX_VOXELS} voxels, {_MAX_SLICES} along an axis at most")
        if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) <= 1e-6 * voxel_sizes(image.affine).prod():
            raise InputError(f"{path} has an affine that is not invertible: its voxels have no place in space")
        if not all(_MM[0] <= mm <= _MM[1] and n * mm <= _EXTENT_MM for n, mm in zip(shape, voxel_sizes(image.affine))):
            raise InputError(f"{path} has {shape} voxels of {' x '.join(f'{s:.3g}' for s in voxel_sizes(image.affine))} mm: expected a head, "
                             f"in voxels of {_MM[0]:g} to {_MM[1]:g} mm; one measured in metres wants its header mended")
        dtype = image.get_data_dtype()
        if dtype.kind not in "iuf":
            raise InputError(f"{path} holds voxels of type {dtype}: expected numbers")
        inflates = 1 if str(path).lower().endswith(".nii") else _INFLATES
        if isinstance(image, nib.Nifti1Image) and dtype.itemsize * np.prod(shape, dtype=float) > inflates * Path(path).stat().st_size:
            raise InputError(f"{path} is damaged or incomplete: too small for its shape {shape}; copy or download it again")
        data = np.asarray(image.dataobj, dtype=np.float32).reshape(shape[:3])
    except nib.filebasedimages.ImageFileError as error:
        raise InputError(f"{path} is not a NIfTI file that can be read: {error}") from None
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{path} does not fit into memory: free some, or resample it") from None
    except Exception as error:  # nibabel raises a dozen types for a damaged or hostile file
        if isinstance(error, OSError) and error.errno:
            raise disk_error(path, error) from None
        raise InputError(f"{path} is damaged or incomplete ({error or type(error).__name__}): copy or download it again") from None
    header = image.header if isinstance(image, nib.Nifti1Image) else None
    return nib.Nifti1Image(data, image.affine, header), data


def _refuse_bomb(path: str | Path) -> None:
    """InputError for a gzip file that unpacks to more than any scan has, wherever its header makes nibabel read to."""
    largest = 8 * MAX_VOXELS
    if str(path).lower().endswith(".gz") and _INFLATES * Path(path).stat().st_size > largest:
        with gzip.open(path) as file:
            if sum(len(block) for block in iter(lambda: file.read(1 << 20), b"")) > largest:
                raise InputError(f"{path} unpacks to more than {largest >> 20} MB: expected a scan")
