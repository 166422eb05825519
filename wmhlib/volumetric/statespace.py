"""Vision-Mamba blocks: a selective state space over the tokens of a map, read from both ends, at a cost linear in the tokens."""

from __future__ import annotations

import functools
import inspect
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Mamba2Config
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

_HEADS = 8  # with the widths of `networks` every stride is a multiple of 8, as the CUDA kernels want it
_STATE = 16  # numbers that a channel's state holds
_CHUNK = 64  # tokens that are multiplied as one matrix
_STEPS = (1e-3, 1e-1)  # range of the first time steps (Gu & Dao 2023, section 3.6)
_KERNELS = ("causal_conv1d_fn", "mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan")  # functions that transformers replaces by those of CUDA


class VisionMamba(nn.Module):
    """x + S(norm x) + S'(norm x, last token first) of tokens B x N x `dim`, S and S' state spaces with weights of their own (Zhu et al. 2024,
    who share the outer projections of both).

    Each is transformers' `Mamba2Mixer`: h_t = exp(dt_t A) h_t-1 + dt_t x_t B_t^T, y_t = h_t C_t + D x_t for each of 8 heads, where dt, B and C
    are read from the tokens (Gu & Dao 2023, eq. 2 and algorithm 2; A is a number a head, Dao & Gu 2024). On CUDA it takes the kernels of
    mamba-ssm and causal-conv1d where they are installed, elsewhere products of matrices of 64 tokens in plain torch.
    """

    def __init__(self, dim: int):
        super().__init__()
        config = Mamba2Config(hidden_size=dim, expand=2, num_heads=_HEADS, head_dim=2 * dim // _HEADS, state_size=_STATE, n_groups=1, chunk_size=_CHUNK,
                              num_hidden_layers=1)
        self.norm = nn.LayerNorm(dim)
        self.first, self.last = Mamba2Mixer(config, 0), Mamba2Mixer(config, 0)
        for mixer in (self.first, self.last):
            _spread_steps(mixer)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.first(y) + self.last(y.flip(1)).flip(1)


class OverTokens(nn.Sequential):
    """Blocks of tokens one after the other on a map B x C x X x Y x Z, whose voxels are the tokens in the order they lie in memory."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = super().forward(x.flatten(2).transpose(1, 2))
        return tokens.transpose(1, 2).reshape(x.shape)


@torch.no_grad()
def _spread_steps(mixer: Mamba2Mixer) -> None:
    """First time steps log-uniform in `_STEPS`, as the inverse of softplus; not every version of transformers sets them without a model around."""
    low, high = map(math.log, _STEPS)
    steps = torch.exp(low + (high - low) * torch.rand(_HEADS))
    mixer.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))


def _by_device(function: Callable) -> Callable:
    """`function` for CUDA and elsewhere the one of torch that it stands for: transformers chooses once, by what is installed, and memory is estimated on
    the CPU's tensors."""
    plain = inspect.unwrap(function)

    @functools.wraps(function)
    def chosen(*args, **kwargs):
        return (function if next(iter((*args, *kwargs.values()))).is_cuda else plain)(*args, **kwargs)

    return chosen


for _name in _KERNELS:
    if hasattr(modeling_mamba2, _name):  # older versions choose by device themselves
        setattr(modeling_mamba2, _name, _by_device(getattr(modeling_mamba2, _name)))

if not torch.cuda.device_count():  # that kernels for CUDA are missing is nothing to warn of
    for _name in ("transformers.integrations.hub_kernels", "transformers.models.mamba2.modeling_mamba2"):
        logging.getLogger(_name).setLevel(logging.ERROR)
