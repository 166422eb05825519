"""Parameter-efficient adaptation of the encoder, and the count of what is trained."""

from __future__ import annotations

import math
import re

import peft
import torch
from peft.tuners.adalora.layer import AdaLoraLayer, SVDLinear
from torch import Tensor, nn

from . import spectral
from .sections import Adapter
from .threads import one_thread

_ATTENTION, _MLP = r".*\.attn\.(qkv|proj)", r".*\.mlp\.lin[12]"


class Dropout(nn.Dropout):
    """nn.Dropout with a quarter of the random numbers on a CPU: 64 bits decide over four elements, so that `p` holds to within
    1e-5; what is kept is divided by its share."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        kept = max(1, round((1 - self.p) * 2**16))  # of the 2^16 values that 16 bits have
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
        return x * torch.le(bits[: x.numel()].view(x.shape), kept - 1 - 2**15, out=torch.empty_like(x)).mul_(2**16 / kept)


class Linear(peft.tuners.lora.Linear):
    """peft's layer, the same function in fewer passes over its map: it is cast once, and the product of the factors is added
    where the base's output lies. DoRA's row lengths are a constant of the backward pass, as in its paper (section 4.3), and its dropout
    falls on the product of the factors alone."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        dora = self.use_dora.get("default")
        other = not dora and getattr(self, "lora_variant", None)
        if self.active_adapters != ["default"] or self.disable_adapters or self.merged or args or kwargs or other:
            return super().forward(x, *args, **kwargs)
        shape = x.shape
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = x.reshape(-1, shape[-1])
        inner = self.lora_A["default"](self.lora_dropout["default"](x))
        outer = self.lora_B["default"].weight * self.scaling["default"]
        y = self.base_layer(x).addmm_(inner, outer.to(inner.dtype).T)
        if dora:
            y = torch.addcmul(y, y - self.base_layer.bias.to(y.dtype), (self._stretch() - 1).to(y.dtype))  # less 1, near which bf16 is coarse
        return y.view(*shape[:-1], -1)

    def _stretch(self) -> Tensor:
        """DoRA's m / || W + B A ||, of each row."""
        length = self.lora_magnitude_vector["default"].weight
        with torch.no_grad(), torch.autocast(length.device.type, enabled=False):
            a, b = self.lora_A["default"].weight, self.lora_B["default"].weight
            rows = torch.addmm(self.base_layer.weight.to(a.dtype), b, a, alpha=self.scaling["default"])
            norm = torch.linalg.norm(rows, dim=1)
        return length / norm


def adapt(encoder: nn.Module, adapter: Adapter, seed: int) -> nn.Module:
    """Freeze `encoder`, its output unchanged, but for what `adapter.method` trains of it or puts on its attention and MLP layers:

    - "lora" (Hu et al. 2021): W + B A, alpha equal to the rank; "rslora" (Kalajdzievski 2023): sqrt(rank) times B A
    - "dora" (Liu et al. 2024): LoRA on the directions of W's rows, and their lengths
    - "pissa" (Meng et al. 2024, eq. 2 to 4): B A starts as the largest singular values and vectors of W, and W as what is left; without
      dropout, which would take away from W
    - "adalora" (Zhang et al. 2023): W + P diag(E) Q, its values pruned while training (`ranks`); starts from the ranks given
    - "salt", "ssam": see `spectral`
    - "bias" (BitFit, Ben Zaken et al. 2022): all biases, and the weights of the norms
    - "none", "full": nothing, everything
    """
    for module in encoder.modules():
        for name, parameter in module.named_parameters(recurse=False):
            parameter.requires_grad_(adapter.method == "full" or adapter.method == "bias" and (name == "bias" or isinstance(module, nn.LayerNorm)))
    if adapter.method in ("bias", "none", "full"):
        return encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if adapter.method in ("salt", "ssam"):
            spectral.attach(encoder, adapter)
            return encoder
        return _low_rank(encoder, adapter)


