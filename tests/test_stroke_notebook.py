"""Runs on strokes end to end: notebook 09, and one network through the ordinary notebooks."""

import re

import numpy as np
import pytest

from wmhlib import suite
from wmhlib.presets import preset
from wmhlib.volumetric import study
from wmhlib.workspace import RunFolder, read_table

TINY = "training.epochs=1 training.warmup_epochs=0 volume.patches=1"


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """What notebook 09 leaves at toy size, with two folds of the best network."""
    out = tmp_path_factory.mktemp("stroke")
    assert suite.main(["stroke", "--preset", "stroke-smoke", "--out", str(out), "--overrides", TINY, "--folds", "2"]) == 0
    return out


def test_notebook_09_compares_three_networks_with_their_ensemble_and_over_folds(networks):
    for name in ("tokens.csv", "tokens.png", "speed.csv", "overfitting.csv", "curves.png", "scores.csv", "tests.csv", "bland_altman.png", "folds.csv", "09_stroke.html"):
        assert (networks / name).exists(), name
    scores, folds = read_table(networks / "scores.csv"), read_table(networks / "folds.csv")
    assert scores.system.unique().tolist() == [*study.systems(), study.ENSEMBLE] and scores.groupby("system").size().nunique() == 1
    assert scores[["reference_ml", "result_ml"]].notna().all(None) and set(read_table(networks / "overfitting.csv").system) == set(study.systems())
    whole = folds[folds.system == "all cases"]
    assert whole.case.is_unique and set(whole.case) == set(read_table(networks / "cases" / "cohort.csv").case)
    exported, = networks.glob("*.pt2")
    assert exported.stem in study.systems()
    page = (networks / "09_stroke.html").read_text()
    assert "T1w" in page and not re.search(r"(?<![\w-])FLAIR|white matter hyperint", re.sub(r"<style.*?</style>|src=\"data:[^\"]*\"", "", page, flags=re.S))


def test_networks_are_known_by_name_and_presets_have_a_plan():
    assert study.systems("mamba") == {"mamba": "volume.network=mamba"}
    with pytest.raises(study.RecipeError, match="known are attention, squeeze, mamba"):
        study.systems("unet")
    with pytest.raises(study.RecipeError, match="known are stroke"):
        study.plan("demo")


def test_every_network_of_a_recipe_counts_its_own_parameters():
    table = study.network_table(preset("stroke-smoke"), study.systems())
    counts = table["parameters"].str.replace(",", "").astype(int)
    assert counts.is_unique and np.all((4e6 < counts) & (counts < 11e6))


def test_a_run_on_strokes_goes_through_the_ordinary_notebooks_in_the_words_of_strokes(networks, tmp_path, capsys):
    run = RunFolder(tmp_path / "run").open(preset("stroke-smoke", TINY + " seed=42")).take_cases(RunFolder(networks / "cases"))
    for name in suite.NOTEBOOKS[2:]:
        suite.execute(name, run.notebooks / f"{name}.ipynb", {"preset": "stroke-smoke", "run_dir": str(run.path)})
    page = "\n".join(output.get("data", {}).get("text/markdown", "") for cell in __import__("nbformat").read(run.notebooks / "05_report.ipynb", 4).cells
                     for output in cell.get("outputs", []))
    assert "T1w z-score" in "".join(suite.pages.export_html(run.notebooks / "05_report.ipynb", tmp_path / "page.html").read_text())
    assert "attention gates" in page and "Tversky" in page and "FLAIR" not in page and "hyperintens" not in page
    assert read_table(run.metrics_csv).system.nunique() == 4
