"""Seeds that follow from names."""

from __future__ import annotations

import hashlib


def stable_seed(*parts) -> int:
    """A seed in 0 .. 2**31 - 1 from the text of `parts`: the same in every process and on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
