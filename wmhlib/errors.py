"""The errors users meet. Each message names the file or setting, what was found, what was expected and what to do."""

from __future__ import annotations

import sys
from collections.abc import Iterable


class WMHError(Exception):
    """Base of every error this library raises on purpose."""


class InputError(WMHError, ValueError):
    """A scan, mask, table or folder that cannot be used as it is."""


class RecipeError(WMHError, ValueError):
    """A setting that is unknown or impossible, or a run folder that belongs to another recipe."""


class CheckpointError(WMHError, ValueError):
    """Weights that do not fit the model, or a file that is damaged."""


class MissingStepError(WMHError, FileNotFoundError):
    """A file that an earlier notebook writes is not there."""


def some(names: Iterable) -> str:
    """The first five of `names`, each once, and how many more there are, as messages list them."""
    names = list(dict.fromkeys(map(str, names)))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def listed(problems: list[str]) -> str:
    """The first ten problems, a line each, and how many more there are."""
    more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
    return "".join(f"\n  {line}" for line in problems[:10] + more)


def reason(error: Exception) -> str:
    """Why one of many could not be done, in a line: our own words, or another error with its name."""
    return str(error) if isinstance(error, WMHError) else f"{type(error).__name__}: {error}"


def told(error: WMHError) -> int:
    """Says on the terminal what stopped a command; its exit status."""
    print(f"error: {error}", file=sys.stderr)
    return 1
