"""The straightforward ways that notebook 10_benchmark compares with: the same weights and results by plain code.

segment_anything's own encoder run eagerly in fp32, one slice and one view at a time, augmentation sample by sample with
scipy, and a search that labels every mask anew.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial

import numpy as np
import peft
import torch
from scipy import ndimage
from torch import Tensor, nn

from ..batches import with_context
from ..canvas import from_canvas
from ..engine import VIEWS, turn, unturn
from ..medsam import CHANNELS, PATCH, build_encoder, positions
from ..network import WMHNet
from ..promptable import sam_modeling
from ..sections import Augment, Encoder, Operating
from ..slicestore import CaseSlices
from ..volumes import AIR, BRIGHTEST, Case, case_canvas


def sam_encoder(settings: Encoder, state: dict[str, Tensor], px: int) -> nn.Module:
    """segment_anything's encoder (eager) with the weights `state` of ours: B x 3 x px x px -> B x 256 x px/16 x px/16. Its
    position embedding is resized to px as ours is. Raises InputError where the package is missing."""
    encoder = sam_modeling().image_encoder.ImageEncoderViT(
        img_size=PATCH * settings.grid, patch_size=PATCH, embed_dim=settings.dim, depth=settings.depth, num_heads=settings.heads,
        mlp_ratio=4, out_chans=CHANNELS, qkv_bias=True, use_rel_pos=True, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_size=settings.window, global_attn_indexes=settings.global_blocks)
    encoder.pos_embed = nn.Parameter(torch.zeros(1, px // PATCH, px // PATCH, settings.dim))
    encoder.load_state_dict(_resized(state, px))
    return encoder.eval()


def _resized(state: dict[str, Tensor], px: int) -> dict[str, Tensor]:
    side = px // PATCH
    return {name: positions(value, side, side) if name.endswith("pos_embed") else value for name, value in state.items()}


def eager_network(network: WMHNet, px: int) -> WMHNet:
    """A copy of `network` (fp32, adapters not merged but those that are not peft's or not of its plain kind) with segment_anything's encoder in
    place of ours, peft's own adapters and plain memory layout: the same weights by the same names, for slices of `px` pixels."""
    recipe, encoder = network.recipe, network.encoder
    merged = recipe.encoder.bits == 4 or recipe.adapter.method in ("adalora", "salt", "ssam")  # which SAM's encoder cannot hold
    state = (network.for_inference("no").encoder if merged else encoder).state_dict()
    network.encoder = None
    eager = copy.deepcopy(network).to(memory_format=torch.contiguous_format)
    network.encoder = encoder
    sam = sam_encoder(recipe.encoder, build_encoder(recipe.encoder, recipe.seed).state_dict(), px)
    eager.encoder = peft.get_peft_model(sam, encoder.peft_config["default"]) if isinstance(encoder, peft.PeftModel) and not merged else sam
    eager.encoder.load_state_dict(_resized(state, px))
    return eager.train(network.training)


@torch.inference_mode()
def slice_by_slice(network: WMHNet, case: Case) -> np.ndarray:
    """Mean probability over eight views, float32 H x W x D on the scan's grid: every slice, brain or not, one
    slice and one view at a time."""
    images = case_canvas(case, network.recipe.inputs.img_size)
    mean, device = torch.zeros(images.shape[1:]), next(network.parameters()).device
    for z in range(images.shape[1]):
        one = with_context(images, z, network.recipe.inputs.context)[None].to(device)
        for view in VIEWS[8]:
            mean[z] += unturn(torch.sigmoid(network(turn(one, *view))[0]), *view)[0, 0].cpu() / 8
    return from_canvas(mean, case.grid).clip(0, 1)


def per_sample_batch(cases: list[CaseSlices], places: list[tuple[int, int]], settings: Augment, context: int,
                     rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The changes of `batches.augment` (but its bias field), one slice after the other on the CPU: images float32
    B x C x S x S and labels uint8 B x 1 x S x S of the (case, slice) `places`."""
    samples = [_one(with_context(cases[i].images, z, context).float().numpy(), cases[i].labels[z].numpy(), settings, rng) for i, z in places]
    images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*samples))
    return images, labels[:, None]


def _one(image: np.ndarray, label: np.ndarray, settings: Augment, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    def uniform(limit: float) -> float:
        return rng.uniform(-limit, limit)

    angle = np.radians(uniform(settings.rotation) + 90 * rng.integers(4) * settings.rotate90)
    flips = [1 - 2 * rng.integers(2) * on for on in (settings.flips_ap, settings.flips)]
    matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * flips * np.exp(uniform(np.log1p(settings.scale)))
    centre = (np.array(label.shape) - 1) / 2
    offset = centre - matrix @ centre
    image = np.stack([ndimage.affine_transform(channel, matrix, offset, order=1, cval=AIR) for channel in image])
    label = ndimage.affine_transform(label, matrix, offset, order=0)
    image = AIR - AIR * np.clip((image - AIR) / -AIR, 0, None) ** float(np.exp(uniform(settings.gamma)))
    image = image * (1 + uniform(settings.contrast)) + uniform(settings.brightness)
    image = image + abs(uniform(settings.noise)) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, AIR, BRIGHTEST).astype(np.float32), label


def naive_search(cases: Iterable[dict], operating: Operating) -> dict[str, list[float]]:
    """Dice of each case, by name, at every point in the order of the table of `search.search`: for each point the mask is
    labelled anew (26-connected) and its components are dropped one by one, each in a pass over the volume."""
    thresholds = sorted({*operating.thresholds, operating.threshold})
    voxels, mm3 = sorted({*operating.sizes, operating.min_voxels}), sorted(set(operating.sizes_mm3))
    table = {}
    for case in cases:
        sizes = voxels + [size / np.prod(case["spacing"]) - 1e-6 for size in mm3]
        table[case["case"]] = [_naive_dice(case[prob] >= threshold, case["reference"], size)
                               for prob in ("prob", "prob_tta") for threshold in thresholds for size in sizes]
    return table


def _naive_dice(mask: np.ndarray, reference: np.ndarray, smallest: float) -> float:
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    for number in range(1, count + 1):
        component = labels == number
        if component.sum() < smallest:
            mask[component] = False
    mask &= reference != 2
    lesion = reference == 1
    both, total = int((mask & lesion).sum()), int(mask.sum()) + int(lesion.sum())
    return 2 * both / total if total else float("nan")
