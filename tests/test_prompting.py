"""Prompts in voxels reach the right pixels of the base, whatever the scan's orientation, and its masks come back; the zero-shot baseline."""

import dataclasses

import numpy as np
import pytest
import torch

from wmhlib import prompting
from wmhlib.errors import InputError
from wmhlib.medsam import build_encoder
from wmhlib.network import WMHNet
from wmhlib.presets import preset
from wmhlib.promptable import Promptable, three_channels
from wmhlib.volumes import case_canvas, load_case

SMOKE = preset("smoke", "encoder.grid=16 inputs.fov=100")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The smoke recipe on a base file with random weights, prompt parts and a channel adapter."""
    encoder, network = build_encoder(SMOKE.encoder, 0), WMHNet(SMOKE)
    state = {f"image_encoder.{name}": value for name, value in encoder.state_dict().items()} | Promptable(16, 32).state_dict()
    state |= {f"channel_adapter.{name}": value.contiguous() for name, value in network.channel_adapter.state_dict().items()}
    path = tmp_path_factory.mktemp("base") / "base.pth"
    torch.save(state, path)
    return dataclasses.replace(SMOKE, encoder=dataclasses.replace(SMOKE.encoder, checkpoint=str(path)))


class Obedient(torch.nn.Module):
    """Fills each box; with points, a square of some four voxels around the first."""

    def forward(self, features, prompts):
        rows, columns = torch.meshgrid(torch.arange(256) + 0.0, torch.arange(256) + 0.0, indexing="ij")
        low, high = prompts.points[:, 0], torch.where(prompts.labels[:, 1:2] == 3, prompts.points[:, 1], prompts.points[:, 0])
        reach = torch.where(prompts.labels[:, :1] == 2, 0.5, 5.5)
        inside = [(axis >= (low[:, i : i + 1] - reach)[..., None]) & (axis <= (high[:, i : i + 1] + reach)[..., None]) for i, axis in enumerate((columns, rows))]
        self.seen = prompts
        return torch.where(inside[0] & inside[1], 8.0, -8.0)[:, None], torch.arange(len(prompts)) + 0.0


@pytest.fixture
def obedient(recipe, monkeypatch):
    monkeypatch.setattr(prompting, "_MARGIN", 0.0)
    engine = prompting.PromptEngine(recipe, "cpu")
    engine.promptable = Obedient()
    return engine


@pytest.fixture
def boxy(tiny_nifti):
    """A case with box-shaped lesions, two of them on one slice, stored along `codes`: `boxy(codes)`."""
    def make(codes="RAS"):
        mask = np.zeros((40, 44, 10), np.uint8)
        mask[12:16, 20:24, 4], mask[20:22, 20:28, 4], mask[25:31, 16:18, 5:7], mask[8, 8, 5] = 1, 1, 1, 2
        axes = ["RLAPSI".index(code) // 2 for code in codes]
        shape = np.array(mask.shape)[axes]
        spacing = np.array((1.0, 1.0, 3.0))[axes]
        return load_case(tiny_nifti("FLAIR.nii.gz", shape, spacing, codes), None, tiny_nifti("mask.nii.gz", shape, spacing, codes, np.transpose(mask, axes)))
    return make


@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
def test_true_boxes_give_box_shaped_lesions_back_on_any_grid(obedient, boxy, codes):
    case = boxy(codes)
    found = obedient.zero_shot(case)
    assert found.dtype == bool and found.shape == case.mask.shape
    np.testing.assert_array_equal(found, case.mask == 1)


def test_each_lesion_of_each_slice_has_a_tight_box(boxy):
    numbers, boxes = prompting.lesion_boxes(boxy("LPS").mask, boxy("LPS").grid)
    assert numbers.tolist() == [4, 4, 5, 6] and boxes.tolist() == [[12, 20, 15, 23], [20, 20, 21, 27], [25, 16, 30, 17], [25, 16, 30, 17]]
    assert prompting.lesion_boxes(np.zeros((40, 44, 10), np.uint8), boxy("LPS").grid)[1].shape == (0, 4)


@pytest.mark.parametrize("codes, axis", [("RAS", 2), ("LPI", 2), ("PIR", 1), ("SLA", 0)])
def test_a_users_boxes_and_points_are_voxels_of_the_slice_as_it_lies_in_the_file(obedient, boxy, codes, axis):
    case = boxy(codes)
    slices = np.moveaxis(case.mask == 1, axis, 0)
    number = int(slices.sum((1, 2)).argmax())
    places = np.argwhere(slices[number])
    both = obedient.segment_prompted(case, number, boxes=[[*places.min(0), *places.max(0)], [3, 4, 5, 8]])
    assert both[0].shape == (2, *slices.shape[1:]) and both[0].dtype == bool and both[1].tolist() == [0, 1]
    assert both[0][0, slice(*places.min(0)[[0]], places.max(0)[0] + 1), places.min(0)[1] : places.max(0)[1] + 1].all()
    assert both[0][0].sum() == np.prod(np.ptp(places, 0) + 1)
    assert both[0][1].sum() == 15 and both[0][1, 3:6, 4:9].all()
    mask = obedient.segment_prompted(case, number, points=[[[7, 5]]])[0][0]
    assert mask[7, 5] and np.abs(np.argwhere(mask).mean(0) - (7, 5)).max() < 0.6 and obedient.promptable.seen.labels.tolist() == [[1, -1]]
    obedient.segment_prompted(case, number, points=[[[7, 5], [1, 1]]], labels=[[1, 0]])
    assert obedient.promptable.seen.labels.tolist() == [[1, 0, -1]]


@pytest.mark.parametrize("asked", [dict(number=10, boxes=[[1, 1, 2, 2]]), dict(number=0, boxes=[[1, 1, 2, 44]]), dict(number=0, points=[[[-1, 0]]]),
                                   dict(number=0), dict(number=0, boxes=[[1, 1, 2, 2]], points=[[[1, 1]]]), dict(number=0, boxes=[]),
                                   dict(number=0, boxes=[[1, 2, 3]]), dict(number=0, points=[[1, 1]]), dict(number=0, points=[[[1, 1]]], labels=[1]),
                                   dict(number=0, points=[[[1, 1]]], labels=[[2]]), dict(number=0, points=[[[1, 1]]], labels=[[-2]]),
                                   dict(number=0, points=[[[1, 1]], [[1, 1], [2, 2]]]), dict(number=0, points=[[[1, float("nan")]]]),
                                   dict(number=0.5, boxes=[[1, 1, 2, 2]])])
def test_prompts_outside_of_the_scan_and_none_at_all_are_refused(obedient, boxy, asked):
    with pytest.raises(InputError, match="expected"):
        obedient.segment_prompted(boxy(), **asked)


def test_the_base_answers_as_it_does_image_by_image(recipe, boxy):
    engine, case = prompting.PromptEngine(recipe, "cpu"), boxy()
    together, quality = engine.segment_prompted(case, 4, boxes=[[12, 20, 15, 23], [20, 20, 21, 27]])
    alone = engine.segment_prompted(case, 4, boxes=[[20, 20, 21, 27]])
    np.testing.assert_array_equal(together[1], alone[0][0])
    assert quality[1] == pytest.approx(float(alone[1][0]), abs=1e-5)
    found = engine.zero_shot(case)
    for number in (5, 6):
        np.testing.assert_array_equal(found[..., number], engine.segment_prompted(case, number, boxes=[[25, 16, 30, 17]])[0][0])
    assert found[..., 5:7].any() and not found[..., :4].any()


def test_a_base_without_prompts_says_why_and_leaves_the_cases_alone(recipe, tmp_path):
    base, why = prompting.open_base(SMOKE)
    assert base is None and "random weights" in why
    encoder = {f"image_encoder.{name}": value for name, value in build_encoder(SMOKE.encoder, 0).state_dict().items()}
    torch.save(encoder, tmp_path / "encoder.pth")
    plain = dataclasses.replace(SMOKE, encoder=dataclasses.replace(SMOKE.encoder, checkpoint=str(tmp_path / "encoder.pth")))
    base, why = prompting.open_base(plain)
    assert base is None and "holds no prompt encoder" in why
    assert list(prompting.with_zero_shot([dict(case="a")], base)) == [dict(case="a")]
    assert prompting.open_base(recipe)[1].startswith("*zero-shot, true boxes* is no competitor")


def test_a_predicted_case_gets_the_baselines_mask(obedient, boxy):
    case = boxy()
    item = dict(volume=case.volume, normalised=case.images, inner=case.inner, reference=case.mask, grid=case.grid)
    np.testing.assert_array_equal(next(prompting.with_zero_shot([item], obedient))["zero_shot"], case.mask == 1)
    with pytest.raises(InputError, match="no reference"):
        obedient.zero_shot(dataclasses.replace(case, mask=None))


def test_a_case_without_a_lesion_has_an_empty_zero_shot_mask(obedient, boxy):
    case = boxy()
    found = obedient.zero_shot(dataclasses.replace(case, mask=np.zeros_like(case.mask)))
    assert found.shape == case.mask.shape and found.dtype == bool and not found.any()


def test_a_base_with_three_channels_of_its_own_is_fed_as_medsam(recipe, tmp_path, boxy):
    state = {name: value for name, value in torch.load(recipe.encoder.checkpoint).items() if not name.startswith("channel_adapter.")}
    torch.save(state, tmp_path / "medsam.pth")
    engine = prompting.PromptEngine(dataclasses.replace(recipe, encoder=dataclasses.replace(recipe.encoder, checkpoint=str(tmp_path / "medsam.pth"))), "cpu")
    case, seen = boxy(), []
    engine.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    assert engine.adapter is None and engine.zero_shot(case).shape == case.mask.shape
    places = torch.from_numpy(prompting.lesion_boxes(case.mask, case.grid)[0]).unique()
    torch.testing.assert_close(torch.cat(seen), three_channels(case_canvas(case, engine.size, places).transpose(0, 1), "medsam"))
