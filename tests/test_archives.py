import io
import os
import stat
import types
import zipfile

import pytest

from wmhlib import archives, fetch
from wmhlib.errors import InputError


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def archive(tmp_path, *members, name="a.zip"):
    """A zip file of (name or ZipInfo, content)."""
    with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as content:
        for member, data in members:
            content.writestr(member, data)
    return tmp_path / name


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a/../evil", "C:/evil", "..\\evil", "a\\evil", "evil\n"])
def test_an_archive_writes_nowhere_but_its_folder(tmp_path, name):
    path = archive(tmp_path, ("good", b"good"), (name, b"evil"))
    with pytest.raises(InputError, match="leads outside"):
        archives.extract(path, tmp_path / "out", lambda name: name == "good")
    assert names(tmp_path) == ["a.zip"]


def test_an_archive_writes_through_no_link(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with pytest.raises(InputError, match="link or a locked member"):
        archives.extract(archive(tmp_path, (link, b"/tmp")), tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "out" / "site")
    with pytest.raises(InputError, match="leads outside"):
        archives.extract(archive(tmp_path, ("site/a", b"a")), tmp_path / "out")
    assert names(tmp_path / "elsewhere") == []


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("twin", ["a/wmh.nii", "A/WMH.nii", "a/./wmh.nii"])
def test_an_archive_names_a_file_once(tmp_path, twin):
    with pytest.raises(InputError, match="twice: nothing was unpacked"):
        archives.extract(archive(tmp_path, ("a/wmh.nii", b"1"), (twin, b"2")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_archive_larger_than_the_disk_is_refused(tmp_path, monkeypatch):
    path = archive(tmp_path, ("bomb", bytes(10 ** 6)))
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10 ** 6 - 1))
    with pytest.raises(InputError, match="needs 1000 kB"):
        archives.extract(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("declared", [10, 10 ** 6])
def test_an_archive_writes_no_other_size_than_it_declares(tmp_path, declared):
    path = archive(tmp_path, ("bomb", bytes(10 ** 5)))
    path.write_bytes(path.read_bytes().replace((10 ** 5).to_bytes(4, "little"), declared.to_bytes(4, "little")))
    with pytest.raises(InputError, match="a.zip is damaged"):
        archives.extract(path, tmp_path / "out")
    assert names(tmp_path / "out") == []


def test_a_damaged_member_is_not_kept_and_the_others_are(tmp_path):
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as content:
        content.writestr("good", b"good")
        content.writestr("bad", b"scan")
    (tmp_path / "a.zip").write_bytes(stored.getvalue().replace(b"scan", b"scam"))
    assert not archives.zip_loads(tmp_path / "a.zip")
    with pytest.raises(InputError, match="a.zip is damaged .*bad.*delete it"):
        archives.extract(tmp_path / "a.zip", tmp_path / "out")
    assert names(tmp_path / "out") == ["good"]


def test_a_cut_archive_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 cut")
    assert not archives.zip_loads(tmp_path / "a.zip")
    with pytest.raises(InputError, match="a.zip is damaged"):
        archives.extract(tmp_path / "a.zip", tmp_path / "out")


def test_only_what_is_wanted_and_not_there_is_unpacked(tmp_path):
    path = archive(tmp_path, ("s/", b""), ("s/a.nii", b"a"), ("s/b.nii", b"b"), ("s/c.txt", b"c"))
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.nii").write_bytes(b"a")
    os.utime(tmp_path / "s" / "a.nii", (1, 1))
    assert archives.extract(path, tmp_path, lambda name: name.endswith(".nii")) == {"s/a.nii": 1, "s/b.nii": 1}
    assert names(tmp_path / "s") == ["a.nii", "b.nii"] and (tmp_path / "s" / "a.nii").stat().st_mtime == 1
