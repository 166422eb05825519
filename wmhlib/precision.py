"""Where networks run, and what numbers that device computes with: fp32, or half precision under autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .errors import WMHError

PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}  # as people call them


def native_precision(wanted: str, device: torch.device) -> str:
    """`wanted` ("no", "bf16", "fp16"), or what `device` computes without emulation in its place: fp16 for bf16 on an older
    GPU, "no" (fp32) for either on a CPU without bf16 instructions."""
    if device.type == "cuda":
        return "fp16" if wanted == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False) else wanted
    if wanted == "bf16" and device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16"
    return "no"


def best_device(device: torch.device | str | None = None) -> torch.device:
    """`device`, unless given the GPU where there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


@contextlib.contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """WMHError with `advice` where the memory of a GPU is full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise WMHError(f"the memory of the GPU is full: {advice} ({str(error).splitlines()[0]})") from None


def dtype_of(precision: str) -> torch.dtype:
    """The type of numbers that `precision` ("no", "bf16", "fp16") computes with."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Mixed precision on `device`: none for "no"."""
    return torch.autocast(torch.device(device).type, dtype_of(precision), enabled=precision != "no")
