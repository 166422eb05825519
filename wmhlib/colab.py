"""Google Colab: Drive, secrets, the packages a session lacks; each call does nothing, or reads the environment alone, elsewhere."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .errors import InputError, WMHError
from .workspace import REPOSITORY, version

_DRIVE = Path("/content/drive")


def bootstrap() -> str:
    """The default folder for runs. In Colab it also mounts Drive, says if there is no GPU, lets other processes import the library, and
    installs the distributions of requirements.txt that are missing or too old; all others stay as they are, since a session that loses its
    own breaks."""
    if not _in_colab():
        return "runs"
    paths = [str(REPOSITORY), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # for the processes that the library starts: nothing is installed there
    missing = _missing((REPOSITORY / "requirements.txt").read_text())
    if missing:
        _install(missing)
    _say_without_gpu()
    return _mounted_drive()


def secret(name: str) -> str | None:
    """The secret `name` from the environment, else from Colab's secrets, else None; where it is the path of a file, the file's text
    (InputError where that cannot be read)."""
    value = os.environ.get(name)
    if not value and _in_colab():
        from google.colab import userdata
        with contextlib.suppress(Exception):  # absent, access not granted, or no page to ask: Colab has an error of its own for each
            value = userdata.get(name)
    if not value:
        return None
    file = Path(value.strip()).expanduser()
    try:
        there = file.exists()
    except OSError:  # too long for a name: the secret itself
        there = False
    try:
        return file.read_text().strip() if there else value.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name} names {file}, which is no text file ({type(error).__name__}): set it to the secret itself, or to a file that holds it") from None


def _in_colab() -> bool:
    try:
        return importlib.util.find_spec("google.colab") is not None
    except (ImportError, ValueError):
        return "google.colab" in sys.modules


def _missing(requirements: str) -> list[str]:
    lines = [line.split("#")[0].strip() for line in requirements.splitlines()]
    wanted = {line: Requirement(line) for line in lines if line}
    return [line for line, package in wanted.items() if package.name not in ("torch", "numpy")
            and not package.specifier.contains(version(package.name) or "0", prereleases=True)]


def _install(missing: list[str]) -> None:
    print(f"installing {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder:
        keep = Path(folder, "keep.txt")
        keep.write_text("".join(_installed({canonicalize_name(Requirement(line).name) for line in missing})))
        done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-c", str(keep), *missing], capture_output=True,
                              text=True)
    if done.returncode:
        raise WMHError(f"pip could not install {', '.join(missing)} beside what this session has: {done.stderr.strip()[-500:]}. "
                       "Choose Runtime > Disconnect and delete runtime, then run the notebook again")
    importlib.invalidate_caches()


def _installed(but: set[str]) -> list[str]:
    """A pip constraint for each distribution there is `but` some: what is installed later changes none of them."""
    versions = {}
    for found in importlib.metadata.distributions():
        versions.setdefault(canonicalize_name(found.metadata["Name"] or ""), found.version)
    return [f"{name}=={version}\n" for name, version in sorted(versions.items()) if name not in but and re.fullmatch(r"[\w.+!-]+", version or "")]


def _say_without_gpu() -> None:
    import torch  # not before the packages are there
    if not torch.cuda.device_count():  # asks no driver, so that processes can be forked later
        print("This runtime has no GPU, which is enough for small networks (presets demo, flair, vessels, stroke-demo, smoke). For the others choose Runtime > "
              "Change runtime type > T4 GPU or better, then run the notebook again.")


def _mounted_drive() -> str:
    from google.colab import drive
    try:
        if not os.path.ismount(_DRIVE):  # nor where a mount has died
            drive.mount(str(_DRIVE), force_remount=True)
        return str(_DRIVE / "MyDrive" / "wmh-lora")
    except Exception as error:
        print(f"Google Drive is not mounted ({error}): runs go to /content/wmh-lora-runs and vanish with this session. "
              "To keep them, run this cell again and allow access.")
        return "/content/wmh-lora-runs"
