import errno
import hashlib
import io
import itertools
import json
import os
import random
import signal
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from wmhlib import storage
from wmhlib.checkpoints import Keeper
from wmhlib.errors import CheckpointError
from wmhlib.workspace import RunFolder, sha256, write_atomic

FAST = (0.001, 0.004)


def state(epoch: int) -> dict:
    return {"network": {"a.weight": torch.full((3, 5), float(epoch))}, "history": [{"epoch": epoch, "loss": 0.5}], "scaler": {}}


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


@pytest.fixture
def trouble(monkeypatch):
    return Trouble(monkeypatch)


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "drive" / "run")
    folder.path.mkdir(parents=True)
    return folder


@pytest.fixture
def new(run, tmp_path, monkeypatch):
    """Opens a Keeper of `run` whose `said` has its sentences; by way of a local folder, or direct."""
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))

    def open_keeper(direct=False, **more):
        said = []
        keeper = Keeper(run, None if direct else tmp_path / "local", backoff=FAST, patience=10, say=said.append, **more)
        keeper.said = said
        return keeper

    return open_keeper


@pytest.mark.parametrize("direct", [True, False])
def test_what_was_kept_comes_back_from_the_newest_with_its_manifest_and_nothing_else_is_left(new, run, direct):
    with new(direct) as keeper:
        assert keeper.newest(same) is None
        for epoch in (10, 20, 30):
            keeper.write(run.history_csv, f"epoch\n{epoch}\n".encode())
            keeper.checkpoint(epoch, state(epoch))
    assert names(run.path) == ["checkpoints", "history.csv"] and run.history_csv.read_text() == "epoch\n30\n"
    assert "epoch_0030.pt" in names(run.checkpoints) and len(names(run.checkpoints)) <= 4
    path = run.checkpoints / "epoch_0030.pt"
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "file": path.name, "format": 2, "epoch": 30, "bytes": path.stat().st_size, "sha256": sha256(path)}
    again = new(direct)
    found = again.newest(same)
    assert again.source == path and torch.equal(found["network"]["a.weight"], torch.full((3, 5), 30.0))
    assert found["history"] == state(30)["history"] and not keeper.local.exists() and not keeper.said and not again.said


def test_a_disk_of_this_machine_has_each_file_when_the_call_returns_and_needs_no_thread(new, run):
    keeper = new(direct=True)
    threads = threading.active_count()
    for epoch in (1, 2, 3):
        keeper.checkpoint(epoch, state(epoch))
        assert (run.checkpoints / f"epoch_{epoch:04d}.json").exists()
    assert names(run.checkpoints) == ["epoch_0002.json", "epoch_0002.pt", "epoch_0003.json", "epoch_0003.pt"]
    assert threading.active_count() == threads and not keeper.local.exists()


def test_later_changes_to_a_state_do_not_reach_its_file(new, trouble, run):
    keeper, mine = new(), state(1)
    trouble.begin("io", run.path)
    keeper.checkpoint(1, mine)
    mine["network"]["a.weight"].zero_()
    trouble.begin("")
    keeper.close()
    assert torch.equal(new().newest(same)["network"]["a.weight"], torch.ones(3, 5))


@pytest.mark.parametrize("kind", ["full", "io", "fsync", "flipped", "truncated", "read back", "rename lost"])
@pytest.mark.parametrize("direct", [True, False])
def test_a_run_folder_that_fails_is_tried_until_all_is_in_place_and_said_once(new, trouble, run, kind, direct):
    keeper = new(direct)
    keeper.checkpoint(10, state(10))
    until((run.checkpoints / "epoch_0010.json").exists)
    trouble.begin(kind, run.path)
    keeper.write(run.best, b"weights")
    for epoch in (20, 30):
        keeper.write(run.history_csv, b"%d" % epoch)
        keeper.checkpoint(epoch, state(epoch))
    assert (keeper.local / "checkpoints" / "epoch_0030.json").exists() and (keeper.local / "best.safetensors").exists()
    count = trouble.count
    until(lambda: trouble.count > count + 6)
    assert keeper.newest(same)["history"][0]["epoch"] == 30 and keeper.source.is_relative_to(keeper.local)
    trouble.begin("")
    keeper.close()
    assert run.best.read_bytes() == b"weights" and run.history_csv.read_bytes() == b"30" and not keeper.local.exists()
    assert names(run.checkpoints) == ["epoch_0010.json", "epoch_0010.pt", "epoch_0030.json", "epoch_0030.pt"]
    assert len(keeper.said) == 2 and "cannot be written now" in keeper.said[0] and "written again" in keeper.said[1]
    assert ("free space" in keeper.said[0]) == (kind == "full")


