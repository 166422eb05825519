import contextlib
import io
import os
import random
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nibabel
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def fresh_state():
    """The same random numbers for every test, and no figure left open by one."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def real_scans() -> Path:
    """A BIDS folder of real scans with manual masks, which is no part of this repository."""
    folder = Path(os.environ.get("WMH_REAL_SCANS", REPOSITORY.parent / "shared" / "real"))
    if not (folder / "dataset_description.json").exists():
        pytest.skip(f"no real scans in {folder}: set WMH_REAL_SCANS to a BIDS folder with them")
    return folder


@pytest.fixture
def tiny_nifti(tmp_path):
    """Writes a small NIfTI: `tiny_nifti("a/FLAIR.nii.gz", shape, spacing, axes, data)` -> its path. `axes` may be any
    orientation ("LAS", "PSR" ...); the grid lies off centre. Without data a bright ball in noise, which reads as a head."""

    def write(name, shape=(24, 28, 10), spacing=(1.0, 1.0, 3.0), axes="RAS", data=None) -> Path:
        if data is None:
            places = np.indices(shape) - (np.array(shape)[:, None, None, None] - 1) / 2
            inside = ((places / (0.4 * np.array(shape))[:, None, None, None]) ** 2).sum(0) < 1
            data = (inside * 100 + np.random.default_rng(0).normal(5, 2, shape)).astype(np.float32)
        affine = np.diag([0.0, 0, 0, 1])
        affine[:3, 3] = -31.5, 12.25, 7
        for column, (code, step) in enumerate(zip(axes, spacing, strict=True)):
            affine["LR PA IS".index(code) // 3, column] = step if code in "RAS" else -step
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(data, affine), path)
        return path

    return write


@pytest.fixture
def scan(tiny_nifti):
    """Writes a head with one lesion of 18 voxels of 3 mm3."""
    from predicting import LESION

    def write(name, **options):
        path = tiny_nifti(name, **options)
        image = nibabel.load(path)
        data = image.get_fdata(dtype=np.float32)
        data[LESION] = 200
        nibabel.save(nibabel.Nifti1Image(data, image.affine), path)
        return path

    return write


@pytest.fixture
def quick_figure(monkeypatch):
    """The figure of a scan's page is not drawn."""
    from types import SimpleNamespace

    from wmhlib import scanpages

    monkeypatch.setattr(scanpages, "overlay", lambda case: SimpleNamespace(_repr_png_=lambda: b"a figure"))


@pytest.fixture
def touch(tmp_path):
    """Makes empty files: finding cases looks at names alone."""

    from wmhlib.files import write_atomic

    def make(*names):
        for name in names:
            write_atomic(tmp_path / name, b"")
        return tmp_path

    return make


@pytest.fixture(scope="session")
def disc_case():
    """Makes a predicted case: `disc_case(name, site, lesions, codes)`, a disc of brain, a lesion on the patient's right and
    label 2 on the left, at 62 mm, stored along `codes`."""

    def make(name="Utrecht_1", site="Utrecht", lesions=True, codes="RAS"):
        x, y, _ = np.mgrid[-20:20, -24:24, :6]
        flair = 100.0 * (np.hypot(x / 16, y / 20) < 1)
        reference = np.zeros(flair.shape, np.uint8)
        reference[28:31, 20:23, 4] = lesions
        reference[8:10, 20:22, 4] = 2
        flair[reference == 1] = 180
        affine = np.diag([1.0, 1.0, 3.0, 1.0])
        affine[:3, 3] = -20, -24, 50
        turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
        flair, reference = (apply_orientation(a, turn) for a in (flair, reference))
        prob = 0.45 * (reference > 0).astype(np.float32)
        return dict(case=name, site=site, split="val", spacing=(1, 1, 3), affine=affine @ inv_ornt_aff(turn, x.shape),
                    flair=flair.astype(np.float32), flair_z=(flair / 60).astype(np.float32), inner=flair > 0,
                    reference=reference, prob=prob, prob_tta=prob, ventricles=None)

    return make


