"""What the network has to compute and to move, counted; and what a machine can do, measured.

An operation is one multiplication or addition: a matrix product of n x k by k x m has 2 n k m. Only useful work is counted:
the products that a result needs on real tokens, without the padding of windows, norms, activations and softmax.
"""

from __future__ import annotations

import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..medsam import CHANNELS, PATCH
from ..network import Decoder, Skip, WMHNet, channel_adapter
from ..precision import best_device
from ..sections import LOW_RANK, Encoder
from ..settings import Recipe
from .table import alternate


def windows(grid: int, window: int) -> list[tuple[int, int]]:
    """Rows and columns of real tokens in each window of a map of `grid` x `grid` (0: one window, the whole map)."""
    sides = [min(window or grid, grid - first) for first in range(0, grid, window or grid)]
    return [(rows, columns) for rows in sides for columns in sides]


def encoder_flops(settings: Encoder, px: int) -> dict[str, float]:
    """Useful operations of one px x px image through the encoder, by part.

    With N = (px/16)^2 tokens of width d: a block's four linear layers 2 N d (3d + d + 4d + 4d) = `linear`; its attention
    4 n^2 d for each window of n = rows x columns real tokens (q k^T and weights x v) and 2 n d (rows + columns) for relative
    positions = `attention`; patch embedding 2 N d 3 16^2 and neck 2 N (256 d + 9 256^2) = `rest`.
    """
    grid, d = px // PATCH, settings.dim
    tokens, attention = grid**2, 0
    for block in range(settings.depth):
        for rows, columns in windows(grid, 0 if block in settings.global_blocks else settings.window):
            n = rows * columns
            attention += 4 * n**2 * d + 2 * n * d * (rows + columns)
    return {"linear": 24.0 * settings.depth * tokens * d**2, "attention": float(attention),
            "rest": 2.0 * tokens * (3 * PATCH**2 * d + CHANNELS * d + 9 * CHANNELS**2)}


