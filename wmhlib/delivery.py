"""`Delivery`: brings files into a folder that may be slow, full or gone for a while, without holding up who writes them.

On a disk of this machine a file is in place when `send` returns. For a folder on a network file system (Google Drive in Colab,
NFS), or one that fails, it is copied to a local folder, and a thread delivers it from there for as long as it takes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import storage
from .files import sha256


@dataclass(eq=False)
class Version:
    """One version of a file on its way; of several of one `slot` only the newest is delivered."""

    name: str  # its path in the folder
    sha256: str
    data: bytes | memoryview | None  # None once it lies in the local folder
    epoch: int = 0  # of a checkpoint
    time: int = field(default_factory=time.time_ns)

    slot = property(lambda self: "checkpoint" if self.epoch else self.name)

    def place(self, folder: Path, data: bytes | memoryview) -> None:
        """Write `data`, the version's content, to its place in `folder`; OSError where that fails."""
        path = folder / self.name
        if path.parent != folder:  # never make `folder`: where a Drive was mounted it would be a local one, and hide the Drive
            path.parent.mkdir(exist_ok=True)
        (storage.place_checkpoint if self.epoch else storage.place)(path, data, self.sha256, self.time)


class Delivery:
    """Delivers to `folder`, at once if `direct`, by way of `local` if not or if that fails, or of memory where that fails too.

    A checkpoint goes only when every file sent before it is in place, or lost. `placed(folder, version)` is called after each success, in
    the thread that had it; trouble is said once through `say` when it begins and when it is over, and the file is tried again
    after `backoff[0]` seconds, then twice as long each time up to `backoff[1]`. What an earlier process left in `local` is
    delivered first.
    """

    def __init__(self, folder: Path, local: Path, direct: bool, backoff: tuple[float, float], say: Callable[[str], None],
                 placed: Callable[[Path, Version], None]):
        self.folder, self.local, self.direct, self.backoff = folder, local, direct, backoff
        self.troubles: dict[Path, Exception] = {}
        self.lost: set[str] = set()  # files with no copy left
        self._say, self._placed = say, placed
        self._change = threading.Condition()  # guards what follows, and the local folder
        self._delivering, self._saying = threading.Lock(), threading.Lock()
        self._pending: dict[str, Version] = {}
        self._said: set[tuple[Path, int | None]] = set()
        self._thread: threading.Thread | None = None
        self._hurry = self._closing = self._abandoned = False
        self._adopt()

    def send(self, version: Version) -> None:
        """Bring `version` into the folder, now or as soon as it can be; nothing is raised for a folder that fails."""
        with self._change:
            self._closing = self._abandoned = False
            self._pending[version.slot] = version
            self.lost.discard(version.name)
        if self.direct and self._delivering.acquire(blocking=False):
            try:
                self._round()
            finally:
                self._delivering.release()
        with self._change:
            self._keep()
            self._wake()

    def close(self, patience: float) -> list[Version]:
        """What is not in place after at most `patience` seconds; it is not tried any more."""
        with self._change:
            self._closing = self._hurry = True
            self._wake()
            self._change.wait_for(lambda: not self._pending and self._thread is None, patience)
            self._abandoned = True
            self._change.notify_all()
            return list(self._pending.values())

    def abandon(self) -> None:
        """Deliver nothing of what waits."""
        with self._change:
            self._pending.clear()
            self._abandoned = True
            self._change.notify_all()

    def _keep(self) -> None:
        try:
            for version in sorted(self._pending.values(), key=lambda version: version.epoch):
                if version.data is not None:
                    self.local.mkdir(mode=0o700, parents=True, exist_ok=True)
                    if not storage.own(self.local):
                        raise PermissionError(errno.EPERM, "another user made it, set TMPDIR to your own", str(self.local))
                    version.place(self.local, version.data)
                    version.data = None
                    self._placed(self.local, version)
        except OSError as error:
            self._trouble(self.local, error, "what the run folder lacks is kept in memory, and lost if the process ends")
        else:
            self._over(self.local)

    def _wake(self) -> None:
        if self._pending and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="delivery", daemon=True)
            self._thread.start()
        self._change.notify_all()

    def _work(self) -> None:
        delays = storage.waits(*self.backoff)
        while True:
            with self._change:
                self._change.wait_for(lambda: self._pending or self._closing or self._abandoned)
                if self._abandoned or not self._pending:
                    self._thread = None
                    self._change.notify_all()
                    return
            with self._delivering:
                whole = self._round()
            with self._change:
                if whole or self._hurry:
                    delays, self._hurry = storage.waits(*self.backoff), False
                if not whole:
                    self._change.wait_for(lambda: self._hurry or self._abandoned, next(delays))

    def _round(self) -> bool:
        """Try each pending file once; whether all went well."""
        failed: set[str] = set()
        while found := self._next(failed):
            version, data = found
            try:
                version.place(self.folder, data)
                self._placed(self.folder, version)
            except (OSError, MemoryError) as error:
                failed.add(version.slot)
                self._trouble(self.folder, error, "training goes on, and it is tried again")
            else:
                self._delivered(version)
        if not failed and not self._abandoned and self._over(self.folder):
            self._say(f"{self.folder} can be written again: everything is in place")
        return not failed

    def _next(self, failed: set[str]) -> tuple[Version, bytes | memoryview] | None:
        with self._change:
            if self._abandoned:
                return None
            files = [version for version in self._pending.values() if not version.epoch]
            for version in [version for version in files or self._pending.values() if version.slot not in failed]:
                if version.data is not None:
                    return version, version.data
                with contextlib.suppress(OSError):
                    data = (self.local / version.name).read_bytes()
                    if hashlib.sha256(data).hexdigest() == version.sha256:
                        return version, data
                del self._pending[version.slot]
                self.lost.add(version.name)
                self._say(f"{self.local / version.name} was damaged or removed before it reached the run folder")
            self._change.notify_all()
            return None

    def _delivered(self, version: Version) -> None:
        with self._change, contextlib.suppress(OSError):
            if self._abandoned:  # the local folder may be another's by now
                return
            if self._pending.get(version.slot) is version:
                del self._pending[version.slot]
                self._change.notify_all()
                (self.local / version.name).unlink(missing_ok=True)
            if version.epoch:
                storage.remove_checkpoints((self.local / version.name).parent, version.epoch + 1, [])

    def _adopt(self) -> None:
        if not storage.own(self.local):
            return
        found = [(path.relative_to(self.local).as_posix(), 0) for path in sorted(self.local.iterdir())
                 if path.is_file() and not path.name.startswith(".")]
        for folder in sorted(path for path in self.local.iterdir() if path.is_dir()):
            found += [(f"{folder.name}/{storage.checkpoint_name(epoch)}", epoch) for epoch in storage.epochs(folder)[:1]]
        for name, epoch in found:
            here, there = self.local / name, self.folder / name
            if not epoch and os.path.exists(there) and os.path.getmtime(there) > os.path.getmtime(here):
                here.unlink()  # another machine went on meanwhile
            else:
                version = Version(name, sha256(here), None, epoch, os.stat(here).st_mtime_ns)
                self._pending[version.slot] = version
        with self._change:
            self._wake()

    def _trouble(self, folder: Path, error: Exception, then: str) -> None:
        number = getattr(error, "errno", None)
        with self._saying:
            new = (folder, number) not in self._said
            self._said.add((folder, number))
            self.troubles[folder] = error
        if new:
            advice = ", free space there" if number in (errno.ENOSPC, errno.EDQUOT) else ""
            self._say(f"{folder} cannot be written now ({error}){advice}: {then}")

    def _over(self, folder: Path) -> bool:
        with self._saying:
            self._said = {said for said in self._said if said[0] != folder}
            return self.troubles.pop(folder, None) is not None
