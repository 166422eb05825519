import hashlib
import http.server
import json
import sys
import threading
import types
import zipfile

import pytest

from wmhlib import download
from wmhlib.errors import CheckpointError, InputError, RecipeError
from wmhlib.settings import preset
from wmhlib.workspace import RunFolder


@pytest.fixture
def server():
    """A local web server: `pages` maps a path to bytes; what it was asked for is in `asked`."""
    state = types.SimpleNamespace(pages={}, asked=[])

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked.append(self.path)
            body = state.pages.get(self.path.split("?")[0])
            self.send_response(404 if body is None else 200)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    state.url = f"http://127.0.0.1:{httpd.server_port}"
    yield state
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "runs" / "a").open(preset("smoke"))


def dataset(server, **files):
    """Serves a Dataverse listing of {folder/name: content}."""
    listing = []
    for number, (name, content) in enumerate(files.items()):
        label, _, file = name.rpartition("/")
        server.pages[f"/api/access/datafile/{number}"] = content
        listing.append({"directoryLabel": label, "label": file,
                        "dataFile": {"id": number, "md5": hashlib.md5(content).hexdigest()}})
    server.pages["/api/datasets/:persistentId/"] = json.dumps({"data": {"latestVersion": {"files": listing}}}).encode()
    return listing


def test_dataverse_gives_scans_and_masks_once(server, tmp_path):
    dataset(server, **{"training/Utrecht/0/pre/FLAIR.nii.gz": b"flair", "training/Utrecht/0/wmh.nii.gz": b"mask",
                       "training/Utrecht/0/orig/FLAIR.nii.gz": b"unwanted"})
    download.fetch_dataverse(tmp_path, server=server.url)
    download.fetch_dataverse(tmp_path, server=server.url)
    assert (tmp_path / "training/Utrecht/0/pre/FLAIR.nii.gz").read_bytes() == b"flair"
    assert not (tmp_path / "training/Utrecht/0/orig").exists()
    assert len([path for path in server.asked if "datafile" in path]) == 2


def test_a_file_with_another_checksum_is_not_kept(server, tmp_path):
    dataset(server, **{"a/wmh.nii.gz": b"mask"})[0]
    server.pages["/api/access/datafile/0"] = b"something else"
    with pytest.raises(InputError, match="could not be fetched"):
        download.fetch_dataverse(tmp_path, server=server.url)
    assert not list(tmp_path.rglob("wmh*"))


def test_a_listing_that_reaches_outside_is_refused(server, tmp_path):
    dataset(server, **{"../../evil/wmh.nii.gz": b"mask"})
    with pytest.raises(InputError, match="outside"):
        download.fetch_dataverse(tmp_path / "in", server=server.url)


def test_a_dataset_that_is_not_there_says_what_to_do(server, tmp_path):
    with pytest.raises(InputError, match="404.*give its folder as data_dir"):
        download.fetch_dataverse(tmp_path, server=server.url)


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil.txt", "a/../../evil.txt"])
def test_an_archive_writes_nowhere_but_its_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as content:
        content.writestr("good.txt", "good")
        content.writestr(name, "evil")
    with pytest.raises(InputError, match="outside"):
        download.extract(tmp_path / "a.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cut_archive_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\3\4 cut")
    with pytest.raises(InputError, match="a.zip is damaged"):
        download.extract(tmp_path / "a.zip", tmp_path)


def kaggle_package(monkeypatch, **methods):
    module = types.ModuleType("kaggle.api.kaggle_api_extended")
    module.KaggleApi = type("KaggleApi", (), methods)
    for name in ("kaggle", "kaggle.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)


def test_kaggle_is_fetched_and_unpacked_once(monkeypatch, tmp_path):
    calls = []

    def deliver(self, dataset, path, quiet):
        calls.append(dataset)
        with zipfile.ZipFile(f"{path}/wmh-dataset.zip", "w") as content:
            content.writestr("wmh_data/a.nii", "scan")

    kaggle_package(monkeypatch, authenticate=lambda self: None, dataset_download_files=deliver)
    download.fetch_kaggle(tmp_path)
    download.fetch_kaggle(tmp_path)
    assert calls == [download.KAGGLE_DATASET] and (tmp_path / "wmh_data/a.nii").exists()
    assert not list(tmp_path.glob("*.zip"))


def test_kaggle_without_credentials_says_where_to_get_them(monkeypatch, tmp_path):
    def authenticate(self):
        raise SystemExit(1)

    kaggle_package(monkeypatch, authenticate=authenticate)
    with pytest.raises(InputError, match="KAGGLE_API_TOKEN"):
        download.fetch_kaggle(tmp_path)


def test_the_synthetic_cohort_is_made_once(monkeypatch, run):
    made = []
    monkeypatch.setattr(download.phantom, "write_cohort", lambda folder, *a: made.append((folder, *a)))
    assert download.get_cohort(run) == download.get_cohort(run) == run.path / "data"
    assert made == [(run.path / "data", 12, 42, 3.0)]


def test_your_own_folder_is_taken_as_it_is(run, tmp_path):
    assert download.get_cohort(run, folder=str(tmp_path)) == tmp_path


@pytest.mark.parametrize("source", ["folder", "dropbox"])
def test_a_source_that_gives_no_data_is_explained(run, source):
    with pytest.raises(RecipeError, match="set data_dir"):
        download.get_cohort(run, source)


def test_real_presets_ask_for_data(tmp_path):
    run = RunFolder(tmp_path / "b").open(preset("colab"))
    with pytest.raises(RecipeError, match="preset 'colab'"):
        download.get_cohort(run)


def test_weights_that_do_not_fit_open_no_run_folder(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"not weights")
    run = RunFolder(tmp_path / "c")
    with pytest.raises(CheckpointError):
        download.open_run(run, preset("smoke"), str(tmp_path / "weights.pth"))
    assert not run.path.exists()


def test_medsam_is_fetched_beside_the_run_folders_and_checked(monkeypatch, tmp_path):
    asked = []

    def retrieve(url, known_hash, target):
        asked.append((url, known_hash, target))
        return target

    monkeypatch.setattr(download, "_retrieve", retrieve)
    monkeypatch.setattr(download.medsam, "build_encoder", lambda encoder, seed: None)
    run = download.open_run(RunFolder(tmp_path / "d"), preset("smoke"), "zenodo")
    target = tmp_path / "weights" / "medsam_vit_b.pth"
    assert asked == [("doi:10.5281/zenodo.10689643/medsam_vit_b.pth", "md5:3bb6db55bd0c9ca30b61248bca72f8d6", target)]
    assert run.recipe().encoder.checkpoint == str(target)
