"""The cost of state spaces over tokens, and the networks of volumes against MONAI's."""

import numpy as np
import pandas as pd
import pytest

from wmhlib.bench import volumes
from wmhlib.bench.table import shown


@pytest.fixture(scope="module")
def costs():
    return volumes.token_costs((64, 256, 1024, 4096), 16, 1)


def test_state_spaces_cost_what_the_tokens_do_and_attention_their_square(costs):
    gflop = volumes.exponents(costs).gflop
    assert gflop["state space"] < 1.2 and gflop["softmax attention"] > 1.8
    assert costs[["seconds", "memory_mb"]].gt(0).all(None)


def test_exponents_are_those_of_the_upper_half():
    tokens = np.array([1, 10, 100, 1000])
    table = pd.DataFrame([dict(what="x", tokens=n, seconds=max(n, 10.0) ** 2, gflop=5.0 * n, memory_mb=3.0) for n in tokens])
    assert np.allclose(volumes.exponents(table).loc["x"], [2, 1, 0])
    assert np.allclose(volumes.exponents(table[:2]).loc["x"], [0, 1, 0])


def test_the_figure_names_each_exponent(costs):
    axes = volumes.token_figure(costs).axes
    powers = volumes.exponents(costs)
    for ax, cost in zip(axes, ("seconds", "gflop", "memory_mb")):
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [f"{what} (n^{powers.loc[what, cost]:.2f})" for what in powers.index]


@pytest.mark.parametrize("name", volumes.RIVALS)
@pytest.mark.parametrize("size", [5_654_968, 8_676_314])
def test_rivals_have_as_many_parameters(name, size):
    assert volumes.parameters(volumes.rival(name, size)) == pytest.approx(size, rel=0.06)


def test_each_network_is_compared_with_both_rivals():
    table = volumes.speed(32, 1, 1, networks=("attention",))
    assert table.what.tolist() == [f"attention against MONAI's {other}, {what}" for what in ("prediction", "forward and backward") for other in volumes.RIVALS]
    assert np.allclose(table.ratio, table.baseline_s / table.ours_s) and table[["memory_baseline_mb", "memory_ours_mb"]].gt(20).all(None)
    assert table.memory_ours_mb.iloc[2] > table.memory_ours_mb.iloc[0] and len(shown(table)) == 4
