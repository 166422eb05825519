"""Keepers of run folders for the tests, and a file system that fails."""

import errno
import os
import threading
import time
from pathlib import Path

import torch

from wmhlib import storage
from wmhlib.checkpoints import Keeper
from wmhlib.workspace import RunFolder


def state(epoch: int) -> dict:
    return {"network": {"a.weight": torch.full((3, 5), float(epoch))}, "history": [{"epoch": epoch, "loss": 0.5}], "scaler": {}}


def keeper_of(run: RunFolder, local: Path | None = None, **more) -> Keeper:
    """A Keeper of `run` that tries again soon, and whose `said` has its sentences."""
    said = []
    keeper = Keeper(run, local, backoff=(0.001, 0.004), patience=10, say=said.append, **more)
    keeper.said = said
    return keeper


def same(_: dict) -> list[str]:
    return []


def until(holds) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.001)


def no_delivery() -> bool:
    """A keeper that was closed in vain may still be at work in the folder, which another process's would not be."""
    return not any(thread.name == "delivery" for thread in threading.enumerate())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Trouble:
    """A file system that fails below `folder` in the way `kind` says, for as long as it is set."""

    def __init__(self, monkeypatch):
        self.kind, self.folders, self.only, self.count, self.free = "", (), "", 0, threading.Event()
        replace, fsync, digest = os.replace, os.fsync, storage.sha256

        def broken_open(path, mode="r"):
            kind = mode == "xb" and self.here(path, "full", "io", "slow")
            if kind == "slow":
                self.free.wait(10)
            elif kind:
                Path(path).write_bytes(b"half")
                raise OSError(errno.ENOSPC if kind == "full" else errno.EIO, kind)
            return open(path, mode)

        def broken_fsync(handle):
            path = os.readlink(f"/proc/self/fd/{handle}")
            kind = os.path.isfile(path) and self.here(path, "fsync", "flipped", "truncated")
            if kind == "fsync":
                raise OSError(errno.EIO, kind)
            if kind:
                data = Path(path).read_bytes()
                Path(path).write_bytes(data[: len(data) // 2] if kind == "truncated" else bytes([data[0] ^ 1]) + data[1:])
            fsync(handle)

        def broken_replace(source, target):
            if self.here(target, "rename lost"):
                os.unlink(source)
            else:
                replace(source, target)

        def broken_digest(path):
            if self.here(path, "read back"):
                raise OSError(errno.EIO, "read")
            return digest(path)

        monkeypatch.setattr(storage, "open", broken_open, raising=False)
        monkeypatch.setattr(storage, "sha256", broken_digest)
        monkeypatch.setattr(storage.os, "fsync", broken_fsync)
        monkeypatch.setattr(storage.os, "replace", broken_replace)

    def here(self, path, *kinds) -> str:
        kind = self.kind
        hit = kind in kinds and str(path).endswith(self.only) and any(Path(path).is_relative_to(folder) for folder in self.folders)
        self.count += hit
        return kind if hit else ""

    def begin(self, kind: str, *folders: Path, only: str = "") -> None:
        self.kind, self.folders, self.only, self.count = "", folders, only, 0
        self.kind = kind
