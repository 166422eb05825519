"""Tables ready to read, by hand; captions."""

import numpy as np
import pandas as pd

from wmhlib import captions, figures, report
from wmhlib.workspace import RunFolder


def test_results_table_states_intervals_and_what_was_left_out(scored):
    table = report.results_table(scored[0])
    assert table.loc["operating point", ["Dice", "lesion recall"]].tolist() == ["1.00", "1.00 [1.00, 1.00]"] and table.loc["operating point", "n"] == 5
    assert table.loc["operating point", "left out"] == "Dice 1, HD95 (mm) 1, AVD (%) 1"
    assert report.results_table(scored[0].iloc[:4]).loc["operating point", "Dice"] == "1.00"
    lines = report.as_text(table).splitlines()
    assert len(lines) == 6 and all(line.startswith(s) for line, s in zip(lines[2:], report.SYSTEMS))


def test_groups_are_those_of_the_operating_point(scored):
    own = scored[0][scored[0].system == "operating point"]
    assert report.group_table(own, "site").n.to_dict() == {"Utrecht": 3, "Singapore": 2}
    assert report.group_table(own, "burden").n.sum() == 5


def test_an_interval_is_written_only_where_there_is_one():
    assert report.interval(0.5, 0.25, 0.75, 2) == "0.50 [0.25, 0.75]"
    assert report.interval(0.5, np.nan, np.nan, 1) == "0.5" and report.interval(np.nan, np.nan, np.nan, 1) == "-"
    assert report.interval(-0.001, -1, 1, 1, "+") == "+0.0 [-1.0, +1.0]", "nothing has no minus"


def test_pairs_are_tested_where_there_are_enough():
    rng = np.random.default_rng(0)
    dice = {"operating point": np.full(12, 0.8), "network at 0.5": 0.7 + 0.01 * rng.random(12), "FLAIR z-score": np.full(12, 0.8)}
    metrics = pd.DataFrame([dict(case=i, system=s, dsc=d) for s, values in dice.items() for i, d in enumerate(values)])
    table = report.paired_table(metrics)
    assert table.loc["network at 0.5", "p"] == "< 0.001" and table.loc["network at 0.5", "Dice gained"].startswith("+0.09")
    assert table.loc["FLAIR z-score", ["Dice gained", "p", "p (Holm)"]].tolist() == ["+0.000 [+0.000, +0.000]", "-", "-"]


def test_what_sees_the_reference_is_shown_and_not_tested(scored):
    metrics = scored[0]
    told = metrics[metrics.system == "network at 0.5"].assign(system=report.ZERO_SHOT, dsc=1.0)
    both = pd.concat([metrics, told])
    assert list(report.results_table(both).index) == [*report.SYSTEMS, "zero-shot, true boxes"]
    pd.testing.assert_frame_equal(report.paired_table(both), report.paired_table(metrics))


def test_volumes_have_both_r2_and_both_icc(scored):
    own = scored[0].query("system == 'operating point'")
    table = report.volume_table(own)
    assert {"R2 about identity", "R2 of the fit", "ICC(2,1)", "ICC(3,1)"} <= set(table.index)
    assert table.loc["n"].tolist() == [5, 4, 4] and table.loc["bias", "mL"] == "0.00 [0.00, 0.00]"


def test_every_case_shows_its_flag(evaluated):
    own = evaluated.metrics.query("system == 'operating point'")
    table = report.case_table(own, evaluated.uncertainty.assign(unsure=[True] + [False] * 4))
    assert table.unsure.tolist() == ["unsure", "", "", "", ""] and len(table) == 5 and "Dice" in table


def test_the_flag_is_judged_by_the_limit_of_the_point(evaluated):
    flags = evaluated.uncertainty.assign(unsure=[True, False, False, False, False], dsc=[0.1, 0.9, 0.9, 0.9, np.nan])
    table = report.flag_table(flags, dict(poor_below=0.5))
    assert table.loc["sensitivity"].tolist()[1] == "1 of 1" and table.loc["specificity", "value"].startswith("1.00 [")


def test_a_figure_is_kept_and_shown_with_its_caption(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *things: shown.extend(things))
    figure = figures.training_curves(pd.DataFrame({"epoch": [1, 2], "train_loss": [2.0, 1.0], "lr": [0.1, 0.1]}))
    report.show(figure, RunFolder(tmp_path), "training_curves", "synthetic cases", 3)
    assert (tmp_path / "figures" / "training_curves.png").stat().st_size > 1000
    report.tell(pd.DataFrame(), "zones", "real scans", 4)
    report.tell(pd.DataFrame({"n": [4]}), "results", "real scans", 4)
    assert len(shown) == 4 and shown[0] is figure and "3 synthetic cases" in shown[1].data and "4 real scans" in shown[3].data


def test_captions_of_figures_name_the_data_and_what_good_looks_like():
    tables = {"groups", "sizes", "zones", "cases"}
    texts = {name: report.caption(name, "synthetic cases", 9) for name in captions.CAPTIONS}
    assert all("Good:" in text or name in tables for name, text in texts.items())
    assert all("9 synthetic cases" in " ".join(text.split()) or name in ("zones", "overlay") for name, text in texts.items())


def test_zones_have_dice_recall_and_volumes(evaluated):
    zones = pd.DataFrame([dict(case="a", zone=z, dsc=d, reference_ml=2.0, result_ml=1.0) for z, d in (("periventricular", np.nan), ("deep", 0.5))])
    lesions = pd.DataFrame([dict(case="a", kind="reference", zone="deep", hit=hit) for hit in (True, False)])
    table = report.zone_table(zones, lesions)
    assert table["left out"].to_dict() == {"periventricular": 1, "deep": 0} and table.loc["periventricular", "Dice"] == "-"
    assert table.loc["deep", ["n", "Dice", "reference lesions", "found", "result (mL)"]].tolist() == [1, "0.50", 2, 1, "1.00"]
    assert report.zone_table(evaluated.zones, evaluated.lesions).empty
