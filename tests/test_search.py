"""The fast grid against a naive loop; what is refused; plateaus preferred to spikes; the z-score baseline."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from wmhlib import InputError
from wmhlib.metrics import challenge_scores
from wmhlib.search import PER_CASE, choose, plateau, search, tune_zscore
from wmhlib.settings import Operating

OPERATING = Operating(thresholds=(0.2, 0.5, 0.8), sizes=(1, 3, 8))


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


def naive_dice(item, threshold, min_voxels, tta):
    labels, _ = ndimage.label(item["prob_tta" if tta else "prob"] >= threshold, np.ones((3, 3, 3)))
    sizes = np.bincount(labels.ravel())
    result = (labels > 0) & (sizes[labels] >= min_voxels)
    return challenge_scores(item["reference"], result, item["spacing"])["dsc"]


def test_grid_equals_the_naive_loop():
    cases = [case(0), case(1), case(2, empty=True)]
    table = search(iter(cases), OPERATING)
    assert len(table) == 18
    for row in table.itertuples():
        expected = [naive_dice(c, row.threshold, row.min_voxels, row.tta) for c in cases]
        found = table.loc[row.Index, [PER_CASE + c["case"] for c in cases]].astype(float)
        np.testing.assert_allclose(found, expected, atol=1e-12, rtol=0)
        assert row.dsc == pytest.approx(np.nanmean(expected), abs=1e-12)


def test_cases_without_lesion_and_result_are_left_out_and_counted():
    empty = case(0, empty=True)
    empty["prob"] = empty["prob_tta"] = np.zeros_like(empty["prob"])
    table = search([empty, case(1)], OPERATING)
    assert (table.nans == 1).all() and (table.n == 1).all()
    with pytest.raises(InputError, match="no point of the search table has a Dice"):
        choose(search([empty], OPERATING))


@pytest.mark.parametrize("run", [lambda cases: search(cases, OPERATING), tune_zscore])
def test_only_different_validation_cases_are_searched(run):
    with pytest.raises(InputError, match="c1 is of the split 'test'"):
        run([case(0), case(1, split="test")])
    with pytest.raises(InputError, match="c0 came twice"):
        run([case(0), case(0)])
    with pytest.raises(InputError, match="no validation case"):
        run([])


def table_of(dice, spread=0.02):
    """A search table of one TTA setting whose nine cases scatter by `spread` about the means in `dice` (thresholds x
    sizes)."""
    rows = [dict(threshold=(i + 1) / 10, min_voxels=j + 1, tta=True, dsc=d, se=0.01, n=9, nans=0)
            for i, line in enumerate(dice) for j, d in enumerate(line)]
    table = pd.DataFrame(rows)
    noise = spread * np.random.default_rng(0).normal(size=(len(table), 9))
    cases = table.dsc.to_numpy()[:, None] + noise - noise.mean(axis=1, keepdims=True)
    return pd.concat([table, pd.DataFrame(cases).add_prefix(PER_CASE)], axis=1)


def test_the_centre_of_a_plateau_is_chosen_not_a_spike():
    dice = np.full((9, 5), 0.5)
    dice[0, 4] = 0.805  # a spike, within the error of the plateau
    dice[3:8, 0:3] = 0.80
    chosen = choose(table_of(dice))
    assert (chosen["threshold"], chosen["min_voxels"]) == (0.6, 2)
    assert chosen["best_dsc"] == 0.805 and chosen["plateau_points"] == 15
    assert json.loads(json.dumps(chosen)) == chosen


def test_a_clear_best_is_chosen():
    dice = np.full((5, 3), 0.5)
    dice[1, 2] = 0.9
    chosen = choose(table_of(dice))
    assert (chosen["threshold"], chosen["min_voxels"]) == (0.2, 3) and plateau(table_of(dice)).sum() == 1


def test_a_plateau_lies_on_one_side_of_tta():
    with_tta = table_of(np.full((4, 3), 0.8))
    both = pd.concat([with_tta.assign(tta=False), with_tta], ignore_index=True)
    assert plateau(both).sum() == 12 and both[plateau(both)].tta.nunique() == 1


def test_the_choice_survives_the_table_file(tmp_path):
    table = search([case(0), case(1), case(2)], OPERATING)
    table.to_csv(tmp_path / "search.csv", index=False, float_format="%.6g")
    assert choose(pd.read_csv(tmp_path / "search.csv")) == pytest.approx(choose(table), abs=1e-6)


def test_zscore_threshold_equals_the_naive_loop():
    cases = [case(0), case(1)]
    cases[1]["inner"][:, :4] = False
    levels = np.arange(0.5, 3, 0.25)

    def mean_dice(t):
        results = [(c["flair_z"] > t) & c["inner"] for c in cases]
        return np.mean([challenge_scores(c["reference"], r, c["spacing"])["dsc"] for c, r in zip(cases, results)])

    naive = [mean_dice(t) for t in levels]
    assert tune_zscore(iter(cases), levels) == levels[np.argmax(naive)]
