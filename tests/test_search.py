"""The fast grid against naive loops, to the last digit; cases in a stream; what is refused; plateaus preferred to spikes; the z-score baseline."""

import json
import weakref

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from wmhlib import InputError, metrics
from wmhlib.metrics import challenge_scores, smallest
from wmhlib.search import PER_CASE, ZSCORES, choose, compare, plateau, search
from wmhlib.sections import Operating
from wmhlib.uncertainty import unsure_limit

OPERATING = Operating(thresholds=(0.2, 0.5, 0.8), sizes=(1, 3, 8), sizes_mm3=(5.0, 7.0, 20.0))


def case(seed, split="val", empty=False):
    """Random smooth probabilities about a random reference with some other pathology."""
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(24, 20, 8)), 1)
    noisy = smooth + 0.15 * rng.normal(size=smooth.shape)
    reference = (smooth > 0.3).astype(np.uint8)
    reference[:6, :6] *= 2
    prob = np.round(1 / (1 + np.exp(-12 * (noisy - 0.25))), 1).astype(np.float32)  # values at the thresholds among them
    return dict(case=f"c{seed}", split=split, spacing=(1, 1, 3), reference=reference * (not empty), prob=prob,
                prob_tta=np.minimum(prob, prob[::-1]), flair_z=(4 * noisy).astype(np.float32),
                inner=np.ones(reference.shape, bool))


def naive_dice(item, threshold, size, unit, tta):
    labels, _ = ndimage.label(item["prob_tta" if tta else "prob"] >= threshold, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel()) * (np.prod(item["spacing"]) if unit == "mm3" else 1)
    result = (labels > 0) & (sizes[labels] >= size)
    return challenge_scores(item["reference"], result, item["spacing"])["dsc"]


def test_grid_equals_the_naive_loop():
    cases = [case(0), case(1) | dict(spacing=(0.9, 0.9, 1.1)), case(2, empty=True)]
    table, _ = search(iter(cases), OPERATING)
    assert len(table) == 4 * 6 * 2  # the recipe's threshold of 0.6 joins the three
    for row in table.to_dict("index").items():
        expected = [naive_dice(c, *(row[1][k] for k in ("threshold", "size", "unit", "tta"))) for c in cases]
        found = table.loc[row[0], [PER_CASE + c["case"] for c in cases]].astype(float)
        np.testing.assert_allclose(found, expected, atol=1e-12, rtol=0)
        assert row[1]["dsc"] == pytest.approx(np.nanmean(expected), abs=1e-12)
        assert row[1]["se"] == pytest.approx(np.nanstd(expected, ddof=1) / np.sqrt(row[1]["n"]), abs=1e-12)


def naive_dice_grid(prob, lesion, ignored, thresholds, sizes):
    """Dice, thresholds x sizes (voxels): each point labels its mask anew and drops small components one by one."""
    dice = np.full((len(thresholds), len(sizes)), np.nan)
    for i, threshold in enumerate(thresholds):
        for j, size in enumerate(sizes):
            result = prob >= threshold
            labels, count = ndimage.label(result, np.ones((3, 3, 3)))
            for number in range(1, count + 1):
                component = labels == number
                if component.sum() < size:
                    result[component] = False
            result &= ~ignored
            if lesion.any() or result.any():
                dice[i, j] = 2 * int((result & lesion).sum()) / (int(result.sum()) + int(lesion.sum()))
    return dice


def assert_equals_naive_grid(prob, reference):
    operating = Operating(thresholds=(0.2, 0.35, 0.6, 0.8), sizes=(1, 2, 3, 5, 8, 12), sizes_mm3=(4.0,))
    item = dict(case="c", split="val", spacing=(1, 1, 1), reference=reference, prob=prob, prob_tta=prob[::-1],
                flair_z=prob, inner=np.ones(prob.shape, bool))
    table = search([item, case(0)], operating)[0].query("unit == 'voxels'")
    expected = [naive_dice_grid(p, reference == 1, reference == 2, operating.thresholds, operating.sizes) for p in (prob, prob[::-1])]
    np.testing.assert_array_equal(table[PER_CASE + "c"].to_numpy(), np.ravel(expected))


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, (6, 5, 4), elements=st.sampled_from(np.float32([0, 0, 0, 0.1, 0.2, 0.3, 0.5, 0.6, 0.9]))),
       arrays(np.uint8, (6, 5, 4), elements=st.sampled_from([0, 0, 0, 1, 2])), st.sampled_from("CF"))
def test_grid_equals_labelling_each_point_anew_to_the_last_digit(prob, reference, order):
    assert_equals_naive_grid(prob, np.asarray(reference, order=order))