@pytest.mark.parametrize("kind", ["full", "fsync", "flipped", "truncated", "read back", "rename lost"])
def test_the_older_checkpoint_stays_until_the_newer_is_seen_in_place(new, trouble, run, kind):
    keeper = new(direct=True, keep=1)
    keeper.checkpoint(1, state(1))
    trouble.begin(kind, run.path, keeper.local)
    keeper.checkpoint(2, state(2))
    assert {"epoch_0001.pt", "epoch_0001.json"} <= set(names(run.checkpoints))
    assert storage.load_checkpoint(run.checkpoints / "epoch_0001.pt")["history"][0]["epoch"] == 1
    trouble.begin("")
    keeper.checkpoint(3, state(3))
    keeper.close()
    assert names(run.checkpoints) == ["epoch_0003.json", "epoch_0003.pt"]


@pytest.mark.parametrize("kind", ["full", "io", "fsync", "flipped", "truncated", "read back"])
def test_a_file_is_not_replaced_by_one_that_could_not_be_written(new, trouble, run, kind):
    keeper = new(direct=True)
    keeper.write(run.best, b"old")
    trouble.begin(kind, run.path)
    keeper.write(run.best, b"new")
    assert run.best.read_bytes() == b"old"
    trouble.begin("")
    keeper.close()
    assert run.best.read_bytes() == b"new" and names(run.path) == ["best.safetensors"]


def test_a_run_folder_that_vanishes_is_not_made_anew_in_its_place_and_gets_all_when_it_is_back(new, run):
    keeper = new()
    away = run.path.parent.parent / "away"
    run.path.parent.rename(away)
    for epoch in range(1, 6):
        keeper.checkpoint(epoch, state(epoch))
    until(lambda: keeper.said)
    keeper.write(run.history_csv, b"5")
    assert not run.path.parent.exists() and "No such file" in keeper.said[0]
    away.rename(run.path.parent)
    keeper.close()
    assert run.history_csv.read_bytes() == b"5" and new().newest(same)["history"][0]["epoch"] == 5


def test_a_slow_run_folder_holds_up_nobody_and_only_the_newest_version_of_a_file_waits(new, trouble, run):
    keeper = new()
    trouble.begin("slow", run.path)
    keeper.write(run.history_csv, b"0")
    until(lambda: trouble.count == 1)
    start = time.monotonic()
    for epoch in range(1, 30):
        keeper.write(run.history_csv, b"%d" % epoch)
    keeper.checkpoint(29, state(29))
    assert time.monotonic() - start < 5 and not run.history_csv.exists()
    with pytest.raises(CheckpointError, match="answers too slowly.*copies lie in .*history.csv"):
        keeper.close(0.01)
    trouble.free.set()
    until(lambda: run.history_csv.exists())
    until(no_delivery)
    assert trouble.count <= 5  # the first history.csv, the newest, a checkpoint and its manifest
    new().close()
    assert run.history_csv.read_bytes() == b"29" and new().newest(same)["history"][0]["epoch"] == 29


def test_a_checkpoint_never_arrives_before_the_files_written_before_it(new, trouble, run, monkeypatch):
    keeper, order = new(), []
    trouble.begin("io", run.path)
    keeper.checkpoint(1, state(1))
    until(lambda: trouble.count > 1)
    place = storage.place
    monkeypatch.setattr(storage, "place", lambda path, *more: (order.append(path.name) if path.is_relative_to(run.path) else None, place(path, *more)))
    trouble.begin("io", run.best)
    keeper.write(run.best, b"better")
    keeper.checkpoint(2, state(2))
    until(lambda: trouble.count > 0 or keeper.said[1:])
    trouble.begin("")
    keeper.close()
    last = len(order) - 1 - order[::-1].index("best.safetensors")
    assert order.index("epoch_0002.pt") > last


