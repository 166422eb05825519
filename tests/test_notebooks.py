import json
import re
import shutil
from pathlib import Path

import jupytext
import nbformat
import nibabel
import numpy as np
import pytest

from wmhlib import adapters, evaluation, methods, opening, search, splits, suite, training
from wmhlib.cohort import find_cases
from wmhlib.engine import WMHInferenceEngine
from wmhlib.errors import InputError
from wmhlib.files import read_table
from wmhlib.phantom import write_cohort
from wmhlib.workspace import RunFolder

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))
each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def tagged(cells, tag):
    return [number for number, cell in enumerate(cells) if tag in cell.metadata.get("tags", [])]


def test_the_suite_is_whole():
    assert tuple(path.stem for path in SOURCES) == (*suite.NOTEBOOKS, "06_predict", "07_compare", "08_distill", "09_stroke", "10_benchmark")


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
    assert all(p["inferred_type_name"] in ("str", "int", "float") and len(p["help"]) > 5 for p in found.values())


def test_a_run_leaves_every_file_it_promises(smoke_run):
    run, printed = smoke_run
    for path in (run.recipe_json, run.cohort_csv, run.split_csv, run.history_csv, run.best, run.search_csv, run.operating_point,
                 run.metrics_csv, run.manifest, run.checkpoints, run.figures / "predictions.png", run.figures / "training_curves.png",
                 run.figures / "bland_altman.png", *(run.path / f"{name}.csv" for name in evaluation.TABLES), *(run.notebooks / f"{name}.ipynb" for name in suite.NOTEBOOKS)):
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
    assert "Content-Security-Policy" in html and "bootstrap()" not in html and "run_dir" not in html and "colab-badge" not in html
    assert 'src="data:image/png' in html and "it/s]" not in html


def test_the_same_seed_gives_the_same_metrics(smoke_run, tmp_path):
    first, again = smoke_run[0], RunFolder(tmp_path / "again")
    again.path.mkdir()
    for path in (first.recipe_json, first.cohort_csv):
        shutil.copy(path, again.path)
    splits.deal(again, read_table(again.cohort_csv))
    training.fit(again, progress=False)
    engine, operating = WMHInferenceEngine.from_run(again), again.recipe().operating
    point = search.choose(*search.search(engine.cases(again, "val", False), operating), operating.prefer)
    evaluation.evaluate(engine.cases(again, "test", False), point, operating).write(again)
    assert again.metrics_csv.read_bytes() == first.metrics_csv.read_bytes()
    assert again.best.read_bytes() == first.best.read_bytes()


def test_predict_gives_scans_their_lesions_and_goes_on_after_a_bad_one(smoke_run, tmp_path, capsys):
    run, out = smoke_run[0], tmp_path / "out"
    flair = find_cases(run.path / "data").flair[0]
    arguments = ["predict", "--run", str(run.path), "--out", str(out), "--flair"]
    assert suite.main([*arguments, flair]) == 0
    assert " mL in " in capsys.readouterr().out
    mask_file, = out.rglob("*_space-FLAIR_label-WMH_mask.nii.gz")
    scan, mask = nibabel.load(flair), nibabel.load(mask_file)
    assert mask.shape == scan.shape and np.array_equal(mask.affine, scan.affine)
    assert {"dataset_description.json", "index.html", "report.html", "wmh_volumes.csv"} <= {path.name for path in out.iterdir()}
    (tmp_path / "bad.nii.gz").write_bytes(b"not a scan")
    assert suite.main([*arguments, f"{tmp_path / 'bad.nii.gz'} {flair}"]) == 1
    printed = capsys.readouterr()
    assert "bad failed" in printed.out and "done before" in printed.out and "1 of 2 scans failed" in printed.err


def test_other_labelled_cases_are_evaluated_without_training(smoke_run, tmp_path, capsys):
    run, data, out = smoke_run[0], tmp_path / "other", tmp_path / "out"
    write_cohort(data, 3, seed=7, scale=4.0, progress=False)
    assert suite.main(["evaluate", "--run", str(run.path), "--out", str(out), "--data", str(data)]) == 0
    metrics = read_table(out / "metrics.csv")
    assert metrics.case.nunique() == 3 and metrics.system.nunique() == 4 and "05_report.html" in capsys.readouterr().out
    page = (out / "notebooks" / "05_report.html").read_text()
    assert "No scan of the evaluated data was used for training" in page and "of sites that were trained or chosen on too" in page


def test_a_point_chosen_on_other_labelled_cases_goes_with_the_same_weights_and_is_reported(smoke_run, tmp_path, capsys):
    run, data, out = smoke_run[0], tmp_path / "other", RunFolder(tmp_path / "tuned")
    write_cohort(data, 3, seed=7, scale=4.0, progress=False)
    assert suite.main(["tune", "--run", str(run.path), "--out", str(out.path), "--data", str(data)]) == 0 and "04_search.html" in capsys.readouterr().out
    cases, mine, theirs = out.cases(), WMHInferenceEngine.from_run(out), WMHInferenceEngine.from_run(run)
    assert mine.model.fingerprint() == theirs.model.fingerprint() and (out.point()["n"], out.recipe().operating.prefer) == (3, "centre")
    assert set(cases.split) == {"train", "val"} and cases.case.is_unique and (cases.split == "val").sum() == 3
    assert set(run.seen().digest) < set(out.seen().digest) and not set(cases.digest) & set(out.earlier().digest)
    story = methods.Story.of(out, run, adapters.budget(mine.model))
    assert "6 synthetic cases, chosen on 3 real scans:" in story.card().loc["trained on"].item() and "On the 3 validation cases" in story.paragraph()
    for place, folder, reason in ((run.path / "data", out, "were used to train"), (data, run, "holds another run")):
        with pytest.raises(InputError, match=reason):
            opening.open_tuning(run, str(place), str(folder.path))


def test_a_notebook_that_stops_says_why_and_leaves_nothing(tmp_path, capsys):
    for arguments, reason in ((["--preset", "demi"], "unknown preset 'demi'"),
                              (["--preset", "colab", "--overrides", "encoder.random=true"], "set data_dir to your folder of cases"),
                              (["--preset", "colab"], "set medsam to 'zenodo'")):
        assert suite.main([*arguments, "--run", str(tmp_path / "run")]) == 1
        error = capsys.readouterr().err
        assert "01_download stopped" in error and reason in error and "Traceback" not in error
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["recipe.json"]


def test_a_batch_without_a_scan_is_an_error_that_names_the_file(smoke_run, tmp_path, capsys):
    (tmp_path / "scan.nii.gz").write_bytes(b"not a scan")
    arguments = ["predict", "--run", str(smoke_run[0].path), "--flair", str(tmp_path / "scan.nii.gz"), "--out", str(tmp_path / "out")]
    assert suite.main(arguments) == 1
    assert "scan.nii.gz" in capsys.readouterr().err and not list(tmp_path.rglob("*_mask*"))
