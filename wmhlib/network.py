"""WMHNet: channel adapter, SAM encoder with adapters, multi-scale decoder with an optional image skip."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import adapt, budget, merge
from .errors import CheckpointError
from .medsam import CHANNELS, ImageEncoder, build_encoder, load_checkpoint
from .precision import dtype_of
from .presets import PRESETS, preset
from .pretext import Pretext
from .settings import Recipe
from .trained import TrainedNet, read_weights
from .weights import check_state, weights_sha256

_SCALES = (128, 64, 32, 16)  # channels of the decoder, coarsest scale first
_PRIOR = -4.0  # bias of the heads: lesions are rare


class Decoder(nn.Module):
    """B x 256 x S/16 x S/16 -> logits at S/8, S/4, S/2 and S, and their learned fusion at S."""

    def __init__(self):
        super().__init__()
        widths = (CHANNELS, *_SCALES)
        self.up = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(a, b, 2, 2), nn.BatchNorm2d(b), nn.GELU(), *_conv(b, b))
            for a, b in zip(widths, widths[1:]))
        self.refine = nn.ModuleList(nn.Sequential(*_conv(b, b)) for b in _SCALES[:3])
        self.heads = nn.ModuleList(nn.Conv2d(b, 1, 1) for b in _SCALES)
        self.fuse = nn.Sequential(*_conv(4, 8), nn.Conv2d(8, 1, 1))
        for head in (*self.heads, self.fuse[-1]):
            nn.init.constant_(head.bias, _PRIOR)

    def forward(self, x: Tensor, skips: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        logits = []
        for i, up in enumerate(self.up):
            x = up(x)
            if skips:
                x = x + skips[i]
            if i < 3:
                x = self.refine[i](x)
            logits.append(self.heads[i](x))
        size = logits[-1].shape[-2:]
        fused = self.fuse(torch.cat([F.interpolate(z, size, mode="bilinear") for z in logits], 1))
        return fused, logits[::-1]


class Skip(nn.Module):
    """Convolutions straight from the image to every scale of the decoder: detail that 16-pixel patches lose."""

    def __init__(self, channels: int):
        super().__init__()
        widths = (channels, *_SCALES[::-1])
        self.down = nn.ModuleList(
            nn.Sequential(*_conv(a, b, stride=2 if i else 1), *(_conv(b, b) if i < 3 else ()))
            for i, (a, b) in enumerate(zip(widths, widths[1:])))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps for the decoder's four scales, coarsest first."""
        maps = []
        for down in self.down:
            x = down(x)
            maps.append(x)
        return maps[::-1]