@pytest.mark.parametrize("change", ["none", "no lesion", "no other pathology", "all is other pathology", "nothing found", "all is found"])
def test_grid_of_blobs_equals_labelling_each_point_anew_to_the_last_digit(change):
    item = case(7)
    prob, reference = item["prob"], item["reference"].copy(order="F")
    if change == "no lesion":
        reference[reference == 1] = 0
    elif change == "no other pathology":
        reference[reference == 2] = 0
    elif change == "all is other pathology":
        reference[1:] = 2
    elif change != "none":
        prob = np.full_like(prob, 0.1 if change == "nothing found" else 0.99)
    assert_equals_naive_grid(prob, reference)


def test_each_threshold_is_labelled_once_in_the_box_of_its_voxels(monkeypatch):
    item, label, sizes = case(0), metrics.cc3d.connected_components, []

    def counted(mask, **options):
        sizes.append(mask.size)
        return label(mask, **options)

    monkeypatch.setattr(metrics.cc3d, "connected_components", counted)
    volumes = ("reference", "prob", "prob_tta", "flair_z", "inner")
    wide = item | {name: np.pad(item[name], 10, constant_values=False) for name in volumes}
    found = search([wide], OPERATING)[0]
    assert len(sizes) == 2 * found.threshold.nunique() and max(sizes) <= np.prod(np.add(item["prob"].shape, 1)) < wide["prob"].size / 9
    monkeypatch.undo()
    assert found.equals(search([item], OPERATING)[0])


def test_cases_are_read_one_at_a_time():
    def cases():
        alive = []
        for seed in range(5):
            assert sum(array() is not None for array in alive) <= 3, "an earlier case than the last is still held"
            item = case(seed)
            alive += [weakref.ref(item[name]) for name in ("prob", "prob_tta", "flair_z")]
            yield item
            del item

    assert len(search(cases(), OPERATING)[1]) == 5


def test_a_case_without_lesion_counts_0_where_something_is_found_as_in_the_report_and_nothing_elsewhere():
    empty = case(0, empty=True)
    empty["prob"] *= 0  # nothing in one view, false alarms with TTA
    table, _ = search([empty, case(1)], OPERATING)
    one, alarms = table[~table.tta], table[table.tta & (table.threshold == 0.2)]
    assert (one.nans == 1).all() and one.dsc.equals(one["dsc c1"].rename("dsc"))
    assert (alarms.nans == 0).all() and np.allclose(alarms.dsc, alarms["dsc c1"] / 2)


def test_without_any_lesion_there_is_nothing_to_search():
    with pytest.raises(InputError, match="no validation case has a lesion"):
        search([case(0, empty=True)], OPERATING)


def test_only_different_validation_cases_are_searched():
    with pytest.raises(InputError, match="c1 is of the split 'test'"):
        search([case(0), case(1, split="test")], OPERATING)
    with pytest.raises(InputError, match="c0 came twice"):
        search([case(0), case(0)], OPERATING)
    with pytest.raises(InputError, match="no validation case"):
        search([], OPERATING)


def table_of(dice, spread=0.02):
    """The two tables of a search with one TTA setting whose nine cases scatter by `spread` about the means in `dice`
    (thresholds x sizes)."""
    rows = [dict(threshold=(i + 1) / 10, size=j + 1.0, unit="voxels", tta=True, dsc=d, se=0.01, n=9, nans=0)
            for i, line in enumerate(dice) for j, d in enumerate(line)]
    table = pd.DataFrame(rows)
    noise = spread * np.random.default_rng(0).normal(size=(len(table), 9))
    cases = table.dsc.to_numpy()[:, None] + noise - noise.mean(axis=1, keepdims=True)
    validation = pd.DataFrame({"case": [str(i) for i in range(9)], "uncertainty": np.arange(9) / 10, "z 2": 0.1, "z 3": 0.2})
    return pd.concat([table, pd.DataFrame(cases).add_prefix(PER_CASE)], axis=1), validation


def test_the_centre_of_a_plateau_is_chosen_not_a_spike():
    dice = np.full((9, 5), 0.5)
    dice[0, 4] = 0.805  # a spike, within the error of the plateau
    dice[3:8, 0:3] = 0.80
    table, validation = table_of(dice)
    chosen = choose(table, validation)
    assert (chosen["threshold"], chosen["min_voxels"]) == (0.6, 2)
    assert chosen["best_dsc"] == 0.805 and chosen["plateau_points"] == 15
    own = table.query("threshold == 0.6 and size == 2").filter(like=PER_CASE).to_numpy()[0]
    assert chosen.items() >= unsure_limit(validation.uncertainty, own).items()
    assert json.loads(json.dumps(chosen)) == chosen


@pytest.mark.parametrize("pair", [(0.8, 0.805), (0.805, 0.8)])
def test_of_points_equally_near_the_centre_the_better_is_chosen(pair):
    dice = np.full((5, 3), 0.5)
    dice[2:4, 1] = pair
    assert choose(*table_of(dice))["dsc"] == 0.805


def test_a_centre_one_standard_error_below_the_best_but_for_rounding_can_be_the_sensitive_choice():
    dice = np.full((5, 3), 0.5)
    dice[2] = 0.8, np.nextafter(0.8 - 0.01, 0), 0.8
    assert choose(*table_of(dice, spread=0.1), "sensitive")["min_voxels"] == 2


