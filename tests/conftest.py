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


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory):
    """Notebooks 01 to 05 at toy size: the run folder, and what the suite printed."""
    from wmhlib import suite
    from wmhlib.workspace import RunFolder

    run = RunFolder(tmp_path_factory.mktemp("runs") / "smoke")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert suite.main(["--preset", "smoke", "--run", str(run.path)]) == 0
    return run, printed.getvalue()
