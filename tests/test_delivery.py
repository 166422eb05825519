import os
import threading
import time

import pytest
import torch
from keeping import names, no_delivery, same, state, until

from wmhlib import storage
from wmhlib.errors import CheckpointError
from wmhlib.files import write_atomic


def test_a_disk_of_this_machine_has_each_file_when_the_call_returns_and_needs_no_thread(new_keeper, run):
    keeper = new_keeper(direct=True)
    threads = threading.active_count()
    for epoch in (1, 2, 3):
        keeper.checkpoint(epoch, state(epoch))
        assert (run.checkpoints / f"epoch_{epoch:04d}.json").exists()
    assert names(run.checkpoints) == ["epoch_0002.json", "epoch_0002.pt", "epoch_0003.json", "epoch_0003.pt"]
    assert threading.active_count() == threads and not keeper.local.exists()


def test_later_changes_to_a_state_do_not_reach_its_file(new_keeper, trouble, run):
    keeper, mine = new_keeper(), state(1)
    trouble.begin("io", run.path)
    keeper.checkpoint(1, mine)
    mine["network"]["a.weight"].zero_()
    trouble.begin("")
    keeper.close()
    assert torch.equal(new_keeper().newest(same)["network"]["a.weight"], torch.ones(3, 5))


def test_what_waits_is_not_delivered_into_a_run_that_another_has_taken_over(new_keeper, trouble, run):
    with pytest.raises(CheckpointError, match="another session"), new_keeper() as keeper:
        keeper.claim()
        until(run.session.exists)
        keeper.hold()
        trouble.begin("io", run.path)
        keeper.write(run.history_csv, b"mine")
        run.session.write_bytes(b"another")
        threading.Timer(0.1, trouble.begin, [""]).start()
        keeper.hold()
    until(no_delivery)
    assert not run.history_csv.exists() and not any("lacks files" in text for text in keeper.said)


@pytest.mark.parametrize("kind", ["full", "io", "fsync", "flipped", "truncated", "read back", "rename lost"])
@pytest.mark.parametrize("direct", [True, False])
def test_a_run_folder_that_fails_is_tried_until_all_is_in_place_and_said_once(new_keeper, trouble, run, kind, direct):
    keeper = new_keeper(direct)
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
def test_the_older_checkpoint_stays_until_the_newer_is_seen_in_place(new_keeper, trouble, run, kind):
    keeper = new_keeper(direct=True, keep=1)
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
def test_a_file_is_not_replaced_by_one_that_could_not_be_written(new_keeper, trouble, run, kind):
    keeper = new_keeper(direct=True)
    keeper.write(run.best, b"old")
    trouble.begin(kind, run.path)
    keeper.write(run.best, b"new")
    assert run.best.read_bytes() == b"old"
    trouble.begin("")
    keeper.close()
    assert run.best.read_bytes() == b"new" and names(run.path) == ["best.safetensors"]


def test_a_run_folder_that_vanishes_is_not_made_anew_in_its_place_and_gets_all_when_it_is_back(new_keeper, run):
    keeper = new_keeper()
    away = run.path.parent.parent / "away"
    run.path.parent.rename(away)
    for epoch in range(1, 6):
        keeper.checkpoint(epoch, state(epoch))
    until(lambda: keeper.said)
    keeper.write(run.history_csv, b"5")
    assert not run.path.parent.exists() and "No such file" in keeper.said[0]
    away.rename(run.path.parent)
    keeper.close()
    assert run.history_csv.read_bytes() == b"5" and new_keeper().newest(same)["history"][0]["epoch"] == 5


def test_a_slow_run_folder_holds_up_nobody_and_only_the_newest_version_of_a_file_waits(new_keeper, trouble, run):
    keeper = new_keeper()
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
    new_keeper().close()
    assert run.history_csv.read_bytes() == b"29" and new_keeper().newest(same)["history"][0]["epoch"] == 29