def test_a_full_local_disk_keeps_the_newest_in_memory_and_delivers_it_from_there(new, trouble, run):
    keeper = new()
    trouble.begin("full", run.path, keeper.local)
    for epoch in (1, 2, 3):
        keeper.write(run.best, b"%d" % epoch)
        keeper.checkpoint(epoch, state(epoch))
    assert sum("kept in memory" in text for text in keeper.said) == 1
    assert len(keeper._delivery._pending) == 2
    with pytest.raises(CheckpointError, match="no copy could be kept of best.safetensors, checkpoints/epoch_0003.pt: free space"):
        keeper.close(0.005)
    trouble.begin("full", keeper.local)
    keeper.write(run.history_csv, b"3")
    keeper.close()
    assert run.best.read_bytes() == b"3" and names(run.checkpoints) == ["epoch_0003.json", "epoch_0003.pt"]


def test_what_an_earlier_process_could_not_deliver_is_delivered_and_resumed(new, trouble, run):
    trouble.begin("io", run.path)
    with pytest.raises(CheckpointError, match="copies lie in"):
        keeper = new()
        keeper.write(run.best, b"weights")
        keeper.checkpoint(7, state(7))
        keeper.close(0.003)
    until(no_delivery)
    trouble.begin("")
    assert not run.best.exists()
    with new() as keeper:
        assert keeper.newest(same)["history"][0]["epoch"] == 7
    assert run.best.read_bytes() == b"weights" and names(run.checkpoints) == ["epoch_0007.json", "epoch_0007.pt"]


def test_a_checkpoint_whose_manifest_never_arrived_is_taken_from_the_local_folder(new, trouble, run):
    keeper = new()
    trouble.begin("io", run.path, only=".json")
    keeper.checkpoint(7, state(7))
    until((run.checkpoints / "epoch_0007.pt").exists)
    os.utime(run.checkpoints / "epoch_0007.pt", (time.time() + 60,) * 2)
    with pytest.raises(CheckpointError):
        keeper.close(0.003)
    until(no_delivery)
    trouble.begin("")
    with new() as keeper:
        assert keeper.newest(same)["history"][0]["epoch"] == 7
    assert names(run.checkpoints) == ["epoch_0007.json", "epoch_0007.pt"]


def test_a_local_copy_older_than_the_run_folders_is_not_delivered(new, trouble, run):
    trouble.begin("io", run.path)
    keeper = new()
    keeper.write(run.best, b"old")
    with pytest.raises(CheckpointError):
        keeper.close(0)
    until(no_delivery)
    trouble.begin("")
    write_atomic(run.best, b"new")
    os.utime(run.best, (time.time() + 60,) * 2)
    new().close()
    assert run.best.read_bytes() == b"new"


def test_a_damaged_local_copy_is_not_delivered_and_close_says_so(new, trouble, run):
    keeper = new()
    trouble.begin("io", run.path)
    keeper.write(run.best, b"weights")
    (keeper.local / "best.safetensors").write_bytes(b"weight?")
    with pytest.raises(CheckpointError, match="no copy could be kept of best.safetensors"):
        keeper.close()
    trouble.begin("")
    keeper.write(run.best, b"weights")
    keeper.close()
    assert run.best.read_bytes() == b"weights"


def damages(path: Path) -> dict:
    data = path.read_bytes()
    manifest = path.with_suffix(".json")
    return {
        "truncated": lambda: path.write_bytes(data[:-100]), "empty": lambda: path.write_bytes(b""),
        "flipped": lambda: path.write_bytes(data[:200] + bytes([data[200] ^ 4]) + data[201:]),
        "a folder": lambda: (path.unlink(), path.mkdir()), "a pipe": lambda: (path.unlink(), os.mkfifo(path)),
        "no manifest": lambda: manifest.unlink(), "manifest empty": lambda: manifest.write_bytes(b""),
        "manifest nested": lambda: manifest.write_text("[" * 60000), "manifest of another": lambda: manifest.write_text(
            manifest.read_text().replace('"epoch": 2', '"epoch": 1')), "manifest no dict": lambda: manifest.write_text("3"),
    }


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "a folder", "a pipe", "no manifest", "manifest empty", "manifest nested",
                                    "manifest of another", "manifest no dict"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(new, run, damage):
    keeper = new(direct=True)
    keeper.checkpoint(1, state(1))
    keeper.checkpoint(2, state(2))
    damages(run.checkpoints / "epoch_0002.pt")[damage]()
    keeper = new(direct=True)
    assert keeper.newest(same)["history"][0]["epoch"] == 1
    assert len(keeper.said) == 1 and "epoch_0002.pt is damaged or not ours and passed over" in keeper.said[0]


