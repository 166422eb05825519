"""Files that are whole or not there, checkpoints that prove it, local folders: what `checkpoints.Keeper` stands on."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from .errors import CheckpointError
from .files import sha256, temporary_name
from .workspace import RunFolder

_FORMAT = 2
_CHECKPOINT = re.compile(r"epoch_(\d{4,9})\.(pt|json)")
_TEMPORARY = re.compile(r"\.[0-9a-f]{8}-(epoch_\d{4,9}\.(pt|json)|history\.csv|best\.safetensors|earlier\.csv|failed_batch\.safetensors|student\.safetensors|embeddings\.npy|\.session)")
_REMOTE = ("fuse.", "nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "beegfs", "gpfs")


def pack(epoch: int, state: dict) -> memoryview:
    """The bytes of a checkpoint file."""
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, "epoch": epoch, "state": state}, buffer)
    return buffer.getbuffer()


def load_checkpoint(path: Path) -> dict:
    """The state in a checkpoint file, on the CPU. Runs no code that the file may hold (`weights_only`).

    Raises CheckpointError where the file is damaged, is no checkpoint of this format, or has no manifest or another one; OSError
    if it cannot be read.
    """
    data, declared = _read(path), _declared(path)
    if declared is not None and declared != _manifest(path, data, hashlib.sha256(data).hexdigest()):
        raise CheckpointError(f"its manifest does not describe these {len(data):,} bytes")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if any(entry.compress_type for entry in entries) or sum(entry.file_size for entry in entries) > len(data):
                raise ValueError("compressed")  # torch.save never does, a small file that fills memory would
            if archive.testzip():
                raise ValueError("its checksums do not hold")
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except MemoryError:  # says nothing about the file
        raise
    except Exception as error:  # torch and zipfile raise a dozen types for a damaged file
        raise CheckpointError(f"it is damaged, or holds more than tensors, numbers and text ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"it holds a {type(content).__name__}, expected a dict")
    if content.get("format") != _FORMAT or not isinstance(content.get("state"), dict):
        raise CheckpointError(f"it is of format {content.get('format')!r}, expected {_FORMAT}")
    if declared is None:
        raise CheckpointError("it has no manifest: writing it was never finished")
    return content["state"]


def place_checkpoint(path: Path, data: bytes | memoryview, digest: str, written: int = 0) -> None:
    """`place` a checkpoint, then its manifest: bytes, sha256, epoch and format."""
    place(path, data, digest, written)
    manifest = json.dumps(_manifest(path, data, digest), indent=2).encode() + b"\n"
    place(path.with_suffix(".json"), manifest, hashlib.sha256(manifest).hexdigest())


def place(path: Path, data: bytes | memoryview, digest: str, written: int = 0) -> None:
    """Write `data`, whose sha256 is `digest`, to `path`, and see it there by reading it back from the disk; or OSError. Its
    time of change becomes `written` (ns), when the data were made and not when a slow folder got them."""
    temporary = temporary_name(path)
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if written:
            with contextlib.suppress(OSError):
                os.utime(temporary, ns=(written, written))
        _compare(temporary, digest)
        os.replace(temporary, path)
        _sync_folder(path.parent)
        _compare(path, digest)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def epochs(folder: Path) -> list[int]:
    """Epochs of the checkpoints in `folder`, newest first; none where there is no such folder."""
    return sorted((int(name[6:-3]) for name in _names(folder, _CHECKPOINT) if name.endswith(".pt")), reverse=True)


def checkpoint_name(epoch: int) -> str:
    return f"epoch_{epoch:04d}.pt"


def remove_checkpoints(folder: Path, before: int, keep: list[int]) -> None:
    """Remove those of epochs below `before` with their manifests, except those in `keep`."""
    for name in sorted(_names(folder, _CHECKPOINT), reverse=True):  # .pt before .json
        epoch = int(_CHECKPOINT.fullmatch(name)[1])
        if epoch < before and epoch not in keep:
            (folder / name).unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files of training that was killed."""
    with contextlib.suppress(OSError):
        for name in _names(folder, _TEMPORARY):
            (folder / name).unlink(missing_ok=True)


def local_folder(run: RunFolder) -> Path:
    """A folder in the system's temporary one, the same for each process of this user that trains this recipe and split there."""
    key = hashlib.sha256(os.path.realpath(run.path).encode())
    for path in (run.recipe_json, run.split_csv):
        key.update(path.read_bytes() if path.exists() else b"")
    user = os.getuid() if hasattr(os, "getuid") else ""
    return Path(tempfile.gettempdir(), f"wmhlib-{user}-{key.hexdigest()[:16]}")


def own(folder: Path) -> bool:
    """Whether `folder` is there and made by this user; another could plant a checkpoint in it."""
    try:
        return os.lstat(folder).st_uid == os.getuid() if hasattr(os, "getuid") else folder.is_dir()
    except FileNotFoundError:
        return False


def remote(path: Path) -> bool:
    """Whether `path` lies on a network file system, as far as Linux says."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return False
    place = Path(os.path.realpath(path))
    around = {str(folder) for folder in (place, *place.parents)}
    at = [(len(point), kind) for point, kind in mounts if point.replace("\\040", " ") in around]
    return max(at, default=(0, ""))[1].startswith(_REMOTE)


def waits(first: float, longest: float) -> Iterator[float]:
    """Seconds to wait after each failure: `first`, then twice as long each time, `longest` at most."""
    while True:
        yield min(first, longest)
        first = min(2 * first, longest)


def _manifest(path: Path, data: bytes | memoryview, digest: str) -> dict:
    return {"file": path.name, "format": _FORMAT, "epoch": int(path.stem[6:]), "bytes": len(data), "sha256": digest}


def _declared(path: Path) -> dict | None:
    try:
        return json.loads(_read(path.with_suffix(".json"), 1 << 16))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its manifest is damaged ({error})") from None


def _read(path: Path, limit: int | None = None) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
        raise CheckpointError(f"{path} is no file")
    with open(path, "rb") as file:
        return file.read(limit)


def _compare(path: Path, digest: str) -> None:
    if sha256(path) != digest:
        raise OSError(errno.EIO, "other bytes are read back than were written", str(path))


def _sync_folder(folder: Path) -> None:
    """Make a rename last, where the file system can do that for a folder."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(handle)


def _names(folder: Path, pattern: re.Pattern) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if pattern.fullmatch(name)]
    except FileNotFoundError:
        if not folder.parent.exists():
            raise
        return []
