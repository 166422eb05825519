"""SAM's promptable path (Kirillov et al. 2023, appendix A): points and boxes on top of an image encoder's map.

The parts are segment_anything's own, so that its checkpoints and MedSAM's load by name; only the forward pass is ours. Theirs
repeats one image for all of its prompts, ours takes any prompts on any images of a batch, at any size.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from .errors import CheckpointError, InputError
from .medsam import CHANNELS, PATCH
from .volumes import AIR
from .weights import check_state

BACKGROUND, FOREGROUND, PADDING, CORNERS = 0, 1, -1, (2, 3)  # labels of points, as SAM codes them
_POINTS = 3  # drawn within a mask, at most
_SAM_MEAN, _SAM_STD = (0.4850, 0.4560, 0.4060), (0.2290, 0.2240, 0.2250)  # 123.675, 116.28, 103.53 and 58.395, 57.12, 57.375 of 255
_PARTS = ("prompt_encoder.", "mask_decoder.")
_MASKS = "mask_decoder.mask_tokens.weight"
_WIDTH = "mask_decoder.transformer.layers.0.mlp.lin1.weight"


@functools.cache
def sam_modeling() -> ModuleType:
    """segment_anything's modeling package; the package's root, which needs torchvision, is not run. InputError if missing."""
    found = importlib.machinery.PathFinder.find_spec("segment_anything")
    if found is None:
        raise InputError("the package segment_anything is not installed: pip install segment-anything")
    root = ModuleType("_segment_anything_modeling")
    root.__path__ = [str(Path(found.submodule_search_locations[0], "modeling"))]
    sys.modules[root.__name__] = root
    for name in ("image_encoder", "mask_decoder", "prompt_encoder", "transformer"):
        setattr(root, name, importlib.import_module(f"{root.__name__}.{name}"))
    return root


@dataclass(frozen=True)
class Prompts:
    """N prompts, of P points each, on the images of a batch.

    image: int64 N, the image each is for; points: float32 N x P x 2, x (column) and y (row) in pixels of the S x S image, 0 the
    middle of the first one; labels: int64 N x P, 1 inside the object, 0 outside, 2 and 3 a box's upper left and lower right
    corner (the last pixel within), -1 padding.
    """

    image: Tensor
    points: Tensor
    labels: Tensor

    @staticmethod
    def of_boxes(image: Tensor, boxes: Tensor) -> Prompts:
        """`boxes`: N x 4, first and last column and row of each as x0, y0, x1, y1."""
        points = boxes.float().reshape(-1, 2, 2)
        return Prompts(image.long(), points, torch.tensor(CORNERS, device=boxes.device).expand(len(points), 2))

    @staticmethod
    def of_points(image: Tensor, points: Tensor, labels: Tensor | None = None) -> Prompts:
        """`points`: N x P x 2; `labels`: N x P, all of them inside unless given. One point of padding follows, as in SAM."""
        labels = torch.ones_like(points[..., 0]) if labels is None else labels
        plain = Prompts(image.long(), points.float(), labels.long())
        return plain.padded(points.shape[1] + 1)

    def padded(self, size: int) -> Prompts:
        """The same prompts with `size` points each."""
        missing = size - self.labels.shape[1]
        return Prompts(self.image, nn.functional.pad(self.points, (0, 0, 0, missing)), nn.functional.pad(self.labels, (0, missing), value=PADDING))

    def to(self, device: torch.device | str) -> Prompts:
        return Prompts(self.image.to(device), self.points.to(device), self.labels.to(device))

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, places) -> Prompts:
        """The prompts at `places` (a slice, a mask or indices)."""
        return Prompts(self.image[places], self.points[places], self.labels[places])


class Promptable(nn.Module):
    """SAM's prompt encoder and mask decoder. `grid`: side in tokens of the map they are made for (any other works too); `mlp`:
    width of the decoder's hidden layers, 2048 in SAM and MedSAM; `masks`: how many it can give, of which the first is the one
    that counts here: 4 in SAM and MedSAM."""

    def __init__(self, grid: int, mlp: int = 2048, masks: int = 4):
        super().__init__()
        sam = sam_modeling()
        self.prompt_encoder = sam.prompt_encoder.PromptEncoder(CHANNELS, (grid, grid), (PATCH * grid, PATCH * grid), 16)
        transformer = sam.transformer.TwoWayTransformer(2, CHANNELS, 8, mlp)
        self.mask_decoder = sam.mask_decoder.MaskDecoder(transformer_dim=CHANNELS, transformer=transformer, num_multimask_outputs=masks - 1)

    def aligned(self) -> Promptable:
        """This module with queries and keys projected alike where image and prompts meet, so that what lies close attends to each
        other from the first step of a training from nothing, which learns sooner."""
        transformer = self.mask_decoder.transformer
        for attention in (transformer.final_attn_token_to_image, *(part for layer in transformer.layers
                          for part in (layer.cross_attn_token_to_image, layer.cross_attn_image_to_token))):
            nn.init.orthogonal_(attention.q_proj.weight)
            attention.k_proj.weight.data.copy_(attention.q_proj.weight)
        return self

    def forward(self, features: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """`features`: B x 256 x h x w of 16h x 16w images -> logits N x 1 x 4h x 4w and the decoder's own estimate of their IoU (N).
        The mask is SAM's single one, meant for prompts that leave no doubt."""
        decoder, (h, w) = self.mask_decoder, features.shape[-2:]
        with torch.autocast(features.device.type, enabled=False):  # sines of large angles
            places = self.prompt_encoder.pe_layer((h, w))
            asked = self._tokens(prompts, h, w)
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(prompts), -1, -1), asked], 1)
        maps = features[prompts.image] + self.prompt_encoder.no_mask_embed.weight[..., None, None]
        tokens, maps = decoder.transformer(maps, places.expand_as(maps), tokens)
        maps = decoder.output_upscaling(maps.transpose(1, 2).unflatten(2, (h, w)))
        kernel = decoder.output_hypernetworks_mlps[0](tokens[:, 1])
        logits = torch.einsum("nc,nchw->nhw", kernel, maps.to(kernel.dtype))[:, None]
        return logits, decoder.iou_prediction_head(tokens[:, 0])[:, 0]

    def _tokens(self, prompts: Prompts, h: int, w: int) -> Tensor:
        """N x P x 256: where a point lies, and what kind it is; padding lies nowhere."""
        encoder = self.prompt_encoder
        kinds = torch.cat([encoder.not_a_point_embed.weight, *(part.weight for part in encoder.point_embeddings)])
        places = encoder.pe_layer.forward_with_coords(prompts.points + 0.5, (PATCH * h, PATCH * w))
        return places * (prompts.labels != PADDING)[..., None] + kinds[prompts.labels + 1]