def test_one_case_has_no_standard_error_and_still_a_sensitive_choice():
    dice = np.full((5, 3), 0.5)
    dice[2] = 0.8, 0.797, 0.8
    table, validation = table_of(dice, spread=0.0)
    assert choose(table.assign(se=np.nan, n=1), validation, "sensitive")["min_voxels"] == 2


def test_the_sensitive_choice_has_the_lowest_threshold_within_one_standard_error():
    dice = np.full((9, 3), 0.5)
    dice[3:8, 1] = 0.791, 0.794, 0.8, 0.8, 0.799
    table, validation = table_of(dice, spread=0.0)
    centre, sensitive = (choose(table, validation, prefer) for prefer in ("centre", "sensitive"))
    assert (centre["threshold"], sensitive["threshold"]) == (0.7, 0.4)
    assert (sensitive["min_voxels"], sensitive["dsc"]) == (centre["min_voxels"], 0.791)


def test_points_that_differ_by_next_to_nothing_are_one_plateau_however_surely_they_differ():
    dice = np.full((9, 3), 0.5)
    dice[2:7] = 0.8 - 0.0005 * np.arange(5)[:, None]
    chosen = choose(*table_of(dice, spread=0.0))
    assert (chosen["threshold"], chosen["min_voxels"], chosen["plateau_points"]) == (0.5, 2, 15)


def test_a_clear_best_is_chosen():
    dice = np.full((5, 3), 0.5)
    dice[1, 2] = 0.9
    chosen = choose(*table_of(dice))
    assert (chosen["threshold"], chosen["min_voxels"]) == (0.2, 3) and plateau(table_of(dice)[0]).sum() == 1


def test_a_point_that_ruins_one_case_is_not_near_the_best():
    table, validation = table_of(np.full((9, 3), 0.8), spread=0.0)
    table.loc[3:, [PER_CASE + "0"]] = 0.0
    table["dsc"] = table.filter(like=PER_CASE).mean(axis=1)
    chosen = choose(table.assign(se=0.01), validation)
    assert chosen["dsc"] == pytest.approx(0.8) and chosen["plateau_points"] == 3


def test_a_plateau_lies_on_one_side_of_tta_and_in_one_unit():
    with_tta, _ = table_of(np.full((4, 3), 0.8))
    for other in (dict(tta=False), dict(unit="mm3")):
        both = pd.concat([with_tta.assign(**other), with_tta], ignore_index=True)
        assert plateau(both).sum() == 12 and both[plateau(both)][list(other)[0]].nunique() == 1


def test_a_size_in_mm3_becomes_a_point_that_says_so():
    table, validation = table_of(np.full((3, 3), 0.8))
    chosen = choose(table.assign(unit="mm3"), validation)
    assert (chosen["threshold"], chosen["min_voxels"], chosen["min_mm3"]) == (0.2, 1, 2.0)
    assert smallest(chosen, (0.5, 1, 1)) == 4


def test_the_choice_is_set_beside_the_recipes_point():
    table, validation = search([case(0), case(1), case(2)], OPERATING)
    both = compare(table, choose(table, validation), OPERATING, seed=0).set_index("point")
    recipe = table.query("threshold == 0.6 and size == 3 and unit == 'voxels' and tta").iloc[0]
    assert both.dsc["recipe"] == pytest.approx(recipe.dsc)
    assert both.difference["recipe"] == pytest.approx(recipe.dsc - both.dsc["chosen"])
    in_mm3 = compare(table, dict(threshold=0.5, min_voxels=1, min_mm3=7.0, tta=True), OPERATING, seed=0)
    assert in_mm3.dsc[0] == pytest.approx(table.query("threshold == 0.5 and size == 7 and unit == 'mm3' and tta").dsc.iloc[0])


def test_the_choice_survives_the_table_file(tmp_path):
    table, validation = search([case(0), case(1), case(2)], OPERATING)
    table.to_csv(tmp_path / "search.csv", index=False, float_format="%.6g")
    assert choose(pd.read_csv(tmp_path / "search.csv"), validation) == pytest.approx(choose(table, validation), abs=1e-6)


def test_zscore_threshold_equals_the_naive_loop():
    cases = [case(0), case(1)]
    cases[1]["inner"][:, :4] = False

    def mean_dice(t):
        results = [(c["flair_z"] > np.float32(t)) & c["inner"] for c in cases]
        return np.mean([challenge_scores(c["reference"], r, c["spacing"])["dsc"] for c, r in zip(cases, results)])

    tables = search(iter(cases), OPERATING)
    assert choose(*tables)["zscore_threshold"] == ZSCORES[np.argmax([mean_dice(t) for t in ZSCORES])]
    assert tables[1]["z 1"].mean() == pytest.approx(mean_dice(1))
