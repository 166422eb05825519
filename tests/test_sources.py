import hashlib
import io
import json
import os
import traceback
import types
import zipfile

import pytest
from service import Service

from wmhlib import download, fetch, opening
from wmhlib.errors import InputError
from wmhlib.presets import preset
from wmhlib.workspace import RunFolder

CASE = {"training/Utrecht/0/pre/FLAIR.nii.gz": b"flair", "training/Utrecht/0/pre/T1.nii.gz": b"t1",
        "training/Utrecht/0/wmh.nii.gz": b"mask", "training/Utrecht/0/orig/FLAIR.nii.gz": b"unwanted",
        "additional_annotations/observer_o3/training/Utrecht/0/result.nii.gz": b"unwanted"}
KEPT = ["training/Utrecht/0/pre/FLAIR.nii.gz", "training/Utrecht/0/wmh.nii.gz"]
SECRET = "PLANTED-SECRET"
KAGGLE_API = "/api/v1/datasets.DatasetApiService/DownloadDataset"


@pytest.fixture
def service(monkeypatch, tmp_path):
    """A local Dataverse and Kaggle; no credentials but those a test plants."""
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "DATAVERSE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetch, "sleep", lambda seconds: None)
    monkeypatch.setattr(fetch, "_CHUNK", 10)
    with Service() as service:
        yield service


@pytest.fixture
def kaggle(service, monkeypatch):
    """Kaggle's own client, its address that of the local service, which sends on to a signed address as Kaggle does."""
    from kagglesdk import kaggle_env

    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setitem(kaggle_env._env_to_endpoint, kaggle_env.KaggleEnv.LOCAL, service.url)
    signed = service.url.replace("127.0.0.1", "localhost") + f"/signed?X-Goog-Signature={SECRET}"
    service.plans[KAGGLE_API] = [("to", signed)] * 20
    service.pages["/signed"] = zipped({f"wmh_data/{name.removesuffix('.gz')}": content for name, content in CASE.items()})
    return service


def zipped(members):
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w", zipfile.ZIP_DEFLATED) as content:
        for name, data in members.items():
            content.writestr(name, data)
    return stored.getvalue()


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def data_requests(service):
    return [path for path, _ in service.asked if "datafile" in path]


@pytest.mark.parametrize("checksum", ["MD5", "SHA-1", "SHA-256"])
def test_dataverse_gives_flair_and_masks_once(service, tmp_path, checksum):
    service.dataset(checksum=checksum, **CASE)
    for _ in range(2):
        download.fetch_dataverse(tmp_path / "data", server=service.url)
    assert files(tmp_path / "data") == KEPT and len(data_requests(service)) == 2
    assert (tmp_path / "data" / KEPT[0]).read_bytes() == b"flair"


def test_t1_asked_for_later_is_all_that_is_fetched(service, tmp_path):
    service.dataset(**CASE)
    download.fetch_dataverse(tmp_path, server=service.url)
    service.asked.clear()
    download.fetch_dataverse(tmp_path, server=service.url, t1=True)
    assert data_requests(service) == ["/api/access/datafile/1"]
    assert (tmp_path / "training/Utrecht/0/pre/T1.nii.gz").read_bytes() == b"t1"


def test_dataverse_goes_on_where_it_stopped(service, tmp_path):
    service.dataset(**{"a/1/pre/FLAIR.nii.gz": bytes(100), "a/1/wmh.nii.gz": b"mask"})
    service.plans["/api/access/datafile/0"] = [("cut", 40), ("status", 404)]
    with pytest.raises(InputError, match="FLAIR.nii.gz: the service answered 404 .*give the folder of your own copy as data_dir"):
        download.fetch_dataverse(tmp_path, server=service.url)
    download.fetch_dataverse(tmp_path, server=service.url)
    assert service.times("/api/access/datafile/0") == [None, "bytes=40-", "bytes=40-"]
    assert files(tmp_path) == ["a/1/pre/FLAIR.nii.gz", "a/1/wmh.nii.gz"]


