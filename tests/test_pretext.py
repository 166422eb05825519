"""The tasks a base learns beside lesions."""

from dataclasses import replace

import pytest
import torch

from wmhlib.errors import InputError
from wmhlib.losses import total_loss
from wmhlib.network import WMHNet
from wmhlib.presets import preset
from wmhlib.pretext import LABELS, Pretext, draw_parts
from wmhlib.processes import StepStatistics
from wmhlib.sections import Adapter
from wmhlib.sections import Pretext as Weights
from wmhlib.slicestore import CaseSlices
from wmhlib.tasks import Slices

RECIPE = replace(preset("smoke"), pretext=Weights(tissue=0.5, prompts=2.0, mlp=16), adapter=Adapter(method="full"))


class NoMask(torch.nn.Module):
    def forward(self, features, prompts):
        return torch.zeros(len(prompts), 1, 16, 16), torch.zeros(len(prompts))


@pytest.fixture
def labels():
    """Two slices: white matter with two lesions and CSF, and air."""
    labels = torch.zeros(2, 1, 64, 64, dtype=torch.uint8)
    labels[0, 0, 8:56, 8:56] = 5
    labels[0, 0, 30:40, 30:34] = 3
    labels[0, 0, 12:16, 12:16] = labels[0, 0, 44:50, 44:50] = 1
    return labels


def test_a_part_is_one_connected_piece_of_a_lesion_or_tissue(labels):
    for seed in range(12):
        masks, image = draw_parts(labels, torch.Generator().manual_seed(seed))
        assert image.tolist() == [0] and masks.shape == (1, 64, 64)
        kinds = labels[0, 0][masks[0]].unique()
        assert len(kinds) == 1 and kinds[0] in (1, 3, 5)
        assert kinds[0] != 1 or masks.sum() in (16, 36)
    masks, image = draw_parts(labels.roll(1, 0), torch.Generator(), 4)
    assert image.tolist() == [1] * 4 and masks.shape == (4, 64, 64)


def test_losses_are_weighted_and_follow_the_generator(labels):
    torch.manual_seed(0)
    one = Pretext(RECIPE)
    features = torch.randn(2, 256, 4, 4)
    first, again = (one.losses(features, labels, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first == again and set(first) == {"tissue", "prompts"}
    one.settings = Weights(tissue=1.0, prompts=1.0)
    plain = one.losses(features, labels, torch.Generator().manual_seed(1))
    torch.testing.assert_close(first["tissue"], 0.5 * plain["tissue"])
    torch.testing.assert_close(first["prompts"], 2 * plain["prompts"])


def test_tissue_loss_is_small_for_the_right_answer_and_ignores_other_pathology(labels):
    pretext = Pretext(RECIPE)
    small = labels[:, 0, 2::4, 2::4].long()
    answer = 20.0 * torch.nn.functional.one_hot(small, LABELS).movedim(-1, 1)
    pretext.tissue = torch.nn.Identity()
    right = torch.nn.functional.pixel_unshuffle(answer, 4)
    pretext.promptable = NoMask()
    assert pretext.losses(right, labels, torch.Generator())["tissue"] < 1e-3
    labels[0, 0, 20:24, 20:24] = 2
    assert pretext.losses(right, labels, torch.Generator())["tissue"] < 1e-3


def test_cases_without_tissues_are_an_error_and_a_batch_without_is_none():
    blank = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
    losses = Pretext(RECIPE).losses(torch.randn(1, 256, 4, 4), blank, torch.Generator())
    assert sum(losses.values()) == 0 and sum(losses.values()).requires_grad
    case = CaseSlices("a", torch.zeros(1, 1, 64, 64), blank[0])
    with pytest.raises(InputError, match="cohort.scanners"):
        Slices(RECIPE).validation_places([case], [case])


def test_a_base_learns_everything_at_once(labels):
    network = WMHNet(RECIPE).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    images = (labels.float() - 4) * 0.8 + 0.1 * torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    history = []
    for _ in range(40):
        features = network.features(images)
        pretext = network.pretext.losses(features, labels, torch.Generator().manual_seed(2))
        loss = total_loss(*network.decode(features, images), labels, RECIPE.loss)[0] + sum(pretext.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append({name: float(value.detach()) for name, value in pretext.items()})
    assert network.encoder.blocks[0].attn.qkv.weight.grad.abs().max() > 0
    for name in ("tissue", "prompts"):
        assert history[-1][name] < 0.7 * history[0][name], name


def test_what_is_learnt_alone_moves_no_statistics_of_the_rest():
    network = WMHNet(preset("smoke", "adapter.method=none pretext.alone=true pretext.prompts=1 pretext.mlp=16"))
    before = {name: value.clone() for name, value in network.named_buffers() if "running" in name}
    statistics = StepStatistics(network.train())
    statistics.begin()
    network(torch.randn(2, 1, 64, 64))
    statistics.end(1)
    assert before and all(torch.equal(value, before[name]) for name, value in network.named_buffers() if name in before)
