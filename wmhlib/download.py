"""Brings in what a run starts from: a cohort (synthetic, a folder, Kaggle, DataverseNL) and MedSAM's weights."""

from __future__ import annotations

import json
import os
import re
import urllib.parse
import zipfile
from pathlib import Path

from . import archives, fetch, phantom, vessels
from .cohort import SYNTHETIC_NOTE
from .colab import secret
from .errors import InputError, RecipeError
from .files import read_json, write_atomic
from .settings import Recipe
from .workspace import RunFolder

MEDSAM_URL = "https://zenodo.org/records/10689643/files/medsam_vit_b.pth"  # doi:10.5281/zenodo.10689643; 375,049,145 bytes
MEDSAM_MD5 = "3bb6db55bd0c9ca30b61248bca72f8d6"
KAGGLE_DATASET = "farahmo/wmh-dataset"
DATAVERSE = "https://dataverse.nl"
DATAVERSE_DOI = "doi:10.34894/AECRSD"


def get_cohort(run: RunFolder, source: str = "", folder: str = "") -> Path:
    """The folder of the run's cohort, made or fetched where it is not there yet (into `folder`, or the run's `data`).

    `source`: "synthetic", "folder" (yours, nothing is fetched), "kaggle" or "dataverse"; "" is "folder" where one is given,
    else "synthetic" where the recipe has synthetic cases. A download brings FLAIR and masks, and T1 where the recipe's
    modalities name it. Raises RecipeError for another source or none that fits.
    """
    recipe = run.recipe()
    source = source or ("folder" if folder else "synthetic" if recipe.cohort.synthetic_cases else "")
    target = Path(folder).expanduser() if folder else run.path / "data"
    challenge = not (recipe.inputs.images or recipe.inputs.t1_alone)  # whose masks were drawn on FLAIR
    known = [*("kaggle", "dataverse") * challenge, *("synthetic",) * bool(recipe.cohort.synthetic_cases)]
    if source not in ("folder", *known) or (source == "folder" and not folder):
        choice = f", or source to {' or '.join(map(repr, known))}" if known else ""
        raise RecipeError(f"source {source!r} with data_dir {folder!r} gives no data for preset {recipe.name!r}: set data_dir to your folder of cases{choice}")
    t1 = recipe.inputs.t1_beside
    if source == "synthetic":
        _synthetic(target, recipe)
    elif source == "kaggle":
        fetch_kaggle(target, t1=t1)
    elif source == "dataverse":
        fetch_dataverse(target, t1=t1)
    return target


def fetch_medsam(folder: str | Path) -> Path:
    """MedSAM's checkpoint (375 MB, CC BY 4.0) from Zenodo, checked by md5; kept in `folder` and not fetched twice."""
    target = Path(folder).absolute() / "medsam_vit_b.pth"
    step = f"download it in a browser from {MEDSAM_URL} and give its path as medsam"
    return fetch.retrieve(fetch.Session().ask(MEDSAM_URL), target, f"md5:{MEDSAM_MD5}", dict.fromkeys((401, 403, 404), step))


def fetch_kaggle(folder: str | Path, t1: bool = False) -> None:
    """FLAIR and mask (and T1) of each case of the challenge's Kaggle mirror into `folder`.

    Credentials: KAGGLE_API_TOKEN (the token, or a file that holds it), else KAGGLE_USERNAME and KAGGLE_KEY, each from the
    environment, else Colab's secrets; else Kaggle's own files (~/.kaggle/access_token, ~/.kaggle/kaggle.json). The mirror comes as
    one zip file, kept only if every checksum in it holds, and only until it is unpacked; asking for `t1` later fetches it again.
    Raises InputError with the next step to take.
    """
    archive, page = Path(folder).absolute() / f"{KAGGLE_DATASET.split('/')[1]}.zip", f"https://www.kaggle.com/datasets/{KAGGLE_DATASET}"
    if not _is_unpacked(archive, t1):
        print(f"fetching {page} into {folder}", flush=True)
        fetch.retrieve(_kaggle(), archive, loads=archives.zip_loads, unpacked=True, steps={
            401: "make a token at https://www.kaggle.com/settings (API, 'Generate New Token') and set KAGGLE_API_TOKEN in the "
                 "environment or in Colab's secrets (key icon, notebook access on), or save it as ~/.kaggle/access_token; then run "
                 "this again",
            403: f"open {page} in a browser, sign in as the owner of the token, accept the terms asked for there, then run this again",
            404: f"look for {page} in a browser, or give the folder of your own copy as data_dir"})
        _unpack(archive, archive.parent, t1)
    _need_cases(archive.parent, page)


