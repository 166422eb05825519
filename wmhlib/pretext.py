"""What a base learns beside lesions, so that its map knows the whole head: its tissues, and the mask that a box or points ask for."""

from __future__ import annotations

import cc3d
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import dice_loss
from .medsam import CHANNELS
from .promptable import Promptable, draw_prompts
from .settings import Recipe

LABELS = 8  # background, lesion, other pathology; CSF, grey matter, white matter, bone, soft tissue
_QUARTER = 4  # pixels of the image a pixel of the masks
_LEAST = 4  # pixels of a part that a prompt may ask for
_LESION = 0.5  # chance that a prompt asks for a lesion where there is one


class Pretext(nn.Module):
    """A linear tissue head and SAM's promptable path, both on the encoder's map."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        self.settings = recipe.pretext
        self.tissue = nn.Conv2d(CHANNELS, LABELS * _QUARTER**2, 1)
        self.promptable = Promptable(recipe.inputs.img_size // 16, recipe.pretext.mlp, masks=1).aligned()

    def losses(self, features: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """The weighted losses "tissue" (cross-entropy at a quarter of the resolution) and "prompts" (balanced cross-entropy and Dice of
        each mask asked for, and the squared error of its estimated IoU). features: B x 256 x S/16 x S/16; labels: uint8 B x 1 x S x S,
        see LABELS. A batch that shows no tissue has losses of 0."""
        if not (labels > 2).any():
            return dict.fromkeys(("tissue", "prompts"), 0 * self.tissue.weight.sum())
        small = labels[:, 0, 2::_QUARTER, 2::_QUARTER].long()
        tissue = F.cross_entropy(F.pixel_shuffle(self.tissue(features), _QUARTER).float(), small, ignore_index=2)
        masks, image = draw_parts(labels, generator, self.settings.each)
        prompts = draw_prompts(masks, image, generator)
        logits, estimate = (x.float() for x in self.promptable(features, prompts))
        target = F.avg_pool2d(masks[:, None].float(), _QUARTER)
        masked = _balanced_cross_entropy(logits, target) + dice_loss(logits, target, torch.ones_like(target), each=True)
        found, truth = logits.detach() > 0, target >= 0.5
        iou = (found & truth).sum((1, 2, 3)) / (found | truth).sum((1, 2, 3)).clamp(min=1)
        masked = masked + F.mse_loss(estimate, iou)
        return {"tissue": self.settings.tissue * tissue, "prompts": self.settings.prompts * masked}


def _balanced_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Inside and outside of each mask weigh the same: else masks of few pixels stay empty for thousands of steps."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return sum((part * loss).sum((1, 2, 3)) / part.sum((1, 2, 3)).clamp(min=1e-3) for part in (target, 1 - target)).mean() / 2


def draw_parts(labels: Tensor, generator: torch.Generator, each: int = 1) -> tuple[Tensor, Tensor]:
    """`each` connected parts of lesions or tissues of every image that shows one: masks bool N x S x S, and the image of each."""
    masks, image = [], []
    for i, slice_ in [*enumerate(labels[:, 0].cpu())] * each:
        kinds = [kind for kind in slice_.unique().tolist() if kind not in (0, 2)]
        if not kinds:
            continue
        lesion = 1 in kinds and torch.rand((), generator=generator) < _LESION
        kind = 1 if lesion else kinds[int(torch.randint(len(kinds), (), generator=generator))]
        parts = torch.from_numpy(cc3d.connected_components((slice_ == kind).numpy(), connectivity=8).astype("int32"))
        sizes = parts.flatten().bincount()
        sizes[0] = 0
        large = (sizes >= min(_LEAST, int(sizes.max()))).nonzero().flatten()
        masks.append(parts == large[int(torch.randint(len(large), (), generator=generator))])
        image.append(i)
    return torch.stack(masks).to(labels.device), torch.tensor(image, device=labels.device)
