"""What the results of a scan were made of and with, as the sidecar of its mask keeps it, and whether they are still that."""

from __future__ import annotations

import functools
import gzip
import hashlib
import os
import zlib
from pathlib import Path

from . import __version__, bids
from .files import is_number, sha256
from .nifti import need_file
from .sections import Operating

OF_MASKS = tuple(Operating().point)  # of an operating point, what masks depend on
POINT = (*OF_MASKS, "unsure_above")  # and all that results do


@functools.cache
def source_sha256() -> str:
    """The sha256 of the library's own source, so that what other code has made is made anew."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(__file__).parent.rglob("*") if path.suffix in (".py", ".j2", ".css", ".js")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def made_with(engine) -> dict:
    """Version and source of the library, weights, precision, canvas and operating point of an engine; results made with the same ones are the same."""
    return {"version": __version__, "source_sha256": source_sha256(), "weights_sha256": engine.model.fingerprint(), "precision": engine.precision, "img_size": engine.img_size,
            "views": engine.recipe.operating.views, **{key: engine.point.get(key) for key in POINT}}


def made_of(scan: dict, engine) -> dict:
    """The sha256 of a scan's files, a T1 beside it only where the network has an input for that. Raises InputError where one is missing."""
    paths = {"flair": scan["flair"], "t1": scan.get("t1") if engine.recipe.inputs.t1_beside else ""}
    for path in filter(None, paths.values()):
        need_file(path)
    return {f"{role}_sha256": sha256(path) if path else "" for role, path in paths.items()}


def is_done(out: Path, name: str, sidecar: dict | None, flair: str, made_with: dict, kind: bids.Kind) -> bool:
    """Whether the results that `sidecar` describes are those of `flair`, made with `made_with`, and every file is whole."""
    folder = bids.paths(out, name, kind)["mask"].parent
    return (sidecar is not None and sidecar["FLAIR"] == flair and sidecar["MadeWith"] == made_with
            and all((folder / file).is_file() and sha256(folder / file) == digest for file, digest in sidecar["Files"].items()))


def is_edited(out: Path, name: str, sidecar: dict | None, kind: bids.Kind) -> bool:
    """Whether the mask that `sidecar` describes was changed by hand since, which would be lost if it were made anew; one that is damaged was not."""
    path = bids.paths(out, name, kind)["mask"]
    if sidecar is None or not path.is_file() or sidecar["Files"].get(path.name) in (None, sha256(path)):
        return False
    try:
        with gzip.open(path) as file:  # whose checksum holds
            while file.read(1 << 24):
                pass
    except (OSError, EOFError, zlib.error):
        return False
    return True


def done_before(out: Path, kind: bids.Kind) -> dict[str, dict]:
    """The sidecars of what was made in `out` before, by the scan's name, their FLAIR as an absolute path."""
    complete = {name: sidecar for name, sidecar in bids.read_sidecars(out, kind).items() if _is_complete(sidecar)}
    return {name: sidecar | {"FLAIR": os.path.normpath(bids.paths(out, name, kind)["mask"].parent / sidecar["FLAIR"])}
            for name, sidecar in complete.items()}


def _is_complete(sidecar: dict) -> bool:
    """Whether a sidecar holds what `derivatives` wrote into it, each of its kind."""
    kinds = {"FLAIR": str, "MadeWith": dict, "Result": dict, "Files": dict}
    if not all(isinstance(sidecar.get(key), kind) for key, kind in kinds.items()) or "\0" in sidecar["FLAIR"]:
        return False

    result, point = sidecar["Result"], [sidecar["MadeWith"].get(key) for key in POINT]
    return (type(result.get("lesions")) is int and all(is_number(result.get(key)) for key in ("lesions", "volume_ml", "uncertainty"))
            and type(result.get("unsure")) in (bool, type(None)) and all(type(value) in (bool, type(None)) or is_number(value) for value in point))
