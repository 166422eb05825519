"""Scores and tables by hand; figures show what they claim, the right way round; the same figure gives the same
bytes."""

import numpy as np
import pandas as pd
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from wmhlib import report
from wmhlib.search import choose, search
from wmhlib.settings import Operating

POINT = dict(threshold=0.4, min_voxels=3, tta=True, zscore_threshold=2.0)


def case(name="Utrecht_1", site="Utrecht", lesions=True, codes="RAS"):
    """A disc of brain, a lesion on the patient's right and label 2 on the left, at 62 mm; stored along `codes`."""
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
                reference=reference, prob=prob, prob_tta=prob)


@pytest.fixture(scope="module")
def scored():
    names = ("Utrecht_0", "Utrecht_1", "Utrecht_2", "Singapore_0", "Singapore_1")
    cases = (case(name, name[:-2], lesions=name != "Singapore_1") for name in names)
    return report.score_cases(cases, POINT)


def test_three_systems_are_scored_on_each_case(scored):
    metrics, gallery = scored
    first = metrics[metrics.case == "Utrecht_0"].set_index("system")
    assert list(first.index) == list(report.SYSTEMS) and len(metrics) == 15 and len(gallery) == 5
    assert first.dsc.tolist() == [1, 0, 1]
    assert first.reference_ml.tolist() == pytest.approx([0.027] * 3)
    assert first.result_ml.tolist() == pytest.approx([0.027, 0, 0.027]), "other pathology is in neither volume"


def test_results_table_states_intervals_and_what_was_left_out(scored):
    table = report.results_table(scored[0])
    assert table.loc["operating point", "dsc"] == "1.00 [1.00, 1.00]" and table.loc["operating point", "n"] == 5
    assert table.loc["operating point", "left out"] == "dsc 1, hd95 1, avd 1"
    assert report.results_table(scored[0].iloc[:3]).loc["operating point", "dsc"] == "1.00"
    lines = report.results_text(scored[0]).splitlines()
    assert len(lines) == 5 and all(line.startswith(s) for line, s in zip(lines[2:], report.SYSTEMS))


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "ASL"])
def test_slices_show_the_patients_right_on_the_left_whatever_the_orientation(codes):
    item = case(codes=codes)
    row = report.gallery_row(item, item["prob"] > 0.4, 0.9)
    expected = report.gallery_row(case(), case()["prob"] > 0.4, 0.9)
    rows, columns = np.nonzero(row["reference"] == 1)
    assert columns.mean() < row["reference"].shape[1] / 2 < np.nonzero(row["reference"] == 2)[1].mean()
    assert row["z_mm"] == pytest.approx(62) and row["spacing"] == (1, 1)
    np.testing.assert_array_equal(row["flair"], expected["flair"])


def test_anterior_is_up():
    item = case()
    item["reference"][:] = 0
    item["reference"][20, 40, 4] = 1
    row = report.gallery_row(item, item["prob"] > 0.4, 0.0)
    assert np.nonzero(row["reference"])[0].item() < row["reference"].shape[0] / 2


def test_predictions_figure_shows_best_median_and_worst(scored):
    gallery = [row | dict(dsc=d) for row, d in zip(scored[1], (0.5, 0.9, np.nan, 0.7, 0.6))]
    rows = report.best_median_worst(gallery)
    assert [(row["rank"], row["dsc"]) for row in rows] == [("best", 0.9), ("median", 0.6), ("worst", 0.5)]
    fig = report.predictions_figure(rows)
    titles = [ax.get_title() for ax in fig.axes]
    assert len(titles) == 12 and titles[:4] == ["FLAIR", "ground truth", "prediction", "error map"]
    assert len(report.best_median_worst(gallery[:1])) == 1 and report.best_median_worst(gallery[2:3]) == []


def test_search_heatmap_marks_the_choice():
    table = search([case(f"c{i}") for i in range(3)], Operating(thresholds=(0.2, 0.4, 0.6), sizes=(1, 3)))
    chosen = choose(table)
    fig = report.search_heatmap(table, chosen)
    star = [line for ax in fig.axes for line in ax.lines if line.get_marker() == "*"]
    assert len(star) == 1 and star[0].axes is fig.axes[int(chosen["tta"])]
    cell = (0.2, 0.4, 0.6).index(chosen["threshold"]), (1, 3).index(chosen["min_voxels"])
    assert (star[0].get_xdata()[0], star[0].get_ydata()[0]) == cell


def test_bland_altman_figure_shows_every_case():
    reference, site = np.array([1.0, 5, 10, 20]), ["a", "a", "b", "b"]
    scatter, agreement = report.bland_altman_figure(reference, reference + [0, 1, 0, 1], site).axes
    points = [line for line in agreement.lines if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in points) == 4 and len(agreement.patches) == 3
    assert {text.get_text() for text in scatter.get_legend().get_texts()} == {"identity", "a (2)", "b (2)"}
    assert len(report.bland_altman_figure([1.0], [2.0], ["a"]).axes) == 2


def test_other_figures_hold_their_cases(scored):
    losses = dict(train_loss=[1, 0.5], val_loss=[1, 0.6])
    history = pd.DataFrame(dict(epoch=[1, 2], lr=[1e-3, 1e-4], val_dice=[0.3, 0.6], **losses))
    assert [len(ax.lines) for ax in report.training_curves(history).axes] == [2, 0, 2, 1]
    sides = ["train", "val", "test", "train"]
    split = pd.DataFrame(dict(case=list("abcd"), site=list("xxyy"), split=sides, lesion_ml=[0.0, 1, 2, 30]))
    assert sum(len(line.get_xdata()) for line in report.split_figure(split).axes[0].lines) == 4
    assert len(report.cohort_figure([case(), case(codes="PIR")], slices=3).axes) == 6
    assert len(report.site_figure(scored[0]).axes) == 1
    item = case()
    for mask, spread, panels in ((item["prob"] > 0.4, item["prob"], 4 * 5 + 2), (item["prob"] > 1, None, 3 * 5 + 1)):
        assert len(report.overlay_figure(item["flair"], mask, item["prob"], spread, item["affine"]).axes) == panels


def test_the_same_figure_gives_the_same_bytes(tmp_path, scored):
    paths = [report.save_figure(report.site_figure(scored[0]), tmp_path / name) for name in ("a.png", "b.png")]
    first, second = (path.read_bytes() for path in paths)
    assert first == second and b"Software" not in first
    assert report.site_figure(scored[0])._repr_png_().startswith(b"\x89PNG")


def test_captions_name_the_data_and_what_good_looks_like():
    text = report.caption("predictions", data="synthetic cases", n=9)
    assert "9 synthetic cases" in text and "Good:" in text
