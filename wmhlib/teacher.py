"""Who teaches whom: encoders by name, the settings of a distillation, and the frozen teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import CheckpointError, RecipeError
from .medsam import PATCH, build_encoder, load_checkpoint
from .network import base_channel_adapter
from .presets import MINI
from .promptable import Promptable, promptable_of, three_channels
from .sections import SHIPPED, Encoder, Inputs, Training, require
from .weights import weights_sha256

ENCODERS = {  # by name: SAM's three, MedSAM's, and smaller ones
    "vit_h": Encoder(1280, 32, 16, (7, 15, 23, 31), bits=4, random=True, pixels="sam"),  # in 4 bits, where it teaches
    "vit_l": Encoder(1024, 24, 16, (5, 11, 17, 23), bits=4, random=True, pixels="sam"),
    "vit_b": Encoder(random=True),  # MedSAM's
    "sam_vit_b": Encoder(random=True, pixels="sam"),
    "vit_t": Encoder(192, 12, 3, (2, 5, 8, 11), random=True),
    "small": MINI,
    "tiny": Encoder(96, 3, 3, (2,), 7, 13, random=True),
}


@dataclass(frozen=True)
class Distillation:
    """What a distillation does. `alpha` weighs the feature loss, 1 - alpha the mask loss; `prompts` are drawn for each slice and
    step. Of `training` the loop uses epochs, batch_size, lr and its schedule, weight_decay, betas, clip_norm, checkpoint_epochs,
    precision, slices, and the shares of slices without a lesion."""

    teacher: Encoder
    student: Encoder
    alpha: float = 0.5
    feature: str = "mse"  # or "huber"
    temperature: float = 2.0
    prompts: int = 2
    mirror: bool = True  # embeddings of the left-right mirrored slices too
    seed: int = 42
    inputs: Inputs = field(default_factory=Inputs)
    training: Training = field(default_factory=Training)

    def __post_init__(self):
        require(0 <= self.alpha <= 1, "distillation.alpha", self.alpha, "0 to 1")
        require(self.feature in ("mse", "huber"), "distillation.feature", self.feature, "'mse' or 'huber'")
        require(self.temperature > 0, "distillation.temperature", self.temperature, "above 0")
        require(self.prompts >= 1, "distillation.prompts", self.prompts, "at least 1")


PRESETS = {
    # ViT-H, or whatever file `teacher.checkpoint` names, teaches a ViT-Tiny.
    "colab": Distillation(replace(ENCODERS["vit_h"], random=False), ENCODERS["vit_t"],
                          training=Training(60, 8, 1, 1e-3, warmup_epochs=3, restart_epochs=57, checkpoint_epochs=5, precision="bf16")),
    # The shipped base teaches one of less than half its size: minutes on two cores.
    "demo": Distillation(replace(ENCODERS["small"], checkpoint=SHIPPED, random=False), ENCODERS["tiny"], inputs=Inputs(img_size=208, fov=208.0),
                         training=Training(8, 16, 1, 2e-3, warmup_epochs=1, restart_epochs=7, checkpoint_epochs=2, precision="bf16")),
    # Seconds, a random teacher, for the tests.
    "smoke": Distillation(Encoder(32, 2, 2, (1,), 4, 4, random=True), Encoder(16, 1, 2, (0,), 4, 4, random=True), inputs=Inputs(img_size=64),
                          training=Training(2, 8, 1, 2e-3, warmup_epochs=1, restart_epochs=1, checkpoint_epochs=1)),
}


def choose(preset: str, inputs: Inputs, teacher: str = "", teacher_kind: str = "", student_kind: str = "", seed: int = 42, **changes) -> Distillation:
    """The distillation called `preset` on slices as `inputs` has them; where given, with the file `teacher` as teacher, whose encoder is
    `teacher_kind`, and a student of `student_kind` (both names of ENCODERS), whose own size is that of these slices.
    `changes`: other fields of it. Raises RecipeError for a name that is not known, and an impossible value."""
    for name, known in ((preset, PRESETS), (teacher_kind or "tiny", ENCODERS), (student_kind or "tiny", ENCODERS)):
        if name not in known:
            raise RecipeError(f"there is no {name!r}: known are {', '.join(known)}")

    def named(kind: str, own: Encoder) -> Encoder:
        return replace(ENCODERS[kind], random=own.random) if kind else own

    settings = PRESETS[preset]
    encoder, student = named(teacher_kind, settings.teacher), named(student_kind, settings.student)
    if teacher:
        path = teacher if teacher == SHIPPED else str(Path(teacher).expanduser().absolute())
        encoder = replace(encoder, checkpoint=path, random=False)
    student = replace(student, bits=16, pixels=encoder.pixels, grid=inputs.img_size // PATCH)
    return replace(settings, teacher=encoder, student=student, inputs=inputs, seed=seed, **changes)


class Teacher(nn.Module):
    """A frozen base: `encoder`, `promptable` (None where its file has no prompt parts), `channel_adapter` (None: `three_channels`),
    and `others`, all tensors of its file beside the encoder's. A teacher without a file is random. `sha256` tells it from any other,
    `embeds_sha256` what embeddings depend on."""

    def __init__(self, settings: Distillation):
        super().__init__()
        if not (settings.teacher.checkpoint or settings.teacher.random):
            raise RecipeError("the distillation names no teacher: give a checkpoint of SAM's format (SAM, MedSAM, a base)")
        encoder, path = build_encoder(replace(settings.teacher, checkpoint=""), settings.seed), settings.teacher.checkpoint
        if path:
            self.others = load_checkpoint(encoder, path)
            prompted = any(key.startswith("mask_decoder.") for key in self.others)
            self.promptable = promptable_of(self.others, path) if prompted else None
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(settings.seed)
                self.promptable = Promptable(settings.teacher.grid, 64)
            self.others = self.promptable.state_dict()
        if not self.promptable and settings.alpha < 1:
            raise CheckpointError(f"checkpoint {path} holds no prompt encoder and mask decoder, which the mask loss needs: "
                                  "give one of SAM's format, or set alpha to 1 (notebook 08)")
        self.channel_adapter = base_channel_adapter(self.others, settings.inputs.channels, path)
        self.embeds_sha256 = _digest(weights_sha256(encoder), self.channel_adapter.state_dict() if self.channel_adapter else {})
        self.sha256 = _digest(self.embeds_sha256, self.others)
        if settings.teacher.bits == 4:
            from .quantised import quantise  # needs bitsandbytes, which others do without
            quantise(encoder)
        self.encoder, self.pixels, self.context = encoder, settings.teacher.pixels, settings.inputs.context
        self.eval().requires_grad_(False)

    def three(self, x: Tensor) -> Tensor:
        """B x C x S x S slices -> the B x 3 x S x S image that teacher and student see."""
        return self.channel_adapter(x) if self.channel_adapter else three_channels(x[:, self.context :], self.pixels)  # the slice itself


def _digest(start: str, state: Mapping[str, Tensor]) -> str:
    """The sha256 of a text and of tensors with their names."""
    digest = hashlib.sha256(start.encode())
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
