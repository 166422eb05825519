"""Parameter-efficient adaptation of the encoder, and the count of what is trained."""

from __future__ import annotations

import math

import peft
import torch
from torch import Tensor, nn

from .settings import Adapter

_MLP = r".*\.mlp\.lin[12]"
_TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])"


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
    where the base's output lies."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if self.active_adapters != ["default"] or self.disable_adapters or self.merged or args or kwargs or getattr(self, "lora_variant", None):
            return super().forward(x, *args, **kwargs)
        shape = x.shape
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        x = x.reshape(-1, shape[-1])
        inner = self.lora_A["default"](self.lora_dropout["default"](x))
        outer = self.lora_B["default"].weight * self.scaling["default"]
        return self.base_layer(x).addmm_(inner, outer.to(inner.dtype).T).view(*shape[:-1], -1)


def adapt(encoder: nn.Module, adapter: Adapter, seed: int) -> nn.Module:
    """Freeze `encoder` and put LoRA (Hu et al. 2021) on its attention and MLP layers, its output unchanged at first; with the
    method "full" all of it is trained instead."""
    encoder.requires_grad_(adapter.method == "full")
    if adapter.method != "lora":
        return encoder
    config = peft.LoraConfig(
        r=adapter.rank_attention, lora_alpha=adapter.rank_attention, lora_dropout=adapter.dropout, target_modules=_TARGETS,
        rank_pattern={_MLP: adapter.rank_mlp}, alpha_pattern={_MLP: adapter.rank_mlp})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(encoder, config)
    for module in adapted.modules():
        if isinstance(module, peft.tuners.lora.Linear):
            module.__class__ = Linear
            if adapter.dropout:
                module.lora_dropout["default"] = Dropout(adapter.dropout)
    return adapted


def budget(network: nn.Module) -> dict[str, float]:
    """Parameter counts of a WMHNet by part, and the trained share of all of them in per cent."""
    encoder = dict(network.encoder.named_parameters())
    lora = sum(p.numel() for name, p in encoder.items() if "lora_" in name)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(map(_count, network.parameters()))
    return {
        "encoder": sum(map(_count, encoder.values())) - lora,
        "lora": lora,
        "decoder": sum(p.numel() for p in network.decoder.parameters()),
        "channel_adapter": sum(p.numel() for p in network.channel_adapter.parameters()),
        "skip": sum(p.numel() for p in network.skip.parameters()) if network.skip else 0,
        "trainable": trainable,
        "total": total,
        "share_percent": 100 * trainable / total,
        "trainable_mb_fp32": 4e-6 * trainable,
    }


def _count(parameter: nn.Parameter) -> int:
    """Weights in a tensor, of 4 bits each too."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed else parameter.numel()
