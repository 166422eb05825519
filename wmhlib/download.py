"""Brings in what a run starts from: a cohort (synthetic, a folder, Kaggle, DataverseNL) and MedSAM's weights."""

from __future__ import annotations

import json
import os
import urllib.parse
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path

from . import medsam, phantom
from .cohort import SYNTHETIC_NOTE
from .errors import InputError, RecipeError
from .settings import Recipe
from .workspace import RunFolder, secret, write_atomic

MEDSAM_URL = "doi:10.5281/zenodo.10689643/medsam_vit_b.pth"
KAGGLE_DATASET = "farahmo/wmh-dataset"
DATAVERSE = "https://dataverse.nl"
DATAVERSE_DOI = "doi:10.34894/AECRSD"
SOURCES = ("synthetic", "folder", "kaggle", "dataverse")
_WANTED = ("pre/FLAIR.nii.gz", "pre/T1.nii.gz", "wmh.nii.gz")


def open_run(run: RunFolder, recipe: Recipe, weights: str = "") -> RunFolder:
    """Opens `run` for `recipe`, its encoder starting from `weights`: "" the recipe's own, "zenodo" MedSAM (fetched once to
    `weights/` beside the run folders), or a file. Weights are loaded once as a check (CheckpointError if they do not fit)."""
    if weights:
        path = fetch_medsam(run.path.parent.absolute() / "weights") if weights == "zenodo" else Path(weights).expanduser().absolute()
        recipe = replace(recipe, encoder=replace(recipe.encoder, checkpoint=str(path)))
        medsam.build_encoder(recipe.encoder, recipe.seed)
    if not (recipe.encoder.checkpoint or recipe.encoder.random):
        raise RecipeError(f"preset {recipe.name!r} adapts a trained encoder and none is named: set medsam to 'zenodo' or to a "
                          "checkpoint file (encoder.random=true trains on random weights)")
    return run.open(recipe)


def get_cohort(run: RunFolder, source: str = "", folder: str = "") -> Path:
    """The folder of the run's cohort, made or fetched where it is not there yet (into `folder`, or the run's `data`).

    `source`: "synthetic", "folder" (yours, nothing is fetched), "kaggle" or "dataverse"; "" is "folder" where one is given,
    else "synthetic" where the recipe has synthetic cases. Raises RecipeError for another source or none that fits.
    """
    recipe = run.recipe()
    source = source or ("folder" if folder else "synthetic" if recipe.cohort.synthetic_cases else "")
    target = Path(folder).expanduser() if folder else run.path / "data"
    if source not in SOURCES or (source == "folder" and not folder):
        raise RecipeError(f"source {source!r} with data_dir {folder!r} gives no data for preset {recipe.name!r}: "
                          "set data_dir to your folder of cases, or source to 'kaggle', 'dataverse' or 'synthetic'")
    if source == "synthetic":
        _synthetic(target, recipe)
    elif source == "kaggle":
        fetch_kaggle(target)
    elif source == "dataverse":
        fetch_dataverse(target)
    return target


def fetch_medsam(folder: str | Path) -> Path:
    """MedSAM's checkpoint (375 MB, CC BY 4.0) from Zenodo, checked by md5; kept in `folder` and not fetched twice."""
    return _retrieve(MEDSAM_URL, f"md5:{medsam.MEDSAM_MD5}", Path(folder, "medsam_vit_b.pth"))


def fetch_kaggle(folder: str | Path, dataset: str = KAGGLE_DATASET) -> None:
    """The challenge's Kaggle mirror into `folder`. Credentials: environment, Colab's secrets, or Kaggle's own file."""
    archive = Path(folder, dataset.split("/")[1] + ".zip")
    done = archive.with_suffix(".done")
    if done.exists():
        return
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        value = secret(name)
        if value:
            os.environ[name] = value
    try:
        from kaggle.api.kaggle_api_extended import KaggleApi
        api = KaggleApi()
        api.authenticate()
        api.dataset_download_files(dataset, path=str(folder), quiet=False)
    except SystemExit:  # how the kaggle package says that it found no credentials
        raise InputError("Kaggle asks who you are: make a token at https://www.kaggle.com/settings (API, 'Generate New Token') and set "
                         "KAGGLE_API_TOKEN in the environment or in Colab's secrets (key icon, access on), then run this again") from None
    except (OSError, ValueError) as error:
        raise InputError(f"Kaggle did not deliver {dataset} ({error}): check the connection and your token, then run this again") from error
    extract(archive, folder)
    archive.unlink()
    write_atomic(done, "")


def fetch_dataverse(folder: str | Path, doi: str = DATAVERSE_DOI, server: str = DATAVERSE) -> None:
    """FLAIR, T1 and mask of each case of a Dataverse dataset into `folder`, checked by md5; files already there are kept."""
    query = urllib.parse.urlencode({"persistentId": doi})
    try:
        with urllib.request.urlopen(f"{server}/api/datasets/:persistentId/?{query}", timeout=60) as answer:
            files = json.load(answer)["data"]["latestVersion"]["files"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{server} did not list {doi} ({error}): check the connection, or download the dataset in a browser and "
                         "give its folder as data_dir") from error
    for entry in files:
        target = _inside(folder, str(Path(entry.get("directoryLabel", ""), entry["label"])))
        if target.as_posix().endswith(_WANTED):
            file = entry["dataFile"]
            _retrieve(f"{server}/api/access/datafile/{file['id']}", f"md5:{file['md5']}", target)


def extract(archive: str | Path, folder: str | Path) -> None:
    """Unpacks a zip file; raises InputError, before anything is written, if it is damaged or reaches outside `folder`."""
    try:
        with zipfile.ZipFile(archive) as content:
            for name in content.namelist():
                _inside(folder, name)
            content.extractall(folder)
    except zipfile.BadZipFile as error:
        raise InputError(f"{archive} is damaged ({error}): delete it and run this again") from None


def _inside(folder: str | Path, name: str) -> Path:
    root = Path(folder).resolve()
    target = (root / name).resolve()
    if not target.is_relative_to(root):
        raise InputError(f"the archive names {name!r}, outside {root}: it is not what it says it is, nothing was unpacked")
    return target


def _retrieve(url: str, known_hash: str, target: Path) -> Path:
    import pooch
    import requests
    try:
        pooch.retrieve(url, known_hash, fname=target.name, path=target.parent, progressbar=True)
    except (requests.RequestException, OSError, ValueError) as error:
        raise InputError(f"{url} could not be fetched to {target} ({error}): check the connection and run this again, or download "
                         "it in a browser and give its path") from error
    return target


def _synthetic(folder: Path, recipe: Recipe) -> None:
    wanted = {"seed": recipe.seed, "cases": recipe.cohort.synthetic_cases, "scale": recipe.cohort.scale}
    note = folder / SYNTHETIC_NOTE
    if note.exists() and json.loads(note.read_text()) == wanted:
        return
    if folder.exists() and any(folder.iterdir()) and not note.exists():
        raise InputError(f"{folder} holds files that are no synthetic cohort: nothing is written over them; set data_dir to an "
                         "empty folder, or source to 'folder' to use what is there")
    write_atomic(note, "{}")
    phantom.write_cohort(folder, wanted["cases"], wanted["seed"], wanted["scale"])
    write_atomic(note, json.dumps(wanted))