@pytest.fixture(scope="session")
def evaluated(disc_case):
    """The evaluation of five cases, the last one without lesions."""
    from wmhlib.evaluation import evaluate
    from wmhlib.sections import Operating

    names = ("Utrecht_0", "Utrecht_1", "Utrecht_2", "Singapore_0", "Singapore_1")
    cases = (disc_case(name, name[:-2], lesions=name != "Singapore_1") for name in names)
    point = dict(threshold=0.4, min_voxels=3, min_mm3=0.0, tta=True, dsc=0.8, se=0.05, n=3, zscore_threshold=2.0, unsure_above=0.5, poor_below=0.8)
    return evaluate(cases, point, Operating())


@pytest.fixture(scope="session")
def scored(evaluated):
    """Scores and gallery of the five cases."""
    return evaluated.metrics, evaluated.gallery


@pytest.fixture(scope="session")
def split_cohort(tmp_path_factory):
    """Nine coarse synthetic cases and their split: both tables."""
    from wmhlib.cohort import check_cases
    from wmhlib.phantom import write_cohort
    from wmhlib.presets import preset
    from wmhlib.splits import split_cases

    cases = write_cohort(tmp_path_factory.mktemp("cohort"), 9, seed=1, scale=4.0, progress=False)
    return cases, split_cases(cases.merge(check_cases(cases)), preset("smoke"))


@pytest.fixture
def new_run(split_cohort, tmp_path, request):
    """Makes a run folder ready to train: `new_run(name, overrides)`, the smoke preset with the module's OVERRIDES unless given."""
    from wmhlib.files import write_table
    from wmhlib.presets import preset
    from wmhlib.workspace import RunFolder

    def make(name, overrides=request.module.OVERRIDES):
        run = RunFolder(tmp_path / name).open(preset("smoke", overrides))
        for table, path in zip(split_cohort, (run.cohort_csv, run.split_csv)):
            write_table(table, path)
        return run

    return make


@pytest.fixture
def trouble(monkeypatch):
    """A file system that fails as it is told: `trouble.begin(kind, folder)` of `keeping.Trouble`."""
    from keeping import Trouble

    return Trouble(monkeypatch)


@pytest.fixture
def run(tmp_path):
    """An empty run folder on a drive, which is the folder above it."""
    from wmhlib.workspace import RunFolder

    folder = RunFolder(tmp_path / "drive" / "run")
    folder.path.mkdir(parents=True)
    return folder


@pytest.fixture
def new_keeper(run, tmp_path, monkeypatch):
    """Opens a Keeper of `run` whose `said` has its sentences; by way of a local folder, or direct."""
    from keeping import keeper_of

    from wmhlib import storage

    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    return lambda direct=False, **more: keeper_of(run, None if direct else tmp_path / "local", **more)


PLANTED = {name: f"PLANTED-{name}" for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "DATAVERSE_API_TOKEN", "HF_TOKEN")}


@pytest.fixture(scope="session")
def planted_secrets() -> list[str]:
    """The credentials in the environment of `smoke_run`: none of them may be in anything that it leaves."""
    return list(PLANTED.values())


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """Notebooks 01 to 05 at toy size: the run folder, and what the suite printed. Made once for all workers: write nothing into it."""
    from filelock import FileLock

    from wmhlib import suite
    from wmhlib.workspace import RunFolder

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    folder.mkdir(exist_ok=True)
    run, printed = RunFolder(folder / "smoke"), folder / "printed.txt"
    with FileLock(folder / "lock"):
        if not printed.exists():
            text = io.StringIO()
            with contextlib.redirect_stdout(text), pytest.MonkeyPatch.context() as patch:
                for name, value in PLANTED.items():
                    patch.setenv(name, value)
                assert suite.main(["--preset", "smoke", "--run", str(run.path)]) == 0
            printed.write_text(text.getvalue())
    return run, printed.read_text()
