"""Charts of results show every case, name what they leave out, and hold for one case as for many."""

import warnings

import numpy as np
import pandas as pd
import pytest

from wmhlib import agreement, charts
from wmhlib.evaluation import SYSTEMS


def metrics(cases, sites=3):
    rng = np.random.default_rng(0)
    rows = [dict(case=f"c{i}", site=f"s{i % sites}", system=system, dsc=0.8 - 0.1 * k + 0.1 * rng.random(),
                 reference_ml=1.0 + 3 * i, result_ml=1.5 + 2.5 * i) for i in range(cases) for k, system in enumerate(SYSTEMS)]
    return pd.DataFrame(rows)


def lesions(cases):
    return pd.DataFrame([dict(case=f"c{i}", site="s", kind=kind, volume_mm3=volume, hit=volume > 50, zone="")
                         for i in range(cases) for kind in ("reference", "result") for volume in (5.0, 60.0, 300.0)],
                        columns=["case", "site", "kind", "volume_mm3", "hit", "zone"])


def zones(cases):
    return pd.DataFrame([dict(case=f"c{i}", site="s", zone=zone, dsc=0.5 + 0.1 * k) for i in range(cases)
                         for k, zone in enumerate(("periventricular", "deep"))], columns=["case", "site", "zone", "dsc"])


def calibration(cases):
    return pd.DataFrame([dict(case=f"c{i}", bin=b, voxels=100, probability=100 * (b + 0.5) / 15, lesion=5 * b, squared=10.0)
                         for i in range(cases) for b in (0, 3, 14)])


def uncertainty(cases):
    return pd.DataFrame([dict(case=f"c{i}", dsc=0.9 - 0.05 * i, uncertainty=0.1 + 0.05 * i, unsure=i > 2) for i in range(cases)])


def agreement_chart(cases, sites=3):
    own = metrics(cases, sites)[::len(SYSTEMS)]
    return charts.bland_altman_figure(own.reference_ml, own.result_ml, own.site)


CHARTS = {"agreement": agreement_chart, "sites": lambda n, sites=3: charts.site_figure(metrics(n, sites)),
          "strata": lambda n, sites=3: charts.strata_figure(metrics(n), lesions(n), zones(n)),
          "calibration": lambda n, sites=3: charts.calibration_figure(calibration(n)),
          "uncertainty": lambda n, sites=3: charts.uncertainty_figure(uncertainty(n), dict(unsure_above=0.3, poor_below=0.7))}


def points(ax):
    """How many cases an axis shows as separate symbols."""
    return sum(len(line.get_xdata()) for line in ax.lines if line.get_linestyle() == "None")


def words(fig):
    return [text.get_text() for ax in fig.axes for text in (*ax.texts, ax.title, ax._left_title)]


@pytest.mark.parametrize("cases, sites", [(1, 1), (3, 2), (20, 8)])
@pytest.mark.parametrize("name", CHARTS)
def test_every_chart_draws_without_a_warning_and_without_overlapping_words(name, cases, sites):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fig = CHARTS[name](cases, sites)
        fig.draw_without_rendering()
    for ax in fig.axes:
        boxes = [text.get_window_extent() for text in (*ax.texts, *ax.get_yticklabels()) if text.get_text()]
        shown = [box for box in boxes if ax.bbox.y0 - 1 < (box.y0 + box.y1) / 2 < ax.bbox.y1 + 1]
        assert not [pair for i, pair in enumerate(shown) if pair.count_overlaps(shown[i + 1:])]


def test_labels_of_narrow_limits_within_wide_bands_lie_apart():
    fig = charts.bland_altman_figure([10, 20], [11, 21.5], ["a", "a"])
    fig.draw_without_rendering()
    for ax in fig.axes[2:]:
        boxes = [text.get_window_extent() for text in ax.texts]
        assert len(boxes) == 3 and not [box for i, box in enumerate(boxes) if box.count_overlaps(boxes[i + 1:])]


def test_agreement_shows_every_case_and_its_bands_span_the_intervals():
    own = metrics(9)[::len(SYSTEMS)]
    scatter, _, in_ml, as_ratio = charts.bland_altman_figure(own.reference_ml, own.result_ml, own.site).axes
    assert [points(ax) for ax in (scatter, in_ml, as_ratio)] == [9, 9, 9]
    for ax, change in ((in_ml, np.asarray), (as_ratio, np.log2)):
        found = agreement.bland_altman(change(own.reference_ml), change(own.result_ml))
        bands = [(patch.get_y(), patch.get_y() + patch.get_height()) for patch in ax.patches]
        np.testing.assert_allclose(bands, [found[name + "_ci"] for name in ("loa_high", "bias", "loa_low")])


def test_a_result_of_half_the_volume_everywhere_has_a_ratio_of_one_half():
    volume = np.array([1.0, 5, 10, 20])
    fig = charts.bland_altman_figure(volume, volume / 2 * [1.1, 1 / 1.1, 1.1, 1 / 1.1], list("aabb"))
    assert "bias\nx 0.5" in words(fig)


def test_no_two_of_many_sites_look_alike():
    scatter = agreement_chart(30, sites=15).axes[0]
    looks = [(line.get_color(), line.get_marker()) for line in scatter.lines if line.get_linestyle() == "None"]
    assert len(set(looks)) == len(looks) == 15


def test_volumes_of_zero_are_left_out_of_the_log_panel_and_said():
    fig = charts.bland_altman_figure([0.0, 5, 10, 20], [1.0, 0, 11, 19], list("aabb"))
    assert [points(ax) for ax in fig.axes] == [4, 0, 4, 2]
    assert any("(a volume of 0 mL): 2 of 4" in text for text in words(fig))


def test_sites_show_each_case_of_each_system_and_say_their_means():
    table = metrics(11, sites=2)
    fig = charts.site_figure(table)
    assert points(fig.axes[0]) == len(table) and len(fig.axes[0].texts) == 2 * len(SYSTEMS)
    mean = table[(table.system == SYSTEMS[0]) & (table.site == "s0")].dsc.mean()
    assert words(fig)[0].startswith(f"{mean:.2f} [") and words(fig)[0].endswith("n = 6")


def test_strata_leave_out_zones_where_no_case_has_any():
    assert len(charts.strata_figure(metrics(6), lesions(6), zones(6)).axes) == 3
    fig = charts.strata_figure(metrics(6), lesions(0), zones(0))
    assert len(fig.axes) == 2 and "-, n = 0" in words(fig)


def test_calibration_puts_each_filled_bin_where_its_voxels_lie():
    ax, strip = charts.calibration_figure(calibration(4)).axes
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0.5 / 15, 0], [3.5 / 15, 0.15], [14.5 / 15, 0.7]])
    assert [patch.get_height() for patch in strip.patches] == [400, 400, 400]


def test_uncertainty_rings_and_names_the_worst_cases_and_draws_both_limits():
    fig = charts.uncertainty_figure(uncertainty(6), dict(unsure_above=0.22, poor_below=0.7))
    ax = fig.axes[0]
    ringed = next(line for line in ax.lines if line.get_markersize() == 12)
    assert sorted(ringed.get_ydata()) == pytest.approx([0.65, 0.7, 0.75])
    assert any("c5 0.65, c4 0.70, c3 0.75" in text for text in words(fig))
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert labels == ["sure (3)", "flagged as unsure (3)", "limit 0.22", "poor: Dice below 0.70"]
