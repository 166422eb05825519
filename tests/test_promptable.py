"""The promptable path gives segment_anything's answers, prompts are drawn as SAM draws them, and files load or say why not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from wmhlib.errors import CheckpointError, InputError
from wmhlib.promptable import (
    Promptable,
    Prompts,
    draw_prompts,
    mask_boxes,
    promptable_of,
    sam_modeling,
    three_channels,
)
from wmhlib.weights import read_state

MLP = 64


def mixed() -> Prompts:
    """A box on each of two images, and points, some padding, on two."""
    boxes = Prompts.of_boxes(torch.tensor([0, 2]), torch.tensor([[3, 4, 50, 60], [10.5, 10, 20, 20]])).padded(4)
    points = Prompts.of_points(torch.tensor([1, 0]), 60 * torch.rand(2, 3, 2), torch.tensor([[1, 1, 0], [1, -1, -1]]))
    return Prompts(*(torch.cat([getattr(part, name) for part in (boxes, points)]) for name in ("image", "points", "labels")))


@pytest.mark.parametrize("h, w", [(4, 4), (3, 5)])
def test_mixed_prompts_on_many_images_get_the_masks_that_segment_anything_gives_one_by_one(h, w):
    ours, features, prompts = Promptable(4, MLP).eval(), torch.randn(3, 256, h, w), mixed()
    sam = sam_modeling()
    encoder = sam.prompt_encoder.PromptEncoder(256, (h, w), (16 * h, 16 * w), 16)
    encoder.load_state_dict(ours.prompt_encoder.state_dict())
    with torch.no_grad():
        logits, iou = ours(features, prompts)
        assert logits.shape == (4, 1, 4 * h, 4 * w) and iou.shape == (4,)
        for i in range(len(prompts)):
            point, label = prompts.points[i : i + 1], prompts.labels[i : i + 1]
            corner = label[0] >= 2
            boxes = point[:, corner].reshape(1, 4) if corner.any() else None
            rest = ~corner if corner.any() else torch.arange(label.shape[1]) < label.shape[1] - 1  # SAM pads points alone itself
            sparse, dense = encoder((point[:, rest], label[:, rest]), boxes, None)
            mask, quality = ours.mask_decoder(features[prompts.image[i]][None], encoder.get_dense_pe(), sparse, dense, False)
            torch.testing.assert_close(logits[i : i + 1], mask, atol=1e-5, rtol=0)
            torch.testing.assert_close(iou[i], quality[0, 0], atol=1e-5, rtol=0)


def test_plain_boxes_and_points_are_coded_as_segment_anything_codes_them():
    ours, boxes, points = Promptable(4, MLP), torch.tensor([[1.0, 2, 30, 40]]), torch.tensor([[[5.0, 6], [7, 8]]])
    where = torch.zeros(1, dtype=torch.long)
    for prompts, asked in ((Prompts.of_boxes(where, boxes), (None, boxes, None)),
                           (Prompts.of_points(where, points), ((points, torch.ones(1, 2)), None, None))):
        torch.testing.assert_close(ours._tokens(prompts, 4, 4), ours.prompt_encoder(*asked)[0])


def test_an_aligned_decoder_attends_where_the_prompt_points():
    plain, images = Promptable(8, MLP), torch.zeros(1, 256, 8, 8)
    places = plain.prompt_encoder.pe_layer((8, 8)).flatten(1).T
    token = plain._tokens(Prompts.of_points(torch.tensor([0]), torch.tensor([[[40.0, 24.0]]])), 8, 8)[:, 0]

    def rank(attention):
        scores = attention.k_proj(places + images.flatten(2)[0].T) @ attention.q_proj(token)[0]
        return int((scores > scores[8 * 1 + 2]).sum())  # of the patch that holds the point: row 24 // 16, column 40 // 16

    assert rank(plain.aligned().mask_decoder.transformer.layers[0].cross_attn_token_to_image) < 3


def test_prompts_of_different_kinds_keep_their_places_when_padded_and_taken_apart():
    prompts = mixed()
    assert prompts.labels.tolist() == [[2, 3, -1, -1], [2, 3, -1, -1], [1, 1, 0, -1], [1, -1, -1, -1]]
    assert prompts.image.tolist() == [0, 2, 1, 0] and len(prompts[1:3]) == 2 and prompts[prompts.image == 0].labels[1, 0] == 1


def test_gradients_reach_map_and_decoder_and_autocast_keeps_the_answer():
    ours, features, prompts = Promptable(4, MLP), torch.randn(3, 256, 4, 4, requires_grad=True), mixed()
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = ours(features, prompts)
    logits.float().mean().backward()
    assert features.grad.abs().sum() > 0 and ours.mask_decoder.mask_tokens.weight.grad.abs().sum() > 0
    plain = ours(features, prompts)[0].detach()
    assert (logits.detach() - plain).abs().mean() < 0.03 * plain.abs().mean()


@given(x=st.integers(0, 30), y=st.integers(0, 30), width=st.integers(1, 40), height=st.integers(1, 40), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_boxes_hold_their_mask_within_the_jitter_and_points_lie_where_they_say(x, y, width, height, seed):
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, y : y + height, x : x + width] = masks[1, x, y] = True
    generator = torch.Generator().manual_seed(seed)
    boxes = draw_prompts(masks, torch.tensor([3, 5]), generator, boxes=1.0)
    assert boxes.image.tolist() == [3, 5] and (boxes.labels[:, :2] == torch.tensor([2, 3])).all() and (boxes.labels[:, 2:] == -1).all()
    found, true = boxes.points[:, :2].flatten(1), mask_boxes(masks)
    assert (found - true).abs().max() <= 64 / 50 + 1e-4 and (found[:, :2] <= found[:, 2:]).all() and found.min() >= 0 and found.max() <= 63
    points = draw_prompts(masks, torch.tensor([0, 1]), generator, boxes=0.0, outside=1.0)
    for mask, places, labels in zip(masks, points.points.long(), points.labels):
        assert 1 <= (labels == 1).sum() <= 3 and labels[-1] == -1
        assert all(bool(mask[b, a]) == bool(kind) for (a, b), kind in zip(places, labels) if kind != -1)


def test_true_boxes_are_tight():
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, 3:6, 1:9] = True
    assert mask_boxes(mask).tolist() == [[1, 3, 8, 5]]


def test_prompts_follow_their_generator_and_mix_boxes_with_points():
    masks = torch.ones(64, 16, 16, dtype=torch.bool)
    one, same, other = (draw_prompts(masks, torch.arange(64), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.points, same.points) and torch.equal(one.labels, same.labels) and not torch.equal(one.points, other.points)
    assert 15 < (one.labels[:, 0] == 2).sum() < 49
    with pytest.raises(InputError, match="mask 1 of 2 is empty"):
        draw_prompts(torch.eye(2, dtype=torch.bool)[:, :, None] & torch.tensor([True, False])[:, None, None], torch.arange(2), torch.Generator())


@pytest.mark.parametrize("suffix, masks", [(".pth", 4), (".safetensors", 1)])
def test_a_base_file_gives_its_prompt_parts_back(tmp_path, suffix, masks):
    state = {**Promptable(4, MLP, masks).state_dict(), "image_encoder.pos_embed": torch.zeros(1)}
    path = tmp_path / f"base{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    loaded = promptable_of(read_state(path), path)
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_file_that_does_not_fit_lists_every_key():
    state = Promptable(4, MLP).state_dict()
    state["mask_decoder.extra"] = state.pop("mask_decoder.iou_token.weight")
    state["prompt_encoder.no_mask_embed.weight"] = torch.zeros(2, 256)
    with pytest.raises(CheckpointError, match=r"missing mask_decoder.iou_token.weight; unexpected mask_decoder.extra; .*no_mask_embed.weight is \(2, 256\), expected \(1, 256\)"):
        promptable_of(state, "base.safetensors")
    with pytest.raises(CheckpointError, match="holds no prompt encoder and mask decoder"):
        promptable_of({"image_encoder.pos_embed": torch.zeros(1)}, "encoder.safetensors")


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "damaged.pth").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="damaged"):
        read_state(tmp_path / "damaged.pth")


def test_slices_become_three_equal_channels_from_0_to_1():
    x = torch.tensor([[-5.0, 0.0], [5.0, 10.0]]).expand(2, 1, 2, 2)
    seen = three_channels(torch.cat([x, 9 * torch.ones_like(x)], 1))
    assert seen.shape == (2, 3, 2, 2) and seen[1, 2].tolist() == [[0, 0.5], [1, 1]], "the first channel, fat cut at the other end of its range"
    assert (three_channels(torch.full((1, 1, 2, 2), -5.0)) == 0).all()


def test_sam_is_fed_as_its_own_preprocessing_feeds_it():
    x = torch.rand(2, 1, 8, 8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)))  # segment_anything's defaults
    torch.testing.assert_close(three_channels(x, "sam"), (255 * three_channels(x) - mean) / std, atol=1e-5, rtol=0)


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.machinery.PathFinder.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install segment-anything"):
        sam_modeling.__wrapped__()