def fetch_dataverse(folder: str | Path, doi: str = DATAVERSE_DOI, server: str = DATAVERSE, t1: bool = False) -> None:
    """FLAIR and mask (and T1) of each case of a Dataverse dataset into `folder`, checked by the checksums of its listing.

    Files already there are kept, zip files of cases unpacked. Where the dataset is not open: DATAVERSE_API_TOKEN (the token, or a
    file that holds it) from the environment, else Colab's secrets. Raises InputError with the next step to take.
    """
    key, folder, page = secret("DATAVERSE_API_TOKEN"), Path(folder).absolute(), f"{server}/dataset.xhtml?persistentId={doi}"
    token = (f"copy the API token of your account at {server} and set DATAVERSE_API_TOKEN in the environment or in Colab's secrets "
             "(key icon, notebook access on), then run this again")
    steps = {401: f"{token}; a token lasts a year",
             403: f"open {page} in a browser, sign in, accept its terms or ask for access, {token}",
             404: f"look for {page} in a browser, or give the folder of your own copy as data_dir"}
    ask, query = fetch.Session(key).ask, urllib.parse.urlencode({"persistentId": doi})
    files = fetch.persist(lambda: _listed(ask(f"{server}/api/datasets/:persistentId/?{query}")({})), f"{server}, {doi}", steps)
    files = [file for file in files if _wanted(file["name"], t1) or _is_case_zip(file["name"])]
    files = [file | {"path": archives.inside(folder, file["name"])} for file in files]
    files = [file for file in files if not _is_unpacked(file["path"], t1)]
    closed = [file["name"] for file in files if file["restricted"]]
    if closed and not key:
        raise InputError(f"{len(closed)} files of {doi} are restricted ({closed[0]}, ...): {steps[403]}")
    lacking = sum(max(0, file["size"] - max(map(fetch.length, (file["path"], fetch.part(file["path"]))))) for file in files)
    fetch.need_space(folder, lacking + sum(file["size"] for file in files if _is_case_zip(file["name"])))
    print(f"{doi}: {len(files)} files for {folder}, {lacking / 1e9:.2f} GB of them to fetch", flush=True)
    with fetch.byte_bar(doi, lacking) as bar:
        for file in files:
            fetch.retrieve(ask(f"{server}/api/access/datafile/{file['id']}"), file["path"], file["hash"], steps, bar=bar)
            if _is_case_zip(file["name"]):
                _unpack(file["path"], _zip_folder(file["path"]), t1)
    _need_cases(folder, page)


def _kaggle() -> fetch.Ask:
    # The kaggle package's own HTTP layer: importing the package itself signs in, prints, and may end the process.
    from kagglesdk import KaggleClient
    from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest
    token, user, key = (secret(f"KAGGLE_{name}") for name in ("API_TOKEN", "USERNAME", "KEY"))
    if {"KAGGLE_USERNAME", "KAGGLE_KEY"} <= set(os.environ) and "KAGGLE_API_TOKEN" not in os.environ:
        token = None  # the environment comes before a token among Colab's secrets
    request = ApiDownloadDatasetRequest()
    request.owner_slug, request.dataset_slug = KAGGLE_DATASET.split("/")

    def ask(headers: dict[str, str]):
        with KaggleClient(username=user, password=key, api_token=token) as client:
            session = client.http_client()._session  # the only way to its headers and time limit
            session.headers.update(headers)
            fetch.limit_waiting(session)
            if user and key and not token:  # or it would take a token file first
                session.auth = (user, key)
            return client.datasets.dataset_api_client.download_dataset(request)

    return ask


