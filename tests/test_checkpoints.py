import errno
import hashlib
import io
import itertools
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from hostile import Payload
from keeping import names, same, state

from wmhlib import storage
from wmhlib.errors import CheckpointError
from wmhlib.files import sha256


@pytest.mark.parametrize("direct", [True, False])
def test_what_was_kept_comes_back_from_the_newest_with_its_manifest_and_nothing_else_is_left(new_keeper, run, direct):
    with new_keeper(direct) as keeper:
        assert keeper.newest(same) is None
        for epoch in (10, 20, 30):
            keeper.write(run.history_csv, f"epoch\n{epoch}\n".encode())
            keeper.checkpoint(epoch, state(epoch))
    assert names(run.path) == ["checkpoints", "history.csv"] and run.history_csv.read_text() == "epoch\n30\n"
    assert "epoch_0030.pt" in names(run.checkpoints) and len(names(run.checkpoints)) <= 4
    path = run.checkpoints / "epoch_0030.pt"
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "file": path.name, "format": 2, "epoch": 30, "bytes": path.stat().st_size, "sha256": sha256(path)}
    again = new_keeper(direct)
    found = again.newest(same)
    assert again.source == path and torch.equal(found["network"]["a.weight"], torch.full((3, 5), 30.0))
    assert found["history"] == state(30)["history"] and not keeper.local.exists() and not keeper.said and not again.said


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
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(new_keeper, run, damage):
    keeper = new_keeper(direct=True)
    keeper.checkpoint(1, state(1))
    keeper.checkpoint(2, state(2))
    damages(run.checkpoints / "epoch_0002.pt")[damage]()
    keeper = new_keeper(direct=True)
    assert keeper.newest(same)["history"][0]["epoch"] == 1
    assert len(keeper.said) == 1 and "epoch_0002.pt is damaged or not ours and passed over" in keeper.said[0]


def test_damaged_checkpoints_do_not_count_as_generations(new_keeper, run):
    keeper = new_keeper(direct=True)
    for epoch in (1, 2):
        keeper.checkpoint(epoch, state(epoch))
    (run.checkpoints / "epoch_0002.pt").write_bytes(b"damaged")
    keeper = new_keeper(direct=True)
    keeper.newest(same)
    keeper.checkpoint(3, state(3))
    assert names(run.checkpoints) == ["epoch_0001.json", "epoch_0001.pt", "epoch_0003.json", "epoch_0003.pt"]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_checkpoint_runs_no_code_even_with_a_manifest_that_fits(new_keeper, run, tmp_path, legacy):
    keeper, proof = new_keeper(direct=True), tmp_path / "it_ran"
    keeper.checkpoint(1, state(1))
    buffer = io.BytesIO()
    torch.save({"format": 2, "epoch": 2, "state": Payload(proof)}, buffer, _use_new_zipfile_serialization=not legacy)
    data = buffer.getvalue()
    storage.place_checkpoint(run.checkpoints / "epoch_0002.pt", data, hashlib.sha256(data).hexdigest())
    assert new_keeper(direct=True).newest(same)["history"][0]["epoch"] == 1 and not proof.exists()
    torch.load(io.BytesIO(data), weights_only=False)
    assert proof.exists()  # the payload was a real one


def test_where_no_checkpoint_can_be_read_training_does_not_start_anew(new_keeper, monkeypatch):
    keeper = new_keeper(direct=True)
    keeper.checkpoint(1, state(1))

    def broken(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(storage, "load_checkpoint", broken)
    with pytest.raises(CheckpointError, match="cannot be read"):
        keeper.newest(same)


def test_a_checkpoint_of_another_run_is_refused_and_one_that_is_not_ours_passed_over(new_keeper):
    keeper = new_keeper(direct=True)
    keeper.checkpoint(1, state(1))
    with pytest.raises(CheckpointError, match="epoch_0001.pt belongs to another recipe and split"):
        keeper.newest(lambda found: ["recipe", "split"])
    assert keeper.newest(lambda found: [found["origin"]]) is None and "KeyError('origin')" in keeper.said[0]


def test_reading_is_tried_again_and_a_folder_that_stays_unreadable_is_an_error_not_a_new_run(new_keeper, run, monkeypatch):
    keeper = new_keeper(direct=True)
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


def test_opening_sweeps_temporary_files_of_training_and_no_others(new_keeper, run):
    run.checkpoints.mkdir()
    ours = [run.checkpoints / ".0123abcd-epoch_0010.pt", run.checkpoints / ".0123abcd-epoch_0010.json", run.path / ".0123abcd-history.csv"]
    others = [run.path / ".0123abcd-search.csv", run.path / "recipe.json", run.checkpoints / "notes.txt", run.checkpoints / ".0123abcd-mine.pt"]
    for path in ours + others:
        path.write_bytes(b"x")
    new_keeper(direct=True)
    assert not any(path.exists() for path in ours) and all(path.exists() for path in others)


def test_twenty_kills_at_random_moments_lose_no_checkpoint_that_was_kept(new_keeper, run):
    moments, kept = random.Random(7), 0
    for _ in range(20):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                keeper = new_keeper(direct=True)
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
        found = new_keeper(direct=True).newest(same)
        kept = found["history"][0]["epoch"] if found else 0
        assert told <= kept <= told + 1 and not list(run.path.rglob(".*"))
    new_keeper(direct=True).checkpoint(kept + 1, state(kept + 1))
    assert [name[6:-3] for name in names(run.checkpoints) if name.endswith(".pt")] == [f"{kept:04d}", f"{kept + 1:04d}"]
