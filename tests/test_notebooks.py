import json
import re
import shutil
from pathlib import Path

import jupytext
import nbformat
import nibabel
import numpy as np
import pytest

from wmhlib import suite
from wmhlib.cohort import find_cases
from wmhlib.workspace import RunFolder, read_table

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))
each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def tagged(cells, tag):
    return [number for number, cell in enumerate(cells) if tag in cell.metadata.get("tags", [])]


def test_the_suite_is_whole():
    assert tuple(path.stem for path in SOURCES) == (*suite.NOTEBOOKS, "06_predict")


@each_notebook
def test_source_and_notebook_are_equal(source):
    generated = source.with_suffix(".ipynb").read_text()
    assert generated == suite.notebook_text(source), "run make notebooks"
    assert jupytext.writes(jupytext.reads(generated, "ipynb"), "py:percent") == source.read_text()


@each_notebook
def test_a_notebook_tells_before_it_does(source):
    cells = nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells
    assert f"notebooks/{source.stem}.ipynb)" in cells[0].source and "colab-badge" in cells[0].source
    assert tagged(cells, "bootstrap") == [1] and tagged(cells, "parameters") == [2]
    assert [cell.cell_type for cell in cells[3:]] == ["markdown", "code"] * ((len(cells) - 3) // 2)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@each_notebook
def test_papermill_help_tells_type_and_meaning_of_every_parameter(source):
    import papermill

    cell = jupytext.read(source).cells[2].source
    found = papermill.inspect_notebook(str(source.with_suffix(".ipynb")))
    assert list(found) == re.findall(r"^(\w+):", cell, re.M) and list(found)[:2] == ["preset", "run_dir"]
    assert all(p["inferred_type_name"] in ("str", "int") and len(p["help"]) > 5 for p in found.values())


def test_a_run_leaves_every_file_it_promises(smoke_run):
    run, printed = smoke_run
    for path in (run.recipe_json, run.cohort_csv, run.split_csv, run.history_csv, run.best, run.search_csv, run.operating_point,
                 run.metrics_csv, run.manifest, run.checkpoints, run.figures / "predictions.png", run.figures / "training_curves.png",
                 run.figures / "bland_altman.png", *(run.notebooks / f"{name}.ipynb" for name in suite.NOTEBOOKS)):
        assert path.exists(), path
    test_cases = set(read_table(run.split_csv).query("split == 'test'").case)
    assert {path.name.removesuffix("_wmh.nii.gz") for path in run.predictions.iterdir()} == test_cases
    assert set(read_table(run.metrics_csv).case) == test_cases
    assert not [path for path in run.path.rglob(".*")]
    assert "metrics.csv" in json.loads(run.manifest.read_text())["files"]


def test_the_terminal_shows_steps_epochs_results_and_the_reports(smoke_run):
    run, printed = smoke_run
    assert all(f"{name} done in" in printed for name in suite.NOTEBOOKS)
    assert len(re.findall(r"^epoch +\d/2 .*Dice", printed, re.M)) == 2
    assert "operating point" in printed and f"{run.notebooks / '05_report.html'}" in printed


@pytest.mark.parametrize("name", suite.NOTEBOOKS)
def test_a_report_stands_alone_and_shows_no_code(smoke_run, name):
    html = (smoke_run[0].notebooks / f"{name}.html").read_text()
    assert not re.findall(r'(?:src|href)\s*=\s*["\']?(?:https?:)?//|@import|url\(["\']?https?:', html)
    assert "bootstrap()" not in html and "run_dir" not in html and "colab-badge" not in html
    assert 'src="data:image/png' in html and "it/s]" not in html


def test_the_same_seed_gives_the_same_metrics(smoke_run, tmp_path):
    first, again = smoke_run[0], RunFolder(tmp_path / "again")
    again.path.mkdir()
    for path in (first.recipe_json, first.cohort_csv):
        shutil.copy(path, again.path)
    for name in suite.NOTEBOOKS[1:]:
        suite.execute(name, again.notebooks / f"{name}.ipynb", {"preset": "smoke", "run_dir": str(again.path)})
    assert again.metrics_csv.read_bytes() == first.metrics_csv.read_bytes()
    assert again.best.read_bytes() == first.best.read_bytes()


def test_predict_gives_a_scan_its_lesions_on_its_own_grid(smoke_run, tmp_path, capsys):
    run = smoke_run[0]
    flair = find_cases(run.path / "data").flair[0]
    assert suite.main(["predict", "--run", str(run.path), "--flair", flair, "--out", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"FLAIR_{ending}" for ending in (
        "wmh.nii.gz", "prob.nii.gz", "spread.nii.gz", "lesions.csv", "summary.csv", "report.html")}
    scan, mask = nibabel.load(flair), nibabel.load(tmp_path / "out" / "FLAIR_wmh.nii.gz")
    assert mask.shape == scan.shape and np.array_equal(mask.affine, scan.affine)
    printed = capsys.readouterr().out
    assert " mL in " in printed and "FLAIR_report.html" in printed


def test_a_notebook_that_stops_says_why_and_leaves_nothing(tmp_path, capsys):
    for arguments, reason in ((["--preset", "demi"], "unknown preset 'demi'"),
                              (["--preset", "colab", "--overrides", "encoder.random=true"], "set data_dir to your folder of cases"),
                              (["--preset", "colab"], "set medsam to 'zenodo'")):
        assert suite.main([*arguments, "--run", str(tmp_path / "run")]) == 1
        error = capsys.readouterr().err
        assert "01_download stopped" in error and reason in error and "Traceback" not in error
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["recipe.json"]


def test_predicting_a_file_that_is_no_scan_leaves_nothing(smoke_run, tmp_path, capsys):
    (tmp_path / "scan.nii.gz").write_bytes(b"not a scan")
    arguments = ["predict", "--run", str(smoke_run[0].path), "--flair", str(tmp_path / "scan.nii.gz"), "--out", str(tmp_path / "out")]
    assert suite.main(arguments) == 1
    assert "scan.nii.gz" in capsys.readouterr().err and not (tmp_path / "out").exists()
