"""A frozen teacher's embeddings, computed once and kept on disk, where training maps them into memory."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .errors import InputError
from .fetch import need_space
from .files import atomic, read_json, write_atomic
from .medsam import CHANNELS
from .storage import remote


@dataclass(frozen=True)
class Embeddings:
    """maps: float16 N x 256 x h x w, mapped from a file; mean and std: float32 1 x 256 x 1 x 1, of each channel over all of them."""

    maps: np.ndarray
    mean: Tensor
    std: Tensor

    def __getitem__(self, places: list[int]) -> Tensor:
        """The maps at `places`, float32."""
        return torch.from_numpy(self.maps[places]).float()


def cached(path: str | Path, key: dict, count: int, compute: Callable[[range], Tensor], batch: int, progress: bool = True) -> Embeddings:
    """The embeddings in `path` (.npy, float16, with `key` in a .json beside it), computed first where they are not there.

    key: what they depend on, texts and numbers: `teacher` (the sha256 of its weights, and its precision), `px` and `data`;
    `compute(range)` gives the maps B x 256 x h x w of items in 0 .. count - 1. Embeddings of another key, or a file that is
    not whole, are made again, which is said. The file is whole or not there. Raises InputError for maps that float16 cannot hold.
    """
    path, about = Path(path), Path(path).with_suffix(".json")
    why = _unfit(path, about, key, count)
    if why:
        if why != "none":
            print(f"{path} {why}: computed again", flush=True)
        about.unlink(missing_ok=True)
        mean, std = _compute(path, count, compute, batch, progress)
        write_atomic(about, json.dumps(key | {"count": count, "mean": mean.tolist(), "std": std.tolist()}) + "\n")
    kept = read_json(about)
    return Embeddings(_near(path), *(torch.tensor(kept[name], dtype=torch.float32).view(1, -1, 1, 1) for name in ("mean", "std")))


def _near(path: Path) -> np.ndarray:
    """The maps in `path`, mapped; of a file on Drive or a network from a copy on the local disk, which ends with the process: there a page that
    cannot be read any more would kill it."""
    if not remote(path):
        return np.load(path, mmap_mode="r")
    need_space(Path(tempfile.gettempdir()), path.stat().st_size)
    with open(path, "rb") as far, tempfile.TemporaryFile() as near:
        shutil.copyfileobj(far, near, 1 << 24)
        near.seek(0)
        np.lib.format.read_magic(near)
        shape, _, dtype = np.lib.format.read_array_header_1_0(near)
        return np.memmap(near, dtype, "r", near.tell(), shape)


def _unfit(path: Path, about: Path, key: dict, count: int) -> str:
    """Why the file cannot be used, "none" where there is none, "" if it can."""
    if not path.exists() or not about.exists():
        return "none" if not path.exists() else "was never finished"
    try:
        kept = read_json(about)
        found = len(np.load(path, mmap_mode="r"))
        if found != count:
            return f"holds {found} embeddings where {count} are needed"
        if len(kept["mean"]) != CHANNELS or len(kept["std"]) != CHANNELS:
            return f"does not have the statistics of {CHANNELS} channels"
    except (InputError, KeyError, TypeError, ValueError, OSError):
        return "is damaged"
    differing = [name for name, value in key.items() if kept.get(name) != value]
    return f"is of another {' and '.join(differing)}" if differing else ""


def _compute(path: Path, count: int, compute: Callable[[range], Tensor], batch: int, progress: bool) -> tuple[np.ndarray, np.ndarray]:
    """Writes the file; mean and standard deviation of each channel."""
    sums, shape = np.zeros((2, CHANNELS)), ()
    with atomic(path) as temporary, open(temporary, "wb") as file:
        for first in tqdm(range(0, count, batch), "teacher's embeddings", disable=not progress, mininterval=5):
            values = compute(range(first, min(first + batch, count))).half().cpu().numpy()
            if not np.isfinite(values).all():
                raise InputError(f"the teacher's embeddings of items {first} and on are not finite in float16: its weights do not fit its input")
            if not shape:
                shape = (count, *values.shape[1:])
                need_space(path.parent, values.itemsize * math.prod(shape))
                np.lib.format.write_array_header_1_0(file, {"descr": values.dtype.str, "fortran_order": False, "shape": shape})
            file.write(np.ascontiguousarray(values))
            wide = values.astype(np.float64)
            sums += [(wide**power).sum((0, 2, 3)) for power in (1, 2)]
    places = math.prod(shape) / CHANNELS
    mean = sums[0] / places
    return mean, np.sqrt(np.maximum(sums[1] / places - mean**2, 1e-8))