def _listed(answer) -> list[dict]:
    """The files of a Dataverse dataset: id, name (with folders), size (bytes), hash (as pooch writes it), restricted."""
    files = []
    try:
        for entry in answer.json()["data"]["latestVersion"]["files"]:
            file = entry["dataFile"]
            checksum = file.get("checksum") or {"type": "MD5", "value": file["md5"]}
            files.append({"id": int(file["id"]), "name": "/".join(filter(None, (entry.get("directoryLabel"), entry["label"]))),
                          "size": int(file.get("filesize", 0)), "restricted": bool(entry.get("restricted")),
                          "hash": f"{checksum['type'].lower().replace('-', '')}:{checksum['value']}"})
    except (KeyError, TypeError) as error:
        raise ValueError(f"no Dataverse listing: {error}") from None
    return files


def _wanted(name: str, t1: bool) -> bool:
    return bool(re.search(rf"(^|/)(pre/{'(FLAIR|T1)' if t1 else 'FLAIR'}|wmh)\.nii(\.gz)?$", name))


def _is_case_zip(name: str) -> bool:
    return name.endswith(".zip") and "additional" not in name  # "additional_annotations": second observers, no cases


def _need_cases(folder: Path, page: str) -> None:
    roles = {path.name.split(".")[0] for path in folder.rglob("*.nii*") if _wanted(path.as_posix(), False)}
    if roles != {"FLAIR", "wmh"}:
        raise InputError(f"{page} brought no cases to {folder} (pre/FLAIR.nii.gz with wmh.nii.gz): is it the right dataset?")


def _zip_folder(archive: Path) -> Path:
    """Where a zip file of cases belongs: beside it if it holds one folder of its name, else in such a folder."""
    with zipfile.ZipFile(archive) as content:
        tops = {name.split("/")[0] for name in content.namelist()}
    return archive.parent if tops == {archive.stem} else archive.with_suffix("")


def _unpack(archive: Path, folder: Path, t1: bool) -> None:
    """Unpacks what is wanted, notes it beside the archive (`.done`) and removes the archive."""
    files = archives.extract(archive, folder, lambda name: _wanted(name, t1))
    noted = {(folder / name).relative_to(archive.parent).as_posix(): size for name, size in files.items()}
    write_atomic(archive.with_suffix(".done"), json.dumps({"t1": t1, "files": noted}, indent=1))
    archive.unlink()


def _is_unpacked(archive: Path, t1: bool) -> bool:
    note = archive.with_suffix(".done")
    try:
        done = json.loads(note.read_text())
        return bool(done["files"]) and (done["t1"] or not t1) and all(fetch.length(archive.parent / name) == size for name, size in done["files"].items())
    except (OSError, ValueError, KeyError, TypeError):  # no note, or of another kind
        return False


def _synthetic(folder: Path, recipe: Recipe) -> None:
    wanted = {"seed": recipe.seed, "cases": recipe.cohort.synthetic_cases, "scale": recipe.cohort.scale, "scanners": recipe.cohort.scanners}
    wanted |= {"heads": list(recipe.cohort.heads)} if recipe.cohort.heads else {}
    note = folder / SYNTHETIC_NOTE
    if note.exists() and read_json(note) == wanted:
        return
    if folder.is_file():
        raise InputError(f"{folder} is a file: set data_dir to a folder for the synthetic cases")
    if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()) and not note.exists():
        raise InputError(f"{folder} holds files that are no synthetic cohort: nothing is written over them; set data_dir to an "
                         "empty folder, or source to 'folder' to use what is there")
    if note.exists() and read_json(note) not in (wanted, {"unfinished": wanted}):
        raise InputError(f"{folder} holds another synthetic cohort, or a part of one: delete it, or set data_dir to another folder")
    write_atomic(note, json.dumps({"unfinished": wanted}))
    if wanted["scanners"] == "vessels":
        vessels.write_images(folder, wanted["cases"], wanted["seed"], round(224 / wanted["scale"]))
    else:
        phantom.write_cohort(folder, wanted["cases"], wanted["seed"], wanted["scale"], scanners=wanted["scanners"],
                             heads=recipe.cohort.heads)
    write_atomic(note, json.dumps(wanted))