def three_channels(x: Tensor, pixels: str = "medsam") -> Tensor:
    """B x C x S x S normalised slices (see `volumes`) -> B x 3 x S x S in 0..1, as MedSAM was trained: the first channel, without
    the brightest values, between its own extremes, three times; with `pixels` "sam" each of the three by the mean and standard deviation that
    SAM was trained with (Kirillov et al. 2023). For bases without a channel adapter."""
    x = x[:, :1].clamp(max=-AIR)
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    x = ((x - low) / (high - low).clamp_min(1e-6)).expand(-1, 3, -1, -1)
    return x if pixels == "medsam" else (x - x.new_tensor(_SAM_MEAN).view(3, 1, 1)) / x.new_tensor(_SAM_STD).view(3, 1, 1)


def draw_prompts(masks: Tensor, image: Tensor, generator: torch.Generator, boxes: float = 0.5, outside: float = 0.3) -> Prompts:
    """One prompt for each mask, as SAM draws them in training: a box, or points.

    masks: bool N x S x S, none of them empty (else InputError); image: N. `boxes`: the chance of a box, whose every side is
    moved by a normal deviate of a tenth of its length and half a pixel, at most S/50; else 1 to 3 points within the mask and,
    with chance `outside`, one near it that is not. One set of numbers is drawn from `generator` whatever the masks are.
    """
    n, size = len(masks), masks.shape[-1]
    counts = masks.flatten(1).sum(1)
    if n and int(counts.min()) == 0:
        raise InputError(f"mask {int(counts.argmin())} of {n} is empty: expected an object to draw prompts for")
    draw = torch.rand(n, 3 + 3 * _POINTS, generator=generator, device=generator.device).to(masks.device)
    noise = torch.randn(n, 4, generator=generator, device=generator.device).to(masks.device)
    tight = mask_boxes(masks)
    sides = (tight[:, 2:] - tight[:, :2] + 1).repeat(1, 2)
    loose = (tight + (noise * (0.1 * sides + 0.5)).clamp(-size / 50, size / 50)).clamp(0, size - 1)
    loose = torch.cat([torch.minimum(loose[:, :2], loose[:, 2:]), torch.maximum(loose[:, :2], loose[:, 2:])], 1)

    pixels = masks.reshape(-1).nonzero()[:, 0]
    ranks = (draw[:, 3 : 3 + _POINTS] * counts[:, None]).long().clamp_max(counts[:, None] - 1)
    inside = pixels[(counts.cumsum(0) - counts)[:, None] + ranks] % (size * size)
    inside = torch.stack([inside % size, inside // size], -1).float()

    spread = draw[:, 3 + _POINTS :].unflatten(1, (_POINTS, 2))
    near = (tight[:, None, :2] + (spread * 2 - 0.5) * sides[:, None, :2]).round().clamp(0, size - 1)
    off = ~masks[torch.arange(n, device=masks.device)[:, None], near[..., 1].long(), near[..., 0].long()]
    chosen = off.int().argmax(1)
    wrong = near[torch.arange(n, device=masks.device), chosen][:, None]
    told = off.any(1) & (draw[:, 1] < outside)

    count = 1 + (draw[:, 2] * _POINTS).long().clamp_max(_POINTS - 1)
    labels = torch.where(torch.arange(_POINTS, device=masks.device) < count[:, None], FOREGROUND, PADDING)
    labels = torch.cat([labels, torch.where(told, BACKGROUND, PADDING)[:, None]], 1)
    points = Prompts.of_points(image, torch.cat([inside, wrong], 1), labels)
    box = Prompts.of_boxes(image, loose).padded(points.labels.shape[1])
    boxed = (draw[:, 0] < boxes)[:, None]
    return Prompts(points.image, torch.where(boxed[..., None], box.points, points.points), torch.where(boxed, box.labels, points.labels))


def mask_boxes(masks: Tensor) -> Tensor:
    """Bool N x S x S, none of them empty -> float32 N x 4: first and last column and row of each as x0, y0, x1, y1."""
    size = masks.shape[-1]
    spans = [torch.stack([line.int().argmax(1), size - 1 - line.flip(1).int().argmax(1)], 1) for line in (masks.any(1), masks.any(2))]
    return torch.stack(spans, 2).float().flatten(1)  # N x (first, last) x (x, y)


def promptable_of(state: dict[str, Tensor], source: str | Path) -> Promptable:
    """The prompt encoder and mask decoder, in evaluation mode, from the tensors by name of the SAM, MedSAM or shipped base file `source`
    (`weights.read_state`), whatever else is among them. Raises CheckpointError listing every missing, unexpected and misshapen key."""
    state = {key: value for key, value in state.items() if key.startswith(_PARTS)}
    if missing := [key for key in (_WIDTH, _MASKS) if key not in state]:
        raise CheckpointError(f"checkpoint {source} holds no prompt encoder and mask decoder: missing {', '.join(missing)}; expected a file of SAM or MedSAM")
    promptable = Promptable(64, state[_WIDTH].shape[0], state[_MASKS].shape[0])
    check_state(promptable.state_dict(), state, f"checkpoint {source} does not fit SAM's prompt encoder and mask decoder")
    promptable.load_state_dict(state)
    return promptable.eval()