def test_a_file_with_another_checksum_is_not_kept(service, tmp_path):
    service.dataset(**{"a/1/wmh.nii.gz": b"mask"})
    service.pages["/api/access/datafile/0"] = b"something else"
    with pytest.raises(InputError, match="wmh.nii.gz arrived damaged .its checksum is not md5:"):
        download.fetch_dataverse(tmp_path, server=service.url)
    assert files(tmp_path) == []


@pytest.mark.parametrize("top, folder", [("Utrecht/", "training/Utrecht/0"), ("", "training/Utrecht/0")])
def test_zip_files_of_a_dataset_are_unpacked_once(service, tmp_path, top, folder):
    content = {f"{top}0/pre/FLAIR.nii.gz": b"flair", f"{top}0/pre/T1.nii.gz": b"t1", f"{top}0/wmh.nii.gz": b"mask"}
    service.dataset(**{"training/Utrecht.zip": zipped(content), "additional_annotations.zip": b"unwanted"})
    for _ in range(2):
        download.fetch_dataverse(tmp_path, server=service.url)
    assert files(tmp_path) == ["training/Utrecht.done", f"{folder}/pre/FLAIR.nii.gz", f"{folder}/wmh.nii.gz"]
    assert len(data_requests(service)) == 1
    download.fetch_dataverse(tmp_path, server=service.url, t1=True)
    assert (tmp_path / folder / "pre/T1.nii.gz").read_bytes() == b"t1"


def test_a_listing_that_reaches_outside_is_refused(service, tmp_path):
    service.dataset(**{"../../evil/wmh.nii.gz": b"mask"})
    with pytest.raises(InputError, match="leads outside"):
        download.fetch_dataverse(tmp_path / "in", server=service.url)
    assert data_requests(service) == []


@pytest.mark.parametrize("listing", [b"<html>sign in to the hotel's network</html>", b'{"data": {}}', b'{"data": null}'])
def test_an_answer_that_is_no_listing_is_explained(service, tmp_path, listing):
    service.pages["/api/datasets/:persistentId/"] = listing
    with pytest.raises(InputError, match="10.34894/AECRSD: the service's answer makes no sense here: check the connection"):
        download.fetch_dataverse(tmp_path, server=service.url)


def test_a_dataset_without_cases_is_named(service, tmp_path):
    service.dataset(**{"readme.txt": b"text"})
    with pytest.raises(InputError, match="brought no cases .*is it the right dataset"):
        download.fetch_dataverse(tmp_path, server=service.url)


@pytest.mark.parametrize("status, step", [(401, "API token of your account"), (403, "accept its terms"), (404, "as data_dir")])
def test_dataverse_refusals_say_what_to_do(service, tmp_path, monkeypatch, capsys, status, step):
    monkeypatch.setenv("DATAVERSE_API_TOKEN", SECRET)
    service.dataset(**CASE)
    service.plans["/api/access/datafile/0"] = [("status", status)]
    with pytest.raises(InputError, match=f"answered {status} .*{step}") as caught:
        download.fetch_dataverse(tmp_path, server=service.url)
    assert service.asked[0][1]["x-dataverse-key"] == SECRET
    nothing_of_it(caught.value, capsys, tmp_path)


def test_restricted_files_ask_for_a_token_before_anything_is_fetched(service, tmp_path, monkeypatch):
    service.dataset(restricted=True, **CASE)
    with pytest.raises(InputError, match="2 files of doi:10.34894/AECRSD are restricted .*DATAVERSE_API_TOKEN"):
        download.fetch_dataverse(tmp_path, server=service.url)
    assert data_requests(service) == []
    (tmp_path / "token").write_text(f"{SECRET}\n")
    monkeypatch.setenv("DATAVERSE_API_TOKEN", str(tmp_path / "token"))
    download.fetch_dataverse(tmp_path / "data", server=service.url)
    assert service.asked[-1][1]["x-dataverse-key"] == SECRET and files(tmp_path / "data") == KEPT


def test_a_disk_too_small_for_a_dataset_is_refused_before_anything_is_fetched(service, tmp_path, monkeypatch):
    service.dataset(**CASE)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=8))
    with pytest.raises(InputError, match="data needs 0 kB and its disk has 0 kB free"):
        download.fetch_dataverse(tmp_path / "data", server=service.url)
    assert data_requests(service) == [] and not (tmp_path / "data").exists()