def test_damaged_checkpoints_do_not_count_as_generations(new, run):
    keeper = new(direct=True)
    for epoch in (1, 2):
        keeper.checkpoint(epoch, state(epoch))
    (run.checkpoints / "epoch_0002.pt").write_bytes(b"damaged")
    keeper = new(direct=True)
    keeper.newest(same)
    keeper.checkpoint(3, state(3))
    assert names(run.checkpoints) == ["epoch_0001.json", "epoch_0001.pt", "epoch_0003.json", "epoch_0003.pt"]


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_checkpoint_runs_no_code_even_with_a_manifest_that_fits(new, run, tmp_path, legacy):
    keeper, proof = new(direct=True), tmp_path / "it_ran"
    keeper.checkpoint(1, state(1))
    buffer = io.BytesIO()
    torch.save({"format": 2, "epoch": 2, "state": Payload(proof)}, buffer, _use_new_zipfile_serialization=not legacy)
    data = buffer.getvalue()
    storage.place_checkpoint(run.checkpoints / "epoch_0002.pt", data, hashlib.sha256(data).hexdigest())
    assert new(direct=True).newest(same)["history"][0]["epoch"] == 1 and not proof.exists()
    torch.load(io.BytesIO(data), weights_only=False)
    assert proof.exists()  # the payload was a real one


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_refused(run):
    run.checkpoints.mkdir()
    path = run.checkpoints / "epoch_0001.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(CheckpointError, match="damaged"):
        storage.load_checkpoint(path)