def test_a_checkpoint_never_arrives_before_the_files_written_before_it(new_keeper, trouble, run, monkeypatch):
    keeper, order = new_keeper(), []
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


def test_a_full_local_disk_keeps_the_newest_in_memory_and_delivers_it_from_there(new_keeper, trouble, run):
    keeper = new_keeper()
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


def test_what_an_earlier_process_could_not_deliver_is_delivered_and_resumed(new_keeper, trouble, run):
    trouble.begin("io", run.path)
    with pytest.raises(CheckpointError, match="copies lie in"):
        keeper = new_keeper()
        keeper.write(run.best, b"weights")
        keeper.checkpoint(7, state(7))
        keeper.close(0.003)
    until(no_delivery)
    trouble.begin("")
    assert not run.best.exists()
    with new_keeper() as keeper:
        assert keeper.newest(same)["history"][0]["epoch"] == 7
    assert run.best.read_bytes() == b"weights" and names(run.checkpoints) == ["epoch_0007.json", "epoch_0007.pt"]


def test_a_checkpoint_whose_manifest_never_arrived_is_taken_from_the_local_folder(new_keeper, trouble, run):
    keeper = new_keeper()
    trouble.begin("io", run.path, only=".json")
    keeper.checkpoint(7, state(7))
    until((run.checkpoints / "epoch_0007.pt").exists)
    os.utime(run.checkpoints / "epoch_0007.pt", (time.time() + 60,) * 2)
    with pytest.raises(CheckpointError):
        keeper.close(0.003)
    until(no_delivery)
    trouble.begin("")
    with new_keeper() as keeper:
        assert keeper.newest(same)["history"][0]["epoch"] == 7
    assert names(run.checkpoints) == ["epoch_0007.json", "epoch_0007.pt"]


def test_a_local_copy_older_than_the_run_folders_is_not_delivered(new_keeper, trouble, run):
    trouble.begin("io", run.path)
    keeper = new_keeper()
    keeper.write(run.best, b"old")
    with pytest.raises(CheckpointError):
        keeper.close(0)
    until(no_delivery)
    trouble.begin("")
    write_atomic(run.best, b"new")
    os.utime(run.best, (time.time() + 60,) * 2)
    new_keeper().close()
    assert run.best.read_bytes() == b"new"


def test_a_damaged_local_copy_is_not_delivered_and_close_says_so(new_keeper, trouble, run):
    keeper = new_keeper()
    trouble.begin("io", run.path)
    keeper.write(run.best, b"weights")
    (keeper.local / "best.safetensors").write_bytes(b"weight?")
    with pytest.raises(CheckpointError, match="no copy could be kept of best.safetensors"):
        keeper.close()
    trouble.begin("")
    keeper.write(run.best, b"weights")
    keeper.close()
    assert run.best.read_bytes() == b"weights"


def test_an_error_in_training_is_not_hidden_by_what_could_not_be_written(new_keeper, trouble, run):
    with pytest.raises(KeyError):
        with new_keeper() as keeper:
            keeper.patience = 0.002
            trouble.begin("io", run.path)
            keeper.write(run.best, b"weights")
            raise KeyError
    assert "copies lie in" in keeper.said[-1]


def test_many_threads_may_write_at_once(new_keeper, run):
    with new_keeper() as keeper:
        def work(number):
            for version in range(8):
                keeper.write(run.path / f"{number}.csv", b"%d" % version)
        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [path.read_bytes() for path in sorted(run.path.glob("*.csv"))] == [b"7"] * 6


def test_a_local_folder_of_another_user_is_neither_read_nor_written(new_keeper, trouble, run, monkeypatch):
    keeper = new_keeper()
    monkeypatch.setattr(storage.os, "getuid", lambda: -1)
    trouble.begin("io", run.path)
    keeper.checkpoint(1, state(1))
    assert "TMPDIR" in " ".join(keeper.said) and names(keeper.local) == []
    trouble.begin("")
    keeper.close()
    assert names(run.checkpoints) == ["epoch_0001.json", "epoch_0001.pt"]
