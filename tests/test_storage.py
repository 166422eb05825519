import itertools
import zipfile
from pathlib import Path

import pytest

from wmhlib import storage
from wmhlib.errors import CheckpointError
from wmhlib.workspace import RunFolder


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_refused(run):
    run.checkpoints.mkdir()
    path = run.checkpoints / "epoch_0001.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(CheckpointError, match="damaged"):
        storage.load_checkpoint(path)


def test_waits_double_up_to_the_longest():
    assert list(itertools.islice(storage.waits(1, 10), 6)) == [1, 2, 4, 8, 10, 10]


def test_the_local_folder_belongs_to_the_run_its_recipe_and_its_split(tmp_path):
    run = RunFolder(tmp_path)
    folders = [storage.local_folder(run), storage.local_folder(RunFolder(tmp_path / "other"))]
    run.split_csv.write_text("case,split\n")
    folders.append(storage.local_folder(run))
    assert len(set(folders)) == 3 and storage.local_folder(run) == folders[-1]


def test_network_file_systems_are_told_from_disks_of_this_machine(tmp_path, monkeypatch):
    table = f"/dev/sda / ext4 rw 0 0\ndrive /content/drive fuse.drive rw 0 0\nserver:/x {tmp_path}/a\\040b nfs4 rw 0 0\n/dev/sdb {tmp_path}/usb fuseblk rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self: table)
    found = [storage.remote(Path(place)) for place in ("/content/drive/MyDrive/run", tmp_path / "a b" / "run", tmp_path / "usb", tmp_path, "/content/drivel")]
    assert found == [True, True, False, False, False]