def test_where_no_checkpoint_can_be_read_training_does_not_start_anew(new, monkeypatch):
    keeper = new(direct=True)
    keeper.checkpoint(1, state(1))

    def broken(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(storage, "load_checkpoint", broken)
    with pytest.raises(CheckpointError, match="cannot be read"):
        keeper.newest(same)


def test_a_checkpoint_of_another_run_is_refused_and_one_that_is_not_ours_passed_over(new):
    keeper = new(direct=True)
    keeper.checkpoint(1, state(1))
    with pytest.raises(CheckpointError, match="epoch_0001.pt belongs to another recipe and split"):
        keeper.newest(lambda found: ["recipe", "split"])
    assert keeper.newest(lambda found: [found["origin"]]) is None and "KeyError('origin')" in keeper.said[0]


def test_reading_is_tried_again_and_a_folder_that_stays_unreadable_is_an_error_not_a_new_run(new, run, monkeypatch):
    keeper = new(direct=True)
    keeper.checkpoint(1, state(1))
    failures, listdir = itertools.count(), os.listdir

    def broken(folder):
        if next(failures) < limit:
            raise OSError(errno.EIO, "list")
        return listdir(folder)

    monkeypatch.setattr(storage.os, "listdir", broken)
    limit = 2
    assert keeper.newest(same)["history"][0]["epoch"] == 1 and len(keeper.said) == 2
    limit = 1000
    with pytest.raises(CheckpointError, match="checkpoints cannot be read"):
        keeper.newest(same)
    monkeypatch.undo()
    run.path.rename(run.path.parent / "elsewhere")
    with pytest.raises(CheckpointError, match="cannot be read"):
        keeper.newest(same)


def test_opening_sweeps_temporary_files_of_training_and_no_others(new, run):
    run.checkpoints.mkdir()
    ours = [run.checkpoints / ".0123abcd-epoch_0010.pt", run.checkpoints / ".0123abcd-epoch_0010.json", run.path / ".0123abcd-history.csv"]
    others = [run.path / ".0123abcd-search.csv", run.path / "recipe.json", run.checkpoints / "notes.txt", run.checkpoints / ".0123abcd-mine.pt"]
    for path in ours + others:
        path.write_bytes(b"x")
    new(direct=True)
    assert not any(path.exists() for path in ours) and all(path.exists() for path in others)


def test_an_error_in_training_is_not_hidden_by_what_could_not_be_written(new, trouble, run):
    with pytest.raises(KeyError):
        with new() as keeper:
            keeper.patience = 0.002
            trouble.begin("io", run.path)
            keeper.write(run.best, b"weights")
            raise KeyError
    assert "copies lie in" in keeper.said[-1]


def test_many_threads_may_write_at_once(new, run):
    with new() as keeper:
        def work(number):
            for version in range(8):
                keeper.write(run.path / f"{number}.csv", b"%d" % version)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [path.read_bytes() for path in sorted(run.path.glob("*.csv"))] == [b"7"] * 6


def test_twenty_kills_at_random_moments_lose_no_checkpoint_that_was_kept(new, run):
    moments, kept = random.Random(7), 0
    for _ in range(20):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                keeper = new(direct=True)
                found = keeper.newest(same)
                for epoch in itertools.count(found["history"][0]["epoch"] + 1 if found else 1):
                    os.write(writer, b".")
                    keeper.checkpoint(epoch, state(epoch))
            finally:
                os._exit(1)
        os.close(writer)
        told = kept - 1
        for _ in range(moments.randint(1, 4)):
            told += len(os.read(reader, 1))
        time.sleep(moments.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        with open(reader) as pipe:
            told += len(pipe.read())
        found = new(direct=True).newest(same)
        kept = found["history"][0]["epoch"] if found else 0
        assert told <= kept <= told + 1 and not list(run.path.rglob(".*"))
    new(direct=True).checkpoint(kept + 1, state(kept + 1))
    assert [name[6:-3] for name in names(run.checkpoints) if name.endswith(".pt")] == [f"{kept:04d}", f"{kept + 1:04d}"]


def test_waits_double_up_to_the_longest():
    assert list(itertools.islice(storage.waits(1, 10), 6)) == [1, 2, 4, 8, 10, 10]


def test_the_local_folder_belongs_to_the_run_its_recipe_and_its_split(tmp_path):
    run = RunFolder(tmp_path)
    folders = [storage.local_folder(run), storage.local_folder(RunFolder(tmp_path / "other"))]
    run.split_csv.write_text("case,split\n")
    folders.append(storage.local_folder(run))
    assert len(set(folders)) == 3 and storage.local_folder(run) == folders[-1]


def test_a_local_folder_of_another_user_is_neither_read_nor_written(new, trouble, run, monkeypatch):
    keeper = new()
    monkeypatch.setattr(storage.os, "getuid", lambda: -1)
    trouble.begin("io", run.path)
    keeper.checkpoint(1, state(1))
    assert "TMPDIR" in " ".join(keeper.said) and names(keeper.local) == []
    trouble.begin("")
    keeper.close()
    assert names(run.checkpoints) == ["epoch_0001.json", "epoch_0001.pt"]


def test_network_file_systems_are_told_from_disks_of_this_machine(tmp_path, monkeypatch):
    table = f"/dev/sda / ext4 rw 0 0\ndrive /content/drive fuse.drive rw 0 0\nserver:/x {tmp_path}/a\\040b nfs4 rw 0 0\n/dev/sdb {tmp_path}/usb fuseblk rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self: table)
    found = [storage.remote(Path(place)) for place in ("/content/drive/MyDrive/run", tmp_path / "a b" / "run", tmp_path / "usb", tmp_path, "/content/drivel")]
    assert found == [True, True, False, False, False]


def test_every_generator_goes_on_where_it_was():
    before = storage.random_states()
    draw = [random.random(), np.random.rand(), torch.rand(1).item()]
    buffer = io.BytesIO()
    torch.save(before, buffer)
    storage.restore_random_states(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    assert [random.random(), np.random.rand(), torch.rand(1).item()] == draw
