"""Figures show what they claim, the right way round; the same figure gives the same bytes."""

import numpy as np
import pandas as pd
import pytest

from wmhlib import figures, report
from wmhlib.errors import InputError
from wmhlib.search import choose, search
from wmhlib.settings import Operating


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "ASL"])
def test_slices_show_the_patients_right_on_the_left_whatever_the_orientation(disc_case, codes):
    item = disc_case(codes=codes)
    row = report.gallery_row(item, item["prob"] > 0.4, 0.9)
    expected = report.gallery_row(disc_case(), disc_case()["prob"] > 0.4, 0.9)
    rows, columns = np.nonzero(row["reference"] == 1)
    assert columns.mean() < row["reference"].shape[1] / 2 < np.nonzero(row["reference"] == 2)[1].mean()
    assert row["z_mm"] == pytest.approx(62) and row["spacing"] == (1, 1)
    np.testing.assert_array_equal(row["flair"], expected["flair"])


def test_anterior_is_up(disc_case):
    item = disc_case()
    item["reference"][:] = 0
    item["reference"][20, 40, 4] = 1
    row = report.gallery_row(item, item["prob"] > 0.4, 0.0)
    assert np.nonzero(row["reference"])[0].item() < row["reference"].shape[0] / 2


def test_predictions_figure_shows_four_panels_a_case(scored):
    titles = [ax.get_title() for ax in figures.predictions_figure(scored[1][:3]).axes]
    assert len(titles) == 12 and titles[:4] == ["FLAIR", "ground truth", "prediction", "error map"]


def test_predictions_of_no_case_are_an_error():
    with pytest.raises(InputError, match="no predictions to show"):
        figures.predictions_figure([])


def test_search_heatmap_marks_the_choice(disc_case):
    table = search([disc_case(f"c{i}") for i in range(3)], Operating(thresholds=(0.2, 0.4, 0.6), sizes=(1, 3)))
    chosen = choose(table)
    fig = figures.search_heatmap(table, chosen)
    star = [line for ax in fig.axes for line in ax.lines if line.get_marker() == "*"]
    assert len(star) == 1 and star[0].axes is fig.axes[int(chosen["tta"])]
    cell = (0.2, 0.4, 0.6).index(chosen["threshold"]), (1, 3).index(chosen["min_voxels"])
    assert (star[0].get_xdata()[0], star[0].get_ydata()[0]) == cell


def test_bland_altman_figure_shows_every_case():
    reference, site = np.array([1.0, 5, 10, 20]), ["a", "a", "b", "b"]
    scatter, agreement = figures.bland_altman_figure(reference, reference + [0, 1, 0, 1], site).axes
    points = [line for line in agreement.lines if line.get_linestyle() == "None"]
    assert sum(len(line.get_xdata()) for line in points) == 4 and len(agreement.patches) == 3
    assert {text.get_text() for text in scatter.get_legend().get_texts()} == {"identity", "a (2)", "b (2)"}
    assert len(figures.bland_altman_figure([1.0], [2.0], ["a"]).axes) == 2


def test_other_figures_hold_their_cases(disc_case, scored):
    losses = dict(train_loss=[1, 0.5], val_loss=[1, 0.6])
    history = pd.DataFrame(dict(epoch=[1, 2], lr=[1e-3, 1e-4], val_dice=[0.3, 0.6], **losses))
    assert [len(ax.lines) for ax in figures.training_curves(history).axes] == [2, 0, 2, 1]
    sides = ["train", "val", "test", "train"]
    split = pd.DataFrame(dict(case=list("abcd"), site=list("xxyy"), split=sides, lesion_ml=[0.0, 1, 2, 30]))
    assert sum(len(line.get_xdata()) for line in figures.split_figure(split).axes[0].lines) == 4
    assert len(figures.cohort_figure([disc_case(), disc_case(codes="PIR")], slices=3).axes) == 6
    assert len(figures.site_figure(scored[0]).axes) == 1
    item = disc_case()
    for mask, spread, panels in ((item["prob"] > 0.4, item["prob"], 4 * 5 + 2), (item["prob"] > 1, None, 3 * 5 + 1)):
        assert len(figures.overlay_figure(item["flair"], mask, item["prob"], spread, item["affine"]).axes) == panels


def test_the_same_figure_gives_the_same_bytes(tmp_path, scored):
    paths = [figures.save_figure(figures.site_figure(scored[0]), tmp_path / name) for name in ("a.png", "b.png")]
    first, second = (path.read_bytes() for path in paths)
    assert first == second and b"Software" not in first
    assert figures.site_figure(scored[0])._repr_png_().startswith(b"\x89PNG")
