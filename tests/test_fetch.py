import hashlib
import socket
import traceback
import types
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from service import Service

from wmhlib import archives, fetch
from wmhlib.errors import InputError

BODY = bytes(range(256)) * 40
MD5 = f"md5:{hashlib.md5(BODY).hexdigest()}"


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "_CHUNK", 100)
    with Service() as service:
        service.pages["/file"] = BODY
        yield service


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The seconds a retrieval would have slept."""
    waits = []
    monkeypatch.setattr(fetch, "sleep", waits.append)
    return waits


def get(service, target, known_hash=MD5, path="/file", **more):
    return fetch.retrieve(fetch.Session().ask(service.url + path), target, known_hash, **more)


def names(folder):
    return sorted(path.name for path in folder.rglob("*"))


def test_a_file_is_fetched_once(service, tmp_path):
    for _ in range(2):
        assert get(service, tmp_path / "a" / "file").read_bytes() == BODY
    assert service.times("/file") == [None] and names(tmp_path / "a") == ["file"]


def test_a_cut_connection_goes_on_where_it_stopped(service, tmp_path, waits):
    service.plans["/file"] = [("cut", 1000), ("cut", 500)]
    assert get(service, tmp_path / "file").read_bytes() == BODY
    assert service.times("/file") == [None, "bytes=1000-", "bytes=1500-"] and waits == [2, 2]


def test_the_next_call_goes_on_where_the_last_one_stopped(service, tmp_path):
    service.plans["/file"] = [("cut", 1000)] + [("cut", 0)] * (fetch.TRIES - 1)
    with pytest.raises(InputError, match="file: the connection was cut: check the connection.*goes on where it stopped"):
        get(service, tmp_path / "file")
    assert not (tmp_path / "file").exists() and service.times("/file")[1:] == ["bytes=1000-"] * (fetch.TRIES - 1)
    assert get(service, tmp_path / "file").read_bytes() == BODY
    assert service.times("/file")[-1] == "bytes=1000-" and names(tmp_path) == ["file"]


def test_a_service_without_ranges_sends_all_again(service, tmp_path):
    service.ranges = False
    service.plans["/file"] = [("cut", 1000)]
    assert get(service, tmp_path / "file").read_bytes() == BODY


def test_another_range_than_the_one_asked_for_is_not_appended(service, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    service.plans["/file"] = [("status", 206, {"Content-Range": f"bytes 0-{len(BODY) - 1}/{len(BODY)}"})]
    assert get(service, tmp_path / "file").read_bytes() == BODY
    assert service.times("/file") == ["bytes=1000-", None]


@pytest.mark.parametrize("there", [BODY, BODY + b"more"])
def test_a_part_that_is_complete_or_too_long_is_no_trap(service, tmp_path, there):
    (tmp_path / "file.part").write_bytes(there)
    assert get(service, tmp_path / "file").read_bytes() == BODY
    assert len(service.asked) == (1 if there == BODY else 2)


def test_a_service_that_sends_less_than_asked_for_is_asked_again(service, tmp_path):
    service.plans["/file"] = [("cut", 1000), ("some", 500)]
    assert get(service, tmp_path / "file").read_bytes() == BODY
    assert service.times("/file") == [None, "bytes=1000-", "bytes=1500-"]


def test_a_part_of_another_file_is_fetched_anew_once(service, tmp_path, capsys):
    (tmp_path / "file.part").write_bytes(b"old" * 100)
    assert get(service, tmp_path / "file").read_bytes() == BODY
    assert service.times("/file") == ["bytes=300-", None] and "starting anew" in capsys.readouterr().out


def test_a_wrong_checksum_is_not_kept(service, tmp_path):
    with pytest.raises(InputError, match="file arrived damaged .its checksum is not md5:00"):
        get(service, tmp_path / "file", "md5:" + "0" * 32)
    assert names(tmp_path) == [] and len(service.times("/file")) == 1


@pytest.mark.parametrize("if_range", [True, False])
def test_without_a_checksum_only_the_same_file_is_continued(service, tmp_path, if_range):
    service.if_range = if_range
    service.plans["/file"] = [("cut", 1000)] + [("cut", 0)] * fetch.TRIES
    with pytest.raises(InputError):
        get(service, tmp_path / "file", None)
    service.pages["/file"] = BODY[::-1]
    service.plans.clear()
    assert get(service, tmp_path / "file", None).read_bytes() == BODY[::-1]
    assert service.asked[fetch.TRIES][1]["if-range"] == f'"{MD5[4:]}"'


def test_without_a_checksum_a_part_of_unknown_origin_is_not_continued(service, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    assert get(service, tmp_path / "file", None).read_bytes() == BODY and service.times("/file") == [None]


def test_what_does_not_load_is_not_kept(service, tmp_path):
    with pytest.raises(InputError, match="file arrived damaged .it does not load"):
        get(service, tmp_path / "file", None, loads=archives.zip_loads)
    assert names(tmp_path) == []


@pytest.mark.parametrize("status, step", [(401, "sign in"), (403, "accept its terms"), (404, "my own step")])
def test_a_refusal_says_what_to_do_and_is_final(service, tmp_path, status, step):
    service.plans["/file"] = [("status", status)]
    with pytest.raises(InputError, match=f"file: the service answered {status} .*{step}"):
        get(service, tmp_path / "file", steps={404: "my own step"})
    assert len(service.asked) == 1 and names(tmp_path) == []


def test_too_many_requests_waits_as_long_as_it_is_told(service, tmp_path, waits):
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    service.plans["/file"] = [("status", 429, {"Retry-After": "7"}), ("status", 429, {"Retry-After": soon}), ("status", 429)]
    assert get(service, tmp_path / "file").read_bytes() == BODY
    assert waits[0] == 7 and 25 < waits[1] <= 30 and waits[2] == 8


@pytest.mark.parametrize("plan, told, tries", [
    (("status", 429), "429 .Too Many Requests.: too many requests: wait a while", fetch.TRIES),
    (("status", 429, {"Retry-After": "3600"}), "asks to wait 60 min", 1),
    (("status", 503), "503 .Service Unavailable.: the service is in trouble", fetch.TRIES)])
def test_waiting_has_an_end(service, tmp_path, plan, told, tries):
    service.plans["/file"] = [plan] * 10
    with pytest.raises(InputError, match=told):
        get(service, tmp_path / "file")
    assert len(service.asked) == tries


def test_a_silent_service_is_given_up(service, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.05)
    monkeypatch.setattr(fetch, "TRIES", 2)
    service.plans["/file"] = [("wait", 0.2)] * 2
    with pytest.raises(InputError, match="no answer within 0.05 s: check the connection"):
        get(service, tmp_path / "file")


def test_an_unknown_host_is_named_as_such(tmp_path, monkeypatch):
    def unknown(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(InputError, match="name could not be resolved .DNS.: check the connection"):
        get(types.SimpleNamespace(url="http://data.example"), tmp_path / "file")


def test_a_full_disk_is_refused_before_anything_is_written(service, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10000))
    with pytest.raises(InputError, match=r"needs 10 kB and its disk has 10 kB free: free 0 kB"):
        get(service, tmp_path / "file")
    assert names(tmp_path) == []


def test_a_disk_that_fills_up_on_the_way_is_named(service, tmp_path):
    (tmp_path / "file.part").mkdir()
    with pytest.raises(InputError, match="file cannot be read or written .Is a directory"):
        get(service, tmp_path / "file")


def test_a_key_goes_to_no_other_host(service, tmp_path):
    with Service() as storage:
        storage.pages["/signed"] = BODY
        service.plans["/file"] = [("to", storage.url.replace("127.0.0.1", "localhost") + "/signed?signature=1")]
        fetch.retrieve(fetch.Session("PLANTED-SECRET").ask(service.url + "/file"), tmp_path / "file", MD5)
        assert service.asked[0][1]["x-dataverse-key"] == "PLANTED-SECRET"
        assert "PLANTED-SECRET" not in str(storage.asked)


@pytest.mark.parametrize("key", ["PLANTED-SECRET\n", "PLANTED-SECRET\u2026"])
def test_a_key_that_cannot_be_sent_is_not_shown(service, tmp_path, key):
    with pytest.raises(InputError, match="holds characters that none has: sign in") as caught:
        fetch.retrieve(fetch.Session(key).ask(service.url + "/file"), tmp_path / "file", MD5)
    assert "PLANTED" not in "".join(traceback.format_exception(caught.value)) and caught.value.__context__ is None
