"""What scans are called: names of files, of cases, and of what a file is to a case."""

from __future__ import annotations

import re
from pathlib import Path

ROLES = ("flair", "t1", "mask", "ventricles")


def stem(path: str | Path) -> str:
    """The name of a NIfTI file without folder and ending."""
    return re.sub(r"(\.nii)?(\.gz)?$", "", Path(path).name, flags=re.IGNORECASE)


def clean(name: str) -> str:
    """`name` as a case may be called: letters, digits, _ and -."""
    return re.sub(r"[^\w-]+", "_", name).strip("_")


def natural(text: str) -> list:
    """A key that sorts numbers in names by their value: Utrecht_2 before Utrecht_10."""
    return [(len(part.lstrip("0")), part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text))]


def candidate(case: str, subject: str, site: str, session: str = "", group: str = "", **files: list[Path]) -> dict:
    """One scan as `layouts.candidates` gives it; `files`: those that may be it, by role."""
    return dict(case=case, subject=subject, session=session, site=clean(site), group=group,
                **{role: files.get(role, []) for role in ROLES})
