import copy

import pytest
import torch
from peft import AdaLoraConfig
from peft.tuners.adalora.layer import RankAllocator
from small import ENCODER
from torch import nn

from wmhlib.adapters import adapt
from wmhlib.medsam import build_encoder
from wmhlib.ranks import Ranks
from wmhlib.sections import Adapter

VALUES = 2 * (6 + 6 + 3 + 3)


def adalora():
    return adapt(build_encoder(ENCODER, 0), Adapter(method="adalora", rank_attention=6, rank_mlp=3, dropout=0.0), 0)


def stepped(net, number):
    """A step of plain gradient descent with gradients of `number`; they stay."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                parameter -= 0.1 * parameter.grad


def values(net):
    return {name: p.detach().clone() for name, p in net.named_parameters() if "lora_E" in name}


def test_pruning_is_pefts_own_when_that_is_done_every_step():
    net, reference = adalora(), adalora()
    ranks = Ranks(net)
    config = AdaLoraConfig(init_r=6, target_r=1, total_step=20, tinit=2, tfinal=6, deltaT=1)
    allocator = RankAllocator(reference.base_model.model, config, "default")
    allocator.target_bgt = 2 * VALUES // 3
    assert allocator.init_bgt == VALUES
    for step in range(1, 15):
        for one in (net, reference):
            stepped(one, step)
        ranks.update(step, 20)
        allocator.update_and_allocate(reference.base_model.model, step, force_mask=step == 14)
        found, expected = values(net), values(reference.base_model.model)
        assert all(torch.equal(found[f"base_model.model.{name}"], value) for name, value in expected.items())
    assert sum(int((value != 0).sum()) for value in found.values()) == 2 * VALUES // 3


def test_what_was_chosen_stays_chosen_and_an_interruption_changes_nothing():
    net, twin, pruned = adalora(), None, []
    ranks = Ranks(net)
    for step in range(1, 21):
        stepped(net, step)
        ranks.update(step, 20)
        pruned.append({name: value == 0 for name, value in values(net).items()})
        if step == 9:
            twin, kept = copy.deepcopy(net), copy.deepcopy(ranks.state)
    assert not any(mask.any() for mask in pruned[1].values())
    assert all(torch.equal(mask, pruned[13][name]) for name, mask in pruned[-1].items())
    again = Ranks(twin)
    again.load(kept)
    for step in range(10, 21):
        stepped(twin, step)
        again.update(step, 20)
    assert all(torch.equal(value, values(net)[name]) for name, value in values(twin).items())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_training_ends_with_the_budget_too(steps):
    net = adalora()
    ranks = Ranks(net)
    for step in range(1, steps + 1):
        stepped(net, step)
        ranks.update(step, steps)
    assert sum(int((value != 0).sum()) for value in values(net).values()) == 2 * VALUES // 3


def test_the_regulariser_is_zero_for_orthogonal_factors_and_its_gradient_leads_there():
    net = adalora()
    ranks = Ranks(net)
    with torch.no_grad():
        for q, _, p in ranks.triplets:
            nn.init.orthogonal_(q)
            nn.init.orthogonal_(p)
        assert ranks.regulariser() == pytest.approx(0, abs=1e-5)
        for q, _, _ in ranks.triplets:
            q.mul_(2)  # Q Q^T - I = 3 I
    expected = 0.5 * 0.5 * sum(3 * len(q) ** 0.5 for q, _, _ in ranks.triplets) / len(ranks.triplets)
    value = ranks.regulariser()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert all((q * q.grad).sum() > 0 for q, _, _ in ranks.triplets)


def test_other_networks_have_no_ranks():
    ranks = Ranks(nn.Linear(2, 2))
    ranks.update(1, 10)
    assert not ranks.triplets and ranks.state == {"importance": [], "uncertainty": []}
