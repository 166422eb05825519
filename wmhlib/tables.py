"""Tables of text that others wrote: CSV with commas, semicolons or tabs, and BIDS's TSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from .errors import InputError
from .files import disk_error


def table_rows(path: Path, delimiter: str = "") -> tuple[list[tuple[int, dict]], list[str]]:
    """The rows of the table at `path` with their line numbers, empty ones left out, and its columns in lower case. `delimiter`: the most
    frequent one of the first line unless given. Raises InputError for what is no such table."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = delimiter or max(",;\t", key=text.partition("\n")[0].count)
        quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL  # BIDS has no quotes in its tables
        reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, quoting=quoting, restval="")
        reader.fieldnames = columns = [name.strip().lower() for name in reader.fieldnames or []]
        rows = [(reader.line_num, {name: value.strip() if isinstance(value, str) else value for name, value in row.items()}) for row in reader]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}): save it as 'CSV UTF-8'") from None
    except OSError as error:
        raise disk_error(path, error) from error
    except csv.Error as error:
        raise InputError(f"{path} is not a table ({error}): save it as 'CSV UTF-8'") from None
    return [(line, row) for line, row in rows if any(row.values())], columns
