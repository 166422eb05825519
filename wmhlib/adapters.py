"""Parameter-efficient adaptation of the encoder, and the count of what is trained."""

from __future__ import annotations

import peft
import torch
from torch import nn

from .settings import Adapter

_MLP = r".*\.mlp\.lin[12]"
_TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])"


def adapt(encoder: nn.Module, adapter: Adapter, seed: int) -> nn.Module:
    """Freeze `encoder` and put LoRA (Hu et al. 2021) on its attention and MLP layers; its output is unchanged at first."""
    encoder.requires_grad_(False)
    if adapter.method == "none":
        return encoder
    config = peft.LoraConfig(
        r=adapter.rank_attention, lora_alpha=adapter.rank_attention, lora_dropout=adapter.dropout, target_modules=_TARGETS,
        rank_pattern={_MLP: adapter.rank_mlp}, alpha_pattern={_MLP: adapter.rank_mlp})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return peft.get_peft_model(encoder, config)


def budget(network: nn.Module) -> dict[str, float]:
    """Parameter counts of a WMHNet by part, and the trained share of all of them in per cent."""
    encoder = dict(network.encoder.named_parameters())
    lora = sum(p.numel() for name, p in encoder.items() if "lora_" in name)
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in network.parameters())
    return {
        "encoder": sum(p.numel() for p in encoder.values()) - lora,
        "lora": lora,
        "decoder": sum(p.numel() for p in network.decoder.parameters()),
        "channel_adapter": sum(p.numel() for p in network.channel_adapter.parameters()),
        "skip": sum(p.numel() for p in network.skip.parameters()) if network.skip else 0,
        "trainable": trainable,
        "total": total,
        "share_percent": 100 * trainable / total,
        "trainable_mb_fp32": 4e-6 * trainable,
    }
