"""Zip files that write nowhere but their folder, and no more than they declare."""

from __future__ import annotations

import contextlib
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import InputError
from .fetch import length, need_space
from .files import atomic, disk_error

_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)  # RuntimeError: an unknown compression


def inside(folder: str | Path, name: str) -> Path:
    """The path of `name` ("/" between its parts) in `folder`. Raises InputError if it leads out of it, on any system."""
    root = Path(folder).resolve()
    target = root / name
    if re.search(r"^/|[\\:\x00-\x1f]", name) or ".." in name.split("/") or not target.resolve().is_relative_to(root):
        raise InputError(f"{name!r} leads outside {root}, or would on another system: the source is not what it says it is, "
                         "nothing was written")
    return target


def zip_loads(archive: Path) -> bool:
    """Whether every member of a zip file has its checksum."""
    try:
        with zipfile.ZipFile(archive) as content:
            return content.testzip() is None
    except _DAMAGE:
        return False


def extract(archive: str | Path, folder: str | Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, int]:
    """Unpacks the `wanted` members of a zip file into `folder` and gives their names and sizes (bytes).

    A member appears whole, with the archive's checksum, or not at all; one that is there already is kept. Raises InputError before
    anything is written if a member (wanted or not) leads outside `folder`, is a link or comes twice, or if the disk is too small for
    the sizes the archive declares; and if the archive is damaged or longer than it declares.
    """
    with _opened(archive) as content:
        targets = {}
        for info in content.infolist():
            target, kind = inside(folder, info.filename), info.external_attr >> 16
            if stat.S_IFMT(kind) not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
                raise InputError(f"{archive} holds a link or a locked member ({info.filename!r}): nothing was unpacked")
            if not info.is_dir() and targets.setdefault(str(target).casefold(), (target, info))[1] is not info:
                raise InputError(f"{archive} holds {info.filename!r} twice: nothing was unpacked")
        members = [(target, info) for target, info in targets.values() if wanted(info.filename)]
        missing = [(target, info) for target, info in members if not _unpacked(target, info)]
        need_space(folder, sum(info.file_size for _, info in missing))
        for target, info in missing:
            with content.open(info) as source, atomic(target) as temporary, open(temporary, "wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
                if file.tell() != info.file_size:
                    raise zipfile.BadZipFile(f"{info.filename!r} has another size than it declares")
    return {info.filename: info.file_size for _, info in members}


@contextlib.contextmanager
def _opened(archive: str | Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(archive) as content:
            yield content
    except InputError:
        raise
    except _DAMAGE as error:
        raise InputError(f"{archive} is damaged ({error}): delete it and run this again") from None
    except OSError as error:
        raise disk_error(archive, error) from None


def _unpacked(target: Path, info: zipfile.ZipInfo) -> bool:
    return length(target) == info.file_size and target.exists() and zlib.crc32(target.read_bytes()) == info.CRC
