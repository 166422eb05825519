"""Entropy, the case's uncertainty and its flag: limits, invariances, and the flag's table against independent references."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from wmhlib.errors import InputError
from wmhlib.uncertainty import case_uncertainty, entropy, flag_table, mean_entropy, unsure_limit

probabilities = arrays(np.float32, (4, 4, 3), elements=st.floats(0, 1, width=32))
dice = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=12)


def table(uncertainty, dsc, limit=0.5):
    return pd.DataFrame(dict(dsc=dsc, uncertainty=uncertainty, unsure=np.array(uncertainty) > limit))


def test_entropy_is_a_bit_where_the_network_cannot_tell():
    assert entropy(np.array([0, 0.5, 1, 0.25, 0.75])) == pytest.approx([0, 1, 0, 0.811278, 0.811278], abs=1e-6)
    assert mean_entropy(np.array([0.04, 0.5, 1.0])) == 0.5 and mean_entropy(np.zeros(3)) == 0


@settings(max_examples=50, deadline=None)
@given(probabilities, probabilities)
def test_uncertainty_is_a_share_that_grows_with_disagreement(p, q):
    found = case_uncertainty(p, q)
    assert 0 <= found <= 1 and found == case_uncertainty(q, p)
    p, q = 0.1 + 0.9 * p, 0.1 + 0.9 * q
    assert case_uncertainty(p, p) == 0 and case_uncertainty(p, (p + q) / 2) <= case_uncertainty(p, q) + 1e-6


def test_neither_head_nor_burden_drives_the_uncertainty():
    rng = np.random.default_rng(0)
    p, q = rng.uniform(0.1, 1, (2, 6, 6, 4))
    once = case_uncertainty(p, q)
    in_a_large_head = case_uncertainty(*(np.pad(a, 9, constant_values=1e-3) for a in (p, q)))
    twice_the_lesions = case_uncertainty(*(np.concatenate([a, a]) for a in (p, q)))
    assert once == pytest.approx(in_a_large_head) == pytest.approx(twice_the_lesions)
    assert case_uncertainty(np.zeros((3, 3, 3)), np.full((3, 3, 3), 0.01)) == 1, "nothing found"
    assert case_uncertainty(np.eye(3), np.eye(3)[::-1]) == pytest.approx(2 / 3)


def test_the_limit_separates_the_worst_quarter_where_it_can():
    limits = unsure_limit([0.02, 0.03, 0.04, 0.09, 0.03, 0.01, 0.2, 0.02], [0.9, 0.85, 0.8, 0.4, 0.86, 0.88, 0.3, np.nan])
    assert limits == pytest.approx(dict(unsure_above=0.065, poor_below=0.6))


@pytest.mark.parametrize("uncertainty, dsc, limit", [
    ([0.3], [0.8], 0.3), ([0.1, 0.3], [0.9, 0.5], 0.2), ([0.3, 0.1], [0.9, 0.5], 0.3), ([0.2, 0.2], [0.9, 0.5], 0.2),
    ([0.1, 0.2, 0.3], [0.7, 0.7, 0.7], 0.3), ([0.05, 0.1, 0.2, 0.3, 0.4, 0.5], [0.9, 0.9, 0.4, 0.8, 0.9, 0.5], 0.15)])
def test_the_limit_is_defined_for_few_and_equal_cases(uncertainty, dsc, limit):
    assert unsure_limit(uncertainty, dsc)["unsure_above"] == pytest.approx(limit)


def test_no_limit_without_a_case_that_has_a_dice():
    with pytest.raises(InputError, match="expected at least one"):
        unsure_limit([0.3], [np.nan])


@settings(max_examples=80, deadline=None)
@given(dice, st.randoms())
def test_the_limit_lies_among_the_uncertainties_whatever_their_order(pairs, random):
    limits = unsure_limit(*zip(*pairs))
    assert min(u for u, _ in pairs) <= limits["unsure_above"] <= max(u for u, _ in pairs)
    random.shuffle(pairs)
    assert unsure_limit(*zip(*pairs)) == limits


def test_flag_table_counts_as_scikit_learn_and_ranks_as_scipy():
    from scipy.stats import spearmanr
    from sklearn.metrics import precision_score, recall_score

    rng = np.random.default_rng(0)
    cases = table(rng.random(30), rng.random(30))
    found, poor = flag_table(cases, 0.6), cases.dsc < 0.6
    assert found.value["sensitivity"] == recall_score(poor, cases.unsure)
    assert found.value["specificity"] == recall_score(~poor, ~cases.unsure)
    assert found.value["positive predictive value"] == precision_score(poor, cases.unsure)
    assert found.value["negative predictive value"] == precision_score(~poor, ~cases.unsure)
    assert found.value["Spearman rho"] == pytest.approx(spearmanr(cases.uncertainty, cases.dsc)[0])
    assert (found.low < found.value).all() and (found.value < found.high).all()


def test_a_flag_on_a_clean_scan_in_which_nothing_is_found_is_a_false_one():
    found = flag_table(table([1.0, 0.1, 0.9], [np.nan, 0.9, 0.2]), 0.5)
    assert found.loc["specificity", ["count", "n"]].tolist() == [1, 2] and found.loc["positive predictive value", ["count", "n"]].tolist() == [1, 2]


def test_the_interval_of_rho_covers_it_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = []
    for i in range(60):
        x, y = rng.multivariate_normal([0, 0], [[1, -0.5], [-0.5, 1]], 40).T
        row = flag_table(table(x, y), 0, seed=i).loc["Spearman rho"]
        covered.append(row.low <= 6 / np.pi * np.arcsin(-0.25) <= row.high)
    assert np.mean(covered) >= 0.85


def test_rho_of_fewer_than_five_cases_has_no_interval():
    few, enough = (flag_table(table(np.arange(n) / 9, np.arange(n)[::-1] / 9), 0.5).loc["Spearman rho"] for n in (4, 5))
    assert few.value == enough.value == pytest.approx(-1) and np.isnan(few.low) and np.isfinite(enough.low)


@pytest.mark.parametrize("uncertainty, dsc", [([0.9], [0.4]), ([0.9, 0.1], [0.4, np.nan]), ([0.2] * 4, [0.5] * 4)])
def test_few_or_equal_cases_leave_what_they_cannot_tell_undefined(uncertainty, dsc):
    found = flag_table(table(uncertainty, dsc), 0.5)
    assert np.isnan(found.value["Spearman rho"]) and np.isnan(found.low["Spearman rho"]) and found.n["flagged"] == len(dsc)
    assert np.isnan(found.low[found.n == 0]).all()