class WMHNet(TrainedNet):
    """B x C x S x S normalised slices -> (B x 1 x S x S logits, logits at the four scales, finest first)."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            channels = recipe.inputs.channels
            self.channel_adapter = channel_adapter(channels)
            self.decoder = Decoder()
            self.skip = Skip(channels) if recipe.skip else None
            self.pretext = Pretext(recipe) if recipe.pretext.tissue or recipe.pretext.prompts else None
        for part in filter(None, (self.channel_adapter, self.decoder, self.skip)):
            part.to(memory_format=torch.channels_last)  # what convolutions of few channels are fastest in
            part.requires_grad_(not recipe.pretext.alone)
        self.recipe = recipe
        encoder = build_encoder(replace(recipe.encoder, checkpoint=""), recipe.seed)
        rest = load_checkpoint(encoder, recipe.encoder.checkpoint) if recipe.encoder.checkpoint else {}
        prompts = self.pretext.promptable if self.pretext else None
        self.started = []
        for name, part, prefix in (("channel_adapter", self.channel_adapter, "channel_adapter."), ("decoder", self.decoder, "decoder."),
                                   ("skip", self.skip, "skip."), ("prompts", prompts, "")):
            if part and _load_if_all_fit(part, rest, prefix, recipe.encoder.checkpoint):
                self.started.append(name)
        self.base_sha256 = "" if encoder.pos_embed.is_meta else weights_sha256(encoder)  # no data, where only sizes are counted
        if recipe.encoder.bits == 4:
            from .quantised import quantise  # here, since bitsandbytes is needed for nothing else
            encoder = quantise(encoder)
        self.encoder = adapt(encoder, recipe.adapter, recipe.seed)
        self.checkpoint_gradients(recipe.training.gradient_checkpointing)

    def train(self, mode: bool = True) -> WMHNet:
        """As of any module; parts that stay as they are (`pretext.alone`) keep their statistics too."""
        super().train(mode)
        for part in filter(None, (self.channel_adapter, self.decoder, self.skip) if self.recipe.pretext.alone else ()):
            part.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.decode(self.features(x), x)

    def features(self, x: Tensor) -> Tensor:
        """The encoder's map of the slices `x`, B x 256 x S/16 x S/16."""
        return self.encoder(self.channel_adapter(x))

    def decode(self, features: Tensor, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What `forward` gives, from the encoder's map of `x`."""
        return self.decoder(features, self.skip(x) if self.skip else None)

    def checkpoint_gradients(self, on: bool) -> None:
        """Let the encoder's backward pass compute each block again (`ImageEncoder`), or not."""
        for module in self.encoder.modules():
            if isinstance(module, ImageEncoder):
                module.checkpointing = on

    def cast_frozen(self, precision: str) -> WMHNet:
        """Keep the encoder's frozen matrices in `precision` ("no", "bf16", "fp16"), which autocast would turn them into anew in
        every pass: the same results in less time and memory."""
        for module in self.encoder.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                for parameter in module.parameters(recurse=False):
                    if not parameter.requires_grad and parameter.is_floating_point():  # 4 bits stay as they are
                        parameter.data = parameter.data.to(dtype_of(precision))
        return self

    def for_inference(self, precision: str) -> WMHNet:
        """A copy that predicts and cannot be trained: adapters merged into the matrices they adapt, these in `precision` (those of 4 bits
        too, which would have to be unpacked in every pass)."""
        network = copy.deepcopy(self).eval().requires_grad_(False)
        network.pretext = None
        if self.recipe.encoder.bits == 4:
            from .quantised import dequantised
            network.encoder = dequantised(network.encoder)
        network.encoder = merge(network.encoder)
        return network.cast_frozen(precision)


def build_network(recipe: Recipe) -> TrainedNet:
    """The network of `recipe`: a `WMHNet` of slices, or where it has a `volume.network` a `VolumeNet` of volumes."""
    if not recipe.volume.network:
        return WMHNet(recipe)
    from .volumetric.model import VolumeNet  # here, since nothing else needs MONAI

    return VolumeNet(recipe)


def load_network(path: str | Path, checkpoint: str = "") -> tuple[TrainedNet, str]:
    """The network of a weights file, which has its recipe, and the split it was trained on ("" if unknown). `checkpoint` says
    where the base lies if it moved.

    Raises CheckpointError for a damaged file, keys that do not fit, or another base than the one trained on.
    """
    state, origin = read_weights(path)
    recipe = Recipe.from_json(origin["recipe"], path)
    if checkpoint:
        recipe = replace(recipe, encoder=replace(recipe.encoder, checkpoint=checkpoint))
    network = build_network(recipe)
    if network.base_sha256 != origin["base_sha256"]:
        raise CheckpointError(f"weights {path} were trained on the base {origin['base_sha256'][:12]}, "
                              f"{recipe.encoder.checkpoint or 'the random base of this seed'} is "
                              f"{network.base_sha256[:12]}: set encoder.checkpoint in the run's recipe.json to the file that the run used")
    network.load_trained_state(state, path)
    return network.eval(), str(origin.get("split", ""))


def channel_adapter(channels: int) -> nn.Sequential:
    """Makes of B x C x S x S slices the three channels that SAM's encoder takes."""
    return nn.Sequential(*_conv(channels, 16), nn.Conv2d(16, 3, 1))


def base_channel_adapter(state: dict[str, Tensor], channels: int, source: str | Path) -> nn.Sequential | None:
    """The channel adapter that the base file `source` (its tensors: `state`) brings; None where it has none. CheckpointError for one
    that does not fit `channels`."""
    state = {key.removeprefix("channel_adapter."): value for key, value in state.items() if key.startswith("channel_adapter.")}
    if not state:
        return None
    adapter = channel_adapter(channels)
    check_state(adapter.state_dict(), state, f"checkpoint {source} has a channel adapter that does not fit {channels} input channels")
    adapter.load_state_dict(state)
    return adapter


def _load_if_all_fit(part: nn.Module, rest: dict[str, Tensor], prefix: str, source: str) -> bool:
    """Load into `part` its weights in the base file `source` under `prefix` if every tensor is there in its shape; whether it did. CheckpointError where
    they are no weights."""
    expected = part.state_dict()
    state = {key: rest[prefix + key] for key in expected if prefix + key in rest}
    fits = {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    if fits:
        check_state(expected, state, f"checkpoint {source} cannot be started from")
        part.load_state_dict(state)
    return fits


def _conv(a: int, b: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(a, b, 3, stride, padding=1), nn.BatchNorm2d(b), nn.GELU()]


def budget_table() -> str:
    """What each preset that adapts a base trains, counted from its network, as Markdown."""
    lines = ["| preset | encoder | LoRA | decoder, channel adapter, skip | trainable | share of all | trained weights, fp32 |",
             "|---|---|---|---|---|---|---|"]
    for name in (name for name, recipe in PRESETS.items() if recipe.adapter.method == "lora"):
        with torch.device("meta"):  # sizes are all it takes
            counts = budget(WMHNet(preset(name, "encoder.checkpoint=")))
        rest = counts["decoder"] + counts["channel_adapter"] + counts["skip"]
        lines.append(f"| {name} | {counts['encoder']:,} | {counts['adapter']:,} | {rest:,} | {counts['trainable']:,} | "
                     f"{counts['share_percent']:.2f} % | {counts['trainable_mb_fp32']:.1f} MB |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(budget_table())
