"""Figures show what they claim, the right way round; the same figure gives the same bytes."""

import numpy as np
import pandas as pd
import pytest

from wmhlib import figures
from wmhlib.errors import InputError
from wmhlib.evaluation import gallery_row
from wmhlib.search import plateau


@pytest.fixture
def grid():
    """A search table over two units of size, three thresholds and two sizes, best at 0.4 with TTA."""
    rows = [dict(threshold=t, size=size, unit=unit, tta=tta, n=3, nans=0, dsc=0.8 - abs(t - 0.4) + 0.1 * tta - 0.001 * size)
            for unit, sizes in (("voxels", (1.0, 3.0)), ("mm3", (0.0, 9.0))) for tta in (False, True) for t in (0.2, 0.4, 0.6)
            for size in sizes]
    return pd.DataFrame(rows).assign(**{f"dsc c{i}": lambda table, i=i: table.dsc + 0.01 * (i - 1) for i in range(3)}, se=0.01)


def symbols(fig, marker):
    """Panel, column and row of each heat-map symbol."""
    return [(fig.axes.index(ax), line.get_xdata()[0], line.get_ydata()[0]) for ax in fig.axes for line in ax.lines
            if line.get_marker() == marker]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "ASL"])
def test_slices_show_the_patients_right_on_the_left_whatever_the_orientation(disc_case, codes):
    item = disc_case(codes=codes)
    row = gallery_row(item, item["prob"] > 0.4, 0.9)
    expected = gallery_row(disc_case(), disc_case()["prob"] > 0.4, 0.9)
    rows, columns = np.nonzero(row["reference"] == 1)
    assert columns.mean() < row["reference"].shape[1] / 2 < np.nonzero(row["reference"] == 2)[1].mean()
    assert row["z_mm"] == pytest.approx(62) and row["spacing"] == (1, 1)
    np.testing.assert_array_equal(row["flair"], expected["flair"])


def test_anterior_is_up(disc_case):
    item = disc_case()
    item["reference"][:] = 0
    item["reference"][20, 40, 4] = 1
    row = gallery_row(item, item["prob"] > 0.4, 0.0)
    assert np.nonzero(row["reference"])[0].item() < row["reference"].shape[0] / 2


def test_predictions_figure_names_each_case_and_its_five_panels(disc_case):
    row = gallery_row(disc_case(), disc_case()["prob"] > 0.4, 0.9)
    fig = figures.predictions_figure([row | dict(rank="best", reference_ml=2.0, result_ml=1.5), row])
    texts = [[text.get_text() for text in ax.texts] for ax in fig.axes]
    assert [names[0] for names in texts] == ["FLAIR", "ground truth", "prediction", "error map", "entropy"] * 2
    assert "best: Utrecht_1 (Dice 0.90; reference 2.0 mL, result 1.5 mL; z = 62 mm)" in texts[0]
    assert "Utrecht_1 (Dice 0.90; z = 62 mm)" in texts[5] and {"R", "L", "20 mm"} <= set(texts[5])
    assert fig.legends[0].get_texts()[-1].get_text() == "other pathology, not scored"


@pytest.mark.parametrize("place", [(28, 20, 4), (20, 4, 4), (4, 24, 4)])
def test_the_close_ups_hold_all_lesions_in_the_slices_own_proportions(disc_case, place):
    item = disc_case()
    item["reference"][place] = 1
    row = gallery_row(item, item["prob"] > 0.4, 0.9)
    whole, *close = figures.predictions_figure([row]).axes
    (left, right), (bottom, top) = close[0].get_xlim(), close[0].get_ylim()
    rows, columns = np.nonzero(row["reference"] == 1)
    assert left < columns.min() and columns.max() < right and top < rows.min() and rows.max() < bottom
    height, width = row["flair"].shape
    assert (bottom - top) / (right - left) == pytest.approx(height / width)
    assert all(ax.get_xlim() == (left, right) and ax.get_ylim() == (bottom, top) for ax in close)
    frame = whole.patches[0].get_bbox()
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == pytest.approx((left, right, top, bottom))


def test_predictions_of_no_case_are_an_error():
    with pytest.raises(InputError, match="no predictions to show"):
        figures.predictions_figure([])


@pytest.mark.parametrize("point, cell", [(dict(threshold=0.4, min_voxels=1, min_mm3=9.0, tta=True), (3, 1, 1)),
                                         (dict(threshold=0.6, min_voxels=3, min_mm3=0.0, tta=False), (0, 2, 1))])
def test_search_heatmap_marks_the_choice_and_the_recipes_point_in_their_cells(grid, point, cell):
    fig = figures.search_heatmap(grid, point, dict(threshold=0.2, min_voxels=1, tta=True))
    assert symbols(fig, "*") == [cell] and symbols(fig, "D") == [(1, 0, 0)]
    assert not symbols(figures.search_heatmap(grid, point), "D")


def test_search_heatmap_outlines_the_plateau_alone(grid):
    fig = figures.search_heatmap(grid, dict(threshold=0.4, min_voxels=1, min_mm3=0.0, tta=True))
    found = set(map(tuple, grid[plateau(grid)][["unit", "tta"]].to_numpy()))
    panels = [(unit, tta) for unit in ("voxels", "mm3") for tta in (False, True)]
    assert {panel for panel, ax in zip(panels, fig.axes) if any(len(c.get_segments()) for c in ax.collections)} == found


def test_other_figures_hold_their_cases(disc_case):
    losses = dict(train_loss=[1, 0.5], val_loss=[1, 0.6], focal=[1, 0.5], tissue=[1, 0.5])
    history = pd.DataFrame(dict(epoch=[1, 2], lr=[1e-3, 1e-4], val_dice=[0.3, 0.6], **losses))
    assert [len(ax.lines) for ax in figures.training_curves(history).axes] == [2, 2, 2, 1]
    sides = ["train", "val", "test", "train"]
    split = pd.DataFrame(dict(case=list("abcd"), site=list("xxyy"), split=sides, lesion_ml=[0.0, 1, 2, 30]))
    assert sum(len(line.get_xdata()) for line in figures.split_figure(split).axes[0].lines) == 4
    assert len(figures.cohort_figure([disc_case(), disc_case(codes="PIR")], slices=3).axes) == 6
    item = disc_case()
    for mask in (item["prob"] > 0.4, item["prob"] > 1):
        assert len(figures.overlay_figure(item["flair"], mask, item["prob"], item["prob"], item["affine"]).axes) == 4 * 5 + 2


def test_the_same_figure_gives_the_same_bytes(tmp_path, grid):
    def make():
        return figures.search_heatmap(grid, dict(threshold=0.4, min_voxels=1, min_mm3=0.0, tta=True))

    first, second = (figures.save_figure(make(), tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second and b"Software" not in first and make()._repr_png_() == first


def test_a_scan_of_one_slice_without_a_lesion_has_an_overlay():
    flair = np.random.default_rng(0).random((24, 28, 1)).astype(np.float32)
    figure = figures.overlay_figure(flair, np.zeros(flair.shape, bool), 0 * flair, 0 * flair, np.eye(4))
    assert len([ax for ax in figure.axes if ax.get_title().startswith("z = ")]) == 1
