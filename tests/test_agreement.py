"""Statistics over cases against pingouin, statsmodels and scikit-learn, by hand, and at their limits."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmhlib.agreement import (
    SIZES_MM3,
    agreement_table,
    bland_altman,
    bootstrap_ci,
    by_group,
    calibration_error,
    compare_systems,
    holm,
    icc,
    log_ml,
    r_squared,
    reliability,
    size_table,
    tertiles,
    wilson,
)


@pytest.fixture
def exact_pingouin(monkeypatch):
    """pingouin without its rounding."""
    import pingouin

    for name in [name for name in pingouin.options if name.startswith("round")]:
        monkeypatch.setitem(pingouin.options, name, None)
    return pingouin


def volumes(seed, n=12, bias=1.0):
    """Reference and result volumes of n cases in mL, the result `bias` times the reference and noisy."""
    rng = np.random.default_rng(seed)
    reference = rng.lognormal(1.5, 1, n)
    return reference, bias * reference * rng.lognormal(0, 0.2, n)


def metrics_of(dice):
    """A metrics table of systems, each a list of Dice."""
    return pd.DataFrame([dict(case=f"c{i:02}", system=system, dsc=d) for system, values in dice.items()
                         for i, d in enumerate(values)])


@pytest.mark.parametrize("cases", [6, 9, 40])
def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says(cases):
    rng = np.random.default_rng(0)
    intervals = [bootstrap_ci(rng.normal(size=cases), seed=i, n=400)[1:3] for i in range(300)]
    assert 0.9 <= np.mean([low <= 0 <= high for low, high in intervals]) <= 0.98


def test_bootstrap_counts_nans_and_repeats():
    assert bootstrap_ci([1, np.nan, 3], seed=1) == bootstrap_ci([1, np.nan, 3], seed=1)
    assert bootstrap_ci([1, np.nan, 3], seed=1)[::3] == (2, 1)
    assert bootstrap_ci([4.0], seed=1) == pytest.approx((4, np.nan, np.nan, 0), nan_ok=True)
    assert np.isnan(bootstrap_ci([np.nan], seed=1)[0])


@pytest.mark.parametrize("count, n", [(0, 7), (3, 9), (50, 110), (4, 4)])
def test_wilson_interval_equals_statsmodels(count, n):
    from statsmodels.stats.proportion import proportion_confint

    assert wilson(count, n) == pytest.approx(proportion_confint(count, n, method="wilson"), abs=1e-12)
    assert np.isnan(wilson(0, 0)).all()


def test_bland_altman_by_hand():
    agreement = bland_altman([1, 2, 3, 4], [2, 2, 5, 5])
    sd = np.sqrt(2 / 3)
    assert (agreement["bias"], agreement["sd"]) == pytest.approx((1, sd))
    assert agreement["loa_low"] == pytest.approx(1 - 1.96 * sd)
    assert agreement["bias_ci"] == pytest.approx((1 - 3.182446 * sd / 2, 1 + 3.182446 * sd / 2), abs=1e-5)
    half = 3.182446 * sd * np.sqrt(1 / 4 + 1.96**2 / 6)
    assert agreement["loa_high_ci"] == pytest.approx((1 + 1.96 * sd - half, 1 + 1.96 * sd + half), abs=1e-5)
    assert bland_altman([1], [2])["bias"] == 1 and np.isnan(bland_altman([1], [2])["loa_low"])


def test_bias_interval_equals_a_t_test(exact_pingouin):
    reference, result = volumes(3)
    expected = exact_pingouin.ttest(result, reference, paired=True)["CI95"].iloc[0]
    assert bland_altman(reference, result)["bias_ci"] == pytest.approx(tuple(expected))


def test_the_two_r2_differ_where_volumes_are_halved():
    found = r_squared([2, 4, 6, 8], [1, 2, 3, 4])
    assert found["fit"] == pytest.approx(1) and found["identity"] == pytest.approx(1 - 30 / 20)
    assert np.isnan(list(r_squared([2, 3], [1, 5]).values())).all(), "a line fits any two"


def test_the_two_r2_equal_statsmodels_and_scikit_learn():
    from sklearn.metrics import r2_score
    from statsmodels.api import OLS, add_constant

    reference, result = volumes(4, bias=0.8)
    found = r_squared(reference, result)
    assert found["identity"] == pytest.approx(r2_score(reference, result))
    assert found["fit"] == pytest.approx(OLS(result, add_constant(reference)).fit().rsquared)


@pytest.mark.parametrize("seed, n, bias", [(0, 12, 1.0), (1, 5, 1.6), (2, 60, 0.7)])
def test_icc_equals_pingouin(seed, n, bias, exact_pingouin):
    reference, result = volumes(seed, n, bias)
    table = pd.DataFrame(dict(case=np.tile(np.arange(n), 2), rater=np.repeat(["a", "b"], n), ml=np.r_[reference, result]))
    expected = exact_pingouin.intraclass_corr(table, "case", "rater", "ml").set_index("Type")
    found = icc(reference, result)
    for ours, theirs in (("icc21", "ICC(A,1)"), ("icc31", "ICC(C,1)")):
        assert found[ours] == pytest.approx(expected.ICC[theirs], abs=1e-9)
        assert found[ours + "_ci"] == pytest.approx(tuple(expected.CI95[theirs]), abs=1e-9)


def test_icc_forgives_a_constant_bias_only_as_consistency():
    reference = np.arange(1.0, 9)
    shifted = icc(reference, reference + 2)
    assert shifted["icc31"] == pytest.approx(1) and shifted["icc21"] == pytest.approx(0.75)
    same = icc(reference, reference)
    assert same["icc21"] == same["icc31"] == 1 and same["icc21_ci"] == same["icc31_ci"] == (1, 1)
    assert np.isnan(icc([1], [2])["icc21"]) and np.isnan(icc([1, 1], [1, 1])["icc31"])


def test_a_volume_of_zero_has_no_logarithm_and_is_counted():
    assert log_ml([0, 1, np.e]) == pytest.approx([np.nan, 0, 1], nan_ok=True)
    table = agreement_table(pd.DataFrame(dict(reference_ml=[1.0, 2, 4, 0], result_ml=[2.0, 4, 8, 1])))
    assert table.n.tolist() == [4, 3, 3] and table.left_out.tolist() == [0, 1, 1]
    assert table.loc["ratio", ["bias", "loa_low", "bias_low"]].tolist() == pytest.approx([2, 2, 2])
    assert np.isnan(table.loc["ratio", "icc21"]) and table.loc["log mL", "icc31"] == pytest.approx(1)


def test_a_ratio_does_not_depend_on_the_unit_and_a_bias_does():
    table, in_litres = (agreement_table(pd.DataFrame(dict(zip(("reference_ml", "result_ml"), np.array(volumes(5)) / unit))))
                        for unit in (1, 1000))
    pd.testing.assert_series_equal(table.loc["ratio"], in_litres.loc["ratio"])
    assert table.loc["mL", "bias"] == pytest.approx(1000 * in_litres.loc["mL", "bias"])


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_cases_give_tables_with_nothing_made_up(n):
    own = pd.DataFrame(dict(case=[f"c{i}" for i in range(n)], site="a", reference_ml=np.arange(n) + 1.0, result_ml=np.ones(n)))
    table = agreement_table(own)
    assert table.n.tolist() == [n] * 3 and np.isnan(table.loc["mL", "loa_low"]) == (n < 2)
    assert len(tertiles(own.reference_ml)) == n


def test_paired_test_equals_pingouin_and_holm_equals_statsmodels(exact_pingouin):
    from statsmodels.stats.multitest import multipletests

    rng = np.random.default_rng(0)
    own = rng.uniform(0.6, 0.9, 15)
    dice = {"operating point": own, "b": own - rng.normal(0.03, 0.05, 15), "c": own - rng.normal(0.01, 0.03, 15)}
    found = compare_systems(metrics_of(dice))
    for system in "bc":
        expected = exact_pingouin.wilcoxon(dice["operating point"], dice[system]).iloc[0]
        assert found.loc[system, ["w", "p"]].tolist() == pytest.approx(expected[["W_val", "p_val"]].tolist())
        assert found.difference[system] == pytest.approx((own - dice[system]).mean())
    assert found.p_holm.tolist() == pytest.approx(multipletests(found.p, method="holm")[1])


def test_paired_test_says_what_it_leaves_out():
    own = [0.5, 0.6, 0.7, 0.8, 0.9, 0.4, 0.3, np.nan]
    dice = {"operating point": own, "same": own, "few": [0.4, *own[1:]], "lower": [d - 0.01 * i for i, d in enumerate(own)]}
    found = compare_systems(metrics_of(dice))
    assert found.n.tolist() == [7] * 3 and found.left_out.tolist() == [1] * 3 and found.zeros.tolist() == [7, 6, 1]
    assert found.p.tolist() == pytest.approx([np.nan, np.nan, 2 / 2**6], nan_ok=True), "all six differences have one sign"
    assert found.p_holm["lower"] == found.p["lower"] and np.isnan(found.p_holm["same"])
    alone = compare_systems(metrics_of({"operating point": own}))
    assert alone.empty and list(alone) == list(found)


def test_a_false_alarm_on_a_clean_scan_counts_against_a_system_in_pairs():
    metrics = metrics_of({"operating point": [0.6, np.nan, np.nan], "alarms": [0.6, 0.0, np.nan]}).assign(reference_ml=[1.0, 0, 0] * 2, result_ml=[1.0, 0, 0, 1.0, 0.3, 0])
    found = compare_systems(metrics).loc["alarms"]
    assert (found.n, found.left_out, found.difference, found.zeros) == (3, 0, pytest.approx(1 / 3), 2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.one_of(st.floats(0, 1), st.just(np.nan)), min_size=1, max_size=8))
def test_holm_never_lowers_a_p_and_keeps_their_order(p):
    adjusted, p = holm(p), np.array(p)
    assert (np.isnan(adjusted) == np.isnan(p)).all()
    finite = np.isfinite(p)
    assert (adjusted[finite] >= p[finite]).all() and (adjusted[finite] <= 1).all()
    assert (np.diff(adjusted[finite][np.argsort(p[finite])]) >= 0).all()


def test_groups_are_summarised_in_their_order(scored):
    metrics = scored[0]
    table = by_group(metrics, "system").set_index(["system", "score"])
    assert list(table.index.unique("system")) == list(metrics.system.unique())
    assert table.loc[("operating point", "dsc"), ["n", "mean", "nans"]].tolist() == [5, 1, 1]
    assert table.loc[("operating point", "recall"), ["low", "high"]].tolist() == [1, 1]
    assert np.isnan(table.loc[("operating point", "dsc"), "low"]), "four cases bear no interval"
    own = metrics[metrics.system == "operating point"]
    burden = by_group(own.assign(burden=tertiles([3, 1, 2, 5, 4])), "burden")
    assert [name.split()[0] for name in burden.burden.unique()] == ["low", "middle", "high"]


def test_tertiles_name_their_cut_points():
    labels = tertiles([1, 2, 3, 4, 5, 6, 7])
    assert list(labels.categories) == ["low (to 3 mL)", "middle (3 to 5 mL)", "high (above 5 mL)"]
    assert labels.codes.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert tertiles([0, 0, 0, 0, 5, 10]).codes.tolist() == [0, 0, 0, 0, 2, 2]
    assert set(tertiles([4.0])) == set(tertiles([2, 2, 2])) == {"all"}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 100, allow_subnormal=False), min_size=3, max_size=30, unique=True))
def test_tertiles_are_thirds(volume):
    counts = np.bincount(tertiles(volume).codes, minlength=3)
    assert counts.max() - counts.min() <= 1 and (np.diff(tertiles(volume).codes[np.argsort(volume)]) >= 0).all()


def lesions_of(rows):
    return pd.DataFrame(rows, columns=["case", "kind", "volume_mm3", "hit"])


def test_size_table_counts_lesions_by_class():
    table = size_table(lesions_of([("a", "reference", 5, False), ("a", "reference", 14, True), ("b", "reference", 700, True),
                                   ("b", "reference", 6, True), ("b", "result", 3, False), ("b", "result", 800, True)]))
    assert list(table["size"]) == ["< 14 mm3", "14 to 65 mm3", "65 to 524 mm3", ">= 524 mm3", "all"]
    assert table.reference.tolist() == [2, 1, 0, 1, 4] and table.found.tolist() == [1, 1, 0, 1, 3]
    assert table.recall.tolist() == pytest.approx([0.5, 1, np.nan, 1, 0.75], nan_ok=True)
    assert table.result.tolist() == [1, 0, 0, 1, 2] and table.precision.tolist() == pytest.approx([0, np.nan, np.nan, 1, 0.5], nan_ok=True)
    assert table.recall_low.isna().all(), "two cases bear no interval"
    assert size_table(lesions_of([])).recall.isna().all()


def test_classes_are_spheres_of_3_5_and_10_mm():
    assert SIZES_MM3 == pytest.approx([np.pi / 6 * d**3 for d in (3, 5, 10)], rel=0.02)


def test_lesions_of_one_case_share_their_fate_in_the_interval():
    apart = [(f"c{i}", "reference", 5, i % 2 == 0) for i in range(80)]
    together = [(f"c{i // 10}", "reference", 5, i // 10 % 2 == 0) for i in range(80)]
    width = [table.recall_high[0] - table.recall_low[0] for table in map(size_table, map(lesions_of, (apart, together)))]
    assert width[1] > 2 * width[0]


def calibration_of(cases):
    """A calibration table of cases, each (probabilities, labels)."""
    rows = []
    for name, (p, y) in enumerate(cases):
        for b in range(15):
            here = np.minimum((p * 15).astype(int), 14) == b
            rows.append(dict(case=f"c{name}", bin=b, voxels=here.sum(), probability=p[here].sum(), lesion=y[here].sum(),
                             squared=((p - y)[here] ** 2).sum()))
    return pd.DataFrame(rows)


def test_calibration_equals_scikit_learn():
    from sklearn.calibration import calibration_curve
    from sklearn.metrics import brier_score_loss

    rng = np.random.default_rng(0)
    cases = [(p, rng.random(500) < p**2) for p in rng.random((6, 500))]
    p, y = (np.concatenate(values) for values in zip(*cases))
    table = calibration_of(cases)
    curve, error = reliability(table), calibration_error(table)
    lesion, probability = calibration_curve(y, p, n_bins=15)
    np.testing.assert_allclose(curve[["lesion", "probability"]], np.stack([lesion, probability], 1))
    assert error["brier"] == pytest.approx(brier_score_loss(y, p))
    assert error["ece"] == pytest.approx((np.abs(lesion - probability) * curve.voxels).sum() / len(p))
    shown = p >= 1 / 15
    lesion, probability = calibration_curve(y[shown], p[shown], n_bins=15)
    assert error["ece_found"] == pytest.approx((np.abs(lesion - probability) * curve.voxels[1:]).sum() / shown.sum())
    assert error["n"] == 6 and all(low < error[name] < high for name in ("ece", "ece_found", "brier") for low, high in [error[name + "_ci"]])


def test_calibration_of_one_case_has_no_interval():
    p = np.array([0.0, 0.03, 1.0])
    table = calibration_of([(p, p > 0.5)])
    error = calibration_error(table)
    assert error["ece"] == pytest.approx(0.01) and np.isnan(error["ece_ci"]).all()
    assert reliability(table).voxels.tolist() == [2, *[0] * 13, 1] and reliability(table).lesion.isna().sum() == 13