def encoder_bytes(settings: Encoder, px: int, size: int) -> dict[str, float]:
    """The least that one image makes the encoder read and write, in numbers of `size` bytes: each weight once, each linear
    layer's input and output once (16 N d a block), of attention q, k, v and the result (4 N d) but no score."""
    tokens, d = (px // PATCH) ** 2, settings.dim
    return {"linear": float(size * settings.depth * (12 * d**2 + 16 * tokens * d)), "attention": float(size * settings.depth * 4 * tokens * d),
            "rest": float(size * (3 * px**2 + 3 * PATCH**2 * d + 2 * tokens * d + CHANNELS * d + 9 * CHANNELS**2 + 4 * tokens * CHANNELS))}


def network_flops(recipe: Recipe, training: bool = False) -> float:
    """Useful operations of one slice through the network with merged adapters; with `training` of a forward and backward pass:
    frozen layers twice (their inputs' gradient alone), attention, adapters, decoder and skip three times."""
    encoder, convolutions = encoder_flops(recipe.encoder, recipe.inputs.img_size), convolution_flops(recipe)
    if not training:
        return sum(encoder.values()) + convolutions
    d, a = recipe.encoder.dim, recipe.adapter
    tokens = (recipe.inputs.img_size // PATCH) ** 2
    adapters = 2.0 * recipe.encoder.depth * tokens * d * (6 * a.rank_attention + 10 * a.rank_mlp) if a.method in LOW_RANK else 0.0
    return 2 * (encoder["linear"] + encoder["rest"]) + 3 * (encoder["attention"] + adapters + convolutions)


def convolution_flops(recipe: Recipe) -> float:
    """Of channel adapter, decoder and skip on one slice, as torch counts them."""
    px = recipe.inputs.img_size
    with torch.device("meta"):
        parts = _Convolutions(recipe)
        count = FlopCounterMode(display=False)
        with count, torch.no_grad():
            parts(torch.empty(1, recipe.inputs.channels, px, px), torch.empty(1, CHANNELS, px // PATCH, px // PATCH))
    return float(count.get_total_flops())


class _Convolutions(nn.Module):
    """Everything of a WMHNet but its encoder."""

    def __init__(self, recipe: Recipe):
        super().__init__()
        channels = recipe.inputs.channels
        self.channel_adapter, self.decoder, self.skip = channel_adapter(channels), Decoder(), Skip(channels) if recipe.skip else None

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        self.channel_adapter(x)
        return self.decoder(features, self.skip(x) if self.skip else None)[0]


def fastest(work: Callable[[], object], repetitions: int) -> float:
    """Seconds of the fastest of several runs of `work`."""
    return min(alternate({"": work}, repetitions)[0][""])


def machine(size: int = 2048, repetitions: int = 15, device: str | torch.device = "cpu") -> dict:
    """The machine and the most it showed: GFLOP/s of a `size`^3 matrix product in fp32 (`fp32`) and bf16 (`bf16`; on a GPU `fp16` too), and GB/s
    of copying a tensor of 16 size^2 numbers (`bandwidth`, read and written bytes both counted)."""
    device = torch.device(device)
    rates = {}
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16} | ({"fp16": torch.float16} if device.type == "cuda" else {})
    for name, dtype in kinds.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates[name] = 2e-9 * size**3 / fastest(lambda a=a, b=b: F.linear(a, b), repetitions)
    source = torch.randn(16 * size**2, device=device)
    target = torch.empty_like(source)
    rates["bandwidth"] = 2e-9 * source.nbytes / fastest(lambda: target.copy_(source), repetitions)
    return {"name": named(device), "cores": _cores(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "instructions": _instructions(), **rates}


def part_seconds(network: WMHNet, image: Tensor, dtype: torch.dtype, repetitions: int) -> dict[str, float]:
    """Median seconds of each part of a forward pass of one slice: "encoder", its "attention" (projections, windows) and "MLP" over
    all blocks, and "decoder" with channel adapter and skip. `dtype`: what autocast computes in."""
    passes, spent, started = [], defaultdict(float), {}
    parts = [(network.encoder, "encoder"), (network.channel_adapter, "decoder"), (network.decoder, "decoder"), (network.skip, "decoder")]
    parts += [part for block in network.encoder.blocks for part in ((block.attn, "attention"), (block.mlp, "MLP"))]
    hooks = []
    for module, part in parts:
        if module is not None:
            hooks.append(module.register_forward_pre_hook(lambda module, given: started.update({module: time.perf_counter()})))
            hooks.append(module.register_forward_hook(
                lambda module, given, out, part=part: spent.update({part: spent[part] + time.perf_counter() - started[module]})))
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for _ in range(repetitions):
            spent.clear()
            network(image)
            passes.append(dict(spent))
    for hook in hooks:
        hook.remove()
    return pd.DataFrame(passes).median().to_dict()


def points(recipe: Recipe, measured: dict[tuple[str, str], dict[str, float]]) -> pd.DataFrame:
    """One row a measured part: `part`, `who`, `precision` ("fp32", "bf16"), `intensity` (useful operations a byte of the traffic
    that cannot be avoided) and `gflops` reached. `measured`: of each (who, precision) the seconds of `part_seconds`."""
    px, e, rows = recipe.inputs.img_size, recipe.encoder, []
    flops, tokens = encoder_flops(e, px), (px // PATCH) ** 2
    for (who, precision), parts in measured.items():
        size = 4 if precision == "fp32" else 2
        moved = encoder_bytes(e, px, size)
        mlp = size * e.depth * (8 * e.dim**2 + 10 * tokens * e.dim)
        works = {"encoder": (sum(flops.values()), sum(moved.values())), "MLP": (flops["linear"] * 2 / 3, mlp),
                 "attention": (flops["linear"] / 3 + flops["attention"], moved["linear"] + moved["attention"] - mlp),
                 "decoder": (convolution_flops(recipe), size * _activations(recipe))}
        rows += [dict(part=part, who=who, precision=precision, intensity=works[part][0] / works[part][1], gflops=1e-9 * works[part][0] / spent)
                 for part, spent in parts.items()]
    return pd.DataFrame(rows)


def _activations(recipe: Recipe) -> float:
    """Numbers that the convolutions of one slice read and write: inputs, outputs and weights of each."""
    counts, px = [], recipe.inputs.img_size

    def note(module, given, out):
        counts.append(given[0].numel() + out.numel() + sum(p.numel() for p in module.parameters()))

    with torch.device("meta"):
        parts = _Convolutions(recipe)
        for module in parts.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                module.register_forward_hook(note)
        parts(torch.empty(1, recipe.inputs.channels, px, px), torch.empty(1, CHANNELS, px // PATCH, px // PATCH))
    return float(sum(counts))


def named(device: str | torch.device = "") -> str:
    """What is measured on, in words: a GPU, or the processor and how many threads work; "": the GPU where there is one."""
    device = best_device(device)
    threads = torch.get_num_threads()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()} ({threads} thread{'s' * (threads > 1)})"


def _processor() -> str:
    """The processor as Linux names it; elsewhere what Python knows."""
    file = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in file.read_text().splitlines() if line.startswith("model name")] if file.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count()


def _instructions() -> str:
    words = [torch.backends.cpu.get_cpu_capability()]
    words += [name for name, found in (("AVX512-BF16", torch.cpu._is_avx512_bf16_supported()), ("AMX", torch.cpu._is_amx_tile_supported())) if found]
    return ", ".join(words)
