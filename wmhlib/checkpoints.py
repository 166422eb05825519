"""`Keeper`: what training leaves in the run folder, safe from a disk, a Drive or a process that fails at any moment.

A file is written under a temporary name, synced, read back and compared by sha256, renamed, and compared once more in place; a
checkpoint's manifest comes last (`storage`). A slow or vanished run folder does not hold up training (`delivery`).
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from . import storage
from .delivery import Delivery, Version
from .errors import CheckpointError
from .workspace import RunFolder


class Keeper:
    """Keeps the files of a training run. For the main process alone; others get the state from it.

        with Keeper(run) as keeper:
            state = keeper.newest(check)        # None in a new run
            keeper.claim()
            keeper.hold()                       # before each epoch's files: is the run still ours?
            keeper.write(run.best, data)        # whole or not at all; the newest version wins
            keeper.checkpoint(epoch, state)

    Neither `write` nor `checkpoint` raises OSError, nor waits for a run folder on a network. What cannot be written now is said
    once through `say` (print where None) and lies meanwhile in `local`, or in memory where that fails too, one version a file.
    A thread tries again after `backoff[0]` seconds, then twice as long each time up to `backoff[1]`. A checkpoint arrives only
    after the files written before it, so no run goes on from one that knows of better weights than are there.

    `local` is by default in the system's temporary folder, and used only for a run folder on a network or one that fails; if it
    is named, every file goes that way. What an earlier process of this run left there is delivered, and its temporary files
    are removed from both folders.
    """

    def __init__(self, run: RunFolder, local: str | Path | None = None, keep: int = 2, *, patience: float = 600.0,
                 backoff: tuple[float, float] = (1.0, 300.0), say: Callable[[str], None] | None = None):
        self.run, self.keep, self.patience, self.backoff = run, keep, patience, backoff
        self.local = Path(local) if local else storage.local_folder(run)
        self.source: Path | None = None  # the file that `newest` took
        self._say = say or (lambda text: print(text, flush=True))
        self._whole: set[Path] = set()  # checkpoints seen to be good
        self._token, self._held = secrets.token_bytes(8), False
        self._before: bytes | None = b""  # None: not known
        for folder in (run.path, self.local):
            storage.sweep(folder)
            storage.sweep(folder / run.checkpoints.name)
        direct = local is None and not storage.remote(run.path)
        self._delivery = Delivery(run.path, self.local, direct, backoff, self._say, self._prune)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Closes. After an error it waits 30 s at most, and says what is not in place rather than hide that error."""
        try:
            self.close(self.patience if error is None else min(self.patience, 30.0))
        except CheckpointError as undelivered:
            if error is None:
                raise
            self._say(str(undelivered))

    def write(self, path: Path, data: bytes) -> None:
        """Put `data` at `path`, directly in the run folder; a version still on its way is replaced."""
        self._delivery.send(Version(path.relative_to(self.run.path).as_posix(), hashlib.sha256(data).hexdigest(), data))

    def checkpoint(self, epoch: int, state: dict) -> None:
        """Keep `state` (tensors, numbers, text; tuples, lists and dicts of them) as checkpoints/epoch_<epoch>.pt and its manifest
        .json. Once both are in place, all but the `keep` newest whole ones up to this are removed. Later changes to `state` do
        not reach the file."""
        data, name = storage.pack(epoch, state), f"{self.run.checkpoints.name}/{storage.checkpoint_name(epoch)}"
        self._delivery.send(Version(name, hashlib.sha256(data).hexdigest(), data, epoch))

    def claim(self) -> None:
        """Makes the run that of this process: another that still trains it stops in its next `hold`."""
        try:  # may lie there until ours arrives
            self._before = self.run.session.read_bytes()
        except OSError as error:
            self._before = b"" if isinstance(error, FileNotFoundError) else None
        self.write(self.run.session, self._token)

    def hold(self) -> None:
        """CheckpointError where another process has claimed the run since, whose files would mix with those of this one."""
        with contextlib.suppress(OSError):  # a folder that is gone for a while tells nothing
            there = self.run.session.read_bytes() if self.run.session.exists() else b""
            ended = not there and self._held and any(self.run.path.iterdir())  # another claimed it and is done
            if self._before is None and not self._held:
                self._before = there
            self._held = there == self._token
            if ended or there not in (b"", self._token, self._before):
                self._delivery.abandon()
                raise CheckpointError(f"another session goes on with the training in {self.run.path}: this one stops and leaves it the folder. "
                                      "To train anew beside it, choose another run folder")

    def release(self) -> None:
        """Ends what `claim` began."""
        with contextlib.suppress(OSError):
            self.run.session.unlink()

    def newest(self, check: Callable[[dict], list[str]]) -> dict | None:
        """The state of the newest whole checkpoint, in the run folder or the local one; None where there is none.

        `check(state)` lists what differs from this run (["recipe", "split"]). A damaged file, or one where `check` raises, is
        named and passed over (`storage.load_checkpoint` says what is damaged). Raises CheckpointError where something differs,
        or the folder cannot be read.
        """
        folders = [self.run.checkpoints] + [self.local / self.run.checkpoints.name] * storage.own(self.local)
        found = [(epoch, folder == self.run.checkpoints, folder / storage.checkpoint_name(epoch))
                 for folder in folders for epoch in self._patiently(storage.epochs, folder)]
        unreadable = None
        for _, _, path in sorted(found, reverse=True):
            try:
                state = self._patiently(storage.load_checkpoint, path)
                differing = check(state)
            except Exception as error:  # `check` may meet anything in a file that is not ours
                if isinstance(error.__cause__, OSError):
                    unreadable = error
                self._say(f"checkpoint {path} is damaged or not ours and passed over: "
                          f"{error if isinstance(error, CheckpointError) else repr(error)}")
                continue
            if differing:
                raise CheckpointError(f"checkpoint {path} belongs to another {' and '.join(differing)}: choose another run folder, "
                                      "or delete checkpoints and weights of this one to train again")
            self.source = path
            self._whole.add(path)
            return state
        if unreadable:  # better no training than one that starts anew over what is there
            raise unreadable
        return None

    def close(self, patience: float | None = None) -> None:
        """Wait until all is in place, up to `patience` seconds. CheckpointError says what is not, and where its copy lies."""
        versions = self._delivery.close(self.patience if patience is None else patience)
        copies = [str(self.local / version.name) for version in versions if version.data is None]
        gone = sorted({version.name for version in versions if version.data is not None} | self._delivery.lost)
        if copies or gone:
            trouble = self._delivery.troubles.get(self.run.path, "it answers too slowly")
            raise CheckpointError(
                f"run folder {self.run.path} lacks files of this training ({trouble})"
                + (f"; copies lie in {', '.join(copies)}: run the training again on this machine once the folder can be written, "
                   "which delivers them" if copies else "")
                + (f"; no copy could be kept of {', '.join(gone)}: free space in the run folder or in {self.local.parent} and run "
                   "the training again, which goes on from the last checkpoint" if gone else ""))
        for folder in (self.local / self.run.checkpoints.name, self.local):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _prune(self, folder: Path, version: Version) -> None:
        """Remove older checkpoints than the one just placed, but the newest whole ones."""
        if not version.epoch:
            return
        folder, kept = (folder / version.name).parent, []
        self._whole.add(folder / storage.checkpoint_name(version.epoch))
        with contextlib.suppress(OSError, MemoryError):  # what cannot be removed now is removed after the next
            for epoch in storage.epochs(folder):
                if epoch <= version.epoch and len(kept) < self.keep and self._is_whole(folder / storage.checkpoint_name(epoch)):
                    kept.append(epoch)
            storage.remove_checkpoints(folder, version.epoch, kept)

    def _is_whole(self, path: Path) -> bool:
        if path not in self._whole:
            with contextlib.suppress(CheckpointError):
                storage.load_checkpoint(path)
                self._whole.add(path)
        return path in self._whole

    def _patiently(self, read: Callable, path: Path):
        """`read(path)`, tried three times more where the file system fails; then CheckpointError."""
        for delay in itertools.chain(itertools.islice(storage.waits(*self.backoff), 3), [None]):
            try:
                return read(path)
            except OSError as error:
                if delay is None:
                    raise CheckpointError(f"{path} cannot be read ({error})") from error
                self._say(f"{path} cannot be read now ({error}): it is tried again")
                time.sleep(delay)