def _low_rank(encoder: nn.Module, adapter: Adapter) -> peft.PeftModel:
    dropout = 0.0 if adapter.method == "pissa" else adapter.dropout
    given = dict(lora_alpha=adapter.rank_attention, lora_dropout=dropout, target_modules=f"{_ATTENTION}|{_MLP}" if adapter.rank_mlp else _ATTENTION)
    on_mlp = {_MLP: adapter.rank_mlp} if adapter.rank_mlp else {}
    if adapter.method == "adalora":
        adapted = peft.get_peft_model(encoder, peft.AdaLoraConfig(init_r=adapter.rank_attention, total_step=1, **given))  # our `ranks` prunes
    else:
        adapted = peft.get_peft_model(encoder, peft.LoraConfig(
            r=adapter.rank_attention, rank_pattern=on_mlp, alpha_pattern=on_mlp,
            use_rslora=adapter.method == "rslora", use_dora=adapter.method == "dora", **given))
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.__class__ = Linear
        if isinstance(module, AdaLoraLayer) and re.fullmatch(_MLP, name):  # peft's config has one rank for all
            module.update_layer("default", adapter.rank_mlp, adapter.rank_mlp, adapted.peft_config["default"])
        if dropout and isinstance(module, (Linear, SVDLinear)):
            module.lora_dropout["default"] = Dropout(dropout)
        if adapter.method == "pissa" and isinstance(module, Linear):
            _take_principal(module)
    return adapted


@torch.no_grad()
def _take_principal(layer: Linear) -> None:
    """PiSSA's start. What is left of W depends on the span of the vectors taken alone, so it is the same on every machine and needs no
    file; peft's own start takes it from an SVD in float32."""
    if layer.weight.is_meta:
        return
    a, b, weight = (part.weight for part in (layer.lora_A["default"], layer.lora_B["default"], layer.base_layer))
    u, s, vt = spectral.decompose(weight)
    root = s[: len(a)].sqrt()
    a.copy_(root[:, None] * vt[: len(a)])
    b.copy_(u[:, : len(a)] * root)
    with one_thread():
        weight.copy_(weight.double() - b.double() @ a.double())


def merge(encoder: nn.Module) -> nn.Module:
    """`encoder` itself without adapters, its matrices those that they make of it: the same function."""
    if isinstance(encoder, peft.PeftModel):
        return encoder.merge_and_unload()
    spectral.merge(encoder)
    return encoder


def budget(network: nn.Module) -> dict[str, float]:
    """Parameter counts of a network by part, and the trained share of all of them in per cent. `adapter`: what of the encoder is trained,
    or beside it; biases, and all of an encoder trained in full, count in `encoder` too. A network of volumes has none of these parts."""
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(_count(p) for name, p in network.named_parameters() if ".ranknum." not in name)  # AdaLoRA's note of a layer's rank
    parts = dict.fromkeys(("encoder", "adapter", "decoder", "channel_adapter", "skip"), 0) if network.recipe.volume.network else _parts(network, total)
    return parts | {"trainable": trainable, "total": total, "share_percent": 100 * trainable / total, "trainable_mb_fp32": 4e-6 * trainable}


def _parts(network: nn.Module, total: int) -> dict[str, int]:
    own = network.recipe.adapter.method in ("bias", "full")
    adapter = sum(p.numel() for p in network.encoder.parameters() if p.requires_grad)
    rest = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("encoder."))
    return {
        "encoder": total - rest - (0 if own else adapter),
        "adapter": adapter,
        "decoder": sum(p.numel() for p in network.decoder.parameters()),
        "channel_adapter": sum(p.numel() for p in network.channel_adapter.parameters()),
        "skip": sum(p.numel() for p in network.skip.parameters()) if network.skip else 0,
    }


def _count(parameter: nn.Parameter) -> int:
    """Weights in a tensor, of 4 bits each too."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed else parameter.numel()
