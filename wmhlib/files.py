"""Files that are there as a whole or not at all, and the tables and objects in them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from .errors import InputError, WMHError

_MOST_COLUMNS = 5000
_TEXT_COLUMNS = ("case", "subject", "session", "site", "flair", "t1", "mask", "ventricles", "group", "split", "system", "kind", "zone", "scan", "status", "reason",
                 "page", "digest", "mask_digest", "warnings")


def disk_error(path: str | Path, error: OSError) -> InputError:
    """What a user is told of a file that cannot be read or written."""
    return InputError(f"{path} cannot be read or written ({error.strerror or error or type(error).__name__}): free space or name another folder, "
                      "then run this again; it goes on where it stopped")


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, ending in its name (so `.nii.gz` stays); at the end the file written there
    reaches the disk and takes the name `path`. After an error it is removed and `path` is as it was; the disk's own errors become InputError."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except WMHError:
        raise
    except OSError as error:
        raise disk_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_name(path: Path) -> Path:
    """A new name beside `path` for what is not yet whole, ending in its own."""
    return path.with_name(f".{uuid.uuid4().hex[:8]}-{path.name}")


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Writes the whole of `data` to `path` (text as UTF-8), or nothing."""
    with atomic(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """CSV with six significant digits: the same table gives the same bytes."""
    write_atomic(path, table_bytes(table))


def table_bytes(table: pd.DataFrame) -> bytes:
    """What `write_table` writes."""
    return table.to_csv(index=False, float_format="%.6g", lineterminator="\n").encode()


def read_table(path: str | Path) -> pd.DataFrame:
    """A table of `write_table`; names, paths and groups stay text ("" where empty). Raises InputError if it is no CSV."""
    try:
        with open(path, "rb") as file:
            if max((line.count(b",") for line in file), default=0) > _MOST_COLUMNS:  # pandas would take hours
                raise ValueError(f"more than {_MOST_COLUMNS} columns")
        table = pd.read_csv(path, dtype={name: str for name in _TEXT_COLUMNS}, keep_default_na=False, na_values=[""])
    except (ValueError, OverflowError, IsADirectoryError) as error:  # pandas' own errors and UnicodeDecodeError are ValueErrors
        raise InputError(f"{path} is not a CSV table ({error}): delete it and run the notebook that writes it") from None
    except OSError as error:
        raise disk_error(path, error) from error
    table = table.assign(**{name: table[name].fillna("") for name in _TEXT_COLUMNS if name in table})
    if any(table[name].str.contains("\0", regex=False).any() for name in _TEXT_COLUMNS if name in table):
        raise InputError(f"{path} holds a NUL: delete it and run the notebook that writes it")
    return table


def read_json(path: str | Path) -> dict:
    """The object that a JSON file holds. Raises InputError if it holds none."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): delete it and run the notebook that writes it") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds {type(content).__name__}: expected an object, written by a notebook")
    return content


def is_number(value) -> bool:
    """Whether what a JSON file holds is a finite number of a size that makes sense."""
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e9


def read_text(path: Path) -> str:
    """The content of a UTF-8 file. Raises InputError if it is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise InputError(f"{path} is not a text file ({error}): delete it and run the notebook that writes it") from None
    except OSError as error:
        raise disk_error(path, error) from error


def sha256(path: str | Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
