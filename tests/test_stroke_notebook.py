"""Runs on strokes end to end: notebook 09, and one network through the ordinary notebooks."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from wmhlib import compare, search, suite
from wmhlib.engine import WMHInferenceEngine
from wmhlib.errors import WMHError
from wmhlib.figures import save_figure
from wmhlib.files import read_table, write_atomic
from wmhlib.presets import preset
from wmhlib.volumes import load_case
from wmhlib.volumetric import study
from wmhlib.workspace import RunFolder

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
    curves = study.histories(study.systems(), 0, networks / "cells")
    assert exported.stem == study.best(curves)
    seen = read_table(networks / "overfitting.csv").set_index("system")
    for name, history in curves.groupby("system"):
        kept = history.loc[history.val_dice.idxmax()] if history.val_dice.notna().any() else history.iloc[-1]
        assert seen.epoch[name] == kept.epoch and seen.test_dice[name] == pytest.approx(scores[scores.system == name].dsc.mean(), rel=1e-5)  # tables keep six digits
    row = scores[scores.system == study.ENSEMBLE].iloc[0]
    cases = RunFolder(networks / "cases").cases().set_index("case")
    case = load_case(cases.flair[row.case], mask=cases["mask"][row.case], inputs=preset("stroke-smoke").inputs)
    members = [WMHInferenceEngine.from_run(compare.cell(networks / "cells", name, 0)) for name in study.systems()]
    mean = np.mean([engine.predict(case, use_tta=False).prob for engine in members], 0) >= 0.5
    assert row.result_ml == pytest.approx(mean.sum() * np.prod(case.volume.spacing) / 1000)
    page = (networks / "09_stroke.html").read_text()
    assert "T1w" in page and not re.search(r"(?<![\w-])FLAIR|white matter hyperint", re.sub(r"<style.*?</style>|src=\"data:[^\"]*\"", "", page, flags=re.S))


def test_networks_are_known_by_name_and_presets_have_a_plan():
    assert study.systems("mamba") == {"mamba": "volume.network=mamba"}
    with pytest.raises(study.RecipeError, match="known are attention, squeeze, mamba"):
        study.systems("unet")
    with pytest.raises(study.RecipeError, match="known are stroke"):
        study.plan("demo")


def test_the_best_network_is_that_of_the_highest_validation_dice():
    curves = pd.DataFrame({"system": ["a", "a", "b", "b", "c"], "val_dice": [0.2, 0.5, 0.6, 0.1, np.nan]})
    assert study.best(curves) == "b"


def test_what_would_fail_after_hours_is_refused_before(networks):
    run, named = RunFolder(networks / "cases"), study.systems()
    study.check_request(run, named, 2, "pt2 onnx", "split.protocol=leave-one-site-out split.held_out=R001")
    for folds, formats, overrides, message in ((1, "", "", "folds = 1"), (500, "", "", "do not fill 500 folds"), (0, "h5", "", "h5"), (0, "", "training.pace=3", "pace")):
        with pytest.raises(WMHError, match=message):
            study.check_request(run, named, folds, formats, overrides)


def test_every_network_of_a_recipe_counts_its_own_parameters():
    table = study.network_table(preset("stroke-smoke"), study.systems())
    counts = table["parameters"].str.replace(",", "").astype(int)
    assert counts.tolist() == [5_654_968, 7_741_128, 8_676_314]


def test_a_run_on_strokes_is_searched_and_reported_in_the_words_of_strokes(networks, tmp_path, capsys):
    run = RunFolder(compare.cell(networks / "cells", "attention", 0).path)
    point, validation = search.search(WMHInferenceEngine.from_run(run).cases(run, "val", False), run.recipe().operating)
    write_atomic(run.operating_point, json.dumps(search.choose(point, validation)))
    save_figure(Figure(), run.figures / "search_heatmap.png")
    page = suite.report(run).read_text()
    text = re.sub(r"<(style|script).*?</\1>|<[^>]*>", "", page, flags=re.S)
    assert "T1w z-score" in text and "attention gates" in text and "Tversky" in text and "synthetic T1w scans" in text
    assert not re.search(r"FLAIR|hyperintens|SAM's image encoder", text)
    metrics = read_table(run.metrics_csv)
    assert metrics.system.nunique() == 4 and set(metrics.case) == set(run.cases().query("split == 'test'").case)