def test_kaggle_is_fetched_and_unpacked_once(kaggle, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    for _ in range(2):
        download.fetch_kaggle(tmp_path / "data")
    kept = [f"wmh_data/{name.removesuffix('.gz')}" for name in KEPT]
    assert files(tmp_path / "data") == ["wmh-dataset.done", *kept]
    assert [path for path, _ in kaggle.asked] == [KAGGLE_API, "/signed"]
    assert kaggle.asked[0][1]["authorization"] == f"Bearer {SECRET}" and "authorization" not in kaggle.asked[1][1]
    assert json.loads((tmp_path / "data/wmh-dataset.done").read_text()) == {"t1": False, "files": {kept[0]: 5, kept[1]: 4}}


def test_kaggle_brings_back_what_is_missing_and_t1(kaggle, tmp_path):
    download.fetch_kaggle(tmp_path)
    mask = tmp_path / "wmh_data/training/Utrecht/0/wmh.nii"
    mask.unlink()
    download.fetch_kaggle(tmp_path)
    assert mask.read_bytes() == b"mask" and not (mask.parent / "pre/T1.nii").exists()
    download.fetch_kaggle(tmp_path, t1=True)
    assert (mask.parent / "pre/T1.nii").read_bytes() == b"t1"


def test_kaggle_goes_on_where_it_stopped(kaggle, tmp_path, monkeypatch):
    kaggle.plans["/signed"] = [("cut", 100), ("cut", 50), ("status", 403)]
    with pytest.raises(InputError, match="wmh-dataset.zip: the service answered 403 .*accept the terms"):
        download.fetch_kaggle(tmp_path)
    download.fetch_kaggle(tmp_path)
    assert kaggle.times("/signed") == [None, "bytes=100-", "bytes=150-", "bytes=150-"]


@pytest.mark.parametrize("damage", [lambda zip: zip[:-30], lambda zip: zip.replace(zip[100:110], bytes(10))])
def test_a_damaged_kaggle_archive_is_not_kept(kaggle, tmp_path, damage):
    kaggle.pages["/signed"] = damage(kaggle.pages["/signed"])
    with pytest.raises(InputError, match="wmh-dataset.zip arrived damaged .it does not load"):
        download.fetch_kaggle(tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize("content", [{"readme.txt": b"text"}, {"site/1/pre/FLAIR.nii": b"without a mask"}])
def test_a_kaggle_dataset_without_cases_is_named(kaggle, tmp_path, content):
    kaggle.pages["/signed"] = zipped(content)
    for _ in range(2):
        with pytest.raises(InputError, match="brought no cases .*is it the right dataset"):
            download.fetch_kaggle(tmp_path)


@pytest.mark.parametrize("plan, told", [
    (("status", 401), "401 .*make a token at https://www.kaggle.com/settings .*KAGGLE_API_TOKEN"),
    (("status", 403), "403 .*datasets/farahmo/wmh-dataset in a browser.*accept the terms"),
    (("status", 404), "404 .*give the folder of your own copy as data_dir"),
    (("status", 429), "429 .*wait a while"), (("status", 500), "500 .*run this again later")])
@pytest.mark.parametrize("place", ["API", "storage"])
def test_kaggle_refusals_say_what_to_do_and_nothing_of_the_credentials(kaggle, tmp_path, monkeypatch, capsys, plan, told, place):
    monkeypatch.setenv("KAGGLE_API_TOKEN", SECRET)
    kaggle.plans[KAGGLE_API if place == "API" else "/signed"] = [plan] * fetch.TRIES
    before = dict(os.environ)
    with pytest.raises(InputError, match=f"wmh-dataset.zip: the service answered {told}") as caught:
        download.fetch_kaggle(tmp_path / "data")
    assert dict(os.environ) == before
    nothing_of_it(caught.value, capsys, tmp_path)


def test_a_silent_kaggle_is_given_up(kaggle, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "TIMEOUT", 0.05)
    monkeypatch.setattr(fetch, "TRIES", 1)
    kaggle.plans[KAGGLE_API] = [("wait", 0.2)]
    with pytest.raises(InputError, match="no answer within 0.05 s"):
        download.fetch_kaggle(tmp_path)


def nothing_of_it(error, capsys, folder):
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err + "".join(traceback.format_exception(error)) + repr(error.__context__)
    assert not any(SECRET.encode() in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_nothing_of_the_credentials_stays_after_a_download(kaggle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    monkeypatch.setenv("KAGGLE_KEY", SECRET)
    kaggle.plans["/signed"] = [("cut", 100)]
    download.fetch_kaggle(tmp_path / "data")
    nothing_of_it(ValueError(), capsys, tmp_path)


BASIC = "Basic " + "c29tZWJvZHk6S0VZ"  # somebody:KEY


@pytest.mark.parametrize("environment, home, sent", [
    ({"KAGGLE_API_TOKEN": "TOKEN", "KAGGLE_USERNAME": "somebody", "KAGGLE_KEY": "KEY"}, {}, "Bearer TOKEN"),
    ({"KAGGLE_USERNAME": "somebody", "KAGGLE_KEY": "KEY"}, {"access_token": "FILED"}, BASIC),
    ({}, {"access_token": "FILED\n", "kaggle.json": '{"username": "somebody", "key": "KEY"}'}, "Bearer FILED"),
    ({}, {"kaggle.json": '{"username": "somebody", "key": "KEY"}'}, BASIC), ({}, {"kaggle.json": "{}"}, None),
    ({"KAGGLE_API_TOKEN": "~/.kaggle/mine"}, {"mine": "FILED\n"}, "Bearer FILED"), ({}, {}, None)])
def test_kaggle_credentials_come_from_the_environment_before_files(kaggle, tmp_path, monkeypatch, environment, home, sent):
    (tmp_path / "home" / ".kaggle").mkdir(parents=True)
    for name, text in home.items():
        (tmp_path / "home" / ".kaggle" / name).write_text(text)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    download.fetch_kaggle(tmp_path / "data")
    assert kaggle.asked[0][1].get("authorization") == sent


def test_medsam_is_fetched_beside_the_run_folders_and_goes_on_where_it_stopped(service, monkeypatch, tmp_path):
    service.pages["/weights.pth"] = bytes(100)
    service.plans["/weights.pth"] = [("cut", 60)]
    monkeypatch.setattr(download, "MEDSAM_URL", f"{service.url}/weights.pth")
    monkeypatch.setattr(download, "MEDSAM_MD5", hashlib.md5(bytes(100)).hexdigest())
    monkeypatch.setattr(opening.medsam, "build_encoder", lambda encoder, seed: None)
    run = opening.open_run(RunFolder(tmp_path / "runs" / "d"), preset("smoke"), "zenodo")
    target = tmp_path / "runs" / "weights" / "medsam_vit_b.pth"
    assert target.read_bytes() == bytes(100) and service.times("/weights.pth") == [None, "bytes=60-"]
    assert run.recipe().encoder.checkpoint == str(target)


def test_medsam_of_another_checksum_is_refused(service, monkeypatch, tmp_path):
    service.pages["/weights.pth"] = b"other weights"
    monkeypatch.setattr(download, "MEDSAM_URL", f"{service.url}/weights.pth")
    with pytest.raises(InputError, match="medsam_vit_b.pth arrived damaged .its checksum is not md5:3bb6db55"):
        download.fetch_medsam(tmp_path)
    assert files(tmp_path) == []


def test_a_pair_in_the_environment_comes_before_a_token_among_colabs_secrets(kaggle, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_USERNAME", "somebody")
    monkeypatch.setenv("KAGGLE_KEY", "KEY")
    monkeypatch.setattr(download, "secret", lambda name: os.environ.get(name) or {"KAGGLE_API_TOKEN": "TOKEN"}.get(name))
    download.fetch_kaggle(tmp_path / "data")
    assert kaggle.asked[0][1].get("authorization") == BASIC
